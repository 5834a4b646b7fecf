//! [`Storage`] on the CPU.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

use half::bf16;
use rayon::prelude::*;

use super::arena::{Arena, Buffer};
use super::{CHUNK, Cpu, FrozenMatrix, Scratch};
use crate::error::Result;
use crate::kernels::{Storage, StreamedWeights, TokenLosses};
use crate::model::spec::ModelSpec;
use crate::model::streaming::StreamedPages;
use crate::plan::{MemoryPlan, Settings, WeightParts, layout};

impl Storage for Cpu {
    type Buffer = Buffer<f32>;
    type Bf16Buffer = Buffer<bf16>;
    type Memory = Arena;
    type LossSum = TokenLosses;
    type Offload = Scratch;
    type Weight = FrozenMatrix;
    type Vector = Vec<f32>;

    fn plan(&self, spec: &ModelSpec, settings: &Settings) -> MemoryPlan {
        layout(spec, settings)
    }

    fn allocate(&self, plan: &MemoryPlan) -> Result<Arena> {
        Arena::new(plan)
    }

    fn offload_store(&self, plan: &MemoryPlan, folder: Option<&Path>) -> Result<Scratch> {
        Scratch::new(plan, folder)
    }

    fn offload(
        &self,
        store: &mut Scratch,
        (from, _): (&Buffer<f32>, usize),
        index: usize,
        elements: usize,
    ) {
        store.write(index, &from[..elements]);
    }

    fn fetch(
        &self,
        store: &mut Scratch,
        index: usize,
        (to, _): (&mut Buffer<f32>, usize),
        elements: usize,
    ) {
        store.read(index, &mut to[..elements]);
    }

    fn settle(&self, _store: &mut Scratch, _slot: usize) {
        // Copies are made at once.
    }

    fn offload_failure(&self, store: &mut Scratch) -> Result<()> {
        store.check()
    }

    fn upload_weights(&self, weights: Vec<FrozenMatrix>) -> Result<Vec<FrozenMatrix>> {
        Ok(weights)
    }

    fn upload_embedding(&self, table: FrozenMatrix, _is_head: bool) -> Result<FrozenMatrix> {
        Ok(table)
    }

    fn upload_head(&self, head: FrozenMatrix) -> Result<FrozenMatrix> {
        Ok(head)
    }

    fn bytes_in_memory(&self, weight: &FrozenMatrix) -> WeightParts {
        weight.bytes_in_memory()
    }

    fn stream_weights(
        &self,
        blocks: Vec<Vec<FrozenMatrix>>,
        pages: StreamedPages,
    ) -> Result<StreamedWeights<FrozenMatrix>> {
        Ok(StreamedWeights { blocks, stream: Box::new(pages) })
    }

    fn upload_vector(&self, vector: Vec<f32>) -> Result<Vec<f32>> {
        Ok(vector)
    }

    fn values<'a>(&self, buffer: &'a Buffer<f32>, range: Range<usize>) -> Result<Cow<'a, [f32]>> {
        Ok(Cow::Borrowed(&buffer[range]))
    }

    fn set_values(&self, values: &[f32], buffer: &mut Buffer<f32>, offset: usize) {
        buffer[offset..offset + values.len()].copy_from_slice(values);
    }

    fn round(&self, from: &Buffer<f32>, to: &mut Buffer<bf16>, elements: usize) {
        let to = to[..elements].par_chunks_mut(CHUNK);
        to.zip(from[..elements].par_chunks(CHUNK)).for_each(|(to, from)| {
            to.iter_mut().zip(from).for_each(|(to, &from)| *to = bf16::from_f32(from));
        });
    }

    fn write_tables<const N: usize>(
        &self,
        tables: [&mut Buffer<f32>; N],
        elements: usize,
        fill: impl FnOnce([&mut [f32]; N]),
    ) {
        fill(tables.map(|table| &mut table[..elements]));
    }

    fn loss_sum(&self, _memory: &mut Arena) -> TokenLosses {
        TokenLosses::default()
    }

    fn clear_loss(&self, sum: &mut TokenLosses) {
        *sum = TokenLosses::default();
    }

    fn read_loss(&self, sum: &TokenLosses) -> Result<TokenLosses> {
        Ok(*sum)
    }
}
