//! Decoding a [`PackedWeight`], whole or any part of it: `w = value[code] · absmax` in f32.
//!
//! Not rounded to the weight's type: round the result to get what bitsandbytes returns.

use std::borrow::Cow;
use std::ops::Range;

use rayon::prelude::*;

use crate::decode::RUN;
use crate::dot::dot_in_pieces;
use crate::format::NESTED_BLOCK_SIZE;
use crate::nested::dequantize_absmax;
use crate::packed::{Absmax, ELEMENTS_PER_TASK, PackedWeight};

/// Nested scales that are decoded at a time, on the stack.
const SCALES: usize = NESTED_BLOCK_SIZE;
/// Scales of a piece of a row that is multiplied.
const PIECE_SCALES: usize = 64;
/// Blocks of a short run.
const FEW_BLOCKS: usize = 8;

impl PackedWeight {
    /// All elements in f32, row-major.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.elements()];
        self.dequantize_into(&mut out);
        out
    }

    /// All elements in f32, on all threads.
    ///
    /// # Panics
    /// When `out` is not `out · in` long.
    pub fn dequantize_into(&self, out: &mut [f32]) {
        assert_eq!(out.len(), self.elements(), "one f32 per element");
        out.par_chunks_mut(ELEMENTS_PER_TASK).enumerate().for_each(|(task, out)| {
            self.dequantize_range(task * ELEMENTS_PER_TASK, out);
        });
    }

    /// The elements of `rows` in f32, on this thread.
    ///
    /// # Panics
    /// When `out` is not `rows.len() · in` long or the rows do not exist.
    pub fn dequantize_rows_into(&self, rows: Range<usize>, out: &mut [f32]) {
        let [count, columns] = self.shape();
        assert!(rows.end <= count && out.len() == rows.len() * columns, "rows exist and fit");
        self.dequantize_range(rows.start * columns, out);
    }

    /// `out.len()` elements from flat index `begin` on, on this thread; both may lie inside a block.
    ///
    /// # Panics
    /// When there are no such elements.
    pub fn dequantize_range(&self, begin: usize, out: &mut [f32]) {
        assert!(out.len() <= self.elements() && begin <= self.elements() - out.len(), "they exist");
        let block_size = self.format().block_size;
        let (mut element, mut rest) = (begin, out);
        while !rest.is_empty() {
            let block = element / block_size;
            let whole = element.is_multiple_of(block_size) && rest.len() >= block_size;
            let count = if whole {
                rest.len() / block_size * block_size
            } else {
                rest.len().min((block + 1) * block_size - element)
            };
            let (now, later) = rest.split_at_mut(count);
            if whole {
                self.decode_blocks(block, now);
            } else {
                self.decode_within_block(element, now);
            }
            (element, rest) = (element + count, later);
        }
    }

    /// x `[in]` as [`dot_rows`](Self::dot_rows) reads it.
    pub(crate) fn arrange<'x>(&self, x: &'x [f32]) -> Cow<'x, [f32]> {
        let block_size = self.format().block_size;
        if self.shape()[1].is_multiple_of(block_size) {
            self.decoder.arrange(x, block_size)
        } else {
            Cow::Borrowed(x)
        }
    }

    /// `Σ w·x` of rows from `first` on, on this thread, in an order of the processor's; x is arranged.
    ///
    /// # Panics
    /// When there are no such rows.
    pub(crate) fn dot_rows(&self, first: usize, x: &[f32], out: &mut [f32]) {
        const TOGETHER: usize = 4;
        if !self.shape()[1].is_multiple_of(self.format().block_size) {
            for (row, out) in (first..).zip(out) {
                let begin = row * self.shape()[1];
                *out = dot_in_pieces(x, |piece, out| self.dequantize_range(begin + piece, out));
            }
            return;
        }
        let (groups, rest) = out.as_chunks_mut::<TOGETHER>();
        let last = first + groups.len() * TOGETHER;
        for (row, out) in (first..).step_by(TOGETHER).zip(groups) {
            *out = self.dot_of_blocks(row, x);
        }
        for (row, out) in (last..).zip(rest) {
            [*out] = self.dot_of_blocks(row, x);
        }
    }

    /// Dot products of `ROWS` rows of whole blocks with `x`.
    fn dot_of_blocks<const ROWS: usize>(&self, first: usize, x: &[f32]) -> [f32; ROWS] {
        let (columns, block_size) = (self.shape()[1], self.format().block_size);
        let values = self.parts.quant_type.values();
        let blocks = columns / block_size;
        let mut sums = [0.0; ROWS];
        let mut decoded = [[0.0; PIECE_SCALES]; ROWS];
        for begin in (0..blocks).step_by(PIECE_SCALES) {
            let here = begin..(begin + PIECE_SCALES).min(blocks);
            let block = |row: usize| (first + row) * blocks + here.start;
            let codes = std::array::from_fn(|row| {
                let start = block(row) * block_size / 2;
                &self.parts.codes[start..start + here.len() * block_size / 2]
            });
            let scales: [&[f32]; ROWS] = match &self.parts.absmax {
                Absmax::Plain(absmax) => {
                    std::array::from_fn(|row| &floats(absmax)[block(row)..][..here.len()])
                }
                Absmax::Nested { codes, absmax, offset } => {
                    for (row, decoded) in decoded.iter_mut().enumerate() {
                        let decoded = &mut decoded[..here.len()];
                        dequantize_absmax(codes, floats(absmax), *offset, block(row), decoded);
                    }
                    decoded.each_ref().map(|decoded| &decoded[..here.len()])
                }
            };
            // The last piece has what x is filled up with.
            let end = if here.end == blocks { x.len() } else { here.end * block_size };
            let x = &x[here.start * block_size..end];
            let of_piece = self.decoder.dot(codes, values, scales, x);
            sums.iter_mut().zip(of_piece).for_each(|(sum, piece)| *sum += piece);
        }
        sums
    }

    /// The scale of block `block`.
    ///
    /// # Panics
    /// When there is no such block.
    pub fn block_absmax(&self, block: usize) -> f32 {
        let mut scale = [0.0];
        match &self.parts.absmax {
            Absmax::Plain(absmax) => scale[0] = floats(absmax)[block],
            Absmax::Nested { codes, absmax, offset } => {
                dequantize_absmax(codes, floats(absmax), *offset, block, &mut scale);
            }
        }
        scale[0]
    }

    fn elements(&self) -> usize {
        self.shape()[0] * self.shape()[1]
    }

    /// Whole blocks from `first` on.
    fn decode_blocks(&self, first: usize, out: &mut [f32]) {
        let block_size = self.format().block_size;
        let values = self.parts.quant_type.values();
        let begin = first * block_size / 2;
        let codes = &self.parts.codes[begin..begin + out.len() / 2];
        match &self.parts.absmax {
            Absmax::Plain(absmax) => {
                let scales = &floats(absmax)[first..first + out.len() / block_size];
                self.decoder.decode(codes, values, scales, out);
            }
            Absmax::Nested { codes: scale_codes, absmax, offset } => {
                let nested = floats(absmax);
                if out.len() <= FEW_BLOCKS * block_size {
                    // Clearing more scales than are used takes longer than decoding a few blocks.
                    let mut scales = [0.0; FEW_BLOCKS];
                    let scales = &mut scales[..out.len() / block_size];
                    dequantize_absmax(scale_codes, nested, *offset, first, scales);
                    return self.decoder.decode(codes, values, scales, out);
                }
                let mut scales = [0.0; SCALES];
                let pieces = out.chunks_mut(SCALES * block_size);
                for (piece, out) in pieces.enumerate() {
                    let scales = &mut scales[..out.len() / block_size];
                    let block = first + piece * SCALES;
                    dequantize_absmax(scale_codes, nested, *offset, block, scales);
                    let begin = piece * SCALES * block_size / 2;
                    let codes = &codes[begin..begin + out.len() / 2];
                    self.decoder.decode(codes, values, scales, out);
                }
            }
        }
    }

    /// A part of one block.
    fn decode_within_block(&self, begin: usize, out: &mut [f32]) {
        let absmax = self.block_absmax(begin / self.format().block_size);
        let (values, codes) = (self.parts.quant_type.values(), &self.parts.codes);
        let one = |element: usize| {
            let shift = if element.is_multiple_of(2) { 4 } else { 0 };
            values[usize::from(codes[element / 2] >> shift & 15)] * absmax
        };
        let odd = begin % 2;
        let (first, rest) = out.split_at_mut(odd.min(out.len()));
        first.iter_mut().for_each(|out| *out = one(begin));
        let vector = rest.len() / RUN * RUN;
        let (runs, last) = rest.split_at_mut(vector);
        let start = (begin + odd) / 2;
        self.decoder.decode(&codes[start..start + vector / 2], values, &[absmax], runs);
        for (i, out) in last.iter_mut().enumerate() {
            *out = one(begin + odd + vector + i);
        }
    }
}

/// Stored scales; `from_parts` has aligned them.
fn floats(bytes: &[u8]) -> &[f32] {
    bytemuck::cast_slice(bytes)
}
