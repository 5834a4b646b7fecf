//! Products against f64 arithmetic, over odd sizes, strides, transposes and stored forms.

use half::bf16;
use nibble_quant::product::{
    LowRank, Matrix, MatrixMut, Precision, WeightRef, gemm, gemm_serial, product_forward,
    product_input_gradient, product_row,
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

    /// What a product in `precision` makes of it.
    fn seen(&self, precision: Precision) -> Self {
        Sample { data: seen(self.data.clone(), precision), ..*self }
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
                for precision in [Precision::F32, Precision::Bf16] {
                    let seen = |sample: &Sample| sample.seen(precision);
                    let expected = expected(&seen(&a), &seen(&b), alpha, beta, &before, stride);
                    let (mut serial, mut parallel) = (before.clone(), before.clone());
                    let (a, b) = (a.view(), b.view());
                    let into = MatrixMut::new(&mut serial, (m, n, stride));
                    gemm_serial(alpha, a, b, beta, into, precision);
                    let into = MatrixMut::new(&mut parallel, (m, n, stride));
                    gemm(alpha, a, b, beta, into, precision);
                    let what = format!(
                        "{m}x{n}x{k} layout {layout} alpha {alpha} beta {beta} {precision:?}"
                    );
                    check(&serial, stride, n, &expected, k, &what);
                    assert_eq!(serial, parallel, "{what}: threads do not change the result");
                    for (after, before) in serial.chunks(stride).zip(before.chunks(stride)) {
                        let beside = after[n..] == before[n..];
                        assert!(beside, "{what}: columns beside C are untouched");
                    }
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
    for precision in [Precision::F32, Precision::Bf16] {
        c.fill(f32::NAN);
        gemm(1.0, a, b, 0.0, MatrixMut::new(&mut c, (2, 2, 2)), precision);
        assert!(c.iter().all(|value| value.is_finite()));
    }
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
            frozen(tokens, weight, dense, Precision::F32);
            frozen(tokens, weight, dense, Precision::Bf16);
        }
    }
}

/// What a product in `precision` sees of its operand.
fn seen(mut values: Vec<f32>, precision: Precision) -> Vec<f32> {
    if precision == Precision::Bf16 {
        values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
    }
    values
}

fn frozen(tokens: usize, weight: WeightRef, dense: &[f32], precision: Precision) {
    let [output, input] = weight.shape();
    let rank = 5;
    let scale = 0.75;
    let given = |count, seed| values(count, seed);
    let (x, dy) = (given(tokens * input, 21), given(tokens * output, 22));
    let (ax, b) = (given(tokens * rank, 23), given(output * rank, 24));
    let (t, a) = (given(tokens * rank, 25), given(rank * input, 26));
    let old = given(tokens * output, 27);
    let scaled = |values: &[f32]| seen(values.iter().map(|v| scale * v).collect(), precision);
    let at = |values: &[f32], index: usize| f64::from(values[index]);

    let mut y = old.clone();
    let rows = |values, width| Matrix::new(values, (tokens, width, width));
    let low = |a, b| Some(LowRank { scale, a, b });
    let b_turned = Matrix::new(&b, (output, rank, rank)).transposed();
    let into = MatrixMut::new(&mut y, (tokens, output, output));
    product_forward(rows(&x, input), weight, low(rows(&ax, rank), b_turned), 1.0, into, precision);
    let mut dx = vec![f32::NAN; tokens * input];
    let into = MatrixMut::new(&mut dx, (tokens, input, input));
    let a_rows = Matrix::new(&a, (rank, input, input));
    let addition = low(rows(&t, rank), a_rows);
    product_input_gradient(rows(&dy, output), weight, addition, 0.0, into, precision);

    let [x, dy, ax, t, w] = [x, dy, ax, t, dense.to_vec()].map(|values| seen(values, precision));
    let (b, a) = (scaled(&b), scaled(&a));
    let (mut expected_y, mut expected_dx) = (Vec::new(), Vec::new());
    for token in 0..tokens {
        for o in 0..output {
            let base = (0..input).map(|i| at(&x, token * input + i) * at(&w, o * input + i));
            let added = (0..rank).map(|r| at(&ax, token * rank + r) * at(&b, o * rank + r));
            expected_y.push(base.chain(added).sum::<f64>() + at(&old, token * output + o));
        }
        for i in 0..input {
            let base = (0..output).map(|o| at(&dy, token * output + o) * at(&w, o * input + i));
            let added = (0..rank).map(|r| at(&t, token * rank + r) * at(&a, r * input + i));
            expected_dx.push(base.chain(added).sum::<f64>());
        }
    }
    let what = |product| format!("{product}, {precision:?}");
    check(&y, output, output, &expected_y, input, &what("y = x·Wᵀ + s·ax·b + y"));
    check(&dx, input, input, &expected_dx, output, &what("dx = dy·W + s·t·a"));
}

