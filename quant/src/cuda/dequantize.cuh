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
/// Weights that a store instruction of a warp writes.
constexpr int DEQUANTIZE_STORE = 256;
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

/// What a word of eight codes stands for, before the scale.
__device__ __forceinline__ Piece<8> decode_eight(const float* values, u32 codes) {
    Piece<8> piece;
    // Four times a code, the distance of its value in bytes: of high nibbles, and of low ones.
    const u32 high = codes >> 2 & 0x3c3c3c3cu, low = codes << 2 & 0x3c3c3c3cu;
    const u8* table = reinterpret_cast<const u8*>(values);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        // Byte i / 2, high nibble first.
        const u32 at = __byte_perm(i % 2 == 0 ? high : low, 0, 0x4440 + i / 2);
        piece.v[i] = *reinterpret_cast<const float*>(table + at);
    }
    return piece;
}

/// Scales of the blocks that a warp's run of at most 1024 weights touches, the lane-th one in each lane: blocks
/// hold at least 32 weights, and a run begins on a multiple of 32. With `Full`, lanes without a block of their own
/// read the last one's scale again: where none branches, scales and codes are on their way at once.
template <bool Full>
struct RunScales {
    int skipped, block_shift;
    float own;

    __device__ __forceinline__ RunScales(const PackedWeight& weight, i64 begin, int length)
        : block_shift(weight.block_shift) {
        const int lane = threadIdx.x % 32;
        skipped = static_cast<int>(begin) & ((1 << block_shift) - 1);
        const i64 first = begin >> block_shift;
        const int last = (skipped + length - 1) >> block_shift;
        if constexpr (Full) {
            own = weight.scale(first + (lane < last ? lane : last));
        } else {
            own = lane <= last ? weight.scale(first + lane) : 0.0f;
        }
    }
    /// Of the weight so many behind the first one; all lanes ask.
    __device__ __forceinline__ float of(int within) const {
        return __shfl_sync(ALL_LANES, own, (skipped + within) >> block_shift);
    }
};

/// Elements `begin .. end` of a weight, in rows of `columns`, and where they go: rows `stride` apart.
struct WidenedRows {
    i64 begin, end;
    int columns;
    bfloat16* out;
    int stride;
};

/// The warp's run from element `begin` on, a multiple of 32, up to the end of the rows, whose width is a
/// multiple of 8. If `Whole`, all its elements exist, and rows are no shorter than DEQUANTIZE_STORE.
template <bool Whole>
__device__ __forceinline__ void dequantize_run(const PackedWeight& weight, const float* values,
                                               u32* staged, i64 begin, const WidenedRows& rows) {
    const int lane = threadIdx.x % 32;
    const i64 left = rows.end - begin;
    const int length = Whole || left > DEQUANTIZE_RUN ? DEQUANTIZE_RUN : static_cast<int>(left);
    const RunScales<Whole> scales(weight, begin, length);
    // The length is a multiple of 8, so codes end on a word; the last words may not fill 16 bytes.
    const u8* codes = weight.codes + (begin >> 1) + 16 * lane;
    if (Whole || 32 * lane + 32 <= length) {
        reinterpret_cast<Words4*>(staged)[lane] = *reinterpret_cast<const Words4*>(codes);
    } else {
        for (int word = 0; 32 * lane + 8 * word + 8 <= length && word < 4; word++) {
            staged[4 * lane + word] = reinterpret_cast<const u32*>(codes)[word];
        }
    }
    __syncwarp();
    // One long division for 1024 weights; from there on a lane steps over the ends of rows.
    const i64 row = (begin - rows.begin) / rows.columns;
    const u32 columns = rows.columns;
    u32 column = static_cast<u32>(begin - rows.begin - row * rows.columns) + 8 * lane;
    bfloat16* to = row_of(rows.out, row, rows.stride) + column;
    const int gap = rows.stride - rows.columns;
#pragma unroll
    for (int part = 0; part < DEQUANTIZE_RUN / DEQUANTIZE_STORE; part++) {
        const int within = DEQUANTIZE_STORE * part + 8 * lane;
        const float scale = scales.of(within);
        if (column >= columns) {
            const u32 ends = Whole ? 1 : column / columns;
            column -= ends * columns;
            to += static_cast<i64>(ends) * gap;
        }
        if (Whole || within < length) {
            Piece<8> piece = decode_eight(values, staged[32 * part + lane]);
#pragma unroll
            for (int i = 0; i < 8; i++) piece.v[i] *= scale;
            store_piece(to, piece);
        }
        column += DEQUANTIZE_STORE;
        to += DEQUANTIZE_STORE;
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
        constexpr int TURN = DEQUANTIZE_WARPS * DEQUANTIZE_RUN;
        const WidenedRows widened = {begin, end, columns, out, stride};
        const i64 warp = threadIdx.x / 32, step = static_cast<i64>(gridDim.x) * TURN;
        u32* own = staged + warp * (DEQUANTIZE_RUN / 8);
        i64 turn = begin + static_cast<i64>(blockIdx.x) * TURN;
        // A loop of its own, whose condition is the block's, not the warp's: shuffles need no check that
        // all lanes are there.
        if (columns >= DEQUANTIZE_STORE) {
            for (; turn + TURN <= end; turn += step) {
                dequantize_run<true>(weight, values, own, turn + warp * DEQUANTIZE_RUN, widened);
            }
        }
        for (; turn < end; turn += step) {
            const i64 run = turn + warp * DEQUANTIZE_RUN;
            if (run < end) dequantize_run<false>(weight, values, own, run, widened);
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
