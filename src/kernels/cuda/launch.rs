//! From Rust values to a launch.

use super::driver::Argument;
use super::memory::PARTIALS;
use crate::kernels::Write;

macro_rules! from {
    ($($type:ty => $variant:ident),*) => {$(
        impl From<$type> for Argument {
            fn from(x: $type) -> Self {
                Argument::$variant(x)
            }
        }
    )*};
}
from!(i32 => I32, u32 => U32, i64 => I64, u64 => U64, f32 => F32, f64 => F64);

impl From<bool> for Argument {
    fn from(flag: bool) -> Self {
        Argument::I32(flag.into())
    }
}

impl From<Write> for Argument {
    fn from(write: Write) -> Self {
        write.adds().into()
    }
}

/// `int` parameters: widths, strides, counts.
impl From<usize> for Argument {
    fn from(x: usize) -> Self {
        Argument::I32(x.try_into().expect("a width or stride fits an int"))
    }
}

/// Threads of the kernels that give a block to each row, at most.
const MOST_ROW_THREADS: u32 = 256;
/// Threads of the kernels whose blocks take turns.
pub const FLAT_THREADS: u32 = 256;
/// Blocks of those at most: a few for each multiprocessor.
const FLAT_BLOCKS: usize = 2048;

/// Grid of a kernel that gives a block to each row.
pub fn rows(rows: usize) -> [u32; 3] {
    [rows as u32, 1, 1]
}

/// Threads of such a kernel for rows of `width`: one for eight columns, in whole warps.
pub fn row_threads(width: usize) -> u32 {
    threads_for(width, MOST_ROW_THREADS)
}

/// [`row_threads`], `most` of them at most.
pub fn threads_for(width: usize, most: u32) -> u32 {
    const WARP: usize = 32;
    let threads = width.div_ceil(8).next_multiple_of(WARP).clamp(WARP, most as usize);
    threads as u32
}

/// Grid of a kernel whose blocks take turns through `elements`.
pub fn flat(elements: usize) -> [u32; 3] {
    [elements.div_ceil(FLAT_THREADS as usize).min(FLAT_BLOCKS) as u32, 1, 1]
}

/// Grid of the first stage of a sum over `elements`, which leaves a partial sum for each block.
pub fn partial_sums(elements: usize) -> [u32; 3] {
    let [blocks, ..] = flat(elements);
    [blocks.min(PARTIALS as u32), 1, 1]
}

/// Grid of a kernel whose blocks take turns through `rows` rows of a few columns, eight at a time.
pub fn columns(rows: usize, width: usize) -> [u32; 3] {
    flat(rows * width.div_ceil(8))
}

/// `elements` as rows of equal width, of 8 elements' multiple where that divides: for elementwise
/// kernels, to which rows mean nothing.
pub fn as_rows(elements: usize) -> (usize, usize) {
    const WIDEST: usize = 4096;
    let vectors = (1..=WIDEST / 8).rev().map(|pieces| 8 * pieces);
    let width = vectors.chain((1..8).rev()).find(|width| elements.is_multiple_of(*width));
    let width = width.unwrap_or(1);
    (elements / width, width)
}

/// `launch!(cuda, "name", grid, threads; a, b, ..)`: arguments as the kernel declares them.
macro_rules! launch {
    ($cuda:expr, $kernel:expr, $grid:expr, $threads:expr; $($argument:expr),* $(,)?) => {
        $cuda.launch($kernel, $grid, $threads, &mut [
            $($crate::kernels::cuda::driver::Argument::from($argument)),*
        ])
    };
}
pub(super) use launch;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_whole_warps_of_threads() {
        let threads = [0, 8, 257, 576, 2048, 2049, 14_336].map(row_threads);
        assert_eq!(threads, [32, 32, 64, 96, 256, 256, 256]);
        assert_eq!(threads_for(128_256, 1024), 1024);
    }

    #[test]
    fn rows_cover_all_elements() {
        for elements in [1, 7, 64, 4096, 4097, 576 * 13, 14_336 * 3, 1009] {
            let (rows, width) = as_rows(elements);
            assert_eq!(rows * width, elements);
            assert!(width <= 4096);
        }
        assert_eq!(as_rows(4096 * 5), (5, 4096));
        assert_eq!(as_rows(64 * 13), (1, 832));
    }
}
