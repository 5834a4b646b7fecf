//! Blocking and threads: which tiles are computed when, and from what memory.
//!
//! ```text
//! for stretches of k and bands of columns of B that fit the shared cache
//!     pack the band                                     (tasks: panels)
//!     for chunks of rows × groups of panels of C        (tasks)
//!         for blocks of k, panels, tiles of rows        B's panel and A's chunk stay in L2
//! ```
//!
//! A low-rank addition is appended to the last block of k: it costs no visit of C. B is read in
//! place where few rows use it; one that several products share is packed once ([`PackedOperand`]).
//! Tasks share out elements of C, never k: results do not depend on the number of threads, nor a
//! row's on the other rows.
#![allow(unsafe_code)]

mod left;
mod packed_operand;
mod parts;

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::LowRank;
use super::micro::Isa;
use super::pack::{Operand, Panel};
use super::step::Precision;
use super::tile::{Segment, TILE_ROWS, Tile};
use super::view::{Matrix, MatrixMut};
use left::{Block, Rows, from};
pub use packed_operand::PackedOperand;
use parts::{TILES_PER_CHUNK, parts, share_out};

/// Longest chain of steps between two visits of C.
const K_BLOCK: usize = 640;
/// Steps whose panels are packed together: longer products visit C once more.
const K_STRETCH: usize = 2048;
/// Elements of a packed band of B: 4 MiB stay in the last-level cache.
const BAND_ELEMENTS: usize = 1 << 20;
/// Tiles of rows up to which B is read in place: packing it would cost more than it saves.
const IN_PLACE_TILES: usize = 4;
/// Multiply-adds below which other threads are not worth waking.
const SERIAL_LIMIT: usize = 1 << 18;
/// Floats in a cache line: packed rows begin at one.
const CACHE_LINE: usize = 16;
/// Elements of C that no cache holds until they are read again: they are written past it.
const STREAMED_ELEMENTS: usize = 8 << 20;

/// `c = alpha · (a·b + scale·(a·b of extra)) + beta·c`.
pub(super) struct Product<'a> {
    pub alpha: f32,
    pub a: Matrix<'a>,
    pub b: Operand<'a>,
    pub extra: Option<LowRank<'a>>,
    pub beta: f32,
}

/// Most blocks of a visit: a product's own, and an addition's.
const MOST_BLOCKS: usize = 2;

/// What is multiplied while a tile of C stays in registers.
type Visit<'a> = Vec<Block<'a>>;

/// Bytes that products keep from their first time on: a band of B of the thread that asks for them, and
/// on each of `threads` the rows of A that it copied, with those of an addition of a usual rank.
pub fn buffer_bytes(threads: usize) -> usize {
    // In bf16 both are copied, in pairs. One cache line more keeps rows out of each other's sets.
    const USUAL_RANK: usize = 64;
    let row = K_BLOCK + CACHE_LINE + USUAL_RANK / 2 + CACHE_LINE;
    (BAND_ELEMENTS + threads * TILES_PER_CHUNK * TILE_ROWS * row) * size_of::<f32>()
}

