// Rows in pieces of N elements: eight where everything lies on 16 bytes, else one.
#pragma once
#include "device.cuh"

/// N elements, widened.
template <int N>
struct Piece {
    float v[N];
};

/// 16 bytes in one instruction.
struct __align__(16) Words4 {
    u32 word[4];
};

/// Two f32 from an address that is a multiple of 8, in one instruction.
struct __align__(8) Pair {
    float x, y;
};
__device__ __forceinline__ Pair load_pair(const float* from) {
    return *reinterpret_cast<const Pair*>(from);
}

template <int N>
__device__ __forceinline__ Piece<N> load_piece(const bfloat16* from) {
    Piece<N> piece;
    if constexpr (N == 8) {
        const Words4 words = *reinterpret_cast<const Words4*>(from);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            piece.v[2 * i] = low_f32(words.word[i]);
            piece.v[2 * i + 1] = high_f32(words.word[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) piece.v[i] = to_f32(from[i]);
    }
    return piece;
}

template <int N>
__device__ __forceinline__ Piece<N> load_piece(const float* from) {
    Piece<N> piece;
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int part = 0; part < N / 4; part++) {
            const Words4 words = reinterpret_cast<const Words4*>(from)[part];
#pragma unroll
            for (int i = 0; i < 4; i++) piece.v[4 * part + i] = __uint_as_float(words.word[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) piece.v[i] = from[i];
    }
    return piece;
}

template <int N>
__device__ __forceinline__ void store_piece(bfloat16* to, const Piece<N>& piece) {
    if constexpr (N == 8) {
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) words[i] = pack_bf16(piece.v[2 * i], piece.v[2 * i + 1]);
        store_words(to, words[0], words[1], words[2], words[3]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) to[i] = to_bf16(piece.v[i]);
    }
}

template <int N>
__device__ __forceinline__ void store_piece(float* to, const Piece<N>& piece) {
    if constexpr (N == 8) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 words[4];
#pragma unroll
            for (int i = 0; i < 4; i++) words[i] = __float_as_uint(piece.v[4 * half + i]);
            store_words(to + 4 * half, words[0], words[1], words[2], words[3]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) to[i] = piece.v[i];
    }
}

/// Where row `row` of a matrix begins.
template <class T>
__device__ __forceinline__ T* row_of(T* matrix, i64 row, int stride) {
    return matrix + row * stride;
}

/// `body<N>(column)` for this thread's pieces of a row of `width`; N is 8 if `aligned`.
template <class Body>
__device__ __forceinline__ void for_pieces(int width, bool aligned, Body body) {
    if (aligned && width % 8 == 0) {
        for (int c = 8 * threadIdx.x; c < width; c += 8 * blockDim.x) body.template run<8>(c);
    } else {
        for (int c = threadIdx.x; c < width; c += blockDim.x) body.template run<1>(c);
    }
}
