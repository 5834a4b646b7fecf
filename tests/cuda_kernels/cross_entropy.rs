//! Cross-entropy and its gradient against f64.

use half::bf16;

use crate::emulator::launch;
use crate::support::*;

/// Loss and gradient of one row.
fn reference(z: &[f64], target: usize, scale: f64) -> (f64, Vec<f64>) {
    let largest = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = z.iter().map(|z| (z - largest).exp()).sum();
    let mut gradient: Vec<f64> = z.iter().map(|z| scale * (z - largest).exp() / total).collect();
    gradient[target] -= scale;
    (largest + total.ln() - z[target], gradient)
}

/// (vocabulary, stride, threads): full vectors, fewer columns than threads, odd.
const SHAPES: [(usize, usize, u32); 4] =
    [(512, 520, 256), (40, 40, 256), (333, 335, 64), (5000, 5000, 1024)];

#[test]
fn losses_and_gradients_of_both_types() {
    in_every_order(|device| {
        for (vocab, stride, threads) in SHAPES {
            // Rows of large logits, of one that stands out, and one that does not count.
            let targets = [0u32, (vocab - 1) as u32, 17, vocab as u32];
            let mut z = normal_bf16(4 * vocab, "logits");
            z[..vocab].iter_mut().for_each(|z| *z *= bf16::from_f32(30.0));
            z[2 * vocab + 17] = bf16::from_f32(60.0);
            let scale = 0.25f32;
            for gradient in [0, 1] {
                let mut narrow = with_stride(&z, vocab, stride);
                let mut full: Vec<f32> = narrow.iter().map(|z| z.to_f32()).collect();
                let (mut losses, mut losses_f32) = (vec![f32::NAN; 4], vec![f32::NAN; 4]);
                launch!(device, "cross_entropy_bf16", [4, 1, 1], threads; &mut narrow[..],
                    stride as i32, &targets[..], vocab as i32, scale, gradient, &mut losses[..]);
                launch!(device, "cross_entropy_f32", [4, 1, 1], threads; &mut full[..],
                    stride as i32, &targets[..], vocab as i32, scale, gradient, &mut losses_f32[..]);
                assert_eq!(losses, losses_f32);
                assert_eq!(losses[3], 0.0);
                let narrow = band(&narrow, vocab, stride);
                for row in 0..3 {
                    let logits = wide(&z[row * vocab..][..vocab]);
                    let (loss, d) = reference(&logits, targets[row] as usize, f64::from(scale));
                    assert_close(&[f64::from(losses[row])], &[loss], 2e-6, 2e-6);
                    let expected = if gradient == 1 { &d } else { &logits };
                    let got: Vec<f64> =
                        full[row * stride..][..vocab].iter().map(|x| f64::from(*x)).collect();
                    assert_close(&got, expected, 1e-7, 2e-5);
                    assert_close(&narrow[row * vocab..][..vocab], expected, 1e-7, BF16_ROUNDING);
                }
                if gradient == 1 {
                    assert!(narrow[3 * vocab..].iter().all(|&d| d == 0.0));
                }
            }
        }
    });
}
