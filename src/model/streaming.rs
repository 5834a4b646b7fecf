//! Frozen weights that are read from their file just in time.
//!
//! 4-bit blocks lie in a mapped file, so reading them needs no code: what streaming does is to tell
//! the system early which block comes next, and to give a block's pages back when it has been used.
//! At any time the block at work and the next one are in memory. The bytes are those of a resident
//! run, and so are the losses.

use super::spec::ModelSpec;
use crate::checkpoint::{Checkpoint, Pages};

/// Which way the blocks are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// First to last.
    Forward,
    /// Last to first.
    Backward,
}

/// The pages of every block's weights, of the matrix that makes logits, and of the table of
/// embeddings where that is another.
#[derive(Debug, Clone)]
pub struct Streaming {
    blocks: Vec<Vec<Pages>>,
    head: Vec<Pages>,
    table: Vec<Pages>,
}

impl Streaming {
    /// Of weights that are used as they are stored in `source`; what loading them has read is
    /// given back.
    pub fn new(source: &Checkpoint, spec: &ModelSpec) -> Self {
        source.release_all();
        let pages = |prefix: &str| match source.pages(prefix) {
            // GPT-2 files may lack the prefix.
            none if none.is_empty() => {
                source.pages(prefix.strip_prefix("transformer.").unwrap_or(prefix))
            }
            pages => pages,
        };
        let block = |layer: usize| pages(&format!("{}.", spec.layer_prefix(layer)));
        let blocks = (0..spec.num_layers).map(block).collect();
        let table = pages(&format!("{}.", spec.embedding_module()));
        match spec.tie_word_embeddings {
            true => Streaming { blocks, head: table, table: Vec::new() },
            false => {
                let head = pages(&format!("{}.", spec.head_module()));
                Streaming { blocks, head, table }
            }
        }
    }

    /// Before block `layer` is used: the one behind it is read ahead.
    pub fn enter(&self, layer: usize, direction: Direction) {
        let next = match direction {
            Direction::Forward => self.blocks.get(layer + 1),
            Direction::Backward => layer.checked_sub(1).map(|before| &self.blocks[before]),
        };
        next.into_iter().flatten().for_each(Pages::read_ahead);
    }

    /// After block `layer` was used; the last one in either direction is the next one to be used.
    pub fn leave(&self, layer: usize, direction: Direction) {
        let last = match direction {
            Direction::Forward => self.blocks.len() - 1,
            Direction::Backward => 0,
        };
        if layer != last {
            self.blocks[layer].iter().for_each(Pages::release);
        }
    }

    /// After the rows of a pass were read.
    pub fn leave_table(&self) {
        self.table.iter().for_each(Pages::release);
    }

    /// After logits were made.
    pub fn leave_head(&self) {
        self.head.iter().for_each(Pages::release);
    }
}
