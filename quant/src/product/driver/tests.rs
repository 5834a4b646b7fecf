//! Products of every shape that blocking tells apart, against sums in f64.

use super::left::ALIASING_STRIDE;
use super::*;

const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// Values in ±1.
fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// `a·b` with a low-rank addition, on one instruction set.
fn product(isa: Isa, [m, n, k]: [usize; 3], turned: bool) -> Vec<f32> {
    let (a, b) = (values(m * k, 1), values(k * n, 2));
    let (low_a, low_b) = (values(m * 5, 3), values(5 * n, 4));
    let a =
        if turned { Matrix::new(&a, (k, m, m)).transposed() } else { Matrix::new(&a, (m, k, k)) };
    let low_a = Matrix::new(&low_a, (m, 5, 5));
    let extra = LowRank { scale: 0.5, a: low_a, b: Matrix::new(&low_b, (5, n, n)) };
    let b = Operand::Dense(Matrix::new(&b, (k, n, n)));
    let mut c = vec![f32::NAN; m * n];
    let product = Product { alpha: 1.0, a, b, extra: Some(extra), beta: 0.0 };
    product.run(isa, MatrixMut::new(&mut c, (m, n, n)), true);
    c
}

#[test]
fn every_instruction_set_gives_the_same_product() {
    for (sizes, turned) in [([1, 1, 1], false), ([13, 77, 701], true), ([60, 130, 1301], false)] {
        for precision in PRECISIONS {
            let portable = product(Isa::portable(precision), sizes, turned);
            let others = Isa::not_portable(precision).map(|isa| product(isa, sizes, turned));
            let vector: Vec<_> = others.collect();
            if precision == Precision::F32 {
                let same = vector.windows(2).all(|products| products[0] == products[1]);
                assert!(same, "{sizes:?}: fused chains have the same bits");
            }
            for (index, (x, y)) in vector.iter().flatten().zip(portable.iter().cycle()).enumerate()
            {
                assert!((x - y).abs() < 2e-4, "{sizes:?} {precision:?} [{index}]: {x} {y}");
            }
        }
    }
}

#[test]
fn copied_rows_and_streamed_results_have_the_same_bits() {
    let (m, n, k) = (260, STREAMED_ELEMENTS / 256, 20);
    let b = values(k * n, 2);
    let run = |row_stride: usize, c_offset: usize| {
        let mut a = vec![f32::NAN; m * row_stride];
        let rows = values(m * k, 1);
        for (to, from) in a.chunks_exact_mut(row_stride).zip(rows.chunks_exact(k)) {
            to[..k].copy_from_slice(from);
        }
        let mut c = vec![f32::NAN; m * n + CACHE_LINE];
        let begin = c.as_ptr().align_offset(CACHE_LINE * size_of::<f32>()) + c_offset;
        let a = Matrix::new(&a, (m, k, row_stride));
        let b = Operand::Dense(Matrix::new(&b, (k, n, n)));
        let product = Product { alpha: 1.0, a, b, extra: None, beta: 0.0 };
        let view = MatrixMut::new(&mut c[begin..begin + m * n], (m, n, n));
        product.run(Isa::detect(Precision::F32), view, true);
        c[begin..begin + m * n].to_vec()
    };
    // Aligned rows are streamed; rows 1024 floats apart are copied.
    let plain = run(k, 1);
    assert!(run(ALIASING_STRIDE, 1) == plain, "copied");
    assert!(run(k, 0) == plain, "streamed");
}

#[test]
fn a_row_does_not_depend_on_the_other_rows() {
    let (n, k) = (200, 1001);
    let (a, b) = (values(100 * k, 1), values(k * n, 2));
    let b = Matrix::new(&b, (k, n, n));
    for precision in PRECISIONS {
        let run = |rows: Range<usize>| {
            let mut c = vec![0.0; rows.len() * n];
            let a = Matrix::new(&a[rows.start * k..rows.end * k], (rows.len(), k, k));
            let product = Product { alpha: 1.0, a, b: Operand::Dense(b), extra: None, beta: 0.0 };
            let into = MatrixMut::new(&mut c, (rows.len(), n, n));
            product.run(Isa::detect(precision), into, true);
            c
        };
        let whole = run(0..100);
        for rows in [0..1, 7..8, 3..30, 50..100] {
            let same = run(rows.clone()) == whole[rows.start * n..rows.end * n];
            assert!(same, "{precision:?}: rows {rows:?}");
        }
    }
}

#[test]
fn a_packed_operand_gives_the_products_of_its_first_rows_and_columns() {
    let (rows, columns) = (151, 200);
    let values = values(300 * 300, 7);
    for (turned, precision) in
        [false, true].into_iter().flat_map(|turned| PRECISIONS.map(|precision| (turned, precision)))
    {
        let b = if turned {
            Matrix::new(&values, (columns, rows, 299)).transposed()
        } else {
            Matrix::new(&values, (rows, columns, 299))
        };
        let mut room = vec![f32::NAN; PackedOperand::elements(rows, columns)];
        let packed = PackedOperand::pack(b, &mut room, precision);
        for (m, k, n) in [(97, 151, 200), (13, 64, 130), (1, 1, 1), (30, 149, 199), (5, 0, 7)] {
            let a = Matrix::new(&values[11..], (m, k, 288));
            let (mut got, mut expected) = (vec![3.0; m * 257], vec![3.0; m * 257]);
            packed.gemm(0.5, a, 2.0, MatrixMut::new(&mut got, (m, n, 257)));
            let b = Matrix { rows: k, ..b.columns(0..n) };
            let product = Product { alpha: 0.5, a, b: Operand::Dense(b), extra: None, beta: 2.0 };
            let into = MatrixMut::new(&mut expected, (m, n, 257));
            product.run(Isa::detect(precision), into, false);
            assert!(got == expected, "{precision:?}: {m}×{n}, k {k}, turned {turned}");
        }
    }
}

#[test]
fn a_product_without_terms_leaves_beta_c() {
    for (m, n) in [(4, 128), (200, 100), (4, 100)] {
        for (turned, precision) in
            [false, true].into_iter().flat_map(|turned| PRECISIONS.map(|it| (turned, it)))
        {
            let a = match turned {
                true => Matrix::new(&[], (0, m, m)).transposed(),
                false => Matrix::new(&[], (m, 0, 0)),
            };
            let b = Matrix::new(&[], (0, n, n));
            let mut c = vec![3.0; m * n];
            let product = Product { alpha: 1.0, a, b: Operand::Dense(b), extra: None, beta: 2.0 };
            product.run(Isa::detect(precision), MatrixMut::new(&mut c, (m, n, n)), true);
            assert!(c.iter().all(|&c| c == 6.0), "{precision:?} {m} {n} {turned}");
        }
    }
}
