#!/usr/bin/env python3
"""Writes a Llama-shaped checkpoint of random weights, at the disk's speed, with the standard library.

  make_checkpoint.py OUT [--preset llama-3.1-8b|llama-2-7b|1b|32b|small|tiny] [--vocab-size N] [--layers N]
                         [--nf4 | --gguf]

OUT       a folder: config.json, bf16 shards of at most 5 GB with their index, and a tokenizer of as many
          words as the embedding has rows; with --nf4 the linears of the blocks are in bitsandbytes' 4-bit
          blocks with nested scales; with --gguf one file in F16

Matrices are normally distributed with deviation 1/sqrt(hidden size), so that a product keeps the size of its
input and the first loss is about ln(vocabulary); norms are 1. Values are taken from one table at random
places: they repeat, which no quantizer notices.
"""

import argparse
import array
import bisect
import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

PRESETS = {
    # hidden size, feed-forward size, layers, heads, key/value heads, vocabulary
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
    "32b": (5120, 27648, 64, 40, 8, 152064),
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "small": (256, 704, 2, 2, 1, 512),
    "tiny": (128, 352, 2, 4, 2, 512),
}
SHARD_BYTES = 5_000_000_000
TABLE_VALUES = 1 << 18
GGUF_ALIGNMENT = 32
F16 = 1
ELEMENT_BYTES = {"F32": 4, "BF16": 2, "U8": 1}

BLOCK, NESTED_BLOCK = 64, 256
# Of 64 normally distributed values, in deviations.
LARGEST_OF_BLOCK = 2.6
# A file that bitsandbytes wrote has its tables: 16 code values, and the 256 of nested scales.
BITSANDBYTES_FILE = (
    Path(__file__).resolve().parent.parent / "tests/data/bnb4bit/qwen2_s0.f16.dq/model.safetensors"
)
QUANTIZATION = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}


class Table:
    """Random bytes of some kind: slices of a table that is written twice, one after the other."""

    def __init__(self, data: bytes, element_bytes: int):
        self.bytes, self.element_bytes = len(data), element_bytes
        self.data = memoryview(data * 2)
        self.random = random.Random(7)

    def write(self, file: BinaryIO, count: int):
        left = count * self.element_bytes
        while left:
            now = min(left, self.bytes)
            at = self.element_bytes * self.random.randrange(self.bytes // self.element_bytes)
            file.write(self.data[at : at + now])
            left -= now


def normal_table(encode: Callable, deviation: float) -> Table:
    source = random.Random(42)
    deviates = (source.gauss(0.0, deviation) for _ in range(TABLE_VALUES))
    return Table(encode(array.array("f", deviates)), 2)


def bf16(values):
    """The upper halves of f32: rounded towards zero, which is random enough."""
    data = values.tobytes()
    return b"".join(data[at + 2 : at + 4] for at in range(0, len(data), 4))


def f16(values):
    return struct.pack(f"<{len(values)}e", *values)


def shapes(preset):
    """Hugging Face name, GGUF name and shape of every tensor, in checkpoint order."""
    hidden, inner, layers, heads, kv_heads, vocabulary = preset
    kv = hidden // heads * kv_heads
    yield "model.embed_tokens.weight", "token_embd.weight", (vocabulary, hidden)
    for layer in range(layers):
        for name, stored, shape in [
            ("input_layernorm", "attn_norm", (hidden,)),
            ("self_attn.q_proj", "attn_q", (hidden, hidden)),
            ("self_attn.k_proj", "attn_k", (kv, hidden)),
            ("self_attn.v_proj", "attn_v", (kv, hidden)),
            ("self_attn.o_proj", "attn_output", (hidden, hidden)),
            ("post_attention_layernorm", "ffn_norm", (hidden,)),
            ("mlp.gate_proj", "ffn_gate", (inner, hidden)),
            ("mlp.up_proj", "ffn_up", (inner, hidden)),
            ("mlp.down_proj", "ffn_down", (hidden, inner)),
        ]:
            yield f"model.layers.{layer}.{name}.weight", f"blk.{layer}.{stored}.weight", shape
    yield "model.norm.weight", "output_norm.weight", (hidden,)
    yield "lm_head.weight", "output.weight", (vocabulary, hidden)


def config(preset):
    hidden, inner, layers, heads, kv_heads, vocabulary = preset
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@dataclass
class Tensor:
    """What a file has under a name, and how it is written."""

    name: str
    dtype: str
    shape: tuple
    write: Callable[[BinaryIO], None]

    def bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype] * math.prod(self.shape)


