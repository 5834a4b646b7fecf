//! Products against f64 arithmetic, over odd sizes, strides, transposes and stored forms.

use half::bf16;
use nibble_quant::product::{
    LowRank, Matrix, MatrixMut, WeightRef, gemm, gemm_serial, product_forward,
    product_input_gradient,
};
use nibble_quant::{BlockFormat, Floats, PackedWeight};

/// Values in ±1 that differ between seeds.
fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// A matrix with its own strides, as plain rows in f64.
struct Sample {
    data: Vec<f32>,
    rows: usize,
    columns: usize,
    stride: usize,
    transposed: bool,
}

impl Sample {
    fn new(rows: usize, columns: usize, transposed: bool, padding: usize, seed: u64) -> Self {
        let (lines, length) = if transposed { (columns, rows) } else { (rows, columns) };
        let stride = length + padding;
        Sample { data: values(lines * stride, seed), rows, columns, stride, transposed }
    }

    fn view(&self) -> Matrix<'_> {
        if self.transposed {
            Matrix::new(&self.data, (self.columns, self.rows, self.stride)).transposed()
        } else {
            Matrix::new(&self.data, (self.rows, self.columns, self.stride))
        }
    }

    fn at(&self, row: usize, column: usize) -> f64 {
        let (line, place) = if self.transposed { (column, row) } else { (row, column) };
        f64::from(self.data[line * self.stride + place])
    }
}

fn expected(a: &Sample, b: &Sample, alpha: f32, beta: f32, c: &[f32], stride: usize) -> Vec<f64> {
    let mut out = Vec::new();
    for row in 0..a.rows {
        for column in 0..b.columns {
            let sum: f64 = (0..a.columns).map(|k| a.at(row, k) * b.at(k, column)).sum();
            let old = if beta == 0.0 { 0.0 } else { f64::from(c[row * stride + column]) };
            out.push(f64::from(alpha) * sum + f64::from(beta) * old);
        }
    }
    out
}

fn check(got: &[f32], stride: usize, columns: usize, expected: &[f64], depth: usize, what: &str) {
    // Rounding of a chain grows with its length and with the sums along it.
    let tolerance = |expected: f64| {
        4.0 * f64::from(f32::EPSILON) * (depth as f64).sqrt() * expected.abs().max(4.0)
    };
    for (index, expected) in expected.iter().enumerate() {
        let value = f64::from(got[index / columns * stride + index % columns]);
        assert!(
            (value - expected).abs() <= tolerance(*expected),
            "{what}: [{index}] {value} {expected}"
        );
    }
}

#[test]
fn dense_products_match_f64_in_every_layout() {
    let sizes = [(1, 1, 1), (3, 5, 7), (14, 32, 16), (15, 33, 257), (96, 64, 31), (130, 70, 600)];
    let mut seed = 0;
    for (m, n, k) in sizes {
        for layout in 0..4 {
            seed += 3;
            let a = Sample::new(m, k, layout & 1 != 0, 3, seed);
            let b = Sample::new(k, n, layout & 2 != 0, 2, seed + 1);
            for (alpha, beta) in [(1.0, 0.0), (0.5, 1.0), (-2.0, 0.25)] {
                let stride = n + 5;
                let before = values(m * stride, seed + 2);
                let expected = expected(&a, &b, alpha, beta, &before, stride);
                let (mut serial, mut parallel) = (before.clone(), before.clone());
                let (a, b) = (a.view(), b.view());
                gemm_serial(alpha, a, b, beta, MatrixMut::new(&mut serial, (m, n, stride)));
                gemm(alpha, a, b, beta, MatrixMut::new(&mut parallel, (m, n, stride)));
                let what = format!("{m}x{n}x{k} layout {layout} alpha {alpha} beta {beta}");
                check(&serial, stride, n, &expected, k, &what);
                assert_eq!(serial, parallel, "{what}: threads do not change the result");
                for (after, before) in serial.chunks(stride).zip(before.chunks(stride)) {
                    assert_eq!(after[n..], before[n..], "{what}: columns beside C are untouched");
                }
            }
        }
    }
}

#[test]
fn nan_in_an_overwritten_result_does_not_spread() {
    let (a, b) = (values(6, 1), values(6, 2));
    let mut c = vec![f32::NAN; 4];
    let (a, b) = (Matrix::new(&a, (2, 3, 3)), Matrix::new(&b, (3, 2, 2)));
    gemm(1.0, a, b, 0.0, MatrixMut::new(&mut c, (2, 2, 2)));
    assert!(c.iter().all(|value| value.is_finite()));
}

#[test]
fn frozen_products_match_the_decoded_weight() {
    for (tokens, input, output) in [(5, 64, 48), (70, 96, 33), (129, 320, 130)] {
        let dense = values(input * output, 11);
        let half: Vec<bf16> = dense.iter().map(|&v| bf16::from_f32(v)).collect();
        let widened: Vec<f32> = half.iter().map(|v| v.to_f32()).collect();
        let shape = [output, input];
        let format = BlockFormat::default();
        let packed = PackedWeight::quantize(Floats::F32(&dense), shape, &format).unwrap();
        let decoded = packed.dequantize();
        for (weight, dense) in [
            (WeightRef::F32(&dense, shape), &dense),
            (WeightRef::Bf16(&half, shape), &widened),
            (WeightRef::Packed(&packed), &decoded),
        ] {
            frozen(tokens, weight, dense);
        }
    }
}

fn frozen(tokens: usize, weight: WeightRef, dense: &[f32]) {
    let [output, input] = weight.shape();
    let rank = 4;
    let (x, dy) = (values(tokens * input, 21), values(tokens * output, 22));
    let (ax, b) = (values(tokens * rank, 23), values(output * rank, 24));
    let (t, a) = (values(tokens * rank, 25), values(rank * input, 26));
    let x = Matrix::new(&x, (tokens, input, input));
    let dy = Matrix::new(&dy, (tokens, output, output));
    let w = Matrix::new(dense, (output, input, input));
    let low = |a, b| Some(LowRank { scale: 0.5, a, b });
    let ax = Matrix::new(&ax, (tokens, rank, rank));
    let b = Matrix::new(&b, (output, rank, rank)).transposed();
    let t = Matrix::new(&t, (tokens, rank, rank));
    let a = Matrix::new(&a, (rank, input, input));

    let (mut y, mut expected) = (values(tokens * output, 27), values(tokens * output, 27));
    product_forward(x, weight, low(ax, b), 1.0, MatrixMut::new(&mut y, (tokens, output, output)));
    let shape = (tokens, output, output);
    gemm(1.0, x, w.transposed(), 1.0, MatrixMut::new(&mut expected, shape));
    gemm(0.5, ax, b, 1.0, MatrixMut::new(&mut expected, shape));
    let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
    check(&y, output, output, &expected, input, "y = x·Wᵀ + 0.5·ax·b + y");

    let (mut dx, mut expected) = (vec![0.0; tokens * input], vec![0.0; tokens * input]);
    let shape = (tokens, input, input);
    product_input_gradient(dy, weight, low(t, a), 0.0, MatrixMut::new(&mut dx, shape));
    gemm(1.0, dy, w, 0.0, MatrixMut::new(&mut expected, shape));
    gemm(0.5, t, a, 1.0, MatrixMut::new(&mut expected, shape));
    let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
    check(&dx, input, input, &expected, output, "dx = dy·W + 0.5·t·a");
}
