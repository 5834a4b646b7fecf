#!/usr/bin/env python3
"""Golden data for the block types of GGUF files.

Writes tests/data/gguf/types.safetensors: for each type `TYPE.blocks`, the bytes of a weight of 16 rows of
256 as a file has them, and `TYPE.values`, what llama.cpp's own Python package reads from them, in f32. Blocks
are random bytes with scales that are finite and of a usual size.

Needs gguf, numpy, safetensors. Run from the repository root.
"""

from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file

OUT = Path("tests/data/gguf/types.safetensors")
ROWS, COLUMNS = 16, 256
# Types that the package cannot write: where in a block of bytes the scales (f16) lie.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
WRITTEN = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def random_blocks(generator: np.random.Generator, name: str) -> np.ndarray:
    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    blocks = generator.integers(0, 256, (ROWS * COLUMNS // weights, size), dtype=np.uint8)
    for offset in SCALES[name]:
        scales = generator.uniform(1e-4, 1e-2, len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(ROWS, -1)


def main() -> None:
    generator = np.random.default_rng(17)
    tensors = {}
    for name in (*WRITTEN, *SCALES):
        kind = GGMLQuantizationType[name]
        if name in SCALES:
            blocks = random_blocks(generator, name)
        else:
            values = generator.standard_normal((ROWS, COLUMNS)).astype(np.float32)
            blocks = quantize(values, kind).view(np.uint8).reshape(ROWS, -1)
        tensors[f"{name}.blocks"] = np.ascontiguousarray(blocks)
        typed = blocks.view({"F32": np.float32, "F16": np.float16}.get(name, np.uint8))
        values = dequantize(typed, kind).astype(np.float32).reshape(ROWS, COLUMNS)
        assert np.isfinite(values).all(), name
        tensors[f"{name}.values"] = np.ascontiguousarray(values)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, OUT)


if __name__ == "__main__":
    main()
