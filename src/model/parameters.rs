//! The trainable numbers: all LoRA matrices of a model in flat buffers, A before B for each linear.
//!
//! Default (bf16): the forward pass reads a bf16 working copy, the optimizer updates an f32 master
//! and rounds it to nearest even after each step: 18 bytes per parameter with gradient and moments.
//! `--adapter-dtype f32` has no working copy and is PEFT's numerics.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use crate::adapter::{Adapter, LoraTarget, LoraTensors};
use crate::kernels::cpu::arena::{Arena, Buffer};
use crate::plan::{MemoryPlan, RegionType};

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
    /// Its elements in the flat buffers.
    pub range: Range<usize>,
    /// A or B.
    pub matrix: Matrix,
}

/// All trainable tensors, their gradients and the optimizer's moments.
pub struct Parameters {
    targets: Vec<LoraTarget>,
    tensors: Vec<ParameterTensor>,
    working: Option<Buffer<bf16>>,
    master: Buffer<f32>,
    training: Option<TrainingState>,
}

/// The buffers that exist only where there is a backward pass.
struct TrainingState {
    /// Lent to the backward pass while it runs.
    gradients: Option<Buffer<f32>>,
    first_moment: Buffer<f32>,
    second_moment: Buffer<f32>,
}

/// Everything that the optimizer touches, borrowed at once.
pub struct OptimizerView<'a> {
    /// The tensors and where they lie.
    pub tensors: &'a [ParameterTensor],
    /// f32 weights.
    pub master: &'a mut [f32],
    /// f32 gradients.
    pub gradients: &'a mut [f32],
    /// First moments.
    pub first_moment: &'a mut [f32],
    /// Second moments.
    pub second_moment: &'a mut [f32],
    /// bf16 copies to refresh after the update.
    pub working: Option<&'a mut [bf16]>,
}

impl Parameters {
    /// Takes the adapter's regions from the arena; all zero until [`load`](Parameters::load).
    pub fn new(targets: Vec<LoraTarget>, plan: &MemoryPlan, arena: &mut Arena) -> Self {
        let has = |name: &str| plan.regions.iter().any(|region| region.name == name);
        let working = plan
            .regions
            .iter()
            .any(|r| r.name == "adapter.working" && r.dtype == RegionType::Bf16)
            .then(|| arena.take("adapter.working"));
        let training = has("adapter.gradients").then(|| TrainingState {
            gradients: Some(arena.take("adapter.gradients")),
            first_moment: arena.take("adapter.first_moment"),
            second_moment: arena.take("adapter.second_moment"),
        });
        let tensors = tensors_of(&targets);
        Parameters { targets, tensors, working, master: arena.take("adapter.master"), training }
    }

    /// The adapted linears, in model order.
    pub fn targets(&self) -> &[LoraTarget] {
        &self.targets
    }

    /// The tensors, A and B of each target in turn.
    pub fn tensors(&self) -> &[ParameterTensor] {
        &self.tensors
    }

    /// f32 weights.
    pub fn master(&self) -> &[f32] {
        &self.master
    }

    /// f32 gradients; empty without training.
    pub fn gradients(&self) -> &[f32] {
        self.training.as_ref().and_then(|state| state.gradients.as_deref()).unwrap_or(&[])
    }

    /// Lends the gradients to a backward pass, which also reads the rest of `self`.
    pub(super) fn take_gradients(&mut self) -> Option<Buffer<f32>> {
        self.training.as_mut().and_then(|state| state.gradients.take())
    }

    /// Returns what [`take_gradients`](Parameters::take_gradients) lent.
    pub(super) fn put_gradients(&mut self, gradients: Buffer<f32>) {
        if let Some(state) = &mut self.training {
            state.gradients = Some(gradients);
        }
    }

    /// Copies an adapter's tensors in; it must have been resolved to the same targets.
    pub fn load(&mut self, adapter: &Adapter) {
        assert_eq!(adapter.targets.len(), self.targets.len(), "adapter and plan agree");
        for (tensors, pair) in adapter.tensors.iter().zip(self.tensors.chunks_exact(2)) {
            self.master[pair[0].range.clone()].copy_from_slice(&tensors.a);
            self.master[pair[1].range.clone()].copy_from_slice(&tensors.b);
        }
        self.refresh_working();
    }

    /// The master weights of every target.
    pub fn to_tensors(&self) -> Vec<LoraTensors> {
        let copy = |tensor: &ParameterTensor| self.master[tensor.range.clone()].to_vec();
        let pairs = self.tensors.chunks_exact(2);
        pairs.map(|pair| LoraTensors { a: copy(&pair[0]), b: copy(&pair[1]) }).collect()
    }

    /// Rounds the master to the bf16 working copy.
    pub fn refresh_working(&mut self) {
        if let Some(working) = &mut self.working {
            const CHUNK: usize = 1 << 14;
            working.par_chunks_mut(CHUNK).zip(self.master.par_chunks(CHUNK)).for_each(
                |(to, from)| {
                    to.iter_mut().zip(from).for_each(|(to, &from)| *to = bf16::from_f32(from));
                },
            );
        }
    }

    /// Zeroes the gradients.
    pub fn zero_gradients(&mut self) {
        let gradients = self.training.as_mut().and_then(|state| state.gradients.as_mut());
        if let Some(gradients) = gradients {
            gradients.fill(0.0);
        }
    }

    /// What an optimizer step needs.
    ///
    /// # Panics
    /// Without training buffers: a model planned for evaluation has no optimizer.
    pub fn optimizer_view(&mut self) -> OptimizerView<'_> {
        let state = self.training.as_mut().expect("planned for training");
        OptimizerView {
            tensors: &self.tensors,
            master: &mut self.master,
            gradients: state.gradients.as_mut().expect("returned by the backward pass"),
            first_moment: &mut state.first_moment,
            second_moment: &mut state.second_moment,
            working: self.working.as_deref_mut(),
        }
    }

    /// Widens the pair of target `index` (A then B) into `pair`: what the forward pass computes
    /// with.
    pub(crate) fn widen_pair(&self, index: usize, pair: &mut [f32]) {
        let range = self.tensors[2 * index].range.start..self.tensors[2 * index + 1].range.end;
        match &self.working {
            Some(working) => {
                pair.iter_mut().zip(&working[range]).for_each(|(to, from)| *to = from.to_f32());
            }
            None => pair[..range.len()].copy_from_slice(&self.master[range]),
        }
    }

    /// Offset of target `index`'s pair in the flat buffers.
    pub(super) fn pair_offset(&self, index: usize) -> usize {
        self.tensors[2 * index].range.start
    }
}

fn tensors_of(targets: &[LoraTarget]) -> Vec<ParameterTensor> {
    let (mut tensors, mut offset) = (Vec::with_capacity(2 * targets.len()), 0);
    for target in targets {
        let rows = [
            ("lora_A", [target.r, target.in_features], Matrix::A),
            ("lora_B", [target.out_features, target.r], Matrix::B),
        ];
        for (suffix, shape, matrix) in rows {
            let elements = shape[0] * shape[1];
            tensors.push(ParameterTensor {
                name: format!("base_model.model.{}.{suffix}.weight", target.module),
                shape,
                range: offset..offset + elements,
                matrix,
            });
            offset += elements;
        }
    }
    tensors
}
