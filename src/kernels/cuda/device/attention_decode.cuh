// Attention of new tokens to a cache of keys and values: one block a (new token, head).
//
// Each warp takes 32 keys at a time, with a running maximum and sum (arXiv 1805.02867): a lane makes the
// score of a key of its own, and the sums of head_dim / 32 columns, rounded up, over the values of all 32.
// The warps' results are merged in a fixed order. For generation, a token at a time; where there are more,
// the flash kernels read every key once for many of them.
#pragma once
#include "attention_rows.cuh"

constexpr int DECODE_WARPS = 8;
/// Columns of a head that a lane holds at most: head_dim up to 256.
constexpr int DECODE_COLUMNS = 8;
constexpr int DECODE_HEAD = 32 * DECODE_COLUMNS;

/// What one (token, head) reads.
struct DecodeInputs {
    const bfloat16* q;      // [head_dim]
    const bfloat16* keys;   // row 0 of the head's keys
    const bfloat16* values;
    int stride;  // between cached rows
    int head_dim;
    int begin, end;  // cached rows that the token sees
};

/// A warp's share: running maximum, the lane's part of the sum, and the unnormalised output.
struct DecodePart {
    float largest, sum;
    float o[DECODE_COLUMNS];
};

/// q·k of one key; q in shared memory.
__device__ __forceinline__ float decode_product(const float* q, const bfloat16* k, int head_dim) {
    float product = 0.0f;
    if (head_dim % 8 == 0 && rows_aligned(k, 0)) {
        for (int c = 0; c < head_dim; c += 8) {
            const Piece<8> own = load_piece<8>(k + c), other = load_piece<8>(q + c);
#pragma unroll
            for (int i = 0; i < 8; i++) product += other.v[i] * own.v[i];
        }
    } else {
        for (int c = 0; c < head_dim; c++) product += q[c] * to_f32(k[c]);
    }
    return product;
}

__device__ __forceinline__ DecodePart decode_share(const ScoreMap& map, const DecodeInputs& in,
                                                   const float* q) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    DecodePart part = {-3.0e38f, 0.0f, {}};
    for (int first = in.begin + 32 * warp; first < in.end; first += 32 * DECODE_WARPS) {
        const int last = in.end - 1, own = first + lane;
        float s = -infinity();
        if (own <= last) s = map.score(decode_product(q, row_of(in.keys, own, in.stride), in.head_dim));
        const float largest = fmaxf(part.largest, warp_max(s));
        const float shrink = expf(part.largest - largest), p = expf(s - largest);
        part.largest = largest;
        part.sum = part.sum * shrink + p;
#pragma unroll
        for (int i = 0; i < DECODE_COLUMNS; i++) part.o[i] *= shrink;
#pragma unroll 4
        for (int row = 0; row < 32; row++) {
            const float weight = __shfl_sync(ALL_LANES, p, row);  // 0 behind the last key
            const int at = first + row < last ? first + row : last;
            const bfloat16* v = row_of(in.values, at, in.stride);
#pragma unroll
            for (int i = 0; i < DECODE_COLUMNS; i++) {
                const int column = 32 * i + lane;
                if (column < in.head_dim) part.o[i] += weight * to_f32(v[column]);
            }
        }
    }
    part.sum = warp_sum(part.sum);
    return part;
}

/// Merges the warps' shares into `o` `[head_dim]`.
__device__ __forceinline__ void decode_attention(const ScoreMap& map, const DecodeInputs& in,
                                                 bfloat16* o) {
    NIBBLE_SHARED(float, q, DECODE_HEAD);
    NIBBLE_SHARED(float, largest, DECODE_WARPS);
    NIBBLE_SHARED(float, sums, DECODE_WARPS);
    NIBBLE_SHARED(float, outputs, DECODE_WARPS * DECODE_HEAD);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int column = threadIdx.x; column < in.head_dim; column += blockDim.x) {
        q[column] = to_f32(in.q[column]);
    }
    __syncthreads();
    const DecodePart part = decode_share(map, in, q);
    if (lane == 0) {
        largest[warp] = part.largest;
        sums[warp] = part.sum;
    }
#pragma unroll
    for (int i = 0; i < DECODE_COLUMNS; i++) {
        outputs[warp * DECODE_HEAD + 32 * i + lane] = part.o[i];
    }
    __syncthreads();
    float top = largest[0];
    for (int w = 1; w < DECODE_WARPS; w++) top = fmaxf(top, largest[w]);
    float sum = 0.0f;
    for (int w = 0; w < DECODE_WARPS; w++) sum += sums[w] * expf(largest[w] - top);
    for (int column = threadIdx.x; column < in.head_dim; column += blockDim.x) {
        float total = 0.0f;
        for (int w = 0; w < DECODE_WARPS; w++) {
            total += outputs[w * DECODE_HEAD + column] * expf(largest[w] - top);
        }
        o[column] = to_bf16(total / sum);
    }
}
