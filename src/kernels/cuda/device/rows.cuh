// Moving rows: conversion, gather, scatter, sums of buffers. Blocks are rows, threads are columns.
#pragma once
#include "vector.cuh"

/// `to = scale · from`, or `to += scale · from`, for one row.
template <class From, class To>
struct ScaleRow {
    const From* from;
    To* to;
    float scale;
    bool accumulate;

    template <int N>
    __device__ __forceinline__ void run(int column) const {
        Piece<N> piece = load_piece<N>(from + column);
#pragma unroll
        for (int i = 0; i < N; i++) piece.v[i] *= scale;
        if (accumulate) {
            const Piece<N> before = load_piece<N>(to + column);
#pragma unroll
            for (int i = 0; i < N; i++) piece.v[i] += before.v[i];
        }
        store_piece(to + column, piece);
    }
};

/// Row `from_row` of one matrix into row `to_row` of another.
template <class From, class To>
__device__ __forceinline__ void scale_row(const From* from, int from_stride, i64 from_row, To* to,
                                          int to_stride, i64 to_row, int width, float scale,
                                          bool accumulate) {
    const bool aligned = rows_aligned(from, from_stride) && rows_aligned(to, to_stride);
    const ScaleRow<From, To> body = {row_of(from, from_row, from_stride),
                                     row_of(to, to_row, to_stride), scale, accumulate};
    for_pieces(width, aligned, body);
}

/// y = y + bias, rows of y in bf16.
struct AddBias {
    bfloat16* y;
    const float* bias;

    template <int N>
    __device__ __forceinline__ void run(int column) const {
        Piece<N> piece = load_piece<N>(y + column);
        const Piece<N> b = load_piece<N>(bias + column);
#pragma unroll
        for (int i = 0; i < N; i++) piece.v[i] += b.v[i];
        store_piece(y + column, piece);
    }
};

__device__ __forceinline__ void add_bias_row(bfloat16* y, int stride, const float* bias,
                                             int width) {
    const bool aligned = rows_aligned(y, stride) && rows_aligned(bias, 0);
    for_pieces(width, aligned, AddBias{row_of(y, blockIdx.x, stride), bias});
}
