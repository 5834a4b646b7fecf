//! Blocking and threads: which tiles are computed when, and from what memory.
//!
//! ```text
//! for stretches of k and bands of columns of B that fit the shared cache
//!     pack the band                                   (tasks: blocks of k × groups of panels)
//!     for chunks of rows × groups of panels of C       (tasks)
//!         for blocks of k: pack A's rows, then tiles   C's chunk stays in L2, A's panel in L1
//! ```
//! An addition `extra` (a low-rank adapter) is one more block of k with operands of its own, while
//! C's chunk is still in cache. B is read in place where only a few rows use it. Tasks share out
//! elements of C, never k: results do not depend on the number of threads.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::micro::{A_ROW_STRIDE, Isa, Tile};
use super::pack::{Operand, pack_a};
use super::view::{Matrix, MatrixMut};

/// Longest chain between two visits of C.
pub(super) const K_BLOCK: usize = 640;
/// Elements of a packed band of B: 4 MiB stay in the last-level cache.
const BAND_ELEMENTS: usize = 1 << 20;
/// Panels that one packing task handles.
const PANELS_PER_TASK: usize = 4;
/// Blocks of k that are packed together: longer products visit C once more.
const BLOCKS_PER_STRETCH: usize = 8;
/// Tiles of rows up to which B is read in place: packing it would cost more than it saves.
const IN_PLACE_TILES: usize = 2;
/// Multiply-adds below which other threads are not worth waking.
const SERIAL_LIMIT: usize = 1 << 18;
/// Tiles of rows in a chunk of C.
const TILES_PER_CHUNK: usize = 8;

/// `A · B`, added to a product of other operands.
#[derive(Clone, Copy)]
pub(super) struct Extra<'a> {
    pub alpha: f32,
    pub a: Matrix<'a>,
    pub b: Matrix<'a>,
}

thread_local! {
    /// Buffers that live as long as their thread.
    static BUFFERS: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Lends a buffer of at least `elements` with arbitrary contents.
fn with_buffer<R>(elements: usize, work: impl FnOnce(&mut Vec<f32>) -> R) -> R {
    let mut buffer = BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < elements {
        buffer.resize(elements, 0.0);
    }
    let result = work(&mut buffer);
    BUFFERS.with_borrow_mut(|buffers| buffers.push(buffer));
    result
}

/// `c = alpha·a·b + beta·c`, plus `extra`.
pub(super) fn multiply(
    alpha: f32,
    a: Matrix,
    b: Operand,
    extra: Option<Extra>,
    beta: f32,
    mut c: MatrixMut,
    parallel: bool,
) {
    let (m, n, k) = (c.rows, c.columns, a.columns);
    assert_eq!((a.rows, b.shape()), (m, (k, n)), "shapes of a product agree");
    if let Some(extra) = &extra {
        let shape = (extra.a.rows, extra.b.rows, extra.b.columns);
        assert_eq!(shape, (m, extra.a.columns, n), "shapes of an extra product agree");
    }
    if m == 0 || n == 0 {
        return;
    }
    let isa = Isa::detect();
    let parallel = parallel && rayon::current_num_threads() > 1 && m * n * k > SERIAL_LIMIT;
    let width = isa.columns();
    let blocks = blocks(alpha, a, b, extra.as_ref());
    let in_place = m <= IN_PLACE_TILES * isa.rows() && n.is_multiple_of(width);
    let mut beta = beta;
    for blocks in blocks.chunks(BLOCKS_PER_STRETCH) {
        let plain = blocks.iter().all(|block| block.b.in_place(0, width).is_some());
        if in_place && plain {
            let band = Band { isa, blocks, packed: None, first_column: 0, beta };
            band.compute(c.all(), parallel);
        } else {
            let depth: usize = blocks.iter().map(|block| block.k.len()).sum();
            let columns = (BAND_ELEMENTS / depth.max(1)).next_multiple_of(width);
            for begin in (0..n).step_by(columns) {
                let columns = begin..(begin + columns).min(n);
                let elements = columns.len().next_multiple_of(width) * depth;
                with_buffer(elements, |packed| {
                    let packed = &mut packed[..elements];
                    pack_band(blocks, &columns, width, packed, parallel);
                    let packed = Some(&*packed);
                    let band = Band { isa, blocks, packed, first_column: begin, beta };
                    band.compute(c.columns(columns), parallel);
                });
            }
        }
        beta = 1.0;
    }
}

/// One block of k: a stretch of A's columns and of B's rows.
struct Block<'a> {
    alpha: f32,
    a: Matrix<'a>,
    b: Operand<'a>,
    k: Range<usize>,
}

fn blocks<'a>(
    alpha: f32,
    a: Matrix<'a>,
    b: Operand<'a>,
    extra: Option<&Extra<'a>>,
) -> Vec<Block<'a>> {
    let cut = |alpha, a: Matrix<'a>, b: Operand<'a>| {
        let length = a.columns;
        // Equal blocks: a short last one would visit C for little.
        let count = length.div_ceil(K_BLOCK).max(1);
        let size = length.div_ceil(count);
        (0..count).map(move |index| {
            let k = index * size..((index + 1) * size).min(length);
            Block { alpha, a, b, k }
        })
    };
    let extra =
        extra.into_iter().flat_map(|extra| cut(extra.alpha, extra.a, Operand::Dense(extra.b)));
    cut(alpha, a, b).chain(extra).collect()
}

