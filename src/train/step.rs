//! What an optimizer step needs: the gradient of its batches, and the rate of each tensor.

use super::adamw::RateGroup;
use super::trainee::Trainee;
use crate::adapter::LoraPlus;
use crate::data::Batch;
use crate::error::{Error, Result};
use crate::kernels::TokenLosses;
use crate::model::parameters::{Matrix, ParameterTensor};
use crate::plan::AdapterRegion;

/// What the gradients of a step's batches sum up to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gradient {
    /// Mean loss per trained token of the batches.
    pub loss: f64,
    /// Global L2 norm, before clipping.
    pub norm: f64,
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Tokens that carried loss.
    pub targets: u64,
    /// Those of them that no other token was likelier than.
    pub hits: u64,
}

/// Learning rate of each tensor over that of the schedule, LoRA+: A 1, B `lr_ratio`.
pub fn rate_groups(tensors: &[ParameterTensor], loraplus: LoraPlus) -> Vec<RateGroup> {
    let multiplier = |tensor: &ParameterTensor| match tensor.matrix {
        Matrix::A => 1.0,
        Matrix::B => loraplus.lr_ratio,
    };
    let groups = tensors
        .iter()
        .map(|tensor| RateGroup { range: tensor.range.clone(), multiplier: multiplier(tensor) });
    groups.collect()
}

/// Fills the gradients with those of `Σ loss / targets` over the batches: the same as one large
/// batch, however the tokens are spread over its parts. `None` when `stop` says so in between.
///
/// # Errors
/// `Numeric` when loss or gradient are not finite, naming batch and tensor.
pub fn accumulate<M: Trainee>(
    model: &mut M,
    batches: &[Batch],
    first_micro_batch: u64,
    stop: &dyn Fn() -> bool,
) -> Result<Option<Gradient>> {
    let targets: usize = batches.iter().map(|batch| batch.num_targets()).sum();
    if targets == 0 {
        return Err(Error::input(format_args!("no trained token in {}", place(batches, None))));
    }
    let scale = 1.0 / targets as f32;
    model.zero_gradients();
    let mut losses = TokenLosses::default();
    for (index, batch) in batches.iter().enumerate() {
        if stop() {
            return Ok(None);
        }
        let of_batch = model.forward_backward(batch, scale, first_micro_batch + index as u64)?;
        if !of_batch.sum.is_finite() {
            return Err(not_finite(model, "loss", &place(batches, Some(index))));
        }
        losses += of_batch;
    }
    let norm = model.gradient_norm()?;
    if !norm.is_finite() {
        return Err(find_bad_gradient(model, batches, first_micro_batch));
    }
    let tokens = batches.iter().map(|batch| batch.tokens() as u64).sum();
    let loss = losses.sum / targets as f64;
    let (targets, hits) = (targets as u64, losses.hits);
    Ok(Some(Gradient { loss, norm, tokens, targets, hits }))
}

/// Repeats a step batch by batch until the gradient is bad.
fn find_bad_gradient<M: Trainee>(model: &mut M, batches: &[Batch], first: u64) -> Error {
    for (index, batch) in batches.iter().enumerate() {
        model.zero_gradients();
        let scale = 1.0 / batch.num_targets().max(1) as f32;
        let gradients = model.forward_backward(batch, scale, first + index as u64);
        match gradients.and_then(|_| model.gradient_norm()) {
            Err(error) => return error,
            Ok(norm) if norm.is_finite() => {}
            Ok(_) => return not_finite(model, "gradient", &place(batches, Some(index))),
        }
    }
    not_finite(model, "gradient", &place(batches, None))
}

fn not_finite<M: Trainee>(model: &mut M, what: &str, place: &str) -> Error {
    let tensors = model.tensors().to_vec();
    let activation = model.first_bad_activation();
    let first = |region| {
        let bad = |tensor: &&ParameterTensor| {
            let bad = |values: &[f32]| values.iter().any(|value| !value.is_finite());
            model.any_piece(region, tensor.range.clone(), bad).unwrap_or(false)
        };
        tensors.iter().find(bad).map(|tensor| tensor.name.as_str())
    };
    let culprit = match (first(AdapterRegion::Master), activation, first(AdapterRegion::Gradients))
    {
        (Some(name), ..) => format!("; weight {name} is not finite"),
        (None, Some(activation), _) => format!("; the first bad values are in {activation}"),
        (None, None, Some(name)) => format!("; the first bad gradient is that of {name}"),
        (None, None, None) => String::new(),
    };
    Error::numeric(format_args!("{what} is not finite in {place}{culprit}"))
        .hint("try a lower `--learning-rate`, or look at these records with `nibble data --show`")
}

