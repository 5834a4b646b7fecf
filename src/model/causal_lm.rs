//! A model at work: frozen weights, adapters and the planned buffers, on the CPU backend.
//!
//! One micro-batch is a stream of T tokens of one or more documents. The training pass keeps every
//! block's input; a layer whose policy is checkpoint recomputes the rest when its turn comes. The
//! head runs only on rows that have a target, a chunk of logits at a time, and computes the
//! gradient of a chunk before the next one overwrites it.

pub mod score;

use super::block::{Cache, Dropout, GradientBuffers, Pass, Saved, Workspace};
use super::parameters::Parameters;
use super::spec::ModelSpec;
use super::streaming::Direction;
use super::weights::Weights;
use crate::data::Batch;
use crate::error::{Error, Result};
use crate::kernels::cpu::Cpu;
use crate::kernels::cpu::arena::{Arena, Buffer};
use crate::kernels::{Columns, Kernels, TokenLayout};
use crate::plan::{MemoryPlan, Policy, Settings, layout};

/// A loaded model.
pub struct Model {
    spec: ModelSpec,
    weights: Weights,
    parameters: Parameters,
    settings: Settings,
    plan: MemoryPlan,
    dropout: Option<(f32, u64)>,
    buffers: Buffers,
    /// Length of the mapping that the buffers lie in.
    arena_bytes: usize,
    /// Tokens in the caches.
    cached_tokens: usize,
}

/// The arena's regions.
struct Buffers {
    /// Inputs of all blocks and the output of the last; two that alternate without training.
    inputs: Vec<Buffer<f32>>,
    /// Of the layers that keep their activations.
    kept: Vec<Option<Saved<Buffer<f32>>>>,
    /// Of all other layers, in turn.
    shared: Option<Saved<Buffer<f32>>>,
    work: Workspace<Buffer<f32>>,
    head: HeadBuffers,
    /// One for each block where text is generated.
    caches: Vec<Buffer<f32>>,
}

struct HeadBuffers {
    logits: Buffer<f32>,
    input: Buffer<f32>,
    norm: Buffer<f32>,
    stats: Buffer<f32>,
    gradients: Option<(Buffer<f32>, Buffer<f32>)>,
}

