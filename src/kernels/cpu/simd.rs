//! Loops that the compiler vectorises for the widest instruction set of this processor.
//!
//! `vectorized!` compiles its expression once for each level that `pulp` knows (AVX-512, AVX2,
//! baseline) and picks one at run time; the sums below have a fixed number of lanes, so results do
//! not depend on how many threads run.

/// Runs an expression compiled for the processor's best vector extensions. All that it calls must be
/// `#[inline(always)]`, as the closure here is: what is not inlined is compiled for the oldest
/// processor.
macro_rules! vectorized {
    ($work:expr) => {{
        let once = $crate::kernels::cpu::simd::Once;
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                let _moved = once;
                $work
            },
        )
    }};
}
pub(super) use vectorized;

/// Moved into a closure, it makes the closure one that can be called once only. Such a call is the
/// closure's body; `pulp` calls closures that merely borrow through a shim, which is not inlined.
pub struct Once;

/// Lanes of the running sums.
pub const LANES: usize = 16;

/// `Σ f(a[i], b[i], c[i])` in [`LANES`] partial sums, then pairwise.
#[inline(always)]
pub fn sum3(a: &[f32], b: &[f32], c: &[f32], f: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    let (c_chunks, c_rest) = c.as_chunks::<LANES>();
    for ((x, y), z) in a_chunks.iter().zip(b_chunks).zip(c_chunks) {
        for lane in 0..LANES {
            lanes[lane] += f(x[lane], y[lane], z[lane]);
        }
    }
    for (lane, ((&x, &y), &z)) in a_rest.iter().zip(b_rest).zip(c_rest).enumerate() {
        lanes[lane] += f(x, y, z);
    }
    fold(lanes, |x, y| x + y)
}

/// `Σ f(a[i], b[i])`.
#[inline(always)]
pub fn sum2(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    sum3(a, b, b, |x, y, _| f(x, y))
}

/// `Σ f(a[i])`.
#[inline(always)]
pub fn sum(a: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    sum2(a, a, |x, _| f(x))
}

/// `x ← e^(x − largest)` for all of a row; the partial sums of the results.
#[inline(always)]
pub fn exp_below(row: &mut [f32], largest: f32) -> [f32; LANES] {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            chunk[lane] = exp(chunk[lane] - largest);
            lanes[lane] += chunk[lane];
        }
    }
    for (lane, value) in rest.iter_mut().enumerate() {
        *value = exp(*value - largest);
        lanes[lane] += *value;
    }
    lanes
}

/// Largest element, −∞ for none; NaN elements are passed over.
#[inline(always)]
pub fn max(a: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = a.as_chunks::<LANES>();
    for x in chunks {
        for lane in 0..LANES {
            lanes[lane] = if x[lane] > lanes[lane] { x[lane] } else { lanes[lane] };
        }
    }
    for (lane, &x) in rest.iter().enumerate() {
        lanes[lane] = if x > lanes[lane] { x } else { lanes[lane] };
    }
    fold(lanes, |x, y| if y > x { y } else { x })
}

#[inline(always)]
fn fold(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] = f(lanes[lane], lanes[lane + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// `eˣ` within 2 ulp for x in [−87, 88]; smaller x give e⁻⁸⁷ ≈ 1.6e-38, larger ones e⁸⁸; NaN stays.
///
/// Cephes' `expf`: split `x = n·ln 2 + f`, a polynomial in f, then n into the exponent bits.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // 1.5 · 2²³: adding it rounds to a whole number, which then stands in the low mantissa bits.
    const MAGIC: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x < -87.0 { -87.0 } else { x };
    let clamped = if clamped > 88.0 { 88.0 } else { clamped };
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let f = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, clamped));
    let mut p = 1.987_569_1e-4f32;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p.mul_add(f, c);
    }
    let mantissa = p.mul_add(f * f, f) + 1.0;
    let power = f32::from_bits((shifted.to_bits().wrapping_add(127)) << 23);
    mantissa * power
}

/// `1 / (1 + e⁻ˣ)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `tanh x = 2·sigmoid(2x) − 1`, near 0 the first terms of its series: relative error below 1e-6.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let (far, square) = (2.0 * sigmoid(2.0 * x) - 1.0, x * x);
    let terms = [-17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0];
    let near = x * terms.into_iter().fold(62.0 / 2835.0, |sum, term| sum * square + term);
    if x.abs() < 0.25 { near } else { far }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_over_its_range() {
        let mut worst = 0.0f64;
        for i in 0..2_000_000 {
            let x = -87.0 + 175.0 * (i as f32 / 2e6);
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1e9) < 2e-38 && exp(-1e9) >= 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_and_maxima_cover_the_rest_of_a_row() {
        let a: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!(vectorized!(sum(&a, |x| x)), 666.0);
        assert_eq!(vectorized!(max(&a)), 36.0);
        assert_eq!(max(&[]), f32::NEG_INFINITY);
        assert!((tanh(0.7) - 0.7f32.tanh()).abs() < 2e-7);
    }
}
