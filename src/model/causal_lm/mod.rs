//! A model at work: frozen weights, adapters and the planned buffers of a backend.
//!
//! One pass is over a stream of T tokens of one or more documents. In training it keeps every block's
//! input, or offloads it; a layer that does not keep its activations recomputes what is missing when its
//! turn comes. The head runs only on rows that have a target, a chunk of logits at a time, and computes the
//! gradient of a chunk before the next one overwrites it.

mod batch;
mod buffers;
mod generation;
mod offload;
mod passes;
pub mod randomness;
pub mod score;
mod shrink;

use buffers::Buffers;
use randomness::{Draws, Randomness};

use super::block::Variant;
use super::parameters::Parameters;
use super::spec::{ModelSpec, TensorRole, TensorSpec};
use super::weights::Weights;
use crate::data::Batch;
use crate::error::Result;
use crate::kernels::cpu::Cpu;
use crate::kernels::{Kernels, PlannedMemory, Residency, TokenLosses};
use crate::ledger::{self, Phase};
use crate::plan::{MemoryPlan, Settings, WeightParts};

/// A loaded model.
pub struct Model<K: Kernels = Cpu> {
    kernels: K,
    spec: ModelSpec,
    weights: Weights<K>,
    parameters: Parameters<K>,
    settings: Settings,
    plan: MemoryPlan,
    random: Randomness,
    buffers: Buffers<K>,
    loss: K::LossSum,
    /// Length of the mapping that the buffers lie in.
    arena_bytes: usize,
    residency: Residency,
    /// Tokens in the caches.
    cached_tokens: usize,
    /// Tokens of the last training pass.
    trained_tokens: usize,
}

/// A model without its buffers.
struct Frozen<K: Kernels> {
    kernels: K,
    spec: ModelSpec,
    weights: Weights<K>,
    random: Randomness,
}

/// The memory of a plan.
struct Reserved<K: Kernels> {
    plan: MemoryPlan,
    memory: K::Memory,
    store: K::Offload,
}

/// What kind of forward pass.
#[derive(Debug, Clone, Copy, Default)]
struct Mode {
    /// A backward pass follows; what is drawn in both.
    training: Option<Draws>,
    variant: Variant,
    cached: bool,
}

impl<K: Kernels> Frozen<K> {
    /// A model of `weights`, which the backend `kernels` holds, and `settings` with the head where the backend
    /// has it.
    fn new(
        kernels: K,
        spec: ModelSpec,
        weights: Weights<K>,
        settings: Settings,
    ) -> (Self, Settings) {
        let settings = Settings { head_on_host: kernels.head_is_on_host(), ..settings };
        (Frozen { kernels, spec, weights, random: Randomness::default() }, settings)
    }

    /// The memory for `settings`.
    fn reserve(&self, settings: &Settings) -> Result<Reserved<K>> {
        let plan = self.kernels.plan(&self.spec, settings);
        let memory = self.kernels.allocate(&plan)?;
        let store = self.kernels.offload_store(&plan, settings.scratch_folder.as_deref())?;
        Ok(Reserved { plan, memory, store })
    }

    fn with_buffers(self, settings: Settings, reserved: Reserved<K>) -> Model<K> {
        let Frozen { kernels, spec, mut weights, random } = self;
        let Reserved { plan, mut memory, store } = reserved;
        weights.attach(&settings.targets);
        let targets = settings.targets.clone();
        let parameters = Parameters::new(kernels.clone(), targets, &plan, &mut memory);
        let buffers = Buffers::new(&spec, &settings, store, &mut memory);
        let loss = kernels.loss_sum(&mut memory);
        let unused = memory.untaken();
        assert!(unused.is_empty(), "the plan has regions that nobody uses: {unused:?}");
        let (arena_bytes, residency) = (memory.bytes(), memory.residency(&plan));
        Model {
            kernels,
            spec,
            weights,
            parameters,
            settings,
            plan,
            random,
            buffers,
            loss,
            arena_bytes,
            residency,
            cached_tokens: 0,
            trained_tokens: 0,
        }
    }
}

impl Model {
    /// The model on the CPU: see [`with_kernels`](Model::with_kernels).
    ///
    /// # Errors
    /// Those of `with_kernels`.
    pub fn new(spec: ModelSpec, weights: Weights, settings: Settings) -> Result<Self> {
        Model::with_kernels(Cpu::default(), spec, weights, settings)
    }

    /// The residual stream `[T, D]` before block `layer` (after the last for `num_layers`), as the
    /// last training pass left it; of an offloaded layer, that of one that shares its slot. For tests.
    pub fn block_input(&self, layer: usize) -> &[f32] {
        &self.buffers.inputs[self.buffers.input_indices[layer]]
    }
}

impl<K: Kernels> Model<K> {
    /// A model of `weights`, which the backend `kernels` holds, with the buffers of the plan for
    /// `settings`. The adapter's tensors are zero until they are loaded.
    ///
    /// # Errors
    /// `Budget` when the memory cannot be reserved.
    pub fn with_kernels(
        kernels: K,
        spec: ModelSpec,
        weights: Weights<K>,
        settings: Settings,
    ) -> Result<Self> {
        let (frozen, settings) = Frozen::new(kernels, spec, weights, settings);
        let reserved = frozen.reserve(&settings)?;
        Ok(frozen.with_buffers(settings, reserved))
    }