thread_local! {
    /// Buffers that live as long as their thread.
    static BUFFERS: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Lends `elements` with arbitrary contents that begin at a cache line.
fn with_buffer<R>(elements: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < elements + CACHE_LINE {
        buffer.resize(elements + CACHE_LINE, 0.0);
    }
    let begin = buffer.as_ptr().align_offset(CACHE_LINE * size_of::<f32>()).min(CACHE_LINE);
    let result = work(&mut buffer[begin..begin + elements]);
    BUFFERS.with_borrow_mut(|buffers| buffers.push(buffer));
    result
}

impl<'a> Product<'a> {
    /// Computes the product.
    pub(super) fn run(&self, isa: Isa, mut c: MatrixMut, parallel: bool) {
        let (m, n, k) = (c.rows, c.columns, self.a.columns);
        assert_eq!((self.a.rows, self.b.shape()), (m, (k, n)), "shapes of a product agree");
        if let Some(extra) = &self.extra {
            let shape = (extra.a.rows, extra.b.rows, extra.b.columns);
            assert_eq!(shape, (m, extra.a.columns, n), "shapes of an addition agree");
        }
        if m == 0 || n == 0 {
            return;
        }
        let parallel = parallel && rayon::current_num_threads() > 1 && m * n * k > SERIAL_LIMIT;
        let visits = self.visits(isa);
        let mut beta = self.beta;
        let in_place = self.extra.is_none() && self.reads_in_place(isa, m, n);
        let stream = visits.len() == 1 && self.writes_past_caches(&c);
        let per_stretch = (K_STRETCH / K_BLOCK).max(1);
        for visits in visits.chunks(per_stretch) {
            let depth = visits.iter().flatten().map(|block| block.steps(isa)).sum::<usize>().max(1);
            let (width, alpha) = (isa.columns(), self.alpha);
            let band = Band { isa, visits, width, alpha, beta, stream };
            if in_place {
                band.compute(None, 0, c.all(), parallel);
            } else {
                let step = (BAND_ELEMENTS / depth / band.width).max(1) * band.width;
                for begin in (0..n).step_by(step) {
                    let columns = begin..(begin + step).min(n);
                    let elements = columns.len().next_multiple_of(isa.lanes()) * depth;
                    with_buffer(elements, |packed| {
                        band.pack(columns.clone(), packed, parallel);
                        let panels = Panels { data: packed, columns: columns.len(), unused: 0 };
                        band.compute(Some(panels), begin, c.columns(columns), parallel);
                    });
                }
            }
            beta = 1.0;
        }
    }

    fn reads_in_place(&self, isa: Isa, m: usize, n: usize) -> bool {
        let few = m <= IN_PLACE_TILES * isa.rows() && isa.precision() == Precision::F32;
        few && n.is_multiple_of(isa.lanes()) && self.b.rows_in_place().is_some()
    }

    /// Whether C, if it is visited once, is written past the caches: no cache would hold it, nothing of it
    /// is read, and its rows begin at cache lines.
    fn writes_past_caches(&self, c: &MatrixMut) -> bool {
        let address = c.data.as_ptr().addr();
        self.beta == 0.0
            && c.rows * c.columns >= STREAMED_ELEMENTS
            && address.is_multiple_of(size_of::<f32>() * CACHE_LINE)
            && c.row_stride.is_multiple_of(CACHE_LINE)
    }

    /// Blocks of k of equal length, the addition with the last.
    fn visits(&self, isa: Isa) -> Vec<Visit<'a>> {
        let (length, per_step) = (self.a.columns, isa.precision().per_step());
        let count = length.div_ceil(K_BLOCK * per_step).max(1);
        let size = length.div_ceil(count).next_multiple_of(per_step);
        let block = |index: usize| {
            let k = (index * size).min(length)..((index + 1) * size).min(length);
            vec![Block { a: self.a, b: self.b, k, scale: 1.0 }]
        };
        let mut visits: Vec<Visit> = (0..count).map(block).collect();
        if let (Some(extra), Some(last)) = (&self.extra, visits.last_mut()) {
            let (k, b) = (0..extra.a.columns, Operand::Dense(extra.b));
            last.push(Block { a: extra.a, b, k, scale: extra.scale });
        }
        visits
    }
}

/// A packed band: blocks one after another, each panel after panel.
#[derive(Debug, Clone, Copy)]
struct Panels<'a> {
    data: &'a [f32],
    /// Columns that were packed.
    columns: usize,
    /// Steps of every panel that no product uses; the band has one block then.
    unused: usize,
}

/// A stretch of k of a band of columns.
struct Band<'a> {
    isa: Isa,
    visits: &'a [Visit<'a>],
    /// Columns of a panel.
    width: usize,
    alpha: f32,
    beta: f32,
    /// C is written past the caches; its rows begin at cache lines.
    stream: bool,
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
    fn blocks(&self) -> impl Iterator<Item = &Block<'_>> {
        self.visits.iter().flatten()
    }

    /// Packs `columns` of all blocks: block after block, panel after panel.
    fn pack(&self, columns: Range<usize>, packed: &mut [f32], parallel: bool) {
        let padded = columns.len().next_multiple_of(self.isa.lanes());
        let mut rest = packed;
        let mut tasks = Vec::new();
        for block in self.blocks() {
            let steps = block.steps(self.isa);
            let (own, later) = rest.split_at_mut(padded * steps);
            rest = later;
            let panels = own.chunks_mut((self.width * steps).max(1));
            tasks.extend(panels.enumerate().map(|(index, panel)| (block, index, panel)));
        }
        let pack = |(block, index, panel): (&Block, usize, &mut [f32])| {
            let begin = columns.start + index * self.width;
            let end = (begin + self.width).min(columns.end);
            let width = (end - begin).next_multiple_of(self.isa.lanes());
            let (k, scale, precision) = (block.k.clone(), block.scale, self.isa.precision());
            block.b.pack(&Panel { k, columns: begin..end, width, scale, precision }, panel);
        };
        if parallel {
            tasks.into_par_iter().with_max_len(1).for_each(pack);
        } else {
            tasks.into_iter().for_each(pack);
        }
    }

    /// Multiplies with a packed band, or with B in place from column `first_column` on.
    fn compute(&self, packed: Option<Panels>, first_column: usize, c: MatrixMut, parallel: bool) {
        let shared =
            Shared { start: c.data.as_mut_ptr(), stride: c.row_stride, columns: c.columns };
        let threads = if parallel { rayon::current_num_threads() } else { 1 };
        let parts = parts(c.rows, c.columns.div_ceil(self.width), self.isa.rows(), threads);
        share_out(parts, threads, |(rows, panels)| {
            self.compute_part(packed, first_column, rows, panels, shared);
        });
    }

    /// The tiles of some rows and panels.
    fn compute_part(
        &self,
        packed: Option<Panels>,
        first_column: usize,
        rows: Range<usize>,
        panels: Range<usize>,
        c: Shared,
    ) {
        let (mut offset, mut beta) = (0, self.beta);
        for visit in self.visits {
            let task = Task { band: self, visit, offset, first_column, beta };
            let stride = |block: &Block| block.copy_stride(self.isa, panels.len());
            let elements = visit.iter().filter_map(stride).sum::<usize>() * rows.len();
            with_buffer(elements, |mut rest| {
                let mut left = [Rows::default(); MOST_BLOCKS];
                for (left, block) in left.iter_mut().zip(visit) {
                    *left = match stride(block) {
                        None => block.rows(rows.start),
                        Some(stride) => {
                            let elements = rows.len() * stride;
                            let (copy, later) = std::mem::take(&mut rest).split_at_mut(elements);
                            rest = later;
                            block.copy_rows(self.isa, rows.clone(), stride, copy)
                        }
                    };
                }
                task.run(packed, &left, rows.clone(), panels.clone(), c);
            });
            let padded = c.columns.next_multiple_of(self.isa.lanes());
            offset += visit.iter().map(|block| padded * block.steps(self.isa)).sum::<usize>();
            beta = 1.0;
        }
        if self.stream {
            self.isa.fence();
        }
    }
}

