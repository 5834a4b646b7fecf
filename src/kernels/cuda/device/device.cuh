// Types, shared memory and one-instruction helpers that all kernels build on.
//
// The same sources are compiled for the device (NVRTC, compute_80) and, with NIBBLE_EMULATED, by a
// C++ compiler for tests. What is written in PTX here is one instruction each, and has a twin in
// tests/emulator/instructions.hpp; no other file contains PTX. No CUDA header is needed.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

/// The upper half of an f32.
struct bfloat16 {
    u16 bits;
};

constexpr u32 ALL_LANES = 0xffffffffu;
constexpr float LOG2_E = 1.44269504f;

#ifndef NIBBLE_EMULATED
// `count` elements of the block's shared memory.
#define NIBBLE_SHARED(type, name, count) __shared__ __align__(16) type name[count]
// The shared memory whose size the launch gives: addresses of swizzled tiles flip bits of less than 128.
#define NIBBLE_DYNAMIC_SHARED(type, name)                                 \
    extern __shared__ __align__(128) unsigned char nibble_dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(nibble_dynamic_shared)

/// Address of shared memory as instructions want it.
typedef u32 SharedAddress;

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

/// f32 to bf16, round to nearest even.
__device__ __forceinline__ bfloat16 to_bf16(float x) {
    bfloat16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    return result;
}

/// Two f32 to bf16: `low` in the lower half of the word.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

/// 2^x, about 2 ulp; 2^-inf = 0.
__device__ __forceinline__ float fast_exp2(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

/// 1 / x within 1 ulp; 0 where that is less than 2^-126.
__device__ __forceinline__ float fast_reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

/// `d = a · b + d` over a warp: a 16×16 row-major, b 16×8 column-major, d 16×8 in f32.
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Four 8×8 bf16 matrices of shared memory into fragments; lane l gives the address of row l % 8
/// of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

/// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

/// Starts copying 16 bytes from global to shared memory; zeros instead if not `present` (the
/// address is then not read).
__device__ __forceinline__ void copy_async_16(SharedAddress to, const void* from, bool present) {
    const u32 bytes = present ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
}

/// Four bytes in the same way; zeros if not `present`.
__device__ __forceinline__ void copy_async_4(SharedAddress to, const void* from, bool present) {
    const u32 bytes = present ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
}

/// 16 bytes to global memory in one instruction: the compiler may make four of an assignment.
__device__ __forceinline__ void store_words(void* to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(to)), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
}

/// Ends a group of copies.
__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits until at most `Pending` groups of this thread are unfinished.
template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}
#endif

__device__ __forceinline__ float to_f32(bfloat16 x) {
    return __uint_as_float(static_cast<u32>(x.bits) << 16);
}
__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

/// The halves of a word of two bf16.
__device__ __forceinline__ float low_f32(u32 word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_f32(u32 word) { return __uint_as_float(word & 0xffff0000u); }

/// Whether a pointer and a row stride of `size`-byte elements keep rows on 16 bytes.
template <class T>
__device__ __forceinline__ bool rows_aligned(const T* pointer, int stride) {
    return ((reinterpret_cast<u64>(pointer) | static_cast<u64>(stride) * sizeof(T)) & 15) == 0;
}
