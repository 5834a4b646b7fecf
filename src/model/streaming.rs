//! Frozen weights that are read from their file just in time.
//!
//! 4-bit blocks lie in a mapped file, so reading them needs no code: what streaming does is to tell
//! the system early which block comes next, and to give a block's pages back when it has been used.
//! At any time the block at work and the next one are in memory. The bytes are those of a resident
//! run, and so are the losses.

use super::spec::ModelSpec;
use crate::checkpoint::{Checkpoint, Pages};
use crate::kernels::Direction;

/// Weights of blocks that take turns in the memory that a backend works with.
pub trait WeightStream: Send {
    /// Before block `layer` is used: it is there, and the one behind it is on its way.
    fn enter(&mut self, layer: usize, direction: Direction);

    /// After block `layer` was used; the last one in either direction is the next one to be used.
    fn leave(&mut self, layer: usize, direction: Direction);

    /// After the rows of a pass were read.
    fn leave_table(&mut self);

    /// After logits were made.
    fn leave_head(&mut self);

    /// Memory that its blocks take turns in; none where their pages, and those of the embedding and
    /// the head, come and go with the system's help.
    fn bytes_in_memory(&self) -> Option<u64>;
}

/// The block that is used after `layer` of `layers`.
pub fn next(layer: usize, layers: usize, direction: Direction) -> Option<usize> {
    match direction {
        Direction::Forward => Some(layer + 1).filter(|&next| next < layers),
        Direction::Backward => layer.checked_sub(1),
    }
}

/// The pages of every block's weights, of the matrix that makes logits, and of the table of
/// embeddings where that is another.
#[derive(Debug, Clone)]
pub struct StreamedPages {
    blocks: Vec<Vec<Pages>>,
    head: Vec<Pages>,
    table: Vec<Pages>,
}

impl StreamedPages {
    /// The pages of weights that are used as they are stored in `source`; what loading them has read is
    /// given back.
    pub fn new(source: &Checkpoint, spec: &ModelSpec) -> Self {
        source.release_all();
        let block = |layer: usize| source.pages(&format!("{}.", spec.layer_prefix(layer)));
        let blocks = (0..spec.num_layers).map(block).collect();
        let table = source.pages(&format!("{}.", spec.embedding_module()));
        match spec.tie_word_embeddings {
            true => StreamedPages { blocks, head: table, table: Vec::new() },
            false => {
                let head = source.pages(&format!("{}.", spec.head_module()));
                StreamedPages { blocks, head, table }
            }
        }
    }

    /// Begins to read a block from the disk.
    pub fn read_ahead(&self, layer: usize) {
        self.blocks.get(layer).into_iter().flatten().for_each(Pages::read_ahead);
    }

    /// Gives a block's pages back.
    pub fn release(&self, layer: usize) {
        self.blocks.get(layer).into_iter().flatten().for_each(Pages::release);
    }
}

/// Streaming on the CPU: blocks are used where they are mapped.
impl WeightStream for StreamedPages {
    fn enter(&mut self, layer: usize, direction: Direction) {
        if let Some(next) = next(layer, self.blocks.len(), direction) {
            self.read_ahead(next);
        }
    }

    fn leave(&mut self, layer: usize, direction: Direction) {
        if next(layer, self.blocks.len(), direction).is_some() {
            self.release(layer);
        }
    }

    fn leave_table(&mut self) {
        self.table.iter().for_each(Pages::release);
    }

    fn leave_head(&mut self) {
        self.head.iter().for_each(Pages::release);
    }

    fn bytes_in_memory(&self) -> Option<u64> {
        None
    }
}
