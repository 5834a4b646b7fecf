#!/usr/bin/env python3
"""Prints the values that `src/random.rs` pins in its tests, computed independently of it.

  gen_random.py        no arguments, no packages
"""
import math

MASK = 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10 (Salmon et al., SC 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def halves(x):
    return [x & MASK, x >> 32]


def key_of(seed, name):
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) & (1 << 64) - 1
    return philox(halves(h) + [0, 0], halves(seed))[:2]


def block(key, step, index):
    return philox(halves(index) + halves(step), key)


def normals(words):
    out = []
    for radius, angle in (words[:2], words[2:]):
        r = math.sqrt(-2 * math.log((radius + 0.5) / 2**32))
        out += [r * math.cos(math.tau * (angle + 0.5) / 2**32), r * math.sin(math.tau * (angle + 0.5) / 2**32)]
    return out


def permutation(key, step, n):
    order = list(range(n))
    for last in range(n - 1, 0, -1):
        words = block(key, step, last // 2)
        low, high = words[2 * (last % 2) :][:2]
        j = (low | high << 32) * (last + 1) >> 64
        order[last], order[j] = order[j], order[last]
    return order


key = key_of(42, "dropout")
print("key        ", [hex(word) for word in key])
print("block 0    ", [hex(word) for word in block(key, 5, 0)])
print("uniform    ", [(word >> 8) / 2**24 for word in block(key, 5, 0)])
print("normal     ", [f"{x:.7f}" for x in normals(block(key, 5, 0))])
print("permutation", permutation(key, 5, 8))
