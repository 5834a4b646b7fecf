// The backward pass of the gated MLP's nonlinearity with the adapters' share of it, in one pass over
// the widest matrices of a block.
//
//   h = a(g) ∘ u,  dg = dh ∘ u ∘ a'(g),  du = dh ∘ a(g)       [rows, width], in registers, then shared
//   inner:      dg · B_gate,  du · B_up                       [rows, R]: sums over columns
//   gradients:  ax_gateᵀ · dg,  ax_upᵀ · du,  t_downᵀ · h     [R, width]: sums over rows
//
// One by one these read dg and du three times, h twice and write it. A warp's sums over the rows of its
// chunk stay in its registers; those of chunks are left to a small kernel.
#pragma once
#include "mlp_adapters.cuh"

/// Matrices of a stage: g, u and dh, which become dg, du and h.
constexpr int MLP_MATRICES = 3;

/// Shapes for adapters of up to R columns, 16 or 32.
template <int R>
struct MlpBackwardShape {
    static constexpr int WARPS = 8;
    static constexpr int COLUMNS = 1024 / R;  // of a warp: its sums over rows take 96 registers
    static constexpr int STRIP = WARPS * COLUMNS;
    static constexpr int STAGES = R == 16 ? 2 : 3;
    static constexpr u32 TILE = 2 * MLP_ROWS * COLUMNS, WARP_STAGE = MLP_MATRICES * TILE;
    static constexpr u32 INNER_TILE = 2 * MLP_ROWS * R, INNER = WARPS * WARP_STAGE;
    static constexpr u32 STAGE = INNER + MLP_MATRICES * INNER_TILE;
    static constexpr int AT_ONCE = 4;  // products of 16×8 that the warps add up at once
};

/// What the kernel reads and writes, as the entry has it.
struct MlpGradientInputs {
    const bfloat16* gate;
    int gate_stride;
    const bfloat16* up;
    int up_stride;
    const bfloat16* d_out;
    int d_out_stride;
    bfloat16* d_gate;
    int d_gate_stride;
    bfloat16* d_up;
    int d_up_stride;
    int rows, width, activation;
};

/// The adapters' matrices: B `[width, rank]`, and what the sums over rows multiply, `[rows, rank]`.
struct MlpAdapters {
    const bfloat16* b_gate;
    const bfloat16* b_up;
    const bfloat16* ax_gate;
    const bfloat16* ax_up;
    int ax_stride;
    const bfloat16* t_down;
    int t_stride;
    int rank_gate, rank_up, rank_down;
};

/// A lane's pieces of a warp's part of a stage: g, u and dh become dg, du and h there, and the first
/// two go where they belong.
template <int R>
struct MlpBackwardTile {
    unsigned char* stage;
    const MlpGradientInputs& at;
    int row, column, end;

    template <int Activation>
    __device__ __forceinline__ void run() const {
        typedef MlpBackwardShape<R> Shape;
        typedef Patch<Shape::COLUMNS> Tile;
        const int lane = threadIdx.x % 32, c = column + Tile::column(lane);
#pragma unroll
        for (int first = 0; first < MLP_ROWS; first += Tile::DOWN) {
            const int inside = first + Tile::row(lane);
            unsigned char* place = stage + Tile::place(inside, lane);
            const Piece<8> g = load_piece<8>(reinterpret_cast<const bfloat16*>(place));
            const Piece<8> u = load_piece<8>(reinterpret_cast<const bfloat16*>(place + Shape::TILE));
            const Piece<8> d =
                load_piece<8>(reinterpret_cast<const bfloat16*>(place + 2 * Shape::TILE));
            Words4 d_gate, d_up, h;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const ValueAndSlope x = activate<Activation>(g.v[2 * i]);
                const ValueAndSlope y = activate<Activation>(g.v[2 * i + 1]);
                const float d0 = d.v[2 * i], d1 = d.v[2 * i + 1];
                const float u0 = u.v[2 * i], u1 = u.v[2 * i + 1];
                d_gate.word[i] = pack_bf16(d0 * (u0 * x.slope), d1 * (u1 * y.slope));
                d_up.word[i] = pack_bf16(d0 * x.value, d1 * y.value);
                h.word[i] = pack_bf16(u0 * x.value, u1 * y.value);
            }
            *reinterpret_cast<Words4*>(place) = d_gate;
            *reinterpret_cast<Words4*>(place + Shape::TILE) = d_up;
            *reinterpret_cast<Words4*>(place + 2 * Shape::TILE) = h;
            if (row + inside < end && c < at.width) {
                store_words(row_of(at.d_gate, row + inside, at.d_gate_stride) + c, d_gate.word[0],
                            d_gate.word[1], d_gate.word[2], d_gate.word[3]);
                store_words(row_of(at.d_up, row + inside, at.d_up_stride) + c, d_up.word[0],
                            d_up.word[1], d_up.word[2], d_up.word[3]);
            }
        }
    }
};

