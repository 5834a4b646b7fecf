// What adapters put beside large matrices: a few columns behind many rows, a few rows below them, from
// the matrices of up to three linears that read the same rows.
#pragma once
#include "rows.cuh"

constexpr int PIECE = 8;

/// Pieces of eight columns that `width` columns take.
__device__ __forceinline__ int pieces_of(int width) { return (width + PIECE - 1) / PIECE; }

/// `body(row, piece)` for this thread's pieces of `rows` rows of `pieces`: threads are pieces, as rows
/// have only a few.
template <class Body>
__device__ __forceinline__ void for_all_pieces(int rows, int pieces, Body body) {
    const i64 all = static_cast<i64>(rows) * pieces;
    const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < all; i += step) {
        body(i / pieces, static_cast<int>(i % pieces));
    }
}

/// to = scale · from, `rows` rows of a few columns.
__device__ __forceinline__ void scale_columns(const bfloat16* from, int from_stride, bfloat16* to,
                                              int to_stride, int rows, int width, float scale) {
    const bool aligned = width % PIECE == 0 && rows_aligned(from, from_stride) &&
                         rows_aligned(to, to_stride);
    for_all_pieces(rows, pieces_of(width), [=](i64 row, int piece) {
        const ScaleRow<bfloat16, bfloat16> body = {row_of(from, row, from_stride),
                                                   row_of(to, row, to_stride), scale, false};
        const int begin = PIECE * piece, stop = begin + PIECE;
        const int end = stop < width ? stop : width;
        if (aligned) {
            body.template run<8>(begin);
        } else {
            for (int c = begin; c < end; c++) body.template run<1>(c);
        }
    });
}

/// One of three, without an array: those would lie in slow memory.
template <class T>
__device__ __forceinline__ T one_of(int which, T first, T second, T third) {
    return which == 0 ? first : which == 1 ? second : third;
}

/// Which of three matrices one below the other has row `row`, which becomes that one's own.
__device__ __forceinline__ int find_part(int& row, int rows0, int rows1) {
    if (row < rows0) return 0;
    row -= rows0;
    if (row < rows1) return 1;
    row -= rows1;
    return 2;
}

/// A block s·B `[rows, rank]` of a block diagonal, and the column that it begins with.
template <class T>
struct DiagonalBlock {
    const T* b;
    int rank, first;
    float scale;

    /// Whether a piece of a row is all in the block or all beside it, and can be read as one.
    __device__ __forceinline__ bool has_whole_pieces() const {
        return rank % PIECE == 0 && first % PIECE == 0 && rows_aligned(b, rank);
    }

    __device__ __forceinline__ Piece<PIECE> piece_at(i64 row, int column) const {
        const int inside = column - first;
        Piece<PIECE> piece = {};
        if (inside < 0 || inside >= rank) return piece;
        piece = load_piece<PIECE>(b + row * rank + inside);
#pragma unroll
        for (int i = 0; i < PIECE; i++) piece.v[i] *= scale;
        return piece;
    }

    __device__ __forceinline__ float at(i64 row, int column) const {
        const int inside = column - first;
        if (inside < 0 || inside >= rank) return 0.0f;
        return scale * to_f32(b[row * rank + inside]);
    }
};

/// Three of them, and the rows of the first two.
template <class T>
struct Diagonal {
    DiagonalBlock<T> first, second, third;
    int rows0, rows1, rows;

    __device__ __forceinline__ Diagonal(const T* b0, const T* b1, const T* b2, int rows0, int rows1,
                                        int rows2, int rank0, int rank1, int rank2, float scale0,
                                        float scale1, float scale2)
        : first{b0, rank0, 0, scale0},
          second{b1, rank1, rank0, scale1},
          third{b2, rank2, rank0 + rank1, scale2},
          rows0(rows0),
          rows1(rows1),
          rows(rows0 + rows1 + rows2) {}

    __device__ __forceinline__ int width() const { return third.first + third.rank; }
};

/// to = the diagonal, zeros beside it; whole pieces of eight columns are written.
template <class T>
__device__ __forceinline__ void write_diagonal(const Diagonal<T>& from, bfloat16* to, int stride) {
    const bool aligned = rows_aligned(to, stride);
    for_all_pieces(from.rows, pieces_of(from.width()), [=](i64 row, int number) {
        int inside = static_cast<int>(row);
        const int which = find_part(inside, from.rows0, from.rows1);
        const DiagonalBlock<T> block = one_of(which, from.first, from.second, from.third);
        const int begin = PIECE * number;
        Piece<PIECE> piece;
        if (block.has_whole_pieces()) {
            piece = block.piece_at(inside, begin);
        } else {
#pragma unroll
            for (int i = 0; i < PIECE; i++) piece.v[i] = block.at(inside, begin + i);
        }
        bfloat16* target = row_of(to, row, stride) + begin;
        if (aligned) {
            store_piece(target, piece);
        } else {
#pragma unroll
            for (int i = 0; i < PIECE; i++) target[i] = to_bf16(piece.v[i]);
        }
    });
}
