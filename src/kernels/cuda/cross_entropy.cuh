// Cross-entropy of one row of logits a block, with its gradient in place of the logits.
//
// loss = log Σ_v e^{z_v} − z_y; dz_v = scale · (softmax(z)_v − [v = y]). Two passes over the row:
// maximum and sum together, rescaled when the maximum grows, then the gradient.
// A target that is not below the vocabulary marks a row that does not count: loss and gradient 0.
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

template <class T>
struct SumExponentials {
    const T* logits;
    RunningSum* running;

    template <int N>
    __device__ __forceinline__ void run(int column) const {
        running->include(load_piece<N>(logits + column));
    }
};

template <class T>
struct LogitGradient {
    T* logits;
    u32 target;
    float largest, factor, scale;

    template <int N>
    __device__ __forceinline__ void run(int column) const {
        Piece<N> z = load_piece<N>(logits + column);
#pragma unroll
        for (int i = 0; i < N; i++) {
            z.v[i] = factor * expf(z.v[i] - largest);
            if (static_cast<u32>(column + i) == target) z.v[i] -= scale;
        }
        store_piece(logits + column, z);
    }
};

template <class T>
__device__ __forceinline__ void cross_entropy_row(T* logits, int stride, const u32* targets,
                                                  int vocab_size, float scale, bool gradient,
                                                  float* losses) {
    const i64 row = blockIdx.x;
    const bool aligned = rows_aligned(logits, stride);
    logits = row_of(logits, row, stride);
    const u32 target = targets[row];
    const bool counts = target < static_cast<u32>(vocab_size);
    const float chosen = counts ? to_f32(logits[target]) : 0.0f;
    // Smaller than any logit, and finite: a thread without columns must not make a NaN.
    RunningSum running = {-3.0e38f, 0.0f};
    for_pieces(vocab_size, aligned, SumExponentials<T>{logits, &running});
    // Its barriers also part the reading of `chosen` from the writing of gradients.
    const float largest = block_max(running.largest);
    const float total = block_sum(running.sum * expf(running.largest - largest));
    if (threadIdx.x == 0) losses[row] = counts ? largest + logf(total) - chosen : 0.0f;
    if (gradient) {
        const float used = counts ? scale : 0.0f;
        for_pieces(vocab_size, aligned,
                   LogitGradient<T>{logits, target, largest, used / total, used});
    }
}

struct TileStatistics {
    float largest, sum, chosen;
};

/// Goes on with a row's tile of `columns` that begins with the vocabulary's `first`.
__device__ __forceinline__ void tile_statistics_row(const bfloat16* logits, int stride, int columns,
                                                    const u32* targets, int first, bool fresh,
                                                    TileStatistics* statistics) {
    const i64 row = blockIdx.x;
    const bool aligned = rows_aligned(logits, stride);
    logits = row_of(logits, row, stride);
    RunningSum running = {-3.0e38f, 0.0f};
    for_pieces(columns, aligned, SumExponentials<bfloat16>{logits, &running});
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
                       here ? to_f32(logits[target]) : before.chosen};
}

__device__ __forceinline__ float tile_loss(const TileStatistics& statistics, bool counts) {
    return counts ? statistics.largest + logf(statistics.sum) - statistics.chosen : 0.0f;
}

/// Logits of a tile become scale · their gradient.
__device__ __forceinline__ void tile_gradient_row(bfloat16* logits, int stride, int columns,
                                                  const u32* targets, int first, int vocab_size,
                                                  float scale, const TileStatistics* statistics) {
    const i64 row = blockIdx.x;
    const bool aligned = rows_aligned(logits, stride);
    const float used = targets[row] < static_cast<u32>(vocab_size) ? scale : 0.0f;
    const u32 target = targets[row] - static_cast<u32>(first);
    const TileStatistics all = statistics[row];
    for_pieces(columns, aligned,
               LogitGradient<bfloat16>{row_of(logits, row, stride), target, all.largest,
                                       used / all.sum, used});
}
