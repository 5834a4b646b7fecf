//! Rows, rotary embedding, dropout and activations.

use half::bf16;
use nibble::random::Stream;

use crate::emulator::{NULL, launch};
use crate::support::*;

#[test]
fn rows_are_gathered_scattered_and_scaled() {
    in_every_order(|device| {
        for (width, stride) in [(24, 32), (13, 13)] {
            let table = normal_bf16(9 * width, "table");
            let rows = [7u32, 0, 4];
            let grid = [3, 1, 1];
            let mut gathered = vec![POISON; 3 * stride];
            launch!(device, "gather_rows", grid, 32; &table[..], width as i32, &rows[..],
                &mut gathered[..], stride as i32, width as i32);
            let expected: Vec<f64> =
                rows.iter().flat_map(|&r| wide(&table[r as usize * width..][..width])).collect();
            assert_eq!(band(&gathered, width, stride), expected);
            let mut scattered = vec![POISON; 9 * width];
            launch!(device, "scatter_rows", grid, 32; &gathered[..], stride as i32, &rows[..],
                &mut scattered[..], width as i32, width as i32);
            for row in 0..9u32 {
                let got = &scattered[row as usize * width..][..width];
                match rows.contains(&row) {
                    true => assert_eq!(got, &table[row as usize * width..][..width]),
                    false => assert!(got.iter().all(|x| x.is_nan())),
                }
            }
            launch!(device, "embed_bf16", grid, 32; &rows[..], &table[..], width as i32,
                &mut gathered[..], stride as i32, width as i32, 3.0f32, 1);
            let fourfold: Vec<f64> = expected.iter().map(|x| 4.0 * x).collect();
            assert_eq!(band(&gathered, width, stride), fourfold);
            launch!(device, "embed_bf16", grid, 32; &rows[..], &table[..], width as i32,
                &mut gathered[..], stride as i32, width as i32, 1.0f32, 0);
            assert_eq!(band(&gathered, width, stride), expected);
            launch!(device, "scale_rows_bf16", grid, 32; &gathered[..], stride as i32,
                &mut gathered[..], stride as i32, width as i32, 2.0f32, 1);
            let thrice: Vec<f64> =
                expected.iter().map(|x| bf16::from_f64(3.0 * x).to_f64()).collect();
            assert_eq!(band(&gathered, width, stride), thrice);
            let mut sums = normal(3 * width, "sums");
            let before = sums.clone();
            launch!(device, "scale_rows_bf16_f32", grid, 32; &gathered[..], stride as i32,
                &mut sums[..], width as i32, width as i32, 0.5f32, 1);
            launch!(device, "scale_rows_f32", grid, 32; &before[..], width as i32,
                &mut sums[..], width as i32, width as i32, -1.0f32, 1);
            let halves: Vec<f64> = thrice.iter().map(|x| 0.5 * x).collect();
            assert_close(
                &sums.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(),
                &halves,
                1e-6,
                0.0,
            );
        }
    });
}

#[test]
fn bias_is_added_to_a_band() {
    in_every_order(|device| {
        for (width, stride) in [(24, 32), (13, 17)] {
            let (y, bias) = (normal_bf16(4 * width, "y"), normal(width, "bias"));
            let mut out = with_stride(&y, width, stride);
            launch!(device, "add_bias", [4, 1, 1], 32; &mut out[..], stride as i32, &bias[..],
                width as i32);
            let sum =
                |(i, y): (usize, &bf16)| bf16::from_f32(y.to_f32() + bias[i % width]).to_f64();
            let expected: Vec<f64> = y.iter().enumerate().map(sum).collect();
            assert_eq!(band(&out, width, stride), expected);
        }
    });
}