#[test]
fn a_row_by_itself_is_the_same_product() {
    for (input, output) in [(1, 1), (70, 33), (64, 130), (2048, 5), (2500, 257), (6144, 19)] {
        let dense = values(input * output, 31);
        let half: Vec<bf16> = dense.iter().map(|&v| bf16::from_f32(v)).collect();
        let shape = [output, input];
        let packed = [(64, true), (64, false), (32, true), (128, false), (2048, true)].map(
            |(block_size, double_quant)| {
                let format = BlockFormat { block_size, double_quant, ..BlockFormat::default() };
                PackedWeight::quantize(Floats::F32(&dense), shape, &format).unwrap()
            },
        );
        let (x, ax, b) = (values(input, 32), values(3, 33), values(3 * output, 34));
        let a = Matrix::new(&ax, (1, 3, 3));
        let b = Matrix::new(&b, (output, 3, 3)).transposed();
        let addition = Some(LowRank { scale: 0.5, a, b });
        let weights = [WeightRef::F32(&dense, shape), WeightRef::Bf16(&half, shape)];
        for weight in weights.into_iter().chain(packed.iter().map(WeightRef::Packed)) {
            for (beta, low_rank) in [(0.0, None), (0.0, addition), (1.0, addition)] {
                let before = if beta == 0.0 { vec![f32::NAN; output] } else { values(output, 35) };
                let (mut got, mut expected) = (before.clone(), before);
                product_row(&x, weight, low_rank, beta, &mut got);
                let into = MatrixMut::new(&mut expected, (1, output, output));
                let x = Matrix::new(&x, (1, input, input));
                product_forward(x, weight, low_rank, beta, into, Precision::F32);
                let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
                let what = format!("{input} to {output}, beta {beta}");
                check(&got, output, output, &expected, input, &what);
            }
        }
    }
}

/// Products read weights and rows without looking again how many there are.
#[test]
fn what_is_shorter_than_its_shape_is_refused() {
    let refused = |work: &dyn Fn()| {
        let silent = std::panic::AssertUnwindSafe(work);
        std::panic::catch_unwind(silent).is_err()
    };
    let (x, weights) = (values(600, 1), values(16, 2));
    let halves: Vec<bf16> = weights.iter().map(|&value| bf16::from_f32(value)).collect();
    for weight in [WeightRef::F32(&weights, [600, 16]), WeightRef::Bf16(&halves, [600, 16])] {
        assert!(refused(&|| {
            let mut y = vec![0.0; 16];
            let into = MatrixMut::new(&mut y, (1, 16, 16));
            let rows = Matrix::new(&x, (1, 600, 600));
            product_input_gradient(rows, weight, None, 0.0, into, Precision::F32);
        }));
        assert!(refused(&|| product_row(&x[..16], weight, None, 0.0, &mut vec![0.0; 600])));
    }
    // (rows − 1) · stride is 2⁶⁴: nothing, if it wraps.
    let (rows, stride) = ((1 << 32) + 1, 1 << 32);
    assert!(refused(&|| {
        let _ = Matrix::new(&x, (rows, 1, stride));
    }));
    assert!(refused(&|| {
        let _ = MatrixMut::new(&mut values(600, 1), (rows, 1, stride));
    }));
}
