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
    /// Elements of the linears.
    pub elements: usize,
    weight: f64,
    change: f64,
    rounding: f64,
    base: Option<f64>,
}

impl MergeCost {
    /// Adds one linear: its base, the merged f32 values, what is written, and the base that was
    /// not chosen. Returns how far that one is from `base`: `‖base − other‖ / ‖base‖`, 0 without one.
    pub(super) fn add(
        &mut self,
        base: &[f32],
        merged: &[f32],
        written: &DenseTensor,
        other_base: Option<&[f32]>,
    ) -> f64 {
        self.linears += 1;
        self.elements += base.len();
        // Sums of chunks in the order of the chunks: the figures do not depend on threads.
        let sums: Vec<[f64; 4]> = (0..base.len().div_ceil(CHUNK))
            .into_par_iter()
            .map(|index| {
                let range = index * CHUNK..((index + 1) * CHUNK).min(base.len());
                let (base, merged) = (&base[range.clone()], &merged[range.clone()]);
                let other = other_base.map_or(0.0, |other| distance(base, &other[range.clone()]));
                let rounded = written.to_f32_range(range);
                [square(base), distance(base, merged), distance(merged, &rounded), other]
            })
            .collect();
        let [mut size, mut apart] = [0.0; 2];
        for [weight, change, rounding, other] in sums {
            size += weight;
            apart += other;
            self.weight += weight;
            self.change += change;
            self.rounding += rounding;
            if other_base.is_some() {
                *self.base.get_or_insert(0.0) += other;
            }
        }
        if apart == 0.0 { 0.0 } else { (apart / size).sqrt() }
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

    /// The figures as a JSON object.
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

/// Elements of one task, and terms of one f32 partial sum: 256 of 16 lanes each.
const CHUNK: usize = 4096;
const LANES: usize = 16;

/// Sum of squares.
fn square(values: &[f32]) -> f64 {
    let mut lanes = [0.0_f32; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|x| x * x).sum();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += x * x);
    }
    lanes.iter().map(|&x| f64::from(x)).sum::<f64>() + f64::from(rest)
}

/// Sum of squared differences.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let mut differences = [0.0; CHUNK];
    let differences = &mut differences[..a.len()];
    differences.iter_mut().zip(a.iter().zip(b)).for_each(|(d, (a, b))| *d = a - b);
    square(differences)
}

#[cfg(test)]
mod tests {
    use nibble_quant::{FloatType, owned_bytes};

    use super::*;

    #[test]
    fn figures_are_root_mean_squares_over_all_linears() {
        let dense = |values: &[f32]| DenseTensor {
            dtype: FloatType::F32,
            shape: vec![values.len()],
            data: owned_bytes(values.to_vec()),
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
