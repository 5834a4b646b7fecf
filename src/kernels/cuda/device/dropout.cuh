// Inverted dropout with the words of src/random.rs: y = x ∘ mask / (1 − p).
//
// Element i is dropped if its word is below p·2³². i = first + row · width + column.
#pragma once
#include "philox.cuh"

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
        // Rounded before it is added, as on the CPU.
        for_words<N>(first + column, mask.step, mask.key0, mask.key1, [&](int i, u32 word) {
            piece.v[i] = __fmul_rn(piece.v[i], mask.factor(word));
        });
        if (accumulate) {
            const Piece<N> before = load_piece<N>(y + column);
#pragma unroll
            for (int i = 0; i < N; i++) piece.v[i] += before.v[i];
        }
        store_piece(y + column, piece);
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
