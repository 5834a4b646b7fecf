"""Errors of LoRA gradients that transformers and PEFT make in bf16, against the golden f32 ones.

They are the tolerances of tests/cuda_backend: a bf16 backend may not be worse than torch's.
Needs torch, transformers, peft: python scripts/golden/bf16_error.py
"""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

MODELS = Path(__file__).parents[2] / "tests/data/models"
CASES = [
    "llama_s0",
    "llama_s1_qv",
    "llama_tied_s2",
    "mistral_s0",
    "qwen2_s0",
    "qwen3_s0",
    "ministral3_s0",
    "smollm3_s0",
    "granite_s0",
    "granite4_s0",
    "seed_oss_s0",
    "glm4_s0",
    "olmo2_s0",
    "olmo3_s0",
    "gemma_s0",
    "gemma2_s0",
    "gemma3_s0",
    "phi3_s0",
    "gpt2_s0",
]


def gradient_errors(case: str) -> list[float]:
    reference = load_file(MODELS / case / "ref.safetensors")
    golden = load_file(MODELS / case / "lora.safetensors")
    model = AutoModelForCausalLM.from_pretrained(
        MODELS / case, dtype=torch.bfloat16, attn_implementation="eager"
    )
    adapter = MODELS / case / "adapter_init"
    model = PeftModel.from_pretrained(
        model, adapter, is_trainable=True, autocast_adapter_dtype=False
    ).to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
    model(input_ids=reference["input_ids"], labels=reference["labels"]).loss.backward()
    errors = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = golden["lora.grad." + name.replace(".default", "")].float()
            error = (parameter.grad.float() - expected).norm() / expected.norm()
            errors.append(error.item())
    return errors


for case in CASES:
    errors = gradient_errors(case)
    print(f"{case}: mean {sum(errors) / len(errors):.4f}, largest {max(errors):.4f}")
