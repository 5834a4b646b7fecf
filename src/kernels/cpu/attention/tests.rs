//! Against sums in f64, with documents longer and shorter than tiles and blocks.

use super::*;
use crate::plan::layout::attention_elements;

const LENGTHS: [usize; 4] = [1, 37, 300, 530];

fn shape(window: Option<usize>) -> AttentionShape {
    AttentionShape { window, ..AttentionShape::new(4, 2, 24) }
}

/// Values in ±2.
fn values(count: usize, seed: u64) -> Vec<f32> {
    let stream = crate::random::Stream::new(seed, "attention");
    let mut values = vec![0.0; count];
    stream.fill_uniform(0, -2.0, 2.0, &mut values);
    values
}

/// Errors of o, lse and dqkv in products of bf16, whose operands are off by up to 2⁻⁹.
const BF16_ERRORS: [f64; 3] = [4e-2, 6e-2, 1e-1];

fn layout() -> TokenLayout {
    let mut boundaries = vec![0u32];
    boundaries.extend(LENGTHS.iter().scan(0, |sum, length| {
        *sum += *length as u32;
        Some(*sum)
    }));
    TokenLayout::new(&boundaries)
}

fn workspace(shape: &AttentionShape, longest: usize, training: bool) -> Vec<f32> {
    let heads = shape.num_heads / shape.num_kv_heads;
    let share = attention_elements((heads, shape.head_dim), longest, training);
    vec![f32::NAN; share * rayon::current_num_threads()]
}

/// o, lse and dqkv for one query after the other.
struct Reference {
    o: Vec<f64>,
    lse: Vec<f64>,
    dqkv: Vec<f64>,
}

fn reference(shape: &AttentionShape, layout: &TokenLayout, qkv: &[f32], d_o: &[f32]) -> Reference {
    let (d, tokens) = (shape.head_dim, layout.tokens());
    let (q_width, width) = (shape.q_width(), shape.qkv_width());
    let mut o = vec![0.0; tokens * q_width];
    let mut lse = vec![0.0; tokens * shape.num_heads];
    let mut dqkv = vec![0.0; tokens * width];
    let (scale, cap) = (f64::from(shape.scale), shape.soft_cap.map(f64::from));
    let dot = |x: &[f32], y: &[f32]| -> f64 {
        x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
    };
    for document in layout.boundaries.windows(2) {
        for (i, head) in
            (document[0]..document[1]).flat_map(|i| (0..shape.num_heads).map(move |head| (i, head)))
        {
            let first = shape.window.map_or(0, |w| (i + 1).saturating_sub(w)).max(document[0]);
            let kv_head = head * shape.num_kv_heads / shape.num_heads;
            let (q_at, k_at) = (i * width + head * d, q_width + kv_head * d);
            let v_at = k_at + shape.kv_width();
            let row = |j: usize, at: usize| &qkv[j * width + at..][..d];
            let q = &qkv[q_at..q_at + d];
            let score = |j| scale * dot(q, row(j, k_at));
            let capped = |s: f64| cap.map_or(s, |cap| cap * (s / cap).tanh());
            let scores: Vec<f64> = (first..=i).map(|j| capped(score(j))).collect();
            let total = scores.iter().map(|s| s.exp()).sum::<f64>().ln();
            lse[i * shape.num_heads + head] = total;
            let o = &mut o[i * q_width + head * d..][..d];
            for (j, score) in (first..=i).zip(&scores) {
                let p = (score - total).exp();
                o.iter_mut().zip(row(j, v_at)).for_each(|(o, &v)| *o += p * f64::from(v));
            }
            let d_o = &d_o[i * q_width + head * d..][..d];
            let delta: f64 = d_o.iter().zip(&*o).map(|(&x, y)| f64::from(x) * y).sum();
            for (j, score) in (first..=i).zip(&scores) {
                let p = (score - total).exp();
                let slope = cap.map_or(1.0, |cap| 1.0 - (score / cap).powi(2));
                let ds = p * (dot(d_o, row(j, v_at)) - delta) * slope * scale;
                for c in 0..d {
                    dqkv[j * width + v_at + c] += p * f64::from(d_o[c]);
                    dqkv[j * width + k_at + c] += ds * f64::from(q[c]);
                    dqkv[q_at + c] += ds * f64::from(row(j, k_at)[c]);
                }
            }
        }
    }
    Reference { o, lse, dqkv }
}

fn assert_near(what: &str, got: &[f32], expected: &[f64], tolerance: f64) {
    for (index, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(got) - expected).abs();
        assert!(error < tolerance, "{what}[{index}]: {got} instead of {expected}");
    }
}