/// Packs all blocks of k of a band of columns, one after another.
fn pack_band(
    blocks: &[Block],
    columns: &Range<usize>,
    width: usize,
    packed: &mut [f32],
    parallel: bool,
) {
    let panels = columns.len().div_ceil(width);
    let mut rest = packed;
    let mut tasks = Vec::new();
    for block in blocks {
        let size = block.k.len() * width;
        let (own, later) = rest.split_at_mut(panels * size);
        rest = later;
        let per_task = if parallel { PANELS_PER_TASK } else { panels };
        for (index, panels) in own.chunks_mut((per_task * size).max(1)).enumerate() {
            let begin = columns.start + index * per_task * width;
            let end = (begin + per_task * width).min(columns.end);
            tasks.push((block, begin..end, panels));
        }
    }
    let pack = |(block, columns, panels): (&Block, Range<usize>, &mut [f32])| {
        with_buffer(0, |scratch| {
            block.b.pack(block.k.clone(), columns, width, panels, scratch);
        });
    };
    if parallel {
        tasks.into_par_iter().for_each(pack);
    } else {
        tasks.into_iter().for_each(pack);
    }
}

/// A band of columns of B, packed or in place, and what to multiply it with.
struct Band<'a> {
    isa: Isa,
    blocks: &'a [Block<'a>],
    packed: Option<&'a [f32]>,
    first_column: usize,
    beta: f32,
}

/// C as tasks share it.
#[derive(Clone, Copy)]
struct Shared {
    start: *mut f32,
    stride: usize,
    columns: usize,
}

// SAFETY: tasks write disjoint rectangles of rows and columns.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Band<'_> {
    fn compute(&self, c: MatrixMut, parallel: bool) {
        let (tile_rows, width) = (self.isa.rows(), self.isa.columns());
        let (rows, panels) = (c.rows, c.columns.div_ceil(width));
        let (mut chunk, mut group) = (TILES_PER_CHUNK * tile_rows, panels);
        if parallel {
            // A few tasks for every thread: fewer rows first, then fewer columns.
            let tasks = 3 * rayon::current_num_threads();
            chunk = chunk.min(rows.div_ceil(tasks).next_multiple_of(tile_rows));
            let chunks = rows.div_ceil(chunk);
            group = panels.div_ceil(tasks.div_ceil(chunks).min(panels));
        }
        let groups = panels.div_ceil(group);
        let shared =
            Shared { start: c.data.as_mut_ptr(), stride: c.row_stride, columns: c.columns };
        let task = |index: usize| {
            let (row, panel) = (index / groups * chunk, index % groups * group);
            let rows = row..(row + chunk).min(rows);
            self.compute_part(rows, panel..(panel + group).min(panels), panels, shared);
        };
        let tasks = rows.div_ceil(chunk) * groups;
        if parallel {
            (0..tasks).into_par_iter().for_each(task);
        } else {
            (0..tasks).for_each(task);
        }
    }

    /// The tiles of some rows and panels, all blocks of k.
    fn compute_part(&self, rows: Range<usize>, group: Range<usize>, panels: usize, c: Shared) {
        let width = self.isa.columns();
        // Tiles of about equal height: a short last one would leave the multiply-add units idle.
        let tiles = rows.len().div_ceil(self.isa.rows());
        let tile_rows = rows.len().div_ceil(tiles);
        let panel_a = tile_rows * A_ROW_STRIDE;
        with_buffer(tiles * panel_a, |packed_a| {
            let (mut offset, mut beta) = (0, self.beta);
            for block in self.blocks {
                let a_by_k = pack_a(block.a, rows.clone(), block.k.clone(), tile_rows, packed_a);
                let size = block.k.len() * width;
                for (first, a) in rows.clone().step_by(tile_rows).zip(packed_a.chunks(panel_a)) {
                    for panel in group.clone() {
                        let column = panel * width;
                        let (b, b_stride) = match self.packed {
                            Some(packed) => (&packed[offset + panel * size..][..size], width),
                            None => block
                                .b
                                .in_place(block.k.start, width)
                                .map(|(b, stride)| (&b[self.first_column + column..], stride))
                                .expect("checked when the band was made"),
                        };
                        let tile = Tile {
                            k: block.k.len(),
                            a: a.as_ptr(),
                            a_by_k,
                            b: b.as_ptr(),
                            b_stride,
                            // SAFETY: row and column lie inside the view, which was checked.
                            c: unsafe { c.start.add(first * c.stride + column) },
                            c_stride: c.stride,
                            rows: tile_rows.min(rows.end - first),
                            columns: width.min(c.columns - column),
                            alpha: block.alpha,
                            beta,
                        };
                        // SAFETY: `detect` saw the instructions; A's and B's panels are as long as
                        // packing made them (in place: whole vectors of existing columns); this
                        // task is the only one with these rows and columns of C.
                        unsafe { self.isa.run(&tile) };
                    }
                }
                offset += panels * size;
                beta = 1.0;
            }
        });
    }
}
