//! Attention against f64: the exact path's elementwise parts and decoding.

use crate::emulator::launch;
use crate::support::*;

/// s from q·k.
pub fn score(product: f64, scale: f64, cap: f64) -> f64 {
    if cap > 0.0 { cap * (scale * product / cap).tanh() } else { scale * product }
}

/// Probabilities over visible columns (0 elsewhere) and the log-sum-exp.
pub fn softmax(scores: &[f64], visible: &std::ops::Range<usize>) -> (Vec<f64>, f64) {
    let largest = scores[visible.clone()].iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores[visible.clone()].iter().map(|s| (s - largest).exp()).sum();
    let lse = largest + sum.ln();
    let p = |(k, s): (usize, &f64)| if visible.contains(&k) { (s - lse).exp() } else { 0.0 };
    (scores.iter().enumerate().map(p).collect(), lse)
}

struct Block {
    rows: usize,
    heads: usize,
    first_query: usize,
    first_key: usize,
    keys: usize,
    window: usize,
    cap: f32,
}

const BLOCKS: [Block; 4] = [
    Block { rows: 5, heads: 2, first_query: 0, first_key: 0, keys: 5, window: 0, cap: 0.0 },
    Block { rows: 4, heads: 3, first_query: 300, first_key: 9, keys: 295, window: 0, cap: 5.0 },
    Block { rows: 8, heads: 1, first_query: 70, first_key: 51, keys: 27, window: 20, cap: 0.0 },
    Block { rows: 3, heads: 2, first_query: 10, first_key: 10, keys: 3, window: 1, cap: 2.0 },
];

impl Block {
    fn visible(&self, row: usize) -> std::ops::Range<usize> {
        let end = self.first_query + row + 1 - self.first_key;
        let begin =
            if self.window > 0 { (end as i64 - self.window as i64).max(0) as usize } else { 0 };
        begin..end
    }
}

#[test]
fn exact_softmax_and_its_gradient() {
    in_every_order(|device| {
        for block in &BLOCKS {
            let (rows, heads, keys) = (block.rows, block.heads, block.keys);
            let (stride, tokens, all_heads, first_head) = (keys + 3, 320, heads + 2, 1);
            let (scale, cap) = (0.6f32, f64::from(block.cap));
            let products = normal(heads * rows * stride, "products");
            let d_probabilities = normal(heads * rows * stride, "d_probabilities");
            let grid = [rows as u32, heads as u32, 1];
            let head_stride = (rows * stride) as i64;
            let narrow = keys + 1;
            let narrow_head = (rows * narrow) as i64;
            let mut p = vec![POISON; heads * rows * narrow];
            let mut lse = vec![f32::NAN; tokens * all_heads];
            launch!(device, "attention_softmax", grid, 64; &products[..], head_stride,
                stride as i32, &mut p[..], narrow_head, narrow as i32, &mut lse[..],
                all_heads as i32, first_head, block.first_query as i32, block.first_key as i32,
                keys as i32, block.window as i32, scale, block.cap);
            let delta = normal(tokens * all_heads, "delta");
            let (mut p_again, mut d) = (vec![POISON; p.len()], vec![POISON; p.len()]);
            launch!(device, "attention_softmax_backward", grid, 64; &products[..],
                &d_probabilities[..], head_stride, stride as i32, &mut p_again[..], &mut d[..],
                narrow_head, narrow as i32, &lse[..], &delta[..], all_heads as i32, first_head,
                block.first_query as i32, block.first_key as i32, keys as i32, block.window as i32,
                scale, block.cap);
            for (head, row) in (0..heads).flat_map(|h| (0..rows).map(move |r| (h, r))) {
                let at = (head * rows + row) * stride;
                let scores: Vec<f64> = products[at..at + keys]
                    .iter()
                    .map(|&x| score(f64::from(x), f64::from(scale), cap))
                    .collect();
                let (expected, expected_lse) = softmax(&scores, &block.visible(row));
                let statistic = (block.first_query + row) * all_heads + first_head as usize + head;
                assert_close(&[f64::from(lse[statistic])], &[expected_lse], 2e-6, 2e-6);
                let out = (head * rows + row) * narrow;
                let gradient: Vec<f64> = (0..keys)
                    .map(|k| {
                        let dp = f64::from(d_probabilities[at + k]) - f64::from(delta[statistic]);
                        let cap_slope =
                            if cap > 0.0 { 1.0 - (scores[k] / cap).powi(2) } else { 1.0 };
                        expected[k] * dp * f64::from(scale) * cap_slope
                    })
                    .collect();
                assert_close(&wide(&p[out..out + keys]), &expected, 1e-6, BF16_ROUNDING);
                assert_close(&wide(&p_again[out..out + keys]), &expected, 1e-6, BF16_ROUNDING);
                assert_close(&wide(&d[out..out + keys]), &gradient, 1e-6, BF16_ROUNDING);
                assert!(p[out + keys].is_nan() && d[out + keys].is_nan());
            }
            let written = lse.iter().filter(|x| !x.is_nan()).count();
            assert_eq!(written, rows * heads);
        }
    });
}

