//! The innermost loop: a tile of C in registers, one multiply-add for each element and step of k.
//!
//! A is read where it lies, one step broadcast for each row; B's rows are contiguous vectors.
//! Every element of C is one chain of fused multiply-adds over a block of k, in order, whatever
//! tile it falls into: with AVX2, AVX-512 or NEON the bits are the same. Not so for pairs of bf16, whose
//! own instruction rounds and flushes in its own way.
#![allow(unsafe_code)]

#[cfg(target_arch = "aarch64")]
use super::mmla;
#[cfg(target_arch = "x86_64")]
use super::step::Pair;
use super::step::{Dot, Float, Precision, Widened, has_pairs};
#[cfg(target_arch = "x86_64")]
use super::tile::MOST_COLUMNS;
use super::tile::{Segment, TILE_ROWS, Tile, write_row};
use super::vector::{Eight, Vector};

/// The registers that tiles run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Registers {
    /// Arrays of eight.
    Portable,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX-512 F and BF16.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// NEON.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// NEON and BF16.
    #[cfg(target_arch = "aarch64")]
    NeonBf16,
}

/// The instruction set that tiles run on, and what they multiply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Isa {
    registers: Registers,
    precision: Precision,
}

impl Isa {
    /// Arrays of eight.
    #[cfg(test)]
    pub(super) fn portable(precision: Precision) -> Self {
        Isa { registers: Registers::Portable, precision }
    }

    /// The widest that the processor has.
    pub(super) fn detect(precision: Precision) -> Self {
        let registers = *Self::registers(precision).last().expect("the portable one always is");
        Isa { registers, precision }
    }

    /// Every kernel but the portable one that the processor has.
    #[cfg(test)]
    pub(super) fn not_portable(precision: Precision) -> impl Iterator<Item = Self> {
        let registers = Self::registers(precision)[1..].iter();
        registers.map(move |&registers| Isa { registers, precision })
    }

    fn registers(precision: Precision) -> &'static [Registers] {
        #[cfg(target_arch = "x86_64")]
        {
            use Registers::{Avx2, Avx512, Avx512Bf16, Portable};
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if avx2 && is_x86_feature_detected!("avx512f") {
                return match precision {
                    Precision::Bf16 if has_pairs() => &[Portable, Avx2, Avx512, Avx512Bf16],
                    _ => &[Portable, Avx2, Avx512],
                };
            }
            if avx2 {
                return &[Portable, Avx2];
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") {
            use Registers::{Neon, NeonBf16, Portable};
            return match precision {
                Precision::Bf16 if has_pairs() => &[Portable, Neon, NeonBf16],
                _ => &[Portable, Neon],
            };
        }
        let _ = precision;
        &[Registers::Portable]
    }

    /// What the processor's vendor calls the instructions; none where products take what every processor has.
    pub(super) fn name(self) -> Option<&'static str> {
        match self.registers {
            Registers::Portable => None,
            #[cfg(target_arch = "x86_64")]
            Registers::Avx2 => Some("AVX2"),
            #[cfg(target_arch = "x86_64")]
            Registers::Avx512 => Some("AVX-512"),
            #[cfg(target_arch = "x86_64")]
            Registers::Avx512Bf16 => Some(Precision::BF16_EXTENSION),
            #[cfg(target_arch = "aarch64")]
            Registers::Neon => Some("NEON"),
            #[cfg(target_arch = "aarch64")]
            Registers::NeonBf16 => Some(Precision::BF16_EXTENSION),
        }
    }

    /// What a step of k is.
    pub(super) fn precision(self) -> Precision {
        self.precision
    }

    /// Lanes of a register.
    pub(super) fn lanes(self) -> usize {
        match self.registers {
            Registers::Portable => 8,
            #[cfg(target_arch = "x86_64")]
            Registers::Avx2 => 8,
            #[cfg(target_arch = "x86_64")]
            Registers::Avx512 | Registers::Avx512Bf16 => 16,
            #[cfg(target_arch = "aarch64")]
            Registers::Neon | Registers::NeonBf16 => 4,
        }
    }

    /// Most rows of a tile.
    pub(super) fn rows(self) -> usize {
        TILE_ROWS
    }

    /// Most columns of a tile: with 6 rows, as many registers as leave some for A and B.
    pub(super) fn columns(self) -> usize {
        match self.registers {
            Registers::Portable => 8,
            #[cfg(target_arch = "x86_64")]
            Registers::Avx2 => 16,
            #[cfg(target_arch = "x86_64")]
            Registers::Avx512 | Registers::Avx512Bf16 => MOST_COLUMNS,
            #[cfg(target_arch = "aarch64")]
            Registers::Neon => 16,
            #[cfg(target_arch = "aarch64")]
            Registers::NeonBf16 => mmla::COLUMNS,
        }
    }

    /// Ends a sequence of streamed tiles: other threads see them from here on.
    pub(super) fn fence(self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every x86-64 processor has the instruction.
        unsafe {
            std::arch::x86_64::_mm_sfence();
        }
    }

    /// Computes a tile.
    ///
    /// # Safety
    /// The processor has the instructions; the tile's pointers reach all that its fields say.
    pub(super) unsafe fn run(self, tile: &Tile) {
        use Precision::{Bf16, F32};
        // SAFETY: passed on.
        unsafe {
            match (self.registers, self.precision) {
                (Registers::Portable, F32) => portable::<Float>(tile),
                (Registers::Portable, Bf16) => portable::<Widened>(tile),
                #[cfg(target_arch = "x86_64")]
                (Registers::Avx2, F32) => avx2::<Float>(tile),
                #[cfg(target_arch = "x86_64")]
                (Registers::Avx2, Bf16) => avx2::<Widened>(tile),
                #[cfg(target_arch = "x86_64")]
                (Registers::Avx512 | Registers::Avx512Bf16, F32) => avx512::<Float>(tile),
                #[cfg(target_arch = "x86_64")]
                (Registers::Avx512, Bf16) => avx512::<Widened>(tile),
                #[cfg(target_arch = "x86_64")]
                (Registers::Avx512Bf16, Bf16) => avx512_bf16(tile),
                #[cfg(target_arch = "aarch64")]
                (Registers::Neon | Registers::NeonBf16, F32) => neon::<Float>(tile),
                #[cfg(target_arch = "aarch64")]
                (Registers::Neon, Bf16) => neon::<Widened>(tile),
                #[cfg(target_arch = "aarch64")]
                (Registers::NeonBf16, Bf16) => mmla::run(tile),
            }
        }
    }
}

