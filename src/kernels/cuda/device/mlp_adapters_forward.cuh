// The gated MLP's nonlinearity and what the adapter of the down projection reads of it, in one pass:
//
//   h = a(g) ∘ u            [rows, width], where it is wanted
//   inner: h · Aᵀ           [rows, R]: sums over columns
//
// The product alone would read h once more; a block whose activations are made again needs no h at all.
#pragma once
#include "mlp_adapters.cuh"

/// Shapes for an adapter of up to R columns, 16 or 32.
template <int R>
struct MlpForwardShape {
    static constexpr int WARPS = 8, COLUMNS = 64, STRIP = WARPS * COLUMNS, STAGES = 3;
    static constexpr u32 TILE = 2 * MLP_ROWS * COLUMNS, WARP_STAGE = 2 * TILE;
    static constexpr u32 STAGE = WARPS * WARP_STAGE;
    static constexpr int AT_ONCE = R / 8;  // products of 16×8 that the warps add up at once: all
};

/// What the kernel reads and writes, as the entry has it.
struct MlpInputs {
    const bfloat16* gate;
    int gate_stride;
    const bfloat16* up;
    int up_stride;
    bfloat16* out;  // may be null
    int out_stride, rows, width, activation;
};

/// A lane's pieces of a warp's part of a stage: g becomes h there, and where it belongs.
struct MlpForwardTile {
    unsigned char* stage;
    const MlpInputs& at;
    int row, column, end;

    template <int Activation>
    __device__ __forceinline__ void run() const {
        typedef MlpForwardShape<16> Shape;  // tiles are alike
        typedef Patch<Shape::COLUMNS> Tile;
        const int lane = threadIdx.x % 32, c = column + Tile::column(lane);
#pragma unroll
        for (int first = 0; first < MLP_ROWS; first += Tile::DOWN) {
            const int inside = first + Tile::row(lane);
            unsigned char* place = stage + Tile::place(inside, lane);
            const Piece<8> g = load_piece<8>(reinterpret_cast<const bfloat16*>(place));
            const Piece<8> u = load_piece<8>(reinterpret_cast<const bfloat16*>(place + Shape::TILE));
            Words4 h;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                h.word[i] = pack_bf16(u.v[2 * i] * activate<Activation>(g.v[2 * i]).value,
                                      u.v[2 * i + 1] * activate<Activation>(g.v[2 * i + 1]).value);
            }
            *reinterpret_cast<Words4*>(place) = h;
            if (at.out && row + inside < end && c < at.width) {
                store_words(row_of(at.out, row + inside, at.out_stride) + c, h.word[0], h.word[1],
                            h.word[2], h.word[3]);
            }
        }
    }
};

/// A block's strip and chunk; A `[rank, width]`, `inner` [strips, rows, R] in f32.
template <int R>
__device__ __forceinline__ void mlp_adapters_forward(const MlpInputs& at, const bfloat16* a, int rank,
                                                     int chunk_rows, float* inner) {
    typedef MlpForwardShape<R> Shape;
    static_assert(Shape::STAGES * Shape::STAGE == 98304, "what a launch gives");
    typedef Patch<Shape::COLUMNS> Tile;
    constexpr int ACROSS = Shape::COLUMNS / 16, RANKS = R / 8;
    NIBBLE_DYNAMIC_SHARED(unsigned char, shared_memory);
    const SharedAddress shared = shared_address(shared_memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int column = blockIdx.x * Shape::STRIP + warp * Shape::COLUMNS;
    const int begin = blockIdx.y * chunk_rows;
    const int end = begin + chunk_rows < at.rows ? begin + chunk_rows : at.rows;
    const int tiles = (end - begin + MLP_ROWS - 1) / MLP_ROWS;
    const auto start = [&](u32 stage, int row) {
        const SharedAddress own = shared + stage + warp * Shape::WARP_STAGE;
        Tile::start(own, at.gate, at.gate_stride, row, end, column, at.width);
        Tile::start(own + Shape::TILE, at.up, at.up_stride, row, end, column, at.width);
        copy_async_commit();
    };
#pragma unroll
    for (int stage = 0; stage < Shape::STAGES; stage++) {
        start(stage * Shape::STAGE, begin + stage * MLP_ROWS);
    }
    // Two elements of a row of A, as a right operand has them; zeros beside it.
    u32 right[ACROSS][RANKS][2];
#pragma unroll
    for (int k = 0; k < ACROSS; k++) {
#pragma unroll
        for (int n = 0; n < RANKS; n++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int c = column + 16 * k + 8 * half + fragment_column(0), r = 8 * n + lane / 4;
                const bool present = c < at.width && r < rank;
                right[k][n][half] =
                    present ? *reinterpret_cast<const u32*>(row_of(a, r, at.width) + c) : 0;
            }
        }
    }
    inner += static_cast<i64>(blockIdx.x) * at.rows * R;
    int place = 0;
    for (int tile = 0; tile < tiles; tile++) {
        const int row = begin + tile * MLP_ROWS;
        const u32 stage = place * Shape::STAGE, own = stage + warp * Shape::WARP_STAGE;
        copy_async_wait<Shape::STAGES - 1>();
        with_activation(at.activation, MlpForwardTile{shared_memory + own, at, row, column, end});
        __syncwarp();  // all lanes have made their h
        float sums[RANKS][4];
        clear(sums);
#pragma unroll
        for (int k = 0; k < ACROSS; k++) {
            u32 rows[4];
            load_matrices(rows, shared + own + Tile::offset(lane % 16, 2 * k + lane / 16));
#pragma unroll
            for (int n = 0; n < RANKS; n++) {
                mma_16x8x16(sums[n], rows, right[k][n][0], right[k][n][1]);
            }
        }
        __syncwarp();  // all lanes have read it
        mlp_show_products(shared_memory + own, sums, 0, RANKS);
        __syncthreads();  // all have written theirs
        mlp_add_warps<Shape>(shared_memory + stage, inner, R, 0, row, end);
        __syncthreads();  // all have read the stage
        start(stage, row + Shape::STAGES * MLP_ROWS);
        place = place + 1 < Shape::STAGES ? place + 1 : 0;
    }
    copy_async_wait<0>();  // none outlives the block
}

/// `x·Aᵀ` in bf16 from the sums of strips. A thread has two columns of a row.
__device__ __forceinline__ void mlp_write_projection(const float* inner, int strips, int rows,
                                                     int columns, int rank, bfloat16* ax,
                                                     int stride) {
    const i64 all = static_cast<i64>(rows) * (columns / 2);
    const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < all; i += step) {
        const i64 row = i / (columns / 2);
        const int column = static_cast<int>(i % (columns / 2)) * 2;
        if (column >= rank) continue;
        const Pair sum = mlp_add_strips(inner, strips, 2 * all, 2 * i);
        *reinterpret_cast<u32*>(row_of(ax, row, stride) + column) = pack_bf16(sum.x, sum.y);
    }
}
