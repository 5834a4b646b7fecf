#!/usr/bin/env python3
"""Bit-level restatement of bitsandbytes' NF4 rules in numpy, checked against the golden file; adds cuda_emul vectors.
usage: nf4_spec.py GOLDEN_DIR [--write]"""

import json, sys
import numpy as np
from safetensors import safe_open

f32 = np.float32
d = sys.argv[1]
write = "--write" in sys.argv
import torch
from safetensors.torch import load_file, save_file

T = load_file(d + "/nf4.safetensors")
J = json.load(open(d + "/nf4.json"))
code = T["nf4_code"].numpy()
mids = ((code[:-1] + code[1:]) / f32(2)).astype(f32)
CUDA = np.array(
    [
        -0.8480964004993439,
        -0.6106329262256622,
        -0.4599952697753906,
        -0.33967943489551544,
        -0.23460740596055984,
        -0.13791173323988914,
        -0.045525018125772476,
        0.03979014977812767,
        0.1202552504837513,
        0.2035212516784668,
        0.2920137718319893,
        0.3893125355243683,
        0.5016634166240692,
        0.6427869200706482,
        0.8614784181118011,
    ],
    dtype=f32,
)
print(
    "midpoints, f32 ulps between CPU midpoints and CUDA constants:",
    (mids.view(np.int32) - CUDA.view(np.int32)).tolist(),
)
dmap = T["nested_quant_map_create_dynamic_map"].numpy()


def pack(q):
    if len(q) % 2:
        q = np.append(q, np.uint8(PADCODE))
    return (q[0::2] << 4 | q[1::2]).astype(np.uint8)


def blocks(x, bs):
    return [x[i : i + bs] for i in range(0, len(x), bs)]


def nf4(x, bs, rule):
    global PADCODE
    PADCODE = 7
    q, am = [], []
    for b in blocks(x.astype(f32), bs):
        a = np.abs(b).max()
        with np.errstate(all="ignore"):
            if rule == "cpu":
                if len(b) == bs:
                    s = b * (f32(1) / max(a, f32(1e-38)))
                else:
                    a = max(a, f32(1e-38))
                    s = b / a
                s = np.clip(s, f32(-1), f32(1))
                q.append(np.searchsorted(mids, s, side="left").astype(np.uint8))
            else:
                s = b * (f32(1) / a)  # inf * 0 = NaN in a zero block
                c = np.zeros(len(b), np.uint8)
                for t in CUDA:
                    c += (s > t).astype(np.uint8)  # NaN > t is false -> code 0
                q.append(c)
        am.append(a)
    return pack(np.concatenate(q)), np.array(am, f32)


def lut():
    m = (f32(0.5) * (dmap[:-1] + dmap[1:])).astype(f32)
    i = np.arange(65536)
    v = (f32(-1) + (f32(2) * i.astype(f32)) / f32(65535)).astype(f32)
    return np.searchsorted(m, v, side="left").astype(np.uint8)  # count of midpoints < v


LUT = lut()


def q8_cpu(x, bs):
    o, am = [], []
    for b in blocks(x, bs):
        a = np.abs(b).max()
        am.append(a)
        if a == 0:
            o.append(np.zeros(len(b), np.uint8))
            continue
        v = np.clip(b * (f32(1) / a), f32(-1), f32(1))
        o.append(LUT[((v + f32(1)) * f32(0.5) * f32(65535) + f32(0.5)).astype(np.uint16)])
    return np.concatenate(o), np.array(am, f32)


def q8_cuda_one(x):
    p, up, lp = 127, 255, 0
    lower, upper = f32(-1), f32(1)
    val = dmap[p]
    i = 64
    while i > 0:
        if x > val:
            lp, lower = p, val
            p += i
        else:
            up, upper = p, val
            p -= i
        val = dmap[p]
        i >>= 1
    if up == 255:
        upper = dmap[255]
    if lp == 0:
        lower = dmap[0]
    if x > val:
        return up if x > (upper + val) * f32(0.5) else p
    return lp if x < (lower + val) * f32(0.5) else p


def q8_cuda(x, bs):
    o, am = [], []
    for b in blocks(x, bs):
        a = np.abs(b).max()
        am.append(a)
        with np.errstate(all="ignore"):
            v = b * (f32(1) / a)
        o.append(np.array([q8_cuda_one(t) for t in v], np.uint8))
    return np.concatenate(o), np.array(am, f32)