#[test]
fn rotary_turns_and_turns_back() {
    in_every_order(|device| {
        let whole = [(3, 5, [32, 32], 192), (2, 3, [14, 14], 60), (2, 2, [128, 128], 400)];
        let parts = [(3, 3, [32, 16], 96), (2, 5, [128, 96], 648), (2, 3, [20, 16], 64)];
        let shapes = whole.into_iter().chain(parts).flat_map(|shape| [(shape, 0), (shape, 1)]);
        for ((rows, heads, [head_dim, turned], stride), neighbours) in shapes {
            let (half, width) = (turned / 2, heads * head_dim);
            let x = normal_bf16(rows * width, "x");
            let angles = normal(rows * half, "angles");
            let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
            let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
            let mut qkv = with_stride(&x, width, stride);
            for backward in [0, 1] {
                launch!(device, "rotary", [rows as u32, 1, 1], 64; &mut qkv[..], stride as i32,
                    &cos[..], &sin[..], NULL, 0, heads as i32, head_dim as i32, turned as i32,
                    neighbours, backward);
                if backward == 0 {
                    let mut expected = wide(&x);
                    for (i, head) in expected.chunks_exact_mut(head_dim).enumerate() {
                        for j in 0..half {
                            let at = i / heads * half + j;
                            let (c, s) = (f64::from(cos[at]), f64::from(sin[at]));
                            let [first, second] =
                                if neighbours == 1 { [2 * j, 2 * j + 1] } else { [j, j + half] };
                            let (a, b) = (head[first], head[second]);
                            (head[first], head[second]) = (a * c - b * s, b * c + a * s);
                        }
                    }
                    assert_close(&band(&qkv, width, stride), &expected, 1e-5, BF16_ROUNDING);
                }
            }
            assert_close(&band(&qkv, width, stride), &wide(&x), 0.03, BF16_ROUNDING);
        }
    });
}

/// Two heads of q and one of k: q has the factor of its row, in both directions.
#[test]
fn rotary_scales_queries_by_row() {
    in_every_order(|device| {
        for (rows, head_dim, stride) in [(3, 32, 104), (2, 14, 43)] {
            let (heads, half) = (3, head_dim / 2);
            let x = normal_bf16(rows * heads * head_dim, "x");
            let angles = normal(rows * half, "angles");
            let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
            let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
            let scale = &[1.25f32, 0.5, 3.0][..rows];
            let turned = |scale: Option<&[f32]>, backward: i32| {
                let mut qkv = with_stride(&x, heads * head_dim, stride);
                let grid = [rows as u32, 1, 1];
                match scale {
                    Some(scale) => launch!(device, "rotary", grid, 64; &mut qkv[..], stride as i32,
                        &cos[..], &sin[..], scale, 2, heads as i32, head_dim as i32,
                        head_dim as i32, 0, backward),
                    None => launch!(device, "rotary", grid, 64; &mut qkv[..], stride as i32,
                        &cos[..], &sin[..], NULL, 2, heads as i32, head_dim as i32,
                        head_dim as i32, 0, backward),
                }
                band(&qkv, heads * head_dim, stride)
            };
            for backward in [0, 1] {
                let plain = turned(None, backward);
                let expected = plain.chunks_exact(head_dim).enumerate().flat_map(|(i, head)| {
                    let scale = if i % heads < 2 { scale[i / heads] } else { 1.0 };
                    head.iter().map(move |x| x * f64::from(scale))
                });
                let expected: Vec<f64> = expected.collect();
                assert_close(&turned(Some(scale), backward), &expected, 1e-5, 2.0 * BF16_ROUNDING);
            }
        }
    });
}

#[test]
fn dropout_has_the_mask_of_the_cpu() {
    in_every_order(|device| {
        for (rows, width, stride) in shapes() {
            let (seed, step, p) = (9, 5u64 << 32 | 7, 0.3f32);
            // Rows in the middle of a matrix; odd ones begin inside a block of words.
            let first = (rows * width) as u64 * 7 + 3 * (rows as u64 % 2);
            let stream = Stream::new(seed, "layers.0.q_proj").at(step);
            let mut factors = vec![0.0; rows * width];
            stream.fill_dropout(first, p, &mut factors);
            let ([key0, key1], step) = stream.parts();
            let threshold = (f64::from(p) * 4_294_967_296.0).round() as u64;
            let (x, before) = (normal_bf16(rows * width, "x"), normal_bf16(rows * width, "y"));
            for accumulate in [false, true] {
                let mut y = with_stride(&before, width, stride);
                launch!(device, "dropout", [rows as u32, 1, 1], 64; &x[..], width as i32,
                    &mut y[..], stride as i32, width as i32, first, key0, key1, step, threshold,
                    1.0f32 / (1.0 - p), i32::from(accumulate));
                let element = |i: usize| {
                    let dropped = x[i].to_f32() * factors[i];
                    let sum = if accumulate { before[i].to_f32() + dropped } else { dropped };
                    bf16::from_f32(sum).to_f64()
                };
                let expected: Vec<f64> = (0..rows * width).map(element).collect();
                assert_eq!(band(&y, width, stride), expected);
            }
        }
    });
}

