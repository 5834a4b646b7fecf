// The elementwise parts of exact attention in blocks of query rows; the products are cuBLAS'.
//
// Of a block of scores q·k, [heads, rows, keys] in f32: s = cap(scale · q·k), cap(s) = c·tanh(s/c)
// if c > 0; query t sees keys max(0, t + 1 − window) ..= t of its document. Forward:
// lse = log Σ e^s, p = e^{s − lse}. Backward, δ = Σ do ∘ o: ds = p·(dp − δ), and what is written is
// the gradient of q·k: scale · cap'(s) · ds. Twin of src/kernels/cpu/attention/.
#pragma once
#include "reduce.cuh"
#include "vector.cuh"

/// How scores become arguments of the softmax.
struct ScoreMap {
    float scale;
    float soft_cap;  // 0: none

    /// s from q·k.
    __device__ __forceinline__ float score(float product) const {
        const float s = scale * product;
        return soft_cap > 0.0f ? soft_cap * tanhf(s / soft_cap) : s;
    }

    /// ds / d(q·k), from s.
    __device__ __forceinline__ float slope(float s) const {
        if (soft_cap <= 0.0f) return scale;
        const float t = s / soft_cap;
        return scale * (1.0f - t * t);
    }
};

/// Which part of the document a block of scores shows.
struct ScoreBlock {
    int first_query;  // token of row 0
    int first_key;    // token of column 0
    int keys;
    int window;  // 0: all keys before the query

    /// First and last + 1 column that `row` sees.
    __device__ __forceinline__ int begin(int row) const {
        const int first = window > 0 ? first_query + row + 1 - window - first_key : 0;
        return first > 0 ? first : 0;
    }
    __device__ __forceinline__ int end(int row) const {
        const int last = first_query + row + 1 - first_key;
        return last < keys ? last : keys;
    }
};

/// One row of probabilities from one row of products.
__device__ __forceinline__ void attention_softmax_row(const ScoreMap& map, const float* products,
                                                      bfloat16* probabilities, float* lse,
                                                      int begin, int end, int keys) {
    float largest = -3.0e38f;
    for (int k = begin + threadIdx.x; k < end; k += blockDim.x) {
        largest = fmaxf(largest, map.score(products[k]));
    }
    largest = block_max(largest);
    float sum = 0.0f;
    for (int k = begin + threadIdx.x; k < end; k += blockDim.x) {
        sum += expf(map.score(products[k]) - largest);
    }
    sum = block_sum(sum);
    const float inverse = 1.0f / sum;
    for (int k = threadIdx.x; k < keys; k += blockDim.x) {
        const bool visible = k >= begin && k < end;
        const float p = visible ? expf(map.score(products[k]) - largest) * inverse : 0.0f;
        probabilities[k] = to_bf16(p);
    }
    if (threadIdx.x == 0) *lse = largest + logf(sum);
}

/// Probabilities and the gradient of the products of one row, from the log-sum-exp.
__device__ __forceinline__ void attention_softmax_backward_row(
    const ScoreMap& map, const float* products, const float* d_probabilities, float lse,
    float delta, bfloat16* probabilities, bfloat16* d_products, int begin, int end, int keys) {
    for (int k = threadIdx.x; k < keys; k += blockDim.x) {
        float p = 0.0f, d = 0.0f;
        if (k >= begin && k < end) {
            const float s = map.score(products[k]);
            p = expf(s - lse);
            d = p * (d_probabilities[k] - delta) * map.slope(s);
        }
        probabilities[k] = to_bf16(p);
        d_products[k] = to_bf16(d);
    }
}

/// δ of one (row, head) a warp: Σ do ∘ o.
__device__ __forceinline__ void attention_delta_row(const bfloat16* d_o, const bfloat16* o,
                                                    float* delta, int head_dim) {
    float sum = 0.0f;
    for (int i = threadIdx.x % 32; i < head_dim; i += 32) sum += to_f32(d_o[i]) * to_f32(o[i]);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) *delta = sum;
}
