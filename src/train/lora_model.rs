//! The real model as the training loop sees it.

use std::borrow::Cow;
use std::path::Path;

use nibble_quant::FloatType;

use super::backend::{TrainingKernels, Update};
use super::preview::Preview;
use super::trainee::Trainee;
use crate::adapter::Adapter;
use crate::data::Batch;
use crate::error::Result;
use crate::kernels::cpu::Cpu;
use crate::ledger::Watch;
use crate::ledger::rows::Account;
use crate::model::Model;
use crate::model::parameters::{ParameterTensor, Part};

/// A model in training and what its adapter's files say.
pub struct LoraModel<K: TrainingKernels = Cpu> {
    model: Model<K>,
    /// Settings and targets; the tensors are in the model.
    adapter: Adapter,
    dtype: FloatType,
    preview: Preview,
    planned_tokens: usize,
    watched: Option<(Watch, Account)>,
}

impl<K: TrainingKernels> LoraModel<K> {
    /// Moves the adapter's tensors into `model`. `dtype` is what the forward pass reads, and what
    /// is written: the files hold exactly the weights that were trained with. `planned_tokens` is
    /// the largest batch that the model was planned for.
    pub fn new(
        mut model: Model<K>,
        mut adapter: Adapter,
        dtype: FloatType,
        preview: Preview,
        planned_tokens: usize,
    ) -> Self {
        model.parameters_mut().load(&adapter);
        adapter.tensors = Vec::new();
        LoraModel { model, adapter, dtype, preview, planned_tokens, watched: None }
    }

    /// Accounts for its memory: `watch` began before the weights were read, `account` is the plan.
    pub fn watched(self, watch: Watch, account: Account) -> Self {
        LoraModel { watched: Some((watch, account)), ..self }
    }

    /// The model.
    pub fn model(&self) -> &Model<K> {
        &self.model
    }
}

impl<K: TrainingKernels> Trainee for LoraModel<K> {
    fn forward_backward(&mut self, batch: &Batch, scale: f32, micro_batch: u64) -> Result<f64> {
        self.model.forward_backward(batch, scale, micro_batch)
    }

    fn evaluate(&mut self, batch: &Batch) -> Result<f64> {
        self.model.evaluate(batch)
    }

    fn evaluate_base(&mut self, batch: &Batch) -> Result<f64> {
        self.model.evaluate_base(batch)
    }

    fn tensors(&self) -> &[ParameterTensor] {
        self.model.parameters().tensors()
    }

    fn zero_gradients(&mut self) {
        self.model.parameters_mut().zero_gradients();
    }

    fn gradient_norm(&mut self) -> Result<f64> {
        let parameters = self.model.parameters_mut();
        parameters.kernels().clone().gradient_norm(parameters)
    }

    fn update(&mut self, update: &Update) {
        let parameters = self.model.parameters_mut();
        parameters.kernels().clone().update(parameters, update);
    }

    fn values(&self, part: Part) -> Result<Cow<'_, [f32]>> {
        self.model.parameters().values(part)
    }

    fn set_values(&mut self, part: Part, values: &[f32]) {
        self.model.parameters_mut().set_values(part, values);
    }

    fn first_bad_activation(&self) -> Option<String> {
        let spec = self.model.spec();
        let layer = self.model.first_bad_block_input().ok().flatten()?;
        Some(match layer.checked_sub(1) {
            Some(block) => format!("the output of {}", spec.layer_prefix(block)),
            None => "the token embeddings".to_string(),
        })
    }

    fn memory(&self) -> Option<Account> {
        let (watch, account) = self.watched.as_ref()?;
        let measured = watch.measured(self.model.region_bytes());
        Some(account.clone().measured(self.model.plan(), measured))
    }

    fn write_adapter(&self, folder: &Path) -> Result<()> {
        self.model.parameters().save(&self.adapter, folder, self.dtype)
    }

    fn sample(&mut self, prompt: &str) -> Result<String> {
        self.preview.answer(&mut self.model, prompt, self.planned_tokens)
    }
}