/// The error function by its series: exact enough in f64 for |x| < 6.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

fn activation(kind: i32, x: f64) -> f64 {
    match kind {
        0 => x / (1.0 + (-x).exp()),
        1 => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
        _ => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
    }
}

#[test]
fn noise_is_that_of_the_cpu() {
    in_every_order(|device| {
        for (rows, width, stride) in shapes() {
            let (first, amplitude) = ((rows * width) as u64 * 5 + 3 * (rows as u64 % 2), 0.37f32);
            let stream = Stream::new(9, "neftune").at(6u64 << 32 | 1);
            let mut noise = vec![0.0; rows * width];
            stream.fill_uniform(first, -amplitude, amplitude, &mut noise);
            let ([key0, key1], step) = stream.parts();
            let before = normal_bf16(rows * width, "x");
            let mut x = with_stride(&before, width, stride);
            launch!(device, "add_noise", [rows as u32, 1, 1], 64; &mut x[..], stride as i32,
                width as i32, first, key0, key1, step, amplitude);
            let sum = |(x, noise): (&bf16, &f32)| bf16::from_f32(x.to_f32() + noise).to_f64();
            let expected: Vec<f64> = before.iter().zip(&noise).map(sum).collect();
            assert_eq!(band(&x, width, stride), expected);
        }
    });
}

/// gate and up side by side become their gradients: the same as apart.
#[test]
fn activations_of_halves_of_a_row() {
    in_every_order(|device| {
        for (rows, width, stride) in [(3, 24, 56), (2, 13, 26), (1, 520, 1048)] {
            let n = rows * width;
            let [gate, up, d_out] = ["gate", "up", "d_out"].map(|name| normal_bf16(n, name));
            let grid = [rows as u32, 1, 1];
            let (width_argument, stride_argument) = (width as i32, stride as i32);
            for kind in 0..3 {
                let [mut out, mut d_gate, mut d_up] = [0; 3].map(|_| vec![POISON; n]);
                launch!(device, "mlp_forward", grid, 32; kind, &gate[..], width_argument, &up[..],
                    width_argument, &mut out[..], width_argument, width_argument);
                launch!(device, "mlp_backward", grid, 32; kind, &gate[..], width_argument, &up[..],
                    width_argument, &d_out[..], width_argument, &mut d_gate[..], width_argument,
                    &mut d_up[..], width_argument, width_argument);
                let mut both = vec![POISON; rows * stride];
                for (row, both) in both.chunks_mut(stride).enumerate() {
                    both[..width].copy_from_slice(&gate[row * width..][..width]);
                    both[width..2 * width].copy_from_slice(&up[row * width..][..width]);
                }
                let mut together = vec![POISON; n];
                let (first, second) = both.split_at_mut(width);
                let [first, second] = [first, second].map(crate::emulator::Argument::from);
                launch!(device, "mlp_forward", grid, 32; kind, first, stride_argument, second,
                    stride_argument, &mut together[..], width_argument, width_argument);
                assert_eq!(wide(&together), wide(&out));
                launch!(device, "mlp_backward", grid, 32; kind, first, stride_argument, second,
                    stride_argument, &d_out[..], width_argument, first, stride_argument, second,
                    stride_argument, width_argument);
                for (row, both) in both.chunks(stride).enumerate() {
                    let of = |all: &[bf16]| wide(&all[row * width..][..width]);
                    assert_eq!(wide(&both[..width]), of(&d_gate));
                    assert_eq!(wide(&both[width..2 * width]), of(&d_up));
                    assert!(both[2 * width..].iter().all(|x| x.to_bits() == POISON.to_bits()));
                }
            }
        }
    });
}

/// z of x, and its slope.
type Inner<'a> = &'a dyn Fn(f64) -> (f64, f64);

