//! The trainable numbers: all LoRA matrices of a model in flat buffers, A before B for each linear.
//!
//! Default (bf16): the forward pass reads a bf16 working copy, the optimizer updates an f32 master
//! and rounds it to nearest even after each step: 18 bytes per parameter with gradient and moments.
//! `--adapter-dtype f32` has no working copy and is PEFT's numerics.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

use nibble_quant::FloatType;

pub use super::moment::{Moment, MomentBlocks};
use crate::adapter::{Adapter, AdapterFiles, LoraShape, LoraTarget};
use crate::error::Result;
use crate::kernels::cpu::Cpu;
use crate::kernels::cpu::arena::Buffer;
use crate::kernels::{Kernels, PlannedMemory, Storage};
use crate::plan::{AdapterRegion, MemoryPlan, MomentLayout, Optim, RegionId};

/// Which of a pair a tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Matrix {
    /// `[R, in]`.
    A,
    /// `[out, R]`.
    B,
}

/// One trainable tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterTensor {
    /// PEFT's state-dict key, such as
    /// `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
    pub name: String,
    /// Rows and columns.
    pub shape: [usize; 2],
    /// The tensor's elements in the flat buffers.
    pub range: Range<usize>,
    /// A or B.
    pub matrix: Matrix,
}

/// The flat buffers that outlive a step: weights and moments.
pub const LASTING: [AdapterRegion; 7] = {
    use AdapterRegion::*;
    [Master, FirstMoment, SecondMoment, FirstCodes, FirstAbsmax, SecondCodes, SecondAbsmax]
};

/// All trainable tensors, their gradients and the optimizer's moments, where a backend keeps them.
pub struct Parameters<K: Storage = Cpu> {
    kernels: K,
    targets: Vec<LoraTarget>,
    tensors: Vec<ParameterTensor>,
    working: Option<K::Bf16Buffer>,
    master: K::Buffer,
    training: Option<TrainingState<K::Buffer>>,
}

/// The buffers that exist only where there is a backward pass.
struct TrainingState<B> {
    /// Lent to the backward pass while it runs.
    gradients: Option<B>,
    /// First and second.
    moments: [Moment<B>; 2],
    places: MomentLayout,
}

/// Everything that the optimizer touches, borrowed at once.
pub struct OptimizerView<'a, K: Kernels> {
    /// f32 weights.
    pub master: &'a mut K::Buffer,
    /// f32 gradients.
    pub gradients: &'a mut K::Buffer,
    /// AdamW's first and second moment.
    pub moments: &'a mut [Moment<K::Buffer>; 2],
    /// Where each tensor's moments are.
    pub places: &'a MomentLayout,
    /// The tensors.
    pub tensors: &'a [ParameterTensor],
    /// bf16 copies to refresh after the update.
    pub working: Option<&'a mut K::Bf16Buffer>,
}

impl<K: Kernels> Parameters<K> {
    /// Takes the adapter's regions from the memory; all zero until [`load`](Parameters::load).
    pub fn new(
        kernels: K,
        targets: Vec<LoraTarget>,
        plan: &MemoryPlan,
        memory: &mut K::Memory,
    ) -> Self {
        use AdapterRegion::*;
        let has = |region| plan.region(RegionId::Adapter(region)).is_some();
        let working = has(Working).then(|| memory.take_bf16(RegionId::Adapter(Working)));
        let mut take = |region| memory.take(RegionId::Adapter(region));
        let tensors = tensors_of(&targets);
        let packed = has(FirstCodes);
        let optim = if packed { Optim::Adamw8bit } else { Optim::AdamwTorch };
        let training = has(Gradients).then(|| TrainingState {
            gradients: Some(take(Gradients)),
            moments: [
                (FirstMoment, FirstCodes, FirstAbsmax),
                (SecondMoment, SecondCodes, SecondAbsmax),
            ]
            .map(|(floats, codes, absmax)| Moment {
                floats: take(floats),
                blocks: packed.then(|| MomentBlocks { codes: take(codes), absmax: take(absmax) }),
            }),
            places: MomentLayout::new(optim, tensors.iter().map(|tensor| tensor.range.len())),
        });
        let master = take(Master);
        Parameters { kernels, targets, tensors, working, master, training }
    }

    /// The adapted linears, in model order.
    pub fn targets(&self) -> &[LoraTarget] {
        &self.targets
    }

    /// The tensors, A and B of each target in turn.
    pub fn tensors(&self) -> &[ParameterTensor] {
        &self.tensors
    }

