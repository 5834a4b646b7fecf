//! Checks of a fresh run's first steps: that the adapter starts as a no-op, and that every matrix
//! gets a gradient and moves. A parameter that silently stands still is the classic bug of a
//! hand-written backward pass; it costs a run, not an error message.

use super::step::Gradient;
use super::trainee::{AdapterBuffers, Trainee};
use crate::data::Batch;
use crate::error::{Error, Result};
use crate::ledger::{self, Phase};
use crate::model::Variant;
use crate::model::parameters::{Matrix, ParameterTensor};
use crate::plan::AdapterRegion;

/// Tokens that the base and the adapted model are compared on.
const PROBE_TOKENS: usize = 64;

const HINT: &str = "this is a bug, or documents so short that attention has nothing to attend to; \
                    `--self-checks false` trains all the same";

const DIVERGED: &str = "a `--learning-rate` that is too high breaks a model like this: try a lower one, from an \
                        earlier checkpoint; `--self-checks false` trains all the same";

/// Below this loss answers may be as sure as f32 can say, and nothing is left to learn.
const SURE: f64 = 1e-3;

/// Checks that a step has a gradient at all.
///
/// # Errors
/// `Numeric` when every gradient is 0, though answers are wrong: nothing reaches the adapter any more.
pub fn check_has_gradient(gradient: &Gradient) -> Result<()> {
    if gradient.norm > 0.0 || gradient.loss < SURE {
        return Ok(());
    }
    let what = format_args!("no matrix has a gradient any more, at a loss of {:.4}", gradient.loss);
    Err(Error::numeric(what).hint(DIVERGED))
}

/// The first tokens of `batch`'s first document, all of them trained.
pub fn probe(batch: &Batch) -> Batch {
    let end = batch.cu_seqlens.get(1).map_or(0, |&end| end as usize).min(PROBE_TOKENS);
    let input_ids = batch.input_ids[..end].to_vec();
    Batch {
        labels: input_ids.iter().map(|&id| id as i32).collect(),
        first_token: 0,
        cu_seqlens: vec![0, end as u32],
        lines: batch.lines.iter().take(1).copied().collect(),
        files: batch.files.clone(),
        input_ids,
    }
}

/// Mean loss of the base model on `probe`.
///
/// # Errors
/// `Numeric` when it is not finite.
pub fn base_loss<M: Trainee>(model: &mut M, probe: &Batch) -> Result<f64> {
    Ok(mean(base_loss_sum(model, probe)?, probe))
}

/// [`base_loss`] under a fresh adapter, with which the model must have the same loss bit for bit: `B = 0`
/// adds nothing.
///
/// # Errors
/// `Numeric` with both losses when they differ or are not finite.
pub fn base_loss_under_fresh_adapter<M: Trainee>(model: &mut M, probe: &Batch) -> Result<f64> {
    let base = base_loss_sum(model, probe)?;
    let adapted = model.evaluate(probe, Variant::Adapted)?.sum;
    if adapted.to_bits() != base.to_bits() {
        return Err(Error::numeric(format_args!(
            "a fresh adapter changes the loss: {adapted:?}, without it {base:?}"
        ))
        .hint(HINT));
    }
    Ok(mean(base, probe))
}

fn base_loss_sum<M: Trainee>(model: &mut M, probe: &Batch) -> Result<f64> {
    ledger::enter(Phase::Eval);
    let base = model.evaluate(probe, Variant::Base)?.sum;
    if !base.is_finite() {
        let what = format!("loss of the base model is {base} on its first tokens");
        return Err(Error::numeric(what).hint("the base model's weights are damaged"));
    }
    Ok(base)
}

fn mean(loss_sum: f64, batch: &Batch) -> f64 {
    loss_sum / batch.num_targets().max(1) as f64
}

/// Follows the first steps of a fresh adapter.
#[derive(Debug, Default)]
pub struct FirstSteps {
    stage: Stage,
    /// Sums over the bits of each tensor before the update.
    before: Vec<u64>,
}

