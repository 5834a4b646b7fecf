#!/usr/bin/env python3
"""Golden data for the optimizer and the learning-rate schedules.

Writes tests/data/train/adamw.safetensors (torch.optim.AdamW with clip_grad_norm_, two groups as
LoRA+ makes them), tests/data/train/adamw_8bit.safetensors (bitsandbytes.optim.AdamW8bit on the CPU) and
tests/data/train/schedules.json (transformers' get_*_schedule).

Needs torch, transformers, bitsandbytes, safetensors. Run from the repository root.
"""

import json
from pathlib import Path

import bitsandbytes
import torch
from safetensors.torch import save_file
from transformers import optimization

OUT = Path("tests/data/train")
STEPS = 30
LEARNING_RATE = 3e-3
LORAPLUS_RATIO = 16.0
BETAS, EPSILON, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.99), 1e-6, 0.05, 0.7
RECORDED = (1, 2, 10, 30)


def adamw() -> None:
    torch.manual_seed(20)
    a = torch.nn.Parameter(torch.randn(5, 37))
    b = torch.nn.Parameter(torch.randn(41, 5) * 0.1)
    tensors = {"a.0": a.detach().clone(), "b.0": b.detach().clone()}
    # gradient sizes from 1e-4 to 1e1, so that some steps are clipped and some are not
    sizes = torch.logspace(-3, 0, STEPS)[torch.randperm(STEPS)]
    optimizer = torch.optim.AdamW(
        [{"params": [a], "lr": LEARNING_RATE}, {"params": [b], "lr": LEARNING_RATE * LORAPLUS_RATIO}],
        betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY, foreach=False,
    )
    schedule = optimization.get_linear_schedule_with_warmup(optimizer, 3, STEPS + 5)
    norms, rates = [], []
    for step in range(1, STEPS + 1):
        for name, parameter in (("a", a), ("b", b)):
            parameter.grad = torch.randn_like(parameter) * sizes[step - 1] * 0.1
            tensors[f"{name}.grad.{step}"] = parameter.grad.clone()
        norms.append(torch.nn.utils.clip_grad_norm_([a, b], MAX_GRAD_NORM))
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        if step in RECORDED:
            for name, parameter in (("a", a), ("b", b)):
                state = optimizer.state[parameter]
                tensors[f"{name}.{step}"] = parameter.detach().clone()
                tensors[f"{name}.exp_avg.{step}"] = state["exp_avg"].clone()
                tensors[f"{name}.exp_avg_sq.{step}"] = state["exp_avg_sq"].clone()
    tensors["grad_norms"] = torch.stack(norms)
    tensors["learning_rates"] = torch.tensor(rates, dtype=torch.float64)
    # rounding cases of f32 -> bf16: ties both ways, carries into the exponent, the largest finite
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x3FFFFFFF, 0x7F7F0000,
                         0x7F7FFFFF, 0x00000001, 0x00008000, 0x00018000, -0x7FFFFFFF, -0x40808000],
                        dtype=torch.int32)
    tensors["rounding.f32"] = torch.cat([bits.view(torch.float32), torch.randn(500)])
    tensors["rounding.bf16"] = tensors["rounding.f32"].to(torch.bfloat16)
    save_file(tensors, OUT / "adamw.safetensors", {
        "betas": json.dumps(BETAS), "epsilon": str(EPSILON), "weight_decay": str(WEIGHT_DECAY),
        "max_grad_norm": str(MAX_GRAD_NORM), "loraplus_lr_ratio": str(LORAPLUS_RATIO),
        "recorded": json.dumps(RECORDED),
    })


