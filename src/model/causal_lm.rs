//! A model at work: frozen weights, adapters and the planned buffers of a backend.
//!
//! One micro-batch is a stream of T tokens of one or more documents. The training pass keeps every
//! block's input; a layer whose policy is checkpoint recomputes the rest when its turn comes. The
//! head runs only on rows that have a target, a chunk of logits at a time, and computes the
//! gradient of a chunk before the next one overwrites it.

pub mod score;

use std::borrow::Cow;

use super::block::{Cache, Dropout, GradientBuffers, Pass, Saved, Workspace};
use super::parameters::Parameters;
use super::spec::ModelSpec;
use super::streaming::Direction;
use super::weights::Weights;
use crate::data::Batch;
use crate::error::{Error, Result};
use crate::kernels::cpu::Cpu;
use crate::kernels::{Columns, Kernels, PlannedMemory, Residency, TokenLayout};
use crate::ledger::{self, Phase};
use crate::plan::{MemoryPlan, Policy, Settings};

/// A loaded model.
pub struct Model<K: Kernels = Cpu> {
    kernels: K,
    spec: ModelSpec,
    weights: Weights<K>,
    parameters: Parameters<K>,
    settings: Settings,
    plan: MemoryPlan,
    dropout: Option<(f32, u64)>,
    buffers: Buffers<K>,
    loss: K::LossSum,
    /// Length of the mapping that the buffers lie in.
    arena_bytes: usize,
    residency: Residency,
    /// Tokens in the caches.
    cached_tokens: usize,
}

/// The arena's regions.
struct Buffers<K: Kernels> {
    /// Inputs of all blocks and the output of the last; two that alternate without training.
    inputs: Vec<K::Buffer>,
    /// Of the layers that keep their activations.
    kept: Vec<Option<Saved<K::Buffer>>>,
    /// Of all other layers, in turn.
    shared: Option<Saved<K::Buffer>>,
    work: Workspace<K::Buffer>,
    head: HeadBuffers<K::Buffer>,
    /// One for each block where text is generated.
    caches: Vec<K::Buffer>,
}

struct HeadBuffers<B> {
    logits: B,
    input: B,
    norm: B,
    stats: B,
    gradients: Option<(B, B)>,
}

impl<K: Kernels> Buffers<K> {
    fn new(spec: &ModelSpec, settings: &Settings, arena: &mut K::Memory) -> Self {
        let training = settings.training();
        let inputs = if training {
            (0..=spec.num_layers).map(|l| arena.take(&format!("layer.{l}.input"))).collect()
        } else {
            vec![arena.take("layer.even.input"), arena.take("layer.odd.input")]
        };
        let keeps = |layer: usize| settings.policies.get(layer) == Some(&Policy::Keep);
        let kept = (0..spec.num_layers)
            .map(|layer| keeps(layer).then(|| saved::<K>(arena, &format!("layer.{layer}"))))
            .collect();
        let cached = if settings.cache_tokens > 0 { spec.num_layers } else { 0 };
        let shared = !training || settings.policies.contains(&Policy::Checkpoint);
        Buffers {
            inputs,
            kept,
            shared: shared.then(|| saved::<K>(arena, "recompute")),
            work: workspace::<K>(spec, settings, arena),
            caches: (0..cached).map(|layer| arena.take(&format!("cache.{layer}"))).collect(),
            head: HeadBuffers {
                logits: arena.take("head.logits"),
                input: arena.take("head.input"),
                norm: arena.take("head.norm"),
                stats: arena.take("head.norm_stats"),
                gradients: training
                    .then(|| (arena.take("head.gradient"), arena.take("head.input_gradient"))),
            },
        }
    }
}

fn saved<K: Kernels>(arena: &mut K::Memory, prefix: &str) -> Saved<K::Buffer> {
    let mut take = |name: &str| arena.take(&format!("{prefix}.{name}"));
    Saved {
        norm1_stats: take("norm1_stats"),
        norm1: take("norm1"),
        qkv: take("qkv"),
        lse: take("lse"),
        attention: take("attention"),
        middle: take("middle"),
        norm2_stats: take("norm2_stats"),
        norm2: take("norm2"),
        gate: take("gate"),
        up: take("up"),
        lora_x: take("lora_x"),
    }
}