/// How far a fresh adapter is: with `B = 0` only B has a gradient; A follows once B has moved.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Stage {
    #[default]
    Begin,
    /// B has a gradient, and has not moved yet.
    HasGradient,
    /// B has moved.
    BMoved,
    /// A has a gradient, and has not moved yet.
    AHasGradient,
    Done,
}

impl FirstSteps {
    /// A check that has nothing left to do: for a resumed run, or an adapter that was trained before.
    pub fn done() -> Self {
        FirstSteps { stage: Stage::Done, before: Vec::new() }
    }

    /// Call with the gradients of a step at hand.
    ///
    /// # Errors
    /// `Numeric` naming the tensors without a gradient.
    pub fn before_update<M: AdapterBuffers>(&mut self, model: &mut M) -> Result<()> {
        let (matrix, next) = match self.stage {
            Stage::Begin => (Matrix::B, Stage::HasGradient),
            Stage::BMoved => (Matrix::A, Stage::AHasGradient),
            // What they were is known from the step that had the first gradient.
            Stage::HasGradient | Stage::AHasGradient | Stage::Done => return Ok(()),
        };
        let tensors = tensors_of(model, matrix);
        let mut dead = Vec::new();
        for tensor in &tensors {
            let alive = |gradients: &[f32]| gradients.iter().any(|&gradient| gradient != 0.0);
            if !model.any_piece(AdapterRegion::Gradients, tensor.range.clone(), alive)? {
                dead.push(tensor);
            }
        }
        let hint = if self.stage == Stage::Begin { HINT } else { DIVERGED };
        report(&tensors, dead.into_iter(), "have no gradient", hint)?;
        self.stage = next;
        self.remember(model)
    }

    /// Call after the update of the same step. In a warmup the rate may be too low for f32 to tell.
    ///
    /// # Errors
    /// `Numeric` naming the tensors that stood still.
    pub fn after_update<M: AdapterBuffers>(
        &mut self,
        model: &mut M,
        learning_rate: f64,
        warming_up: bool,
    ) -> Result<()> {
        let (matrix, next) = match self.stage {
            _ if learning_rate == 0.0 => return Ok(()),
            Stage::HasGradient => (Matrix::B, Stage::BMoved),
            Stage::AHasGradient => (Matrix::A, Stage::Done),
            Stage::Begin | Stage::BMoved | Stage::Done => return Ok(()),
        };
        let all = model.tensors().to_vec();
        let after = sums(model)?;
        let still = all.iter().zip(self.before.iter().zip(&after));
        let still = still.filter(|(tensor, (b, a))| tensor.matrix == matrix && b == a);
        let still: Vec<&ParameterTensor> = still.map(|(tensor, _)| tensor).collect();
        if still.is_empty() || !warming_up {
            report(&tensors_of(model, matrix), still.into_iter(), "stood still", HINT)?;
            self.stage = next;
        }
        Ok(())
    }

    fn remember<M: AdapterBuffers>(&mut self, model: &M) -> Result<()> {
        self.before = sums(model)?;
        Ok(())
    }
}

fn tensors_of<M: AdapterBuffers>(model: &M, matrix: Matrix) -> Vec<ParameterTensor> {
    model.tensors().iter().filter(|tensor| tensor.matrix == matrix).cloned().collect()
}

/// A hash of each tensor of the master (Fletcher-like, over the bits): another one when any element changes.
fn sums<M: AdapterBuffers>(model: &M) -> Result<Vec<u64>> {
    let sum = |tensor: &ParameterTensor| {
        let (mut first, mut second) = (0u64, 0u64);
        model.any_piece(AdapterRegion::Master, tensor.range.clone(), |values| {
            for value in values {
                first = first.wrapping_add(u64::from(value.to_bits()));
                second = second.wrapping_add(first);
            }
            false
        })?;
        Ok(first ^ second.rotate_left(32))
    };
    model.tensors().iter().map(sum).collect()
}

fn report<'a>(
    all: &[ParameterTensor],
    bad: impl Iterator<Item = &'a ParameterTensor>,
    what: &str,
    hint: &str,
) -> Result<()> {
    const SHOWN: usize = 3;
    let bad: Vec<&str> = bad.map(|tensor| tensor.name.as_str()).collect();
    if bad.is_empty() {
        return Ok(());
    }
    let names = bad[..bad.len().min(SHOWN)].join(", ");
    let more = if bad.len() > SHOWN { ", …" } else { "" };
    let (count, total) = (bad.len(), all.len());
    Err(Error::numeric(format_args!("{count} of {total} matrices {what}: {names}{more}"))
        .hint(hint))
}

