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
    static constexpr int THREADS = KEYS / 16 * 32 * PARTS;
    // Where tiles begin: keys, values, and for each stage queries, gradients and statistics.
    static constexpr u32 K_TILE = 0, V_TILE = KEYS * TILE_ROW<D>, STAGE = 2 * V_TILE;
    static constexpr u32 TILE = QUERIES * TILE_ROW<D>, STAGE_BYTES = 2 * TILE + 8 * QUERIES;
};

/// From the products q·k and do·v to probabilities and the gradients of the scores, in place.
__device__ __forceinline__ void flash_gradients(float (&p)[4], float (&ds)[4],
                                                const float (&lse)[4], const float (&delta)[4],
                                                const FlashScores& map) {
    if (map.is_capped()) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float s = map.capped(p[e]);
            p[e] = fast_exp2(fmaf(-LOG2_E, lse[e], s));
            ds[e] = p[e] * (ds[e] - delta[e]) * map.slope(s);
        }
    } else {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            p[e] = fast_exp2(fmaf(p[e], map.units, -LOG2_E * lse[e]));
            ds[e] = p[e] * (ds[e] - delta[e]);
        }
    }
}

/// Copies the log-sum-exp and δ of tiles of queries to shared memory: a thread has one of the two of
/// one row of each tile. Of a row that does not exist both are 0, as its q and d_o are: its
/// probabilities are 1, but what they and the gradients of its scores are multiplied by is 0.
template <int Queries>
struct StatisticsCopy {
    const float* from;
    int heads, row;
    SharedAddress to;

    /// Of one head, tiles from row `first` on.
    __device__ __forceinline__ StatisticsCopy(SharedAddress shared, const FlashGradients& gradients,
                                              i64 q_begin, int heads, int head, int first)
        : heads(heads) {
        row = threadIdx.x % Queries;
        from = threadIdx.x < Queries ? gradients.lse : gradients.delta;
        from += (q_begin + first + row) * heads + head;
        to = shared + 4 * threadIdx.x;
    }
    /// Starts copying those of the next tile, which has `rows` rows.
    __device__ __forceinline__ void next(u32 place, int rows) {
        if (threadIdx.x < 2 * Queries) copy_async_4(to + place, from, row < rows);
        from += static_cast<i64>(Queries) * heads;
    }
};

/// One tile of queries, at `stage`, against the warp's 16 keys: adds to dk and dv.
template <int D>
__device__ __forceinline__ void flash_key_step(
    float (&dk)[FlashKeyPass<D>::COLUMNS / 8][4], float (&dv)[FlashKeyPass<D>::COLUMNS / 8][4],
    const TileLane<D>& key_lane, const TileLane<D>& lane, const RightLane<D>& right_lane, u32 stage,
    const float* statistics, const FlashScores& map, const FlashMask& mask, bool whole, int first_key,
    int warp_row, int first_column) {
    typedef FlashKeyPass<D> Shape;
    constexpr int QUERIES = Shape::QUERIES;
    const u32 q_tile = stage, d_o_tile = stage + Shape::TILE;
    float p[QUERIES / 8][4], ds[QUERIES / 8][4];
    multiply_tiles<QUERIES, D>(p, key_lane, Shape::K_TILE, right_lane, q_tile);
    multiply_tiles<QUERIES, D>(ds, key_lane, Shape::V_TILE, right_lane, d_o_tile);
#pragma unroll
    for (int n = 0; n < QUERIES / 8; n++) {
        // The statistics of the two queries whose columns a lane has.
        const int query = 8 * n + fragment_column(0);
        const Pair lse = load_pair(statistics + query);
        const Pair delta = load_pair(statistics + QUERIES + query);
        const float lse_of[4] = {lse.x, lse.y, lse.x, lse.y};
        const float delta_of[4] = {delta.x, delta.y, delta.x, delta.y};
        flash_gradients(p[n], ds[n], lse_of, delta_of, map);
    }
    if (!whole) {
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int key = first_key + warp_row + fragment_row(e);
                if (!mask.sees(8 * n + fragment_column(e), key)) p[n][e] = ds[n][e] = 0.0f;
            }
        }
    }
    multiply_probabilities<QUERIES, Shape::COLUMNS, D>(dv, p, lane, d_o_tile + 2 * first_column);
    multiply_probabilities<QUERIES, Shape::COLUMNS, D>(dk, ds, lane, q_tile + 2 * first_column);
}

