//! Flash attention, forward and backward, against f64 over every head width, grouped heads,
//! documents of odd lengths, windows, soft caps and prompts that continue a cache.

use half::bf16;
use nibble::random::Stream;

use crate::attention::{score, softmax};
use crate::emulator::{Argument, Device, ORDERS, devices, launch};
use crate::support::*;

/// One call: documents with their new queries and all their keys.
#[derive(Debug)]
struct Case {
    head_dim: usize,
    heads: usize,
    kv_heads: usize,
    queries: Vec<usize>,
    /// Keys before the first query of each document.
    past: usize,
    window: usize,
    cap: f32,
    /// Elements between rows that no kernel may touch.
    gap: usize,
}

impl Case {
    fn new(head_dim: usize, [heads, kv_heads]: [usize; 2], queries: &[usize]) -> Self {
        let queries = queries.to_vec();
        Case { head_dim, heads, kv_heads, queries, past: 0, window: 0, cap: 0.0, gap: 8 }
    }

    /// Anything that the kernels take, small.
    fn random(number: u64) -> Self {
        let stream = Stream::new(number, "flash case");
        let pick =
            |index: u64, from: &[usize]| from[stream.below(index, from.len() as u64) as usize];
        let kv_heads = pick(0, &[1, 2, 3]);
        let queries = (0..1 + stream.below(1, 4)).map(|i| 1 + stream.below(9 + i, 140) as usize);
        Case {
            head_dim: pick(2, &[64, 96, 128, 256]),
            heads: kv_heads * pick(3, &[1, 2, 3]),
            kv_heads,
            queries: queries.collect(),
            past: pick(4, &[0, 0, 0, 1, 77]),
            window: pick(5, &[0, 0, 2, 31, 64, 100]),
            cap: pick(6, &[0, 0, 2, 30]) as f32,
            gap: 8,
        }
    }
}

/// Inputs and outputs of one case; q, k, v are bands of one row if nothing is past.
struct Tensors {
    q: Vec<bf16>,
    k: Vec<bf16>,
    v: Vec<bf16>,
    d_o: Vec<bf16>,
}

/// What the kernels give, rows without gaps.
#[derive(PartialEq, Debug)]
struct Results {
    o: Vec<f64>,
    lse: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

impl Case {
    fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    fn scale(&self) -> f32 {
        1.3 / (self.head_dim as f32).sqrt()
    }

    fn boundaries(&self, past: usize) -> Vec<u32> {
        let mut boundaries = vec![0];
        for length in &self.queries {
            boundaries.push(boundaries.last().unwrap() + (length + past) as u32);
        }
        boundaries
    }

    /// Document and tile of 64 rows, in an order of no use.
    fn tiles(&self, past: usize) -> Vec<[u32; 2]> {
        let documents = self.queries.iter().enumerate();
        let tiles = documents.flat_map(|(document, length)| {
            let tiles = (length + past).div_ceil(64) as u32;
            (0..tiles).map(move |tile| [document as u32, tile])
        });
        tiles.collect()
    }

    fn tensors(&self) -> Tensors {
        let queries = *self.boundaries(0).last().unwrap() as usize;
        let keys = *self.boundaries(self.past).last().unwrap() as usize;
        Tensors {
            q: normal_bf16(queries * self.q_width(), "q"),
            k: normal_bf16(keys * self.kv_width(), "k"),
            v: normal_bf16(keys * self.kv_width(), "v"),
            d_o: normal_bf16(queries * self.q_width(), "d_o"),
        }
    }

