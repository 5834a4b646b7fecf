// Uniform noise in place: x += −a + 2·a·u, u a multiple of 2⁻²⁴ in [0, 1) from an element's word.
//
// Element i = first + row · width + column. Twin of Kernels::add_noise on the CPU.
#pragma once
#include "philox.cuh"

/// Key, step and amplitude of the noise.
struct UniformNoise {
    u32 key0, key1;
    u64 step;
    float amplitude;

    __device__ __forceinline__ float value(u32 word) const {
        const float unit = static_cast<float>(word >> 8) * (1.0f / 16777216.0f);
        return __fadd_rn(-amplitude, __fmul_rn(2.0f * amplitude, unit));
    }
};

struct NoiseRow {
    UniformNoise noise;
    bfloat16* x;
    u64 first;  // index of the row's first element

    template <int N>
    __device__ __forceinline__ void run(int column) const {
        Piece<N> piece = load_piece<N>(x + column);
        for_words<N>(first + column, noise.step, noise.key0, noise.key1,
                     [&](int i, u32 word) { piece.v[i] += noise.value(word); });
        store_piece(x + column, piece);
    }
};

__device__ __forceinline__ void add_noise_row(const UniformNoise& noise, u64 first, bfloat16* x,
                                              int stride, int width) {
    const i64 row = blockIdx.x;
    const bool aligned = first % 4 == 0 && rows_aligned(x, stride);
    for_pieces(width, aligned,
               NoiseRow{noise, row_of(x, row, stride),
                        first + static_cast<u64>(row) * static_cast<u64>(width)});
}