def stored(name: str, dtype: str, data: bytes) -> Tensor:
    shape = (len(data) // ELEMENT_BYTES[dtype],)
    return Tensor(name, dtype, shape, lambda file: file.write(data))


def read_tensor(path: Path, suffix: str) -> bytes:
    """The first tensor whose name ends so."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    begin, end = next(header[name]["data_offsets"] for name in sorted(header) if name.endswith(suffix))
    return data[8 + length + begin : 8 + length + end]


class Dense:
    """Matrices in bf16, norms of 1."""

    def __init__(self, deviation: float):
        self.table = normal_table(bf16, deviation)

    def tensors(self, name: str, shape: tuple):
        if len(shape) == 1:
            ones = bf16(array.array("f", [1.0] * shape[0]))
            yield Tensor(name, "BF16", shape, lambda file: file.write(ones))
        else:
            yield Tensor(name, "BF16", shape, lambda file: self.table.write(file, math.prod(shape)))


class Nf4(Dense):
    """The same, the linears of blocks in bitsandbytes' 4-bit blocks."""

    def __init__(self, deviation: float):
        super().__init__(deviation)
        self.offset = struct.unpack("<f", struct.pack("<f", LARGEST_OF_BLOCK * deviation))[0]
        self.nested = struct.pack("<f", 0.1 * self.offset)
        self.values = read_tensor(BITSANDBYTES_FILE, ".quant_map")
        self.nested_values = read_tensor(BITSANDBYTES_FILE, ".nested_quant_map")
        self.codes = Table(self.random_codes(), 1)
        self.scales = Table(random.Random(11).randbytes(1 << 16), 1)

    def random_codes(self) -> bytes:
        values = struct.unpack("<16f", self.values)
        middles = [(low + high) / 2 for low, high in zip(values, values[1:])]
        source = random.Random(43)

        def code():
            return bisect.bisect_left(middles, source.gauss(0.0, 1.0 / LARGEST_OF_BLOCK))

        return bytes(code() << 4 | code() for _ in range(TABLE_VALUES // 2))

    def tensors(self, name: str, shape: tuple):
        if ".layers." not in name or len(shape) == 1:
            yield from super().tensors(name, shape)
            return
        count = math.prod(shape)
        blocks = -(-count // BLOCK)
        yield Tensor(name, "U8", (count // 2, 1), lambda file: self.codes.write(file, count // 2))
        yield Tensor(f"{name}.absmax", "U8", (blocks,), lambda file: self.scales.write(file, blocks))
        yield stored(f"{name}.quant_map", "F32", self.values)
        yield stored(f"{name}.nested_absmax", "F32", self.nested * -(-blocks // NESTED_BLOCK))
        yield stored(f"{name}.nested_quant_map", "F32", self.nested_values)
        yield stored(f"{name}.quant_state.bitsandbytes__nf4", "U8", self.state(shape))

    def state(self, shape: tuple) -> bytes:
        state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(shape)}
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        return json.dumps(state | {"nested_offset": self.offset}).encode()


def into_shards(tensors: list[Tensor]) -> list[list[Tensor]]:
    shards, size = [[]], 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes() > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes()
    # Wide types first, so that each tensor begins on a multiple of its elements.
    return [sorted(shard, key=lambda tensor: -ELEMENT_BYTES[tensor.dtype]) for shard in shards]


def write_shard(path: Path, tensors: list[Tensor]) -> int:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        end = offset + tensor.bytes()
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            tensor.write(file)
    return offset


def write_tokenizer(out: Path, size: int):
    vocabulary = {f"w{id}": id for id in range(size)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    tokenizer = {"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    (out / "tokenizer_config.json").write_text(json.dumps({"bos_token": "w1", "eos_token": "w2"}))


def write_folder(out, preset, nf4):
    out.mkdir(parents=True)
    quantized = {"quantization_config": QUANTIZATION} if nf4 else {}
    (out / "config.json").write_text(json.dumps(config(preset) | quantized, indent=1) + "\n")
    write_tokenizer(out, preset[5])
    kind = (Nf4 if nf4 else Dense)(preset[0] ** -0.5)
    shards = into_shards([t for name, _, shape in shapes(preset) for t in kind.tensors(name, shape)])
    weight_map, total = {}, 0
    for number, tensors in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= {tensor.name: file_name for tensor in tensors}
        total += write_shard(out / file_name, tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return total


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_fields(preset):
    hidden, inner, layers, heads, kv_heads, vocabulary = preset
    words = [text(word) for word in ["w", "1", "w1"]] + [text(f"w{id}") for id in range(3, vocabulary)]
    texts = lambda items: struct.pack("<IIQ", 9, 8, len(items)) + b"".join(items)
    number = lambda value: struct.pack("<II", 4, value)
    named = lambda value: struct.pack("<I", 8) + text(value)
    return {
        "general.architecture": named("llama"),
        "llama.context_length": number(131072),
        "llama.rope.freq_base": struct.pack("<If", 6, 500000.0),
        "llama.embedding_length": number(hidden),
        "llama.feed_forward_length": number(inner),
        "llama.block_count": number(layers),
        "llama.attention.head_count": number(heads),
        "llama.attention.head_count_kv": number(kv_heads),
        "llama.attention.layer_norm_rms_epsilon": struct.pack("<If", 6, 1e-5),
        "tokenizer.ggml.model": named("gpt2"),
        "tokenizer.ggml.pre": named("smollm"),
        "tokenizer.ggml.tokens": texts(words),
        "tokenizer.ggml.merges": texts([text("w 1")]),
        "tokenizer.ggml.bos_token_id": number(1),
        "tokenizer.ggml.eos_token_id": number(2),
    }


def write_gguf(out, preset):
    fields, tensors = gguf_fields(preset), list(shapes(preset))
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    header += b"".join(text(key) + value for key, value in fields.items())
    offset = 0
    for _, name, shape in tensors:
        header += text(name) + struct.pack("<I", len(shape))
        header += b"".join(struct.pack("<Q", size) for size in reversed(shape))
        header += struct.pack("<IQ", F16, offset)
        offset += -(-2 * math.prod(shape) // GGUF_ALIGNMENT) * GGUF_ALIGNMENT
    matrices = normal_table(f16, preset[0] ** -0.5)
    with open(out, "xb") as file:
        file.write(header + bytes(-len(header) % GGUF_ALIGNMENT))
        for _, _, shape in tensors:
            if len(shape) == 1:
                file.write(f16([1.0] * shape[0]))
            else:
                matrices.write(file, math.prod(shape))
            file.write(bytes(-2 * math.prod(shape) % GGUF_ALIGNMENT))
    return offset


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--layers", type=int)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--nf4", action="store_true")
    form.add_argument("--gguf", action="store_true")
    arguments = parser.parse_args()
    preset = list(PRESETS[arguments.preset])
    preset[2] = arguments.layers or preset[2]
    preset[5] = arguments.vocab_size or preset[5]
    if arguments.gguf:
        total = write_gguf(arguments.out, preset)
    else:
        total = write_folder(arguments.out, preset, arguments.nf4)
    print(f"{arguments.out}: {total / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
