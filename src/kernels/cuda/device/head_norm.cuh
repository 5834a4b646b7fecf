// RMS norms of q and k, a warp for each: of single heads, or of all of them. f32 inside.
//
// y = w ∘ x·ρ, ρ = 1/sqrt(mean(x²) + ε) over what a norm is of; dx = ρ·(g − x̂·mean(g ∘ x̂)), with
// g = w ∘ dy, x̂ = x·ρ, in place of dy. Sources: transformers models/qwen3, models/olmo2. Twin of
// src/kernels/cpu/head_norms.rs.
#pragma once
#include "reduce.cuh"
#include "rows.cuh"

/// What a norm is of in a row: columns from `first` on.
struct NormedBand {
    const float* weight;
    int first, width;
};

/// The norms of a block, and how its rows [q | k | v] are made up: norms of q, each q_width wide, then
/// those of k.
struct HeadNorms {
    const float* q_weight;
    const float* k_weight;
    float epsilon;
    int q_norms, k_norms, q_width, k_width, v_width;

    __device__ __forceinline__ NormedBand band(int norm) const {
        if (norm < q_norms) return {q_weight, norm * q_width, q_width};
        return {k_weight, q_norms * q_width + (norm - q_norms) * k_width, k_width};
    }
};

struct NormHead {
    const HeadNorms& norms;
    const bfloat16* from;
    bfloat16* to;

    template <int N>
    __device__ __forceinline__ void run(int norm) const {
        const NormedBand band = norms.band(norm);
        const bfloat16* x = from + band.first;
        bfloat16* y = to + band.first;
        const int first = N * (threadIdx.x % 32);
        float sum = 0.0f;
#pragma unroll 1  // one turn for heads of up to 256
        for (int c = first; c < band.width; c += 32 * N) {
            const Piece<N> piece = load_piece<N>(x + c);
#pragma unroll
            for (int i = 0; i < N; i++) sum += piece.v[i] * piece.v[i];
        }
        const float rstd = 1.0f / sqrtf(warp_sum(sum) / band.width + norms.epsilon);
#pragma unroll 1  // one turn for heads of up to 256
        for (int c = first; c < band.width; c += 32 * N) {
            Piece<N> piece = load_piece<N>(x + c);
            const Piece<N> w = load_piece<N>(band.weight + c);
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
    __device__ __forceinline__ void run(int norm) const {
        const NormedBand band = norms.band(norm);
        const bfloat16* x = qkv + band.first;
        bfloat16* d = dqkv + band.first;
        const int first = N * (threadIdx.x % 32);
        float square = 0.0f, along = 0.0f;
#pragma unroll 1  // one turn for heads of up to 256
        for (int c = first; c < band.width; c += 32 * N) {
            const Piece<N> input = load_piece<N>(x + c), dy = load_piece<N>(d + c);
            const Piece<N> w = load_piece<N>(band.weight + c);
#pragma unroll
            for (int i = 0; i < N; i++) {
                square += input.v[i] * input.v[i];
                along += dy.v[i] * w.v[i] * input.v[i];
            }
        }
        const float rstd = 1.0f / sqrtf(warp_sum(square) / band.width + norms.epsilon);
        along = warp_sum(along) * rstd * rstd / band.width;
#pragma unroll 1  // one turn for heads of up to 256
        for (int c = first; c < band.width; c += 32 * N) {
            const Piece<N> input = load_piece<N>(x + c), w = load_piece<N>(band.weight + c);
            Piece<N> gradient = load_piece<N>(d + c);
#pragma unroll
            for (int i = 0; i < N; i++) {
                gradient.v[i] = rstd * (gradient.v[i] * w.v[i] - input.v[i] * along);
            }
            store_piece(d + c, gradient);
        }
    }
};

/// `run<N>(norm)` for the norms of q and k, warps in turns; N is 8 if `aligned`.
template <class Body>
__device__ __forceinline__ void for_norms(const HeadNorms& norms, bool aligned, Body body) {
    const int all = norms.q_norms + norms.k_norms, warps = blockDim.x / 32;
    const bool wide = aligned && norms.q_width % 8 == 0 && norms.k_width % 8 == 0;
    for (int norm = threadIdx.x / 32; norm < all; norm += warps) {
        if (wide) {
            body.template run<8>(norm);
        } else {
            body.template run<1>(norm);
        }
    }
}

__device__ __forceinline__ void norm_heads(const HeadNorms& norms, const bfloat16* qkv, int stride,
                                           bfloat16* to, int to_stride) {
    const bool aligned = rows_aligned(qkv, stride) && rows_aligned(to, to_stride) &&
                         rows_aligned(norms.q_weight, 0) && rows_aligned(norms.k_weight, 0);
    const bfloat16* from = row_of(qkv, blockIdx.x, stride);
    to = row_of(to, blockIdx.x, to_stride);
    for_norms(norms, aligned, NormHead{norms, from, to});
    const int values = norms.q_norms * norms.q_width + norms.k_norms * norms.k_width;
    const ScaleRow<bfloat16, bfloat16> copy = {from + values, to + values, 1.0f, false};
    for_pieces(norms.v_width, aligned && values % 8 == 0, copy);
}

__device__ __forceinline__ void norm_heads_gradient(const HeadNorms& norms, const bfloat16* qkv,
                                                    int stride, bfloat16* dqkv, int d_stride) {
    const bool aligned = rows_aligned(qkv, stride) && rows_aligned(dqkv, d_stride) &&
                         rows_aligned(norms.q_weight, 0) && rows_aligned(norms.k_weight, 0);
    const NormHeadGradient body = {norms, row_of(qkv, blockIdx.x, stride),
                                   row_of(dqkv, blockIdx.x, d_stride)};
    for_norms(norms, aligned, body);
}
