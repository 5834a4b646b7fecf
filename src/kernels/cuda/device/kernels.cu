// Every kernel of the CUDA backend: the entry points, their parameters and their launches.
//
// The host side is written from this file. Conventions of all entries:
// - Matrices are row-major; `*_stride` counts elements from one row to the next, so that a band of
//   columns is a pointer to its first element and the stride of the whole row. Any width, stride
//   and alignment is right; 16-byte alignment of pointer and stride (8 bf16) and a width that is a
//   multiple of 8 make it fast.
// - "rows": the grid is (rows, 1, 1), one block a row. Any multiple of 32 threads up to 1024 is
//   right; best is one thread for 8 columns, at least 32 and at most 256.
// - "flat": the grid is any number of blocks, ceil(elements / 256) at most; blocks take turns.
// - No entry needs dynamic shared memory unless it says so. Grids are never empty: launch nothing
//   for zero rows.
// - int, long long, unsigned, float and double are 4, 8, 4, 4 and 8 bytes; flags are int, 0 or 1.
#include "adamw.cuh"
#include "adamw_8bit.cuh"
#include "attention_decode.cuh"
#include "attention_rows.cuh"
#include "cross_entropy.cuh"
#include "dequantize.cuh"
#include "dropout.cuh"
#include "flash_backward.cuh"
#include "flash_forward.cuh"
#include "head_norm.cuh"
#include "mlp.cuh"
#include "mlp_adapters_backward.cuh"
#include "mlp_adapters_forward.cuh"
#include "noise.cuh"
#include "norm.cuh"
#include "parts.cuh"
#include "rotary.cuh"
#include "row.cuh"
#include "rows.cuh"
#include "sum.cuh"

// ---------------------------------------------------------------- frozen weights

// out[r, :] = the weight's row first_row + r, for r < rows; other columns of out stay.
// codes: 16-byte aligned for speed. values[16]: the NF4 or FP4 values, codebook.rs. Plain scales:
// absmax, and absmax_codes = nested_absmax = map = null. Nested: absmax = null; map[256] is
// codebook.rs' dynamic_map(). block_shift = log2(block size), 5..=12.
// Flat over rows·columns/8192 blocks of exactly 256 threads. Fast when columns % 8 == 0,
// stride % 8 == 0 and first_row·columns % 32 == 0. Caller: the GEMM operand of a packed weight.
extern "C" __global__ void __launch_bounds__(256, 8)
dequantize_4bit(const u8* codes, const float* values, const float* absmax, const u8* absmax_codes,
                const float* nested_absmax, const float* map, float offset, int block_shift,
                long long first_row, long long rows, int columns, bfloat16* out, int out_stride) {
    const PackedWeight weight = {codes, values, absmax, absmax_codes, nested_absmax,
                                 map,   offset, block_shift};
    dequantize_rows(weight, first_row, rows, columns, out, out_stride);
}

// y[n] = Σ_k W[n, k]·x[k] + bias[n] + scale·Σ_r ax[r]·B[n, r], or +=, W `[rows, columns]` packed as in
// dequantize_4bit, for one x `[columns]`; bias may be null, rank 0. rows/8 blocks, rounded up, of exactly
// 256 threads. Fast when columns % 32 == 0. Kernels::linear_row.
extern "C" __global__ void __launch_bounds__(256)
linear_row_4bit(const u8* codes, const float* values, const float* absmax, const u8* absmax_codes,
                const float* nested_absmax, const float* map, float offset, int block_shift,
                long long rows, int columns, const bfloat16* x, const float* bias,
                const bfloat16* ax, const bfloat16* b, int rank, float scale, bfloat16* y,
                int accumulate) {
    const PackedWeight weight = {codes, values, absmax, absmax_codes, nested_absmax,
                                 map,   offset, block_shift};
    multiply_row(weight, rows, columns, x, {bias, {ax, b, rank, scale}, y, accumulate});
}

// The same, W in bf16. Fast when columns % 8 == 0 and all lies on 16 bytes.
extern "C" __global__ void __launch_bounds__(256)
linear_row_bf16(const bfloat16* weight, long long rows, int columns, const bfloat16* x,
                const float* bias, const bfloat16* ax, const bfloat16* b, int rank, float scale,
                bfloat16* y, int accumulate) {
    multiply_row(weight, rows, columns, x, {bias, {ax, b, rank, scale}, y, accumulate});
}

// to = scale · from, or to += scale · from, in f32, rounded once. Rows.
extern "C" __global__ void __launch_bounds__(1024)
scale_rows_bf16(const bfloat16* from, int from_stride, bfloat16* to, int to_stride, int width,
                float scale, int accumulate) {
    scale_row(from, from_stride, blockIdx.x, to, to_stride, blockIdx.x, width, scale, accumulate);
}