    /// Elements of all tensors.
    pub fn elements(&self) -> usize {
        self.tensors.last().map_or(0, |tensor| tensor.range.end)
    }

    /// Lends the gradients to a backward pass, which also reads the rest of `self`.
    pub(super) fn take_gradients(&mut self) -> Option<K::Buffer> {
        self.training.as_mut().and_then(|state| state.gradients.take())
    }

    /// Returns what [`take_gradients`](Parameters::take_gradients) lent.
    pub(super) fn put_gradients(&mut self, gradients: K::Buffer) {
        if let Some(state) = &mut self.training {
            state.gradients = Some(gradients);
        }
    }

    /// Copies an adapter's tensors in; it must have been resolved to the same targets.
    pub fn load(&mut self, adapter: &Adapter) {
        assert_eq!(adapter.targets.len(), self.targets.len(), "adapter and plan agree");
        for (tensors, pair) in adapter.tensors.iter().zip(self.tensors.chunks_exact(2)) {
            self.kernels.set_values(&tensors.a, &mut self.master, pair[0].range.start);
            self.kernels.set_values(&tensors.b, &mut self.master, pair[1].range.start);
        }
        self.refresh_working();
    }

    /// Writes the master weights into an adapter's files.
    ///
    /// # Errors
    /// Those of the backend, and `Io` when the disk refuses.
    pub fn save(&self, files: &AdapterFiles, folder: &Path, dtype: FloatType) -> Result<()> {
        files.write(folder, dtype, &|tensor, elements| {
            let first = self.tensors[tensor].range.start;
            self.values(AdapterRegion::Master, first + elements.start..first + elements.end)
        })
    }

    /// Rounds the master to the bf16 working copy.
    pub fn refresh_working(&mut self) {
        let elements = self.elements();
        if let Some(working) = &mut self.working {
            self.kernels.round(&self.master, working, elements);
        }
    }

    /// Zeroes the gradients.
    pub fn zero_gradients(&mut self) {
        let elements = self.elements();
        let gradients = self.training.as_mut().and_then(|state| state.gradients.as_mut());
        if let Some(gradients) = gradients {
            self.kernels.zero(gradients, elements);
        }
    }

    /// Where each tensor's moments are.
    ///
    /// # Panics
    /// Without training buffers.
    pub fn moments(&self) -> &MomentLayout {
        &self.training.as_ref().expect("planned for training").places
    }

    /// f32 words of one flat buffer.
    fn words(&self, region: AdapterRegion) -> usize {
        use AdapterRegion::*;
        match region {
            Working => 0,
            Master | Gradients => self.elements(),
            FirstMoment | SecondMoment => self.moments().float_elements,
            FirstCodes | SecondCodes => self.moments().code_words(),
            FirstAbsmax | SecondAbsmax => self.moments().blocks,
        }
    }

