#!/usr/bin/env python3
"""Loads a 4-bit folder in transformers + bitsandbytes and compares every weight with Nibble's.

  check_bitsandbytes.py MODEL [--nibble PATH]

MODEL     a folder that `nibble quantize` wrote (or any 4-bit folder of a supported family)

transformers loads the folder as pre-quantized. Of every packed linear, the codes, scales and settings that
bitsandbytes holds must be the stored bytes, and its dequantized values must be, bit for bit, those that
`nibble quantize --skip .` writes when it unpacks MODEL to a dense folder. All other tensors must be equal to
the stored ones. Fails at the first difference. Needs torch, transformers, bitsandbytes.

bitsandbytes 0.50.2 decodes on CPUs with AVX-512 in one pass over the whole weight and is wrong there where
the columns are not a multiple of the block size (half of the rows of such a weight begin inside a block);
for those its plain implementation in PyTorch is asked.
"""

import argparse
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.backends.utils import _get_4bit_code
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent


def tensors(folder):
    """Name to a function that reads the tensor."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        file = safe_open(path, "pt")
        for name in file.keys():
            found[name] = lambda file=file, name=name: file.get_tensor(name)
    return found


def dequantize(weight):
    """bitsandbytes' values of a packed weight, in its own type."""
    state = weight.quant_state
    if state.shape[-1] % state.blocksize == 0:
        return functional.dequantize_4bit(weight.data, state)
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    code = _get_4bit_code(state.quant_type, weight.device)
    codes = weight.data.view(torch.uint8).flatten()
    return _dequantize_4bit_compute(codes, absmax.float(), code, state.blocksize, state.shape, state.dtype)


def check_linear(name, weight, stored, dense, is_conv1d):
    state = weight.quant_state
    assert torch.equal(weight.data.view(torch.uint8).flatten(), stored[name]().view(torch.uint8).flatten()), (
        f"{name}: codes differ"
    )
    assert torch.equal(state.absmax, stored[f"{name}.absmax"]()), f"{name}: scales differ"
    got, expected = dequantize(weight), dense[name]()
    if is_conv1d:  # GPT-2's dense files hold the transpose
        expected = expected.T
    assert got.dtype == expected.dtype, f"{name}: {got.dtype}, Nibble has {expected.dtype}"
    assert torch.equal(got.reshape(expected.shape), expected), f"{name}: values differ"
    return expected.numel()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--nibble", default=ROOT / "target/release/nibble")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()

    with tempfile.TemporaryDirectory() as folder:
        unpack = ["quantize", "--model", arguments.model, "--out", f"{folder}/dense", "--skip", ".", "--force"]
        subprocess.run([arguments.nibble, *unpack], check=True, stdout=subprocess.DEVNULL)
        stored, dense = tensors(arguments.model), tensors(f"{folder}/dense")
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
        linears = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
        is_conv1d = model.config.model_type == "gpt2"
        elements = 0
        for name, module in linears.items():
            elements += check_linear(f"{name}.weight", module.weight, stored, dense, is_conv1d)
        others = 0
        for name, value in model.state_dict().items():
            if name in stored and name in dense and name.removesuffix(".weight") not in linears:
                assert torch.equal(value, dense[name]().to(value.dtype)), f"{name}: values differ"
                others += 1
        packed = sum(".quant_state." in name for name in stored)
        assert linears and packed == len(linears), f"{packed} packed weights, {len(linears)} 4-bit linears"
    print(f"transformers {transformers.__version__} loaded {packed} packed linear layers ({elements:,} weights) and "
          f"{others} other tensors: all equal to Nibble's, bit for bit")


main()
