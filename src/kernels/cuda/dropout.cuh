// Inverted dropout with the words of src/random.rs: y = x ∘ mask / (1 − p).
//
// Word i of a stream is word i % 4 of Philox4x32-10 with counter [i/4 low, i/4 high, step low,
// step high]; element i is dropped if its word is below p·2³². i = first + row · width + column.
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

/// Key, step and threshold of one mask.
struct DropoutMask {
    u32 key0, key1;
    u64 step;
    u64 threshold;
    float kept;

    __device__ __forceinline__ float factor(u32 word) const {
        return static_cast<u64>(word) < threshold ? 0.0f : kept;
    }
};

struct DropRow {
    DropoutMask mask;
    const bfloat16* x;
    bfloat16* y;
    u64 first;  // index of the row's first element
    bool accumulate;

    template <int N>
    __device__ __forceinline__ void run(int column) const {
        Piece<N> piece = load_piece<N>(x + column);
        const u64 index = first + column;
        PhiloxBlock words = {};
#pragma unroll
        for (int i = 0; i < N; i++) {
            // With N = 8 width and first are multiples of 4: pieces begin at whole blocks.
            if (i % 4 == 0) words = philox4x32((index + i) / 4, mask.step, mask.key0, mask.key1);
            const u32 word = N == 1 ? pick(words, index % 4) : words.word[i % 4];
            // Rounded before it is added, as on the CPU.
            piece.v[i] = __fmul_rn(piece.v[i], mask.factor(word));
        }
        if (accumulate) {
            const Piece<N> before = load_piece<N>(y + column);
#pragma unroll
            for (int i = 0; i < N; i++) piece.v[i] += before.v[i];
        }
        store_piece(y + column, piece);
    }

    /// A word of a block without addressing registers.
    static __device__ __forceinline__ u32 pick(const PhiloxBlock& words, u64 i) {
        const u32 low = i == 0 ? words.word[0] : words.word[1];
        const u32 high = i == 2 ? words.word[2] : words.word[3];
        return i < 2 ? low : high;
    }
};

__device__ __forceinline__ void dropout_row(const DropoutMask& mask, u64 first,
                                            const bfloat16* x, int x_stride, bfloat16* y, int y_stride,
                                            int width, bool accumulate) {
    const i64 row = blockIdx.x;
    const bool aligned =
        first % 4 == 0 && rows_aligned(x, x_stride) && rows_aligned(y, y_stride);
    for_pieces(width, aligned,
               DropRow{mask, row_of(x, row, x_stride), row_of(y, row, y_stride),
                       first + static_cast<u64>(row) * static_cast<u64>(width), accumulate});
}
