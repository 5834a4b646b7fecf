// Flash attention, backward, in two passes without atomics: the sums have one order.
//
// With p = e^{s − lse}, δ = Σ do ∘ o and dsᵢⱼ = pᵢⱼ(doᵢ·vⱼ − δᵢ)·cap'ᵢⱼ:
// dvⱼ = Σᵢ pᵢⱼ doᵢ, dkⱼ = scale · Σᵢ dsᵢⱼ qᵢ, dqᵢ = scale · Σⱼ dsᵢⱼ kⱼ.
// The first pass owns keys and walks the queries that see them, for all heads of a group; it works on
// transposed scores, so that a product is the left operand of the next without leaving registers.
// The second pass owns queries and walks keys. Both recompute p from the log-sum-exp.
#pragma once
#include "flash_tile.cuh"

/// What the backward passes read besides.
struct FlashGradients {
    const bfloat16* d_o;
    int d_o_stride;
    const float* lse;    // [tokens, heads]
    const float* delta;  // [tokens, heads]
};

/// Shapes of the first pass.
template <int D>
struct FlashKeyPass {
    static constexpr int KEYS = 64;                      // of a block, 16 a warp
    static constexpr int PARTS = D > 128 ? 2 : 1;        // warps that share the columns of 16 keys
    static constexpr int COLUMNS = D / PARTS;            // that a warp sums
    static constexpr int QUERIES = D > 128 ? 16 : 32;    // of a tile
    static constexpr int STAGES = D > 128 ? 1 : 2;       // tiles in flight
    static constexpr int TILE = QUERIES * TILE_STRIDE<D>;
};

/// log-sum-exp (in units of log 2) and δ of a tile of queries; a row that does not exist has
/// probability 0.
template <int Queries>
__device__ __forceinline__ void load_row_statistics(float* to, const FlashGradients& gradients,
                                                    const FlashDocument& document, int heads,
                                                    int head, int first) {
    for (int i = threadIdx.x; i < Queries; i += blockDim.x) {
        const bool exists = first + i < document.queries;
        const i64 at = (document.q_begin + first + i) * heads + head;
        to[i] = exists ? gradients.lse[at] * LOG2_E : infinity();
        to[Queries + i] = exists ? gradients.delta[at] : 0.0f;
    }
}

/// One tile of queries against the warp's 16 keys: adds to dk and dv.
template <int D>
__device__ __forceinline__ void flash_key_step(
    float (&dk)[FlashKeyPass<D>::COLUMNS / 8][4], float (&dv)[FlashKeyPass<D>::COLUMNS / 8][4],
    const bfloat16* k_tile, const bfloat16* v_tile, const bfloat16* q_tile,
    const bfloat16* d_o_tile, const float* statistics, const FlashScores& map,
    const FlashMask& mask, bool whole, int first_key, int warp_row, int first_column) {
    typedef FlashKeyPass<D> Shape;
    constexpr int QUERIES = Shape::QUERIES;
    float p[QUERIES / 8][4], ds[QUERIES / 8][4];
    multiply_tiles<QUERIES, D>(p, k_tile, warp_row, q_tile);
    multiply_tiles<QUERIES, D>(ds, v_tile, warp_row, d_o_tile);
#pragma unroll
    for (int n = 0; n < QUERIES / 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int query = 8 * n + fragment_column(e);
            const int key = first_key + warp_row + fragment_row(e);
            const float s = map.score(p[n][e]);
            const bool seen = whole || mask.sees(query, key);
            p[n][e] = seen ? fast_exp2(s - statistics[query]) : 0.0f;
            ds[n][e] = p[n][e] * (ds[n][e] - statistics[QUERIES + query]) * map.slope(s);
        }
    }
    multiply_probabilities<QUERIES, Shape::COLUMNS, D>(dv, p, d_o_tile, first_column);
    multiply_probabilities<QUERIES, Shape::COLUMNS, D>(dk, ds, q_tile, first_column);
}