    fn run(&self, device: &Device, tensors: &Tensors) -> Results {
        let (d, q_width, kv_width) = (self.head_dim, self.q_width(), self.kv_width());
        let (q_stride, kv_stride) = (q_width + self.gap, kv_width + self.gap);
        let (q_bounds, k_bounds) = (self.boundaries(0), self.boundaries(self.past));
        let (queries, keys) = (tensors.q.len() / q_width, tensors.k.len() / kv_width);
        let q = with_stride(&tensors.q, q_width, q_stride);
        let k = with_stride(&tensors.k, kv_width, kv_stride);
        let v = with_stride(&tensors.v, kv_width, kv_stride);
        let d_o = with_stride(&tensors.d_o, q_width, q_stride);
        let (q_tiles, k_tiles) = (self.tiles(0), self.tiles(self.past));
        let inputs = |tiles: &[[u32; 2]]| {
            [
                q[..].into(),
                (q_stride as i32).into(),
                k[..].into(),
                v[..].into(),
                (kv_stride as i32).into(),
                q_bounds[..].into(),
                k_bounds[..].into(),
                Argument::from(tiles.as_flattened()),
                (self.heads as i32).into(),
                (self.kv_heads as i32).into(),
                (self.window as i32).into(),
                self.scale().into(),
                self.cap.into(),
            ]
        };
        // Rows of 128 columns are swizzled, others padded.
        let row = if d == 128 { d } else { d + 8 };
        let wide_head = d > 128;
        let call = |kernel: &str,
                    (tiles, heads): (&[[u32; 2]], usize),
                    threads,
                    elements: usize,
                    floats: usize,
                    rest: &[Argument]| {
            let mut arguments = [&inputs(tiles)[..], rest].concat();
            let bytes = 2 * elements * row + 4 * floats;
            let grid = [(tiles.len() * heads) as u32, 1, 1];
            device.launch(&format!("{kernel}_{d}"), grid, threads, bytes, &mut arguments);
        };
        let mut o = vec![POISON; queries * q_stride];
        let mut lse = vec![f32::NAN; queries * self.heads];
        // Rows of the tiles: keys and values, and 256 columns keep the queries beside 32 of each.
        let elements = 128;
        let outputs = [(&mut o[..]).into(), (q_stride as i32).into(), (&mut lse[..]).into()];
        call("flash_forward", (&q_tiles, self.heads), 128, elements, 0, &outputs);
        let mut delta = vec![f32::NAN; queries * self.heads];
        launch!(device, "attention_delta", [queries as u32, 1, 1], 64; &d_o[..],
            q_stride as i32, &o[..], q_stride as i32, &mut delta[..], self.heads as i32, d as i32);
        let mut dk = vec![POISON; keys * kv_stride];
        let (mut dv, mut dq) = (dk.clone(), vec![POISON; queries * q_stride]);
        let gradients: [Argument; 4] =
            [d_o[..].into(), (q_stride as i32).into(), lse[..].into(), delta[..].into()];
        let (rows, stages) = if wide_head { (16, 1) } else { (32, 2) };
        let elements = 2 * 64 + 2 * stages * rows;
        let outputs = [(&mut dk[..]).into(), (&mut dv[..]).into(), (kv_stride as i32).into()];
        call(
            "flash_backward_keys",
            (&k_tiles, self.kv_heads),
            if wide_head { 256 } else { 128 },
            elements,
            stages * 2 * rows,
            &[&gradients[..], &outputs].concat(),
        );
        // Queries and gradients are in registers, or beside 16 keys and values.
        let elements = if wide_head { 2 * 64 + 2 * 16 } else { 128 };
        let outputs = [(&mut dq[..]).into(), (q_stride as i32).into()];
        call(
            "flash_backward_queries",
            (&q_tiles, self.heads),
            128,
            elements,
            0,
            &[&gradients[..], &outputs].concat(),
        );
        Results {
            o: band(&o, q_width, q_stride),
            lse: lse.iter().map(|&x| f64::from(x)).collect(),
            dq: band(&dq, q_width, q_stride),
            dk: band(&dk, kv_width, kv_stride),
            dv: band(&dv, kv_width, kv_stride),
        }
    }