// The same from f32.
extern "C" __global__ void __launch_bounds__(1024)
scale_rows_f32_bf16(const float* from, int from_stride, bfloat16* to, int to_stride, int width,
                    float scale, int accumulate) {
    scale_row(from, from_stride, blockIdx.x, to, to_stride, blockIdx.x, width, scale, accumulate);
}

// The same from bf16 to f32.
extern "C" __global__ void __launch_bounds__(1024)
scale_rows_bf16_f32(const bfloat16* from, int from_stride, float* to, int to_stride, int width,
                    float scale, int accumulate) {
    scale_row(from, from_stride, blockIdx.x, to, to_stride, blockIdx.x, width, scale, accumulate);
}

// The same from f32 to f32.
extern "C" __global__ void __launch_bounds__(1024)
scale_rows_f32(const float* from, int from_stride, float* to, int to_stride, int width, float scale,
               int accumulate) {
    scale_row(from, from_stride, blockIdx.x, to, to_stride, blockIdx.x, width, scale, accumulate);
}

// ---------------------------------------------------------------- embedding and rows

// x[i] = scale · table[ids[i]], or +=. Rows of `width`. Kernels::embed with a bf16 table.
extern "C" __global__ void __launch_bounds__(1024)
embed_bf16(const u32* ids, const bfloat16* table, int table_stride, bfloat16* x, int x_stride,
           int width, float scale, int accumulate) {
    scale_row(table, table_stride, ids[blockIdx.x], x, x_stride, blockIdx.x, width, scale,
              accumulate);
}

// The same with a packed table `[V, width]`; its parameters as in dequantize_4bit.
extern "C" __global__ void __launch_bounds__(1024)
embed_4bit(const u32* ids, const u8* codes, const float* values, const float* absmax,
           const u8* absmax_codes, const float* nested_absmax, const float* map, float offset,
           int block_shift, bfloat16* x, int x_stride, int width, float scale, int accumulate) {
    const PackedWeight table = {codes, values, absmax, absmax_codes, nested_absmax,
                                map,   offset, block_shift};
    bfloat16* row = row_of(x, blockIdx.x, x_stride);
    for (int c = threadIdx.x; c < width; c += blockDim.x) {
        const float value = scale * table.at(static_cast<i64>(ids[blockIdx.x]) * width + c);
        row[c] = to_bf16(accumulate ? to_f32(row[c]) + value : value);
    }
}

// to[i] = from[rows[i]]. Rows. Kernels::gather_rows.
extern "C" __global__ void __launch_bounds__(1024)
gather_rows(const bfloat16* from, int from_stride, const u32* rows, bfloat16* to, int to_stride,
            int width) {
    scale_row(from, from_stride, rows[blockIdx.x], to, to_stride, blockIdx.x, width, 1.0f, false);
}

// to[rows[i]] = from[i]; rows are distinct. Rows. Kernels::scatter_rows.
extern "C" __global__ void __launch_bounds__(1024)
scatter_rows(const bfloat16* from, int from_stride, const u32* rows, bfloat16* to, int to_stride,
             int width) {
    scale_row(from, from_stride, blockIdx.x, to, to_stride, rows[blockIdx.x], width, 1.0f, false);
}

// y[i, :] += bias. Rows of `width`.
extern "C" __global__ void __launch_bounds__(1024)
add_bias(bfloat16* y, int y_stride, const float* bias, int width) {
    add_bias_row(y, y_stride, bias, width);
}

// ---------------------------------------------------------------- adapters beside large matrices

// to = scale · from, a few columns of `rows` rows: x·Aᵀ behind the rows of x, s·B behind those of a
// weight; or A below them. Flat over rows · ceil(width / 8).
extern "C" __global__ void __launch_bounds__(1024)
scale_columns_bf16(const bfloat16* from, int from_stride, bfloat16* to, int to_stride, int rows,
                   int width, float scale) {
    scale_columns(from, from_stride, to, to_stride, rows, width, scale);
}

#define NIBBLE_DIAGONAL_INPUTS(T)                                                                 \
    const T *b0, const T *b1, const T *b2, int rows0, int rows1, int rows2, int rank0, int rank1, \
        int rank2, float scale0, float scale1, float scale2
#define NIBBLE_DIAGONAL_VALUES                                                                    \
    b0, b1, b2, rows0, rows1, rows2, rank0, rank1, rank2, scale0, scale1, scale2

// to[Σ rows, Σ ranks] = diag(scale · b), each b [rows, rank] without gaps; a b of rank 0 is not read.
// Whole pieces of 8 columns are written. Flat over Σ rows · ceil(Σ ranks / 8). What stands behind the
// rows of fused weights.
extern "C" __global__ void __launch_bounds__(1024)
diagonal_bf16(NIBBLE_DIAGONAL_INPUTS(bfloat16), bfloat16* to, int stride) {
    write_diagonal(Diagonal<bfloat16>(NIBBLE_DIAGONAL_VALUES), to, stride);
}

