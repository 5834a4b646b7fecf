//! The loop: steps, and what is due after each of them.
//!
//! After step `k`, in this order: a log line, an evaluation, sample answers, a checkpoint. What a
//! checkpoint holds is exactly the state after those, so a resumed run repeats nothing and skips
//! nothing; an interrupted step is given up and made again.

mod ending;
mod session;
mod shortage;

use std::path::Path;
use std::time::Instant;

use session::Session;

use super::adamw::RateGroup;
use super::backend::Update;
use super::checkpoints;
use super::checks::{self, FirstSteps};
use super::clip;
use super::events::{EndEvent, EndReason, EvalEvent, Event, RunLog, SampleEvent, StepEvent};
use super::feed::Feed;
use super::progress::Progress;
use super::recipe::Recipe;
use super::schedule::Schedule;
use super::state::{Best, TrainState};
use super::step::{self, Gradient};
use super::trainee::Trainee;
use crate::data::Batch;
use crate::error::{Error, Result};
use crate::kernels::TokenLosses;
use crate::ledger::{self, Phase, resident};
use crate::model::Variant;

/// What a run works with, beside the model.
pub struct RunContext<'a> {
    /// Settings.
    pub recipe: &'a Recipe,
    /// Training data.
    pub feed: &'a mut Feed,
    /// Evaluation data; may be empty.
    pub evaluation: &'a [Batch],
    /// Prompts of the sample answers.
    pub prompts: &'a [String],
    /// Output folder.
    pub out: &'a Path,
    /// Receives every event.
    pub log: &'a mut dyn RunLog,
    /// Shows the run.
    pub progress: &'a Progress,
    /// Whether the user asked to stop.
    pub stop: &'a dyn Fn() -> bool,
}

/// A run at work.
pub struct Trainer<'a, M> {
    model: &'a mut M,
    context: RunContext<'a>,
    schedule: Schedule,
    groups: Vec<RateGroup>,
    checks: FirstSteps,
    state: TrainState,
    /// The step of the last checkpoint.
    saved_step: Option<u64>,
    /// Whether there was an evaluation or a sample since.
    unsaved: bool,
    session: Session,
}

impl<'a, M: Trainee> Trainer<'a, M> {
    /// Continues from `state`, which is that of a new run or of a checkpoint whose weights
    /// `model` already holds. `checks` follows the first steps of a fresh adapter.
    pub fn new(
        model: &'a mut M,
        context: RunContext<'a>,
        state: TrainState,
        checks: FirstSteps,
    ) -> Self {
        let schedule = context.recipe.schedule(state.max_steps);
        let groups = step::rate_groups(model.tensors(), context.recipe.loraplus);
        let saved_step = (state.step > 0).then_some(state.step);
        let (unsaved, session) = (false, Session::default());
        Trainer { model, context, schedule, groups, checks, state, saved_step, unsaved, session }
    }

    /// Trains to the end, and leaves the adapter in the output folder.
    ///
    /// # Errors
    /// `Interrupted` once the state is saved; `Numeric` when the numbers go wrong; whatever model,
    /// log and disk report. The last checkpoint is intact in all cases.
    pub fn run(mut self) -> Result<EndEvent> {
        if let Some(shrunk) = self.model.shrunk_at_start() {
            let reason = "the memory of the plan cannot be had".to_string();
            self.tell_of_shortage(reason, shrunk)?;
        }
        self.rehearse()?;
        let reason = match self.train() {
            Ok(reason) => reason,
            Err(error) => return Err(self.rescued(error)),
        };
        self.save_unless_done()?;
        let end = self.end_event(reason);
        if reason == EndReason::Interrupted {
            self.context.log.record(&Event::End(end))?;
            return Err(self.interrupted());
        }
        self.load_best()?;
        self.until_it_fits(|run| ending::publish(run.model, run.context.out))?;
        // Before, the run is not at its end.
        self.context.log.record(&Event::End(end.clone()))?;
        Ok(end)
    }

    /// What a run ever needs of memory it has needed by its first step: unless that begins with a
    /// batch as large as any, the largest is tried before, and its gradient thrown away.
    fn rehearse(&mut self) -> Result<()> {
        if self.context.recipe.longest_first_step && self.state.step < self.state.max_steps {
            let batch = self.context.feed.largest_batch();
            if self.step_batches().first().is_some_and(|first| first.tokens() >= batch.tokens()) {
                return Ok(());
            }
            let scale = 1.0 / batch.num_targets().max(1) as f32;
            let at = |error: Error| error.at("the largest batch, tried before the first step");
            let first = self.micro_batches();
            let pass = |run: &mut Self| run.model.forward_backward(&batch, scale, first);
            self.until_it_fits(pass).map_err(at)?;
        }
        Ok(())
    }