    /// The definition, query by query, in f64.
    fn reference(&self, tensors: &Tensors) -> Results {
        let (d, group) = (self.head_dim, self.heads / self.kv_heads);
        let [q, k, v, d_o] = [&tensors.q, &tensors.k, &tensors.v, &tensors.d_o].map(|x| wide(x));
        let (scale, cap) = (f64::from(self.scale()), f64::from(self.cap));
        let mut r = Results {
            o: vec![0.0; q.len()],
            lse: vec![0.0; q.len() / d],
            dq: vec![0.0; q.len()],
            dk: vec![0.0; k.len()],
            dv: vec![0.0; k.len()],
        };
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let add = |to: &mut [f64], factor: f64, from: &[f64]| {
            to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
        };
        let (q_bounds, k_bounds) = (self.boundaries(0), self.boundaries(self.past));
        for document in 0..self.queries.len() {
            for (i, head) in
                (0..self.queries[document]).flat_map(|i| (0..self.heads).map(move |h| (i, h)))
            {
                let row = (q_bounds[document] as usize + i) * self.heads + head;
                let end = i + self.past + 1;
                let begin = if self.window > 0 { end.saturating_sub(self.window) } else { 0 };
                let at = |j: usize| {
                    let kv = (k_bounds[document] as usize + j) * self.kv_heads + head / group;
                    kv * d..(kv + 1) * d
                };
                let own = row * d..(row + 1) * d;
                let scores: Vec<f64> =
                    (0..end).map(|j| score(dot(&q[own.clone()], &k[at(j)]), scale, cap)).collect();
                let (p, lse) = softmax(&scores, &(begin..end));
                r.lse[row] = lse;
                for j in begin..end {
                    add(&mut r.o[own.clone()], p[j], &v[at(j)]);
                }
                let delta = dot(&d_o[own.clone()], &r.o[own.clone()]);
                for j in begin..end {
                    let slope = if cap > 0.0 { 1.0 - (scores[j] / cap).powi(2) } else { 1.0 };
                    let dp = dot(&d_o[own.clone()], &v[at(j)]);
                    let ds = p[j] * (dp - delta) * slope * scale;
                    add(&mut r.dv[at(j)], p[j], &d_o[own.clone()]);
                    add(&mut r.dk[at(j)], ds, &q[own.clone()]);
                    add(&mut r.dq[own.clone()], ds, &k[at(j)]);
                }
            }
        }
        r
    }
}

/// How far results are off: the largest `‖got − expected‖ / ‖expected‖` over what is allowed, and of
/// one element ten times that of a typical one. NaN counts as infinite.
fn excess(got: &Results, expected: &Results) -> f64 {
    let pairs = [
        (&got.o, &expected.o, 4e-3),
        (&got.lse, &expected.lse, 1e-5),
        (&got.dq, &expected.dq, 6e-3),
        (&got.dk, &expected.dk, 6e-3),
        (&got.dv, &expected.dv, 6e-3),
    ];
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let one = |(got, expected, allowed): (&Vec<f64>, &Vec<f64>, f64)| {
        assert_eq!(got.len(), expected.len());
        let size = norm(&mut expected.iter().copied());
        let typical = size / (got.len() as f64).sqrt();
        let differences = got.iter().zip(expected).map(|(g, e)| (g - e, e));
        let element = |(d, e): (f64, &f64)| d.abs() / (10.0 * (typical + e.abs()));
        let largest = differences.clone().map(element).fold(0.0, f64::max);
        let total = norm(&mut differences.map(|(d, _)| d)) / size;
        if total.is_nan() { f64::INFINITY } else { total.max(largest) / allowed }
    };
    pairs.into_iter().map(one).fold(0.0, f64::max)
}

fn windowed() -> Case {
    Case { window: 37, cap: 3.0, ..Case::new(64, [3, 1], &[200]) }
}

/// Whether a case with a window and grouped heads is right in the order that is set.
pub fn is_right(device: &Device) -> bool {
    let case = windowed();
    let tensors = case.tensors();
    excess(&case.run(device, &tensors), &case.reference(&tensors)) <= 1.0
}

/// Forward and backward of two documents, in heads of `head_dim`.
pub fn run_once(device: &Device, head_dim: usize) {
    let case = Case { gap: 16, ..Case::new(head_dim, [2, 1], &[192, 256]) };
    case.run(device, &case.tensors());
}

fn check(case: Case) {
    let tensors = case.tensors();
    let expected = case.reference(&tensors);
    for device in devices() {
        let mut first: Option<Results> = None;
        for &order in device.orders() {
            device.order(order);
            let got = case.run(device, &tensors);
            let excess = excess(&got, &expected);
            assert!(excess <= 1.0, "{case:?} {order:?}: {excess} times the error that is allowed");
            match &first {
                Some(first) => assert!(got == *first, "the order of threads changes a bit"),
                None => first = Some(got),
            }
        }
    }
}

#[test]
fn head_width_64() {
    check(Case::new(64, [4, 2], &[1, 70, 129]));
}

#[test]
fn one_key_head_with_window_and_soft_cap() {
    check(windowed());
}

#[test]
fn head_width_96() {
    check(Case::new(96, [2, 2], &[65, 64, 31]));
}

#[test]
fn head_width_128_with_soft_cap() {
    check(Case { cap: 20.0, ..Case::new(128, [2, 1], &[130, 17]) });
}

#[test]
fn a_window_of_one_key() {
    let case = Case { window: 1, ..Case::new(128, [1, 1], &[150]) };
    let tensors = case.tensors();
    for device in devices() {
        device.order(ORDERS[0]);
        let got = case.run(device, &tensors);
        // p = 1 wherever it is not 0: o is v, and no score has a gradient.
        assert_eq!(got.o, wide(&tensors.v));
        assert_eq!(got.dv, wide(&tensors.d_o));
        let small = |x: &[f64]| x.iter().all(|x| x.abs() < 1e-2);
        assert!(small(&got.dq) && small(&got.dk));
    }
}

#[test]
fn head_width_256_with_window() {
    check(Case { window: 50, ..Case::new(256, [2, 1], &[67, 80]) });
}

#[test]
fn queries_that_follow_a_cache() {
    check(Case { past: 45, ..Case::new(128, [2, 2], &[20, 70]) });
}

#[test]
fn random_shapes() {
    (0..16).for_each(|number| check(Case::random(number)));
}
