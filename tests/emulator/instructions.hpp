// The CPU twins of what kernels use of CUDA: built-in variables, intrinsics, and the one-instruction
// helpers of src/kernels/cuda/device/device.cuh.
#pragma once
#include "emulator.hpp"

#define NIBBLE_EMULATED 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#define threadIdx (emulator::block->fiber().thread)
#define blockIdx (emulator::block->index)
#define blockDim (emulator::block->dimensions)
#define gridDim (emulator::block->grid)

// Every barrier of the source has its number: all threads must stand at the same one.
#define __syncthreads() \
    emulator::block->wait(emulator::State::AtBlockBarrier, 0, 1000 + __COUNTER__)

#define NIBBLE_SHARED(type, name, count) \
    static const char name##_key = 0;    \
    type* const name = reinterpret_cast<type*>(emulator::block->shared_array(&name##_key, sizeof(type) * (count)))
#define NIBBLE_DYNAMIC_SHARED(type, name) \
    type* const name = reinterpret_cast<type*>(emulator::block->dynamic_shared.get())

/// The collectives, as places where lanes meet; the barriers of `__syncthreads` count from 1000.
enum Place { AtShuffle = 1, AtSync, AtMma, AtMatrices };

template <class T>
inline T shuffle(unsigned lanes, T value, int source) {
    static_assert(sizeof(T) <= 8, "a shuffled value has up to 8 bytes");
    if (source < 0 || source > 31 || !(lanes >> source & 1)) {
        emulator::block->fail("a shuffle reads a lane that does not take part");
    }
    return emulator::collective(
        lanes, AtShuffle, [&](emulator::Slot& slot) { memcpy(&slot, &value, sizeof(T)); },
        [&](const emulator::Slot* slots) {
            T result;
            memcpy(&result, &slots[source], sizeof(T));
            return result;
        });
}

inline void __syncwarp(unsigned lanes = 0xffffffffu) {
    emulator::block->wait(emulator::State::AtWarpBarrier, lanes, 2 * AtSync);
}
template <class T>
inline T __shfl_sync(unsigned lanes, T value, int source) {
    return shuffle(lanes, value, source);
}
template <class T>
inline T __shfl_xor_sync(unsigned lanes, T value, int offset) {
    return shuffle(lanes, value, emulator::block->lane() ^ offset);
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
/// Byte i of the result is the byte of {b, a} that nibble i of the selector names.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const unsigned long long bytes = (unsigned long long)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    }
    return result;
}

// ---- device.cuh

struct bfloat16;

typedef uintptr_t SharedAddress;
inline SharedAddress shared_address(const void* pointer) {
    return reinterpret_cast<SharedAddress>(pointer);
}

inline unsigned short bf16_bits(float x) {
    const unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline unsigned pack_bf16(float low, float high) {
    return unsigned(bf16_bits(high)) << 16 | bf16_bits(low);
}
inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }

inline float low_half(unsigned word) { return __uint_as_float(word << 16); }
inline float high_half(unsigned word) { return __uint_as_float(word & 0xffff0000u); }

inline void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct Result {
        float d[4];
    };
    const int lane = emulator::block->lane(), group = lane / 4, pair = lane % 4;
    const Result result = emulator::collective(
        0xffffffffu, AtMma,
        [&](emulator::Slot& slot) {
            for (int i = 0; i < 4; i++) slot.words[i] = a[i];
            slot.words[4] = b0;
            slot.words[5] = b1;
        },
        [&](const emulator::Slot* slots) {
            Result r;
            for (int e = 0; e < 4; e++) {
                // Element e of a lane's fragment: row group (+ 8), column 2·pair (+ 1).
                const int column = 2 * pair + e % 2;
                float sum = d[e];
                for (int k = 0; k < 16; k += 2) {
                    // A's words: rows group and group + 8 of k < 8, then of k ≥ 8; B's: k < 8, k ≥ 8.
                    const unsigned x = slots[group * 4 + k % 8 / 2].words[(e >= 2) + 2 * (k >= 8)];
                    const unsigned y = slots[column * 4 + k % 8 / 2].words[4 + (k >= 8)];
                    sum += low_half(x) * low_half(y) + high_half(x) * high_half(y);
                }
                r.d[e] = sum;
            }
            return r;
        });
    memcpy(d, result.d, sizeof(d));
}

/// Word of a lane of matrix i: row lane / 4, columns 2·(lane % 4) and the next.
template <bool Transposed>
inline void load_matrices_from(unsigned (&r)[4], SharedAddress row) {
    struct Words {
        unsigned word[4];
    };
    const int lane = emulator::block->lane();
    if (row % 16 != 0) emulator::block->fail("a row of a matrix is not aligned to 16 bytes");
    const Words words = emulator::collective(
        0xffffffffu, AtMatrices,
        [&](emulator::Slot& slot) { slot.pointer = reinterpret_cast<const void*>(row); },
        [&](const emulator::Slot* slots) {
            Words w;
            for (int i = 0; i < 4; i++) {
                unsigned halves[2];
                for (int h = 0; h < 2; h++) {
                    const int r = Transposed ? 2 * (lane % 4) + h : lane / 4;
                    const int c = Transposed ? lane / 4 : 2 * (lane % 4) + h;
                    const auto* from = static_cast<const unsigned short*>(slots[8 * i + r].pointer);
                    halves[h] = from[c];
                }
                w.word[i] = halves[0] | halves[1] << 16;
            }
            return w;
        },
        false);
    memcpy(r, words.word, sizeof(r));
}
inline void load_matrices(unsigned (&r)[4], SharedAddress row) {
    load_matrices_from<false>(r, row);
}
inline void load_matrices_transposed(unsigned (&r)[4], SharedAddress row) {
    load_matrices_from<true>(r, row);
}

inline void copy_async(SharedAddress to, const void* from, unsigned bytes, bool present) {
    if (to % bytes != 0 || (present && reinterpret_cast<uintptr_t>(from) % bytes != 0)) {
        emulator::block->fail("an asynchronous copy is not aligned to its size");
    }
    emulator::start_copy(reinterpret_cast<void*>(to), from, bytes, present);
}
inline void copy_async_16(SharedAddress to, const void* from, bool present) {
    copy_async(to, from, 16, present);
}
inline void copy_async_4(SharedAddress to, const void* from, bool present) {
    copy_async(to, from, 4, present);
}
inline void copy_async_commit() { emulator::end_group_of_copies(); }
template <int Pending>
inline void copy_async_wait() {
    emulator::wait_for_copies(Pending, [](const emulator::Copy&) {});
}

inline void store_words(void* to, unsigned a, unsigned b, unsigned c, unsigned d) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0) {
        emulator::block->fail("a store of 16 bytes is not aligned to them");
    }
    const unsigned words[4] = {a, b, c, d};
    memcpy(to, words, sizeof(words));
}

inline bfloat16 to_bf16(float x);
