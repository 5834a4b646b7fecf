// Sums and maxima over a warp or a block; every thread gets the result, the order is fixed.
#pragma once
#include "device.cuh"

constexpr int LARGEST_BLOCK_WARPS = 32;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
    }
    return x;
}

/// Sum over the block; blockDim.x is a multiple of 32. Also a barrier for shared memory.
template <class T>
__device__ __forceinline__ T block_sum(T x) {
    NIBBLE_SHARED(T, parts, LARGEST_BLOCK_WARPS);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    x = warp_sum(x);
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    x = warp_sum(lane < static_cast<int>(blockDim.x / 32) ? parts[lane] : T(0));
    __syncthreads();
    return x;
}

/// Largest of the block.
__device__ __forceinline__ float block_max(float x) {
    NIBBLE_SHARED(float, parts, LARGEST_BLOCK_WARPS);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    x = warp_max(x);
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    x = warp_max(lane < static_cast<int>(blockDim.x / 32) ? parts[lane] : -infinity());
    __syncthreads();
    return x;
}
