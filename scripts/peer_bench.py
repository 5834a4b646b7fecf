#!/usr/bin/env python3
"""The peer of scripts/bench_train.py: the same training with transformers, PEFT and bitsandbytes.

    python scripts/peer_bench.py --model DIR --rows rows.jsonl --quantization nf4 --steps 8 --out peer.json

Reads rows of `input_ids` and `labels`, takes `--batch` of them for each step in file order and pads
them to the longest, as Hugging Face's collators do. LoRA on every linear layer but the head, AdamW;
f32 compute, or bf16 as `bf16=True` of Hugging Face's Trainer has it: a bf16 base under autocast.
Writes one JSON object: for every step its wall time, tokens without padding and loss.
Needs torch, transformers, peft and bitsandbytes; nothing else of Nibble needs Python packages.
"""

import argparse
import json
import os
import time

BEGUN = time.monotonic()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder, dense or 4-bit")
    parser.add_argument("--rows", required=True, help="JSONL of input_ids and labels")
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--quantization", choices=["nf4", "none"], default="nf4")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--activations", choices=["keep", "checkpoint"], default="keep")
    parser.add_argument("--batch", type=int, default=4, help="rows in a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument(
        "--passive", action="store_true", help="OpenMP threads sleep while they wait"
    )
    return parser.parse_args()


ARGUMENTS = parse_arguments()
# Both are read when torch is imported.
os.environ["OMP_NUM_THREADS"] = str(ARGUMENTS.threads)
if ARGUMENTS.passive:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ["HF_HUB_OFFLINE"] = "1"

import bitsandbytes
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

IMPORTED = time.monotonic()


def load_base(arguments):
    """The frozen model: quantized while loading, unless the folder is 4-bit already."""
    config = AutoConfig.from_pretrained(arguments.model)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[arguments.precision]
    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    if arguments.quantization == "nf4":
        options["device_map"] = {"": "cpu"}
        if getattr(config, "quantization_config", None) is None:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
    model = AutoModelForCausalLM.from_pretrained(arguments.model, **options)
    model.config.use_cache = False
    return model


def add_adapter(model, arguments):
    checkpoint = arguments.activations == "checkpoint"
    recompute = {"use_reentrant": False} if checkpoint else None
    if arguments.quantization == "nf4":
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=checkpoint, gradient_checkpointing_kwargs=recompute
        )
    elif checkpoint:
        model.gradient_checkpointing_enable(recompute)
        model.enable_input_require_grads()
    torch.manual_seed(0)
    settings = LoraConfig(
        r=arguments.r,
        lora_alpha=arguments.alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)


def pad(rows, pad_id):
    """Right-padded `input_ids`, `labels` and `attention_mask` of some rows."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(values, filler):
        return torch.tensor([value + [filler] * (longest - len(value)) for value in values])

    return {
        "input_ids": filled([row["input_ids"] for row in rows], pad_id),
        "labels": filled([row["labels"] for row in rows], -100),
        "attention_mask": filled([[1] * len(row["input_ids"]) for row in rows], 0),
    }


def train(model, rows, arguments):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=0.0)
    pad_id = model.config.pad_token_id or 0
    model.train()
    steps = []
    for step in range(arguments.steps):
        first = step * arguments.batch % len(rows)
        batch = rows[first : first + arguments.batch]
        begun = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bf16"):
            loss = model(**pad(batch, pad_id)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append(
            {
                "seconds": time.monotonic() - begun,
                "tokens": sum(len(row["input_ids"]) for row in batch),
                "loss": loss.item(),
                "grad_norm": norm.item(),
            }
        )
    return steps


def main():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(ARGUMENTS.threads)
    with open(ARGUMENTS.rows) as file:
        rows = [json.loads(line) for line in file]
    model = add_adapter(load_base(ARGUMENTS), ARGUMENTS)
    loaded = time.monotonic()
    steps = train(model, rows, ARGUMENTS)
    result = {
        "import_seconds": IMPORTED - BEGUN,
        "load_seconds": loaded - IMPORTED,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "versions": {
            module.__name__: module.__version__
            for module in (torch, transformers, peft, bitsandbytes)
        },
        "steps": steps,
    }
    with open(ARGUMENTS.out, "w") as file:
        json.dump(result, file)


main()
