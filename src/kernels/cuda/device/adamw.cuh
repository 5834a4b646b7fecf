// AdamW, one element a thread: exactly the f32 operations of src/train/adamw.rs, none fused.
//
// g = gradient · *gradient_scale, m += (1−β₁)(g − m), v = β₂v + (1−β₂)g²,
// w = w(1 − lr·wd) − lr/(1−β₁ᵗ) · m / (√v / √(1−β₂ᵗ) + ε), working = bf16(w).
// Source: arXiv 1711.05101; operation order of torch.optim.AdamW.
#pragma once
#include "device.cuh"

/// The numbers of one step for one learning rate.
struct AdamWCoefficients {
    float keep;               // 1 − lr·wd
    float first_weight;       // 1 − β₁
    float beta2;              // β₂
    float second_weight;      // 1 − β₂
    float second_correction;  // √(1 − β₂ᵗ)
    float epsilon;            // ε
    float negative_step;      // −lr / (1 − β₁ᵗ)
};

/// Both moments of one element.
struct Moments {
    float first, second;
};

__device__ __forceinline__ Moments update_moments(const AdamWCoefficients& c, Moments m, float g) {
    m.first = __fadd_rn(m.first, __fmul_rn(c.first_weight, __fsub_rn(g, m.first)));
    const float square = __fmul_rn(__fmul_rn(c.second_weight, g), g);
    m.second = __fadd_rn(__fmul_rn(m.second, c.beta2), square);
    return m;
}

__device__ __forceinline__ float update_weight(const AdamWCoefficients& c, Moments m, float w) {
    const float root = __fdiv_rn(__fsqrt_rn(m.second), c.second_correction);
    const float denominator = __fadd_rn(root, c.epsilon);
    const float step = __fdiv_rn(__fmul_rn(c.negative_step, m.first), denominator);
    return __fadd_rn(__fmul_rn(w, c.keep), step);
}