impl Buffers {
    fn new(spec: &ModelSpec, settings: &Settings, arena: &mut Arena) -> Self {
        let training = settings.training();
        let inputs = if training {
            (0..=spec.num_layers).map(|l| arena.take(&format!("layer.{l}.input"))).collect()
        } else {
            vec![arena.take("layer.even.input"), arena.take("layer.odd.input")]
        };
        let keeps = |layer: usize| settings.policies.get(layer) == Some(&Policy::Keep);
        let kept = (0..spec.num_layers)
            .map(|layer| keeps(layer).then(|| saved(arena, &format!("layer.{layer}"))))
            .collect();
        let cached = if settings.cache_tokens > 0 { spec.num_layers } else { 0 };
        let shared = !training || settings.policies.contains(&Policy::Checkpoint);
        Buffers {
            inputs,
            kept,
            shared: shared.then(|| saved(arena, "recompute")),
            work: workspace(spec, settings, arena),
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

fn saved(arena: &mut Arena, prefix: &str) -> Saved<Buffer<f32>> {
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

fn workspace(spec: &ModelSpec, settings: &Settings, arena: &mut Arena) -> Workspace<Buffer<f32>> {
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
    /// Allocates the plan for `settings` and takes `weights`; the adapter's tensors are zero until
    /// they are loaded. `dropout` is `(lora_dropout, seed)`.
    ///
    /// # Errors
    /// `Budget` when the memory cannot be reserved.
    pub fn new(
        spec: ModelSpec,
        mut weights: Weights,
        settings: Settings,
        dropout: Option<(f32, u64)>,
    ) -> Result<Self> {
        weights.attach(&settings.targets);
        let plan = layout(&spec, &settings);
        let mut arena = Arena::new(&plan)?;
        let parameters = Parameters::new(settings.targets.clone(), &plan, &mut arena);
        let buffers = Buffers::new(&spec, &settings, &mut arena);
        let unused = arena.untaken();
        assert!(unused.is_empty(), "the plan has regions that nobody uses: {unused:?}");
        let arena_bytes = arena.bytes();
        Ok(Model {
            spec,
            weights,
            parameters,
            settings,
            plan,
            dropout,
            buffers,
            arena_bytes,
            cached_tokens: 0,
        })
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The frozen weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Gives the buffers back and returns the weights, for another plan or adapter.
    pub fn into_weights(self) -> Weights {
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

    /// The adapters.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The adapters.
    pub fn parameters_mut(&mut self) -> &mut Parameters {
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
        self.forward(&batch.input_ids, &tokens, Mode { dropout, ..Mode::default() });
        let loss = self.head_loss(&targets, Some(scale));
        self.backward(&tokens, dropout);
        Ok(loss)
    }

    /// Sum of the losses of the batch's trained tokens, without dropout.
    ///
    /// # Errors
    /// As [`forward_backward`](Model::forward_backward).
    pub fn evaluate(&mut self, batch: &Batch) -> Result<f64> {
        let (tokens, targets) = self.begin(batch)?;
        self.forward(&batch.input_ids, &tokens, Mode::default());
        Ok(self.head_loss(&targets, None))
    }

    /// [`evaluate`](Model::evaluate) without the adapters.
    ///
    /// # Errors
    /// As [`forward_backward`](Model::forward_backward).
    pub fn evaluate_base(&mut self, batch: &Batch) -> Result<f64> {
        let (tokens, targets) = self.begin(batch)?;
        self.forward(&batch.input_ids, &tokens, Mode { base_only: true, ..Mode::default() });
        Ok(self.head_loss(&targets, None))
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
    pub fn decode(&mut self, ids: &[u32]) -> Result<&[f32]> {
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
        Ok(&self.buffers.head.logits[..vocab])
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
            out.extend_from_slice(&self.buffers.head.logits[..count]);
        }
        Ok(out)
    }

    /// The residual stream `[T, D]` before block `layer` (after the last for `num_layers`), as the
    /// last training pass left it.
    pub fn block_input(&self, layer: usize) -> &[f32] {
        &self.buffers.inputs[layer]
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
        let half = self.spec.head_dim / 2;
        for document in tokens.boundaries.windows(2) {
            let (begin, end) = (document[0], document[1]);
            let length = tokens.positions[begin..end].last().map_or(0, |&last| last as usize + 1);
            let (frequencies, factor) = rotary.inverse_frequencies(self.spec.head_dim, length);
            for token in begin..end {
                let position = tokens.positions[token];
                let row = token * half..(token + 1) * half;
                let tables = cos[row.clone()].iter_mut().zip(&mut sin[row]);
                for ((cos, sin), frequency) in tables.zip(&frequencies) {
                    let (s, c) = (position as f32 * frequency).sin_cos();
                    (*cos, *sin) = (c * factor, s * factor);
                }
            }
        }
    }

    fn forward(&mut self, ids: &[u32], tokens: &TokenLayout, mode: Mode) {
        let Model { weights, parameters, buffers, cached_tokens, .. } = self;
        let Buffers { inputs, kept, shared, work, caches, .. } = buffers;
        Cpu.embed(ids, &weights.embedding, &mut inputs[0], false);
        if let Some(positions) = &weights.positions {
            Cpu.embed(&tokens.positions, positions, &mut inputs[0], true);
        }
        let pass = Pass {
            kernels: &Cpu,
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
        let Model { weights, buffers, .. } = self;
        let (head, count) = (&mut buffers.head, rows.len());
        Cpu.gather_rows(&buffers.inputs[output], rows, &mut head.input, d);
        let norm = &weights.final_norm;
        Cpu.norm_forward(norm, &head.input, &mut head.norm, &mut head.stats, count);
        let logits = (&mut head.logits, Columns::all(v));
        Cpu.linear_forward(weights.head(), None, None, &head.norm, logits, count, false);
    }

    fn head_loss(&mut self, targets: &Targets, scale: Option<f32>) -> f64 {
        let (d, v) = (self.spec.hidden_size, self.spec.vocab_size);
        if scale.is_some() {
            self.zero_stream_gradient();
        }
        let mut loss = 0.0;
        let chunk = self.settings.logit_rows;
        for (rows, ids) in targets.rows.chunks(chunk).zip(targets.ids.chunks(chunk)) {
            self.head_logits(rows);
            let Model { weights, buffers, .. } = self;
            let (head, count) = (&mut buffers.head, rows.len());
            loss += Cpu.cross_entropy(&mut head.logits, ids, v, scale);
            let gradients = scale.and(head.gradients.as_mut()).zip(buffers.work.gradients.as_mut());
            let Some(((d_norm, d_input), stream)) = gradients else { continue };
            let logits = (&head.logits, Columns::all(v));
            Cpu.linear_backward(weights.head(), None, logits, d_norm, count, false);
            Cpu.zero(d_input, count * d);
            let norm = &weights.final_norm;
            Cpu.norm_backward(norm, d_norm, &head.input, &head.stats, d_input, count);
            Cpu.scatter_rows(d_input, rows, &mut stream.stream, d);
        }
        if let Some(streaming) = &self.weights.streaming {
            streaming.leave_head();
        }
        loss
    }

    fn zero_stream_gradient(&mut self) {
        let elements = self.settings.tokens * self.spec.hidden_size;
        if let Some(gradients) = &mut self.buffers.work.gradients {
            Cpu.zero(&mut gradients.stream, elements);
        }
    }

    fn backward(&mut self, tokens: &TokenLayout, dropout: Option<Dropout>) {
        let Model { weights, parameters, buffers, .. } = self;
        let Buffers { inputs, kept, shared, work, .. } = buffers;
        let Some(mut gradients) = parameters.take_gradients() else { return };
        let pass = Pass { kernels: &Cpu, parameters, layout: tokens, dropout, adapters: true };
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