// The same from f32.
extern "C" __global__ void __launch_bounds__(1024)
diagonal_f32_bf16(NIBBLE_DIAGONAL_INPUTS(float), bfloat16* to, int stride) {
    write_diagonal(Diagonal<float>(NIBBLE_DIAGONAL_VALUES), to, stride);
}

// to = up to three matrices of `width` columns without gaps, one below the other, of which the first
// two have `rows0` and `rows1` rows. Rows, of all of them.
extern "C" __global__ void __launch_bounds__(1024)
stack_rows_bf16(const bfloat16* a0, const bfloat16* a1, const bfloat16* a2, int rows0, int rows1,
                int width, bfloat16* to, int to_stride) {
    int row = blockIdx.x;
    const bfloat16* from = one_of(find_part(row, rows0, rows1), a0, a1, a2);
    scale_row(from, width, row, to, to_stride, blockIdx.x, width, 1.0f, false);
}

// The same from f32.
extern "C" __global__ void __launch_bounds__(1024)
stack_rows_f32_bf16(const float* a0, const float* a1, const float* a2, int rows0, int rows1,
                    int width, bfloat16* to, int to_stride) {
    int row = blockIdx.x;
    const float* from = one_of(find_part(row, rows0, rows1), a0, a1, a2);
    scale_row(from, width, row, to, to_stride, blockIdx.x, width, 1.0f, false);
}

// The way back, added: each matrix += its rows of `from`, which has no gaps. Rows, of all of them.
extern "C" __global__ void __launch_bounds__(1024)
add_stacked_f32(const float* from, float* a0, float* a1, float* a2, int rows0, int rows1,
                int width) {
    int row = blockIdx.x;
    float* to = one_of(find_part(row, rows0, rows1), a0, a1, a2);
    scale_row(from, width, blockIdx.x, to, width, row, width, 1.0f, true);
}

// ---------------------------------------------------------------- norms, rotary, dropout, MLP

// y = norm(x), or +=; stats[row] = (mean, 1/σ) in f32. weight, bias [width] in f32; bias may be null.
// layer: 1 layer norm, 0 RMS norm. Rows. Kernels::norm_forward.
extern "C" __global__ void __launch_bounds__(1024)
norm_forward(const bfloat16* x, int x_stride, const float* weight, const float* bias,
             float epsilon, bfloat16* y, int y_stride, float* stats, int width, int layer,
             int accumulate) {
    norm_forward_row(x, x_stride, weight, bias, epsilon, y, y_stride, stats, width, layer,
                     accumulate);
}

// dx += ∂norm/∂x · dy. Rows. Kernels::norm_backward.
extern "C" __global__ void __launch_bounds__(1024)
norm_backward(const bfloat16* dy, int dy_stride, const bfloat16* x, int x_stride,
              const float* weight, const float* stats, bfloat16* dx, int dx_stride, int width,
              int layer) {
    norm_backward_row(dy, dy_stride, x, x_stride, weight, stats, dx, dx_stride, width, layer);
}

// to = [norm(q) | norm(k) | v]: RMS norms, as wide as their weights in f32. Rows of all three bands, at
// most 256 threads. Kernels::head_norms.
extern "C" __global__ void __launch_bounds__(256)
head_norms(const bfloat16* qkv, int stride, const float* q_weight, const float* k_weight,
           float epsilon, bfloat16* to, int to_stride, int q_norms, int k_norms, int q_width,
           int k_width, int v_width) {
    const HeadNorms norms = {q_weight, k_weight, epsilon, q_norms,
                             k_norms,  q_width,  k_width, v_width};
    norm_heads(norms, qkv, stride, to, to_stride);
}

// Gradients of norm(q) and norm(k) in dqkv become those of q and k in qkv. Rows, at most
// 256 threads. Kernels::head_norms_backward.
extern "C" __global__ void __launch_bounds__(256)
head_norms_backward(const bfloat16* qkv, int stride, const float* q_weight, const float* k_weight,
                    float epsilon, bfloat16* dqkv, int d_stride, int q_norms, int k_norms,
                    int q_width, int k_width, int v_width) {
    const HeadNorms norms = {q_weight, k_weight, epsilon, q_norms,
                             k_norms,  q_width,  k_width, v_width};
    norm_heads_gradient(norms, qkv, stride, dqkv, d_stride);
}

// Rotates the first `heads` heads of each row in place (q and k: H + K). cos, sin: f32
// [rows, rotary_dim / 2]. query_scale: null, or f32 [rows] for the first `queries` of them. Rows.
// Kernels::rotary.
extern "C" __global__ void __launch_bounds__(1024)
rotary(bfloat16* qkv, int stride, const float* cos, const float* sin, const float* query_scale,
       int queries, int heads, int head_dim, int rotary_dim, int neighbours, int backward) {
    rotate(qkv, stride, cos, sin, query_scale, queries, heads, head_dim, rotary_dim, neighbours,
           backward);
}

