//! The real model as the training loop sees it.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

use nibble_quant::FloatType;

use super::backend::{TrainingKernels, Update};
use super::meter::Meter;
use super::preview::Preview;
use super::trainee::{AdapterBuffers, Shrinkable, Shrunk, Trainee};
use crate::adapter::{Adapter, AdapterFiles};
use crate::data::{Batch, TokenizerFiles};
use crate::error::Result;
use crate::kernels::TokenLosses;
use crate::kernels::cpu::Cpu;
use crate::ledger::rows::Account;
use crate::model::parameters::ParameterTensor;
use crate::model::{Model, Variant};
use crate::plan::{self, AdapterRegion, MomentLayout, Processor, Settings, SumOrder};
use crate::system::allocator;

/// A model in training and what its adapter's files say.
pub struct LoraModel<K: TrainingKernels = Cpu> {
    /// Away only while it is given smaller buffers.
    model: Option<Model<K>>,
    /// Settings and targets; the tensors are in the model.
    files: AdapterFiles,
    dtype: FloatType,
    preview: Preview,
    /// What was planned, until it was told that it could not be had.
    wanted: Settings,
    metered: Option<(Meter, Account)>,
    /// Bytes that the user allows.
    budget: Option<u64>,
    /// What conversations are read and written with, if not with the model's own.
    tokenizer: TokenizerFiles,
}

impl<K: TrainingKernels> LoraModel<K> {
    /// Moves the adapter's tensors into `model`. `dtype` is what the forward pass reads, and what
    /// is written: the files hold exactly the weights that were trained with. `wanted` is
    /// the plan, for which there may not have been memory.
    pub fn new(
        mut model: Model<K>,
        adapter: Adapter,
        dtype: FloatType,
        preview: Preview,
        wanted: Settings,
    ) -> Self {
        model.parameters_mut().load(&adapter);
        let files = adapter.into_files();
        allocator::give_back();
        let model = Some(model);
        LoraModel {
            model,
            files,
            dtype,
            preview,
            wanted,
            metered: None,
            budget: None,
            tokenizer: TokenizerFiles::default(),
        }
    }

    /// Has `tokenizer`'s files written beside the adapter: whoever reads it needs them.
    pub fn with_tokenizer(self, tokenizer: TokenizerFiles) -> Self {
        LoraModel { tokenizer, ..self }
    }

    /// Has its memory accounted for: `meter` began before the weights were read, `account` is the plan
    /// and `budget` what the user allows.
    pub fn with_meter(self, meter: Meter, mut account: Account, budget: Option<u64>) -> Self {
        if self.shrunk_since(&self.wanted).is_some() {
            account.replan(self.model().plan());
        }
        LoraModel { metered: Some((meter, account)), budget, ..self }
    }

    /// The model.
    ///
    /// # Panics
    /// After smaller buffers could not be had: the run is over then.
    pub fn model(&self) -> &Model<K> {
        self.model.as_ref().expect(PRESENT)
    }

    fn model_mut(&mut self) -> &mut Model<K> {
        self.model.as_mut().expect(PRESENT)
    }

    /// What is smaller now than in a plan `before`, if anything is.
    fn shrunk_since(&self, before: &Settings) -> Option<Shrunk> {
        let now = self.model().settings();
        let (from_tokens, to_tokens) = (before.tokens, now.tokens);
        let change = plan::shrinkage_in_words(before, now);
        (!change.is_empty()).then_some(Shrunk { from_tokens, to_tokens, change })
    }

    /// The sum of `pass` over the parts of a batch.
    fn in_parts(
        &mut self,
        batch: &Batch,
        mut pass: impl FnMut(&mut Model<K>, &Batch) -> Result<TokenLosses>,
    ) -> Result<TokenLosses> {
        let model = self.model_mut();
        let parts = batch.split(model.settings().tokens);
        parts.iter().map(|part| pass(model, part)).sum()
    }
}

/// What `model` of a [`LoraModel`] holds to.
const PRESENT: &str = "a run ends when its buffers cannot be had";

