// What the passes of flash attention share: documents, tiles in shared memory, tensor-core products.
//
// Scores are kept in units of log 2: s = cap(scale · q·k) · log2(e), so that probabilities are one
// `ex2`. The 16-byte pieces of eight consecutive rows of a tile lie in different banks: rows are padded
// by 8 elements, or their pieces swizzled.
// Source of the algorithm: FlashAttention-2, arXiv 2307.08691; fragments: the PTX manual, mma.m16n8k16.
#pragma once
#include "vector.cuh"

constexpr float LN_2 = 0.69314718f;

/// What all passes read.
struct FlashInputs {
    const bfloat16* q;
    int q_stride;
    const bfloat16* k;
    const bfloat16* v;
    int kv_stride;
    const u32* q_boundaries;  // [documents + 1]
    const u32* k_boundaries;
    const u32* tiles;  // document and tile of 64 rows, for all heads of each
    int heads, kv_heads;
    int window;  // 0: all keys before the query
    float scale, soft_cap;
};

/// What a block works on: the heads of a tile lie side by side in the grid.
struct FlashBlock {
    int head, document, tile;

    __device__ __forceinline__ FlashBlock(const FlashInputs& in, u32 heads) {
        const u32* item = in.tiles + 2 * static_cast<i64>(blockIdx.x / heads);
        head = blockIdx.x % heads;
        document = item[0];
        tile = item[1];
    }
};

/// One document: its rows of q and of k. Query i stands at key position i + offset.
struct FlashDocument {
    i64 q_begin, k_begin;
    int queries, keys, offset;

    __device__ __forceinline__ FlashDocument(const FlashInputs& in, int document) {
        q_begin = in.q_boundaries[document];
        k_begin = in.k_boundaries[document];
        queries = static_cast<int>(in.q_boundaries[document + 1] - q_begin);
        keys = static_cast<int>(in.k_boundaries[document + 1] - k_begin);
        offset = keys - queries;
    }
};

/// tanh within 2e-7 of the exact value, which a soft cap multiplies by some 50: 1 − 2 / (1 + e^{2x}).
__device__ __forceinline__ float fast_tanh(float x) {
    return 1.0f - __fdividef(2.0f, 1.0f + fast_exp2(2.0f * LOG2_E * x));
}

/// From q·k to scores in units of log 2: units · q·k, or units · capped(q·k).
struct FlashScores {
    float units;   // scale · log2(e), or 1
    float factor;  // scale / cap
    float cap;     // cap · log2(e); 0: none

    __device__ __forceinline__ FlashScores(float scale, float soft_cap) {
        const bool is_capped = soft_cap > 0.0f;
        units = is_capped ? 1.0f : scale * LOG2_E;
        factor = is_capped ? scale / soft_cap : 0.0f;
        cap = is_capped ? soft_cap * LOG2_E : 0.0f;
    }
    __device__ __forceinline__ bool is_capped() const { return cap > 0.0f; }
    __device__ __forceinline__ float capped(float product) const {
        return cap * fast_tanh(factor * product);
    }
    /// cap'(scale · q·k), from the score.
    __device__ __forceinline__ float slope(float score) const {
        const float t = __fdividef(score, cap);
        return 1.0f - t * t;
    }
};

/// Which keys a tile of queries sees: query row r stands at `position + r`.
struct FlashMask {
    int position, window;

    __device__ __forceinline__ bool sees(int row, int key) const {
        const int at = position + row;
        return key <= at && (window == 0 || key > at - window);
    }
    /// Whether `rows` rows see all of the keys first .. first + keys.
    __device__ __forceinline__ bool sees_all(int rows, int first, int keys) const {
        const bool before = first + keys - 1 <= position;
        return before && (window == 0 || first > position + rows - 1 - window);
    }
    /// Whether any of `rows` rows from `row` on sees one of the keys first .. first + keys.
    __device__ __forceinline__ bool sees_any(int row, int rows, int first, int keys) const {
        const int at = position + row;
        return first <= at + rows - 1 && (window == 0 || first + keys - 1 > at - window);
    }
    /// First key that a row sees, and the end of those that any of `rows` rows sees.
    __device__ __forceinline__ int begin() const {
        const int first = window > 0 ? position + 1 - window : 0;
        return first > 0 ? first : 0;
    }
    __device__ __forceinline__ int end(int rows, int keys) const {
        return position + rows < keys ? position + rows : keys;
    }
};