/// Picks the instance for the tile's size.
macro_rules! dispatch {
    ($vector:ty, $dot:ty, $tile:ident, $($vectors:literal),*) => {
        match $tile.columns.div_ceil(<$vector>::LANES) {
            $($vectors => match $tile.rows {
                // SAFETY: passed on.
                1 => unsafe { compute::<$vector, $dot, 1, $vectors>($tile) },
                2 => unsafe { compute::<$vector, $dot, 2, $vectors>($tile) },
                3 => unsafe { compute::<$vector, $dot, 3, $vectors>($tile) },
                4 => unsafe { compute::<$vector, $dot, 4, $vectors>($tile) },
                5 => unsafe { compute::<$vector, $dot, 5, $vectors>($tile) },
                _ => unsafe { compute::<$vector, $dot, 6, $vectors>($tile) },
            },)*
            _ => unreachable!("tiles have at most `Isa::columns` columns"),
        }
    };
}

unsafe fn portable<D: Dot<Eight>>(tile: &Tile) {
    dispatch!(Eight, D, tile, 1);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<D: Dot<std::arch::x86_64::__m256>>(tile: &Tile) {
    dispatch!(std::arch::x86_64::__m256, D, tile, 1, 2);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512<D: Dot<std::arch::x86_64::__m512>>(tile: &Tile) {
    dispatch!(std::arch::x86_64::__m512, D, tile, 1, 2, 3, 4);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn avx512_bf16(tile: &Tile) {
    dispatch!(std::arch::x86_64::__m512, Pair, tile, 1, 2, 3, 4);
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
unsafe fn neon<D: Dot<std::arch::aarch64::float32x4_t>>(tile: &Tile) {
    dispatch!(std::arch::aarch64::float32x4_t, D, tile, 1, 2, 3, 4);
}

#[inline(always)]
unsafe fn compute<V: Vector, D: Dot<V>, const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
    // SAFETY: the caller's promise covers every pointer below.
    unsafe {
        for i in 0..if tile.stream { 0 } else { ROWS } {
            for vector in 0..VECTORS {
                V::prefetch(tile.c.wrapping_add(i * tile.c_stride + vector * V::LANES));
            }
        }
        let mut sums = chain::<V, D, ROWS, VECTORS>([[V::splat(0.0); VECTORS]; ROWS], &tile.first);
        if let Some(second) = &tile.second {
            sums = chain::<V, D, ROWS, VECTORS>(sums, second);
        }
        for (i, sums) in sums.iter().enumerate() {
            write_row(tile, sums, tile.c.add(i * tile.c_stride));
        }
    }
}

/// Adds a stretch's products to the sums.
#[inline(always)]
unsafe fn chain<V: Vector, D: Dot<V>, const ROWS: usize, const VECTORS: usize>(
    mut sums: [[V; VECTORS]; ROWS],
    segment: &Segment,
) -> [[V; VECTORS]; ROWS] {
    // SAFETY: the caller's promise covers every pointer below.
    unsafe {
        let (mut a, mut b) = (segment.a, segment.b);
        for _ in 0..segment.steps {
            let row: [V; VECTORS] = std::array::from_fn(|v| V::load(b.add(v * V::LANES)));
            for (i, sums) in sums.iter_mut().enumerate() {
                let factor = V::splat(*a.add(i * segment.a_row_stride));
                for (sum, row) in sums.iter_mut().zip(row) {
                    *sum = D::dot(factor, row, *sum);
                }
            }
            a = a.wrapping_add(segment.a_step_stride);
            b = b.wrapping_add(segment.b_stride);
        }
        sums
    }
}