    /// Makes all steps, and what is due after each of them.
    fn train(&mut self) -> Result<EndReason> {
        loop {
            if (self.context.stop)() || !self.after_step()? {
                return Ok(EndReason::Interrupted);
            }
            if self.state.step >= self.state.max_steps {
                return Ok(EndReason::Finished);
            }
            if self.context.recipe.is_out_of_patience(&self.state) {
                self.sample_unless_done()?;
                return Ok(EndReason::EarlyStopping);
            }
            if !self.step()? {
                return Ok(EndReason::Interrupted);
            }
        }
    }

    /// The batches of the next step.
    fn step_batches(&mut self) -> Vec<Batch> {
        let feed = &mut *self.context.feed;
        let per_step = self.context.recipe.gradient_accumulation_steps;
        let first = self.state.epoch_step as usize * per_step;
        let end = feed.num_batches().min(first + per_step);
        (first..end).map(|index| feed.batch(self.state.epoch, index)).collect()
    }

    /// Forward passes made before the current step.
    fn micro_batches(&self) -> u64 {
        let per_step = self.context.recipe.gradient_accumulation_steps as u64;
        let num_batches = self.context.feed.num_batches() as u64;
        self.state.epoch * num_batches + (self.state.epoch_step * per_step).min(num_batches)
    }

    /// Passes over the data, with fraction.
    fn epoch(&self) -> f64 {
        self.micro_batches() as f64 / self.context.feed.num_batches() as f64
    }

    /// Makes one step; false if it was given up because the user asked to stop.
    fn step(&mut self) -> Result<bool> {
        let start = Instant::now();
        let (batches, first) = (self.step_batches(), self.micro_batches());
        let number = self.state.step + 1;
        let at = |error: Error| error.at(format_args!("step {number}"));
        let gradient = self
            .until_it_fits(|run| step::accumulate(run.model, &batches, first, run.context.stop));
        let gradient = gradient.map_err(at)?;
        let Some(gradient) = gradient else { return Ok(false) };
        ledger::enter(Phase::Optimizer);
        let recipe = self.context.recipe;
        let rate = self.schedule.rate(self.state.step);
        if recipe.self_checks {
            self.checks.before_update(self.model).map_err(at)?;
            checks::check_has_gradient(&gradient).map_err(at)?;
        }
        let update = Update {
            optimizer: &recipe.optimizer,
            groups: &self.groups,
            step: number,
            learning_rate: rate,
            gradient_scale: clip::gradient_scale(gradient.norm, recipe.max_grad_norm),
        };
        self.model.update(&update).map_err(at)?;
        if recipe.self_checks {
            let warming_up = self.state.step < self.schedule.warmup_steps;
            self.checks.after_update(self.model, rate, warming_up).map_err(at)?;
        }
        self.count(&gradient, start.elapsed().as_secs_f64());
        if self.session.steps == 1
            && let Some(warning) = self.model.over_budget()
        {
            self.context.progress.note(&format!("warning: {warning}"));
        }
        self.log_step(&gradient, rate)?;
        Ok(true)
    }

    fn count(&mut self, gradient: &Gradient, seconds: f64) {
        let steps_per_epoch = self.context.recipe.steps_per_epoch(self.context.feed.num_batches());
        let state = &mut self.state;
        state.step += 1;
        state.epoch_step += 1;
        if state.epoch_step == steps_per_epoch {
            (state.epoch, state.epoch_step) = (state.epoch + 1, 0);
        }
        state.num_input_tokens_seen += gradient.tokens;
        state.num_target_tokens_seen += gradient.targets;
        state.elapsed_seconds += seconds;
        state.loss_sum += gradient.loss;
        state.log_sums.loss_sum += gradient.loss;
        state.log_sums.steps += 1;
        state.log_sums.targets += gradient.targets;
        state.log_sums.hits += gradient.hits;
        state.log_sums.tokens += gradient.tokens;
        state.log_sums.seconds += seconds;
        self.session.add_step(gradient.tokens, seconds);
    }

    fn log_step(&mut self, gradient: &Gradient, learning_rate: f64) -> Result<()> {
        let (step, last) = (self.state.step, self.state.max_steps);
        if step % self.context.recipe.logging_steps != 0 && step != last {
            return Ok(());
        }
        let sums = std::mem::take(&mut self.state.log_sums);
        let event = StepEvent {
            step,
            epoch: self.epoch(),
            loss: sums.loss_sum / sums.steps as f64,
            mean_token_accuracy: Some(sums.token_accuracy()),
            learning_rate,
            grad_norm: gradient.norm,
            num_input_tokens_seen: self.state.num_input_tokens_seen,
            num_target_tokens_seen: self.state.num_target_tokens_seen,
            tokens_per_second: sums.tokens_per_second(),
            elapsed_seconds: self.state.elapsed_seconds,
            rss_bytes: resident::now_bytes(),
            gpu_bytes: self.model.gpu_bytes(),
        };
        let RunContext { recipe, evaluation, progress, .. } = &self.context;
        progress.step(&event, self.session.eta_seconds(recipe, evaluation, step, last));
        self.record(Event::Step(event))
    }