/// Starts copying 16 rows from `row` on to a stage, zeros after `end` and beside the matrices.
template <int R>
__device__ __forceinline__ void mlp_start(SharedAddress stage, const MlpGradientInputs& at,
                                          const MlpAdapters& adapters, int row, int column, int end) {
    typedef MlpBackwardShape<R> Shape;
    typedef Patch<Shape::COLUMNS> Tile;
    const SharedAddress own = stage + threadIdx.x / 32 * Shape::WARP_STAGE;
    Tile::start(own, at.gate, at.gate_stride, row, end, column, at.width);
    Tile::start(own + Shape::TILE, at.up, at.up_stride, row, end, column, at.width);
    Tile::start(own + 2 * Shape::TILE, at.d_out, at.d_out_stride, row, end, column, at.width);
    typedef Patch<R> Inner;
    constexpr int EACH = MLP_ROWS * Inner::PIECES;
    const int which = threadIdx.x / EACH;
    if (which < MLP_MATRICES) {
        const int inside = threadIdx.x % EACH / Inner::PIECES;
        const int number = threadIdx.x % Inner::PIECES;
        const int rank = which == 0 ? adapters.rank_gate
                         : which == 1 ? adapters.rank_up
                                      : adapters.rank_down;
        const bfloat16* from = which == 0 ? adapters.ax_gate
                               : which == 1 ? adapters.ax_up
                                            : adapters.t_down;
        const int stride = which == 2 ? adapters.t_stride : adapters.ax_stride;
        copy_async_16(stage + Shape::INNER + which * Shape::INNER_TILE + Inner::offset(inside, number),
                      row_of(from, row + inside, stride) + 8 * number,
                      row + inside < end && 8 * number < rank);
    }
}

/// Two elements of B `[width, rank]` below each other, as a right operand has them; zeros beside it.
__device__ __forceinline__ u32 mlp_fragment(const bfloat16* b, int width, int rank, int row,
                                            int column) {
    if (row >= width || column >= rank) return 0;  // widths are even
    const bfloat16* at = row_of(b, row, rank) + column;
    return static_cast<u32>(at[0].bits) | static_cast<u32>(at[rank].bits) << 16;
}

