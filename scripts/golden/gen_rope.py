#!/usr/bin/env python3
"""One tiny Llama for each way to stretch rotary embeddings, run beyond the length it was trained for;
and a Phi-3, of whose heads only a part turns.

usage: gen_rope.py OUT [NAME ...]

OUT/NAME/config.json, model.safetensors (f32); ref.safetensors: input_ids [2, S], labels, logits, loss,
and short_ids [1, 20] with short_logits; case.json: f32-vs-f64 noise, and how far the logits move when
the scaling is left out (a test that ignores it must fail).
"""

import copy
import json
import math
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

TRAINED = 32
LENGTH = 80
SHORT = 20
# (rope parameters, max_position_embeddings)
CASES = {
    "linear": (dict(rope_type="linear", factor=4.0), 4 * TRAINED),
    "dynamic": (dict(rope_type="dynamic", factor=2.0), TRAINED),
    "yarn": (
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=TRAINED),
        4 * TRAINED,
    ),
    "yarn_settings": (
        dict(
            rope_type="yarn",
            factor=3.0,
            original_max_position_embeddings=TRAINED,
            beta_fast=4.0,
            beta_slow=0.5,
            mscale=1.5,
            mscale_all_dim=0.8,
            truncate=False,
        ),
        4 * TRAINED,
    ),
    "yarn_attention": (
        dict(
            rope_type="yarn",
            factor=4.0,
            original_max_position_embeddings=TRAINED,
            attention_factor=1.3,
        ),
        4 * TRAINED,
    ),
    "longrope": (
        dict(
            rope_type="longrope",
            original_max_position_embeddings=TRAINED,
            short_factor=[1.0, 1.05, 1.1, 1.2, 1.35, 1.6, 2.0, 2.5],
            long_factor=[1.0, 1.2, 1.7, 2.4, 3.3, 4.5, 6.0, 8.0],
        ),
        4 * TRAINED,
    ),
    "phi3": (
        dict(
            rope_type="longrope",
            partial_rotary_factor=0.75,
            original_max_position_embeddings=TRAINED,
            short_factor=[1.0, 1.05, 1.1, 1.2, 1.35, 1.6],
            long_factor=[1.0, 1.2, 1.7, 2.4, 3.3, 4.5],
        ),
        4 * TRAINED,
    ),
    "llama3": (
        dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=TRAINED,
        ),
        8 * TRAINED,
    ),
}


def make(rope, max_positions):
    phi3 = "partial_rotary_factor" in rope
    more = dict(original_max_position_embeddings=TRAINED, pad_token_id=0) if phi3 else {}
    config = (Phi3Config if phi3 else LlamaConfig)(
        **more,
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=max_positions,
        rope_parameters=dict(rope_theta=500.0, **rope),
        initializer_range=0.25,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    config._attn_implementation = "eager"
    config.dtype = "float32"
    return config


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def write(out, name, rope, max_positions):
    torch.manual_seed(7)
    config = make(rope, max_positions)
    kind = Phi3ForCausalLM if config.model_type == "phi3" else LlamaForCausalLM
    model = kind(config)
    ids = torch.randint(3, 96, (2, LENGTH))
    short = torch.randint(3, 96, (1, SHORT))
    labels = ids.clone()
    labels[:, :17] = -100
    with torch.no_grad():
        result = model.eval()(input_ids=ids, labels=labels)
    short_logits = logits_of(model, short)
    noise = (logits_of(copy.deepcopy(model).double(), ids) - result.logits).abs().max().item()
    default = {k: v for k, v in rope.items() if k == "partial_rotary_factor"}
    plain = kind(make(dict(rope_type="default", **default), max_positions))
    plain.load_state_dict(model.state_dict())
    moved = (logits_of(plain, ids) - result.logits).abs().max().item()
    assert math.isfinite(noise) and moved > 1e3 * noise, (name, noise, moved)
    folder = out / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    reference = {
        "input_ids": ids,
        "labels": labels,
        "logits": result.logits.contiguous(),
        "loss": result.loss.reshape(1),
        "short_ids": short,
        "short_logits": short_logits.contiguous(),
    }
    save_file(reference, folder / "ref.safetensors")
    info = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "noise": {"logits_max_abs_f32_vs_f64": noise},
        "logits_max_abs_without_scaling": moved,
    }
    (folder / "case.json").write_text(json.dumps(info, indent=1) + "\n")
    print(f"{name}: noise {noise:.1e}, without scaling {moved:.2f}")


def main():
    out = Path(sys.argv[1])
    names = sys.argv[2:] or CASES
    for name in names:
        write(out, name, *CASES[name])


if __name__ == "__main__":
    main()
