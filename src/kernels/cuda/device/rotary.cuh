// Rotary embedding in place: [a, b] ← [a·cos − b·sin, b·cos + a·sin] for the halves of each head, or of
// the rotary_dim elements at its beginning; or for neighbours in these.
//
// The backward pass turns by the opposite angle. Where the heads of q have a factor for their row
// besides, it multiplies cos and sin: whole heads turn then. Tables in f32, [rows, rotary_dim / 2]; the
// rotated heads (q, then k) lie at the beginning of each row. Twin of src/kernels/cpu/rotary.rs.
#pragma once
#include "vector.cuh"

/// How pairs turn: those of one row have its cos and sin, all of a launch one sign.
struct Turn {
    float scale, sign;

    __device__ __forceinline__ void pair(float& a, float& b, float cos, float sin) const {
        const float cosine = scale * cos, sine = sign * (scale * sin);
        const float turned = a * cosine - b * sine;
        b = b * cosine + a * sine;
        a = turned;
    }
};

/// N pairs of one head, each of an element of its first half and one of its second.
template <int N>
__device__ __forceinline__ void rotate_halves(bfloat16* first, int half, const float* cos,
                                              const float* sin, Turn turn) {
    Piece<N> a = load_piece<N>(first), b = load_piece<N>(first + half);
    const Piece<N> c = load_piece<N>(cos), s = load_piece<N>(sin);
#pragma unroll
    for (int i = 0; i < N; i++) turn.pair(a.v[i], b.v[i], c.v[i], s.v[i]);
    store_piece(first, a);
    store_piece(first + half, b);
}

/// N pairs of neighbours.
template <int N>
__device__ __forceinline__ void rotate_neighbours(bfloat16* pairs, const float* cos,
                                                  const float* sin, Turn turn) {
    Piece<2 * N> piece = load_piece<2 * N>(pairs);
    const Piece<N> c = load_piece<N>(cos), s = load_piece<N>(sin);
#pragma unroll
    for (int i = 0; i < N; i++) turn.pair(piece.v[2 * i], piece.v[2 * i + 1], c.v[i], s.v[i]);
    store_piece(pairs, piece);
}

struct RotatedHeads {
    int queries, all;
    float query_scale;
};

template <int N, bool neighbours>
__device__ __forceinline__ void rotate_row(bfloat16* row, const float* cos, const float* sin,
                                           RotatedHeads heads, int head_dim, int half, float sign) {
    const int pieces = half / N;
    for (int i = threadIdx.x; i < heads.all * pieces; i += blockDim.x) {
        const int head = i / pieces, pair = i % pieces * N;
        bfloat16* first = row + head * head_dim;
        const Turn turn = {head < heads.queries ? heads.query_scale : 1.0f, sign};
        if constexpr (neighbours) {
            rotate_neighbours<N>(first + 2 * pair, cos + pair, sin + pair, turn);
        } else {
            rotate_halves<N>(first + pair, half, cos + pair, sin + pair, turn);
        }
    }
}

__device__ __forceinline__ void rotate(bfloat16* qkv, int stride, const float* cos,
                                       const float* sin, const float* query_scale, int queries,
                                       int all, int head_dim, int rotary_dim, bool neighbours,
                                       bool backward) {
    const i64 row = blockIdx.x;
    const int half = rotary_dim / 2;
    const float sign = backward ? -1.0f : 1.0f;
    const RotatedHeads heads = {queries, all, query_scale ? query_scale[row] : 1.0f};
    const bool aligned = rows_aligned(qkv, stride) && rows_aligned(cos, half) &&
                         rows_aligned(sin, half) && head_dim % 8 == 0;
    qkv = row_of(qkv, row, stride);
    cos = row_of(cos, row, half);
    sin = row_of(sin, row, half);
    if (neighbours && aligned && half % 4 == 0) {
        rotate_row<4, true>(qkv, cos, sin, heads, head_dim, half, sign);
    } else if (neighbours) {
        rotate_row<1, true>(qkv, cos, sin, heads, head_dim, half, sign);
    } else if (aligned && half % 8 == 0) {
        rotate_row<8, false>(qkv, cos, sin, heads, head_dim, half, sign);
    } else {
        rotate_row<1, false>(qkv, cos, sin, heads, head_dim, half, sign);
    }
}
