// What the passes of flash attention share: documents, tiles in shared memory, tensor-core products.
//
// Scores are kept in units of log 2: s = cap(scale · q·k) · log2(e), so that probabilities are one
// `ex2`. Tiles have rows of D + 8 elements: 16-byte pieces of eight consecutive rows then lie in
// different banks, for D = 64, 96, 128 and 256.
// Source of the algorithm: FlashAttention-2, arXiv 2307.08691; fragments: the PTX manual, mma.m16n8k16.
#pragma once
#include "vector.cuh"

constexpr float LOG2_E = 1.44269504f;
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

/// Scores in units of log 2.
struct FlashScores {
    float factor;     // of q·k: scale · log2(e), or scale / cap
    float cap;        // cap · log2(e); 0: none

    __device__ __forceinline__ FlashScores(float scale, float soft_cap) {
        const bool capped = soft_cap > 0.0f;
        factor = capped ? scale / soft_cap : scale * LOG2_E;
        cap = capped ? soft_cap * LOG2_E : 0.0f;
    }
    __device__ __forceinline__ float score(float product) const {
        return cap > 0.0f ? cap * fast_tanh(factor * product) : factor * product;
    }
    /// cap'(scale · q·k), from the score.
    __device__ __forceinline__ float slope(float score) const {
        const float t = __fdividef(score, cap);
        return cap > 0.0f ? 1.0f - t * t : 1.0f;
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
    /// First key that a row sees, and the end of those that any of `rows` rows sees.
    __device__ __forceinline__ int begin() const {
        const int first = window > 0 ? position + 1 - window : 0;
        return first > 0 ? first : 0;
    }
    __device__ __forceinline__ int end(int rows, int keys) const {
        return position + rows < keys ? position + rows : keys;
    }
};

template <int D>
constexpr int TILE_STRIDE = D + 8;

/// Starts copying rows first .. first + Rows of a matrix; zeros from row `end` on.
template <int Rows, int D>
__device__ __forceinline__ void load_tile(bfloat16* tile, const bfloat16* matrix, int stride,
                                          int first, int end) {
    constexpr int PIECES = D / 8;
    for (int i = threadIdx.x; i < Rows * PIECES; i += blockDim.x) {
        const int row = i / PIECES, column = i % PIECES * 8;
        copy_async_16(shared_address(tile + row * TILE_STRIDE<D> + column),
                      row_of(matrix, first + row, stride) + column, first + row < end);
    }
}

/// The 16×16 block at (row, column) as the left operand.
template <int D>
__device__ __forceinline__ void load_left(u32 (&a)[4], const bfloat16* tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    load_matrices(a, shared_address(tile + (row + lane % 16) * TILE_STRIDE<D> + column +
                                    lane / 16 * 8));
}

/// c += a · Bᵀ for 16 columns k.. of both; B is N rows of a tile, a its fragment of A.
template <int N, int D>
__device__ __forceinline__ void multiply_transposed(float (&c)[N / 8][4], const u32 (&a)[4],
                                                    const bfloat16* tile, int k) {
    const int lane = threadIdx.x % 32;
    const int row = lane / 16 * 8 + lane % 8, column = k + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < N; n += 16) {
        u32 b[4];
        load_matrices(b, shared_address(tile + (n + row) * TILE_STRIDE<D> + column));
        mma_16x8x16(c[n / 8], a, b[0], b[1]);
        mma_16x8x16(c[n / 8 + 1], a, b[2], b[3]);
    }
}

/// c = A · Bᵀ: 16 rows of one tile, N rows of another, both D wide.
template <int N, int D>
__device__ __forceinline__ void multiply_tiles(float (&c)[N / 8][4], const bfloat16* left, int row,
                                               const bfloat16* right) {
#pragma unroll
    for (int n = 0; n < N / 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) c[n][e] = 0.0f;
    }
#pragma unroll
    for (int k = 0; k < D; k += 16) {
        u32 a[4];
        load_left<D>(a, left, row, k);
        multiply_transposed<N, D>(c, a, right, k);
    }
}

/// c += P · B: P 16×K, an earlier product that becomes the left operand in bf16; B the K rows of a
/// tile, its columns first .. first + Columns.
template <int K, int Columns, int D>
__device__ __forceinline__ void multiply_probabilities(float (&c)[Columns / 8][4],
                                                       const float (&p)[K / 8][4],
                                                       const bfloat16* tile, int first) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        const u32 a[4] = {pack_bf16(p[k / 8][0], p[k / 8][1]), pack_bf16(p[k / 8][2], p[k / 8][3]),
                          pack_bf16(p[k / 8 + 1][0], p[k / 8 + 1][1]),
                          pack_bf16(p[k / 8 + 1][2], p[k / 8 + 1][3])};
        const bfloat16* row = tile + (k + lane % 16) * TILE_STRIDE<D> + first + lane / 16 * 8;
#pragma unroll
        for (int n = 0; n < Columns; n += 16) {
            u32 b[4];
            load_matrices_transposed(b, shared_address(row + n));
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