// y = x ∘ mask · kept, or +=; element (row, column) has index first + row·width + column in the stream.
// key0, key1, step: random::Stream::parts(); threshold = round(p·2³²), kept = 1 / (1 − p), or 0 for
// p ≥ 1. Rows. Kernels::dropout.
extern "C" __global__ void __launch_bounds__(1024)
dropout(const bfloat16* x, int x_stride, bfloat16* y, int y_stride, int width,
        unsigned long long first, unsigned key0, unsigned key1, unsigned long long step,
        unsigned long long threshold, float kept, int accumulate) {
    dropout_row(DropoutMask{key0, key1, step, threshold, kept}, first, x, x_stride, y, y_stride,
                width, accumulate);
}

// x += −amplitude + 2·amplitude·u, u uniform in [0, 1): element (row, column) has index first +
// row·width + column in the stream. Rows. Kernels::add_noise.
extern "C" __global__ void __launch_bounds__(1024)
add_noise(bfloat16* x, int stride, int width, unsigned long long first, unsigned key0, unsigned key1,
          unsigned long long step, float amplitude) {
    add_noise_row(UniformNoise{key0, key1, step, amplitude}, first, x, stride, width);
}

// out = act(gate) ∘ up, or act(up) if gate is null. activation: 0 SiLU, 1 GELU, 2 GELU (tanh).
// Rows. Kernels::mlp_forward.
extern "C" __global__ void __launch_bounds__(1024)
mlp_forward(int activation, const bfloat16* gate, int gate_stride, const bfloat16* up,
            int up_stride, bfloat16* out, int out_stride, int width) {
    with_activation(activation,
                    MlpForwardRow{gate, gate_stride, up, up_stride, out, out_stride, width});
}

// d_gate, d_up from d_out; without a gate d_up alone (d_gate is not touched). d_gate or d_up may be
// d_out itself, or gate and up. Rows. Kernels::mlp_backward.
extern "C" __global__ void __launch_bounds__(1024)
mlp_backward(int activation, const bfloat16* gate, int gate_stride, const bfloat16* up,
             int up_stride, const bfloat16* d_out, int d_out_stride, bfloat16* d_gate,
             int d_gate_stride, bfloat16* d_up, int d_up_stride, int width) {
    with_activation(activation, MlpBackwardRow{gate, gate_stride, up, up_stride, d_out,
                                               d_out_stride, d_gate, d_gate_stride, d_up,
                                               d_up_stride, width});
}

// mlp_forward of a gated MLP, and what an adapter of up to 16 or 32 columns on the down projection reads of
// it: inner [strips, rows, R], h · Aᵀ for each strip of 512 columns, in f32, for mlp_adapters_project. out
// may be null. A [rank, width], on 4 bytes. All else lies as for mlp_adapters_backward, and chunks and
// threads are its. Dynamic shared memory: 98304 bytes.
#define NIBBLE_MLP_ADAPTERS_FORWARD(R)                                                            \
    (int activation, const bfloat16* gate, int gate_stride, const bfloat16* up, int up_stride,    \
     bfloat16* out, int out_stride, const bfloat16* a, int rank, int rows, int width,             \
     int chunk_rows, float* inner) {                                                              \
        const MlpInputs at = {gate,       gate_stride, up,    up_stride, out,                     \
                              out_stride, rows,        width, activation};                        \
        mlp_adapters_forward<R>(at, a, rank, chunk_rows, inner);                                  \
    }
extern "C" __global__ void __launch_bounds__(256)
mlp_adapters_forward_16 NIBBLE_MLP_ADAPTERS_FORWARD(16)
extern "C" __global__ void __launch_bounds__(256)
mlp_adapters_forward_32 NIBBLE_MLP_ADAPTERS_FORWARD(32)

// ax [rows, rank] in bf16 from `inner`, the sum of its strips. ax on 4 bytes, its stride even. `columns`
// is R. Flat over rows·columns/2.
extern "C" __global__ void __launch_bounds__(256)
mlp_adapters_project(const float* inner, int strips, int rows, int columns, int rank, bfloat16* ax,
                     int ax_stride) {
    mlp_write_projection(inner, strips, rows, columns, rank, ax, ax_stride);
}

