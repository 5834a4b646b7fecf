//! What may be wrong with the values and the shape of a tensor, in the words of all commands.

use std::fmt::Display;

use nibble_quant::PackedWeight;

use crate::error::{Error, Result, candle_text};

/// The way out of a weight that is NaN or infinite.
const NOT_FINITE: &str = "the checkpoint holds NaN or Inf: get another copy of the model";

/// Refuses a tensor of another shape than `config.json` implies.
///
/// # Errors
/// `Input` naming the tensor and both shapes.
pub fn check_shape(name: impl Display, got: &[usize], expected: &[usize]) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    let what = format!("tensor {name} has shape {got:?}, config.json implies {expected:?}");
    Err(Error::mismatched_weights(what))
}

/// An error for the element at the flat `index` of a tensor that is NaN or infinite.
pub fn not_finite(name: &str, shape: &[usize], index: usize, value: f32) -> Error {
    let place = match *shape {
        [_, columns] => format!("[{}, {}]", index / columns, index % columns),
        _ => index.to_string(),
    };
    Error::input(format_args!("tensor {name}: element {place} is {value}")).hint(NOT_FINITE)
}

/// An error for a tensor whose blocks cannot be packed or read, since some value or scale is not finite.
pub fn unusable(name: &str, error: &candle_core::Error) -> Error {
    Error::input(format_args!("tensor {name}: {}", candle_text(error))).hint(NOT_FINITE)
}

/// Refuses blocks with scales that are not finite: see [`PackedWeight::check_scales`].
///
/// # Errors
/// `Input` naming the tensor, called `name`, and the first such scale.
pub fn check_scales(name: &str, packed: &PackedWeight) -> Result<()> {
    packed.check_scales().map_err(|e| unusable(name, &e))
}
