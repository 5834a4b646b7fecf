#!/usr/bin/env python3
"""Golden 4-bit blocks beyond gen_nf4.py, from bitsandbytes on CPU: FP4, and the block sizes it leaves out.
usage: gen_blocks.py OUT.safetensors

For each case: input, packed, absmax, dequant (f32), nested.absmax_u8, nested.absmax, nested.offset,
nested.dequant (f32). A key reads TYPE.NAME.bsBLOCK.DTYPE.

Dequantized by bitsandbytes' generic code: the AVX-512 kernel of 0.50.2 takes wrong scales where the
columns are not a multiple of the block size.
"""

import sys

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from safetensors.torch import save_file

generator = torch.Generator().manual_seed(4)
code = F.get_4bit_type("fp4", device="cpu").sort().values
middle = (code[:-1] + code[1:]) / 2
nine = torch.full_like(middle, 9.0)
probes = torch.cat([code, middle, torch.nextafter(middle, nine), torch.nextafter(middle, -nine)])
ties = torch.zeros(64)
ties[0], ties[1 : 1 + len(probes)] = 1.0, probes
normal = torch.randn(24, 96, generator=generator) * 0.02
large = torch.randn(3, 1500, generator=generator)
tiny = torch.randn(256, generator=generator) * torch.tensor([1e-39, 1e-36, 1e-38, 1e-44]).repeat_interleave(64)
zeros = torch.cat([torch.zeros(64), -torch.zeros(64), torch.randn(70, generator=generator)])
CASES = [
    ("fp4", "ties", torch.cat([ties, -ties, ties * 4.0, ties * 0.37]), ("float32",), (64,)),
    ("fp4", "sweep", torch.linspace(-1, 1, 4096), ("float32",), (4096,)),
    ("fp4", "normal", normal, ("float32", "bfloat16", "float16"), (32, 64, 256)),
    ("fp4", "tiny", tiny, ("float32", "bfloat16"), (64,)),
    ("fp4", "zeros", zeros, ("float32",), (64,)),
    ("nf4", "normal", normal, ("float32", "bfloat16"), (32,)),
    ("nf4", "large", large, ("bfloat16",), (32, 512, 1024, 2048)),
]


def dequantize(packed, absmax, state):
    return _dequantize_4bit_compute(
        packed.reshape(-1), absmax, state.code, state.blocksize, state.shape, torch.float32
    )


tensors = {}
for quant_type, name, values, dtypes, block_sizes in CASES:
    for dtype in dtypes:
        for block_size in block_sizes:
            key = f"{quant_type}.{name}.bs{block_size}.{dtype}"
            x = values.to(getattr(torch, dtype))
            args = dict(blocksize=block_size, quant_type=quant_type)
            packed, plain = F.quantize_4bit(x, compress_statistics=False, **args)
            again, nested = F.quantize_4bit(x, compress_statistics=True, **args)
            assert torch.equal(packed, again)
            absmax = F.dequantize_blockwise(nested.absmax, nested.state2) + nested.offset
            tensors |= {
                f"{key}.input": x,
                f"{key}.packed": packed.reshape(-1),
                f"{key}.absmax": plain.absmax,
                f"{key}.dequant": dequantize(packed, plain.absmax, plain),
                f"{key}.nested.absmax_u8": nested.absmax,
                f"{key}.nested.absmax": nested.state2.absmax,
                f"{key}.nested.offset": nested.offset.reshape(1),
                f"{key}.nested.dequant": dequantize(again, absmax, nested),
            }
tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
save_file(tensors, sys.argv[1], {"bitsandbytes": bnb.__version__, "torch": torch.__version__})