// mlp_backward of a gated MLP, with what adapters of up to 16 or 32 columns on gate, up and down take of it:
//   inner      [strips, rows, 2·R]        dg · B_gate beside du · B_up, a part for each strip of columns
//   gradients  [chunks, 3, R, width]      ax_gateᵀ · dg, ax_upᵀ · du, t_downᵀ · h, for each chunk of rows
// in f32, unscaled, for mlp_adapters_inner and mlp_adapters_gradients. B [width, rank]. All pointers but
// those of f32 and B lie on 16 bytes, with strides of 8; width and ranks are multiples of 8. d_gate may
// be d_out. Grid (strips, chunks): strips of 8192 / R columns, chunks of chunk_rows, a multiple of 16.
// Blocks of exactly 256 threads. Dynamic shared memory: 101376 bytes for 16, 82944 for 32.
#define NIBBLE_MLP_ADAPTERS_BACKWARD(R)                                                           \
    (int activation, const bfloat16* gate, int gate_stride, const bfloat16* up, int up_stride,    \
     const bfloat16* d_out, int d_out_stride, bfloat16* d_gate, int d_gate_stride,                \
     bfloat16* d_up, int d_up_stride, const bfloat16* b_gate, int rank_gate,                      \
     const bfloat16* b_up, int rank_up, const bfloat16* ax_gate, const bfloat16* ax_up,           \
     int ax_stride, const bfloat16* t_down, int t_stride, int rank_down, int rows, int width,     \
     int chunk_rows, float* inner, float* gradients) {                                            \
        const MlpGradientInputs at = {gate,   gate_stride,   up,   up_stride,   d_out,            \
                                      d_out_stride, d_gate, d_gate_stride, d_up, d_up_stride,     \
                                      rows,   width,         activation};                         \
        const MlpAdapters adapters = {b_gate,   b_up,      ax_gate, ax_up,    ax_stride, t_down,  \
                                      t_stride, rank_gate, rank_up, rank_down};                   \
        mlp_adapters_backward<R>(at, adapters, chunk_rows, inner, gradients);                     \
    }
extern "C" __global__ void __launch_bounds__(256)
mlp_adapters_backward_16 NIBBLE_MLP_ADAPTERS_BACKWARD(16)
extern "C" __global__ void __launch_bounds__(256)
mlp_adapters_backward_32 NIBBLE_MLP_ADAPTERS_BACKWARD(32)

// t of gate and up from `inner`: scale · the sum of its strips, behind the rows of dg and of du, and both
// beside each other, on 4 bytes. `columns` is R. Flat over rows·columns.
extern "C" __global__ void __launch_bounds__(256)
mlp_adapters_inner(const float* inner, int strips, int rows, int columns, int rank_gate, int rank_up,
                   float scale_gate, float scale_up, bfloat16* t_gate, int t_gate_stride,
                   bfloat16* t_up, int t_up_stride, bfloat16* both, int both_stride) {
    mlp_write_t(inner, strips, rows, columns, {rank_gate, rank_up}, {scale_gate, scale_up}, t_gate,
                t_gate_stride, t_up, t_up_stride, both, both_stride);
}

// Adds scale · the sum of the chunks of `gradients` to those of B of gate and up [width, rank], and of A
// of down [rank, width]. Grid (ceil(width / 256), 3·R/8) of exactly 256 threads.
extern "C" __global__ void __launch_bounds__(256)
mlp_adapters_gradients(const float* gradients, int chunks, int ranks, int width, int rank_gate,
                       int rank_up, int rank_down, float scale_gate, float scale_up, float* gb_gate,
                       float* gb_up, float* ga_down) {
    const int each = ranks / 8, which = blockIdx.y / each, first = 8 * (blockIdx.y % each);
    const int column = 256 * blockIdx.x + threadIdx.x;
    if (column >= width) return;
    const MlpGradients sums = {gradients, chunks, ranks, width};
    if (which == 0 && first < rank_gate) {
        sums.add_b(gb_gate, rank_gate, scale_gate, which, first, column);
    } else if (which == 1 && first < rank_up) {
        sums.add_b(gb_up, rank_up, scale_up, which, first, column);
    } else if (which == 2 && first < rank_down) {
        sums.add_a(ga_down, first, column);
    }
}

// ---------------------------------------------------------------- loss

// losses[row] and hits[row] in f32; with `gradient`, logits become scale · ∂loss/∂logits. A target ≥ vocab_size
// does not count. soft_cap 0: none. Rows of up to 512 threads. Kernels::cross_entropy; the sums are
// sum_f32's.
extern "C" __global__ void __launch_bounds__(512)
cross_entropy_bf16(bfloat16* logits, int stride, const u32* targets, int vocab_size, float scale,
                   int gradient, float soft_cap, float* losses, float* hits) {
    cross_entropy_row(logits, stride, targets, vocab_size, scale, gradient, SoftCap{soft_cap},
                      losses, hits);
}

// statistics[row] = {maximum, Σ e^{z − maximum}, the target's z} of the tiles so far: those of columns
// `first`.. of the vocabulary added to what was there, or with `fresh` alone. Rows of up to
// 512 threads. Kernels::head_loss of a head in tiles.
extern "C" __global__ void __launch_bounds__(512)
tile_statistics(const bfloat16* logits, int stride, int columns, const u32* targets, int first,
                int fresh, float soft_cap, TileStatistics* statistics) {
    tile_statistics_row(logits, stride, columns, targets, first, fresh, SoftCap{soft_cap},
                        statistics);
}

