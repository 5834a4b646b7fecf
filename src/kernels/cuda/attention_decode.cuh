// Attention of new tokens to a cache of keys and values: one block a (new token, head).
//
// Each of four warps walks its share of the keys with a running maximum and sum (arXiv 1805.02867);
// lanes hold head_dim / 32 columns each, rounded up. The four partial results are merged in a fixed
// order. For generation; prompts of more than a few tokens go through the training kernels.
#pragma once
#include "attention_rows.cuh"

constexpr int DECODE_WARPS = 4;
/// Columns of a head that a lane holds at most: head_dim up to 256.
constexpr int DECODE_COLUMNS = 8;

/// What one (token, head) reads.
struct DecodeInputs {
    const bfloat16* q;      // [head_dim]
    const bfloat16* keys;   // row 0 of the head's keys
    const bfloat16* values;
    int stride;  // between cached rows
    int head_dim;
    int begin, end;  // cached rows that the token sees
};

/// A warp's share: running maximum, sum and unnormalised output.
struct DecodePart {
    float largest, sum;
    float o[DECODE_COLUMNS];
};

__device__ __forceinline__ DecodePart decode_share(const ScoreMap& map, const DecodeInputs& in) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    DecodePart part = {-3.0e38f, 0.0f, {}};
    float q[DECODE_COLUMNS];
#pragma unroll
    for (int i = 0; i < DECODE_COLUMNS; i++) {
        const int column = 32 * i + lane;
        q[i] = column < in.head_dim ? to_f32(in.q[column]) : 0.0f;
    }
    for (int row = in.begin + warp; row < in.end; row += DECODE_WARPS) {
        const bfloat16* k = row_of(in.keys, row, in.stride);
        const bfloat16* v = row_of(in.values, row, in.stride);
        float product = 0.0f;
#pragma unroll
        for (int i = 0; i < DECODE_COLUMNS; i++) {
            const int column = 32 * i + lane;
            if (column < in.head_dim) product += q[i] * to_f32(k[column]);
        }
        const float s = map.score(warp_sum(product));
        const float largest = fmaxf(part.largest, s);
        const float shrink = expf(part.largest - largest), p = expf(s - largest);
        part.largest = largest;
        part.sum = part.sum * shrink + p;
#pragma unroll
        for (int i = 0; i < DECODE_COLUMNS; i++) {
            const int column = 32 * i + lane;
            if (column < in.head_dim) part.o[i] = part.o[i] * shrink + p * to_f32(v[column]);
        }
    }
    return part;
}

/// Merges the warps' shares into `o` `[head_dim]`.
__device__ __forceinline__ void decode_attention(const ScoreMap& map, const DecodeInputs& in,
                                                 bfloat16* o) {
    NIBBLE_SHARED(float, largest, DECODE_WARPS);
    NIBBLE_SHARED(float, sums, DECODE_WARPS);
    NIBBLE_SHARED(float, outputs, DECODE_WARPS * DECODE_COLUMNS * 32);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const DecodePart part = decode_share(map, in);
    if (lane == 0) {
        largest[warp] = part.largest;
        sums[warp] = part.sum;
    }
#pragma unroll
    for (int i = 0; i < DECODE_COLUMNS; i++) {
        outputs[(warp * DECODE_COLUMNS + i) * 32 + lane] = part.o[i];
    }
    __syncthreads();
    float top = largest[0];
    for (int w = 1; w < DECODE_WARPS; w++) top = fmaxf(top, largest[w]);
    float sum = 0.0f;
    for (int w = 0; w < DECODE_WARPS; w++) sum += sums[w] * expf(largest[w] - top);
    for (int column = threadIdx.x; column < in.head_dim; column += blockDim.x) {
        float total = 0.0f;
        for (int w = 0; w < DECODE_WARPS; w++) {
            total += outputs[w * DECODE_COLUMNS * 32 + column] * expf(largest[w] - top);
        }
        o[column] = to_bf16(total / sum);
    }
}
