#!/usr/bin/env python3
"""Loads an adapter folder in PEFT and compares its logits with a file's.

  check_peft.py BASE ADAPTER LOGITS [--key logits] [--tolerance 1e-4] [--merged]

BASE      a Hugging Face model folder, dense or 4-bit
ADAPTER   an adapter folder, such as one that `nibble train` wrote; `-` for BASE alone
LOGITS    safetensors with `input_ids` [rows, length] and the logits under --key [rows, positions,
          vocabulary], such as `nibble eval --save-logits` writes; an optional `positions` says which
          positions of each row they are, otherwise they are the last ones

Fails when PEFT finds a key that it does not know or misses one, or when the largest difference of a
logit is above --tolerance. --merged compares after PEFT's `merge_and_unload`.
Needs torch, transformers, peft, and for 4-bit folders bitsandbytes.
"""
import argparse
import sys
import warnings

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def differing_keys(model, adapter):
    """Keys that only one of PEFT's model and the file has."""
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    stored = set(load_file(f"{adapter}/adapter_model.safetensors"))
    saved_embeddings = {key for key in stored - expected if key.endswith(".base_layer.weight")}
    return sorted(expected - stored), sorted(stored - expected - saved_embeddings)


def load(base, adapter, merged):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if adapter == "-":
        return model.eval()
    model = PeftModel.from_pretrained(model, adapter)
    missing, unexpected = differing_keys(model, adapter)
    if missing or unexpected:
        sys.exit(f"keys differ: missing {missing[:5]}, unexpected {unexpected[:5]}")
    return (model.merge_and_unload() if merged else model).eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "adapter", "logits"):
        parser.add_argument(name)
    parser.add_argument("--key", default="logits")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--merged", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)

    file = load_file(arguments.logits)
    expected, ids = file[arguments.key].float(), file["input_ids"].long()
    length, count = ids.shape[1], expected.shape[1]
    positions = file["positions"].long() if "positions" in file else torch.arange(length - count, length)
    with torch.no_grad():
        logits = load(arguments.base, arguments.adapter, arguments.merged)(input_ids=ids).logits.float()
    difference = (logits[:, positions] - expected).abs()
    agreement = (logits[:, positions].argmax(-1) == expected.argmax(-1)).float().mean()
    print(f"largest difference {difference.max():.3e}, mean {difference.mean():.3e}, "
          f"largest logit {expected.abs().max():.3f}, same most likely token {agreement:.2%}")
    sys.exit(difference.max().item() > arguments.tolerance)


main()
