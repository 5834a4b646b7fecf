//! What the backend needs of a GPU: memory, copies, launches by name, products, and waiting.
//!
//! Two implementations: [`super::library`] drives a card, the emulated one of the tests runs the
//! same kernels on the CPU. Everything is queued on one stream in order, unless it says that it
//! waits. Addresses are plain numbers; [`super::memory`] keeps them inside their allocations.

use crate::error::Result;
use crate::plan::RegionType;

/// An address in the device's memory.
pub type Address = u64;

/// One argument of a kernel, of the type that the kernel declares.
#[derive(Debug, Clone, Copy)]
pub enum Argument {
    /// Any pointer.
    Pointer(Address),
    /// `int`.
    I32(i32),
    /// `unsigned`.
    U32(u32),
    /// `long long`.
    I64(i64),
    /// `unsigned long long`.
    U64(u64),
    /// `float`.
    F32(f32),
    /// `double`.
    F64(f64),
}

impl Argument {
    /// Where the argument's value lies, as `cuLaunchKernel` takes it.
    pub fn as_pointer(&mut self) -> *mut std::ffi::c_void {
        match self {
            Argument::Pointer(x) | Argument::U64(x) => std::ptr::from_mut(x).cast(),
            Argument::I32(x) => std::ptr::from_mut(x).cast(),
            Argument::U32(x) => std::ptr::from_mut(x).cast(),
            Argument::I64(x) => std::ptr::from_mut(x).cast(),
            Argument::F32(x) => std::ptr::from_mut(x).cast(),
            Argument::F64(x) => std::ptr::from_mut(x).cast(),
        }
    }
}

/// A launch of a kernel.
#[derive(Debug)]
pub struct Launch<'a> {
    /// Name of the entry in kernels.cu.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory.
    pub shared_bytes: u32,
    /// The kernel's arguments, in the order of its declaration.
    pub arguments: &'a mut [Argument],
}

/// A bf16 operand of a product, row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operand {
    /// First element.
    pub address: Address,
    /// Elements from one stored row to the next.
    pub stride: usize,
    /// Whether the stored matrix is the transposed operand.
    pub transposed: bool,
    /// Elements from one matrix of a batch to the next.
    pub batch_stride: usize,
}

/// Where a [`Gemm`] writes its result, row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Output {
    /// First element.
    pub address: Address,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Element type.
    pub dtype: RegionType,
    /// Elements from one matrix of a batch to the next.
    pub batch_stride: usize,
}

/// `C[m, n] = alpha · A[m, k] · B[k, n] + beta · C` for each of `batches`, accumulated in f32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gemm {
    /// `[m, n, k]`.
    pub shape: [usize; 3],
    /// Factor on the product.
    pub alpha: f32,
    /// Left operand.
    pub a: Operand,
    /// Right operand.
    pub b: Operand,
    /// Factor on what C held; 0 does not read it.
    pub beta: f32,
    /// Result.
    pub c: Output,
    /// Products at once.
    pub batches: usize,
}

impl Gemm {
    /// `C = A · B`, once.
    pub fn new(shape: [usize; 3], a: Operand, b: Operand, c: Output) -> Self {
        Gemm { shape, alpha: 1.0, a, b, beta: 0.0, c, batches: 1 }
    }

    /// The product as several whose stored matrices span at most `most` elements each, but for a right
    /// operand that is stored transposed: the rows of C apart, sums over k one after the other.
    pub fn pieces(&self, most: usize) -> impl Iterator<Item = Gemm> + use<> {
        let Gemm { shape: [m, n, k], a, b, c, .. } = *self;
        let of_m = [(!a.transposed).then_some(a.stride), Some(c.stride)];
        let of_k = [a.transposed.then_some(a.stride), (!b.transposed).then_some(b.stride)];
        let most = if self.batches > 1 { usize::MAX } else { most };
        let (height, depth) = (rows_within(m, of_m, most), rows_within(k, of_k, most));
        let pairs = (0..m)
            .step_by(height)
            .flat_map(move |row| (0..k).step_by(depth).map(move |inner| (row, inner)));
        let whole = *self;
        pairs.map(move |(row, inner)| {
            let (a_from, b_from) = (a.element(row, inner), b.element(inner, 0));
            let size = c.dtype.bytes();
            Gemm {
                shape: [height.min(m - row), n, depth.min(k - inner)],
                a: Operand { address: a.address + 2 * a_from as u64, ..a },
                b: Operand { address: b.address + 2 * b_from as u64, ..b },
                beta: if inner == 0 { whole.beta } else { 1.0 },
                c: Output { address: c.address + (size * row * c.stride) as u64, ..c },
                ..whole
            }
        })
    }
}

