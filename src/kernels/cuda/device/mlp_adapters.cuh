// What the gated MLP's passes share that take adapters' products from the tiles which they have at hand.
//
// A block has a strip of columns and a chunk of rows, 16 rows at a time; a warp has its own columns of
// the strip. What is a sum over columns, a warp's products of 16×8 are added up in shared memory, and the
// sums of strips by a small kernel: no atomics, one order.
#pragma once
#include "flash_tile.cuh"
#include "mlp.cuh"

/// Rows that a block works on at a time.
constexpr int MLP_ROWS = 16;

/// So many rows of `Columns` columns in shared memory, 16-byte pieces swizzled so that those of eight
/// consecutive rows lie in different banks. A lane of a warp that has it to itself has a piece of every
/// DOWN-th row.
template <int Columns>
struct Patch {
    static constexpr int PIECES = Columns / 8, DOWN = 32 / PIECES;
    static_assert(PIECES <= 8, "rows have at most 128 bytes");

    __device__ static __forceinline__ int row(int lane) { return lane / PIECES; }
    __device__ static __forceinline__ int column(int lane) { return lane % PIECES * 8; }

    __device__ static __forceinline__ u32 offset(int row, int piece) {
        const int swizzle = row / (8 / PIECES) % PIECES;
        return row * (16 * PIECES) + 16 * (piece ^ swizzle);
    }
    /// Of a lane's piece of a row.
    __device__ static __forceinline__ u32 place(int row, int lane) {
        return offset(row, lane % PIECES);
    }
    /// Starts copying a warp's columns of rows of a matrix from `first` on, zeros after `end` and beside
    /// the matrix.
    __device__ static __forceinline__ void start(SharedAddress to, const bfloat16* matrix, int stride,
                                                 int first, int end, int first_column, int width) {
        const int lane = threadIdx.x % 32, c = first_column + column(lane);
#pragma unroll
        for (int down = 0; down < MLP_ROWS; down += DOWN) {
            const int inside = down + row(lane);
            copy_async_16(to + place(inside, lane), row_of(matrix, first + inside, stride) + c,
                          first + inside < end && c < width);
        }
    }
};

/// Adds up what the warps made of a tile's rows and writes it to `inner` [rows, width] of the strip, from
/// column `first` on: Shape::AT_ONCE products of 16×8, which lie at the begin of each warp's part of the
/// stage. A thread has two columns.
template <class Shape>
__device__ __forceinline__ void mlp_add_warps(const unsigned char* stage, float* inner, int width,
                                              int first, int row, int end) {
    const int product = threadIdx.x / 64, lane = threadIdx.x % 64 / 2, half = threadIdx.x % 2;
    const int r = row + lane / 4 + 8 * half;
    if (product >= Shape::AT_ONCE || r >= end) return;
    const float* parts = reinterpret_cast<const float*>(stage) + 128 * product + 4 * lane + 2 * half;
    Pair sum = load_pair(parts);
#pragma unroll
    for (int warp = 1; warp < Shape::WARPS; warp++) {
        const Pair part = load_pair(parts + warp * (Shape::WARP_STAGE / 4));
        sum.x += part.x;
        sum.y += part.y;
    }
    float* to = row_of(inner, r, width) + first + 8 * product + lane % 4 * 2;
    *reinterpret_cast<Pair*>(to) = sum;
}

/// Writes products of 16×8 to where mlp_add_warps reads them.
template <int N>
__device__ __forceinline__ void mlp_show_products(unsigned char* own, const float (&products)[N][4],
                                                  int first, int count) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        if (n < first || n >= first + count) continue;
        Words4 words;
#pragma unroll
        for (int e = 0; e < 4; e++) words.word[e] = __float_as_uint(products[n][e]);
        reinterpret_cast<Words4*>(own)[32 * (n - first) + threadIdx.x % 32] = words;
    }
}

/// The sum over strips of two columns of `inner`, whose strips have `elements`.
__device__ __forceinline__ Pair mlp_add_strips(const float* inner, int strips, i64 elements, i64 at) {
    Pair sum = {0.0f, 0.0f};
    for (int s = 0; s < strips; s++) {
        const Pair part = load_pair(inner + s * elements + at);
        sum.x += part.x;
        sum.y += part.y;
    }
    return sum;
}
