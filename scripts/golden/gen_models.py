#!/usr/bin/env python3
"""Golden model references from transformers + peft (f32, eager attention, CPU).
usage: gen_models.py given OUTROOT [case ...]
Each case folder:
  config.json           as transformers 5 saves it (rope_parameters, dtype); config_v4.json: the same with rope_theta/rope_scaling/torch_dtype
  model.safetensors     f32 weights, HF names
  ref.safetensors       input_ids/labels/logits/loss (+ hidden.N), a right-padded batch (pad.*), train_ids/train_labels
  adapter_init/         peft adapter (non-zero B) that every LoRA number below starts from
  lora.safetensors      lora.logits, lora.loss, grad.<adapter key>; the same with NF4 base: nf4.* (plain), nf4dq.* (double quant)
  adapter_final/        the adapter after the 20 AdamW steps (f32 base)
  case.json             what was done, per-step losses / lr / grad norms, f32-vs-f64 noise
"""

import json, math, os, sys, copy, shutil, warnings

warnings.filterwarnings("ignore")
import torch, transformers, peft, bitsandbytes as bnb, bitsandbytes.functional as BF
from transformers import AutoModelForCausalLM, CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
LLA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
B = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    attention_dropout=0.0,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)


def c(mt, seed, targets, r=4, alpha=8, seq=24, extra=None, drop=(), **kw):
    cfg = {k: v for k, v in B.items() if k not in drop}
    cfg.update(kw)
    cfg.update(extra or {})
    return dict(model_type=mt, seed=seed, targets=targets, r=r, alpha=alpha, seq=seq, cfg=cfg)


RT = lambda th, **k: dict(
    rope_parameters=dict(rope_theta=th, rope_type=k.pop("rope_type", "default"), **k)
)
GPT2 = dict(
    vocab_size=128,
    n_embd=64,
    n_layer=2,
    n_head=4,
    n_positions=64,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
NEOX = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
L3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
CASES = {
    "given": {
        "llama_s0": c("llama", 0, LLA, **RT(10000.0)),
        "llama_s1_qv": c("llama", 1, ["q_proj", "v_proj"], r=8, alpha=16, **RT(500000.0)),
        "llama_tied_s2": c(
            "llama",
            2,
            LLA,
            tie_word_embeddings=True,
            num_hidden_layers=3,
            intermediate_size=112,
            **RT(10000.0),
        ),
        "mistral_s0": c("mistral", 10, LLA, extra=dict(sliding_window=8), **RT(10000.0)),
        "ministral3_s0": c(
            "ministral3",
            15,
            LLA,
            extra=dict(head_dim=16),
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=10000.0,
                factor=4.0,
                original_max_position_embeddings=8,
                beta_fast=4.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
                llama_4_scaling_beta=0.4,
            ),
        ),
        "qwen2_s0": c("qwen2", 20, LLA, tie_word_embeddings=True, **RT(1000000.0)),
        "qwen3_s0": c("qwen3", 25, LLA, extra=dict(head_dim=24), **RT(1000000.0)),
        "smollm3_s0": c(
            "smollm3",
            27,
            LLA,
            tie_word_embeddings=True,
            num_hidden_layers=4,
            **RT(5000000.0),
        ),
        "granite_s0": c(
            "granite",
            90,
            LLA,
            tie_word_embeddings=True,
            extra=dict(
                embedding_multiplier=3.0,
                residual_multiplier=0.22,
                attention_multiplier=0.1,
                logits_scaling=4.0,
            ),
            **RT(10000000.0),
        ),
        "granite4_s0": c(
            "granitemoehybrid",
            95,
            [*LLA[:4], "input_linear", "output_linear"],
            tie_word_embeddings=True,
            extra=dict(
                embedding_multiplier=3.0,
                residual_multiplier=0.22,
                attention_multiplier=0.1,
                logits_scaling=4.0,
                num_local_experts=0,
                num_experts_per_tok=0,
                shared_intermediate_size=96,
                position_embedding_type="rope",
                layer_types=["full_attention"] * 2,
                mamba_n_heads=4,
            ),
            **RT(10000000.0),
        ),
        "seed_oss_s0": c("seed_oss", 100, LLA, extra=dict(head_dim=24, residual_dropout=0.0), **RT(1e7)),
        "glm4_s0": c(
            "glm4",
            105,
            [*LLA[:4], "gate_up_proj", "down_proj"],
            extra=dict(head_dim=16),
            **RT(10000.0, partial_rotary_factor=0.5),
        ),
        "olmo2_s0": c("olmo2", 110, LLA, **RT(500000.0)),
        "olmo3_s0": c(
            "olmo3",
            115,
            LLA,
            num_hidden_layers=4,
            extra=dict(sliding_window=8),
            rope_parameters=dict(
                full_attention=dict(
                    rope_type="yarn",
                    rope_theta=500000.0,
                    factor=8.0,
                    original_max_position_embeddings=16,
                    attention_factor=1.2079441541679836,
                    beta_fast=32.0,
                    beta_slow=1.0,
                ),
                sliding_attention=dict(rope_type="default", rope_theta=500000.0),
            ),
        ),
        "gemma_s0": c(
            "gemma",
            50,
            LLA,
            tie_word_embeddings=True,
            num_key_value_heads=1,
            extra=dict(head_dim=24),
            **RT(10000.0),
        ),
        "gemma2_s0": c(
            "gemma2",
            60,
            LLA,
            tie_word_embeddings=True,
            extra=dict(
                head_dim=24,
                query_pre_attn_scalar=20,
                sliding_window=8,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
            ),
            **RT(10000.0),
        ),
        "gemma3_s0": c(
            "gemma3_text",
            70,
            LLA,
            tie_word_embeddings=True,
            num_hidden_layers=3,
            extra=dict(
                head_dim=24,
                query_pre_attn_scalar=20,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            ),
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1000000.0),
                sliding_attention=dict(rope_type="default", rope_theta=10000.0),
            ),
        ),
        "phi3_s0": c(
            "phi3",
            80,
            ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
            extra=dict(sliding_window=10, original_max_position_embeddings=48),
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=10000.0,
                partial_rotary_factor=0.75,
                original_max_position_embeddings=48,
                short_factor=[1.0, 1.1, 1.2, 1.4, 1.7, 2.1],
                long_factor=[1.0, 1.5, 2.5, 4.0, 6.0, 9.0],
            ),
        ),
        "gpt2_s0": dict(
            model_type="gpt2",
            seed=30,
            targets=["c_attn", "c_proj", "c_fc"],
            r=4,
            alpha=8,
            seq=24,
            cfg=GPT2,
        ),
        "gpt_neox_s0": c(
            "gpt_neox",
            40,
            NEOX,
            drop=("num_key_value_heads",),
            extra=dict(hidden_dropout=0.0, use_parallel_residual=True, hidden_act="gelu"),
            rope_parameters=dict(
                rope_theta=10000.0, rope_type="default", partial_rotary_factor=0.25
            ),
        ),
    },
}
TR = dict(
    steps=20,
    warmup=4,
    peak_lr=1e-2,
    betas=[0.9, 0.999],
    eps=1e-8,
    weight_decay=0.01,
    max_grad_norm=1.0,
)
lr_at = lambda i: (
    TR["peak_lr"]
    * (
        (i + 1) / TR["warmup"]
        if i < TR["warmup"]
        else 0.5 * (1 + math.cos(math.pi * (i - TR["warmup"]) / (TR["steps"] - TR["warmup"])))
    )
)