fn workspace<K: Kernels>(
    spec: &ModelSpec,
    settings: &Settings,
    arena: &mut K::Memory,
) -> Workspace<K::Buffer> {
    let rotary = spec.rotary.is_some();
    Workspace {
        mlp: arena.take("work.mlp"),
        lora_pair: arena.take("work.lora_pair"),
        dropped: settings.lora_dropout.then(|| arena.take("work.dropped")),
        attention: arena.take("work.attention"),
        rotary: rotary.then(|| (arena.take("rotary.cos"), arena.take("rotary.sin"))),
        gradients: settings.training().then(|| GradientBuffers {
            mlp: arena.take("work.mlp_gradient"),
            stream: arena.take("work.gradient"),
            norm: arena.take("work.norm_gradient"),
            qkv: arena.take("work.qkv_gradient"),
            lora: arena.take("work.lora_gradient"),
        }),
    }
}

/// What kind of forward pass.
#[derive(Debug, Clone, Copy, Default)]
struct Mode {
    dropout: Option<Dropout>,
    base_only: bool,
    cached: bool,
}

/// Tokens whose next token is trained, and those targets.
struct Targets {
    rows: Vec<u32>,
    ids: Vec<u32>,
}

impl Targets {
    fn of(batch: &Batch) -> Self {
        let (mut rows, mut ids) = (Vec::new(), Vec::new());
        for document in batch.cu_seqlens.windows(2) {
            for token in document[0]..document[1].saturating_sub(1) {
                // Label −100 (any negative) is masked.
                if let Ok(target) = u32::try_from(batch.labels[token as usize + 1]) {
                    rows.push(token);
                    ids.push(target);
                }
            }
        }
        Targets { rows, ids }
    }
}

impl Model {
    /// [`on`](Model::on) the CPU.
    ///
    /// # Errors
    /// As there.
    pub fn new(
        spec: ModelSpec,
        weights: Weights,
        settings: Settings,
        dropout: Option<(f32, u64)>,
    ) -> Result<Self> {
        Model::on(Cpu, spec, weights, settings, dropout)
    }

    /// The residual stream `[T, D]` before block `layer` (after the last for `num_layers`), as the
    /// last training pass left it.
    pub fn block_input(&self, layer: usize) -> &[f32] {
        &self.buffers.inputs[layer]
    }
}

