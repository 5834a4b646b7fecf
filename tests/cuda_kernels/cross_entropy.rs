//! Cross-entropy and its gradient against f64.

use half::bf16;

use crate::emulator::launch;
use crate::support::*;

/// No cap, and one that the largest logits are far beyond.
const CAPS: [f32; 2] = [0.0, 7.0];

/// Loss and gradient of one row, capped unless `cap` is 0.
fn reference(x: &[f64], target: usize, scale: f64, cap: f32) -> (f64, Vec<f64>) {
    let cap = f64::from(cap);
    let capped = |x: &f64| if cap > 0.0 { cap * (x / cap).tanh() } else { *x };
    let z: Vec<f64> = x.iter().map(capped).collect();
    let largest = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = z.iter().map(|z| (z - largest).exp()).sum();
    let mut gradient: Vec<f64> = z.iter().map(|z| scale * (z - largest).exp() / total).collect();
    gradient[target] -= scale;
    if cap > 0.0 {
        gradient.iter_mut().zip(&z).for_each(|(d, z)| *d *= 1.0 - (z / cap).powi(2));
    }
    (largest + total.ln() - z[target], gradient)
}

/// 1 where no logit of a row is larger than its target's: a cap does not change which is.
fn expected_hits(z: &[bf16], targets: &[u32; 4]) -> [f32; 4] {
    let vocab = z.len() / 4;
    let hit = |row: usize| {
        let logits = &z[row * vocab..][..vocab];
        let target = logits.get(targets[row] as usize);
        f32::from(u8::from(target.is_some_and(|target| logits.iter().all(|z| z <= target))))
    };
    let hits = [0, 1, 2, 3].map(hit);
    assert_eq!((hits[2], hits[3]), (1.0, 0.0));
    hits
}

/// (vocabulary, stride, threads): full vectors, fewer columns than threads, odd.
const SHAPES: [(usize, usize, u32); 4] =
    [(512, 520, 256), (40, 40, 256), (333, 335, 64), (5000, 5000, 512)];

/// Each of one with each of the other.
fn both<A: Copy, B: Copy, const M: usize, const N: usize>(
    ones: [A; M],
    others: [B; N],
) -> impl Iterator<Item = (A, B)> {
    ones.into_iter().flat_map(move |one| others.into_iter().map(move |other| (one, other)))
}

/// Tiles of several widths, the last one shorter, the target in any of them or in none: loss and
/// gradient of the row as a whole.
#[test]
fn tiles_of_a_row_give_its_loss_and_gradient() {
    in_every_order(|device| {
        let shapes = [(512, 512, 256), (512, 200, 256), (333, 96, 64)];
        for ((vocab, tile, threads), cap) in both(shapes, CAPS) {
            let targets = [0u32, (vocab - 1) as u32, 100, vocab as u32];
            let mut z = normal_bf16(4 * vocab, "logits");
            z[..vocab].iter_mut().for_each(|z| *z *= bf16::from_f32(30.0));
            z[2 * vocab + 100] = bf16::from_f32(60.0);
            let scale = 0.25f32;
            let mut statistics = [f32::NAN; 3 * 4];
            let columns = |first: usize| tile.min(vocab - first);
            let of_tile = |first: usize| -> Vec<bf16> {
                let rows = z.chunks(vocab);
                rows.flat_map(|row| row[first..first + columns(first)].to_vec()).collect()
            };
            for first in (0..vocab).step_by(tile) {
                let (logits, columns) = (of_tile(first), columns(first) as i32);
                launch!(device, "tile_statistics", [4, 1, 1], threads; &logits[..], columns,
                    columns, &targets[..], first as i32, i32::from(first == 0),
                    cap, &mut statistics[..]);
            }
            let (mut losses, mut hits) = ([f32::NAN; 4], [f32::NAN; 4]);
            launch!(device, "tile_losses", [2, 1, 1], 32; &statistics[..], &targets[..],
                vocab as i32, 4, &mut losses[..], &mut hits[..]);
            assert_eq!((losses[3], hits), (0.0, expected_hits(&z, &targets)));
            let mut gradient = vec![0.0; 4 * vocab];
            for first in (0..vocab).step_by(tile) {
                let (mut logits, count) = (of_tile(first), columns(first));
                launch!(device, "tile_gradient", [4, 1, 1], threads; &mut logits[..], count as i32,
                    count as i32, &targets[..], first as i32, vocab as i32, scale,
                    cap, &statistics[..]);
                for (row, tile) in logits.chunks(count).enumerate() {
                    gradient[row * vocab + first..][..count].copy_from_slice(&wide(tile));
                }
            }
            assert!(gradient[3 * vocab..].iter().all(|&d| d == 0.0));
            for row in 0..3 {
                let logits = wide(&z[row * vocab..][..vocab]);
                let (loss, d) = reference(&logits, targets[row] as usize, f64::from(scale), cap);
                assert_close(&[f64::from(losses[row])], &[loss], 2e-6, 2e-6);
                assert_close(&gradient[row * vocab..][..vocab], &d, 1e-7, BF16_ROUNDING);
            }
        }
    });
}

#[test]
fn losses_and_gradients_are_those_of_f64() {
    in_every_order(|device| {
        for ((vocab, stride, threads), cap) in both(SHAPES, CAPS) {
            // Rows of large logits, of one that stands out, and one that does not count.
            let targets = [0u32, (vocab - 1) as u32, 17, vocab as u32];
            let mut z = normal_bf16(4 * vocab, "logits");
            z[..vocab].iter_mut().for_each(|z| *z *= bf16::from_f32(30.0));
            z[2 * vocab + 17] = bf16::from_f32(60.0);
            let scale = 0.25f32;
            for gradient in [0, 1] {
                let mut narrow = with_stride(&z, vocab, stride);
                let (mut losses, mut hits) = ([f32::NAN; 4], [f32::NAN; 4]);
                launch!(device, "cross_entropy_bf16", [4, 1, 1], threads; &mut narrow[..],
                    stride as i32, &targets[..], vocab as i32, scale, gradient, cap,
                    &mut losses[..], &mut hits[..]);
                assert_eq!((losses[3], hits), (0.0, expected_hits(&z, &targets)));
                let narrow = band(&narrow, vocab, stride);
                for row in 0..3 {
                    let logits = wide(&z[row * vocab..][..vocab]);
                    let (loss, d) =
                        reference(&logits, targets[row] as usize, f64::from(scale), cap);
                    assert_close(&[f64::from(losses[row])], &[loss], 2e-6, 2e-6);
                    let expected = if gradient == 1 { &d } else { &logits };
                    assert_close(&narrow[row * vocab..][..vocab], expected, 1e-7, BF16_ROUNDING);
                }
                if gradient == 1 {
                    assert!(narrow[3 * vocab..].iter().all(|&d| d == 0.0));
                }
            }
        }
    });
}
