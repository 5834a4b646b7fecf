"""What the card itself does, by PyTorch: rate of cuBLAS, bandwidth of a copy, time of flash attention.

    python torch_rates.py TOKENS

Prints `RATE {...}` for each figure as soon as it has it.
"""

import json
import statistics
import sys
from collections.abc import Callable

# Of this folder's files no package shall take one for a module of its own.
sys.path.pop(0)

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROUNDS = 9


def milliseconds(call: Callable, calls: int) -> float:
    """The median of some rounds of calls, after one that warms up."""

    def once() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / calls

    once()
    return statistics.median(once() for _ in range(ROUNDS))


def random_values(*shape: int, **options) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, **options)


def cublas() -> dict:
    side = 8192
    a, b, to = (random_values(side, side) for _ in range(3))
    time = milliseconds(lambda: torch.matmul(a, b, out=to), 10)
    return {"cublas_tflops": 2 * side**3 / time / 1e9}


def copy() -> dict:
    source, to = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    return {"copy_gb_per_s": 2 * source.numel() / milliseconds(lambda: to.copy_(source), 5) / 1e6}


def attention(tokens: int) -> dict:
    q, k, v = (random_values(1, heads, tokens, 128, requires_grad=True) for heads in (32, 8, 8))
    d_out = random_values(1, 32, tokens, 128)

    def passes():
        q.grad = k.grad = v.grad = None
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out.backward(d_out)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return {"attention_ms": milliseconds(passes, 5)}


def main():
    for figure in (cublas, copy, lambda: attention(int(sys.argv[1]))):
        try:
            print("RATE " + json.dumps(figure()), flush=True)
        except (RuntimeError, TypeError) as error:
            print(error, flush=True)


main()