impl<K: Kernels> Model<K> {
    /// Allocates the plan for `settings` on a backend and takes `weights`; the adapter's tensors
    /// are zero until they are loaded. `dropout` is `(lora_dropout, seed)`.
    ///
    /// # Errors
    /// `Budget` when the memory cannot be reserved.
    pub fn on(
        kernels: K,
        spec: ModelSpec,
        mut weights: Weights<K>,
        settings: Settings,
        dropout: Option<(f32, u64)>,
    ) -> Result<Self> {
        weights.attach(&settings.targets);
        let plan = kernels.plan(&spec, &settings);
        let mut memory = kernels.allocate(&plan)?;
        let targets = settings.targets.clone();
        let parameters = Parameters::new(kernels.clone(), targets, &plan, &mut memory);
        let buffers = Buffers::new(&spec, &settings, &mut memory);
        let loss = kernels.loss_sum(&mut memory);
        let unused = memory.untaken();
        assert!(unused.is_empty(), "the plan has regions that nobody uses: {unused:?}");
        let (arena_bytes, residency) = (memory.bytes(), memory.residency(&plan));
        Ok(Model {
            kernels,
            spec,
            weights,
            parameters,
            settings,
            plan,
            dropout,
            buffers,
            loss,
            arena_bytes,
            residency,
            cached_tokens: 0,
        })
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

    /// The adapters.
    pub fn parameters(&self) -> &Parameters<K> {
        &self.parameters
    }

    /// The adapters.
    pub fn parameters_mut(&mut self) -> &mut Parameters<K> {
        &mut self.parameters
    }

    /// Sum of the losses of the batch's trained tokens; adds `scale ·` their gradient to the
    /// adapters'. `step` is the number of the micro-batch since the start of the run: dropout
    /// depends on it.
    ///
    /// # Errors
    /// `Usage` when the batch is larger than planned, `Input` when an id is outside the vocabulary.
    pub fn forward_backward(&mut self, batch: &Batch, scale: f32, step: u64) -> Result<f64> {
        let (tokens, targets) = self.begin(batch)?;
        let dropout = self.dropout.map(|(probability, seed)| Dropout { probability, seed, step });
        ledger::enter(Phase::Forward);
        self.forward(&batch.input_ids, &tokens, Mode { dropout, ..Mode::default() });
        ledger::enter(Phase::Loss);
        self.head_loss(&targets, Some(scale));
        ledger::enter(Phase::Backward);
        self.backward(&tokens, dropout);
        self.kernels.read_loss(&self.loss)
    }

    /// Sum of the losses of the batch's trained tokens, without dropout.
    ///
    /// # Errors
    /// As [`forward_backward`](Model::forward_backward).
    pub fn evaluate(&mut self, batch: &Batch) -> Result<f64> {
        let (tokens, targets) = self.begin(batch)?;
        self.forward(&batch.input_ids, &tokens, Mode::default());
        self.head_loss(&targets, None);
        self.kernels.read_loss(&self.loss)
    }

    /// [`evaluate`](Model::evaluate) without the adapters.
    ///
    /// # Errors
    /// As [`forward_backward`](Model::forward_backward).
    pub fn evaluate_base(&mut self, batch: &Batch) -> Result<f64> {
        let (tokens, targets) = self.begin(batch)?;
        self.forward(&batch.input_ids, &tokens, Mode { base_only: true, ..Mode::default() });
        self.head_loss(&targets, None);
        self.kernels.read_loss(&self.loss)
    }

    /// Forgets all decoded tokens.
    pub fn clear_cache(&mut self) {
        self.cached_tokens = 0;
    }

    /// Tokens that were decoded since the last [`clear_cache`](Model::clear_cache).
    pub fn cached_tokens(&self) -> usize {
        self.cached_tokens
    }

    /// Feeds tokens behind those decoded before; returns the logits `[V]` after the last one.
    ///
    /// # Errors
    /// `Usage` when the context is full (`Settings::cache_tokens`) or more tokens come at once than
    /// planned, `Input` when an id is outside the vocabulary.
    pub fn decode(&mut self, ids: &[u32]) -> Result<Cow<'_, [f32]>> {
        let (past, count) = (self.cached_tokens, ids.len());
        let room = self.settings.cache_tokens.saturating_sub(past).min(self.settings.tokens);
        if count == 0 || count > room {
            return Err(Error::usage(format_args!(
                "{count} tokens behind {past} do not fit a context of {}",
                self.settings.cache_tokens
            )));
        }
        let vocab = self.spec.vocab_size;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            let what = format_args!("token id {id} is outside the vocabulary of {vocab}");
            return Err(Error::input(what).hint("the tokenizer belongs to another model"));
        }
        let tokens = TokenLayout::continuing(&[0, count as u32], past as u32);
        self.fill_rotary(&tokens);
        self.forward(ids, &tokens, Mode { cached: true, ..Mode::default() });
        self.cached_tokens += count;
        self.head_logits(&[count as u32 - 1]);
        self.kernels.values(&self.buffers.head.logits, 0..vocab)
    }

    /// Logits `[rows.len(), V]` at some tokens of the stream.
    ///
    /// # Errors
    /// As [`forward_backward`](Model::forward_backward).
    pub fn logits(&mut self, batch: &Batch, rows: &[u32]) -> Result<Vec<f32>> {
        let (tokens, _) = self.begin(batch)?;
        self.forward(&batch.input_ids, &tokens, Mode::default());
        let mut out = Vec::with_capacity(rows.len() * self.spec.vocab_size);
        for chunk in rows.chunks(self.settings.logit_rows) {
            self.head_logits(chunk);
            let count = chunk.len() * self.spec.vocab_size;
            out.extend_from_slice(&self.kernels.values(&self.buffers.head.logits, 0..count)?);
        }
        Ok(out)
    }

    /// The first block whose input in the last training pass had values that are not finite;
    /// `num_layers` stands for the output of the last one.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn first_bad_block_input(&self) -> Result<Option<usize>> {
        let elements = self.settings.tokens * self.spec.hidden_size;
        for (layer, input) in self.buffers.inputs.iter().enumerate() {
            let values = self.kernels.values(input, 0..elements)?;
            if values.iter().any(|x| !x.is_finite()) {
                return Ok(Some(layer));
            }
        }
        Ok(None)
    }

    fn begin(&mut self, batch: &Batch) -> Result<(TokenLayout, Targets)> {
        let tokens = TokenLayout::new(&batch.cu_seqlens);
        let (planned, longest) = (self.settings.tokens, self.settings.longest_document);
        if tokens.tokens() > planned || tokens.longest() > longest {
            let (got, document) = (tokens.tokens(), tokens.longest());
            return Err(Error::usage(format_args!(
                "batch of {got} tokens (longest document {document}) is larger than the planned \
                 {planned} ({longest})"
            )));
        }
        let vocab = self.spec.vocab_size;
        if let Some(id) = batch.input_ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::input(format_args!(
                "token id {id} is outside the vocabulary of {vocab}"
            ))
            .hint("the tokenizer belongs to another model"));
        }
        if let Some(rows) = self.spec.learned_positions
            && tokens.longest() > rows
        {
            return Err(Error::input(format_args!(
                "document of {} tokens is longer than the model's {rows} positions",
                tokens.longest()
            ))
            .hint(format_args!("use `--max-length {rows}` or less")));
        }
        let targets = Targets::of(batch);
        if let Some(id) = targets.ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::input(format_args!(
                "label {id} is outside the vocabulary of {vocab}"
            )));
        }
        self.fill_rotary(&tokens);
        Ok((tokens, targets))
    }

    /// cos and sin for every token; frequencies may depend on the length of its document.
    fn fill_rotary(&mut self, tokens: &TokenLayout) {
        let (Some(rotary), Some((cos, sin))) = (&self.spec.rotary, &mut self.buffers.work.rotary)
        else {
            return;
        };
        let (head_dim, elements) = (self.spec.head_dim, tokens.tokens() * self.spec.head_dim / 2);
        self.kernels.write_tables((cos, sin), elements, |cos, sin| {
            rotary.fill_tables(head_dim, tokens, cos, sin);
        });
    }

    fn forward(&mut self, ids: &[u32], tokens: &TokenLayout, mode: Mode) {
        let Model { kernels, weights, parameters, buffers, cached_tokens, .. } = self;
        let Buffers { inputs, kept, shared, work, caches, .. } = buffers;
        kernels.embed(ids, &weights.embedding, &mut inputs[0], false);
        if let Some(streaming) = &weights.streaming {
            streaming.leave_table();
        }
        if let Some(positions) = &weights.positions {
            kernels.embed(&tokens.positions, positions, &mut inputs[0], true);
        }
        let pass = Pass {
            kernels,
            parameters,
            layout: tokens,
            dropout: mode.dropout,
            adapters: !mode.base_only,
        };
        let count = inputs.len();
        for (layer, (block, kept)) in weights.blocks.iter().zip(kept).enumerate() {
            if let Some(streaming) = &weights.streaming {
                streaming.enter(layer, Direction::Forward);
            }
            let saved = kept.as_mut().or(shared.as_mut()).expect("kept or shared by the plan");
            let [x, out] = inputs
                .get_disjoint_mut([layer % count, (layer + 1) % count])
                .expect("at least two inputs are planned");
            let cache = caches.get_mut(layer).filter(|_| mode.cached);
            let cache = cache.map(|keys_values| Cache { keys_values, past: *cached_tokens });
            block.forward_saved(&pass, x, saved, work, cache);
            block.forward_output(&pass, saved, out, work);
            if let Some(streaming) = &weights.streaming {
                streaming.leave(layer, Direction::Forward);
            }
        }
    }

    /// Index of the buffer that holds the last block's output.
    fn output_index(&self) -> usize {
        self.spec.num_layers % self.buffers.inputs.len()
    }

    /// Logits of a chunk of rows into the head's buffer.
    fn head_logits(&mut self, rows: &[u32]) {
        let (d, v, output) = (self.spec.hidden_size, self.spec.vocab_size, self.output_index());
        let Model { kernels, weights, buffers, .. } = self;
        let (head, count) = (&mut buffers.head, rows.len());
        kernels.gather_rows(&buffers.inputs[output], rows, &mut head.input, d);
        let norm = &weights.final_norm;
        kernels.norm_forward(norm, &head.input, &mut head.norm, &mut head.stats, count);
        let logits = (&mut head.logits, Columns::all(v));
        kernels.linear_forward(weights.head(), None, None, &head.norm, logits, count, false);
    }

    /// Leaves the sum of losses in `self.loss`.
    fn head_loss(&mut self, targets: &Targets, scale: Option<f32>) {
        let (d, v) = (self.spec.hidden_size, self.spec.vocab_size);
        if scale.is_some() {
            self.zero_stream_gradient();
        }
        self.kernels.clear_loss(&mut self.loss);
        let chunk = self.settings.logit_rows;
        for (rows, ids) in targets.rows.chunks(chunk).zip(targets.ids.chunks(chunk)) {
            self.head_logits(rows);
            let Model { kernels, weights, buffers, loss, .. } = self;
            let (head, count) = (&mut buffers.head, rows.len());
            kernels.cross_entropy(&mut head.logits, ids, v, scale, loss);
            let gradients = scale.and(head.gradients.as_mut()).zip(buffers.work.gradients.as_mut());
            let Some(((d_norm, d_input), stream)) = gradients else { continue };
            let logits = (&head.logits, Columns::all(v));
            kernels.linear_backward(weights.head(), None, logits, d_norm, count, false);
            kernels.zero(d_input, count * d);
            let norm = &weights.final_norm;
            kernels.norm_backward(norm, d_norm, &head.input, &head.stats, d_input, count);
            kernels.scatter_rows(d_input, rows, &mut stream.stream, d);
        }
        if let Some(streaming) = &self.weights.streaming {
            streaming.leave_head();
        }
    }

    fn zero_stream_gradient(&mut self) {
        let elements = self.settings.tokens * self.spec.hidden_size;
        if let Some(gradients) = &mut self.buffers.work.gradients {
            self.kernels.zero(&mut gradients.stream, elements);
        }
    }

    fn backward(&mut self, tokens: &TokenLayout, dropout: Option<Dropout>) {
        let Model { kernels, weights, parameters, buffers, .. } = self;
        let Buffers { inputs, kept, shared, work, .. } = buffers;
        let Some(mut gradients) = parameters.take_gradients() else { return };
        let pass = Pass { kernels, parameters, layout: tokens, dropout, adapters: true };
        for (layer, block) in weights.blocks.iter().enumerate().rev() {
            if let Some(streaming) = &weights.streaming {
                streaming.enter(layer, Direction::Backward);
            }
            let x = &inputs[layer];
            let flags = (kept[layer].is_none(), layer > 0);
            let saved = match &mut kept[layer] {
                Some(saved) => saved,
                None => {
                    let saved = shared.as_mut().expect("planned for checkpointed layers");
                    block.forward_saved(&pass, x, saved, work, None);
                    saved
                }
            };
            block.backward(&pass, x, saved, work, &mut gradients, flags);
            if let Some(streaming) = &weights.streaming {
                streaming.leave(layer, Direction::Backward);
            }
        }
        self.parameters.put_gradients(gradients);
    }
}
