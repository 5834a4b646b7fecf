// 4-bit blocks to bf16, double quantization included, in one pass.
//
// w[i] = bf16(value[code(i)] · absmax(i / block)), both factors f32, rounded to nearest even, as
// bitsandbytes' dequantize gives it. Two codes a byte, the earlier in the high nibble. Nested
// scales: absmax(b) = map[codes(b)]·nested(b / 256) + offset, rounded after the product.
// Twin of quant/src/dequantize.rs; tables: quant/src/codebook.rs.
//
// A warp takes 1024 consecutive weights: 512 bytes of codes by 16-byte loads, spread through shared
// memory so that each store instruction of the warp writes 512 consecutive bytes.
#pragma once
#include "vector.cuh"

constexpr int DEQUANTIZE_WARPS = 8;
constexpr int DEQUANTIZE_RUN = 1024;
/// Scales that share one nested absmax.
constexpr int NESTED_BLOCK_SHIFT = 8;

/// A packed weight; `absmax` is null if the scales are nested.
struct PackedWeight {
    const u8* codes;
    const float* values;  // [16]
    const float* absmax;
    const u8* absmax_codes;
    const float* nested_absmax;
    const float* map;  // [256]
    float offset;
    int block_shift;  // log2 of the block size

    __device__ __forceinline__ float scale(i64 block) const {
        if (absmax) return absmax[block];
        const float nested = nested_absmax[block >> NESTED_BLOCK_SHIFT];
        return __fadd_rn(__fmul_rn(map[absmax_codes[block]], nested), offset);
    }

    /// One weight, the slow way.
    __device__ __forceinline__ float at(i64 element) const {
        const u8 byte = codes[element >> 1];
        const int code = element & 1 ? byte & 15 : byte >> 4;
        return __fmul_rn(values[code], scale(element >> block_shift));  // never part of a sum
    }
};

/// Eight weights from a word of codes.
__device__ __forceinline__ Piece<8> decode_eight(const float* values, u32 codes, float scale) {
    Piece<8> piece;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        // Byte i / 2, high nibble first.
        const int shift = 8 * (i / 2) + (i % 2 == 0 ? 4 : 0);
        piece.v[i] = values[codes >> shift & 15] * scale;
    }
    return piece;
}

/// The warp's run from element `begin` on (a multiple of 32), up to `end`. Rows are `columns` wide,
/// a multiple of 8, and lie `stride` apart in `out`, which row `first_row` begins.
__device__ __forceinline__ void dequantize_run(const PackedWeight& weight, const float* values,
                                               u32* staged, i64 begin, i64 end, int columns,
                                               i64 first_row, bfloat16* out, int stride) {
    const int lane = threadIdx.x % 32;
    // Scale of the lane-th block that the run touches: blocks hold at least 32 weights.
    const i64 block = (begin >> weight.block_shift) + lane;
    const i64 last = (begin + DEQUANTIZE_RUN < end ? begin + DEQUANTIZE_RUN : end) - 1;
    const float own_scale = block <= last >> weight.block_shift ? weight.scale(block) : 0.0f;
    // end is a multiple of 8, so codes end on a word; the last words may not fill 16 bytes.
    const i64 bytes = (end >> 1) - (begin >> 1);
    const u8* codes = weight.codes + (begin >> 1) + 16 * lane;
    if (16 * lane + 16 <= bytes) {
        reinterpret_cast<Words4*>(staged)[lane] = *reinterpret_cast<const Words4*>(codes);
    } else {
        for (int word = 0; 16 * lane + 4 * word + 4 <= bytes && word < 4; word++) {
            staged[4 * lane + word] = reinterpret_cast<const u32*>(codes)[word];
        }
    }
    __syncwarp();
    // One long division for 1024 weights, short ones for the rest.
    const i64 first = begin / columns;
    const u32 first_column = static_cast<u32>(begin - first * columns);
#pragma unroll
    for (int part = 0; part < 4; part++) {
        const int within = 8 * (32 * part + lane);
        const i64 element = begin + within;
        const int source = static_cast<int>((element >> weight.block_shift) -
                                            (begin >> weight.block_shift));
        const float scale = __shfl_sync(ALL_LANES, own_scale, source);
        if (element < end) {
            const u32 column = first_column + within, rows = column / static_cast<u32>(columns);
            store_piece(row_of(out, first + rows - first_row, stride) + (column - rows * columns),
                        decode_eight(values, staged[32 * part + lane], scale));
        }
    }
    __syncwarp();
}

/// Rows `first_row .. first_row + rows` of a weight `[.., columns]` into `out` `[rows, stride]`.
__device__ __forceinline__ void dequantize_rows(const PackedWeight& weight, i64 first_row,
                                                i64 rows, int columns, bfloat16* out, int stride) {
    NIBBLE_SHARED(float, values, 16);
    NIBBLE_SHARED(u32, staged, DEQUANTIZE_WARPS* DEQUANTIZE_RUN / 8);
    if (threadIdx.x < 16) values[threadIdx.x] = weight.values[threadIdx.x];
    __syncthreads();
    const i64 begin = first_row * columns, end = begin + rows * columns;
    const bool vector = rows_aligned(out, stride) && rows_aligned(weight.codes, 0) &&
                        columns % 8 == 0 && begin % 32 == 0;
    if (vector) {
        const i64 warp = static_cast<i64>(blockIdx.x) * DEQUANTIZE_WARPS + threadIdx.x / 32;
        const i64 step = static_cast<i64>(gridDim.x) * DEQUANTIZE_WARPS * DEQUANTIZE_RUN;
        u32* own = staged + threadIdx.x / 32 * (DEQUANTIZE_RUN / 8);
        for (i64 run = begin + warp * DEQUANTIZE_RUN; run < end; run += step) {
            dequantize_run(weight, values, own, run, end, columns, first_row, out, stride);
        }
        return;
    }
    const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 i = begin + static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < end;
         i += step) {
        const i64 row = i / columns;
        row_of(out, row - first_row, stride)[i - row * columns] = to_bf16(weight.at(i));
    }
}