// losses[row] and hits[row] once all tiles were added; 0 for a target ≥ vocab_size. Flat.
extern "C" __global__ void __launch_bounds__(256)
tile_losses(const TileStatistics* statistics, const u32* targets, int vocab_size, int rows,
            float* losses, float* hits) {
    const int first = blockIdx.x * blockDim.x + threadIdx.x;
    for (int row = first; row < rows; row += gridDim.x * blockDim.x) {
        const bool counts = targets[row] < static_cast<u32>(vocab_size);
        losses[row] = tile_loss(statistics[row], counts);
        hits[row] = tile_hit(statistics[row], counts);
    }
}

// The tile's logits become scale · ∂loss/∂logits. Rows of up to 512 threads.
extern "C" __global__ void __launch_bounds__(512)
tile_gradient(bfloat16* logits, int stride, int columns, const u32* targets, int first,
              int vocab_size, float scale, float soft_cap, const TileStatistics* statistics) {
    tile_gradient_row(logits, stride, columns, targets, first, vocab_size, scale,
                      SoftCap{soft_cap}, statistics);
}

// ---------------------------------------------------------------- sums

// partial[block] = the block's share of Σ x, in f64. Flat; at most 1024 blocks are useful, and the
// result depends on their number.
extern "C" __global__ void __launch_bounds__(1024)
sum_f32(const float* x, long long elements, double* partial) {
    sum_stage_one<Term::Value>(x, elements, partial);
}

// The same of Σ x².
extern "C" __global__ void __launch_bounds__(1024)
sum_squares_f32(const float* x, long long elements, double* partial) {
    sum_stage_one<Term::Square>(x, elements, partial);
}

// *result = Σ partial[..count], or +=. One block.
extern "C" __global__ void __launch_bounds__(1024)
sum_partials(const double* partial, int count, double* result, int accumulate) {
    sum_stage_two(partial, count, result, accumulate);
}

// ---------------------------------------------------------------- attention, exact, in row blocks

// Softmax of a block of products q·k [heads, rows, keys] of one document. Row r is token
// first_query + r, column c token first_key + c (counted in the same stream); query t sees keys
// t + 1 − window ..= t (window 0: all before it) among those columns. Probabilities in bf16, 0
// where not seen. lse[(first_query + r)·lse_stride + first_head + h].
// soft_cap 0: none. Grid (rows, heads), 256 threads. Exact attention, forward.
extern "C" __global__ void __launch_bounds__(1024)
attention_softmax(const float* products, long long products_head_stride, int products_stride,
                  bfloat16* probabilities, long long probabilities_head_stride,
                  int probabilities_stride, float* lse, int lse_stride, int first_head,
                  int first_query, int first_key, int keys, int window, float scale,
                  float soft_cap) {
    const int row = blockIdx.x, head = blockIdx.y;
    const ScoreBlock block = {first_query, first_key, keys, window};
    const i64 token = first_query + row;
    attention_softmax_row(
        ScoreMap{scale, soft_cap},
        row_of(products + head * products_head_stride, row, products_stride),
        row_of(probabilities + head * probabilities_head_stride, row, probabilities_stride),
        row_of(lse, token, lse_stride) + first_head + head, block.begin(row), block.end(row), keys);
}

// Probabilities again from products and lse, and the gradient of the products,
// scale · cap' · p·(d_probabilities − delta), both bf16 and laid out as `probabilities`;
// d_probabilities = do·vᵀ in f32, laid out as products; delta as lse. So dq = d_products·k,
// dk = d_productsᵀ·q, dv = probabilitiesᵀ·do. Grid (rows, heads), 256 threads.
extern "C" __global__ void __launch_bounds__(1024)
attention_softmax_backward(const float* products, const float* d_probabilities,
                           long long products_head_stride, int products_stride,
                           bfloat16* probabilities, bfloat16* d_products,
                           long long probabilities_head_stride, int probabilities_stride,
                           const float* lse, const float* delta, int lse_stride, int first_head,
                           int first_query, int first_key, int keys, int window, float scale,
                           float soft_cap) {
    const int row = blockIdx.x, head = blockIdx.y;
    const ScoreBlock block = {first_query, first_key, keys, window};
    const i64 statistic = static_cast<i64>(first_query + row) * lse_stride + first_head + head;
    const i64 from = head * products_head_stride + static_cast<i64>(row) * products_stride;
    const i64 to =
        head * probabilities_head_stride + static_cast<i64>(row) * probabilities_stride;
    attention_softmax_backward_row(ScoreMap{scale, soft_cap}, products + from,
                                   d_probabilities + from, lse[statistic], delta[statistic],
                                   probabilities + to, d_products + to, block.begin(row),
                                   block.end(row), keys);
}

