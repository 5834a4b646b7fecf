//! What waits outside of the working memory, and when it is copied: inputs of blocks, and what their
//! attention made.
//!
//! Layers that offload share two slots of each kind in turn. Forward: a layer's input is copied out while
//! the layer computes, what its attention made when it is done, and the next layer but one waits for
//! that before it overwrites the slot. Backward: while a layer computes, what the one before it needs is
//! copied into the slots that the one behind it has left. The last two are still where they were.

use crate::error::Result;
use crate::kernels::Kernels;
use crate::model::block::AttentionOutput;
use crate::plan::Settings;
use crate::plan::settings::OFFLOAD_SLOTS;

/// Layers that share the slots of one kind.
struct Turns {
    layers: Vec<usize>,
    /// Number of the first slot's copies.
    first_copy: usize,
}

impl Turns {
    /// Slots that are planned: they are the first of the model's buffers of their kind.
    fn slots(&self) -> usize {
        OFFLOAD_SLOTS.min(self.layers.len())
    }

    /// Number of `layer` among them.
    fn index(&self, layer: usize) -> Option<usize> {
        self.layers.binary_search(&layer).ok()
    }

    /// The slot of `layer`.
    fn slot(&self, layer: usize) -> Option<usize> {
        self.index(layer).map(|index| index % OFFLOAD_SLOTS)
    }

    /// The copies of the slot of number `index`.
    fn copies(&self, index: usize) -> usize {
        self.first_copy + index % OFFLOAD_SLOTS
    }

    /// Orders what follows behind the last copy of `layer`'s slot.
    fn settle<K: Kernels>(&self, kernels: &K, store: &mut K::Offload, layer: usize) {
        if let Some(index) = self.index(layer) {
            kernels.settle(store, self.copies(index));
        }
    }

    /// Number of the turn whose copy is brought back while `layer` goes backward.
    fn next(&self, layer: usize) -> Option<usize> {
        let index = self.index(layer)?;
        if index + 1 < self.layers.len() { index.checked_sub(1) } else { None }
    }
}

/// The store, and the layers that use it.
pub(super) struct Offload<K: Kernels> {
    pub(super) store: K::Offload,
    inputs: Turns,
    attended: Turns,
    /// Columns of an input, of the statistics of attention and of its output.
    widths: [usize; 3],
}

impl<K: Kernels> Offload<K> {
    pub(super) fn new(store: K::Offload, settings: &Settings, widths: [usize; 3]) -> Self {
        let inputs = Turns { layers: settings.offloaded(), first_copy: 0 };
        let layers = settings.offloaded_attention();
        let attended = Turns { layers, first_copy: OFFLOAD_SLOTS };
        Offload { store, inputs, attended, widths }
    }

    /// Slots of inputs, and of what attention makes.
    pub(super) fn slots(&self) -> [usize; 2] {
        [self.inputs.slots(), self.attended.slots()]
    }

    /// Where the input of `layer` is when it is at work.
    pub(super) fn slot(&self, layer: usize) -> Option<usize> {
        self.inputs.slot(layer)
    }

    /// Where what its attention makes is then.
    pub(super) fn slot_of_attention(&self, layer: usize) -> Option<usize> {
        self.attended.slot(layer)
    }

    /// Frees the slot of `layer`'s input, before that is written.
    pub(super) fn before_write(&mut self, kernels: &K, layer: usize) {
        self.inputs.settle(kernels, &mut self.store, layer);
    }

    /// Begins to offload the input of `layer`, once it is written.
    pub(super) fn written(
        &mut self,
        kernels: &K,
        inputs: &[K::Buffer],
        layer: usize,
        tokens: usize,
    ) {
        if let Some(index) = self.inputs.index(layer) {
            let from = (&inputs[index % OFFLOAD_SLOTS], self.inputs.copies(index));
            kernels.offload(&mut self.store, from, index, tokens * self.widths[0]);
        }
    }

    /// Frees the slot of what the attention of `layer` makes, before it writes.
    pub(super) fn before_attention(&mut self, kernels: &K, layer: usize) {
        self.attended.settle(kernels, &mut self.store, layer);
    }

    /// Begins to offload what the attention of `layer` has made.
    pub(super) fn attention_written(
        &mut self,
        kernels: &K,
        attended: &[AttentionOutput<K::Buffer>],
        layer: usize,
        tokens: usize,
    ) {
        let Some(index) = self.attended.index(layer) else { return };
        let AttentionOutput { lse, output: o } = &attended[index % OFFLOAD_SLOTS];
        let (copies, regions) = (self.attended.copies(index), self.regions(index));
        let [_, statistics, output] = self.widths.map(|width| tokens * width);
        kernels.offload(&mut self.store, (lse, copies), regions[0], statistics);
        kernels.offload(&mut self.store, (o, copies), regions[1], output);
    }

    /// Offloaded regions of number `index` of those whose attention waits: they are behind all inputs.
    fn regions(&self, index: usize) -> [usize; 2] {
        let first = self.inputs.layers.len() + 2 * index;
        [first, first + 1]
    }

    /// After a pass: the input of `layer` is in its slot again, and that of another no longer.
    pub(super) fn bring_back(
        &mut self,
        kernels: &K,
        inputs: &mut [K::Buffer],
        layer: usize,
        tokens: usize,
    ) -> Result<()> {
        let Some(index) = self.inputs.index(layer) else { return Ok(()) };
        self.inputs.settle(kernels, &mut self.store, layer);
        self.fetch_input(kernels, inputs, index, tokens);
        self.inputs.settle(kernels, &mut self.store, layer);
        kernels.offload_failure(&mut self.store)
    }

    /// Before `layer` goes backward: what it reads is there, and that of the one before it on its way.
    pub(super) fn before_backward(
        &mut self,
        kernels: &K,
        (inputs, attended): (&mut [K::Buffer], &mut [AttentionOutput<K::Buffer>]),
        layer: usize,
        tokens: usize,
    ) {
        self.inputs.settle(kernels, &mut self.store, layer);
        if let Some(next) = self.inputs.next(layer) {
            self.fetch_input(kernels, inputs, next, tokens);
        }
        self.attended.settle(kernels, &mut self.store, layer);
        if let Some(next) = self.attended.next(layer) {
            self.fetch_attended(kernels, attended, next, tokens);
        }
    }

    fn fetch_input(&mut self, kernels: &K, inputs: &mut [K::Buffer], index: usize, tokens: usize) {
        let to = (&mut inputs[index % OFFLOAD_SLOTS], self.inputs.copies(index));
        kernels.fetch(&mut self.store, index, to, tokens * self.widths[0]);
    }

    fn fetch_attended(
        &mut self,
        kernels: &K,
        attended: &mut [AttentionOutput<K::Buffer>],
        index: usize,
        tokens: usize,
    ) {
        let AttentionOutput { lse, output: o } = &mut attended[index % OFFLOAD_SLOTS];
        let (copies, regions) = (self.attended.copies(index), self.regions(index));
        let [_, statistics, output] = self.widths.map(|width| tokens * width);
        kernels.fetch(&mut self.store, regions[0], (lse, copies), statistics);
        kernels.fetch(&mut self.store, regions[1], (o, copies), output);
    }
}