def adamw_8bit() -> None:
    """A tensor of 17 blocks, the last one short, and a small one that bitsandbytes keeps in f32."""
    torch.manual_seed(21)
    large = torch.nn.Parameter(torch.randn(11, 383))
    small = torch.nn.Parameter(torch.randn(40, 8))
    parameters = {"large": large, "small": small}
    tensors = {f"{name}.0": parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = bitsandbytes.optim.AdamW8bit(
        [large, small], lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY)
    scale = 10 ** (torch.rand(11, 383) - 1)  # gradients of 0.1 to 1
    for step in range(1, 7):
        large.grad = (torch.randn(11, 383) * scale).bfloat16().float()
        small.grad = torch.randn(40, 8).bfloat16().float()
        for name, parameter in parameters.items():
            tensors[f"{name}.grad.{step}"] = parameter.grad.bfloat16()
        optimizer.step()
        for name, parameter in parameters.items():
            state = optimizer.state[parameter]
            tensors[f"{name}.{step}"] = parameter.detach().clone()
            for key in ("state1", "state2", "absmax1", "absmax2"):
                if key in state:
                    tensors[f"{name}.{key}.{step}"] = state[key].clone()
    save_file(tensors, OUT / "adamw_8bit.safetensors")


def rates(schedule, steps) -> list:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    scheduler = schedule(optimizer)
    out = []
    for _ in range(steps):
        out.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return out


# Name, what makes it, and what it is told; `Trainer` makes all of them by `get_scheduler`.
TOLD = (
    ("cosine", ({"num_cycles": 1.25},)),
    ("cosine_with_restarts", ({}, {"num_cycles": 3})),
    ("cosine_with_min_lr", ({"min_lr_rate": 0.25, "num_cycles": 1.5}, {"min_lr": 3e-5})),
    ("cosine_warmup_with_min_lr", (
        {"min_lr_rate": 0.25}, {"min_lr": 3e-5, "warmup_lr_rate": 0.05, "num_cycles": 1.5})),
    ("polynomial", ({}, {"lr_end": 1e-5, "power": 2.5}, {"lr_end": 0, "power": 0.5})),
    ("inverse_sqrt", ({}, {"timescale": 3})),
    ("warmup_stable_decay", (
        {"num_decay_steps": 10},
        {"num_decay_steps": 12, "num_stable_steps": 9, "min_lr_ratio": 0.125, "warmup_type": "cosine",
         "decay_type": "linear"},
        {"num_decay_steps": 15, "min_lr_ratio": 0.05, "warmup_type": "1-sqrt", "decay_type": "1-sqrt"},
        {"num_decay_steps": 20, "num_cycles": 1.75})),
)


def told() -> list:
    """A step more than the run has: what a finished run would go on with."""
    cases = []
    for total, warmup in ((40, 0), (40, 7), (40, 1), (64, 6)):
        for name, all_kwargs in TOLD:
            for kwargs in all_kwargs:
                make = lambda o: optimization.get_scheduler(
                    name, o, warmup, total, scheduler_specific_kwargs=kwargs)
                floor = kwargs.get("min_lr_rate", kwargs.get("min_lr", 0) / 2e-4)
                cases.append({"name": name, "learning_rate": 2e-4, "warmup_steps": warmup,
                              "max_steps": total, "min_lr_rate": floor, "kwargs": kwargs,
                              "rates": rates(make, total + 1)})
    return cases


def schedules() -> None:
    cases = []
    for total, warmup in ((40, 0), (40, 7), (1, 0), (1, 1), (3, 5), (200, 6)):
        for name, make in {
            "constant": lambda o: optimization.get_constant_schedule(o),
            "constant_with_warmup": lambda o: optimization.get_constant_schedule_with_warmup(o, warmup),
            "linear": lambda o: optimization.get_linear_schedule_with_warmup(o, warmup, total),
            "cosine": lambda o: optimization.get_cosine_schedule_with_warmup(o, warmup, total),
            "cosine_with_min_lr": lambda o: optimization.get_cosine_with_min_lr_schedule_with_warmup(
                o, warmup, total, min_lr_rate=0.1),
        }.items():
            cases.append({"name": name, "learning_rate": 2e-4, "warmup_steps": warmup,
                          "max_steps": total, "min_lr_rate": 0.1, "rates": rates(make, total)})
    cases += told()
    lines = ",\n".join(json.dumps(case) for case in cases)
    (OUT / "schedules.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    adamw()
    adamw_8bit()
    schedules()