/// Whether piece p of row r of a tile lies at p ^ (r & 7): where the bytes that padding takes cost a
/// block on a multiprocessor. Else rows have 8 elements more.
template <int D>
constexpr bool SWIZZLED = D == 128;

/// Bytes from one row of a tile to the next.
template <int D>
constexpr u32 TILE_ROW = 2 * (SWIZZLED<D> ? D : D + 8);

/// Copies a matrix to shared memory, one tile of `Rows` rows after the other. A thread has the same
/// columns of every DOWN-th row, so that an address is the last one and a constant.
template <int Threads, int Rows, int D>
struct TileCopy {
    static constexpr int PIECES = D / 8;
    static constexpr int ACROSS = PIECES & -PIECES;  // threads side by side: a power of two
    static constexpr int DOWN = Threads / ACROSS;
    static_assert(Threads % ACROSS == 0 && Rows % DOWN == 0, "all threads copy as much");
    static_assert(!SWIZZLED<D> || DOWN % 8 == 0, "a thread's rows are all swizzled alike");

    const bfloat16* from;
    int stride, row;
    SharedAddress to;

    /// Tiles of `matrix` from row `first` on, to places in `shared`.
    __device__ __forceinline__ TileCopy(SharedAddress shared, const bfloat16* matrix, int stride,
                                        int first)
        : stride(stride) {
        const int piece = threadIdx.x % ACROSS;
        row = threadIdx.x / ACROSS;
        // Eight lanes write together. Where those are two rows, they lie four apart: next to each other
        // they would share banks.
        if (ACROSS == 4) row = (row & ~7) | (row & 1) << 2 | (row >> 1 & 3);
        from = row_of(matrix, first + row, stride) + 8 * piece;
        to = shared + row * TILE_ROW<D> + 16 * (SWIZZLED<D> ? piece ^ (row & 7) : piece);
    }

    /// Starts copying a tile to `tile` bytes behind the first place, zeros after `rows` rows; of the
    /// matrix that begins `other` elements from this one, and has its stride.
    __device__ __forceinline__ void start(u32 tile, int rows, i64 other = 0) const {
        const bfloat16* at = from + other;
#pragma unroll
        for (int first = 0; first < Rows; first += DOWN) {
            // One condition in two forms: the assembler needs fewer registers for the first with 256
            // columns, for the second with 128.
            const bool present = D > 128 ? row < rows - first : first + row < rows;
#pragma unroll
            for (int piece = 0; piece < PIECES; piece += ACROSS) {
                copy_async_16(to + tile + (first * TILE_ROW<D> + 16 * piece), at + 8 * piece,
                              present);
            }
            at = row_of(at, DOWN, stride);
        }
    }
    /// On to the next tile.
    __device__ __forceinline__ void advance() { from = row_of(from, Rows, stride); }
};

/// A lane's part of 16×16 blocks: eight columns of a row. The four 8×8 matrices of a block come one below
/// the other first, as fragments of a left operand and of a transposed right one have them; with `Right`
/// side by side first, as those of the right operand of A · Bᵀ: an mma reads neighbouring registers.
/// Pieces of 16 bytes are swizzled by the row of a lane alone, so that a column flips bits of its address.
template <int D, bool Right = false>
struct TileLane {
    SharedAddress at;

    /// `shared` is a multiple of 128 where tiles are swizzled.
    __device__ __forceinline__ explicit TileLane(SharedAddress shared) {
        const int lane = threadIdx.x % 32;
        const int row = Right ? lane % 8 + lane / 16 * 8 : lane % 16;
        const int piece = Right ? lane / 8 % 2 : lane / 16;
        at = shared + 16 * (SWIZZLED<D> ? piece ^ (lane & 7) : piece) + row * TILE_ROW<D>;
    }
    /// Of the block at (row, column), both multiples of 16, of the tile `tile` bytes from the first.
    __device__ __forceinline__ SharedAddress block(u32 tile, int row, int column) const {
        const u32 bytes = 2 * column, flipped = SWIZZLED<D> ? bytes % 128 : 0;
        return (at ^ flipped) + tile + (row * TILE_ROW<D> + bytes - flipped);
    }
};

