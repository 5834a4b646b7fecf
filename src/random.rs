//! Counter-based random numbers: a value depends on (seed, stream, step, index) and on nothing else.
//!
//! There is no hidden state, so it does not matter in which order, on how many threads or how
//! often a value is asked for: recomputing a layer sees the same dropout mask, a resumed run
//! continues the same sequence, and initial weights do not change when an unrelated tensor is
//! added. The words come from Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as
//! 1, 2, 3", SC 2011), tested against the known answers of its reference implementation Random123.
//!
//! Layout: the key is 64 bits mixed from seed and stream name; the counter is
//! `[block low, block high, step low, step high]`, and block `i / 4` yields the words of indices
//! `4·(i / 4) ..`.

use std::array::from_fn;

/// First round multiplier of Philox4x32.
const MULTIPLIER_0: u32 = 0xD251_1F53;
/// Second round multiplier of Philox4x32.
const MULTIPLIER_1: u32 = 0xCD9E_8D57;
/// Golden ratio, added to the first key word after each round.
const WEYL_0: u32 = 0x9E37_79B9;
/// √3 − 1, added to the second key word after each round.
const WEYL_1: u32 = 0xBB67_AE85;
const ROUNDS: usize = 10;
/// Blocks computed side by side: one 512-bit vector of words.
const LANES: usize = 16;

/// The Philox4x32-10 bijection of `counter` under `key`.
fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    philox_lanes(counter.map(|word| [word]), key).map(|[word]| word)
}

/// [`philox4x32`] of `L` counters, one word per array and lane: a shape that compilers turn into
/// vector code.
#[inline(always)]
fn philox_lanes<const L: usize>(counters: [[u32; L]; 4], mut key: [u32; 2]) -> [[u32; L]; 4] {
    let [mut a, mut b, mut c, mut d] = counters;
    for round in 0..ROUNDS {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL_0), key[1].wrapping_add(WEYL_1)];
        }
        for (((a, b), c), d) in a.iter_mut().zip(&mut b).zip(&mut c).zip(&mut d) {
            let first = u64::from(MULTIPLIER_0) * u64::from(*a);
            let second = u64::from(MULTIPLIER_1) * u64::from(*c);
            (*a, *b) = ((second >> 32) as u32 ^ *b ^ key[0], second as u32);
            (*c, *d) = ((first >> 32) as u32 ^ *d ^ key[1], first as u32);
        }
    }
    [a, b, c, d]
}

/// Low and high half.
fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

/// FNV-1a, 64 bits: spreads names; Philox does the mixing.
fn hash(name: &str) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    name.bytes().fold(OFFSET, |h, byte| (h ^ u64::from(byte)).wrapping_mul(PRIME))
}

/// The random words of one (seed, stream name, step).
///
/// `Stream` is two words of key and one step: copy it freely, share it between threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    key: [u32; 2],
    step: u64,
}

impl Stream {
    /// The stream `name` (by convention a tensor's name and what is drawn) of `seed`, at step 0.
    pub fn new(seed: u64, name: &str) -> Self {
        let [low, high] = halves(hash(name));
        let mixed = philox4x32([low, high, 0, 0], halves(seed));
        Stream { key: [mixed[0], mixed[1]], step: 0 }
    }

    /// This stream at another step.
    pub fn at(self, step: u64) -> Self {
        Stream { step, ..self }
    }

    /// Key and step, for a kernel that evaluates the same function on a device.
    pub fn parts(&self) -> ([u32; 2], u64) {
        (self.key, self.step)
    }

    /// The four words of indices `4·block .. 4·block + 4`.
    pub fn block(&self, block: u64) -> [u32; 4] {
        let ([low, high], [step_low, step_high]) = (halves(block), halves(self.step));
        philox4x32([low, high, step_low, step_high], self.key)
    }

    /// Word `index`: uniform over all 32-bit values.
    pub fn word(&self, index: u64) -> u32 {
        self.block(index / 4)[(index % 4) as usize]
    }

