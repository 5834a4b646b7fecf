// Flash attention, forward: o = softmax(cap(scale · q·kᵀ)) · v and the log-sum-exp.
//
// A block takes 64 queries of one head, 16 a warp, and walks the keys that they see in tiles. The
// running maximum m and sum l of a row rescale what was summed when m grows. While scores are
// computed the tile's values are copied in; while probabilities meet values, the next keys.
#pragma once
#include "flash_tile.cuh"

constexpr int FLASH_QUERIES = 64;
constexpr int FLASH_THREADS = 2 * FLASH_QUERIES;

/// Rows of keys in a tile: what the registers of D columns of output leave room for.
template <int D>
constexpr int FLASH_FORWARD_KEYS = D > 128 ? 32 : 64;

/// The two rows of a lane: the largest scores, before `units`, and its share of the sums.
struct FlashRows {
    float largest[2], sum[2];
};

/// Scores to probabilities, in place; returns what the rows' earlier sums are multiplied by. `units`,
/// which is positive, makes a score an exponent of 2: one multiplication and addition an element.
template <int N>
__device__ __forceinline__ void flash_softmax(float (&s)[N / 8][4], float units, FlashRows& rows,
                                              float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float largest = rows.largest[half];
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
            largest = fmaxf(largest, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        }
        // The four lanes of a row.
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
        // A row that has seen no key yet: exponents of -inf, not NaN.
        const float base = largest == -infinity() ? 0.0f : __fmul_rn(largest, units);
        // Rounded as the base was, so that it is 1 if the largest is still the same.
        shrink[half] = fast_exp2(__fmul_rn(rows.largest[half], units) - base);
        rows.largest[half] = largest;
        float sum = rows.sum[half] * shrink[half];
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
            s[n][2 * half] = fast_exp2(fmaf(s[n][2 * half], units, -base));
            s[n][2 * half + 1] = fast_exp2(fmaf(s[n][2 * half + 1], units, -base));
            sum += s[n][2 * half] + s[n][2 * half + 1];
        }
        rows.sum[half] = sum;
    }
}

/// Products to scores before `units`; -inf where a query does not see a key. `row` is the warp's first.
template <int N>
__device__ __forceinline__ void flash_scores(float (&s)[N / 8][4], const FlashScores& map,
                                             const FlashMask& mask, bool whole, int row,
                                             int first_key) {
    if (map.is_capped()) {
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) s[n][e] = map.capped(s[n][e]);
        }
    }
    if (!whole) {
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int key = first_key + 8 * n + fragment_column(e);
                if (!mask.sees(row + fragment_row(e), key)) s[n][e] = -infinity();
            }
        }
    }
}

template <int D>
__device__ __forceinline__ void flash_forward(const FlashInputs& in, bfloat16* o, int o_stride,
                                              float* lse) {
    constexpr int KEYS = FLASH_FORWARD_KEYS<D>;
    // Queries stay in registers where there is room; their tile is then that of the values.
    constexpr bool RESIDENT = D <= 128;
    const FlashBlock block(in, in.heads);
    const FlashDocument document(in, block.document);
    const int first = block.tile * FLASH_QUERIES, head = block.head;
    NIBBLE_DYNAMIC_SHARED(bfloat16, shared_memory);
    const SharedAddress shared = shared_address(shared_memory);
    constexpr u32 K_TILE = 0, V_TILE = KEYS * TILE_ROW<D>;
    constexpr u32 Q_TILE = RESIDENT ? V_TILE : 2 * KEYS * TILE_ROW<D>;
    const int kv_head = head / (in.heads / in.kv_heads), warp_row = threadIdx.x / 32 * 16;
    const bfloat16* q = row_of(in.q, document.q_begin, in.q_stride) + head * D;
    const bfloat16* k = row_of(in.k, document.k_begin, in.kv_stride) + kv_head * D;
    const FlashMask mask = {first + document.offset, in.window};
    const FlashScores map(in.scale, in.soft_cap);
    const int begin = mask.begin(), end = mask.end(FLASH_QUERIES, document.keys);
    TileCopy<FLASH_THREADS, FLASH_QUERIES, D> queries(shared, q, in.q_stride, first);
    TileCopy<FLASH_THREADS, KEYS, D> keys(shared, k, in.kv_stride, begin);
    const i64 values = in.v - in.k;  // from keys to values
    const TileLane<D> lane(shared);
    const RightLane<D> right_lane(shared);

    queries.start(Q_TILE, document.queries - first);
    keys.start(K_TILE, document.keys - begin);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    u32 q_fragments[RESIDENT ? D / 16 : 1][4];
    if constexpr (RESIDENT) {
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            load_matrices(q_fragments[i], lane.block(Q_TILE + warp_row * TILE_ROW<D>, 0, 16 * i));
        }
        __syncthreads();
    }
    float output[D / 8][4] = {};
    FlashRows rows = {{-infinity(), -infinity()}, {0.0f, 0.0f}};
    for (int key = begin; key < end; key += KEYS) {
        keys.start(V_TILE, document.keys - key, values);
        keys.advance();
        copy_async_commit();
        float s[KEYS / 8][4];
        if constexpr (RESIDENT) {
            multiply_fragments<KEYS, D>(s, q_fragments, right_lane, K_TILE);
        } else {
            multiply_tiles<KEYS, D>(s, lane, Q_TILE + warp_row * TILE_ROW<D>, right_lane, K_TILE);
        }
        __syncthreads();  // all have read the keys
        if (key + KEYS < end) keys.start(K_TILE, document.keys - key - KEYS);
        copy_async_commit();
        flash_scores<KEYS>(s, map, mask, mask.sees_all(FLASH_QUERIES, key, KEYS), warp_row, key);
        float shrink[2];
        flash_softmax<KEYS>(s, map.units, rows, shrink);
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) output[n][e] *= shrink[e / 2];
        }
        copy_async_wait<1>();
        __syncthreads();  // the values are there
        multiply_probabilities<KEYS, D, D>(output, s, lane, V_TILE);
        copy_async_wait<0>();
        __syncthreads();  // the next keys are there, all have read the values
    }
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = rows.sum[half];
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        inverse[half] = 1.0f / sum;
        const int row = first + warp_row + fragment_row(2 * half);
        if (threadIdx.x % 4 == 0 && row < document.queries) {
            lse[(document.q_begin + row) * in.heads + head] =
                (__fmul_rn(rows.largest[half], map.units) + log2f(sum)) * LN_2;
        }
    }
    store_product<D>(row_of(o, document.q_begin, o_stride) + head * D, o_stride, first + warp_row,
                     document.queries, output, inverse[0], inverse[1]);
}
