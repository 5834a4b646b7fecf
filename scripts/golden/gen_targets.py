#!/usr/bin/env python3
"""Which modules PEFT adapts, with rank and scale, for many settings: tests/data/peft_targets.json.

  gen_targets.py OUT.json        needs torch, transformers, peft (made with peft 0.21.2)

Models are built from the two configurations below, without weights. A case holds the settings and
PEFT's answer: {module: [rank, scale]}, or an empty object where PEFT refuses.
"""
import json
import sys

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM

LLAMA = dict(model_type="llama", vocab_size=128, hidden_size=64, intermediate_size=160, num_hidden_layers=12,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
GPT2 = dict(model_type="gpt2", vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64)
CASES = [
    ("llama", dict(target_modules="all-linear")),
    ("llama", dict(target_modules="All-Linear", use_rslora=True)),
    ("llama", dict(target_modules="all-linear", exclude_modules=["down_proj"])),
    ("llama", dict(target_modules="all-linear", exclude_modules=["model.layers.3.mlp.up_proj", "self_attn.o_proj"])),
    ("llama", dict(target_modules="all-linear", exclude_modules=r".*\.layers\.(1|11)\..*")),
    ("llama", dict(target_modules=["q_proj", "v_proj"])),
    ("llama", dict(target_modules=["proj"])),
    ("llama", dict(target_modules=["self_attn.q_proj", "layers.1.mlp.up_proj"])),
    ("llama", dict(target_modules=["model.layers.1.mlp.up_proj"])),
    ("llama", dict(target_modules=["q_proj", "no_such_module"])),
    ("llama", dict(target_modules=["lm_head", "embed_tokens", "k_proj"])),
    ("llama", dict(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head", "self_attn.q_proj"])),
    ("llama", dict(target_modules=["q_proj", "up_proj"], modules_to_save=["mlp"])),
    ("llama", dict(target_modules=r".*\.(q|v)_proj")),
    ("llama", dict(target_modules=r"q_proj")),
    ("llama", dict(target_modules=r"model\.layers\.\d\.mlp\.(?!down).*_proj")),
    ("llama", dict(target_modules=r".*\.1\..*q_proj|.*k_proj", exclude_modules=r".*\.1\..*|.*\.2\..*")),
    ("llama", dict(target_modules=["q_proj"], layers_to_transform=[1])),
    ("llama", dict(target_modules=["q_proj"], layers_to_transform=3)),
    ("llama", dict(target_modules=["q_proj"], layers_to_transform=[])),
    ("llama", dict(target_modules=["q_proj", "lm_head"], layers_to_transform=[0, 11], layers_pattern="layers")),
    ("llama", dict(target_modules=["q_proj"], layers_to_transform=[0, 11], layers_pattern=["blocks", "layers"])),
    ("llama", dict(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="h")),
    ("llama", dict(target_modules=["model.layers.5.mlp.up_proj", "q_proj"], layers_to_transform=[2])),
    ("llama", dict(target_modules="all-linear", rank_pattern={"q_proj": 4, "layers.1.mlp.down_proj": 12}, alpha_pattern={"q_proj": 32})),
    ("llama", dict(target_modules="all-linear", rank_pattern={"proj": 3}, alpha_pattern={r".*\.v_proj": 5, "v_proj": 7})),
    ("llama", dict(target_modules="all-linear", rank_pattern={r"layers\.1\..*": 2, "q_proj": 4}, use_rslora=True)),
    ("llama", dict(target_modules="all-linear", rank_pattern={r"^model\.layers\.1\.self_attn\.q_proj": 6, "[kv]_proj": 9})),
    ("gpt2", dict(target_modules="all-linear", fan_in_fan_out=True)),
    ("gpt2", dict(target_modules=["c_attn"], fan_in_fan_out=True)),
    ("gpt2", dict(target_modules=["attn.c_proj", "c_fc"], fan_in_fan_out=True, lora_alpha=5)),
    ("gpt2", dict(target_modules=["c_proj"], layers_to_transform=[1], layers_pattern="h", fan_in_fan_out=True)),
    ("gpt2", dict(target_modules=["c_proj", "wte"], layers_to_transform=[1], fan_in_fan_out=True)),
    ("gpt2", dict(target_modules=r"transformer\.h\.0\..*c_\w+", fan_in_fan_out=True, rank_pattern={"mlp.c_proj": 1})),
]


def answer(family, settings):
    config = AutoConfig.for_model(**(LLAMA if family == "llama" else GPT2))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    try:
        adapted = get_peft_model(model, LoraConfig(**{"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **settings}))
    except ValueError:
        return {}
    layers = ((name, layer) for name, layer in adapted.named_modules() if isinstance(layer, LoraLayer))
    return {name.removeprefix("base_model.model."): [layer.r["default"], layer.scaling["default"]] for name, layer in layers}


cases = [dict(model=family, settings=settings, adapted=answer(family, settings)) for family, settings in CASES]
with open(sys.argv[1], "w") as out:
    json.dump(dict(models=dict(llama=LLAMA, gpt2=GPT2), cases=cases), out, indent=1)
    out.write("\n")
for case in cases:
    print(len(case["adapted"]), case["model"], case["settings"])