    /// Uniform in `[0, 1)`, a multiple of 2⁻²⁴.
    pub fn uniform(&self, index: u64) -> f32 {
        unit(self.word(index))
    }

    /// Normal with mean 0 and variance 1.
    pub fn normal(&self, index: u64) -> f32 {
        normals(self.block(index / 4))[(index % 4) as usize]
    }

    /// `out[i]` is uniform in `[low, high)`, from index `first + i`.
    pub fn fill_uniform(&self, first: u64, low: f32, high: f32, out: &mut [f32]) {
        self.fill(first, out, |words| words.map(|word| low + (high - low) * unit(word)));
    }

    /// `out[i]` is normal with mean 0 and the given standard deviation, from index `first + i`.
    pub fn fill_normal(&self, first: u64, deviation: f32, out: &mut [f32]) {
        self.fill(first, out, |words| normals(words).map(|normal| deviation * normal));
    }

    /// Multipliers of inverted dropout: `out[i]` is 0 with probability `p`, else `1 / (1 − p)`,
    /// from index `first + i`. `p ≥ 1` drops everything.
    pub fn fill_dropout(&self, first: u64, p: f32, out: &mut [f32]) {
        let (threshold, kept) = dropout_factors(p);
        self.fill(first, out, |words| {
            words.map(|word| if u64::from(word) < threshold { 0.0 } else { kept })
        });
    }

    /// Whether dropout with probability `p` keeps element `index`; agrees with
    /// [`Stream::fill_dropout`].
    pub fn keeps(&self, index: u64, p: f32) -> bool {
        u64::from(self.word(index)) >= drop_threshold(p)
    }

    /// Uniform in `0..bound` from the two words of pair `index`; the bias is below `bound / 2⁶⁴`.
    pub fn below(&self, index: u64, bound: u64) -> u64 {
        let pair = &self.block(index / 2)[2 * (index % 2) as usize..];
        let wide = u64::from(pair[0]) | u64::from(pair[1]) << 32;
        ((u128::from(wide) * u128::from(bound)) >> 64) as u64
    }

    /// A random order of `0..len` (Fisher–Yates): every order equally likely.
    pub fn permutation(&self, len: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..len).collect();
        for last in (1..len).rev() {
            order.swap(last, self.below(last as u64, last as u64 + 1) as usize);
        }
        order
    }

    /// Blocks `block .. block + LANES`.
    #[inline(always)]
    fn lanes(&self, block: u64) -> [[u32; LANES]; 4] {
        let blocks: [[u32; 2]; LANES] = from_fn(|lane| halves(block.wrapping_add(lane as u64)));
        let [step_low, step_high] = halves(self.step);
        let (low, high) = (blocks.map(|halves| halves[0]), blocks.map(|halves| halves[1]));
        philox_lanes([low, high, [step_low; LANES], [step_high; LANES]], self.key)
    }

    /// `out[i] = values(block)[..]` for indices `first ..`, a block of four words at a time.
    fn fill(&self, first: u64, out: &mut [f32], values: impl Fn([u32; 4]) -> [f32; 4]) {
        let skip = (first % 4) as usize;
        let (head, body) = out.split_at_mut(out.len().min((4 - skip) % 4));
        head.copy_from_slice(&values(self.block(first / 4))[skip % 4..][..head.len()]);
        let fill = Fill { stream: *self, first: first.div_ceil(4), out: body, values };
        pulp::Arch::new().dispatch(fill);
    }
}

/// `out = values(block first), values(block first + 1), ..`, compiled for each vector width.
struct Fill<'a, F> {
    stream: Stream,
    first: u64,
    out: &'a mut [f32],
    values: F,
}

