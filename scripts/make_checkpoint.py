#!/usr/bin/env python3
"""Writes a Llama-shaped checkpoint of random weights, at the disk's speed, with the standard library.

  make_checkpoint.py OUT [--preset llama-3.1-8b|llama-2-7b|1b|tiny] [--vocab-size N] [--layers N] [--gguf]

OUT       a folder (config.json, bf16 shards of at most 5 GB with their index), or with --gguf one
          file in F16 with a tokenizer of as many tokens as the embedding has rows

The values are normally distributed with deviation 0.02, taken from one table at random places: they
repeat, which no quantizer notices. Nothing can be trained on them.
"""

import argparse
import array
import json
import random
import struct
from pathlib import Path

PRESETS = {
    # hidden size, feed-forward size, layers, heads, key/value heads, vocabulary
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "tiny": (128, 352, 2, 4, 2, 512),
}
SHARD_BYTES = 5_000_000_000
TABLE_VALUES = 1 << 20
GGUF_ALIGNMENT = 32
F16 = 1


class Values:
    """Random 16-bit floats: slices of a table that is twice as long as it has values."""

    def __init__(self, encode):
        source = random.Random(42)
        deviates = (source.gauss(0.0, 0.02) for _ in range(TABLE_VALUES))
        self.table = memoryview(encode(array.array("f", deviates)) * 2)
        self.random = random.Random(7)

    def write(self, file, count):
        while count:
            now = min(count, TABLE_VALUES)
            at = 2 * self.random.randrange(TABLE_VALUES)
            file.write(self.table[at : at + 2 * now])
            count -= now


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


def elements(shape):
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


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
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def write_folder(out, preset):
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config(preset), indent=1) + "\n")
    shards, size = [[]], 0
    for name, _, shape in shapes(preset):
        bytes_ = 2 * elements(shape)
        if shards[-1] and size + bytes_ > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += bytes_
    values, weight_map, total = Values(bf16), {}, 0
    for number, tensors in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, offset = {}, 0
        for name, shape in tensors:
            end = offset + 2 * elements(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            weight_map[name] = file_name
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(out / file_name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, shape in tensors:
                values.write(file, elements(shape))
        total += offset
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
        "llama.context_length": number(4096),
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
        offset += -(-2 * elements(shape) // GGUF_ALIGNMENT) * GGUF_ALIGNMENT
    values = Values(f16)
    with open(out, "xb") as file:
        file.write(header + bytes(-len(header) % GGUF_ALIGNMENT))
        for _, _, shape in tensors:
            values.write(file, elements(shape))
            file.write(bytes(-2 * elements(shape) % GGUF_ALIGNMENT))
    return offset


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--gguf", action="store_true")
    arguments = parser.parse_args()
    preset = list(PRESETS[arguments.preset])
    preset[2] = arguments.layers or preset[2]
    preset[5] = arguments.vocab_size or preset[5]
    total = (write_gguf if arguments.gguf else write_folder)(arguments.out, preset)
    print(f"{arguments.out}: {total / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