    /// What is due after the current step and not done yet, after the last one all of it; false if the user
    /// asked to stop.
    fn after_step(&mut self) -> Result<bool> {
        let (step, recipe) = (self.state.step, self.context.recipe);
        let is_last = step >= self.state.max_steps;
        let due = |every: Option<u64>| is_last || every.is_some_and(|every| step % every == 0);
        let mut improved = false;
        let evaluates = step > 0 && !self.context.evaluation.is_empty();
        if evaluates && due(recipe.evaluation.steps) && self.state.evaluated_step != Some(step) {
            match self.evaluate()? {
                Some(is_best) => improved = is_best,
                None => return Ok(false),
            }
        }
        if step == 0 || due(recipe.sample_steps) {
            self.sample_unless_done()?;
        }
        if step > 0 && (improved || due(Some(recipe.saving.steps))) {
            self.save_unless_done()?;
        }
        Ok(true)
    }

    /// Scores the evaluation data; whether it is the best so far, or `None` if the user asked to
    /// stop.
    fn evaluate(&mut self) -> Result<Option<bool>> {
        ledger::enter(Phase::Eval);
        let start = Instant::now();
        let (mut losses, mut targets, mut documents) = (TokenLosses::default(), 0, 0);
        let evaluation = self.context.evaluation;
        let mut shown = self.context.progress.evaluation(self.state.step, evaluation.len());
        for (done, batch) in evaluation.iter().enumerate() {
            if (self.context.stop)() {
                return Ok(None);
            }
            shown.scored(done);
            losses += self.until_it_fits(|run| run.model.evaluate(batch, Variant::Adapted))?;
            targets += batch.num_targets() as u64;
            documents += batch.lines.len() as u64;
        }
        let eval_loss = losses.sum / targets.max(1) as f64;
        if !eval_loss.is_finite() {
            let step = self.state.step;
            let what = format_args!("step {step}: evaluation loss is {eval_loss}");
            return Err(Error::numeric(what).hint("try a lower `--learning-rate`"));
        }
        let is_best = self.keep_score(eval_loss);
        let seconds = start.elapsed().as_secs_f64();
        self.session.evaluation_seconds = Some(seconds);
        let event = EvalEvent {
            step: self.state.step,
            epoch: self.epoch(),
            eval_loss,
            eval_mean_token_accuracy: Some(losses.hits as f64 / targets.max(1) as f64),
            eval_runtime: seconds,
            num_documents: documents,
            num_batches: self.context.evaluation.len() as u64,
            num_target_tokens: targets,
            is_best,
        };
        self.context.progress.eval(&event);
        self.unsaved = true;
        self.record(Event::Eval(event))?;
        Ok(Some(is_best))
    }

    fn keep_score(&mut self, eval_loss: f64) -> bool {
        let (state, threshold) = (&mut self.state, self.context.recipe.evaluation.threshold);
        state.evaluated_step = Some(state.step);
        let counts = state.best.is_none_or(|best| eval_loss < best.eval_loss - threshold);
        let failures = state.evaluations_without_improvement + 1;
        state.evaluations_without_improvement = if counts { 0 } else { failures };
        let is_best = state.best.is_none_or(|best| eval_loss < best.eval_loss);
        if is_best {
            state.best = Some(Best { eval_loss, step: state.step });
        }
        is_best
    }

    fn sample_unless_done(&mut self) -> Result<()> {
        if self.state.sampled_step.replace(self.state.step) == Some(self.state.step) {
            return Ok(());
        }
        ledger::enter(Phase::Eval);
        let prompts = self.context.prompts;
        for prompt in prompts {
            let completion = self.until_it_fits(|run| run.model.sample(prompt))?;
            let (step, epoch) = (self.state.step, self.epoch());
            let event = SampleEvent { step, epoch, prompt: prompt.clone(), completion };
            self.context.progress.sample(&event);
            self.unsaved = true;
            self.record(Event::Sample(event))?;
        }
        Ok(())
    }

    /// Keeps an event in the history and passes it on.
    fn record(&mut self, event: Event) -> Result<()> {
        self.state.history.push(event.clone());
        self.context.log.record(&event)
    }

    fn save_unless_done(&mut self) -> Result<()> {
        let step = self.state.step;
        let again = self.saved_step == Some(step);
        if step == 0 || again && !self.unsaved {
            return Ok(());
        }
        ledger::enter(Phase::Save);
        if let Some(order) = self.model.sum_order() {
            self.state.identity.sum_order = Some(order);
        }
        let event =
            self.until_it_fits(|run| checkpoints::save(run.model, &run.state, run.context.out))?;
        let context = &self.context;
        let best = self.state.best.map(|best| best.step);
        let limit = context.recipe.saving.total_limit;
        if let Err(error) = checkpoints::thin_out(context.out, step, limit, best) {
            context.progress.note(&format!("warning: an old checkpoint stays: {error}"));
        }
        (self.saved_step, self.unsaved) = (Some(step), false);
        if again {
            return Ok(());
        }
        context.progress.save(&event);
        self.record(Event::Save(event))
    }
}
