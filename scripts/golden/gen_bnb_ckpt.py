#!/usr/bin/env python3
"""Real bnb-4bit checkpoints of the tiny golden models, saved by transformers on CPU, with reference logits after a reload.
usage: gen_bnb_ckpt.py OUTROOT"""

import os, sys, json, shutil, warnings

warnings.filterwarnings("ignore")
os.environ["HF_HUB_OFFLINE"] = "1"
import torch, transformers, bitsandbytes as bnb
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from safetensors.torch import load_file, save_file
from safetensors import safe_open

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
root = sys.argv[1]
CASES = [
    ("given", "llama_s0", "f32", True, {}),
    ("given", "llama_s0", "f32", False, {}),
    ("given", "llama_s0", "bf16", True, {}),
    ("given", "qwen2_s0", "f16", True, {}),
    ("given", "gpt2_s0", "f32", True, {}),
    ("given", "llama_s0", "bf16", True, dict(bnb_4bit_quant_storage=torch.bfloat16)),
]
for which, name, dt, dq, kw in CASES:
    src = f"{root}/{which}/models/{name}"
    tag = f"{name}.{dt}.{'dq' if dq else 'plain'}" + (".storage_bf16" if kw else "")
    d = f"{root}/{which}/bnb4bit/{tag}"
    shutil.rmtree(d, ignore_errors=True)
    T = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[dt]
    q = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=dq,
        bnb_4bit_compute_dtype=torch.float32,
        **kw,
    )
    try:
        m = AutoModelForCausalLM.from_pretrained(
            src, quantization_config=q, dtype=T, device_map={"": "cpu"}, attn_implementation="eager"
        ).eval()
        m.save_pretrained(d)
        for f in ("generation_config.json",):
            if os.path.exists(f"{d}/{f}"):
                os.remove(f"{d}/{f}")
        m2 = AutoModelForCausalLM.from_pretrained(
            d, device_map={"": "cpu"}, attn_implementation="eager"
        ).eval()
        ids = load_file(src + "/ref.safetensors")["input_ids"]
        with torch.no_grad():
            a, b = m(ids).logits, m2(ids).logits
        m32 = m2  # f32 logits from the dequantised weights upcast to f32 (what a f32-compute reader of this file should get)
        from transformers.pytorch_utils import Conv1D

        # a plain f32 model with each quantised weight replaced by its dequantised value, for a dtype-independent reference
        p = AutoModelForCausalLM.from_pretrained(
            src, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        sd = dict(p.named_modules())
        nq = 0
        for n, mod in m2.named_modules():
            if isinstance(mod, bnb.nn.Linear4bit):
                qs = mod.weight.quant_state
                w = bnb.functional.dequantize_4bit(mod.weight.data, qs).float()
                nq += 1
                tgt = sd[n]
                tgt.weight.data = (w.t() if isinstance(tgt, Conv1D) else w).contiguous()
                if mod.bias is not None:
                    tgt.bias.data = mod.bias.data.float()
            elif (
                isinstance(mod, (torch.nn.Embedding, torch.nn.LayerNorm))
                or "norm" in n.lower()
                or n.endswith("lm_head")
            ):
                for pn, pv in mod.named_parameters(recurse=False):
                    getattr(sd[n], pn).data = pv.data.float()
        with torch.no_grad():
            c = p(ids).logits
        save_file(
            {
                "input_ids": ids,
                "logits": a.float().contiguous(),
                "logits_reloaded": b.float().contiguous(),
                "logits_f32_from_dequant": c.contiguous(),
            },
            d + "/ref.safetensors",
        )
        w = {n: mod for n, mod in m2.named_modules() if isinstance(mod, bnb.nn.Linear4bit)}
        k0 = sorted(w)[0]
        save_file(
            {
                n + ".weight": bnb.functional.dequantize_4bit(
                    mod.weight.data, mod.weight.quant_state
                ).contiguous()
                for n, mod in list(sorted(w.items()))[:4]
            },
            d + "/dequant_some.safetensors",
        )
        print(
            tag,
            "linear4bit",
            nq,
            "reload diff",
            float((a.float() - b.float()).abs().max()),
            "f32 from dequant vs own",
            float((c - a.float()).abs().max()),
            "size",
            sum(os.path.getsize(f"{d}/{f}") for f in os.listdir(d)),
            flush=True,
        )
        if tag in ("llama_s0.f32.dq", "gpt2_s0.f32.dq", "llama_s0.bf16.dq.storage_bf16"):
            with safe_open(d + "/model.safetensors", "pt") as f:
                print(f.metadata())
                for k in sorted(f.keys()):
                    if (
                        "layers.0." in k
                        and ("q_proj" in k or "norm" in k)
                        or "h.0." in k
                        or "lm_head" in k
                    ):
                        t = f.get_tensor(k)
                        print(
                            "  ",
                            k,
                            t.dtype,
                            list(t.shape),
                            bytes(t.tolist())[:400] if "quant_state" in k else "",
                        )
            print(json.dumps(json.load(open(d + "/config.json")).get("quantization_config")))
    except Exception as e:
        import traceback

        traceback.print_exc()
        print("FAILED", tag, repr(e)[:300], flush=True)
os.system(f"chmod -R a+r {root}")