/// First pass: dk and dv of 64 keys of one key head.
template <int D>
__device__ __forceinline__ void flash_backward_keys(const FlashInputs& in,
                                                    const FlashGradients& gradients, bfloat16* dk,
                                                    bfloat16* dv, int d_kv_stride) {
    typedef FlashKeyPass<D> Shape;
    constexpr int KEYS = Shape::KEYS, QUERIES = Shape::QUERIES, STAGES = Shape::STAGES;
    constexpr int THREADS = Shape::THREADS;
    const FlashBlock block(in, in.kv_heads);
    const FlashDocument document(in, block.document);
    // Tiles count from the last: as many queries see the first keys as the last queries see keys.
    const int first_key = ((document.keys - 1) / KEYS - block.tile) * KEYS, kv_head = block.head;
    NIBBLE_DYNAMIC_SHARED(unsigned char, shared_memory);
    const SharedAddress shared = shared_address(shared_memory);
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
    const int last = begin + tiles * QUERIES;
    const i64 kv_row = document.k_begin;
    const int q_head = kv_head * group;
    TileCopy<THREADS, KEYS, D> keys(shared, row_of(in.k, kv_row, in.kv_stride) + kv_head * D,
                                    in.kv_stride, first_key);
    TileCopy<THREADS, QUERIES, D> queries(
        shared, row_of(in.q, document.q_begin, in.q_stride) + q_head * D, in.q_stride, begin);
    TileCopy<THREADS, QUERIES, D> d_o(
        shared, row_of(gradients.d_o, document.q_begin, gradients.d_o_stride) + q_head * D,
        gradients.d_o_stride, begin);
    StatisticsCopy<QUERIES> statistics(shared, gradients, document.q_begin, in.heads, q_head, begin);
    const TileLane<D> lane(shared), key_lane(shared + warp_row * TILE_ROW<D>);
    const RightLane<D> right_lane(shared);

    // What is loaded next: `to_load` tiles, the first of them at row `load_row` of a head.
    int to_load = group * tiles, load_row = begin;
    const auto load_step = [&](u32 stage) {
        if (to_load > 0) {
            const int rows = document.queries - load_row;
            queries.start(stage, rows);
            queries.advance();
            d_o.start(stage + Shape::TILE, rows);
            d_o.advance();
            statistics.next(stage + 2 * Shape::TILE, rows);
            to_load--;
            load_row += QUERIES;
            if (load_row == last) {
                const i64 back = begin - last;
                load_row = begin;
                queries.from += back * queries.stride + D;
                d_o.from += back * d_o.stride + D;
                statistics.from += back * in.heads + 1;
            }
        }
        copy_async_commit();
    };

    keys.start(Shape::K_TILE, document.keys - first_key);
    keys.start(Shape::V_TILE, document.keys - first_key, in.v - in.k);
    u32 stage = Shape::STAGE, other = Shape::STAGE + (STAGES - 1) * Shape::STAGE_BYTES;
    load_step(stage);
    float dk_sum[Shape::COLUMNS / 8][4] = {}, dv_sum[Shape::COLUMNS / 8][4] = {};
    int row = begin;
    for (int step = group * tiles; step > 0; step--) {
        if (STAGES == 2) load_step(other);
        copy_async_wait<STAGES - 1>();
        __syncthreads();  // the step's queries are there
        const FlashMask mask = {row + document.offset, in.window};
        flash_key_step<D>(
            dk_sum, dv_sum, key_lane, lane, right_lane, stage,
            reinterpret_cast<const float*>(shared_memory + stage + 2 * Shape::TILE), map, mask,
            mask.sees_all(QUERIES, first_key, KEYS), first_key, warp_row, first_column);
        __syncthreads();  // all have read them
        if (STAGES == 1) load_step(stage);
        const u32 done = stage;
        stage = other;
        other = done;
        row = row + QUERIES == last ? begin : row + QUERIES;
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
    static constexpr int THREADS = QUERIES / 16 * 32;
    static constexpr u32 TILE = KEYS * TILE_ROW<D>, STAGE_BYTES = 2 * TILE;
    // Where tiles begin: queries and gradients of outputs, in registers before the first keys come
    // where there is room for that, and for each stage keys and values.
    static constexpr bool RESIDENT = D <= 128;
    static constexpr u32 Q_TILE = 0, D_O_TILE = QUERIES * TILE_ROW<D>;
    static constexpr u32 STAGE = RESIDENT ? 0 : 2 * D_O_TILE;
    static_assert(!RESIDENT || 2 * D_O_TILE == STAGES * STAGE_BYTES, "their place is the stages'");
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
    constexpr int THREADS = Shape::THREADS;
    constexpr bool RESIDENT = Shape::RESIDENT;
    NIBBLE_DYNAMIC_SHARED(unsigned char, shared_memory);
    const SharedAddress shared = shared_address(shared_memory);
    const int kv_head = head / (in.heads / in.kv_heads), warp_row = threadIdx.x / 32 * 16;
    const bfloat16* k = row_of(in.k, document.k_begin, in.kv_stride) + kv_head * D;
    const FlashMask mask = {first + document.offset, in.window};
    const FlashScores map(in.scale, in.soft_cap);
    const int begin = mask.begin(), end = mask.end(QUERIES, document.keys);

    TileCopy<THREADS, QUERIES, D> queries(
        shared, row_of(in.q, document.q_begin, in.q_stride) + head * D, in.q_stride, first);
    TileCopy<THREADS, QUERIES, D> d_o(
        shared, row_of(gradients.d_o, document.q_begin, gradients.d_o_stride) + head * D,
        gradients.d_o_stride, first);
    TileCopy<THREADS, KEYS, D> keys(shared, k, in.kv_stride, begin);
    const i64 values = in.v - in.k;  // from keys to values
    const TileLane<D> lane(shared), query_lane(shared + warp_row * TILE_ROW<D>);
    const RightLane<D> right_lane(shared);

    const auto load_keys = [&](int key, u32 stage) {
        if (key < end) {
            keys.start(stage, document.keys - key);
            keys.start(stage + Shape::TILE, document.keys - key, values);
            keys.advance();
        }
        copy_async_commit();
    };

    queries.start(Shape::Q_TILE, document.queries - first);
    d_o.start(Shape::D_O_TILE, document.queries - first);
    u32 q_fragments[RESIDENT ? D / 16 : 1][4], d_o_fragments[RESIDENT ? D / 16 : 1][4];
    if constexpr (RESIDENT) {
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();  // queries and gradients are there
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            load_matrices(q_fragments[i], query_lane.block(Shape::Q_TILE, 0, 16 * i));
            load_matrices(d_o_fragments[i], query_lane.block(Shape::D_O_TILE, 0, 16 * i));
        }
        __syncthreads();  // and in registers
    }
    u32 stage = Shape::STAGE, other = Shape::STAGE + (STAGES - 1) * Shape::STAGE_BYTES;
    load_keys(begin, stage);
    float lse[4], delta[4];  // of the rows of a fragment's elements
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int row = first + warp_row + fragment_row(e);
        const i64 at = (document.q_begin + row) * in.heads + head;
        lse[e] = row < document.queries ? gradients.lse[at] : infinity();
        delta[e] = row < document.queries ? gradients.delta[at] : 0.0f;
    }
    float sum[D / 8][4] = {};
    for (int key = begin; key < end; key += KEYS) {
        if (STAGES == 2) load_keys(key + KEYS, other);
        copy_async_wait<STAGES - 1>();
        __syncthreads();  // the tile's keys are there
        if (mask.sees_any(warp_row, 16, key, KEYS)) {
            const bool whole = mask.sees_all(QUERIES, key, KEYS);
            float p[KEYS / 8][4], ds[KEYS / 8][4];
            if constexpr (RESIDENT) {
                multiply_fragments<KEYS, D>(p, q_fragments, right_lane, stage);
                multiply_fragments<KEYS, D>(ds, d_o_fragments, right_lane, stage + Shape::TILE);
            } else {
                multiply_tiles<KEYS, D>(p, query_lane, Shape::Q_TILE, right_lane, stage);
                multiply_tiles<KEYS, D>(ds, query_lane, Shape::D_O_TILE, right_lane,
                                        stage + Shape::TILE);
            }
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                flash_gradients(p[n], ds[n], lse, delta, map);
            }
            if (!whole) {
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int column = key + 8 * n + fragment_column(e);
                        if (!mask.sees(warp_row + fragment_row(e), column)) ds[n][e] = 0.0f;
                    }
                }
            }
            multiply_probabilities<KEYS, D, D>(sum, ds, lane, stage);
        }
        __syncthreads();  // all have read them
        if (STAGES == 1) load_keys(key + KEYS, stage);
        const u32 done = stage;
        stage = other;
        other = done;
    }
    copy_async_wait<0>();
    store_product<D>(row_of(dq, document.q_begin, dq_stride) + head * D, dq_stride,
                     first + warp_row, document.queries, sum, in.scale, in.scale);
}
