//! Turning lines into columns.
#![allow(unsafe_code)]

/// Lines that are turned together.
const SIDE: usize = 8;

/// `to[k·to_stride + line] = from[line·from_stride + k]` for `lines` lines of `length`.
///
/// # Panics
/// When a slice is too short.
pub(super) fn transpose(
    (from, from_stride): (&[f32], usize),
    (lines, length): (usize, usize),
    (to, to_stride): (&mut [f32], usize),
) {
    if lines == 0 || length == 0 {
        return;
    }
    assert!((lines - 1) * from_stride + length <= from.len(), "lines exist");
    assert!((length - 1) * to_stride + lines <= to.len(), "columns exist");
    let (whole_lines, whole_length) = (lines / SIDE * SIDE, length / SIDE * SIDE);
    let vector = squares((from, from_stride), (whole_lines, whole_length), (to, to_stride));
    for line in 0..lines {
        let done = if vector && line < whole_lines { whole_length } else { 0 };
        for k in done..length {
            to[k * to_stride + line] = from[line * from_stride + k];
        }
    }
}

/// The part that divides into squares; false where the processor has no instructions for it.
fn squares(
    (from, from_stride): (&[f32], usize),
    (lines, length): (usize, usize),
    (to, to_stride): (&mut [f32], usize),
) -> bool {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx") {
        // SAFETY: AVX is there; `transpose` checked that lines and columns exist.
        unsafe {
            x86::squares(
                (from.as_ptr(), from_stride),
                (lines, length),
                (to.as_mut_ptr(), to_stride),
            );
        }
        return true;
    }
    #[cfg(target_arch = "aarch64")]
    if std::arch::is_aarch64_feature_detected!("neon") {
        // SAFETY: NEON is there; `transpose` checked that lines and columns exist.
        unsafe {
            neon::squares(
                (from.as_ptr(), from_stride),
                (lines, length),
                (to.as_mut_ptr(), to_stride),
            );
        }
        return true;
    }
    let _ = (from, from_stride, lines, length, to, to_stride);
    false
}

/// Calls `square` with where each square of `side` lines begins before and after.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
fn for_squares(
    side: usize,
    (lines, length): (usize, usize),
    [from_stride, to_stride]: [usize; 2],
    square: impl Fn(usize, usize),
) {
    for line in (0..lines).step_by(side) {
        for k in (0..length).step_by(side) {
            square(line * from_stride + k, k * to_stride + line);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{SIDE, for_squares};

    /// # Safety
    /// Lines and columns lie inside what the pointers reach; both counts are multiples of [`SIDE`].
    #[target_feature(enable = "avx")]
    pub(super) unsafe fn squares(
        (from, from_stride): (*const f32, usize),
        counts: (usize, usize),
        (to, to_stride): (*mut f32, usize),
    ) {
        for_squares(SIDE, counts, [from_stride, to_stride], |from_at, to_at| {
            // SAFETY: the caller's promise.
            unsafe { square((from.add(from_at), from_stride), (to.add(to_at), to_stride)) };
        });
    }

    /// 8 × 8: halves of lines i and i + 4 share a register, so that pairs and quads are exchanged
    /// within halves only.
    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn square((from, from_stride): (*const f32, usize), (to, to_stride): (*mut f32, usize)) {
        for half in 0..2 {
            // SAFETY: the caller's promise: 8 lines of 8, 8 columns of 8.
            let rows: [__m256; 4] = std::array::from_fn(|i| unsafe {
                let upper = _mm_loadu_ps(from.add(i * from_stride + 4 * half));
                let lower = _mm_loadu_ps(from.add((i + 4) * from_stride + 4 * half));
                _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(upper), lower)
            });
            let low01 = _mm256_unpacklo_ps(rows[0], rows[1]);
            let high01 = _mm256_unpackhi_ps(rows[0], rows[1]);
            let low23 = _mm256_unpacklo_ps(rows[2], rows[3]);
            let high23 = _mm256_unpackhi_ps(rows[2], rows[3]);
            let columns = [
                _mm256_shuffle_ps::<0x44>(low01, low23),
                _mm256_shuffle_ps::<0xee>(low01, low23),
                _mm256_shuffle_ps::<0x44>(high01, high23),
                _mm256_shuffle_ps::<0xee>(high01, high23),
            ];
            for (k, column) in columns.into_iter().enumerate() {
                // SAFETY: as above.
                unsafe { _mm256_storeu_ps(to.add((4 * half + k) * to_stride), column) };
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;

    use super::for_squares;

    /// Lines that four registers hold.
    const SIDE: usize = 4;

    /// # Safety
    /// Lines and columns lie inside what the pointers reach; both counts are multiples of [`SIDE`].
    #[target_feature(enable = "neon")]
    pub(super) unsafe fn squares(
        (from, from_stride): (*const f32, usize),
        counts: (usize, usize),
        (to, to_stride): (*mut f32, usize),
    ) {
        for_squares(SIDE, counts, [from_stride, to_stride], |from_at, to_at| {
            // SAFETY: the caller's promise.
            unsafe { square((from.add(from_at), from_stride), (to.add(to_at), to_stride)) };
        });
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn square((from, from_stride): (*const f32, usize), (to, to_stride): (*mut f32, usize)) {
        // SAFETY: the caller's promise: 4 lines of 4.
        let [a, b, c, d] = std::array::from_fn(|i| unsafe { vld1q_f32(from.add(i * from_stride)) });
        let pairs = |register| vreinterpretq_f64_f32(register);
        let (even01, odd01) = (pairs(vtrn1q_f32(a, b)), pairs(vtrn2q_f32(a, b)));
        let (even23, odd23) = (pairs(vtrn1q_f32(c, d)), pairs(vtrn2q_f32(c, d)));
        let columns = [
            vtrn1q_f64(even01, even23),
            vtrn1q_f64(odd01, odd23),
            vtrn2q_f64(even01, even23),
            vtrn2q_f64(odd01, odd23),
        ];
        for (k, column) in columns.into_iter().enumerate() {
            // SAFETY: as above, 4 columns of 4.
            unsafe { vst1q_f32(to.add(k * to_stride), vreinterpretq_f32_f64(column)) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::transpose;

    #[test]
    fn every_element_moves_and_nothing_else_is_written() {
        for (lines, length) in [(1, 1), (8, 8), (7, 19), (24, 16), (17, 33)] {
            let (from_stride, to_stride) = (length + 3, lines + 5);
            let from: Vec<f32> = (0..lines * from_stride).map(|i| i as f32).collect();
            let mut to = vec![-1.0; length * to_stride];
            transpose((&from, from_stride), (lines, length), (&mut to, to_stride));
            for (k, row) in to.chunks_exact(to_stride).enumerate() {
                for (line, &value) in row.iter().enumerate() {
                    let expected = if line < lines { from[line * from_stride + k] } else { -1.0 };
                    assert_eq!(value, expected, "{lines}x{length}: [{k}, {line}]");
                }
            }
        }
    }
}