    /// Some words of one flat buffer, none where it was not planned; a copy where the program does not
    /// see it.
    ///
    /// # Errors
    /// Those of the backend.
    ///
    /// # Panics
    /// Without training buffers, unless `region` is the master or the working copy, which has no f32 words.
    pub fn values(&self, region: AdapterRegion, words: Range<usize>) -> Result<Cow<'_, [f32]>> {
        match self.buffer(region) {
            Some(buffer) => self.kernels.values(buffer, words),
            None => Ok(Cow::Borrowed(&[])),
        }
    }

    /// All [`values`](Parameters::values) of one flat buffer.
    ///
    /// # Errors
    /// Those of the backend.
    ///
    /// # Panics
    /// As `values`.
    pub fn all_values(&self, region: AdapterRegion) -> Result<Cow<'_, [f32]>> {
        self.values(region, 0..self.words(region))
    }

    /// Overwrites words of one flat buffer from `first` on. Once all of the master is written, the
    /// working copy has to be [refreshed](Parameters::refresh_working).
    ///
    /// # Panics
    /// Without training buffers.
    pub fn set_values(&mut self, region: AdapterRegion, first: usize, values: &[f32]) {
        let kernels = self.kernels.clone();
        if let Some(buffer) = self.buffer_mut(region) {
            kernels.set_values(values, buffer, first);
        }
    }

    /// Overwrites all of one flat buffer; the working copy follows the master.
    ///
    /// # Panics
    /// Without training buffers.
    pub fn replace(&mut self, region: AdapterRegion, values: &[f32]) {
        assert_eq!(values.len(), self.words(region), "{region:?} has another length");
        self.set_values(region, 0, values);
        if region == AdapterRegion::Master {
            self.refresh_working();
        }
    }

    /// The flat buffer of f32 words that is `region`, if it was planned.
    fn buffer(&self, region: AdapterRegion) -> Option<&K::Buffer> {
        use AdapterRegion::*;
        let training = || self.training.as_ref().expect("planned for training");
        match region {
            Working => None,
            Master => Some(&self.master),
            Gradients => training().gradients.as_ref(),
            FirstMoment | FirstCodes | FirstAbsmax => training().moments[0].buffer(region),
            SecondMoment | SecondCodes | SecondAbsmax => training().moments[1].buffer(region),
        }
    }

    /// [`buffer`](Parameters::buffer), to be overwritten.
    fn buffer_mut(&mut self, region: AdapterRegion) -> Option<&mut K::Buffer> {
        use AdapterRegion::*;
        let OptimizerView { master, gradients, moments: [first, second], .. } =
            self.optimizer_view();
        match region {
            Working => None,
            Master => Some(master),
            Gradients => Some(gradients),
            FirstMoment | FirstCodes | FirstAbsmax => first.buffer_mut(region),
            SecondMoment | SecondCodes | SecondAbsmax => second.buffer_mut(region),
        }
    }

    /// The backend that keeps them.
    pub fn kernels(&self) -> &K {
        &self.kernels
    }

    /// The weights in bf16, as the forward pass reads them; `None` where it reads the master.
    pub fn working_copies(&self) -> Option<&K::Bf16Buffer> {
        self.working.as_ref()
    }

    /// The f32 weights where the backend keeps them.
    pub fn master_buffer(&self) -> &K::Buffer {
        &self.master
    }

    /// What an optimizer step needs.
    ///
    /// # Panics
    /// Without training buffers: a model planned for evaluation has no optimizer.
    pub fn optimizer_view(&mut self) -> OptimizerView<'_, K> {
        let state = self.training.as_mut().expect("planned for training");
        OptimizerView {
            master: &mut self.master,
            gradients: state.gradients.as_mut().expect("returned by the backward pass"),
            moments: &mut state.moments,
            places: &state.places,
            tensors: &self.tensors,
            working: self.working.as_mut(),
        }
    }

    /// Elements of target `index`'s pair, A then B, in the flat buffers.
    pub fn pair_range(&self, index: usize) -> Range<usize> {
        self.tensors[2 * index].range.start..self.tensors[2 * index + 1].range.end
    }

    /// Elements of target `index`'s A, and of its B, in the flat buffers.
    pub fn matrix_ranges(&self, index: usize) -> [Range<usize>; 2] {
        [2 * index, 2 * index + 1].map(|tensor| self.tensors[tensor].range.clone())
    }

    /// Offset of target `index`'s pair in the flat buffers.
    pub(super) fn pair_offset(&self, index: usize) -> usize {
        self.tensors[2 * index].range.start
    }
}

impl Parameters {
    /// f32 weights.
    pub fn master(&self) -> &[f32] {
        &self.master
    }

    /// f32 gradients; empty without training.
    pub fn gradients(&self) -> &[f32] {
        let gradients = self.training.as_ref().and_then(|state| state.gradients.as_ref());
        gradients.map_or(&[], |gradients: &Buffer<f32>| gradients)
    }

    /// Widens the pair of target `index` (A then B) into `pair`: what the forward pass computes
    /// with.
    pub(crate) fn widen_pair(&self, index: usize, pair: &mut [f32]) {
        let range = self.pair_range(index);
        match &self.working {
            Some(working) => {
                pair.iter_mut().zip(&working[range]).for_each(|(to, from)| *to = from.to_f32());
            }
            None => pair[..range.len()].copy_from_slice(&self.master[range]),
        }
    }
}

fn tensors_of(targets: &[LoraTarget]) -> Vec<ParameterTensor> {
    let (mut tensors, mut offset) = (Vec::with_capacity(2 * targets.len()), 0);
    for target in targets {
        let LoraShape { in_features, out_features, rank, .. } = target.shape;
        let rows = [
            (target.key_a(), [rank, in_features], Matrix::A),
            (target.key_b(), [out_features, rank], Matrix::B),
        ];
        for (name, shape, matrix) in rows {
            let elements = shape[0] * shape[1];
            let range = offset..offset + elements;
            tensors.push(ParameterTensor { name, shape, range, matrix });
            offset += elements;
        }
    }
    tensors
}