bad = 0
diffs = {}
out = {}
for e in J["cases"]:
    k, bs = e["key"], e["blocksize"]
    x = T[k + ".input"].float().reshape(-1).numpy()
    p, am = nf4(x, bs, "cpu")
    ok = np.array_equal(p, T[k + ".packed"].numpy()) and np.array_equal(
        am, T[k + ".absmax"].numpy()
    )
    n = len(x)
    qq = np.stack([p >> 4, p & 15], 1).reshape(-1)[:n]
    dq = code[qq] * np.repeat(am, bs)[:n]
    ref = T.get(k + ".dequant_f32", T[k + ".dequant"]).float().reshape(-1).numpy()
    okd = np.array_equal(dq, ref)
    okc = torch.equal(torch.tensor(dq).to(T[k + ".dequant"].dtype), T[k + ".dequant"].reshape(-1))
    off = T[k + ".nested.offset"].numpy()[0]
    c8, a8 = q8_cpu(am - off, 256)
    ok8 = np.array_equal(c8, T[k + ".nested.absmax_u8"].numpy()) and np.array_equal(
        a8, T[k + ".nested.absmax"].numpy()
    )
    am2 = dmap[c8] * np.repeat(a8, 256)[: len(c8)] + off
    okn = np.array_equal(am2, T[k + ".nested.absmax_dequant"].numpy())
    dn = torch.tensor(code[qq] * np.repeat(am2, bs)[:n]).to(T[k + ".nested.dequant"].dtype)
    oknd = torch.equal(dn, T[k + ".nested.dequant"].reshape(-1))
    mean_ok = f32(am.mean(dtype=np.float64)) == off
    e["checks"] = dict(
        packed=ok,
        dequant_f32=okd,
        dequant=okc,
        nested_codes=ok8,
        nested_absmax=okn,
        nested_dequant=oknd,
        offset_eq_f64_mean=bool(mean_ok),
    )
    if not all(v for kk, v in e["checks"].items() if kk != "offset_eq_f64_mean"):
        bad += 1
        print("MISMATCH", k, e["checks"])
    pc, amc = nf4(x, bs, "cuda")
    cc, ac = q8_cuda(am - off, 256)
    if not np.array_equal(pc, p):
        out[k + ".cuda_emul.packed"] = torch.tensor(pc)
    if not np.array_equal(amc, am):
        out[k + ".cuda_emul.absmax"] = torch.tensor(amc)
    if not np.array_equal(cc, c8):
        out[k + ".cuda_emul.nested.absmax_u8"] = torch.tensor(cc)
    e["cuda_emul_differs"] = dict(
        packed=int((pc != p).sum()),
        absmax=int((amc != am).sum()),
        nested_codes=int((cc != c8).sum()),
        n_absmax=len(am),
    )
    e["nested_rel_err"] = {
        "cpu_lut": float(np.abs(am2 - am).max() / max(am.max(), 1e-30)),
        "cuda": float(
            np.abs(dmap[cc] * np.repeat(ac, 256)[: len(cc)] + off - am).max() / max(am.max(), 1e-30)
        ),
    }
x = T["sweep.input"].numpy()
p, _ = nf4(x, 4096, "cpu")
print(
    "sweep",
    np.array_equal(p, T["sweep.packed"].numpy()),
    "cuda diff",
    int((nf4(x, 4096, "cuda")[0] != p).sum()),
)
v = T["dyn8.input"].numpy()
c, a = q8_cpu(v, 2048)
print("dyn8 cpu rule equal", np.array_equal(c, T["dyn8.codes"].numpy()))
cc, _ = q8_cuda(v, 2048)
out["dyn8.cuda_emul.codes"] = torch.tensor(cc)
print(
    "dyn8 codes differing cpu-LUT vs CUDA search:",
    int((cc != c).sum()),
    "of",
    len(c),
    "codes the LUT can never emit:",
    256 - len(np.unique(LUT)),
)
print("cases", len(J["cases"]), "mismatching the restated rules", bad)
for e in J["cases"]:
    if any(e["cuda_emul_differs"][q] for q in ("packed", "absmax", "nested_codes")):
        print(e["key"], e["cuda_emul_differs"], e["nested_rel_err"])
if write:
    with safe_open(d + "/nf4.safetensors", "pt") as f:
        meta = f.metadata()
    T.update(out)
    save_file(T, d + "/nf4.safetensors", meta)
    json.dump(J, open(d + "/nf4.json", "w"), indent=1)