/// A block's strip and chunk; `inner` [strips, rows, 2·R] and `gradients` [chunks, 3, R, width] in f32.
template <int R>
__device__ __forceinline__ void mlp_adapters_backward(const MlpGradientInputs& at,
                                                      const MlpAdapters& adapters, int chunk_rows,
                                                      float* inner, float* gradients) {
    typedef MlpBackwardShape<R> Shape;
    static_assert(Shape::STAGES * Shape::STAGE == (R == 16 ? 101376 : 82944), "what a launch gives");
    typedef Patch<Shape::COLUMNS> Tile;
    typedef Patch<R> Inner;
    constexpr int ACROSS = Shape::COLUMNS / 16, RANKS = R / 8;
    NIBBLE_DYNAMIC_SHARED(unsigned char, shared_memory);
    const SharedAddress shared = shared_address(shared_memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int column = blockIdx.x * Shape::STRIP + warp * Shape::COLUMNS;
    const int begin = blockIdx.y * chunk_rows;
    const int end = begin + chunk_rows < at.rows ? begin + chunk_rows : at.rows;
    const int tiles = (end - begin + MLP_ROWS - 1) / MLP_ROWS;
#pragma unroll
    for (int stage = 0; stage < Shape::STAGES; stage++) {
        mlp_start<R>(shared + stage * Shape::STAGE, at, adapters, begin + stage * MLP_ROWS, column,
                     end);
        copy_async_commit();
    }
    u32 b[2][ACROSS][RANKS][2];
#pragma unroll
    for (int k = 0; k < ACROSS; k++) {
#pragma unroll
        for (int n = 0; n < RANKS; n++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = column + 16 * k + 8 * half + lane % 4 * 2, c = 8 * n + lane / 4;
                b[0][k][n][half] =
                    mlp_fragment(adapters.b_gate, at.width, adapters.rank_gate, row, c);
                b[1][k][n][half] = mlp_fragment(adapters.b_up, at.width, adapters.rank_up, row, c);
            }
        }
    }
    float sums[MLP_MATRICES][R / 16][2 * ACROSS][4];
#pragma unroll
    for (int which = 0; which < MLP_MATRICES; which++) {
#pragma unroll
        for (int m = 0; m < R / 16; m++) clear(sums[which][m]);
    }
    inner += static_cast<i64>(blockIdx.x) * at.rows * (2 * R);
    int place = 0;
    for (int tile = 0; tile < tiles; tile++) {
        const int row = begin + tile * MLP_ROWS;
        const u32 stage = place * Shape::STAGE, own = stage + warp * Shape::WARP_STAGE;
        copy_async_wait<Shape::STAGES - 1>();
        __syncthreads();  // all have the rows of the adapters
        with_activation(at.activation, MlpBackwardTile<R>{shared_memory + own, at, row, column, end});
        __syncwarp();
        float t[2 * RANKS][4];
        clear(t);
#pragma unroll
        for (int which = 0; which < MLP_MATRICES; which++) {
            const int outer = which < 2 ? which : 0;  // of gate or up: h has no sums over columns
            u32 left[R / 16][4];
#pragma unroll
            for (int m = 0; m < R / 16; m++) {
                load_matrices_transposed(
                    left[m], shared + stage + Shape::INNER + which * Shape::INNER_TILE +
                                 Inner::offset(lane % 8 + lane / 16 * 8, 2 * m + lane / 8 % 2));
            }
#pragma unroll
            for (int k = 0; k < ACROSS; k++) {
                const SharedAddress block = shared + own + which * Shape::TILE +
                                            Tile::offset(lane % 16, 2 * k + lane / 16);
                u32 right[4];
                load_matrices_transposed(right, block);
#pragma unroll
                for (int m = 0; m < R / 16; m++) {
                    mma_16x8x16(sums[which][m][2 * k], left[m], right[0], right[1]);
                    mma_16x8x16(sums[which][m][2 * k + 1], left[m], right[2], right[3]);
                }
                if (which == 2) continue;
                u32 rows[4];
                load_matrices(rows, block);
#pragma unroll
                for (int n = 0; n < RANKS; n++) {
                    const u32(&of)[2] = b[outer][k][n];
                    mma_16x8x16(t[outer * RANKS + n], rows, of[0], of[1]);
                }
            }
        }
        __syncwarp();  // all lanes have read the stage
#pragma unroll
        for (int first = 0; first < 2 * RANKS; first += Shape::AT_ONCE) {
            if (first > 0) __syncthreads();  // all have read the last products
            mlp_show_products(shared_memory + own, t, first, Shape::AT_ONCE);
            __syncthreads();  // all have written theirs
            mlp_add_warps<Shape>(shared_memory + stage, inner, 2 * R, 8 * first, row, end);
        }
        __syncthreads();  // all have read the stage
        mlp_start<R>(shared + stage, at, adapters, row + Shape::STAGES * MLP_ROWS, column, end);
        copy_async_commit();
        place = place + 1 < Shape::STAGES ? place + 1 : 0;
    }
    copy_async_wait<0>();  // none outlives the block
#pragma unroll
    for (int which = 0; which < MLP_MATRICES; which++) {
#pragma unroll
        for (int m = 0; m < R / 16; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const i64 matrix = static_cast<i64>(blockIdx.y) * MLP_MATRICES + which;
                float* line = gradients + (matrix * R + 16 * m + fragment_row(2 * half)) * at.width;
#pragma unroll
                for (int n = 0; n < 2 * ACROSS; n++) {
                    const int c = column + 8 * n + fragment_column(0);
                    if (c >= at.width) continue;
                    const float(&sum)[4] = sums[which][m][n];
                    *reinterpret_cast<Pair*>(line + c) = Pair{sum[2 * half], sum[2 * half + 1]};
                }
            }
        }
    }
}

