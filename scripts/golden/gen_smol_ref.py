#!/usr/bin/env python3
"""Real-model references: logits/loss of SmolLM2 in f32, NF4 and NF4+double quant (bnb CPU), and how far bnb's CPU 8-bit LUT
is from exact nearest-code double quantisation on the real weights.  usage: gen_smol_ref.py HF TEXT OUTDIR"""

import os, sys, json

os.environ["HF_HUB_OFFLINE"] = "1"
import torch, transformers, bitsandbytes.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from safetensors.torch import load_file, save_file

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
hf, txt, out = sys.argv[1:4]
os.makedirs(out, exist_ok=True)
W = load_file(hf + "/model.safetensors")
dm = F.create_dynamic_map()
mids = (dm[:-1] + dm[1:]) / 2
tot = diff = 0
mx = 0.0
se_l = se_e = 0.0
mxr = 0.0
for k, w in W.items():
    if w.dim() != 2 or "embed" in k:
        continue
    q, s = F.quantize_4bit(w.float(), blocksize=64, quant_type="nf4")
    am = s.absmax
    q2, s2 = F.quantize_4bit(w.float(), blocksize=64, quant_type="nf4", compress_statistics=True)
    r = am - s2.offset
    n = len(r)
    a = s2.state2.absmax.repeat_interleave(256)[:n]
    ex = torch.bucketize(r / a, mids).to(torch.uint8)
    d = ex != s2.absmax
    tot += n
    diff += int(d.sum())
    dl, de = dm[s2.absmax.long()] * a + s2.offset, dm[ex.long()] * a + s2.offset
    mx = max(mx, float((dl - de).abs().max()))
    mxr = max(mxr, float(((dl - de) / am).abs().max()))
    se_l += float(((dl - am) ** 2).sum())
    se_e += float(((de - am) ** 2).sum())
res = dict(
    absmax_total=tot,
    codes_differ_lut_vs_exact=diff,
    fraction=diff / tot,
    max_abs_diff_absmax=mx,
    max_rel_diff_absmax=mxr,
    rmse_lut=(se_l / tot) ** 0.5,
    rmse_exact=(se_e / tot) ** 0.5,
)
print(res, flush=True)
tok = AutoTokenizer.from_pretrained(hf)
ids = torch.tensor(tok(open(txt).read(), add_special_tokens=False)["input_ids"])
T = {}
w8 = ids[4000 : 4000 + 4 * 512].reshape(4, 512)
short = ids[1000:1032][None]
T["eval_ids"] = w8.to(torch.int32)
T["short_ids"] = short.to(torch.int32)
for tag, dq in (("f32", None), ("nf4", False), ("nf4dq", True)):
    kw = (
        {}
        if dq is None
        else dict(
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=dq,
                bnb_4bit_compute_dtype=torch.float32,
            ),
            device_map={"": "cpu"},
        )
    )
    m = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, **kw).eval()
    with torch.no_grad():
        T[tag + ".short_logits_last4"] = m(short).logits[:, -4:].contiguous()
        l = [float(m(x[None], labels=x[None]).loss) for x in w8]
    T[tag + ".eval_loss"] = torch.tensor(l)
    res[tag] = dict(losses=l, mean=sum(l) / len(l))
    print(tag, l, flush=True)
    if dq is not None:
        sd = {n: x for n, x in m.named_modules() if n.endswith("layers.0.self_attn.q_proj")}
        ((n, x),) = sd.items()
        T[tag + ".layer0_q_dequant_row0"] = F.dequantize_4bit(x.weight.data, x.weight.quant_state)[
            0
        ].clone()
    del m
save_file({k: v.contiguous() for k, v in T.items()}, out + "/smollm2_ref.safetensors")
json.dump(res, open(out + "/smollm2_ref.json", "w"), indent=1)
os.system(f"chmod -R a+r {out}")
