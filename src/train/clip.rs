//! Gradient clipping by global norm, as `torch.nn.utils.clip_grad_norm_`.

use rayon::prelude::*;

use super::buffers::CHUNK;

/// Partial sums kept side by side inside a chunk: two 512-bit vectors of f64.
const LANES: usize = 16;
/// torch's guard against division by zero.
const EPSILON: f64 = 1e-6;

/// `√Σ g²` over all elements, in f64.
///
/// The order of additions is fixed, so the number of threads does not change a bit. The result is
/// finite if and only if every element is: squares of f32 do not overflow f64.
pub fn global_norm(gradients: &[f32]) -> f64 {
    let sums: Vec<f64> = gradients.par_chunks(CHUNK).map(sum_of_squares).collect();
    sums.iter().sum::<f64>().sqrt()
}

/// What gradients are multiplied by: `min(1, max_grad_norm / (norm + 1e-6))`; 1 if `max_grad_norm`
/// is 0.
pub fn gradient_scale(norm: f64, max_grad_norm: f64) -> f32 {
    if max_grad_norm == 0.0 {
        return 1.0;
    }
    (max_grad_norm / (norm + EPSILON)).min(1.0) as f32
}

fn sum_of_squares(chunk: &[f32]) -> f64 {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            let mut lanes = [0f64; LANES];
            let blocks = chunk.chunks_exact(LANES);
            for (lane, &x) in lanes.iter_mut().zip(blocks.remainder()) {
                *lane = f64::from(x) * f64::from(x);
            }
            for block in blocks {
                lanes.iter_mut().zip(block).for_each(|(l, &x)| *l += f64::from(x) * f64::from(x));
            }
            lanes.iter().sum()
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_counts_once() {
        let len = 2 * CHUNK + 1001;
        let ones = vec![1f32; len];
        assert_eq!(global_norm(&ones), (len as f64).sqrt());
        let mut huge = ones;
        huge[len - 1] = f32::MAX;
        assert_eq!(global_norm(&huge) as f32, f32::MAX);
        huge[CHUNK + 5] = f32::NAN;
        assert!(global_norm(&huge).is_nan());
        assert_eq!(global_norm(&[]), 0.0);
    }

    #[test]
    fn zero_disables_clipping() {
        assert_eq!(gradient_scale(50.0, 0.0), 1.0);
        assert_eq!(gradient_scale(0.5, 1.0), 1.0);
        assert_eq!(gradient_scale(2.0, 1.0), (1.0 / (2.0 + 1e-6)) as f32);
    }
}
