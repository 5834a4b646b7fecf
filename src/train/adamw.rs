//! AdamW over flat buffers: one pass reads gradients and moments, updates the f32 master weights
//! and rounds them to the bf16 working copy.
//!
//! Every element is computed alone, in f32, without fused multiply-adds: neither the number of
//! threads nor the vector width changes a bit.
//! Source: Loshchilov and Hutter, arXiv 1711.05101; operation order of `torch.optim.AdamW`.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::buffers::{Buffers, CHUNK};

/// Settings of the optimizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay, times the learning rate.
    pub weight_decay: f64,
}

/// Elements that share a learning rate.
#[derive(Debug, Clone, PartialEq)]
pub struct RateGroup {
    /// Where the elements lie in the flat buffers.
    pub range: Range<usize>,
    /// Learning rate over that of the schedule.
    pub multiplier: f64,
}

/// The numbers of one step for one learning rate, rounded to f32 as torch does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Coefficients {
    /// `1 − lr · weight_decay`.
    pub keep: f32,
    /// `1 − beta1`.
    pub first_weight: f32,
    pub beta2: f32,
    /// `1 − beta2`.
    pub second_weight: f32,
    /// `√(1 − beta2ᵗ)`.
    pub second_correction: f32,
    pub epsilon: f32,
    /// `−lr / (1 − beta1ᵗ)`.
    pub negative_step: f32,
    /// Clipping: what gradients are multiplied by.
    pub gradient_scale: f32,
}

impl AdamW {
    /// Makes update `t` (counted from 1) with gradients `g · gradient_scale`:
    /// `m ← m + (1−β₁)(g − m)`, `v ← β₂v + (1−β₂)g²`,
    /// `w ← w(1 − lr·wd) − lr/(1−β₁ᵗ) · m / (√v / √(1−β₂ᵗ) + ε)`, `working ← bf16(w)`.
    ///
    /// `groups` are sorted, do not overlap, and each has the rate `learning_rate · multiplier`.
    pub fn update(
        &self,
        t: u64,
        learning_rate: f64,
        gradient_scale: f32,
        groups: &[RateGroup],
        buffers: Buffers<'_>,
    ) {
        let runs: Vec<(Range<usize>, Coefficients)> = groups
            .iter()
            .map(|group| {
                let rate = learning_rate * group.multiplier;
                (group.range.clone(), self.coefficients(t, rate, gradient_scale))
            })
            .collect();
        buffers.chunks().into_par_iter().enumerate().for_each(|(index, mut chunk)| {
            let offset = index * CHUNK;
            let end = offset + chunk.master.len();
            let first = runs.partition_point(|(range, _)| range.end <= offset);
            for (range, coefficients) in runs[first..].iter().take_while(|(r, _)| r.start < end) {
                let inside = range.start.max(offset) - offset..range.end.min(end) - offset;
                update_run(coefficients, chunk.slice(inside));
            }
        });
    }

    pub(super) fn coefficients(
        &self,
        t: u64,
        learning_rate: f64,
        gradient_scale: f32,
    ) -> Coefficients {
        let power = |beta: f64| beta.powi(t.min(i32::MAX as u64) as i32);
        Coefficients {
            keep: (1.0 - learning_rate * self.weight_decay) as f32,
            first_weight: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            second_weight: (1.0 - self.beta2) as f32,
            second_correction: (1.0 - power(self.beta2)).sqrt() as f32,
            epsilon: self.epsilon as f32,
            negative_step: -(learning_rate / (1.0 - power(self.beta1))) as f32,
            gradient_scale,
        }
    }
}

/// The update of elements of one rate, with the widest vectors of this machine.
pub(super) fn update_run(c: &Coefficients, run: Buffers<'_>) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || update_elements(c, run),
    );
}