/// First pass: dk and dv of 64 keys of one key head.
template <int D>
__device__ __forceinline__ void flash_backward_keys(const FlashInputs& in,
                                                    const FlashGradients& gradients, bfloat16* dk,
                                                    bfloat16* dv, int d_kv_stride) {
    typedef FlashKeyPass<D> Shape;
    constexpr int KEYS = Shape::KEYS, QUERIES = Shape::QUERIES, STAGES = Shape::STAGES;
    const FlashBlock block(in, in.kv_heads);
    const FlashDocument document(in, block.document);
    // Tiles count from the last: as many queries see the first keys as the last queries see keys.
    const int first_key = ((document.keys - 1) / KEYS - block.tile) * KEYS, kv_head = block.head;
    NIBBLE_DYNAMIC_SHARED(bfloat16, shared);
    bfloat16* k_tile = shared;
    bfloat16* v_tile = k_tile + KEYS * TILE_STRIDE<D>;
    bfloat16* q_tiles = v_tile + KEYS * TILE_STRIDE<D>;
    bfloat16* d_o_tiles = q_tiles + STAGES * Shape::TILE;
    float* statistics = reinterpret_cast<float*>(d_o_tiles + STAGES * Shape::TILE);
    const int group = in.heads / in.kv_heads;
    const int warp = threadIdx.x / 32, warp_row = warp % (KEYS / 16) * 16;
    const int first_column = warp / (KEYS / 16) * Shape::COLUMNS;
    const FlashScores map(in.scale, in.soft_cap);
    // Queries that see any of the keys.
    const int from = first_key - document.offset;
    const int begin = (from > 0 ? from : 0) / QUERIES * QUERIES;
    const int beyond = first_key + KEYS - 1 + in.window - document.offset;
    const int end = in.window > 0 && beyond < document.queries ? beyond : document.queries;
    const int tiles = end > begin ? (end - begin + QUERIES - 1) / QUERIES : 0;
    const int steps = group * tiles;
    const bfloat16* q = row_of(in.q, document.q_begin, in.q_stride);
    const bfloat16* d_o = row_of(gradients.d_o, document.q_begin, gradients.d_o_stride);

    const auto load_step = [&](int step) {
        if (step < steps) {
            const int stage = step % STAGES, head = kv_head * group + step / tiles;
            const int first = begin + step % tiles * QUERIES;
            load_tile<QUERIES, D>(q_tiles + stage * Shape::TILE, q + head * D, in.q_stride, first,
                                  document.queries);
            load_tile<QUERIES, D>(d_o_tiles + stage * Shape::TILE, d_o + head * D,
                                  gradients.d_o_stride, first, document.queries);
            load_row_statistics<QUERIES>(statistics + stage * 2 * QUERIES, gradients, document,
                                         in.heads, head, first);
        }
        copy_async_commit();
    };

    const i64 kv_row = document.k_begin;
    load_tile<KEYS, D>(k_tile, row_of(in.k, kv_row, in.kv_stride) + kv_head * D, in.kv_stride,
                       first_key, document.keys);
    load_tile<KEYS, D>(v_tile, row_of(in.v, kv_row, in.kv_stride) + kv_head * D, in.kv_stride,
                       first_key, document.keys);
    load_step(0);
    float dk_sum[Shape::COLUMNS / 8][4] = {}, dv_sum[Shape::COLUMNS / 8][4] = {};
    for (int step = 0; step < steps; step++) {
        if (STAGES == 2) load_step(step + 1);
        copy_async_wait<STAGES - 1>();
        __syncthreads();  // the step's queries are there
        const int stage = step % STAGES, first = begin + step % tiles * QUERIES;
        const FlashMask mask = {first + document.offset, in.window};
        flash_key_step<D>(dk_sum, dv_sum, k_tile, v_tile, q_tiles + stage * Shape::TILE,
                          d_o_tiles + stage * Shape::TILE, statistics + stage * 2 * QUERIES, map,
                          mask, mask.sees_all(QUERIES, first_key, KEYS), first_key, warp_row,
                          first_column);
        __syncthreads();  // all have read them
        if (STAGES == 1) load_step(step + 1);
    }
    copy_async_wait<0>();
    bfloat16* dk_out = row_of(dk, kv_row, d_kv_stride) + kv_head * D + first_column;
    bfloat16* dv_out = row_of(dv, kv_row, d_kv_stride) + kv_head * D + first_column;
    store_product<Shape::COLUMNS>(dk_out, d_kv_stride, first_key + warp_row, document.keys, dk_sum,
                                  in.scale, in.scale);
    store_product<Shape::COLUMNS>(dv_out, d_kv_stride, first_key + warp_row, document.keys, dv_sum,
                                  1.0f, 1.0f);
}