#[test]
fn delta_is_the_sum_of_each_head() {
    in_every_order(|device| {
        let (rows, heads, head_dim) = (3, 5, 40);
        let width = heads * head_dim;
        let (d_o, o) = (normal_bf16(rows * width, "d_o"), normal_bf16(rows * width, "o"));
        let mut delta = vec![f32::NAN; rows * heads];
        launch!(device, "attention_delta", [rows as u32, 1, 1], 64;
            &with_stride(&d_o, width, width + 8)[..], width as i32 + 8, &o[..], width as i32,
            &mut delta[..], heads as i32, head_dim as i32);
        let products: Vec<f64> = wide(&d_o).iter().zip(wide(&o)).map(|(a, b)| a * b).collect();
        let expected: Vec<f64> = products.chunks(head_dim).map(|c| c.iter().sum()).collect();
        let got: Vec<f64> = delta.iter().map(|&x| f64::from(x)).collect();
        assert_close(&got, &expected, 1e-4, 1e-5);
    });
}

#[test]
fn decoding_attends_to_the_cache() {
    in_every_order(|device| {
        for (rows, past, heads, kv_heads, head_dim, window, cap) in [
            (1, 0, 2, 1, 64, 0, 0.0f32),
            (3, 50, 6, 2, 96, 0, 10.0),
            (2, 131, 4, 4, 40, 33, 0.0),
            (1, 5, 2, 1, 256, 4, 0.0),
            (1, 700, 2, 1, 128, 0, 0.0),
            (2, 30, 2, 1, 36, 0, 0.0),
        ] {
            let (q_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
            let capacity = past + rows + 4;
            let q = normal_bf16(rows * q_width, "q");
            let cache = normal_bf16(capacity * 2 * kv_width, "cache");
            let mut o = vec![POISON; rows * q_width];
            let scale = 1.0 / (head_dim as f32).sqrt();
            launch!(device, "attention_decode", [rows as u32, heads as u32, 1], 256; &q[..],
                q_width as i32, &cache[..], &cache[kv_width..], 2 * kv_width as i32, &mut o[..],
                q_width as i32, heads as i32, kv_heads as i32, head_dim as i32, past as i32, window,
                scale, cap);
            let expected: Vec<f64> = (0..rows * heads)
                .flat_map(|i| {
                    let (row, head) = (i / heads, i % heads);
                    let kv = head / (heads / kv_heads) * head_dim;
                    let q = wide(&q[i * head_dim..][..head_dim]);
                    let key = |t: usize| wide(&cache[t * 2 * kv_width + kv..][..head_dim]);
                    let value =
                        |t: usize| wide(&cache[t * 2 * kv_width + kv_width + kv..][..head_dim]);
                    let end = past + row + 1;
                    let begin = if window > 0 { end.saturating_sub(window as usize) } else { 0 };
                    let scores: Vec<f64> = (0..end)
                        .map(|t| {
                            let product = q.iter().zip(key(t)).map(|(a, b)| a * b).sum();
                            score(product, f64::from(scale), f64::from(cap))
                        })
                        .collect();
                    let (p, _) = softmax(&scores, &(begin..end));
                    let mut o = vec![0.0; head_dim];
                    for (t, p) in p.iter().enumerate() {
                        o.iter_mut().zip(value(t)).for_each(|(o, v)| *o += p * v);
                    }
                    o
                })
                .collect();
            assert_close(&wide(&o), &expected, 1e-5, BF16_ROUNDING);
        }
    });
}