#[cfg(test)]
mod tests {
    use super::super::step::accumulate;
    use super::super::toy::{Toy, documents};
    use super::*;

    fn batch() -> Batch {
        Batch::from_documents(&documents(&[6, 9]))
    }

    /// One step of training with the checks around it.
    fn step(toy: &mut Toy, checks: &mut FirstSteps, number: u64, rate: f64) -> Result<()> {
        accumulate(toy, &[batch()], 0, &|| false)?;
        checks.before_update(toy)?;
        toy.step(number, rate)?;
        checks.after_update(toy, rate, false)
    }

    #[test]
    fn a_sound_model_passes_with_and_without_warmup() -> Result<()> {
        for rates in [[1e-3, 1e-3, 1e-3, 1e-3], [0.0, 1e-3, 0.0, 1e-3]] {
            let (mut toy, mut checks) = (Toy::new(), FirstSteps::default());
            let loss = base_loss_under_fresh_adapter(&mut toy, &probe(&batch()))?;
            assert!(loss > 0.0);
            for (number, rate) in rates.into_iter().enumerate() {
                step(&mut toy, &mut checks, number as u64 + 1, rate)?;
            }
            assert_eq!(checks.stage, Stage::Done, "{rates:?}");
        }
        Ok(())
    }

    #[test]
    fn a_fresh_adapter_that_is_not_a_no_op_is_refused() {
        let mut toy = Toy::new();
        toy.base_error = 1e-6;
        let error = base_loss_under_fresh_adapter(&mut toy, &probe(&batch())).unwrap_err();
        assert!(error.to_string().starts_with("a fresh adapter changes the loss"), "{error}");
        assert!(base_loss(&mut toy, &probe(&batch())).is_ok(), "a trained one may differ");
    }

    #[test]
    fn a_missing_gradient_of_b_is_found_in_step_one() {
        let (mut toy, mut checks) = (Toy::new(), FirstSteps::default());
        toy.dead_b = true;
        let error = step(&mut toy, &mut checks, 1, 1e-3).unwrap_err();
        assert_eq!(error.message().what, "1 of 1 matrices have no gradient: toy.lora_B.weight");
    }

    #[test]
    fn a_run_without_any_gradient_left_is_ended() {
        let gradient = |loss, norm| Gradient { loss, norm, tokens: 1, targets: 1, hits: 0 };
        assert!(check_has_gradient(&gradient(10.8, 1e-30)).is_ok());
        assert!(check_has_gradient(&gradient(0.0, 0.0)).is_ok(), "nothing is left to learn");
        let error = check_has_gradient(&gradient(10.8, 0.0)).unwrap_err();
        assert_eq!(error.message().what, "no matrix has a gradient any more, at a loss of 10.8000");
    }

    #[test]
    fn a_matrix_that_stands_still_is_found() {
        let (mut toy, mut checks) = (Toy::new(), FirstSteps::default());
        accumulate(&mut toy, &[batch()], 0, &|| false).unwrap();
        checks.before_update(&mut toy).unwrap();
        checks.after_update(&mut toy, 1e-3, true).unwrap();
        let error = checks.after_update(&mut toy, 1e-3, false).unwrap_err();
        assert_eq!(error.message().what, "1 of 1 matrices stood still: toy.lora_B.weight");
    }

    #[test]
    fn the_sums_see_every_change() {
        let values: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let sums = |values: &[f32]| {
            let mut toy = Toy::new();
            toy.master.copy_from_slice(values);
            sums(&toy).unwrap()
        };
        let original = sums(&values);
        for index in 0..values.len() {
            let mut other = values.clone();
            other[index] = -1e-30;
            assert_ne!(sums(&other), original);
            other = values.clone();
            other.swap(index, index / 12 * 12 + (index + 1) % 12);
            assert_ne!(sums(&other), original);
        }
    }
}
