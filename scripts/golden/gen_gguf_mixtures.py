#!/usr/bin/env python3
"""Which type llama.cpp gives each matrix of a quantized GGUF file.

  gen_gguf_mixtures.py LIBRARIES OUT FOLDER ...

LIBRARIES is a folder with llama.cpp's shared libraries, such as `bins/linux-x64` of the npm package
@node-llama-cpp/linux-x64. A FOLDER has config.json and, as model.gguf, a model of it (any weights) that
`nibble export --outtype f32` wrote. OUT is JSON: for each folder its config, and for each file type and part
of the model the types of its layers in order.

Needs gguf.
"""

import ctypes
import json
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from gguf import GGUFReader

# `enum llama_ftype`
FILE_TYPES = {"q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}


class Parameters(ctypes.Structure):
    """The beginning of `llama_model_quantize_params`; what follows stays as it is by default."""

    _fields_ = [("nthread", ctypes.c_int32), ("ftype", ctypes.c_int), ("rest", ctypes.c_char * 512)]


def load(folder: Path) -> ctypes.CDLL:
    for pattern in ("libggml-base.so*", "libggml.*so*", "libllama.*so*"):
        library = ctypes.CDLL(str(next(folder.glob(pattern))), mode=ctypes.RTLD_GLOBAL)
    library.llama_model_quantize_default_params.restype = Parameters
    library.llama_backend_init()
    return library


def mixture(library: ctypes.CDLL, source: str, file_type: int) -> dict[str, str]:
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype = file_type
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        code = library.llama_model_quantize(source.encode(), file.name.encode(), ctypes.byref(parameters))
        assert code == 0, source
        parts = defaultdict(list)
        for tensor in GGUFReader(file.name).tensors:
            if len(tensor.shape) == 2 and tensor.tensor_type.name != "F32":
                layer, part = re.match(r"(?:blk\.(\d+)\.)?(.*)\.weight", tensor.name).groups()
                parts[part].append((int(layer or 0), tensor.tensor_type.name))
    return {part: " ".join(kind for _, kind in sorted(kinds)) for part, kinds in sorted(parts.items())}


def case(library: ctypes.CDLL, folder: Path) -> dict:
    source = str(folder / "model.gguf")
    types = {kind: mixture(library, source, number) for kind, number in FILE_TYPES.items()}
    return {"config": json.loads((folder / "config.json").read_text()), "types": types}


loaded = load(Path(sys.argv[1]))
golden = {folder.name: case(loaded, folder) for folder in map(Path, sys.argv[3:])}
Path(sys.argv[2]).write_text(json.dumps(golden, indent=1) + "\n")
