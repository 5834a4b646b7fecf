// Sums in f64 in two stages with a fixed order. Twin of src/train/clip.rs.
#pragma once
#include "reduce.cuh"

/// What a sum adds up.
enum class Term { Value, Square };

/// `partial[block]` = the block's share; blocks take turns through the elements.
template <Term Kind>
__device__ __forceinline__ void sum_stage_one(const float* x, i64 elements, double* partial) {
    double sum = 0.0;
    const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < elements; i += step) {
        const double value = x[i];
        sum += Kind == Term::Square ? value * value : value;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

/// `*result = Σ partial`, or `+=`; one block.
__device__ __forceinline__ void sum_stage_two(const double* partial, int count, double* result,
                                              bool accumulate) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *result = accumulate ? *result + sum : sum;
}
