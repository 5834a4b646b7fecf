// One row times a matrix: y = x·Wᵀ, 4-bit weights multiplied where they are decoded.
//
//   y[n] = Σ_block absmax · Σ value[code]·x + bias[n] + s·Σ_r ax[r]·B[n, r]
//
// in f32, weights not rounded to bf16. For text that is generated, whose products read every weight for
// one token: 0.5 bytes a weight, where widening it first moves 4.5. Twin of quant/src/product/row.rs.
//
// A warp takes a row of W, 1024 weights at a time: each load of the warp is 128 consecutive bytes of
// codes, a lane's own word of eight beside eight of x.
#pragma once
#include "dequantize.cuh"
#include "reduce.cuh"

constexpr int ROW_WARPS = 8;
/// Columns that a warp takes at a time, and with one load.
constexpr int ROW_RUN = 1024, ROW_LOAD = 256;

/// The lane's share of W[row, :] · x; rows are whole blocks of 32, codes lie on words, x on 16 bytes.
__device__ __forceinline__ float row_share(const PackedWeight& weight, const float* values, i64 row,
                                           int columns, const bfloat16* x) {
    const int lane = threadIdx.x % 32;
    float sum = 0.0f;
    for (int first = 0; first < columns; first += ROW_RUN) {
        const int length = columns - first < ROW_RUN ? columns - first : ROW_RUN;
        const i64 begin = row * columns + first;
        u32 codes[ROW_RUN / ROW_LOAD];
#pragma unroll
        for (int part = 0; part < ROW_RUN / ROW_LOAD; part++) {
            const int within = ROW_LOAD * part + 8 * lane;
            const u8* from = weight.codes + ((begin + within) >> 1);
            codes[part] = within < length ? *reinterpret_cast<const u32*>(from) : 0;
        }
        const RunScales<false> scales(weight, begin, length);
#pragma unroll
        for (int part = 0; part < ROW_RUN / ROW_LOAD; part++) {
            const int within = ROW_LOAD * part + 8 * lane;
            const float scale = scales.of(within);
            if (within < length) {
                const Piece<8> w = decode_eight(values, codes[part]);
                const Piece<8> piece = load_piece<8>(x + first + within);
                float products = 0.0f;
#pragma unroll
                for (int i = 0; i < 8; i++) products += w.v[i] * piece.v[i];
                sum += scale * products;
            }
        }
    }
    return sum;
}

/// An adapter's part: ax `[rank]`, B in rows of `rank`.
struct RowAdapter {
    const bfloat16* ax;
    const bfloat16* b;
    int rank;
    float scale;

    /// The lane's share of it in y[row].
    __device__ __forceinline__ float share(i64 row) const {
        float sum = 0.0f;
        for (int r = threadIdx.x % 32; r < rank; r += 32) {
            sum += to_f32(row_of(b, row, rank)[r]) * to_f32(ax[r]);
        }
        return scale * sum;
    }
};

/// What is added to x·Wᵀ, and where it goes; `bias` may be null.
struct RowOutput {
    const float* bias;
    RowAdapter adapter;
    bfloat16* y;
    int accumulate;

    /// y[row] from the lanes' shares of x·Wᵀ.
    __device__ __forceinline__ void write(i64 row, float share) const {
        float sum = warp_sum(share + adapter.share(row));
        if (threadIdx.x % 32 != 0) return;
        if (bias) sum += bias[row];
        if (accumulate) sum += to_f32(y[row]);
        y[row] = to_bf16(sum);
    }
};

/// Row of the matrix that this warp multiplies.
__device__ __forceinline__ i64 row_of_warp() {
    return static_cast<i64>(blockIdx.x) * ROW_WARPS + threadIdx.x / 32;
}

/// y = x·Wᵀ and what is added, or y += that; W `[rows, columns]` in 4-bit blocks.
__device__ __forceinline__ void multiply_row(const PackedWeight& weight, i64 rows, int columns,
                                             const bfloat16* x, const RowOutput& output) {
    NIBBLE_SHARED(float, values, 16);
    if (threadIdx.x < 16) values[threadIdx.x] = weight.values[threadIdx.x];
    __syncthreads();
    const i64 row = row_of_warp();
    if (row >= rows) return;
    float share = 0.0f;
    if (columns % 32 == 0 && rows_aligned(x, 0) && rows_aligned(weight.codes, 0)) {
        share = row_share(weight, values, row, columns, x);
    } else {
        for (int c = threadIdx.x % 32; c < columns; c += 32) {
            share += weight.at(row * columns + c) * to_f32(x[c]);
        }
    }
    output.write(row, share);
}

/// The same, W in bf16.
__device__ __forceinline__ void multiply_row(const bfloat16* weight, i64 rows, int columns,
                                             const bfloat16* x, const RowOutput& output) {
    const i64 row = row_of_warp();
    if (row >= rows) return;
    const bfloat16* own = row_of(weight, row, columns);
    float share = 0.0f;
    if (columns % 8 == 0 && rows_aligned(weight, columns) && rows_aligned(x, 0)) {
#pragma unroll 4
        for (int c = 8 * (threadIdx.x % 32); c < columns; c += 256) {
            const Piece<8> w = load_piece<8>(own + c), piece = load_piece<8>(x + c);
#pragma unroll
            for (int i = 0; i < 8; i++) share += w.v[i] * piece.v[i];
        }
    } else {
        for (int c = threadIdx.x % 32; c < columns; c += 32) share += to_f32(own[c]) * to_f32(x[c]);
    }
    output.write(row, share);
}
