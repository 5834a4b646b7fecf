//! Sums of products in a fixed number of parts: the order of additions is the same on every processor
//! with registers of up to [`LANES`] floats.

use half::bf16;
use pulp::{Simd, WithSimd};

/// Partial sums: four of the widest registers, to hide the latency of additions.
const LANES: usize = 64;

/// Weights that are decoded before they are multiplied: they stay in the first-level cache.
const PIECE: usize = 1024;

/// A stored number.
pub(crate) trait Element: Copy {
    fn widen(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// `Σ w·x`.
///
/// # Panics
/// When the lengths differ.
pub(crate) fn dot<T: Element>(w: &[T], x: &[f32]) -> f32 {
    assert_eq!(w.len(), x.len(), "a factor for each");
    pulp::Arch::new().dispatch(Dot(w, x))
}

/// `Σ w·x` of weights that `decode` writes out from an element on, a piece at a time.
pub(crate) fn dot_in_pieces(x: &[f32], decode: impl Fn(usize, &mut [f32])) -> f32 {
    let mut decoded = [0.0; PIECE];
    let pieces = x.chunks(PIECE).enumerate().map(|(piece, x)| {
        let decoded = &mut decoded[..x.len()];
        decode(piece * PIECE, decoded);
        dot(decoded, x)
    });
    pieces.sum()
}

struct Dot<'a, T>(&'a [T], &'a [f32]);

impl<T: Element> WithSimd for Dot<'_, T> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f32 {
        let mut sums = [0.0f32; LANES];
        let (w, w_rest) = self.0.as_chunks::<LANES>();
        let (x, x_rest) = self.1.as_chunks::<LANES>();
        for (w, x) in w.iter().zip(x) {
            for lane in 0..LANES {
                sums[lane] += w[lane].widen() * x[lane];
            }
        }
        for (sum, (w, x)) in sums.iter_mut().zip(w_rest.iter().zip(x_rest)) {
            *sum += w.widen() * x;
        }
        // Pairwise, which is a few additions of registers.
        let mut half = LANES / 2;
        while half > 0 {
            for lane in 0..half {
                sums[lane] += sums[lane + half];
            }
            half /= 2;
        }
        sums[0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_counts_once() {
        for count in [0, 1, 63, 64, 65, 200, 1000] {
            let w: Vec<f32> = (0..count).map(|i| (i % 7) as f32 - 2.0).collect();
            let x: Vec<f32> = (0..count).map(|i| (i % 5) as f32).collect();
            let expected: f32 = w.iter().zip(&x).map(|(w, x)| w * x).sum();
            assert_eq!(dot(&w, &x), expected, "{count}");
            let half: Vec<bf16> = w.iter().map(|&w| bf16::from_f32(w)).collect();
            assert_eq!(dot(&half, &x), expected, "{count} in bf16");
        }
    }
}