#[test]
fn both_passes_are_the_sums_over_all_keys_that_a_query_sees() {
    let layout = layout();
    let tokens = layout.tokens();
    let plain = [None, Some(1), Some(100), Some(290)].map(shape);
    // Scores reach ten times the cap.
    let capped = [None, Some(100)].map(|window| AttentionShape {
        scale: 0.7,
        soft_cap: Some(3.0),
        ..shape(window)
    });
    for shape in plain.into_iter().chain(capped) {
        let qkv = values(tokens * shape.qkv_width(), 1);
        let d_o = values(tokens * shape.q_width(), 2);
        let expected = reference(&shape, &layout, &qkv, &d_o);
        let longest = layout.longest();
        for (precision, [of_o, of_lse, of_dqkv]) in
            [(Precision::F32, [1e-5, 1e-5, 1e-4]), (Precision::Bf16, BF16_ERRORS)]
        {
            let mut o = vec![f32::NAN; d_o.len()];
            let mut lse = vec![f32::NAN; tokens * shape.num_heads];
            let mut dqkv = vec![f32::NAN; qkv.len()];
            let work = &mut workspace(&shape, longest, false);
            forward((&shape, precision), &layout, &qkv, &mut o, &mut lse, work);
            let work = &mut workspace(&shape, longest, true);
            let inputs =
                Inputs { shape: &shape, precision, qkv: &qkv, o: &o, lse: &lse, d_o: &d_o };
            backward(inputs, &layout, &mut dqkv, work);
            assert_near("o", &o, &expected.o, of_o);
            assert_near("lse", &lse, &expected.lse, of_lse);
            assert_near("dqkv", &dqkv, &expected.dqkv, of_dqkv);
            let rounded = dqkv.iter().zip(&expected.dqkv).any(|(a, b)| (f64::from(*a) - b) > 1e-3);
            assert_eq!(rounded, precision == Precision::Bf16, "{precision:?}");
        }
    }
}

/// Blocks of keys of one document and one key head are added up in one order, by however many threads.
#[test]
fn the_gradient_is_the_same_on_any_number_of_threads() {
    for window in [None, Some(100), Some(700)] {
        let shape = AttentionShape { window, ..AttentionShape::new(2, 1, 16) };
        let layout = TokenLayout::new(&[0, 2000, 2003]);
        let tokens = layout.tokens();
        let (qkv, d_o) =
            (values(tokens * shape.qkv_width(), 1), values(tokens * shape.q_width(), 2));
        let gradient = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut o = vec![f32::NAN; d_o.len()];
                let mut lse = vec![f32::NAN; tokens * shape.num_heads];
                let mut dqkv = vec![f32::NAN; qkv.len()];
                let (shape, precision) = (&shape, Precision::F32);
                let work = &mut workspace(shape, 2000, true);
                forward((shape, precision), &layout, &qkv, &mut o, &mut lse, work);
                let inputs = Inputs { shape, precision, qkv: &qkv, o: &o, lse: &lse, d_o: &d_o };
                backward(inputs, &layout, &mut dqkv, work);
                dqkv
            })
        };
        let alone = gradient(1);
        assert!(alone.iter().all(|x| x.is_finite()));
        for threads in [2, 3, 8] {
            for _ in 0..3 {
                assert!(gradient(threads) == alone, "{threads} threads, window {window:?}");
            }
        }
    }
}

#[test]
fn queries_that_follow_a_cache_see_it() {
    for window in [None, Some(270)] {
        let shape = shape(window);
        let tokens = 600;
        let layout = TokenLayout::new(&[0, tokens as u32]);
        let qkv = values(tokens * shape.qkv_width(), 3);
        let mut o = vec![f32::NAN; tokens * shape.q_width()];
        let mut lse = vec![f32::NAN; tokens * shape.num_heads];
        let work = &mut workspace(&shape, tokens, false);
        forward((&shape, Precision::F32), &layout, &qkv, &mut o, &mut lse, work);
        for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Bf16, BF16_ERRORS[0])] {
            let mut cache = vec![f32::NAN; tokens * 2 * shape.kv_width()];
            let work = &mut workspace(&shape, tokens, false);
            for (past, end) in [(0, 299), (299, 300), (300, 301), (301, 600)] {
                let new = &qkv[past * shape.qkv_width()..end * shape.qkv_width()];
                let mut got = vec![f32::NAN; (end - past) * shape.q_width()];
                cached((&shape, precision), new, (&mut cache, past), &mut got, work);
                let expected = &o[past * shape.q_width()..end * shape.q_width()];
                let expected: Vec<f64> = expected.iter().map(|&o| f64::from(o)).collect();
                assert_near("o", &got, &expected, tolerance);
            }
        }
    }
}
