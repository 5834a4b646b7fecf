//! Fused multiply-adds on registers alone: the f32 limit that products are measured against.

use pulp::{Simd, WithSimd};

/// Independent chains: enough to hide the latency (4 cycles) of two units, and to fit 16 registers.
const CHAINS: usize = 12;

/// Runs `steps` multiply-adds on every lane of every chain.
pub struct Burst {
    /// Any number below 1.
    pub seed: f32,
    /// Length of the chains.
    pub steps: usize,
}

impl WithSimd for Burst {
    /// The result, so that it is computed, and the floating-point operations: two for each lane of
    /// each step.
    type Output = (f32, usize);

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let scale = simd.splat_f32s(self.seed);
        let offset = simd.splat_f32s(1.0 - self.seed);
        let mut chains = [offset; CHAINS];
        for _ in 0..self.steps {
            for chain in &mut chains {
                *chain = simd.mul_add_f32s(*chain, scale, offset);
            }
        }
        let sum = chains.into_iter().map(|chain| simd.reduce_sum_f32s(chain)).sum();
        (sum, 2 * S::F32_LANES * CHAINS * self.steps)
    }
}