/// Shapes of the second pass.
template <int D>
struct FlashQueryPass {
    static constexpr int QUERIES = 64;                   // of a block, 16 a warp
    static constexpr int KEYS = D > 128 ? 16 : 32;       // of a tile
    static constexpr int STAGES = D > 128 ? 1 : 2;
    static constexpr int TILE = KEYS * TILE_STRIDE<D>;
};

/// Second pass: dq of 64 queries of one head.
template <int D>
__device__ __forceinline__ void flash_backward_queries(const FlashInputs& in,
                                                       const FlashGradients& gradients,
                                                       bfloat16* dq, int dq_stride) {
    typedef FlashQueryPass<D> Shape;
    constexpr int KEYS = Shape::KEYS, QUERIES = Shape::QUERIES, STAGES = Shape::STAGES;
    const FlashBlock block(in, in.heads);
    const FlashDocument document(in, block.document);
    const int first = block.tile * QUERIES, head = block.head;
    NIBBLE_DYNAMIC_SHARED(bfloat16, shared);
    bfloat16* q_tile = shared;
    bfloat16* d_o_tile = q_tile + QUERIES * TILE_STRIDE<D>;
    bfloat16* k_tiles = d_o_tile + QUERIES * TILE_STRIDE<D>;
    bfloat16* v_tiles = k_tiles + STAGES * Shape::TILE;
    const int kv_head = head / (in.heads / in.kv_heads), warp_row = threadIdx.x / 32 * 16;
    const bfloat16* k = row_of(in.k, document.k_begin, in.kv_stride) + kv_head * D;
    const bfloat16* v = row_of(in.v, document.k_begin, in.kv_stride) + kv_head * D;
    const FlashMask mask = {first + document.offset, in.window};
    const FlashScores map(in.scale, in.soft_cap);
    const int begin = mask.begin(), end = mask.end(QUERIES, document.keys);

    const auto load_keys = [&](int key) {
        if (key < end) {
            const int stage = (key - begin) / KEYS % STAGES;
            load_tile<KEYS, D>(k_tiles + stage * Shape::TILE, k, in.kv_stride, key, document.keys);
            load_tile<KEYS, D>(v_tiles + stage * Shape::TILE, v, in.kv_stride, key, document.keys);
        }
        copy_async_commit();
    };

    load_tile<QUERIES, D>(q_tile, row_of(in.q, document.q_begin, in.q_stride) + head * D,
                          in.q_stride, first, document.queries);
    load_tile<QUERIES, D>(d_o_tile,
                          row_of(gradients.d_o, document.q_begin, gradients.d_o_stride) + head * D,
                          gradients.d_o_stride, first, document.queries);
    load_keys(begin);
    float lse[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first + warp_row + fragment_row(2 * half);
        const i64 at = (document.q_begin + row) * in.heads + head;
        lse[half] = row < document.queries ? gradients.lse[at] * LOG2_E : infinity();
        delta[half] = row < document.queries ? gradients.delta[at] : 0.0f;
    }
    float sum[D / 8][4] = {};
    for (int key = begin; key < end; key += KEYS) {
        if (STAGES == 2) load_keys(key + KEYS);
        copy_async_wait<STAGES - 1>();
        __syncthreads();  // the tile's keys are there
        const int stage = (key - begin) / KEYS % STAGES;
        const bool whole = mask.sees_all(QUERIES, key, KEYS);
        float p[KEYS / 8][4], ds[KEYS / 8][4];
        multiply_tiles<KEYS, D>(p, q_tile, warp_row, k_tiles + stage * Shape::TILE);
        multiply_tiles<KEYS, D>(ds, d_o_tile, warp_row, v_tiles + stage * Shape::TILE);
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float s = map.score(p[n][e]);
                const int row = warp_row + fragment_row(e);
                const bool seen = whole || mask.sees(row, key + 8 * n + fragment_column(e));
                const float probability = seen ? fast_exp2(s - lse[e / 2]) : 0.0f;
                ds[n][e] = probability * (ds[n][e] - delta[e / 2]) * map.slope(s);
            }
        }
        multiply_probabilities<KEYS, D, D>(sum, ds, k_tiles + stage * Shape::TILE, 0);
        __syncthreads();  // all have read them
        if (STAGES == 1) load_keys(key + KEYS);
    }
    copy_async_wait<0>();
    store_product<D>(row_of(dq, document.q_begin, dq_stride) + head * D, dq_stride,
                     first + warp_row, document.queries, sum, in.scale, in.scale);
}