impl<K: TrainingKernels> AdapterBuffers for LoraModel<K> {
    fn tensors(&self) -> &[ParameterTensor] {
        self.model().parameters().tensors()
    }

    fn moments(&self) -> &MomentLayout {
        self.model().parameters().moments()
    }

    fn values(&self, region: AdapterRegion, words: Range<usize>) -> Result<Cow<'_, [f32]>> {
        self.model().parameters().values(region, words)
    }

    fn set_values(&mut self, region: AdapterRegion, first: usize, values: &[f32]) {
        self.model_mut().parameters_mut().set_values(region, first, values);
    }

    fn refresh_working(&mut self) {
        self.model_mut().parameters_mut().refresh_working();
    }
}

impl<K: TrainingKernels> Shrinkable for LoraModel<K> {
    fn shrink(&mut self) -> Result<Option<Shrunk>> {
        let before = self.model().settings().clone();
        let Some(model) = self.model.take_if(|model| model.can_be_smaller()) else {
            return Ok(None);
        };
        let model = self.model.insert(model.with_smaller_plan()?);
        if let Some((_, account)) = &mut self.metered {
            account.replan(model.plan());
        }
        Ok(self.shrunk_since(&before))
    }

    fn sum_order(&self) -> Option<SumOrder> {
        Some(self.model().settings().sum_order())
    }

    fn shrunk_at_start(&mut self) -> Option<Shrunk> {
        let now = self.model().settings().clone();
        let wanted = std::mem::replace(&mut self.wanted, now);
        self.shrunk_since(&wanted)
    }
}

impl<K: TrainingKernels> Trainee for LoraModel<K> {
    fn forward_backward(
        &mut self,
        batch: &Batch,
        scale: f32,
        micro_batch: u64,
    ) -> Result<TokenLosses> {
        self.in_parts(batch, |model, part| model.forward_backward(part, scale, micro_batch))
    }

    fn evaluate(&mut self, batch: &Batch, variant: Variant) -> Result<TokenLosses> {
        self.in_parts(batch, |model, part| model.evaluate(part, variant))
    }

    fn zero_gradients(&mut self) {
        self.model_mut().parameters_mut().zero_gradients();
    }

    fn gradient_norm(&mut self) -> Result<f64> {
        if let (Some((meter, _)), Some(model)) = (&mut self.metered, &self.model) {
            meter.look(model.parameters().kernels())?;
        }
        let parameters = self.model_mut().parameters_mut();
        parameters.kernels().clone().gradient_norm(parameters)
    }

    fn update(&mut self, update: &Update) -> Result<()> {
        let parameters = self.model_mut().parameters_mut();
        parameters.kernels().clone().update(parameters, update)
    }

    fn first_bad_activation(&mut self) -> Option<String> {
        let layer = self.model_mut().first_bad_block_input().ok().flatten()?;
        let spec = self.model().spec();
        Some(match layer.checked_sub(1) {
            Some(block) => format!("the output of {}", spec.layer_prefix(block)),
            None => "the token embeddings".to_string(),
        })
    }

    fn memory(&self) -> Option<Account> {
        let (meter, account) = self.metered.as_ref()?;
        let measured = meter.measured(self.model()).ok()?;
        Some(account.clone().measured(self.model().plan(), measured))
    }

    fn gpu_bytes(&self) -> Option<u64> {
        let around = self.model().parameters().kernels().surroundings().ok()?;
        (around.processor == Processor::Gpu).then_some(around.used_bytes)
    }

    fn over_budget(&self) -> Option<String> {
        let (budget, account) = (self.budget?, self.memory()?);
        account.excess(budget)
    }

    fn write_adapter(&self, folder: &Path) -> Result<()> {
        self.model().parameters().save(&self.files, folder, self.dtype)?;
        self.tokenizer.save(folder)
    }

    fn sample(&mut self, prompt: &str) -> Result<String> {
        let model = self.model.as_mut().expect(PRESENT);
        let prefill_tokens = model.settings().tokens;
        self.preview.answer(model, prompt, prefill_tokens)
    }
}