    /// The model with dropout, or noise on the embeddings, in training passes.
    ///
    /// # Panics
    /// With dropout that the plan has no room for.
    pub fn with_randomness(self, random: Randomness) -> Self {
        let room = self.settings.lora_dropout;
        assert!(room || random.dropout.is_none(), "the plan has no room for dropout");
        Model { random, ..self }
    }

    /// What the plan was made for.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The frozen weights.
    pub fn weights(&self) -> &Weights<K> {
        &self.weights
    }

    /// Gives the buffers back and returns the weights, for another plan or adapter.
    pub fn into_weights(self) -> Weights<K> {
        self.weights
    }

    /// The plan that was allocated.
    pub fn plan(&self) -> &MemoryPlan {
        &self.plan
    }

    /// Bytes that were allocated for all buffers: those of the plan.
    pub fn arena_bytes(&self) -> usize {
        self.arena_bytes
    }

    /// Bytes of each region of the plan that are in memory now.
    pub fn region_bytes(&self) -> Vec<u64> {
        (self.residency)()
    }

    /// What of the frozen weights is in memory now, by kind.
    pub fn weight_bytes(&self) -> WeightParts {
        let vector =
            |tensor: &TensorSpec| matches!(tensor.role, TensorRole::Norm | TensorRole::Bias);
        let vectors = self.spec.inventory().into_iter().filter(vector);
        let elements: usize = vectors.map(|tensor| tensor.shape.iter().product::<usize>()).sum();
        let vectors = (elements * size_of::<f32>()) as u64;
        WeightParts { vectors, ..self.weights.bytes_in_memory(&self.kernels) }
    }

    /// The adapters.
    pub fn parameters(&self) -> &Parameters<K> {
        &self.parameters
    }

    /// The adapters.
    pub fn parameters_mut(&mut self) -> &mut Parameters<K> {
        &mut self.parameters
    }

    /// Losses of the batch's trained tokens; adds `scale ·` their gradient to the adapters'. `step` is the number
    /// of the micro-batch since the start of the run: dropout and noise depend on it.
    ///
    /// # Errors
    /// `Usage` when the batch is larger than planned, `Input` when an id is outside the vocabulary.
    pub fn forward_backward(
        &mut self,
        batch: &Batch,
        scale: f32,
        step: u64,
    ) -> Result<TokenLosses> {
        let (tokens, targets) = self.begin(batch)?;
        let draws = Draws { seed: self.random.seed, step, first_token: batch.first_token };
        ledger::enter(Phase::Forward);
        let mode = Mode { training: Some(draws), ..Mode::default() };
        self.forward(&batch.input_ids, &tokens, mode);
        ledger::enter(Phase::Loss);
        self.head_loss(&targets, Some(scale));
        ledger::enter(Phase::Backward);
        self.backward(&tokens, draws);
        self.kernels.offload_failure(&mut self.buffers.offload.store)?;
        self.kernels.read_loss(&self.loss)
    }

    /// Losses of the batch's trained tokens, without dropout and noise.
    ///
    /// # Errors
    /// As [`forward_backward`](Model::forward_backward).
    pub fn evaluate(&mut self, batch: &Batch, variant: Variant) -> Result<TokenLosses> {
        let (tokens, targets) = self.begin(batch)?;
        self.forward(&batch.input_ids, &tokens, Mode { variant, ..Mode::default() });
        self.head_loss(&targets, None);
        self.kernels.read_loss(&self.loss)
    }

    /// Logits `[rows.len(), V]` at some tokens of the stream.
    ///
    /// # Errors
    /// As [`forward_backward`](Model::forward_backward).
    pub fn logits(&mut self, batch: &Batch, rows: &[u32]) -> Result<Vec<f32>> {
        let (tokens, _) = self.begin(batch)?;
        self.forward(&batch.input_ids, &tokens, Mode::default());
        let mut out = Vec::with_capacity(rows.len() * self.spec.vocab_size);
        for chunk in rows.chunks(self.settings.head(self.spec.vocab_size).whole_rows) {
            self.head_logits(chunk, false);
            out.extend_from_slice(&self.capped_logits(chunk.len())?);
        }
        self.leave_head();
        Ok(out)
    }

    /// The first block whose input in the last training pass had values that are not finite;
    /// `num_layers` stands for the output of the last one.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn first_bad_block_input(&mut self) -> Result<Option<usize>> {
        let (tokens, elements) = (self.trained_tokens, self.trained_tokens * self.spec.hidden_size);
        let Buffers { inputs, input_indices, offload, .. } = &mut self.buffers;
        for (layer, &index) in input_indices.iter().enumerate() {
            offload.bring_back(&self.kernels, inputs, layer, tokens)?;
            let values = self.kernels.values(&inputs[index], 0..elements)?;
            if values.iter().any(|x| !x.is_finite()) {
                return Ok(Some(layer));
            }
        }
        Ok(None)
    }
}
