//! What a merge costs: sizes of the adapter's change, of the rounding, and of the difference
//! between the original and the 4-bit weights, over all adapted linears.

use rayon::prelude::*;
use serde_json::{Value, json};

use crate::checkpoint::DenseTensor;

/// Sums of squares over the adapted linears.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct MergeCost {
    /// Linears that the adapter changes.
    pub linears: usize,
    /// Their elements.
    pub elements: usize,
    weight: f64,
    change: f64,
    rounding: f64,
    base: Option<f64>,
}

impl MergeCost {
    /// Adds one linear: its base, the merged f32 values, what is written, and the base that was
    /// not chosen.
    pub(super) fn add(
        &mut self,
        base: &[f32],
        merged: &[f32],
        written: &DenseTensor,
        other_base: Option<&[f32]>,
    ) {
        self.linears += 1;
        self.elements += base.len();
        self.weight += base.par_iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        self.change += squared_difference(base, merged);
        self.rounding += squared_difference(merged, &written.to_f32());
        if let Some(other) = other_base {
            *self.base.get_or_insert(0.0) += squared_difference(base, other);
        }
    }

    /// Root mean square of the base weights.
    pub fn weight_rms(&self) -> f64 {
        self.rms(self.weight)
    }

    /// Root mean square of what the adapter adds.
    pub fn change_rms(&self) -> f64 {
        self.rms(self.change)
    }

    /// Root mean square of what rounding to the output's type takes away.
    pub fn rounding_rms(&self) -> f64 {
        self.rms(self.rounding)
    }

    /// Root mean square of the difference between the 4-bit and the original weights, where both
    /// are known.
    pub fn base_rms(&self) -> Option<f64> {
        self.base.map(|squares| self.rms(squares))
    }

    /// All figures.
    pub fn to_json(&self) -> Value {
        json!({
            "linears": self.linears,
            "elements": self.elements,
            "weight_rms": self.weight_rms(),
            "change_rms": self.change_rms(),
            "rounding_rms": self.rounding_rms(),
            "four_bit_vs_original_rms": self.base_rms(),
        })
    }

    fn rms(&self, squares: f64) -> f64 {
        if self.elements == 0 { 0.0 } else { (squares / self.elements as f64).sqrt() }
    }
}

fn squared_difference(a: &[f32], b: &[f32]) -> f64 {
    debug_assert_eq!(a.len(), b.len());
    a.par_iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

#[cfg(test)]
mod tests {
    use nibble_quant::FloatType;

    use super::*;

    #[test]
    fn figures_are_root_mean_squares_over_all_linears() {
        let dense = |values: &[f32]| DenseTensor {
            dtype: FloatType::F32,
            shape: vec![values.len()],
            data: bytemuck::allocation::pod_collect_to_vec::<f32, u8>(values).into(),
        };
        let mut cost = MergeCost::default();
        cost.add(&[3.0, 4.0], &[3.0, 5.0], &dense(&[3.5, 5.0]), Some(&[1.0, 4.0]));
        cost.add(&[0.0, 0.0], &[0.0, 0.0], &dense(&[0.0, 0.0]), None);
        assert_eq!((cost.linears, cost.elements), (2, 4));
        assert_eq!(cost.weight_rms(), 2.5);
        assert_eq!(cost.change_rms(), 0.5);
        assert_eq!(cost.rounding_rms(), 0.25);
        assert_eq!(cost.base_rms(), Some(1.0));
        assert_eq!(MergeCost::default().weight_rms(), 0.0);
    }
}