def init(model, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in sorted(model.named_parameters()):
            if p.dim() >= 2:
                fan = p.shape[1]
                # Gemma multiplies its embeddings by the root of their width.
                embedding = 0.2 if model.config.model_type.startswith("gemma") else 0.5
                tables = ("embed", "wte", "wpe")
                s = embedding if any(t in n for t in tables) else 1.2 / math.sqrt(fan)
                p.copy_(torch.randn(p.shape, generator=g) * s)
            elif n.endswith("bias"):
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
            else:
                base = 0.0 if model.config.model_type.startswith("gemma") else 1.0
                p.copy_(base + torch.randn(p.shape, generator=g) * 0.1)


def skey(k):
    return k.replace(".default", "")


def run(model, ids, labels, mask=None):
    o = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    return o.logits, o.loss


def lora_model(base, spec, sd=None, trainable=True):
    conv = any(isinstance(m, Conv1D) for m in base.modules())
    cfg = LoraConfig(
        r=spec["r"],
        lora_alpha=spec["alpha"],
        lora_dropout=0.0,
        target_modules=spec["targets"],
        task_type="CAUSAL_LM",
        bias="none",
        fan_in_fan_out=conv,
    )
    pm = get_peft_model(base, cfg)
    if sd is not None:
        set_peft_model_state_dict(pm, sd)
    return pm


def grads(pm):
    return {skey(n): p.grad.clone() for n, p in pm.named_parameters() if p.requires_grad}


def nf4_base(base, dq):
    """every Linear/Conv1D weight of the decoder layers (lm_head excluded) -> NF4 -> f32, quantised in [out,in] layout"""
    m = copy.deepcopy(base)
    for n, mod in m.named_modules():
        if "lm_head" in n or "embed_out" in n:
            continue
        if isinstance(mod, (torch.nn.Linear, Conv1D)):
            w = mod.weight.data
            tr = isinstance(mod, Conv1D)
            w = (w.t() if tr else w).contiguous()
            # As one row: on some CPUs bitsandbytes 0.50.2 decodes rows of 160 as if blocks ended with them.
            row = w.reshape(1, -1)
            q, s = BF.quantize_4bit(row, blocksize=64, quant_type="nf4", compress_statistics=dq)
            d = BF.dequantize_4bit(q, s).reshape(w.shape)
            mod.weight.data = (d.t() if tr else d).contiguous()
    return m


def train(pm, ids, labels):
    ps = [p for p in pm.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(
        ps, lr=1.0, betas=tuple(TR["betas"]), eps=TR["eps"], weight_decay=TR["weight_decay"]
    )
    ls, gn = [], []
    for i in range(TR["steps"]):
        for gr in opt.param_groups:
            gr["lr"] = lr_at(i)
        opt.zero_grad()
        _, loss = run(pm, ids[i], labels[i])
        loss.backward()
        gn.append(float(torch.nn.utils.clip_grad_norm_(ps, TR["max_grad_norm"])))
        opt.step()
        ls.append(float(loss))
    return ls, gn


def make(name, spec, out):
    d = os.path.join(out, name)
    shutil.rmtree(d, ignore_errors=True)
    os.makedirs(d)
    cfg = CONFIG_MAPPING[spec["model_type"]](**copy.deepcopy(spec["cfg"]))
    cfg._attn_implementation = "eager"
    cfg.use_cache = False
    m = AutoModelForCausalLM.from_config(
        cfg, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    init(m, spec["seed"])
    for p in m.parameters():
        p.requires_grad_(False)
    m.save_pretrained(d)
    for f in ("generation_config.json",):
        if os.path.exists(os.path.join(d, f)):
            os.remove(os.path.join(d, f))
    js = json.load(open(d + "/config.json"))
    v4 = dict(js)
    rp = v4.pop("rope_parameters", None)
    if rp and "full_attention" in rp:
        if spec["model_type"].startswith("gemma"):
            v4["rope_local_base_freq"] = rp["sliding_attention"]["rope_theta"]
            v4["sliding_window_pattern"] = 2
        rp = rp["full_attention"]
    if spec["model_type"].startswith("gemma"):
        v4.pop("layer_types", None)
    if rp:
        rp = dict(rp)
        v4["rope_theta"] = rp.pop("rope_theta", 10000.0)
        prf = rp.pop("partial_rotary_factor", None)
        if spec["model_type"] == "glm4":
            v4["partial_rotary_factor"] = prf
        if spec["model_type"] == "phi3":
            v4["partial_rotary_factor"] = prf
            # transformers 4 has it outside.
            del rp["original_max_position_embeddings"]
            rp["type"] = rp.pop("rope_type")
        if spec["model_type"] == "gpt_neox":
            v4["rotary_emb_base"] = v4.pop("rope_theta")
            v4["rotary_pct"] = prf
        v4["rope_scaling"] = None if rp.get("rope_type") == "default" else rp
    v4["torch_dtype"] = v4.pop("dtype", "float32")
    v4["transformers_version"] = "4.46.0"
    json.dump(v4, open(d + "/config_v4.json", "w"), indent=2)
    g = torch.Generator().manual_seed(1000 + spec["seed"])
    V, S = cfg.vocab_size, spec["seq"]
    ids = torch.randint(3, V, (2, S), generator=g)
    labels = ids.clone()
    labels[0, :7] = -100
    labels[1, 3] = -100
    labels[1, 10:13] = -100
    R = dict(input_ids=ids, labels=labels)
    with torch.no_grad():
        o = m(input_ids=ids, labels=labels, use_cache=False, output_hidden_states=True)
        R["logits"], R["loss"] = o.logits, o.loss.reshape(1)
        for i, h in enumerate(o.hidden_states):
            R[f"hidden.{i}"] = h
        pid = ids.clone()
        mk = torch.ones_like(pid)
        pid[1, S - 9 :] = 0
        mk[1, S - 9 :] = 0
        pl = labels.clone()
        pl[mk == 0] = -100
        lg, ls = run(m, pid, pl, mk)
        R.update(
            {
                "pad.input_ids": pid,
                "pad.attention_mask": mk,
                "pad.labels": pl,
                "pad.logits": lg,
                "pad.loss": ls.reshape(1),
            }
        )
        m64 = copy.deepcopy(m).double()
        l64, s64 = run(m64, ids, labels)
        noise = dict(
            logits_max_abs_f32_vs_f64=float((o.logits.double() - l64).abs().max()),
            loss_abs=float(abs(o.loss.double() - s64)),
            logits_absmax=float(o.logits.abs().max()),
        )
    tid = torch.randint(3, 15, (TR["steps"], 2, S), generator=g)  # few tokens: learnable
    tid[:, :, 1::2] = tid[
        :, :, 0::2
    ]  # every odd token repeats its left neighbour: something to learn
    tl = tid.clone()
    tl[:, 0, :3] = -100
    R["train_ids"], R["train_labels"] = tid, tl
    # LoRA
    pm = lora_model(copy.deepcopy(m), spec)
    gg = torch.Generator().manual_seed(2000 + spec["seed"])
    sd = {
        k: torch.randn(v.shape, generator=gg)
        * (1 / math.sqrt(v.shape[1]) if "lora_A" in k else 0.05)
        for k, v in sorted(get_peft_model_state_dict(pm).items())
    }
    set_peft_model_state_dict(pm, sd)
    pm.save_pretrained(d + "/adapter_init", save_embedding_layers=False)
    res = dict(
        name=name,
        model_type=spec["model_type"],
        seed=spec["seed"],
        lora=dict(r=spec["r"], alpha=spec["alpha"], targets=spec["targets"]),
        train=dict(TR, lr=[lr_at(i) for i in range(TR["steps"])]),
        versions=dict(
            torch=torch.__version__,
            transformers=transformers.__version__,
            peft=peft.__version__,
            bitsandbytes=bnb.__version__,
        ),
        noise=noise,
        n_label_tokens=int((labels[:, 1:] != -100).sum()),
        loss=float(R["loss"]),
        trainable=sum(p.numel() for p in pm.parameters() if p.requires_grad),
    )
    L = {}
    for tag, bm in (("lora", m), ("nf4", nf4_base(m, False)), ("nf4dq", nf4_base(m, True))):
        pm = lora_model(copy.deepcopy(bm), spec, sd).train()
        lg, ls = run(pm, ids, labels)
        ls.backward()
        L[tag + ".logits"], L[tag + ".loss"] = lg.detach(), ls.detach().reshape(1)
        G = grads(pm)
        assert set(G) == set(sd), (sorted(G)[:3], sorted(sd)[:3])
        L.update({f"{tag}.grad.{k}": v for k, v in G.items()})
        if tag == "lora":
            p64 = lora_model(copy.deepcopy(bm), spec, sd).train().double()
            _, s = run(p64, ids, labels)
            s.backward()
            G64 = grads(p64)
            res["noise"]["grad_max_rel_f32_vs_f64"] = max(
                float((G[k].double() - G64[k]).abs().max() / G64[k].abs().max()) for k in G
            )
        with torch.no_grad():
            base_l, base_s = run(bm, ids, labels)
        if tag == "nf4":
            L[tag + ".base_logits"] = base_l
        pm.zero_grad()
        losses, gn = train(pm, tid, tl)
        res[tag] = dict(loss=float(ls), base_loss=float(base_s), train_losses=losses, grad_norms=gn)
        if tag == "lora":
            pm.save_pretrained(d + "/adapter_final", save_embedding_layers=False)
            p64 = lora_model(copy.deepcopy(bm), spec, sd).train().double()
            l64, _ = train(p64, tid, tl)
            res["noise"]["train_loss_max_abs_f32_vs_f64"] = max(
                abs(a - b) for a, b in zip(losses, l64)
            )
    save_file({k: v.contiguous() for k, v in R.items()}, d + "/ref.safetensors")
    save_file({k: v.contiguous() for k, v in L.items()}, d + "/lora.safetensors")
    for sub in ("adapter_init", "adapter_final"):
        f = f"{d}/{sub}/README.md"
        if os.path.exists(f):
            os.remove(f)
        a = json.load(open(f"{d}/{sub}/adapter_config.json"))
        a["base_model_name_or_path"] = ".."
        json.dump(a, open(f"{d}/{sub}/adapter_config.json", "w"), indent=2)
    json.dump(res, open(d + "/case.json", "w"), indent=1)
    size = sum(os.path.getsize(os.path.join(r, f)) for r, _, fs in os.walk(d) for f in fs)
    os.system(f"chmod -R a+r {d}")
    print(
        f"{name:24s} {size / 1e3:7.0f} kB params {sum(p.numel() for p in m.parameters())} loss {res['loss']:.4f} lora {res['lora']['train_losses'][0]:.4f}->{res['lora']['train_losses'][-1]:.4f} nf4 {res['nf4']['train_losses'][-1]:.4f} dq {res['nf4dq']['train_losses'][-1]:.4f} noise {noise}",
        flush=True,
    )


if __name__ == "__main__":
    which, out = sys.argv[1], sys.argv[2]
    for n, s in CASES[which].items():
        if len(sys.argv) > 3 and n not in sys.argv[3:]:
            continue
        try:
            make(n, s, os.path.join(out, which, "models"))
        except Exception as e:
            import traceback

            traceback.print_exc()
            print("FAILED", n, e, flush=True)
