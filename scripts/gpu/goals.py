"""What the check decides: each goal's title and its words, in the order of the table."""

LOSS_GAP = 0.005
FIRST_LOSS_GAP = 5e-4
GRADIENT_ERROR = 0.02
SPEED_CHECKPOINT = 1.5
SPEED_AUTO = 1.9
UTILISATION = 0.55
PEAK_SHARE = 0.60
PLAN_ERROR = 0.03
# Of the code of cuBLAS' kernels, which the driver loads when they are first used, a plan cannot know.
PEAK_BESIDE_BUDGET = 1.01
DEQUANTIZE_SHARE = 0.85
EXPOSED_SHARE = 0.06
ATTENTION_SHARE = 0.50
# What "8B long" offloads to pinned memory of the host; programs may pin half of what is free there.
LONG_PINS_GIB = 30

GOALS = {
    "doctor": ("driver, cuBLAS, agreement with the CPU", "usable"),
    "kernel tests": ("tests of the kernels", "all pass"),
    "backend tests": ("tests of the backend", "all pass"),
    "smoke": ("eval, generate and resume", f"work, eval ≤ {LOSS_GAP:.1%} off the CPU's"),
    "sanitizer": ("memcheck on flash attention and an MLP's adapters", "no error"),
    "gradients": ("LoRA gradients of 8B-shaped blocks beside f32, worst tensor", f"≤ {GRADIENT_ERROR:.0%}"),
    "curve": ("losses beside the CPU's, mean difference", f"≤ {LOSS_GAP:.1%}"),
    "first loss": ("first loss beside the peer's", f"≤ {FIRST_LOSS_GAP:.2%} off"),
    "speed checkpoint": ("tokens/s beside PEFT + bitsandbytes, all recomputed", f"≥ {SPEED_CHECKPOINT}x"),
    "speed auto": ("tokens/s beside it with the planner's policy in 23.5 GiB", f"≥ {SPEED_AUTO}x"),
    "utilisation": ("utilisation beside cuBLAS, all recomputed", f"≥ {UTILISATION:.0%}"),
    "peak": ("memory of the card beside the peer's, all recomputed", f"≤ {PEAK_SHARE:.0%}"),
    "plan": ("measured memory beside the plan, worst run", f"≤ {PLAN_ERROR:.0%} off"),
    "32B": ("32B, 8,192 tokens, 23.5 GiB", "trains"),
    "8B long": ("8B, 120,000 tokens, 23.5 GiB", "trains"),
    "dequantize": ("dequantizing beside a copy", f"≥ {DEQUANTIZE_SHARE:.0%}"),
    "exposed": ("dequantizing and adapters in a step's time", f"≤ {EXPOSED_SHARE:.0%}"),
    "attention": ("flash attention beside PyTorch's, both passes", f"≥ {ATTENTION_SHARE:.0%}"),
}