/// Where e^-z is 0, infinite, or too large for its reciprocal; z is x, of GELU's approximation by tanh a
/// cubic of it.
#[test]
fn activations_of_large_inputs() {
    in_every_order(|device| {
        let s = |x: f64| 1.0 / (1.0 + (-x).exp());
        let silu = |x: f64| (x, 1.0);
        let gelu = |x: f64| {
            let (scale, cubic) = (2.0 * (2.0 / std::f64::consts::PI).sqrt(), 0.044715);
            (scale * (x + cubic * x * x * x), scale * (1.0 + 3.0 * cubic * x * x))
        };
        let inner: [(i32, f32, Inner); 2] = [(0, 3e38, &silu), (2, 1e18, &gelu)];
        for (kind, largest, z) in inner {
            let x: Vec<bf16> =
                [0.0, 3.0, 6.0, 20.0, 80.0, 87.0, 87.5, 88.0, 89.0, 100.0, 1e4, largest]
                    .iter()
                    .flat_map(|x| [bf16::from_f32(*x), bf16::from_f32(-x)])
                    .collect();
            let (n, d_out) = (x.len() as i32, vec![bf16::ONE; x.len()]);
            let (mut out, mut d) = (vec![POISON; x.len()], vec![POISON; x.len()]);
            launch!(device, "mlp_forward", [1, 1, 1], 32; kind, NULL, 0, &x[..], n, &mut out[..], n,
                n);
            launch!(device, "mlp_backward", [1, 1, 1], 32; kind, NULL, 0, &x[..], n, &d_out[..], n,
                NULL, 0, &mut d[..], n, n);
            let values: Vec<f64> = wide(&x).iter().map(|&x| x * s(z(x).0)).collect();
            let slope = |&x: &f64| {
                let (z, dz) = z(x);
                s(z) + x * s(z) * s(-z) * dz
            };
            let slopes: Vec<f64> = wide(&x).iter().map(slope).collect();
            assert_close(&wide(&out), &values, 1e-35, BF16_ROUNDING);
            assert_close(&wide(&d), &slopes, 1e-35, BF16_ROUNDING);
        }
    });
}

#[test]
fn activations_and_their_slopes() {
    in_every_order(|device| {
        for (rows, width, stride) in shapes() {
            let n = rows * width;
            let (gate, up, d) =
                (normal_bf16(n, "gate"), normal_bf16(n, "up"), normal_bf16(n, "d_out"));
            for kind in 0..3 {
                for gated in [true, false] {
                    let grid = [rows as u32, 1, 1];
                    let strided = [&gate, &up, &d].map(|x| with_stride(x, width, stride));
                    let [gate_rows, up_rows, mut d_rows] = strided;
                    let gate_argument = if gated { gate_rows[..].into() } else { NULL };
                    let mut out = vec![POISON; n];
                    launch!(device, "mlp_forward", grid, 32; kind, gate_argument, stride as i32,
                        &up_rows[..], stride as i32, &mut out[..], width as i32, width as i32);
                    let mut d_up = vec![POISON; n];
                    if gated {
                        // In place: d_gate is d_out.
                        let d_out = crate::emulator::Argument::from(&mut d_rows[..]);
                        launch!(device, "mlp_backward", grid, 32; kind, gate_argument,
                            stride as i32, &up_rows[..], stride as i32, d_out, stride as i32,
                            d_out, stride as i32, &mut d_up[..], width as i32, width as i32);
                    } else {
                        launch!(device, "mlp_backward", grid, 32; kind, NULL, 0, &up_rows[..],
                            stride as i32, &d_rows[..], stride as i32, NULL, 0, &mut d_up[..],
                            width as i32, width as i32);
                    }
                    let (g, u, d) = (wide(&gate), wide(&up), wide(&d));
                    let input = |i: usize| if gated { g[i] } else { u[i] };
                    let slope = |i: usize| {
                        let h = 1e-6;
                        (activation(kind, input(i) + h) - activation(kind, input(i) - h))
                            / (2.0 * h)
                    };
                    let all = |f: &dyn Fn(usize) -> f64| (0..n).map(f).collect::<Vec<f64>>();
                    let factor = |i: usize| if gated { u[i] } else { 1.0 };
                    let value = |i: usize| activation(kind, input(i));
                    assert_close(&wide(&out), &all(&|i| value(i) * factor(i)), 1e-6, BF16_ROUNDING);
                    if gated {
                        assert_close(&wide(&d_up), &all(&|i| d[i] * value(i)), 1e-6, BF16_ROUNDING);
                        let d_gate = band(&d_rows, width, stride);
                        assert_close(
                            &d_gate,
                            &all(&|i| d[i] * u[i] * slope(i)),
                            1e-6,
                            BF16_ROUNDING,
                        );
                    } else {
                        assert_close(&wide(&d_up), &all(&|i| d[i] * slope(i)), 1e-6, BF16_ROUNDING);
                    }
                }
            }
        }
    });
}