/// `batch 2 of 4 (train.jsonl:7, 9)`.
fn place(batches: &[Batch], index: Option<usize>) -> String {
    let named = index.map_or(batches, |index| &batches[index..=index]);
    let places: Vec<String> = named.iter().map(Batch::places).collect();
    let batch = index.map_or(String::from("the batches"), |index| format!("batch {}", index + 1));
    format!("{batch} of {} ({})", batches.len(), places.join("; "))
}

#[cfg(test)]
mod tests {
    use super::super::toy::{Toy, documents};
    use super::super::trainee::AdapterBuffers;
    use super::*;
    use crate::model::Variant;

    fn never() -> bool {
        false
    }

    fn gradient(model: &mut Toy, batches: &[Batch]) -> Gradient {
        accumulate(model, batches, 0, &never).unwrap().unwrap()
    }

    /// A toy whose B is not zero, so that A has a gradient.
    fn moved() -> Toy {
        let mut toy = Toy::new();
        gradient(&mut toy, &[Batch::from_documents(&documents(&[5]))]);
        toy.step(1, 0.1).unwrap();
        toy
    }

    #[test]
    fn the_gradient_is_the_slope_of_the_loss() {
        let mut toy = moved();
        let batch = Batch::from_documents(&documents(&[7, 4]));
        gradient(&mut toy, std::slice::from_ref(&batch));
        let gradients = toy.gradients.clone();
        for (index, gradient) in gradients.iter().enumerate() {
            let loss = |delta: f32| {
                // whole multiples of bf16's spacing at these sizes, so that rounding keeps them
                let mut other = moved();
                let value = half::bf16::from_f32(other.master[index]).to_f32();
                other.buffers().working.unwrap()[index] = half::bf16::from_f32(value + delta);
                let got = other.buffers().working.unwrap()[index].to_f32() - value;
                (
                    other.evaluate(&batch, Variant::Adapted).unwrap().sum
                        / batch.num_targets() as f64,
                    f64::from(got),
                )
            };
            let ((up, plus), (down, minus)) = (loss(1.0 / 64.0), loss(-1.0 / 64.0));
            let slope = (up - down) / (plus - minus);
            let error = (slope - f64::from(*gradient)).abs();
            assert!(error < 2e-2 * (slope.abs() + 0.05), "{index}: {slope} {gradient}");
        }
        assert!(gradients.iter().all(|g| *g != 0.0));
    }

    #[test]
    fn batches_in_parts_equal_one_large_batch() {
        let documents = documents(&[9, 3, 6, 2, 11, 5, 4, 8]);
        let (mut whole, mut parts) = (moved(), moved());
        let one = gradient(&mut whole, &[Batch::from_documents(&documents)]);
        let each: Vec<Batch> =
            documents.iter().map(|document| Batch::from_documents([document])).collect();
        let eight = gradient(&mut parts, &each);
        assert!((one.loss / eight.loss - 1.0).abs() < 1e-12);
        assert!((one.norm / eight.norm - 1.0).abs() < 1e-6);
        assert_eq!((one.tokens, one.targets), (eight.tokens, eight.targets));
        for (a, b) in whole.gradients.iter().zip(&parts.gradients) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
    }

    #[test]
    fn a_bad_gradient_names_its_batch_lines_and_tensor() {
        let documents = documents(&[5, 6, 7]);
        let batches: Vec<Batch> = documents.iter().map(|d| Batch::from_documents([d])).collect();
        let mut toy = moved();
        let only_in_second = documents[1].input_ids[0];
        toy.poison = Some(only_in_second);
        assert!(!documents[0].input_ids.contains(&only_in_second));
        let error = accumulate(&mut toy, &batches, 0, &never).unwrap_err();
        assert!(matches!(error, Error::Numeric(_)));
        assert_eq!(
            error.message().what,
            "gradient is not finite in batch 2 of 3 (lines 2); the first bad gradient is that of \
             toy.lora_B.weight"
        );
    }

    #[test]
    fn a_bad_weight_is_named_before_its_consequences() {
        let batches = [Batch::from_documents(&documents(&[5]))];
        let mut toy = moved();
        toy.master[3] = f32::NAN;
        toy.buffers().working.unwrap()[3] = half::bf16::NAN;
        let error = accumulate(&mut toy, &batches, 0, &never).unwrap_err();
        let expected =
            "loss is not finite in batch 1 of 1 (lines 1); weight toy.lora_A.weight is not finite";
        assert_eq!(error.message().what, expected);
    }

    #[test]
    fn loraplus_scales_b_alone() {
        let toy = Toy::new();
        let groups = rate_groups(toy.tensors(), LoraPlus { lr_ratio: 16.0 });
        assert_eq!(groups.iter().map(|g| g.multiplier).collect::<Vec<_>>(), [1.0, 16.0]);
        assert_eq!(groups[1].range, toy.tensors()[1].range);
    }
}
