#!/usr/bin/env python3
"""Loads an adapter folder in PEFT and compares its logits with Nibble's.

  check_peft.py BASE ADAPTER [LOGITS] [--nibble PATH] [--key logits] [--tolerance 1e-5] [--merged]

BASE      a Hugging Face model folder, dense or 4-bit
ADAPTER   an adapter folder, such as one that `nibble train` wrote; `-` for BASE alone
LOGITS    safetensors with `input_ids` [rows, length] and the logits under --key [rows, positions,
          vocabulary], such as `nibble eval --save-logits` writes; an optional `positions` says which
          positions of each row they are, otherwise they are the last ones. Without it, the chats of
          the sample data are tokenized and --nibble computes their logits.

Fails when PEFT finds a key that it does not know or misses one, or when the largest difference of a
logit, over the largest logit, is above --tolerance. --merged compares after PEFT's `merge_and_unload`.
Needs torch, transformers, peft, and for 4-bit folders bitsandbytes.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
ROWS, LENGTH = 8, 96


def differing_keys(model, adapter):
    """Keys that only one of PEFT's model and the file has."""
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    stored = set(load_file(f"{adapter}/adapter_model.safetensors"))
    saved_embeddings = {key for key in stored - expected if key.endswith(".base_layer.weight")}
    return sorted(expected - stored), sorted(stored - expected - saved_embeddings)


def load(base, adapter, merged):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    # Nibble computes in f32. A 4-bit folder is loaded as bfloat16 whatever dtype is asked for, and
    # on CPUs with AVX-512 BF16 its layers round inputs and scales to bfloat16 outside of training.
    torch.nn.Module.float(model)  # the model's own method refuses
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
            module.support_avx512bf16_for_cpu = False
    if adapter == "-":
        return model.eval()
    model = PeftModel.from_pretrained(model, adapter)
    missing, unexpected = differing_keys(model, adapter)
    if missing or unexpected:
        sys.exit(f"keys differ: missing {missing[:5]}, unexpected {unexpected[:5]}")
    return (model.merge_and_unload() if merged else model).eval()


def nibble_logits(nibble, base, adapter):
    """What Nibble makes of the first chats of the held-out sample data, cut to rows of equal length."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    lines = (ROOT / "scripts/sample/eval.jsonl").read_text().splitlines()
    text = "".join(tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in lines)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        rows, logits = Path(folder, "rows.jsonl"), Path(folder, "logits.safetensors")
        starts = range(0, ROWS * LENGTH, LENGTH)
        rows.write_text("".join(json.dumps({"input_ids": ids[at : at + LENGTH]}) + "\n" for at in starts))
        command = [nibble, "eval", "--model", base, "--data", rows, "--save-logits", logits]
        if "quantization_config" not in json.loads(Path(base, "config.json").read_text()):
            command += ["--quantization", "none"]
        subprocess.run(command + (["--adapter", adapter] if adapter != "-" else []), check=True, stdout=subprocess.DEVNULL)
        return load_file(logits)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "adapter"):
        parser.add_argument(name)
    parser.add_argument("logits", nargs="?")
    parser.add_argument("--nibble", default=ROOT / "target/release/nibble")
    parser.add_argument("--key", default="logits")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--merged", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)

    if arguments.logits:
        file = load_file(arguments.logits)
    else:
        file = nibble_logits(arguments.nibble, arguments.base, arguments.adapter)
    expected, ids = file[arguments.key].float(), file["input_ids"].long()
    length, count = ids.shape[1], expected.shape[1]
    positions = file["positions"].long() if "positions" in file else torch.arange(length - count, length)
    with torch.no_grad():
        logits = load(arguments.base, arguments.adapter, arguments.merged)(input_ids=ids).logits.float()
    difference = (logits[:, positions] - expected).abs()
    agreement = (logits[:, positions].argmax(-1) == expected.argmax(-1)).float().mean()
    error = difference.max() / expected.abs().max()
    print(f"{ids.shape[0]} sequences of {length} tokens: largest difference {difference.max():.1e} of logits up to "
          f"{expected.abs().max():.1f} ({error:.1e} of it), same most likely token {agreement:.2%}")
    sys.exit(error.item() > arguments.tolerance)


main()
