// RMS norms of single heads of q and k, a warp a head, f32 inside.
//
// y = w ∘ x·ρ, ρ = 1/sqrt(mean(x²) + ε) over a head; dx = ρ·(g − x̂·mean(g ∘ x̂)), with g = w ∘ dy,
// x̂ = x·ρ, in place of dy. Source: transformers models/qwen3. Twin of src/kernels/cpu/head_norms.rs.
#pragma once
#include "reduce.cuh"
#include "rows.cuh"

/// The norms of a block, and how its rows [q | k | v] are made up.
struct HeadNorms {
    const float* q_weight;
    const float* k_weight;
    float epsilon;
    int heads, kv_heads, head_dim;

    /// The weight of head `head` of q and k.
    __device__ __forceinline__ const float* weight(int head) const {
        return head < heads ? q_weight : k_weight;
    }
};

struct NormHead {
    const HeadNorms& norms;
    const bfloat16* from;
    bfloat16* to;

    template <int N>
    __device__ __forceinline__ void run(int head) const {
        const bfloat16* x = from + head * norms.head_dim;
        bfloat16* y = to + head * norms.head_dim;
        const float* weight = norms.weight(head);
        const int first = N * (threadIdx.x % 32);
        float sum = 0.0f;
#pragma unroll 1  // one turn for heads of up to 256
        for (int c = first; c < norms.head_dim; c += 32 * N) {
            const Piece<N> piece = load_piece<N>(x + c);
#pragma unroll
            for (int i = 0; i < N; i++) sum += piece.v[i] * piece.v[i];
        }
        const float rstd = 1.0f / sqrtf(warp_sum(sum) / norms.head_dim + norms.epsilon);
#pragma unroll 1  // one turn for heads of up to 256
        for (int c = first; c < norms.head_dim; c += 32 * N) {
            Piece<N> piece = load_piece<N>(x + c);
            const Piece<N> w = load_piece<N>(weight + c);
#pragma unroll
            for (int i = 0; i < N; i++) piece.v[i] = piece.v[i] * rstd * w.v[i];
            store_piece(y + c, piece);
        }
    }
};

struct NormHeadGradient {
    const HeadNorms& norms;
    const bfloat16* qkv;
    bfloat16* dqkv;

    template <int N>
    __device__ __forceinline__ void run(int head) const {
        const bfloat16* x = qkv + head * norms.head_dim;
        bfloat16* d = dqkv + head * norms.head_dim;
        const float* weight = norms.weight(head);
        const int first = N * (threadIdx.x % 32);
        float square = 0.0f, along = 0.0f;
#pragma unroll 1  // one turn for heads of up to 256
        for (int c = first; c < norms.head_dim; c += 32 * N) {
            const Piece<N> input = load_piece<N>(x + c), dy = load_piece<N>(d + c);
            const Piece<N> w = load_piece<N>(weight + c);
#pragma unroll
            for (int i = 0; i < N; i++) {
                square += input.v[i] * input.v[i];
                along += dy.v[i] * w.v[i] * input.v[i];
            }
        }
        const float rstd = 1.0f / sqrtf(warp_sum(square) / norms.head_dim + norms.epsilon);
        along = warp_sum(along) * rstd * rstd / norms.head_dim;
#pragma unroll 1  // one turn for heads of up to 256
        for (int c = first; c < norms.head_dim; c += 32 * N) {
            const Piece<N> input = load_piece<N>(x + c), w = load_piece<N>(weight + c);
            Piece<N> gradient = load_piece<N>(d + c);
#pragma unroll
            for (int i = 0; i < N; i++) {
                gradient.v[i] = rstd * (gradient.v[i] * w.v[i] - input.v[i] * along);
            }
            store_piece(d + c, gradient);
        }
    }
};

/// `run<N>(head)` for the heads of q and k, warps in turns; N is 8 if `aligned`.
template <class Body>
__device__ __forceinline__ void for_heads(const HeadNorms& norms, bool aligned, Body body) {
    const int heads = norms.heads + norms.kv_heads, warps = blockDim.x / 32;
    for (int head = threadIdx.x / 32; head < heads; head += warps) {
        if (aligned && norms.head_dim % 8 == 0) {
            body.template run<8>(head);
        } else {
            body.template run<1>(head);
        }
    }
}

__device__ __forceinline__ void norm_heads(const HeadNorms& norms, const bfloat16* qkv, int stride,
                                           bfloat16* to, int to_stride) {
    const bool aligned = rows_aligned(qkv, stride) && rows_aligned(to, to_stride) &&
                         rows_aligned(norms.q_weight, 0) && rows_aligned(norms.k_weight, 0);
    const bfloat16* from = row_of(qkv, blockIdx.x, stride);
    to = row_of(to, blockIdx.x, to_stride);
    for_heads(norms, aligned, NormHead{norms, from, to});
    const int values = (norms.heads + norms.kv_heads) * norms.head_dim;
    const ScaleRow<bfloat16, bfloat16> copy = {from + values, to + values, 1.0f, false};
    for_pieces(norms.kv_heads * norms.head_dim, aligned && values % 8 == 0, copy);
}

__device__ __forceinline__ void norm_heads_gradient(const HeadNorms& norms, const bfloat16* qkv,
                                                    int stride, bfloat16* dqkv, int d_stride) {
    const bool aligned = rows_aligned(qkv, stride) && rows_aligned(dqkv, d_stride) &&
                         rows_aligned(norms.q_weight, 0) && rows_aligned(norms.k_weight, 0);
    const NormHeadGradient body = {norms, row_of(qkv, blockIdx.x, stride),
                                   row_of(dqkv, blockIdx.x, d_stride)};
    for_heads(norms, aligned, body);
}
