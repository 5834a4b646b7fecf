//! Rows and elements: the loops of embeddings, dropout, noise and rows that move; norms are in [`norm`].

use std::ops::Range;

use rayon::prelude::*;

use super::arena::Buffer;
use super::{CHUNK, Cpu, FrozenMatrix, ROWS, norm};
use crate::kernels::{DropoutMask, NormParameters, RowKernels, UniformNoise, Write};

impl RowKernels for Cpu {
    fn embed(
        &self,
        ids: &[u32],
        table: &FrozenMatrix,
        scale: f32,
        x: &mut Buffer<f32>,
        write: Write,
    ) {
        let d = table.columns();
        x[..ids.len() * d].par_chunks_mut(d).zip(ids).for_each(|(x, &id)| {
            table.read_row(id as usize, scale, x, write);
        });
    }

    fn norm_forward(
        &self,
        norm: &NormParameters<Vec<f32>>,
        x: &Buffer<f32>,
        y: &mut Buffer<f32>,
        stats: &mut Buffer<f32>,
        rows: usize,
        write: Write,
    ) {
        let (n, stats) = (rows * norm.weight.len(), &mut stats[..2 * rows]);
        norm::forward(norm, &x[..n], &mut y[..n], stats, write);
    }

    fn norm_backward(
        &self,
        norm: &NormParameters<Vec<f32>>,
        dy: &Buffer<f32>,
        x: &Buffer<f32>,
        stats: &Buffer<f32>,
        dx: &mut Buffer<f32>,
        rows: usize,
    ) {
        let n = rows * norm.weight.len();
        norm::backward(norm, &dy[..n], &x[..n], &stats[..2 * rows], &mut dx[..n]);
    }

    fn dropout(
        &self,
        mask: &DropoutMask,
        x: &Buffer<f32>,
        y: &mut Buffer<f32>,
        elements: usize,
        write: Write,
    ) {
        let chunks = y[..elements].par_chunks_mut(CHUNK).zip(x[..elements].par_chunks(CHUNK));
        chunks.enumerate().for_each_init(
            || vec![0.0; CHUNK],
            |factors, (chunk, (y, x))| {
                mask.stream.fill_dropout(
                    mask.first + (chunk * CHUNK) as u64,
                    mask.probability,
                    factors,
                );
                for ((y, x), factor) in y.iter_mut().zip(x).zip(&*factors) {
                    *y = if write.adds() { *y + x * factor } else { x * factor };
                }
            },
        );
    }

    fn add_noise(
        &self,
        noise: &UniformNoise,
        x: &mut Buffer<f32>,
        rows: Range<usize>,
        width: usize,
    ) {
        let chunks = x[rows.start * width..rows.end * width].par_chunks_mut(CHUNK).enumerate();
        chunks.for_each_init(
            || vec![0.0; CHUNK],
            |values, (chunk, x)| {
                let (first, values) =
                    (noise.first + (chunk * CHUNK) as u64, &mut values[..x.len()]);
                noise.stream.fill_uniform(first, -noise.amplitude, noise.amplitude, values);
                x.iter_mut().zip(values).for_each(|(x, value)| *x += *value);
            },
        );
    }

    fn gather_rows(&self, from: &Buffer<f32>, rows: &[u32], to: &mut Buffer<f32>, width: usize) {
        let to = to[..rows.len() * width].par_chunks_mut(ROWS * width);
        to.zip(rows.par_chunks(ROWS)).for_each(|(to, rows)| {
            for (to, &row) in to.chunks_exact_mut(width).zip(rows) {
                to.copy_from_slice(&from[row as usize * width..][..width]);
            }
        });
    }

    fn scatter_rows(&self, from: &Buffer<f32>, rows: &[u32], to: &mut Buffer<f32>, width: usize) {
        for (from, &row) in from.chunks_exact(width).zip(rows) {
            to[row as usize * width..][..width].copy_from_slice(from);
        }
    }

    fn copy_rows(
        &self,
        from: &Buffer<f32>,
        to: &mut Buffer<f32>,
        rows: usize,
        width: usize,
        write: Write,
    ) {
        let chunks = to[..rows * width].par_chunks_mut(CHUNK);
        chunks.zip(from[..rows * width].par_chunks(CHUNK)).for_each(|(to, from)| match write {
            Write::Over => to.copy_from_slice(from),
            Write::Add => to.iter_mut().zip(from).for_each(|(to, from)| *to += from),
        });
    }

    fn copy(
        &self,
        (from, first): (&Buffer<f32>, usize),
        (to, start): (&mut Buffer<f32>, usize),
        elements: usize,
    ) {
        let to = to[start..start + elements].par_chunks_mut(CHUNK);
        to.zip(from[first..first + elements].par_chunks(CHUNK))
            .for_each(|(to, from)| to.copy_from_slice(from));
    }

    fn zero(&self, buffer: &mut Buffer<f32>, elements: usize) {
        buffer[..elements].par_chunks_mut(CHUNK).for_each(|chunk| chunk.fill(0.0));
    }
}