/// The lanes of the right operand of A · Bᵀ.
template <int D>
using RightLane = TileLane<D, true>;

/// c += a · Bᵀ for 16 columns k.. of both; B is N rows of a tile, a its fragment of A.
template <int N, int D>
__device__ __forceinline__ void multiply_transposed(float (&c)[N / 8][4], const u32 (&a)[4],
                                                    const RightLane<D>& lane, u32 tile, int k) {
#pragma unroll
    for (int n = 0; n < N; n += 16) {
        u32 b[4];
        load_matrices(b, lane.block(tile, n, k));
        mma_16x8x16(c[n / 8], a, b[0], b[1]);
        mma_16x8x16(c[n / 8 + 1], a, b[2], b[3]);
    }
}

/// All 0.
template <int N>
__device__ __forceinline__ void clear(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) c[n][e] = 0.0f;
    }
}

/// c = A · Bᵀ: A's 16 rows as fragments, N rows of a tile, both D wide.
template <int N, int D>
__device__ __forceinline__ void multiply_fragments(float (&c)[N / 8][4],
                                                   const u32 (&a)[D / 16][4],
                                                   const RightLane<D>& lane, u32 right) {
    clear(c);
#pragma unroll
    for (int i = 0; i < D / 16; i++) multiply_transposed<N, D>(c, a[i], lane, right, 16 * i);
}

/// The same with 16 rows of another tile.
template <int N, int D>
__device__ __forceinline__ void multiply_tiles(float (&c)[N / 8][4], const TileLane<D>& left_lane,
                                               u32 left, const RightLane<D>& lane, u32 right) {
    clear(c);
#pragma unroll
    for (int k = 0; k < D; k += 16) {
        u32 a[4];
        load_matrices(a, left_lane.block(left, 0, k));
        multiply_transposed<N, D>(c, a, lane, right, k);
    }
}

/// c += P · B: P 16×K, an earlier product that becomes the left operand in bf16; B the K rows of a
/// tile, its first `Columns` columns.
template <int K, int Columns, int D>
__device__ __forceinline__ void multiply_probabilities(float (&c)[Columns / 8][4],
                                                       const float (&p)[K / 8][4],
                                                       const TileLane<D>& lane, u32 tile) {
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        const u32 a[4] = {pack_bf16(p[k / 8][0], p[k / 8][1]), pack_bf16(p[k / 8][2], p[k / 8][3]),
                          pack_bf16(p[k / 8 + 1][0], p[k / 8 + 1][1]),
                          pack_bf16(p[k / 8 + 1][2], p[k / 8 + 1][3])};
#pragma unroll
        for (int n = 0; n < Columns; n += 16) {
            u32 b[4];
            load_matrices_transposed(b, lane.block(tile, k, n));
            mma_16x8x16(c[n / 8], a, b[0], b[1]);
            mma_16x8x16(c[n / 8 + 1], a, b[2], b[3]);
        }
    }
}

/// Row and column of element e of a lane's part of a 16×8 product.
__device__ __forceinline__ int fragment_row(int e) { return threadIdx.x % 32 / 4 + e / 2 * 8; }
__device__ __forceinline__ int fragment_column(int e) { return threadIdx.x % 4 * 2 + e % 2; }

/// Writes 16 rows of a product, each times its factor, as bf16; rows from `end` on stay.
template <int Columns>
__device__ __forceinline__ void store_product(bfloat16* to, int stride, int row, int end,
                                              const float (&c)[Columns / 8][4], float upper,
                                              float lower) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = row + fragment_row(2 * half);
        const float factor = half == 0 ? upper : lower;
        if (r >= end) continue;
        bfloat16* line = row_of(to, r, stride) + fragment_column(0);
#pragma unroll
        for (int n = 0; n < Columns / 8; n++) {
            *reinterpret_cast<u32*>(line + 8 * n) =
                pack_bf16(c[n][2 * half] * factor, c[n][2 * half + 1] * factor);
        }
    }
}