impl Operand {
    /// Elements from the first one to that of this row and column.
    fn element(&self, row: usize, column: usize) -> usize {
        let (row, column) = if self.transposed { (column, row) } else { (row, column) };
        row * self.stride + column
    }
}

/// As many of `all` rows as span at most `most` elements of every matrix that has them.
fn rows_within(all: usize, strides: [Option<usize>; 2], most: usize) -> usize {
    /// Rows of which pieces are multiples: they then begin on 16 bytes, as tensor cores like them.
    const ALIGNED_ROWS: usize = 8;
    let longest = strides.into_iter().flatten().max().unwrap_or(0);
    if all * longest <= most {
        return all.max(1);
    }
    (most / longest / ALIGNED_ROWS * ALIGNED_ROWS).max(1)
}

/// A GPU.
pub trait Driver: Send + Sync + 'static {
    /// Which GPU it is.
    fn in_words(&self) -> String {
        "a GPU".to_string()
    }

    /// Device memory of any content, on 256 bytes.
    ///
    /// # Errors
    /// `Budget` when there is not enough.
    fn allocate(&self, bytes: usize) -> Result<Address>;

    /// Gives memory back, once all that was queued is done.
    fn free(&self, address: Address);

    /// Host memory that copies need not wait for, on 64 bytes, and that kernels can read at the same
    /// address; it lives as long as the driver.
    ///
    /// # Errors
    /// `Budget` when there is not enough.
    fn allocate_staging(&self, bytes: usize) -> Result<*mut u8>;

    /// Gives staging memory back.
    fn free_staging(&self, staging: *mut u8, bytes: usize);

    /// Queues a copy out of staging memory, which must stay as it is until the next wait.
    ///
    /// # Errors
    /// What the driver reports.
    fn upload_staged(&self, from: *const u8, to: Address, bytes: usize) -> Result<()>;

    /// Copies to the device, and waits.
    ///
    /// # Errors
    /// What the driver reports.
    fn upload(&self, from: &[u8], to: Address) -> Result<()>;

    /// Copies from the device after all that was queued: waits.
    ///
    /// # Errors
    /// What the driver reports, also about anything queued before.
    fn download(&self, from: Address, to: &mut [u8]) -> Result<()>;

    /// Queues a copy inside the device's memory.
    ///
    /// # Errors
    /// What the driver reports.
    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()>;

    /// Queues a copy to staging memory on a second stream. It begins after everything that was
    /// queued before; what is queued later runs beside it until
    /// [`await_copy`](Driver::await_copy). Copies of the second stream are made in order.
    ///
    /// # Errors
    /// What the driver reports.
    fn copy_out(&self, from: Address, to: *mut u8, bytes: usize, slot: usize) -> Result<()>;

    /// Queues a copy from staging memory on the second stream, as [`copy_out`](Driver::copy_out) does.
    ///
    /// # Errors
    /// What the driver reports.
    fn copy_in(&self, from: *const u8, to: Address, bytes: usize, slot: usize) -> Result<()>;

    /// What is queued from now on waits for the last copy of `slot`; the program does not.
    ///
    /// # Errors
    /// What the driver reports.
    fn await_copy(&self, slot: usize) -> Result<()>;

    /// Waits for the last copy of `slot`, and for nothing else.
    ///
    /// # Errors
    /// What the driver reports.
    fn finish_copy(&self, slot: usize) -> Result<()>;

    /// Queues zeroes.
    ///
    /// # Errors
    /// What the driver reports.
    fn zero(&self, to: Address, bytes: usize) -> Result<()>;

    /// Queues a kernel.
    ///
    /// # Errors
    /// What the driver reports.
    fn launch(&self, launch: Launch) -> Result<()>;

    /// Queues a kernel on a third stream. It begins after everything that was queued before on the
    /// first; what is queued later runs beside it until [`await_ahead`](Driver::await_ahead).
    /// Kernels of the third stream run in order.
    ///
    /// # Errors
    /// What the driver reports.
    fn launch_ahead(&self, launch: Launch) -> Result<()>;

    /// Queues a copy out of staging memory on the third stream, as [`launch_ahead`](Driver::launch_ahead)
    /// does; that memory must stay as it is until it was awaited.
    ///
    /// # Errors
    /// What the driver reports.
    fn copy_ahead(&self, from: *const u8, to: Address, bytes: usize) -> Result<()>;

    /// What is queued from now on waits for all that the third stream has; the program does not.
    ///
    /// # Errors
    /// What the driver reports.
    fn await_ahead(&self) -> Result<()>;

    /// Queues a product.
    ///
    /// # Errors
    /// What the library reports.
    fn gemm(&self, gemm: &Gemm) -> Result<()>;

    /// Memory for the library's products, on 256 bytes; from then on it allocates none of its own.
    ///
    /// # Errors
    /// What the library reports.
    fn set_workspace(&self, address: Address, bytes: usize) -> Result<()>;

    /// Free and total memory.
    ///
    /// # Errors
    /// What the driver reports.
    fn memory(&self) -> Result<(u64, u64)>;

    /// Waits for all that was queued.
    ///
    /// # Errors
    /// What went wrong in it.
    fn synchronize(&self) -> Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPERAND: Operand = Operand { address: 0, stride: 0, transposed: false, batch_stride: 0 };

    /// Every term of every sum of every element, by the addresses that it is made of.
    fn terms(gemm: &Gemm) -> Vec<[u64; 3]> {
        let Gemm { shape: [m, n, k], a, b, c, .. } = *gemm;
        let size = c.dtype.bytes();
        let term = |i: usize, j: usize, p: usize| {
            let to = c.address + (size * (i * c.stride + j)) as u64;
            let from = |operand: Operand, row, column| {
                operand.address + 2 * operand.element(row, column) as u64
            };
            [to, from(a, i, p), from(b, p, j)]
        };
        let cells = (0..m).flat_map(|i| (0..n).map(move |j| (i, j)));
        cells.flat_map(|(i, j)| (0..k).map(move |p| term(i, j, p))).collect()
    }

    #[test]
    fn pieces_have_the_terms_of_the_whole() {
        for [a_transposed, b_transposed] in [[false, true], [false, false], [true, false]] {
            let (m, n, k) = (37, 3, 41);
            let a_stride = if a_transposed { m } else { k } + 3;
            let b_stride = if b_transposed { k } else { n } + 5;
            let whole = Gemm {
                shape: [m, n, k],
                alpha: 0.5,
                a: Operand {
                    address: 1 << 20,
                    stride: a_stride,
                    transposed: a_transposed,
                    ..OPERAND
                },
                b: Operand {
                    address: 1 << 30,
                    stride: b_stride,
                    transposed: b_transposed,
                    ..OPERAND
                },
                beta: 0.25,
                c: Output {
                    address: 64,
                    stride: 7,
                    dtype: if a_transposed { RegionType::F32 } else { RegionType::Bf16 },
                    batch_stride: 0,
                },
                batches: 1,
            };
            assert_eq!(whole.pieces(1 << 31).collect::<Vec<_>>(), [whole]);
            let most = 400;
            let pieces: Vec<Gemm> = whole.pieces(most).collect();
            assert!(pieces.len() > 1);
            let mut all: Vec<_> = pieces.iter().flat_map(terms).collect();
            let mut expected = terms(&whole);
            all.sort();
            expected.sort();
            assert_eq!(all, expected);
            for piece in &pieces {
                let [m, n, k] = piece.shape;
                let span = |operand: &Operand, rows: usize, columns: usize| {
                    operand.element(rows - 1, columns - 1)
                };
                let inside = span(&piece.a, m, k) < most && (m - 1) * piece.c.stride + n <= most;
                assert!(inside && (b_transposed || span(&piece.b, k, n) < most), "{piece:?}");
                // What an element held counts once, before the first terms are added.
                let first = pieces.iter().find(|other| other.c.address == piece.c.address);
                assert_eq!(piece.beta, if first == Some(piece) { 0.25 } else { 1.0 });
            }
        }
    }
}