/// A visit of some rows and panels of C.
struct Task<'a> {
    band: &'a Band<'a>,
    visit: &'a Visit<'a>,
    /// Where the visit's blocks begin in the packed band.
    offset: usize,
    /// Column of B that the band begins with.
    first_column: usize,
    beta: f32,
}

impl Task<'_> {
    /// `left` is A of each block from `rows.start` on.
    fn run(
        &self,
        packed: Option<Panels>,
        left: &[Rows],
        rows: Range<usize>,
        panels: Range<usize>,
        c: Shared,
    ) {
        let band = self.band;
        let padded = c.columns.next_multiple_of(band.isa.lanes());
        let mut segments = Vec::with_capacity(MOST_BLOCKS);
        for panel in panels {
            let column = panel * band.width;
            let columns = band.width.min(c.columns - column);
            segments.clear();
            let mut offset = self.offset;
            for (block, a) in self.visit.iter().zip(left) {
                let steps = block.steps(band.isa);
                let (b, b_stride) = match packed {
                    Some(panels) => {
                        let stride = band.width.min(panels.columns - column);
                        let stride = stride.next_multiple_of(band.isa.lanes());
                        let begin = offset + column * (steps + panels.unused);
                        (&panels.data[begin..begin + stride * steps], stride)
                    }
                    None => {
                        let (b, stride) = block.b.rows_in_place().expect("checked before");
                        (from(b, block.k.start * stride + self.first_column + column), stride)
                    }
                };
                segments.push(Segment {
                    steps,
                    a: a.data.as_ptr(),
                    a_row_stride: a.row_stride,
                    a_step_stride: a.step_stride,
                    b: b.as_ptr(),
                    b_stride,
                });
                offset += padded * steps;
            }
            let (alpha, beta) = (band.alpha, self.beta);
            let stream = band.stream && columns.is_multiple_of(CACHE_LINE);
            let panel = PanelTask { segments: &segments, column, columns, alpha, beta, stream };
            panel.run(band.isa, rows.clone(), c);
        }
    }
}

/// A visit of a panel of C.
struct PanelTask<'a> {
    /// What is multiplied: the blocks of the visit.
    segments: &'a [Segment],
    column: usize,
    columns: usize,
    alpha: f32,
    beta: f32,
    stream: bool,
}

impl PanelTask<'_> {
    /// The tiles of `rows`; the segments' A begins at the first of them.
    fn run(&self, isa: Isa, rows: Range<usize>, c: Shared) {
        for row in rows.clone().step_by(isa.rows()) {
            let at_row = |segment: Segment| Segment {
                a: segment.a.wrapping_add((row - rows.start) * segment.a_row_stride),
                ..segment
            };
            let tile = Tile {
                first: at_row(self.segments[0]),
                second: self.segments.get(1).copied().map(at_row),
                // SAFETY: row and column lie inside the view, which was checked.
                c: unsafe { c.start.add(row * c.stride + self.column) },
                c_stride: c.stride,
                rows: isa.rows().min(rows.end - row),
                columns: self.columns,
                alpha: self.alpha,
                beta: self.beta,
                stream: self.stream,
            };
            // SAFETY: the processor has `isa`'s instructions; views were checked when made, and
            // packed panels are as long as their rows; this task is the only one with these rows
            // and columns of C; streamed rows begin at cache lines.
            unsafe { isa.run(&tile) };
        }
    }
}

#[cfg(test)]
mod tests;
