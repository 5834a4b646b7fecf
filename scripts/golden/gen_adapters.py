#!/usr/bin/env python3
"""PEFT adapters and their merged weights: tests/data/adapters.

  gen_adapters.py thin GOLDEN OUT     copy the reference adapters, keeping two merged tensors each
  gen_adapters.py make MODELS OUT     make the cases below (torch, transformers, peft 0.21.2)

A case is a PEFT folder with two more files. `expected.safetensors`: `input_ids` and the logits of the
model with the adapter at the last four positions. `merged.safetensors`: some tensors after
`merge_and_unload`, the names of all that changed in the metadata; absent where PEFT's merge gives another
model than the adapter (it writes into the matrix that a tied head shares with the embedding). GOLDEN is
the reference data of which `tests/data` holds a part, and MODELS its folder of small Hugging Face models,
`tests/data/models` here.
"""
import json
import os
import shutil
import sys

import numpy
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

KEPT = {
    "llama_s0": ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight",
                 "model.embed_tokens.weight", "lm_head.weight"],
    "gpt2_s0": ["transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_proj.weight", "transformer.wte.weight",
                "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.bias"],
    "qwen2_s0": ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.bias",
                 "model.layers.0.self_attn.k_proj.bias", "model.embed_tokens.weight"],
}
LORA = dict(r=4, lora_alpha=6, task_type="CAUSAL_LM")
MADE = {
    "llama_s0.token_rows": dict(target_modules=["q_proj"], trainable_token_indices=[3, 4, 100]),
    "llama_s0.dora_embed": dict(target_modules=["embed_tokens", "lm_head", "q_proj"], use_dora=True),
    "llama_s0.saved_mlp": dict(target_modules=["q_proj", "down_proj"], modules_to_save=["mlp"]),
    "qwen2_s0.lora_bias": dict(target_modules=["q_proj"], lora_bias=True),
    "qwen2_s0.bias_lora_only": dict(target_modules=["q_proj"], bias="lora_only"),
    "qwen2_s0.bias_all": dict(target_modules=["q_proj"], bias="all"),
    "qwen2_s0.token_rows": dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5], "lm_head": [5]}),
    "gpt2_s0.saved_fc": dict(target_modules=["c_attn"], modules_to_save=["c_fc"], fan_in_fan_out=True),
    "gpt2_s0.wte": dict(target_modules=["c_attn"], trainable_token_indices=[7], fan_in_fan_out=True, use_rslora=True),
    "gpt2_s0.tied_embeddings": dict(target_modules=["wte", "wpe", "c_fc"], fan_in_fan_out=True),
    "qwen2_s0.tied_head": dict(target_modules=["lm_head", "q_proj"]),
    "qwen2_s0.tied_embed_dora": dict(target_modules=["embed_tokens", "q_proj"], use_dora=True),
    "qwen2_s0.tied_both": dict(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    "qwen2_s0.tied_saved_head": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "qwen2_s0.tied_token_rows": dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5], "lm_head": [6, 7]}),
}
POSITIONS = 4
VOCABULARY = (".model.embed_tokens.weight", ".lm_head.weight", ".transformer.wte.weight")


def save(folder, model, base, merged):
    """Keeps the tensors of KEPT that changed, and notes the names of all that did."""
    changed = sorted(name for name in merged if not numpy.array_equal(merged[name], base.get(name)))
    kept = {name: merged[name] for name in KEPT[model] if name in changed}
    save_file(kept, f"{folder}/merged.safetensors", {"changed": ",".join(changed)})


def save_logits(folder, input_ids, logits):
    logits = numpy.ascontiguousarray(logits[:, -POSITIONS:])
    save_file({"input_ids": input_ids, "logits": logits}, f"{folder}/expected.safetensors")


def thin(golden, out):
    for case in sorted(os.listdir(f"{golden}/adapters")):
        model, folder = case.split(".")[0], f"{out}/{case}"
        copy(f"{golden}/adapters/{case}", folder)
        base = load_file(f"{golden}/models/{model}/model.safetensors")
        save(folder, model, base, load_file(f"{golden}/adapters/{case}/merged_changed.safetensors"))
        expected = load_file(f"{golden}/adapters/{case}/expected.safetensors")
        save_logits(folder, expected["input_ids"], expected["logits_after"])
    for case in sorted(os.listdir(f"{golden}/interop")):
        if os.path.exists(f"{golden}/interop/{case}/adapter_config.json"):
            copy(f"{golden}/interop/{case}", f"{out}/../interop/{case}")


def copy(source, folder):
    os.makedirs(folder, exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(f"{source}/{name}", f"{folder}/{name}")


def make(models, out):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    def load(model):
        return AutoModelForCausalLM.from_pretrained(f"{models}/{model}", dtype=torch.float32, attn_implementation="eager")

    torch.set_num_threads(1)
    # Rows that hold the tokens whose embeddings some cases train.
    ids = torch.tensor([[3, 4, 5, 6, 7, 100, 11, 50, 9, 5, 7, 6], [1, 2, 100, 7, 6, 5, 4, 3, 90, 80, 70, 60]])
    for case, settings in MADE.items():
        model, folder = case.split(".")[0], f"{out}/{case}"
        torch.manual_seed(0)
        adapted = get_peft_model(load(model), LoraConfig(**{**LORA, **settings}))
        random = torch.Generator().manual_seed(len(case))
        state = sorted(get_peft_model_state_dict(adapted).items())
        noise = lambda v: torch.randn(v.shape, generator=random)
        trained = lambda key: ".base_layer.weight" not in key and not (key.endswith(VOCABULARY) and "modules_to_save" not in settings)
        change = lambda key, v: v * (1 + 0.1 * noise(v)) if "magnitude" in key else v + 0.1 * noise(v)
        set_peft_model_state_dict(adapted, {key: change(key, v) if trained(key) else v for key, v in state})
        adapted.save_pretrained(folder)
        os.remove(f"{folder}/README.md")
        config = json.load(open(f"{folder}/adapter_config.json"))
        config.update(base_model_name_or_path=model, target_modules=sorted(config["target_modules"]))
        json.dump(config, open(f"{folder}/adapter_config.json", "w"), indent=2, sort_keys=True)
        adapted = PeftModel.from_pretrained(load(model), folder).eval()
        with torch.no_grad():
            save_logits(folder, ids.numpy(), adapted(input_ids=ids).logits.numpy())
        if ".tied_" in case:
            continue
        merged = adapted.merge_and_unload().state_dict()
        base = load_file(f"{models}/{model}/model.safetensors")
        merged = {name: v.numpy() for name, v in merged.items()}
        save(folder, model, base, {name: v for name, v in merged.items() if name in base})
        with safe_open(f"{folder}/merged.safetensors", "np") as file:
            print(case, file.metadata()["changed"].count(",") + 1, "changed; kept", list(file.keys()))


{"thin": thin, "make": make}[sys.argv[1]](*sys.argv[2:])
