"""The peer on the card: the same training with transformers, PEFT and bitsandbytes.

    python peer.py MODEL ROWS.jsonl STEPS WARM_UP SECONDS

Two ways to recompute every block: `stock`, as PEFT's documentation has it, whose preparation makes all that
is not 4-bit f32; and `lean`, whose base stays bf16. Prints `PEER {...}` after each, and for rows of half the
length where less than a third of the seconds are gone.
"""

import gc
import json
import os
import statistics
import sys
import time

# Of this folder's files no package shall take one for a module of its own.
sys.path.pop(0)

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM

RECOMPUTE = {"use_reentrant": False}
# As `from_pretrained` calls it, from 4.56 on and before.
DTYPE = "dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56) else "torch_dtype"


def stock(model):
    return prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=RECOMPUTE)


def lean(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=RECOMPUTE)
    model.enable_input_require_grads()
    return model


def load(folder: str, prepare):
    options = {DTYPE: torch.bfloat16, "attn_implementation": "sdpa", "device_map": {"": 0}}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    model.config.use_cache = False
    settings = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(prepare(model), settings).train()


class Training:
    def __init__(self, model):
        self.model = model
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)

    def step(self, row: list[int]) -> tuple[float, float]:
        """Tokens a second, and the loss."""
        ids = torch.tensor([row], device="cuda")
        torch.cuda.synchronize()
        begun = time.monotonic()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return ids.numel() / (time.monotonic() - begun), loss.item()


def measure(training: Training, rows: list[list[int]], warm_up: int) -> dict:
    steps = []
    for number, row in enumerate(rows):
        steps.append(training.step(row))
        if number == 0:
            torch.cuda.reset_peak_memory_stats()
    free, total = torch.cuda.mem_get_info()
    return {
        "tokens": len(rows[0]),
        "tokens_per_second": statistics.median(rate for rate, _ in steps[warm_up:]),
        "losses": [loss for _, loss in steps],
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        # PyTorch keeps what it once had: what is in use at the end is the most.
        "card_bytes": total - free,
    }


def forget():
    gc.collect()
    torch.cuda.empty_cache()


def tell(prepare, measured: dict):
    print("PEER " + json.dumps({"way": prepare.__name__} | measured), flush=True)


def main():
    folder, rows_file, steps, warm_up, seconds = sys.argv[1:]
    begun, warm_up = time.monotonic(), int(warm_up)
    transformers.utils.logging.disable_progress_bar()
    with open(rows_file) as file:
        rows = [json.loads(line)["input_ids"] for line in file][: int(steps)]
    halves = [row[: len(row) // 2] for row in rows]
    for prepare in (lean, stock):
        training = Training(load(folder, prepare))
        tell(prepare, measure(training, rows, warm_up))
        if prepare is lean and time.monotonic() - begun < float(seconds) / 3:
            forget()
            tell(prepare, measure(training, halves, warm_up))
        del training
        forget()


main()
