// The words of src/random.rs: word i of a stream is word i % 4 of Philox4x32-10 with counter
// [i/4 low, i/4 high, step low, step high].
// Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
#pragma once
#include "vector.cuh"

constexpr u32 PHILOX_MULTIPLIER_0 = 0xD2511F53u;
constexpr u32 PHILOX_MULTIPLIER_1 = 0xCD9E8D57u;
constexpr u32 PHILOX_WEYL_0 = 0x9E3779B9u;
constexpr u32 PHILOX_WEYL_1 = 0xBB67AE85u;
constexpr int PHILOX_ROUNDS = 10;

/// Four random words.
struct PhiloxBlock {
    u32 word[4];
};

__device__ __forceinline__ PhiloxBlock philox4x32(u64 block, u64 step, u32 key0, u32 key1) {
    u32 a = static_cast<u32>(block), b = static_cast<u32>(block >> 32);
    u32 c = static_cast<u32>(step), d = static_cast<u32>(step >> 32);
#pragma unroll
    for (int round = 0; round < PHILOX_ROUNDS; round++) {
        const u64 first = static_cast<u64>(PHILOX_MULTIPLIER_0) * a;
        const u64 second = static_cast<u64>(PHILOX_MULTIPLIER_1) * c;
        a = static_cast<u32>(second >> 32) ^ b ^ key0;
        b = static_cast<u32>(second);
        c = static_cast<u32>(first >> 32) ^ d ^ key1;
        d = static_cast<u32>(first);
        key0 += PHILOX_WEYL_0;
        key1 += PHILOX_WEYL_1;
    }
    return {{a, b, c, d}};
}

/// A word of a block without addressing registers.
__device__ __forceinline__ u32 pick(const PhiloxBlock& words, u64 i) {
    const u32 low = i == 0 ? words.word[0] : words.word[1];
    const u32 high = i == 2 ? words.word[2] : words.word[3];
    return i < 2 ? low : high;
}

/// Calls use(i, word) for N elements from `index` on, which for N = 8 is a multiple of 4: pieces begin
/// at whole blocks.
template <int N, class Use>
__device__ __forceinline__ void for_words(u64 index, u64 step, u32 key0, u32 key1, Use use) {
    PhiloxBlock words = {};
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (i % 4 == 0) words = philox4x32((index + i) / 4, step, key0, key1);
        use(i, N == 1 ? pick(words, index % 4) : words.word[i % 4]);
    }
}
