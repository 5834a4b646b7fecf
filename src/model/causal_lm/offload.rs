//! Which block inputs wait outside of the working memory, and when they are copied.
//!
//! Offloaded layers share two slots in turn. Forward: a layer's input is copied out while the layer
//! computes, and the next layer but one waits for that before it overwrites the slot. Backward: while
//! a layer computes, the input of the one before it is copied into the slot that the one behind it
//! has left. The last two are still where they were.

use crate::error::Result;
use crate::kernels::Kernels;
use crate::plan::Settings;
use crate::plan::settings::OFFLOAD_SLOTS;

/// The store, and the offloaded layers.
pub(super) struct Offload<K: Kernels> {
    pub(super) store: K::Offload,
    layers: Vec<usize>,
}

impl<K: Kernels> Offload<K> {
    pub(super) fn new(store: K::Offload, settings: &Settings) -> Self {
        Offload { store, layers: settings.offloaded() }
    }

    /// Slots that are planned: they are the first of the model's inputs.
    pub(super) fn slots(&self) -> usize {
        OFFLOAD_SLOTS.min(self.layers.len())
    }

    /// Number of `layer` among the offloaded ones.
    fn index(&self, layer: usize) -> Option<usize> {
        self.layers.binary_search(&layer).ok()
    }

    /// Where the input of `layer` is when it is at work.
    pub(super) fn slot(&self, layer: usize) -> Option<usize> {
        self.index(layer).map(|index| index % OFFLOAD_SLOTS)
    }

    /// Before the input of `layer` is written.
    pub(super) fn before_write(&mut self, kernels: &K, layer: usize) {
        if let Some(slot) = self.slot(layer) {
            kernels.settle(&mut self.store, slot);
        }
    }

    /// When it is written.
    pub(super) fn written(
        &mut self,
        kernels: &K,
        inputs: &[K::Buffer],
        layer: usize,
        elements: usize,
    ) {
        if let Some(index) = self.index(layer) {
            let slot = index % OFFLOAD_SLOTS;
            kernels.offload(&mut self.store, (&inputs[slot], slot), index, elements);
        }
    }

    /// After a pass: the input of `layer` is in its slot again, and that of another no longer.
    pub(super) fn bring_back(
        &mut self,
        kernels: &K,
        inputs: &mut [K::Buffer],
        layer: usize,
        elements: usize,
    ) -> Result<()> {
        let Some(index) = self.index(layer) else { return Ok(()) };
        let slot = index % OFFLOAD_SLOTS;
        kernels.settle(&mut self.store, slot);
        kernels.fetch(&mut self.store, index, (&mut inputs[slot], slot), elements);
        kernels.settle(&mut self.store, slot);
        kernels.offload_failure(&mut self.store)
    }

    /// Before `layer` goes backward: its input is there, and the one before it on its way.
    pub(super) fn before_backward(
        &mut self,
        kernels: &K,
        inputs: &mut [K::Buffer],
        layer: usize,
        elements: usize,
    ) {
        let Some(index) = self.index(layer) else { return };
        kernels.settle(&mut self.store, index % OFFLOAD_SLOTS);
        if index > 0 && index + 1 < self.layers.len() {
            let slot = (index - 1) % OFFLOAD_SLOTS;
            kernels.fetch(&mut self.store, index - 1, (&mut inputs[slot], slot), elements);
        }
    }
}
