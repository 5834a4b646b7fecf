// Rotary embedding in place: [a, b] ← [a·cos − b·sin, b·cos + a·sin] for the halves of each head, or of
// the rotary_dim elements at its beginning.
//
// The backward pass turns by the opposite angle. Where the heads of q have a factor for their row
// besides, it multiplies cos and sin: whole heads turn then. Tables in f32, [rows, rotary_dim / 2]; the
// rotated heads (q, then k) lie at the beginning of each row. Twin of src/kernels/cpu/rotary.rs.
#pragma once
#include "vector.cuh"

/// One pair of pieces of one head.
template <int N>
__device__ __forceinline__ void rotate_piece(bfloat16* first, bfloat16* second, const float* cos,
                                             const float* sin, float scale, float sign) {
    Piece<N> a = load_piece<N>(first), b = load_piece<N>(second);
    const Piece<N> c = load_piece<N>(cos), s = load_piece<N>(sin);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float cosine = scale * c.v[i], sine = sign * (scale * s.v[i]);
        const float turned = a.v[i] * cosine - b.v[i] * sine;
        b.v[i] = b.v[i] * cosine + a.v[i] * sine;
        a.v[i] = turned;
    }
    store_piece(first, a);
    store_piece(second, b);
}

struct RotatedHeads {
    int queries, all;
    float query_scale;
};

template <int N>
__device__ __forceinline__ void rotate_row(bfloat16* row, const float* cos, const float* sin,
                                           RotatedHeads heads, int head_dim, int half, float sign) {
    const int pieces = half / N;
    for (int i = threadIdx.x; i < heads.all * pieces; i += blockDim.x) {
        const int head = i / pieces, column = i % pieces * N;
        bfloat16* first = row + head * head_dim + column;
        const float scale = head < heads.queries ? heads.query_scale : 1.0f;
        rotate_piece<N>(first, first + half, cos + column, sin + column, scale, sign);
    }
}

__device__ __forceinline__ void rotate(bfloat16* qkv, int stride, const float* cos,
                                       const float* sin, const float* query_scale, int queries,
                                       int all, int head_dim, int rotary_dim, bool backward) {
    const i64 row = blockIdx.x;
    const int half = rotary_dim / 2;
    const float sign = backward ? -1.0f : 1.0f;
    const RotatedHeads heads = {queries, all, query_scale ? query_scale[row] : 1.0f};
    const bool aligned = rows_aligned(qkv, stride) && rows_aligned(cos, half) &&
                         rows_aligned(sin, half) && half % 8 == 0 && head_dim % 8 == 0;
    qkv = row_of(qkv, row, stride);
    cos = row_of(cos, row, half);
    sin = row_of(sin, row, half);
    if (aligned) {
        rotate_row<8>(qkv, cos, sin, heads, head_dim, half, sign);
    } else {
        rotate_row<1>(qkv, cos, sin, heads, head_dim, half, sign);
    }
}
