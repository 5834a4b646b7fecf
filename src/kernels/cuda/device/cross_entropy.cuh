// Cross-entropy of one row of logits a block, with its gradient in place of the logits.
//
// loss = log Σ_v e^{z_v} − z_y; dz_v = scale · (softmax(z)_v − [v = y]). Two passes over the row:
// maximum and sum together, rescaled when the maximum grows, then the gradient.
// Capped logits are z = c·tanh(x/c) of what lies there: dx = dz · (1 − tanh²(x/c)).
// A target that is not below the vocabulary marks a row that does not count: loss and gradient 0. A row
// is a hit, 1, where no logit is larger than the target's.
// Twin of src/kernels/cpu/cross_entropy.rs.
//
// Where the logits come in tiles of the vocabulary, three numbers a row go from one to the next:
// maximum, Σ e^{z − maximum}, and the target's logit.
#pragma once
#include "reduce.cuh"
#include "vector.cuh"

/// A running maximum m and Σ e^{z − m}.
struct RunningSum {
    float largest, sum;

    template <int N>
    __device__ __forceinline__ void include(const Piece<N>& z) {
        float top = z.v[0];
#pragma unroll
        for (int i = 1; i < N; i++) top = fmaxf(top, z.v[i]);
        if (top > largest) {
            sum *= expf(largest - top);
            largest = top;
        }
#pragma unroll
        for (int i = 0; i < N; i++) sum += expf(z.v[i] - largest);
    }
};

/// c·tanh(x/c) and its slope; without a cap x and 1.
struct SoftCap {
    float cap;  // 0: none

    __device__ __forceinline__ float value(float x) const {
        // Absolute error of 1e-7·c, in fewer registers than tanhf's.
        return cap > 0.0f ? cap - 2.0f * cap / (1.0f + expf(2.0f * x / cap)) : x;
    }
    /// Of the capped value.
    __device__ __forceinline__ float slope(float z) const {
        return cap > 0.0f ? 1.0f - z / cap * (z / cap) : 1.0f;
    }
    template <int N>
    __device__ __forceinline__ Piece<N> apply(Piece<N> x) const {
        if (cap > 0.0f) {
#pragma unroll
            for (int i = 0; i < N; i++) x.v[i] = value(x.v[i]);
        }
        return x;
    }
};

struct SumExponentials {
    const bfloat16* logits;
    SoftCap cap;
    RunningSum* running;

    template <int N>
    __device__ __forceinline__ void run(int column) const {
        running->include(cap.apply(load_piece<N>(logits + column)));
    }
};

struct LogitGradient {
    bfloat16* logits;
    SoftCap cap;
    u32 target;
    float largest, factor, scale;

    template <int N>
    __device__ __forceinline__ void run(int column) const {
        Piece<N> z = cap.apply(load_piece<N>(logits + column));
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float slope = cap.slope(z.v[i]);
            z.v[i] = factor * expf(z.v[i] - largest);
            if (static_cast<u32>(column + i) == target) z.v[i] -= scale;
            z.v[i] *= slope;
        }
        store_piece(logits + column, z);
    }
};

__device__ __forceinline__ void cross_entropy_row(bfloat16* logits, int stride,
                                                  const u32* targets, int vocab_size, float scale,
                                                  bool gradient, SoftCap cap, float* losses,
                                                  float* hits) {
    const i64 row = blockIdx.x;
    const bool aligned = rows_aligned(logits, stride);
    logits = row_of(logits, row, stride);
    const u32 target = targets[row];
    const bool counts = target < static_cast<u32>(vocab_size);
    const float chosen = counts ? cap.value(to_f32(logits[target])) : 0.0f;
    // Smaller than any logit, and finite: a thread without columns must not make a NaN.
    RunningSum running = {-3.0e38f, 0.0f};
    for_pieces(vocab_size, aligned, SumExponentials{logits, cap, &running});
    // Its barriers also part the reading of `chosen` from the writing of gradients.
    const float largest = block_max(running.largest);
    const float total = block_sum(running.sum * expf(running.largest - largest));
    if (threadIdx.x == 0) {
        losses[row] = counts ? largest + logf(total) - chosen : 0.0f;
        hits[row] = counts && chosen >= largest ? 1.0f : 0.0f;
    }
    if (gradient) {
        const float used = counts ? scale : 0.0f;
        for_pieces(vocab_size, aligned,
                   LogitGradient{logits, cap, target, largest, used / total, used});
    }
}

struct TileStatistics {
    float largest, sum, chosen;
};

/// Goes on with a row's tile of `columns` that begins with the vocabulary's `first`.
__device__ __forceinline__ void tile_statistics_row(const bfloat16* logits, int stride, int columns,
                                                    const u32* targets, int first, bool fresh,
                                                    SoftCap cap, TileStatistics* statistics) {
    const i64 row = blockIdx.x;
    const bool aligned = rows_aligned(logits, stride);
    logits = row_of(logits, row, stride);
    RunningSum running = {-3.0e38f, 0.0f};
    for_pieces(columns, aligned, SumExponentials{logits, cap, &running});
    const float largest = block_max(running.largest);
    const float sum = block_sum(running.sum * expf(running.largest - largest));
    if (threadIdx.x != 0) return;
    const u32 target = targets[row] - static_cast<u32>(first);
    const bool here = target < static_cast<u32>(columns);
    const TileStatistics nothing = {-3.0e38f, 0.0f, 0.0f};
    const TileStatistics before = fresh ? nothing : statistics[row];
    const float top = fmaxf(before.largest, largest);
    statistics[row] = {top,
                       before.sum * expf(before.largest - top) + sum * expf(largest - top),
                       here ? cap.value(to_f32(logits[target])) : before.chosen};
}

__device__ __forceinline__ float tile_loss(const TileStatistics& statistics, bool counts) {
    return counts ? statistics.largest + logf(statistics.sum) - statistics.chosen : 0.0f;
}

__device__ __forceinline__ float tile_hit(const TileStatistics& statistics, bool counts) {
    return counts && statistics.chosen >= statistics.largest ? 1.0f : 0.0f;
}

/// Logits of a tile become scale · their gradient.
__device__ __forceinline__ void tile_gradient_row(bfloat16* logits, int stride, int columns,
                                                  const u32* targets, int first, int vocab_size,
                                                  float scale, SoftCap cap,
                                                  const TileStatistics* statistics) {
    const i64 row = blockIdx.x;
    const bool aligned = rows_aligned(logits, stride);
    const float used = targets[row] < static_cast<u32>(vocab_size) ? scale : 0.0f;
    const u32 target = targets[row] - static_cast<u32>(first);
    const TileStatistics all = statistics[row];
    for_pieces(columns, aligned,
               LogitGradient{row_of(logits, row, stride), cap, target, all.largest, used / all.sum,
                             used});
}