/// t of gate and up, in bf16: the sums of strips, each times its scale, behind the rows of dg and du,
/// and side by side. A thread has two columns of a row.
__device__ __forceinline__ void mlp_write_t(const float* inner, int strips, int rows, int columns,
                                            const int (&ranks)[2], const float (&scales)[2],
                                            bfloat16* gate, int gate_stride, bfloat16* up,
                                            int up_stride, bfloat16* both, int both_stride) {
    const i64 all = static_cast<i64>(rows) * columns;
    const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < all; i += step) {
        const i64 row = i / columns;
        const int pair = static_cast<int>(i % columns), which = 2 * pair >= columns;
        const int column = 2 * pair - which * columns;
        if (column >= (which ? ranks[1] : ranks[0])) continue;
        const Pair sum = mlp_add_strips(inner, strips, 2 * all, 2 * i);
        const float scale = which ? scales[1] : scales[0];
        const u32 word = pack_bf16(scale * sum.x, scale * sum.y);
        bfloat16* behind = which ? row_of(up, row, up_stride) : row_of(gate, row, gate_stride);
        bfloat16* beside = row_of(both, row, both_stride) + which * ranks[0];
        *reinterpret_cast<u32*>(behind + column) = word;
        *reinterpret_cast<u32*>(beside + column) = word;
    }
}

/// Adds the sums of chunks to the gradients of eight rows of A of the down projection `[rank, width]`,
/// or, times their scale, of eight columns of a B `[width, rank]`. A thread has a column of the sums.
struct MlpGradients {
    const float* sums;
    int chunks, ranks, width;

    __device__ __forceinline__ Piece<8> of(int which, int first, int column) const {
        Piece<8> piece = {};
        for (int chunk = 0; chunk < chunks; chunk++) {
            const i64 matrix = static_cast<i64>(chunk) * MLP_MATRICES + which;
            const float* from = sums + (matrix * ranks + first) * width + column;
#pragma unroll
            for (int i = 0; i < 8; i++) piece.v[i] += row_of(from, i, width)[0];
        }
        return piece;
    }
    __device__ __forceinline__ void add_b(float* b, int rank, float scale, int which, int first,
                                          int column) const {
        Piece<8> piece = of(which, first, column);
        float* to = row_of(b, column, rank) + first;
        if (rows_aligned(b, rank)) {
            const Piece<8> before = load_piece<8>(to);
#pragma unroll
            for (int i = 0; i < 8; i++) piece.v[i] = before.v[i] + scale * piece.v[i];
            store_piece(to, piece);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) to[i] += scale * piece.v[i];
        }
    }
    __device__ __forceinline__ void add_a(float* a, int first, int column) const {
        const Piece<8> piece = of(2, first, column);
#pragma unroll
        for (int i = 0; i < 8; i++) row_of(a, first + i, width)[column] += piece.v[i];
    }
};