// delta[row·heads + head] = Σ d_o ∘ o over the head's columns. Grid (rows), 32·n threads.
extern "C" __global__ void __launch_bounds__(1024)
attention_delta(const bfloat16* d_o, int d_o_stride, const bfloat16* o, int o_stride, float* delta,
                int heads, int head_dim) {
    const i64 row = blockIdx.x;
    for (int head = threadIdx.x / 32; head < heads; head += blockDim.x / 32) {
        attention_delta_row(row_of(d_o, row, d_o_stride) + head * head_dim,
                            row_of(o, row, o_stride) + head * head_dim, delta + row * heads + head,
                            head_dim);
    }
}

// Attention of new tokens to the cache: row r of q (and o) is token past + r, which sees cached rows
// ..= past + r (within window). q row: heads·head_dim from its first element on. keys, values:
// row 0 of the cache, head kv at column kv·head_dim, cache_stride apart. head_dim ≤ 256.
// Grid (rows, heads), exactly 256 threads. Kernels::attention_cached, after the cache was appended
// to with scale_rows_bf16.
extern "C" __global__ void __launch_bounds__(256, 4)
attention_decode(const bfloat16* q, int q_stride, const bfloat16* keys, const bfloat16* values,
                 int cache_stride, bfloat16* o, int o_stride, int heads, int kv_heads,
                 int head_dim, int past, int window, float scale, float soft_cap) {
    const int row = blockIdx.x, head = blockIdx.y, kv_head = head / (heads / kv_heads);
    const int end = past + row + 1;
    const int begin = window > 0 && end > window ? end - window : 0;
    const DecodeInputs inputs = {row_of(q, row, q_stride) + head * head_dim,
                                 keys + kv_head * head_dim, values + kv_head * head_dim,
                                 cache_stride, head_dim, begin, end};
    decode_attention(ScoreMap{scale, soft_cap}, inputs,
                     row_of(o, row, o_stride) + head * head_dim);
}

// ---------------------------------------------------------------- optimizer

// One update of `elements` parameters; see adamw.cuh for the formula and the coefficients, and
// AdamW::coefficients in src/train/adamw.rs for their values. gradient_scale points to one f32 in
// device memory; working may be null. Flat.
extern "C" __global__ void __launch_bounds__(1024)
adamw(float* master, const float* gradients, float* first_moment, float* second_moment,
      bfloat16* working, long long elements, const float* gradient_scale, float keep,
      float first_weight, float beta2, float second_weight, float second_correction, float epsilon,
      float negative_step) {
    const AdamWCoefficients c = {keep,    first_weight, beta2, second_weight, second_correction,
                                 epsilon, negative_step};
    const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < elements; i += step) {
        const float g = __fmul_rn(gradients[i], *gradient_scale);
        const Moments m = update_moments(c, {first_moment[i], second_moment[i]}, g);
        const float w = update_weight(c, m, master[i]);
        first_moment[i] = m.first;
        second_moment[i] = m.second;
        master[i] = w;
        if (working) working[i] = to_bf16(w);
    }
}

// The same with 8-bit moments: codes [elements], absmax [ceil(elements / 256)], maps [256] in f32
// (codebook.rs' dynamic_map, unsigned_dynamic_map). Fresh moments: absmax 0, any codes. Grid
// ceil(elements / 256), exactly 256 threads.
extern "C" __global__ void __launch_bounds__(256)
adamw_8bit(float* master, const float* gradients, u8* first_codes, float* first_absmax,
           u8* second_codes, float* second_absmax, const float* first_map, const float* second_map,
           bfloat16* working, long long elements, const float* gradient_scale, float keep,
           float first_weight, float beta2, float second_weight, float second_correction,
           float epsilon, float negative_step) {
    NIBBLE_SHARED(float, maps, 2 * 256);
    maps[threadIdx.x] = first_map[threadIdx.x];
    maps[256 + threadIdx.x] = second_map[threadIdx.x];
    __syncthreads();
    const AdamWCoefficients c = {keep,    first_weight, beta2, second_weight, second_correction,
                                 epsilon, negative_step};
    const PackedMoments moments = {first_codes, first_absmax, second_codes, second_absmax};
    const i64 i = static_cast<i64>(blockIdx.x) * MOMENT_BLOCK + threadIdx.x;
    const bool exists = i < elements;
    Moments m = {};
    if (exists) {
        const float g = __fmul_rn(gradients[i], *gradient_scale);
        m = update_moments(c, moments.load(maps, maps + 256, i), g);
        const float w = update_weight(c, m, master[i]);
        master[i] = w;
        if (working) working[i] = to_bf16(w);
    }
    // Its barriers part the reading of absmax from the writing.
    moments.store(maps, maps + 256, i, m, exists);
}

