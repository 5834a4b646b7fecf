// RMS and layer norm, one block a row, f32 inside.
//
// y = w ∘ (x − μ)·ρ + b, ρ = 1/sqrt(mean((x − μ)²) + ε); RMS has μ = 0.
// dx += ρ·(g − [layer] mean(g) − x̂·mean(g ∘ x̂)), with g = w ∘ dy, x̂ = (x − μ)·ρ.
// Sources: arXiv 1910.07467 and 1607.06450. Twin of src/kernels/cpu/norm.rs.
#pragma once
#include "reduce.cuh"
#include "vector.cuh"

/// Σ x, or Σ (x − mean)².
struct RowMoment {
    const bfloat16* x;
    float mean;
    bool squared;
    float* sum;

    template <int N>
    __device__ __forceinline__ void run(int column) const {
        const Piece<N> piece = load_piece<N>(x + column);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float centred = piece.v[i] - mean;
            *sum += squared ? centred * centred : piece.v[i];
        }
    }
};

struct NormalizeRow {
    const bfloat16* x;
    const float* weight;
    const float* bias;  // may be null
    bfloat16* y;
    float mean, rstd;
    bool accumulate;

    template <int N>
    __device__ __forceinline__ void run(int column) const {
        Piece<N> piece = load_piece<N>(x + column);
        const Piece<N> w = load_piece<N>(weight + column);
        Piece<N> b = {};
        if (bias) b = load_piece<N>(bias + column);
#pragma unroll
        for (int i = 0; i < N; i++) piece.v[i] = (piece.v[i] - mean) * rstd * w.v[i] + b.v[i];
        if (accumulate) {
            const Piece<N> before = load_piece<N>(y + column);
#pragma unroll
            for (int i = 0; i < N; i++) piece.v[i] += before.v[i];
        }
        store_piece(y + column, piece);
    }
};

__device__ __forceinline__ void norm_forward_row(const bfloat16* x, int x_stride,
                                                 const float* weight, const float* bias,
                                                 float epsilon, bfloat16* y, int y_stride,
                                                 float* stats, int width, bool layer,
                                                 bool accumulate) {
    const i64 row = blockIdx.x;
    const bool aligned = rows_aligned(x, x_stride) && rows_aligned(y, y_stride) &&
                         rows_aligned(weight, 0) && rows_aligned(bias, 0);
    x = row_of(x, row, x_stride);
    float mean = 0.0f, sum = 0.0f;
    if (layer) {
        for_pieces(width, aligned, RowMoment{x, 0.0f, false, &sum});
        mean = block_sum(sum) / width;
        sum = 0.0f;
    }
    for_pieces(width, aligned, RowMoment{x, mean, true, &sum});
    const float rstd = 1.0f / sqrtf(block_sum(sum) / width + epsilon);
    if (threadIdx.x == 0) {
        stats[2 * row] = mean;
        stats[2 * row + 1] = rstd;
    }
    for_pieces(width, aligned,
               NormalizeRow{x, weight, bias, row_of(y, row, y_stride), mean, rstd, accumulate});
}

/// Σ g and Σ g ∘ (x − μ).
struct NormProjections {
    const bfloat16* dy;
    const bfloat16* x;
    const float* weight;
    float mean;
    float* level;
    float* along;

    template <int N>
    __device__ __forceinline__ void run(int column) const {
        const Piece<N> d = load_piece<N>(dy + column), input = load_piece<N>(x + column);
        const Piece<N> w = load_piece<N>(weight + column);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float g = d.v[i] * w.v[i];
            *level += g;
            *along += g * (input.v[i] - mean);
        }
    }
};

struct NormInputGradient {
    const bfloat16* dy;
    const bfloat16* x;
    const float* weight;
    bfloat16* dx;
    float mean, rstd, level, along;

    template <int N>
    __device__ __forceinline__ void run(int column) const {
        const Piece<N> d = load_piece<N>(dy + column), input = load_piece<N>(x + column);
        const Piece<N> w = load_piece<N>(weight + column);
        Piece<N> gradient = load_piece<N>(dx + column);
#pragma unroll
        for (int i = 0; i < N; i++) {
            gradient.v[i] += rstd * (d.v[i] * w.v[i] - level - (input.v[i] - mean) * along);
        }
        store_piece(dx + column, gradient);
    }
};

__device__ __forceinline__ void norm_backward_row(const bfloat16* dy, int dy_stride,
                                                  const bfloat16* x, int x_stride,
                                                  const float* weight, const float* stats,
                                                  bfloat16* dx, int dx_stride, int width,
                                                  bool layer) {
    const i64 row = blockIdx.x;
    const bool aligned = rows_aligned(dy, dy_stride) && rows_aligned(x, x_stride) &&
                         rows_aligned(dx, dx_stride) && rows_aligned(weight, 0);
    dy = row_of(dy, row, dy_stride);
    x = row_of(x, row, x_stride);
    const float mean = stats[2 * row], rstd = stats[2 * row + 1];
    float level = 0.0f, along = 0.0f;
    for_pieces(width, aligned, NormProjections{dy, x, weight, mean, &level, &along});
    level = layer ? block_sum(level) / width : 0.0f;
    along = block_sum(along) * rstd * rstd / width;
    for_pieces(width, aligned, NormInputGradient{dy, x, weight, row_of(dx, row, dx_stride), mean,
                                                 rstd, level, along});
}