#[inline(always)]
fn update_elements(c: &Coefficients, run: Buffers<'_>) {
    let Buffers { master, gradients, first_moment, second_moment, working } = run;
    let moments = first_moment.iter_mut().zip(second_moment);
    for ((w, &gradient), (m, v)) in master.iter_mut().zip(gradients.iter()).zip(moments) {
        let g = gradient * c.gradient_scale;
        *m += c.first_weight * (g - *m);
        *v = *v * c.beta2 + c.second_weight * g * g;
        let denominator = v.sqrt() / c.second_correction + c.epsilon;
        *w = *w * c.keep + c.negative_step * *m / denominator;
    }
    if let Some(working) = working {
        working.iter_mut().zip(master).for_each(|(to, from)| *to = bf16::from_f32(*from));
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::super::clip;
    use super::*;

    /// Made by `scripts/golden/gen_optimizer.py`.
    const GOLDEN: &[u8] =
        include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/train/adamw.safetensors"));
    const A_ELEMENTS: usize = 5 * 37;
    const ELEMENTS: usize = A_ELEMENTS + 41 * 5;
    const LORAPLUS_RATIO: f64 = 16.0;

    fn floats(file: &SafeTensors, name: &str) -> Vec<f32> {
        let bytes = file.tensor(name).unwrap().data().to_vec();
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    /// A then B, as the flat buffers hold them.
    fn pair(file: &SafeTensors, suffix: &str) -> Vec<f32> {
        [floats(file, &format!("a.{suffix}")), floats(file, &format!("b.{suffix}"))].concat()
    }

    fn assert_close(name: &str, got: &[f32], expected: &[f32], tolerance: f32) {
        assert_eq!(got.len(), expected.len());
        let scale = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
        for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
            let error = (got - expected).abs();
            assert!(error <= tolerance * scale, "{name}[{i}]: {got:e}, torch has {expected:e}");
        }
    }

    #[test]
    fn thirty_steps_are_torchs() {
        let file = SafeTensors::deserialize(GOLDEN).unwrap();
        let optimizer = AdamW { beta1: 0.9, beta2: 0.99, epsilon: 1e-6, weight_decay: 0.05 };
        let groups = [
            RateGroup { range: 0..A_ELEMENTS, multiplier: 1.0 },
            RateGroup { range: A_ELEMENTS..ELEMENTS, multiplier: LORAPLUS_RATIO },
        ];
        let norms = floats(&file, "grad_norms");
        let rates = file.tensor("learning_rates").unwrap().data().to_vec();
        let rates: Vec<f64> =
            rates.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect();
        let mut master = pair(&file, "0");
        let (mut first_moment, mut second_moment) = (vec![0.0; ELEMENTS], vec![0.0; ELEMENTS]);
        let mut working = vec![bf16::ZERO; ELEMENTS];
        let mut clipped = 0;
        for step in 1..=norms.len() {
            let mut gradients = pair(&file, &format!("grad.{step}"));
            let norm = clip::global_norm(&gradients);
            assert!((norm / norms[step - 1] as f64 - 1.0).abs() < 1e-6, "step {step}: {norm}");
            let scale = clip::gradient_scale(norm, 0.7);
            clipped += usize::from(scale < 1.0);
            let buffers = Buffers {
                master: &mut master,
                gradients: &mut gradients,
                first_moment: &mut first_moment,
                second_moment: &mut second_moment,
                working: Some(&mut working),
            };
            optimizer.update(step as u64, rates[step - 1], scale, &groups, buffers);
            if [1, 2, 10, 30].contains(&step) {
                assert_close("weight", &master, &pair(&file, &step.to_string()), 3e-7);
                let first = pair(&file, &format!("exp_avg.{step}"));
                assert_close("first moment", &first_moment, &first, 3e-7);
                let second = pair(&file, &format!("exp_avg_sq.{step}"));
                assert_close("second moment", &second_moment, &second, 3e-7);
            }
        }
        assert!((5..25).contains(&clipped), "both branches of clipping ran: {clipped}");
        let rounded: Vec<bf16> = master.iter().map(|&w| bf16::from_f32(w)).collect();
        assert_eq!(working, rounded);
    }

    #[test]
    fn working_copy_rounds_as_torch() {
        let file = SafeTensors::deserialize(GOLDEN).unwrap();
        let values = floats(&file, "rounding.f32");
        let data = file.tensor("rounding.bf16").unwrap().data().to_vec();
        let expected = data.chunks_exact(2).map(|b| u16::from_le_bytes(b.try_into().unwrap()));
        for (&value, expected) in values.iter().zip(expected) {
            assert_eq!(bf16::from_f32(value).to_bits(), expected, "{:08x}", value.to_bits());
        }
    }

    fn pseudo_random(len: usize, seed: u64) -> Vec<f32> {
        let mut out = vec![0.0; len];
        crate::random::Stream::new(seed, "adamw").fill_normal(0, 1.0, &mut out);
        out
    }

    /// Weights after one step on `threads` threads; also the norm's bits.
    fn one_step(threads: usize, groups: &[RateGroup]) -> (u64, Vec<f32>) {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let (mut master, mut gradients) = (pseudo_random(LEN, 1), pseudo_random(LEN, 2));
        let (mut first_moment, mut second_moment) = (vec![0.1; LEN], vec![0.2; LEN]);
        let optimizer = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1 };
        let norm = pool.install(|| clip::global_norm(&gradients));
        let buffers = Buffers {
            master: &mut master,
            gradients: &mut gradients,
            first_moment: &mut first_moment,
            second_moment: &mut second_moment,
            working: None,
        };
        pool.install(|| optimizer.update(3, 1e-3, 0.5, groups, buffers));
        (norm.to_bits(), master)
    }

    const LEN: usize = 3 * CHUNK + 77;

    #[test]
    fn threads_do_not_change_a_bit() {
        let groups = [RateGroup { range: 0..LEN, multiplier: 1.0 }];
        assert_eq!(one_step(1, &groups), one_step(3, &groups));
    }

    #[test]
    fn each_group_has_its_own_rate() {
        let cut = CHUNK + 13;
        let group = |range, multiplier| RateGroup { range, multiplier };
        let both = one_step(2, &[group(0..cut, 1.0), group(cut..LEN - 5, 4.0)]).1;
        assert_eq!(both[..cut], one_step(2, &[group(0..LEN, 1.0)]).1[..cut]);
        assert_eq!(both[cut..LEN - 5], one_step(2, &[group(0..LEN, 4.0)]).1[cut..LEN - 5]);
        assert_eq!(both[LEN - 5..], pseudo_random(LEN, 1)[LEN - 5..], "in no group: untouched");
        assert_ne!(both[cut], one_step(2, &[group(0..LEN, 1.0)]).1[cut]);
    }
}
