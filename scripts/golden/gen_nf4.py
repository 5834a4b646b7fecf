#!/usr/bin/env python3
"""Golden NF4 vectors from bitsandbytes on CPU -> golden/given/nf4/*.safetensors + nf4.json
usage: gen_nf4.py OUTDIR [--seed 0]"""

import argparse, json, os
import torch, bitsandbytes as bnb, bitsandbytes.functional as F
from safetensors.torch import save_file

ap = argparse.ArgumentParser()
ap.add_argument("out")
ap.add_argument("--seed", type=int, default=0)
a = ap.parse_args()
os.makedirs(a.out, exist_ok=True)
g = torch.Generator().manual_seed(a.seed)
rn = lambda *s: torch.randn(*s, generator=g)
ru = lambda *s: torch.rand(*s, generator=g)
code = F.get_4bit_type("nf4", device="cpu")
mids = (code[:-1] + code[1:]) / 2


def outl(*s):
    x = rn(*s) * 0.02
    f = x.view(-1)
    i = torch.randperm(f.numel(), generator=g)[: max(1, f.numel() // 200)]
    f[i] = torch.sign(rn(len(i))) * (1 + 9 * ru(len(i)))
    return x


def zeros_block(n):
    x = rn(n)
    x[64:128] = 0
    x[256:512] = 0
    x[600:664] = -0.0
    return x


def ties(
    bs,
):  # absmax exactly 1 and values exactly at the midpoints, +-1 ulp of them, and the codes themselves
    v = [
        mids,
        torch.nextafter(mids, torch.full_like(mids, 9.0)),
        torch.nextafter(mids, torch.full_like(mids, -9.0)),
        code,
    ]
    v = torch.cat(v)
    b = torch.zeros(bs)
    b[0] = 1.0
    b[1 : 1 + min(len(v), bs - 1)] = v[: bs - 1]
    return torch.cat(
        [b, -b, b * 0.37, b * 4.0]
    )  # power-of-two scale keeps ties exact; 0.37 does not


def denorm(n):
    x = torch.zeros(n)
    x[0:64] = rn(64) * 1e-39  # f32 denormals, block absmax below 1e-38
    x[64:128] = rn(64) * 1e-36  # normal but tiny
    x[128:192] = rn(64) * 1e-38
    x[192:256] = rn(64) * 1e-7  # f16 subnormal range
    x[256:320] = rn(64) * 1e-44
    return x


def signs(n):
    x = ru(n) * 2 - 1
    x[:64] = x[:64].abs()
    x[64:128] = -x[64:128].abs()
    x[128:192] = 0.5
    x[192:256] = -0.5
    x[256] = 1000.0
    return x


CASES = [  # name, tensor f32, dtypes, blocksizes
    ("normal_64x96", rn(64, 96), ("float32", "bfloat16", "float16"), (64, 128, 256, 4096)),
    ("normal002_48x128", rn(48, 128) * 0.02, ("float32", "bfloat16"), (64,)),
    ("uniform_32x128", ru(32, 128) * 2 - 1, ("float32", "bfloat16", "float16"), (64, 256)),
    ("outliers_64x64", outl(64, 64), ("float32", "bfloat16", "float16"), (64, 128)),
    ("zeros_block_1024", zeros_block(1024), ("float32", "bfloat16"), (64, 256)),
    ("all_zero_256", torch.zeros(256), ("float32",), (64,)),
    ("tiny_denormal_512", denorm(512), ("float32", "bfloat16", "float16"), (64,)),
    ("ties_64", ties(64), ("float32",), (64,)),
    ("ties_128", ties(128), ("float32",), (128,)),
    ("signs_512", signs(512), ("float32", "bfloat16", "float16"), (64,)),
    ("partial_1000", rn(1000), ("float32", "bfloat16", "float16"), (64, 128, 256, 4096)),
    ("partial_65", rn(65), ("float32",), (64,)),
    ("partial_odd_2d_7x37", rn(7, 37), ("float32", "bfloat16"), (64, 128)),
    ("partial_zero_tail_130", torch.cat([rn(128), torch.zeros(2)]), ("float32",), (64,)),
    ("single_1", torch.tensor([-3.25]), ("float32",), (64,)),
    ("row_crossing_5x48", rn(5, 48), ("float32",), (64, 128)),
    (
        "big_nested_300x256",
        outl(300, 256),
        ("float32",),
        (64,),
    ),  # 1200 absmax -> 5 nested blocks, last partial
    (
        "nested_partial_17x64",
        rn(17, 64).abs() * torch.logspace(-4, 2, 17)[:, None],
        ("float32", "bfloat16"),
        (64,),
    ),
]
T, D = {}, []


def rec(name, x, bs, dt):
    x = x.to(getattr(torch, dt))
    k = f"{name}.bs{bs}.{dt}"
    e = dict(key=k, shape=list(x.shape), blocksize=bs, dtype=dt)
    T[k + ".input"] = x.contiguous()
    q, s = F.quantize_4bit(x, blocksize=bs, quant_type="nf4", compress_statistics=False)
    T[k + ".packed"] = q.reshape(-1)
    T[k + ".absmax"] = s.absmax.clone()
    assert s.absmax.dtype == torch.float32
    e["packed_shape"] = list(q.shape)
    e["n_blocks"] = s.absmax.numel()
    T[k + ".dequant"] = F.dequantize_4bit(q, s).contiguous()
    d32 = F.dequantize_4bit(
        q,
        F.QuantState(
            absmax=s.absmax,
            shape=s.shape,
            code=s.code,
            blocksize=bs,
            quant_type="nf4",
            dtype=torch.float32,
        ),
    )
    if dt != "float32":
        T[k + ".dequant_f32"] = d32.contiguous()
    q2, s2 = F.quantize_4bit(x, blocksize=bs, quant_type="nf4", compress_statistics=True)
    assert torch.equal(q, q2)
    T[k + ".nested.absmax_u8"] = s2.absmax.clone()
    T[k + ".nested.absmax"] = s2.state2.absmax.clone()
    T[k + ".nested.offset"] = s2.offset.reshape(1).clone()
    e["nested_blocksize"] = s2.state2.blocksize
    T[k + ".nested.dequant"] = F.dequantize_4bit(q2, s2).contiguous()
    am = F.dequantize_blockwise(s2.absmax, s2.state2)
    T[k + ".nested.absmax_dequant"] = am + s2.offset
    global QM
    QM = s2.state2.code.clone()
    D.append(e)


for name, x, dts, bss in CASES:
    for dt in dts:
        for bs in bss:
            rec(name, x, bs, dt)
T["nf4_code"] = code.clone()
T["nf4_midpoints"] = mids.clone()
T["nested_quant_map_after_cpu_quantize"] = QM
T["nested_quant_map_create_dynamic_map"] = F.create_dynamic_map()
# a sweep of scalars, absmax 1, so that every decision boundary is probed: 4096 values
sw = torch.linspace(-1, 1, 4096)
q, s = F.quantize_4bit(sw, blocksize=4096, quant_type="nf4")
T["sweep.input"] = sw
T["sweep.packed"] = q.reshape(-1)
# 8-bit dynamic (nested) quantiser alone, with ties of the 256-entry map
qm = F.create_dynamic_map()
m8 = (qm[:-1] + qm[1:]) / 2
v8 = torch.cat(
    [
        qm,
        m8,
        torch.nextafter(m8, torch.full_like(m8, 9.0)),
        torch.nextafter(m8, torch.full_like(m8, -9.0)),
    ]
)
v8 = torch.cat([v8, torch.linspace(-1, 1, 2048 - v8.numel() - 1), torch.tensor([1.0])])
o8, s8 = F.quantize_blockwise(v8, blocksize=2048)
T["dyn8.input"] = v8
T["dyn8.codes"] = o8.reshape(-1)
T["dyn8.absmax"] = s8.absmax.clone()
T["dyn8.map"] = s8.code.clone()
T = {k: v.contiguous().clone() for k, v in T.items()}
save_file(
    T,
    os.path.join(a.out, "nf4.safetensors"),
    {"bitsandbytes": bnb.__version__, "torch": torch.__version__, "seed": str(a.seed)},
)
json.dump(
    {"bitsandbytes": bnb.__version__, "torch": torch.__version__, "cases": D},
    open(os.path.join(a.out, "nf4.json"), "w"),
    indent=1,
)
print(len(D), "cases", sum(v.numel() * v.element_size() for v in T.values()), "bytes")
print("map0", QM[0].item(), F.create_dynamic_map()[0].item())
