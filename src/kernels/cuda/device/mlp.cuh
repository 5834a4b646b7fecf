// The MLP's nonlinearity, with or without a gate.
//
// Gated: h = a(g) ∘ u, dg = dh ∘ u ∘ a'(g), du = dh ∘ a(g). Plain: h = a(u), du = dh ∘ a'(u).
// Activation codes: 0 SiLU, 1 GELU (erf), 2 GELU (tanh). Twin of src/kernels/cpu/mlp.rs.
#pragma once
#include "vector.cuh"

constexpr int ACTIVATION_SILU = 0;
constexpr int ACTIVATION_GELU = 1;
constexpr int ACTIVATION_GELU_TANH = 2;

/// a(x) and a'(x).
struct ValueAndSlope {
    float value, slope;
};

template <int Activation>
__device__ __forceinline__ ValueAndSlope activate(float x) {
    if constexpr (Activation == ACTIVATION_SILU) {
        // e^-x is within 3e-7 + 8e-8·|x|, relatively, and the rest of s within 2e-7: s is within 1e-6
        // where x > -6, within 1e-5 down to where it becomes 0, from -88 on, as e^-x passes 2^126.
        const float e = fast_exp2(-LOG2_E * x), s = fast_reciprocal(1.0f + e);
        // 1 - s, neither infinity · 0 nor what is left of 1, which a large x would multiply.
        const float rest = x > 0.0f ? e * s : 1.0f - s;
        return {x * s, s * (1.0f + x * rest)};
    } else if constexpr (Activation == ACTIVATION_GELU) {
        const float cdf = 0.5f * (1.0f + erff(x * 0.70710678f));
        const float density = expf(-0.5f * x * x) * 0.3989423f;
        return {x * cdf, cdf + x * density};
    } else {
        // (1 + tanh y) / 2 is the logistic function of z = 2·y, as close as that of SiLU.
        const float scale = 1.5957691f, cubic = 0.044715f;  // 2·sqrt(2/π) and its correction
        const float z = scale * (x + cubic * x * x * x);
        const float e = fast_exp2(-LOG2_E * z), s = fast_reciprocal(1.0f + e);
        const float rest = z > 0.0f ? e * s : 1.0f - s;
        // Where s is 0, its product with x comes first: that with the slope of z would be infinite.
        return {x * s, s + x * (s * rest) * (scale * (1.0f + 3.0f * cubic * x * x))};
    }
}

template <int Activation>
struct MlpForward {
    const bfloat16* gate;  // may be null
    const bfloat16* up;
    bfloat16* out;

    template <int N>
    __device__ __forceinline__ void run(int column) const {
        Piece<N> u = load_piece<N>(up + column);
        if (gate) {
            const Piece<N> g = load_piece<N>(gate + column);
#pragma unroll
            for (int i = 0; i < N; i++) u.v[i] *= activate<Activation>(g.v[i]).value;
        } else {
#pragma unroll
            for (int i = 0; i < N; i++) u.v[i] = activate<Activation>(u.v[i]).value;
        }
        store_piece(out + column, u);
    }
};

template <int Activation>
struct MlpBackward {
    const bfloat16* gate;  // may be null
    const bfloat16* up;
    const bfloat16* d_out;
    bfloat16* d_gate;
    bfloat16* d_up;

    template <int N>
    __device__ __forceinline__ void run(int column) const {
        const Piece<N> u = load_piece<N>(up + column);
        Piece<N> d = load_piece<N>(d_out + column);
        if (gate) {
            const Piece<N> g = load_piece<N>(gate + column);
            Piece<N> d_value;
#pragma unroll
            for (int i = 0; i < N; i++) {
                const ValueAndSlope a = activate<Activation>(g.v[i]);
                d_value.v[i] = d.v[i] * a.value;
                d.v[i] *= u.v[i] * a.slope;
            }
            store_piece(d_up + column, d_value);
            store_piece(d_gate + column, d);
        } else {
#pragma unroll
            for (int i = 0; i < N; i++) d.v[i] *= activate<Activation>(u.v[i]).slope;
            store_piece(d_up + column, d);
        }
    }
};

/// Calls `body` with the activation as a constant.
template <class Body>
__device__ __forceinline__ void with_activation(int activation, Body body) {
    if (activation == ACTIVATION_SILU) {
        body.template run<ACTIVATION_SILU>();
    } else if (activation == ACTIVATION_GELU) {
        body.template run<ACTIVATION_GELU>();
    } else {
        body.template run<ACTIVATION_GELU_TANH>();
    }
}

struct MlpForwardRow {
    const bfloat16* gate;
    int gate_stride;
    const bfloat16* up;
    int up_stride;
    bfloat16* out;
    int out_stride, width;

    template <int Activation>
    __device__ __forceinline__ void run() const {
        const i64 row = blockIdx.x;
        const bool aligned = rows_aligned(gate, gate_stride) && rows_aligned(up, up_stride) &&
                             rows_aligned(out, out_stride);
        const bfloat16* gate_row = gate ? row_of(gate, row, gate_stride) : nullptr;
        for_pieces(width, aligned, MlpForward<Activation>{gate_row, row_of(up, row, up_stride),
                                                          row_of(out, row, out_stride)});
    }
};

struct MlpBackwardRow {
    const bfloat16* gate;
    int gate_stride;
    const bfloat16* up;
    int up_stride;
    const bfloat16* d_out;
    int d_out_stride;
    bfloat16* d_gate;
    int d_gate_stride;
    bfloat16* d_up;
    int d_up_stride, width;

    template <int Activation>
    __device__ __forceinline__ void run() const {
        const i64 row = blockIdx.x;
        const bool aligned = rows_aligned(gate, gate_stride) && rows_aligned(up, up_stride) &&
                             rows_aligned(d_out, d_out_stride) &&
                             rows_aligned(d_gate, d_gate_stride) && rows_aligned(d_up, d_up_stride);
        const bfloat16* gate_row = gate ? row_of(gate, row, gate_stride) : nullptr;
        bfloat16* d_gate_row = gate ? row_of(d_gate, row, d_gate_stride) : nullptr;
        for_pieces(width, aligned,
                   MlpBackward<Activation>{gate_row, row_of(up, row, up_stride),
                                           row_of(d_out, row, d_out_stride), d_gate_row,
                                           row_of(d_up, row, d_up_stride)});
    }
};