impl<F: Fn([u32; 4]) -> [f32; 4]> pulp::WithSimd for Fill<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let blocks = (self.first..).step_by(LANES);
        for (block, chunk) in blocks.zip(self.out.chunks_mut(4 * LANES)) {
            let [a, b, c, d] = self.stream.lanes(block);
            for (lane, out) in chunk.chunks_mut(4).enumerate() {
                let four = (self.values)([a[lane], b[lane], c[lane], d[lane]]);
                out.copy_from_slice(&four[..out.len()]);
            }
        }
    }
}

/// The upper 24 bits as a fraction: every value is exact in f32.
fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// Words below the first number are dropped, what is kept is multiplied by the second: dropout of
/// probability `p` for a kernel that evaluates [`Stream::fill_dropout`] on a device.
pub fn dropout_factors(p: f32) -> (u64, f32) {
    (drop_threshold(p), if p < 1.0 { 1.0 / (1.0 - p) } else { 0.0 })
}

/// Words below this are dropped: `p · 2³²`.
fn drop_threshold(p: f32) -> u64 {
    (f64::from(p) * 4_294_967_296.0).round() as u64
}

/// Box–Muller: words 0 and 1 give normals 0 and 1, words 2 and 3 the other two.
fn normals(words: [u32; 4]) -> [f32; 4] {
    let [a, b] = box_muller(words[0], words[1]);
    let [c, d] = box_muller(words[2], words[3]);
    [a, b, c, d]
}

