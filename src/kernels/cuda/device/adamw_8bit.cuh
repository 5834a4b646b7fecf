// AdamW with moments in 8 bits, blocks of 256 elements: 2 bytes and 1/32 of state a parameter.
//
// A moment is map[code] · absmax of its block. A step reads both, makes AdamW's update in f32 and
// writes the codes of the nearest map values after division by the new absmax. The maps are
// bitsandbytes' dynamic maps (signed for the first moment, unsigned for the second; arXiv
// 2110.02861), ascending, given by the caller. Unlike bitsandbytes, codes are exactly nearest.
#pragma once
#include "adamw.cuh"
#include "reduce.cuh"

constexpr int MOMENT_BLOCK = 256;

/// Code of the value of an ascending `map` that is nearest to x; the lower one of two.
__device__ __forceinline__ int nearest_code(const float* map, float x) {
    int below = 0;  // the largest code whose value is not above x, or 0
#pragma unroll
    for (int step = 128; step > 0; step /= 2) {
        if (map[below + step] <= x) below += step;
    }
    const int above = below < 255 ? below + 1 : below;
    return map[above] - x < x - map[below] ? above : below;
}

/// Moments of a block of 256 elements, one a thread.
struct PackedMoments {
    u8* first_codes;
    float* first_absmax;
    u8* second_codes;
    float* second_absmax;

    __device__ __forceinline__ Moments load(const float* first_map, const float* second_map,
                                            i64 element) const {
        const i64 block = element / MOMENT_BLOCK;
        return {first_map[first_codes[element]] * first_absmax[block],
                second_map[second_codes[element]] * second_absmax[block]};
    }

    /// The block's threads store together; `exists` is false beyond the last element.
    __device__ __forceinline__ void store(const float* first_map, const float* second_map,
                                          i64 element, Moments m, bool exists) const {
        const float first_largest = block_max(exists ? fabsf(m.first) : 0.0f);
        const float second_largest = block_max(exists ? m.second : 0.0f);
        if (threadIdx.x == 0) {
            first_absmax[element / MOMENT_BLOCK] = first_largest;
            second_absmax[element / MOMENT_BLOCK] = second_largest;
        }
        if (!exists) return;
        first_codes[element] = code(first_map, m.first, first_largest);
        second_codes[element] = code(second_map, m.second, second_largest);
    }

    static __device__ __forceinline__ u8 code(const float* map, float x, float largest) {
        return static_cast<u8>(nearest_code(map, largest > 0.0f ? x / largest : 0.0f));
    }
};
