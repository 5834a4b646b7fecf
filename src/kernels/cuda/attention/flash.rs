//! Launches of the flash kernels.

use super::tiles::tiles_of_launch;
use super::{soft_cap, window};
use crate::kernels::cuda::Cuda;
use crate::kernels::cuda::driver::{Argument, Driver};
use crate::kernels::cuda::memory::{Buffer, Rows};
use crate::kernels::{AttentionShape, TokenLayout};

/// Head widths that the flash kernels have.
pub(super) const FLASH_WIDTHS: [usize; 4] = [64, 96, 128, 256];

/// The width if there are flash kernels for it.
pub(super) fn flash_width(head_dim: usize) -> Option<Flash> {
    let [forward, keys, queries] = match head_dim {
        64 => ["flash_forward_64", "flash_backward_keys_64", "flash_backward_queries_64"],
        96 => ["flash_forward_96", "flash_backward_keys_96", "flash_backward_queries_96"],
        128 => ["flash_forward_128", "flash_backward_keys_128", "flash_backward_queries_128"],
        256 => ["flash_forward_256", "flash_backward_keys_256", "flash_backward_queries_256"],
        _ => return None,
    };
    // Shared memory as kernels.cu lists it.
    let shared = match head_dim {
        64 => [18_432, 37_376, 18_432],
        96 => [26_624, 53_760, 26_624],
        128 => [32_768, 66_048, 32_768],
        _ => [67_584, 84_608, 84_480],
    };
    let keys_threads = if head_dim == 256 { 256 } else { 128 };
    Some(Flash {
        forward: (forward, shared[0], 128),
        keys: (keys, shared[1], keys_threads),
        queries: (queries, shared[2], 128),
    })
}

/// The kernels that work in shared memory, and its bytes.
pub(in crate::kernels::cuda) fn shared_bytes() -> impl Iterator<Item = (&'static str, u32)> {
    let widths = FLASH_WIDTHS.into_iter().filter_map(flash_width);
    let kernels = widths.flat_map(|flash| [flash.forward, flash.keys, flash.queries]);
    kernels.map(|(kernel, bytes, _)| (kernel, bytes))
}

/// Name, shared memory and threads of the three kernels.
pub(super) struct Flash {
    pub forward: (&'static str, u32, u32),
    pub keys: (&'static str, u32, u32),
    pub queries: (&'static str, u32, u32),
}

/// What the flash kernels read: documents of tokens, or one whose first keys were cached before.
pub(super) struct Sources<'a> {
    pub boundaries: &'a [usize],
    /// Keys before the first query.
    pub past: usize,
    pub q: Rows,
    pub k: Rows,
    pub v: Rows,
}

impl<'a> Sources<'a> {
    pub fn of_tokens<D: Driver>(
        shape: &AttentionShape,
        layout: &'a TokenLayout,
        qkv: &Buffer<D>,
    ) -> Self {
        let q = qkv.rows(layout.tokens(), shape.qkv_width());
        let (k, v) = (q.column(shape.q_width()), q.column(shape.q_width() + shape.kv_width()));
        Sources { boundaries: &layout.boundaries, past: 0, q, k, v }
    }

    /// Keys of the longest document.
    fn longest(&self) -> usize {
        let lengths = self.boundaries.windows(2).map(|bounds| bounds[1] - bounds[0]);
        self.past + lengths.max().unwrap_or(0)
    }
}

pub(super) fn launch_flash<D: Driver>(
    cuda: &Cuda<D>,
    (kernel, shared_bytes, threads): (&'static str, u32, u32),
    heads: usize,
    shape: &AttentionShape,
    sources: &Sources,
    rest: &[Argument],
) {
    let &Sources { boundaries, past, q, k, v } = sources;
    let Some(documents) = cuda.stage_documents(boundaries, past) else { return };
    let longest = sources.longest();
    const TILES: usize = 7;
    let mut arguments = vec![
        q.argument(),
        q.stride.into(),
        k.argument(),
        v.argument(),
        k.stride.into(),
        Argument::Pointer(documents.boundaries),
        Argument::Pointer(documents.key_boundaries),
        Argument::Pointer(documents.tiles),
        shape.num_heads.into(),
        shape.num_kv_heads.into(),
        window(shape, longest).into(),
        shape.scale.into(),
        soft_cap(shape).into(),
    ];
    arguments.extend_from_slice(rest);
    let at_once = tiles_of_launch(shape, longest, cuda.launch_flops);
    for first in (0..documents.count).step_by(at_once) {
        let tiles = at_once.min(documents.count - first);
        let blocks = u32::try_from(tiles * heads).expect("fewer blocks than addresses");
        let address = documents.tiles + (size_of::<[u32; 2]>() * first) as u64;
        arguments[TILES] = Argument::Pointer(address);
        cuda.launch_shared(kernel, [blocks, 1, 1], threads, shared_bytes, &mut arguments);
    }
}