fn box_muller(radius: u32, angle: u32) -> [f32; 2] {
    // Half a step above zero, so that the logarithm is finite.
    let fraction = |word: u32| (f64::from(word) + 0.5) / 4_294_967_296.0;
    let r = (-2.0 * fraction(radius).ln()).sqrt();
    let (sin, cos) = (std::f64::consts::TAU * fraction(angle)).sin_cos();
    [(r * cos) as f32, (r * sin) as f32]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `philox4x32 10` of Random123's `tests/kat_vectors`.
    #[test]
    fn philox_gives_the_known_answers_of_random123() {
        let pi = [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344];
        for (counter, key, expected) in [
            ([0; 4], [0; 2], [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]),
            (pi, [0xa4093822, 0x299f31d0], [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]),
        ] {
            assert_eq!(philox4x32(counter, key), expected);
        }
    }

    #[test]
    fn every_coordinate_changes_the_values() {
        let base = Stream::new(7, "a.lora_A").at(3);
        let others = [
            Stream::new(8, "a.lora_A").at(3),
            Stream::new(7 | 1 << 32, "a.lora_A").at(3),
            Stream::new(7, "b.lora_A").at(3),
            Stream::new(7, "a.lora_A").at(4),
            Stream::new(7, "a.lora_A").at(3 | 1 << 32),
        ];
        for other in others {
            let equal = (0..64).filter(|&i| base.word(i) == other.word(i)).count();
            assert_eq!(equal, 0, "{other:?}");
        }
        assert_ne!(base.block(1), base.block(1 << 32 | 1));
        assert_eq!(base, Stream::new(7, "a.lora_A").at(9).at(3));
    }

    /// Expected values: `scripts/golden/gen_random.py`.
    #[test]
    fn values_are_pinned() {
        let stream = Stream::new(42, "dropout").at(5);
        assert_eq!(stream.parts(), ([0xf894_c263, 0xab25_66f5], 5));
        assert_eq!(stream.block(0), [0x0054_5d77, 0xd73d_fa3f, 0xc4a5_7578, 0x5722_6315]);
        assert_eq!(stream.uniform(1), 0.840_789_44);
        let expected = [1.970_135_1, -3.070_662_8, -0.390_600_6, 0.612_349_9];
        for (index, normal) in (0..).zip(expected) {
            assert!((stream.normal(index) - normal).abs() < 1e-6_f32);
        }
        assert_eq!(stream.permutation(8), [6, 0, 3, 1, 7, 4, 5, 2]);
    }

    #[test]
    fn any_range_equals_single_values() {
        let stream = Stream::new(1, "x").at(2);
        for first in 0..9_u64 {
            for len in 0..11_usize {
                let mut out = [vec![0.0; len], vec![0.0; len], vec![0.0; len]];
                stream.fill_uniform(first, -2.0, 3.0, &mut out[0]);
                stream.fill_normal(first, 0.5, &mut out[1]);
                stream.fill_dropout(first, 0.25, &mut out[2]);
                for (i, index) in (0..len).zip(first..) {
                    assert_eq!(out[0][i], -2.0 + 5.0 * stream.uniform(index));
                    assert_eq!(out[1][i], 0.5 * stream.normal(index));
                    let kept = if stream.keeps(index, 0.25) { 1.0 / 0.75 } else { 0.0 };
                    assert_eq!(out[2][i], kept);
                }
            }
        }
    }

    /// Sample moments of n values lie within 5 standard errors of the distribution's.
    #[test]
    fn moments_are_those_of_the_distributions() {
        let (n, stream) = (1_usize << 20, Stream::new(3, "moments"));
        let (mut uniform, mut normal) = (vec![0.0; n], vec![0.0; n]);
        stream.fill_uniform(0, 0.0, 1.0, &mut uniform);
        stream.fill_normal(0, 1.0, &mut normal);
        let mean = |values: &[f32], power: i32| {
            values.iter().map(|&x| f64::from(x).powi(power)).sum::<f64>() / n as f64
        };
        let error = 5.0 / (n as f64).sqrt();
        assert!((mean(&uniform, 1) - 0.5).abs() < error * (1.0_f64 / 12.0).sqrt());
        assert!((mean(&uniform, 2) - 1.0 / 3.0).abs() < error * (4.0_f64 / 45.0).sqrt());
        assert!(mean(&normal, 1).abs() < error);
        assert!((mean(&normal, 2) - 1.0).abs() < error * 2.0_f64.sqrt());
        assert!((mean(&normal, 4) - 3.0).abs() < error * 96.0_f64.sqrt());
        let pairs: f64 = normal.windows(2).map(|w| f64::from(w[0] * w[1])).sum();
        assert!((pairs / n as f64).abs() < error);
    }

    #[test]
    fn dropout_drops_its_share_and_keeps_the_mean() {
        let stream = Stream::new(11, "mask");
        let mut out = vec![0.0; 1 << 18];
        for p in [0.05_f32, 0.1, 0.5, 0.9] {
            stream.fill_dropout(0, p, &mut out);
            let dropped = out.iter().filter(|&&x| x == 0.0).count() as f64 / out.len() as f64;
            let error = 5.0 * (f64::from(p * (1.0 - p)) / out.len() as f64).sqrt();
            assert!((dropped - f64::from(p)).abs() < error, "{p}: {dropped}");
            assert!(out.iter().all(|&x| x == 0.0 || x == 1.0 / (1.0 - p)));
        }
        stream.fill_dropout(0, 0.0, &mut out);
        assert!(out.iter().all(|&x| x == 1.0));
        stream.fill_dropout(0, 1.0, &mut out);
        assert!(out.iter().all(|&x| x == 0.0));
    }

    #[test]
    fn permutations_are_complete_and_even() {
        let stream = Stream::new(5, "order");
        for len in [0, 1, 2, 3, 97] {
            let mut order = stream.at(1).permutation(len);
            order.sort_unstable();
            assert_eq!(order, (0..len).collect::<Vec<_>>());
        }
        assert_ne!(stream.at(1).permutation(97), stream.at(2).permutation(97));
        let draws = 24_000;
        let mut counts = std::collections::BTreeMap::new();
        for step in 0..draws {
            *counts.entry(stream.at(step).permutation(4)).or_insert(0_u64) += 1;
        }
        assert_eq!(counts.len(), 24);
        // Each order is expected 1,000 times; 5 standard deviations are 155.
        assert!(counts.values().all(|&count| count.abs_diff(1_000) < 155), "{counts:?}");
    }
}
