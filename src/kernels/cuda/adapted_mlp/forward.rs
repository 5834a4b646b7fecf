//! h, and what the adapter of the down projection reads of it.

use super::{PIECE, aligned, chunk_rows};
use crate::kernels::cuda::Cuda;
use crate::kernels::cuda::driver::{Argument, Driver};
use crate::kernels::cuda::launch::{FLAT_THREADS, flat, launch};
use crate::kernels::cuda::memory::{Buffer, Rows};
use crate::kernels::cuda::mlp::activation_code;
use crate::model::block::{GatedMlp, LinearAdapter, SavedMlp};

/// The kernel for an adapter of up to so many columns, its dynamic shared memory and the columns of a
/// block: kernels.cu.
pub(super) const KERNELS: [(usize, &str); 2] =
    [(16, "mlp_adapters_forward_16"), (32, "mlp_adapters_forward_32")];
pub(super) const SHARED_BYTES: u32 = 98_304;
const STRIP: usize = 512;

/// `h = act(gate) ∘ up`, where it is wanted, and `h·Aᵀ` of the adapter of `down` into its columns of ax.
/// `None`, and nothing done, where there is no room for the sums, no adapter, or no kernel for its rank.
pub(in crate::kernels::cuda) fn forward<D: Driver>(
    cuda: &Cuda<D>,
    &GatedMlp { activation, down, parameters, rows, .. }: &GatedMlp<Cuda<D>>,
    SavedMlp { gate, up, lora_x, .. }: &SavedMlp<Buffer<D>>,
    h: Option<&Buffer<D>>,
) -> Option<()> {
    let (working, sums) = (parameters.working_copies()?, cuda.mlp_sums()?);
    let LinearAdapter { index, shape, columns } = down.adapter?;
    let (rank, width) = (shape.rank, shape.in_features);
    let (ranks, kernel) = KERNELS.into_iter().find(|(ranks, _)| rank <= *ranks)?;
    let strips = width.div_ceil(STRIP);
    let inner = strips * rows * ranks;
    let [g, u] = [gate, up].map(|buffer| buffer.rows(rows, width));
    let h = h.map(|buffer| buffer.rows(rows, width));
    let [a, _] = parameters.matrix_ranges(index).map(|matrix| working.at(matrix));
    let whole_pieces = rank.is_multiple_of(PIECE) && width.is_multiple_of(PIECE);
    // Two elements of A are read, and of ax written, at a time.
    let ax = lora_x.band(columns, rows);
    let whole_pairs = [a, ax.address, 2 * ax.stride as u64].iter().all(|x| x.is_multiple_of(4));
    if !whole_pieces
        || !whole_pairs
        || inner > sums.elements
        || ![g, u].iter().chain(&h).all(aligned)
    {
        return None;
    }
    let chunk_rows = chunk_rows(rows, strips);
    let chunks = rows.div_ceil(chunk_rows);
    let inner = sums.argument(inner);
    let h = h.unwrap_or(Rows { address: 0, stride: 0 });
    let mut arguments = [
        activation_code(activation).into(),
        g.argument(),
        g.stride.into(),
        u.argument(),
        u.stride.into(),
        h.argument(),
        h.stride.into(),
        Argument::Pointer(a),
        rank.into(),
        rows.into(),
        width.into(),
        chunk_rows.into(),
        inner,
    ];
    let grid = [strips as u32, chunks as u32, 1];
    cuda.launch_shared(kernel, grid, FLAT_THREADS, SHARED_BYTES, &mut arguments);
    launch!(cuda, "mlp_adapters_project", flat(rows * ranks / 2), FLAT_THREADS;
        inner, strips, rows, ranks, rank, ax.argument(), ax.stride);
    Some(())
}