// ---------------------------------------------------------------- attention, flash
//
// One entry a head width (64, 96, 128, 256). q, k, v, d_o: first element of head 0, heads D apart,
// rows *_stride apart; pointers and strides on 16 bytes. Document i has the queries
// q_boundaries[i] .. q_boundaries[i + 1] and the keys k_boundaries[i] ..: the same array in training;
// with more keys than queries the last query sees the last key. Query at position t sees keys
// t + 1 − window ..= t (window 0: all; positions and window together fit an int). lse, delta: f32
// [tokens, heads]. heads is a multiple of kv_heads. soft_cap 0: none. tiles: pairs of a document and
// the number of 64 of its rows, one for each tile of each document, in any order; best is the one in
// which blocks last less and less: src/kernels/cuda/attention/tiles.rs. All blocks have 128 threads but flash_backward_keys_256, which has 256.
// Dynamic shared memory above 48 KiB must be allowed with cuFuncSetAttribute:
//                             64      96      128      256
//   flash_forward          18432   26624    32768    67584
//   flash_backward_keys    37376   53760    66048    84608
//   flash_backward_queries 18432   26624    32768    84480

#define NIBBLE_FLASH_INPUTS                                                                       \
    const bfloat16 *q, int q_stride, const bfloat16 *k, const bfloat16 *v, int kv_stride,         \
        const u32 *q_boundaries, const u32 *k_boundaries, const u32 *tiles, int heads,            \
        int kv_heads, int window, float scale, float soft_cap
#define NIBBLE_FLASH_VALUES                                                                       \
    { q, q_stride, k, v, kv_stride, q_boundaries, k_boundaries, tiles, heads, kv_heads, window,   \
      scale, soft_cap }

// o, lse from q, k, v. Tiles of queries, from the first on. Grid (tiles·heads).
#define NIBBLE_FLASH_FORWARD(D)                                                                   \
    (NIBBLE_FLASH_INPUTS, bfloat16* o, int o_stride, float* lse) {                                \
        const FlashInputs in = NIBBLE_FLASH_VALUES;                                               \
        flash_forward<D>(in, o, o_stride, lse);                                                   \
    }

// dk, dv (overwritten), after attention_delta. Tiles of keys, from the last on. Grid
// (tiles·kv_heads).
#define NIBBLE_FLASH_BACKWARD_KEYS(D)                                                             \
    (NIBBLE_FLASH_INPUTS, const bfloat16* d_o, int d_o_stride, const float* lse,                  \
     const float* delta, bfloat16* dk, bfloat16* dv, int d_kv_stride) {                           \
        const FlashInputs in = NIBBLE_FLASH_VALUES;                                               \
        flash_backward_keys<D>(in, FlashGradients{d_o, d_o_stride, lse, delta}, dk, dv,           \
                               d_kv_stride);                                                      \
    }

// dq (overwritten), after attention_delta. Tiles of queries, from the first on. Grid (tiles·heads).
#define NIBBLE_FLASH_BACKWARD_QUERIES(D)                                                          \
    (NIBBLE_FLASH_INPUTS, const bfloat16* d_o, int d_o_stride, const float* lse,                  \
     const float* delta, bfloat16* dq, int dq_stride) {                                           \
        const FlashInputs in = NIBBLE_FLASH_VALUES;                                               \
        flash_backward_queries<D>(in, FlashGradients{d_o, d_o_stride, lse, delta}, dq,            \
                                  dq_stride);                                                     \
    }

extern "C" __global__ void __launch_bounds__(128) flash_forward_64 NIBBLE_FLASH_FORWARD(64)
extern "C" __global__ void __launch_bounds__(128) flash_forward_96 NIBBLE_FLASH_FORWARD(96)
extern "C" __global__ void __launch_bounds__(128, 3) flash_forward_128 NIBBLE_FLASH_FORWARD(128)
extern "C" __global__ void __launch_bounds__(128) flash_forward_256 NIBBLE_FLASH_FORWARD(256)
extern "C" __global__ void __launch_bounds__(128)
flash_backward_keys_64 NIBBLE_FLASH_BACKWARD_KEYS(64)
extern "C" __global__ void __launch_bounds__(128)
flash_backward_keys_96 NIBBLE_FLASH_BACKWARD_KEYS(96)
extern "C" __global__ void __launch_bounds__(128)
flash_backward_keys_128 NIBBLE_FLASH_BACKWARD_KEYS(128)
extern "C" __global__ void __launch_bounds__(256)
flash_backward_keys_256 NIBBLE_FLASH_BACKWARD_KEYS(256)
extern "C" __global__ void __launch_bounds__(128)
flash_backward_queries_64 NIBBLE_FLASH_BACKWARD_QUERIES(64)
extern "C" __global__ void __launch_bounds__(128)
flash_backward_queries_96 NIBBLE_FLASH_BACKWARD_QUERIES(96)
extern "C" __global__ void __launch_bounds__(128)
flash_backward_queries_128 NIBBLE_FLASH_BACKWARD_QUERIES(128)
extern "C" __global__ void __launch_bounds__(128)
flash_backward_queries_256 NIBBLE_FLASH_BACKWARD_QUERIES(256)
