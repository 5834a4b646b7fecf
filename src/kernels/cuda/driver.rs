//! What the backend needs of a GPU: memory, copies, launches by name, products, and waiting.
//!
//! Two implementations: [`super::library`] drives a card, the emulated one of the tests runs the
//! same kernels on the CPU. Everything is queued on one stream in order, unless it says that it
//! waits. Addresses are plain numbers; [`super::memory`] keeps them inside their allocations.

use crate::error::Result;
use crate::ledger::pinned;

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
    /// Where its value lies, as `cuLaunchKernel` takes it.
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

/// One launch.
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
    /// In the order of the declaration.
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

/// Where a product goes, row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product {
    /// First element.
    pub address: Address,
    /// Elements from one row to the next.
    pub stride: usize,
    /// f32 instead of bf16.
    pub wide: bool,
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
    pub c: Product,
    /// Products at once.
    pub batches: usize,
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

    /// The same from staging memory.
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
    fn launch_ahead(&self, launch: Launch, slot: usize) -> Result<()>;

    /// The same with a copy out of staging memory, which must stay as it is until it was awaited.
    ///
    /// # Errors
    /// What the driver reports.
    fn copy_ahead(&self, from: *const u8, to: Address, bytes: usize, slot: usize) -> Result<()>;

    /// What is queued from now on waits for the last kernel or copy of `slot`; the program does not.
    ///
    /// # Errors
    /// What the driver reports.
    fn await_ahead(&self, slot: usize) -> Result<()>;

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

/// Staging memory, counted; [`unpin`] gives it back.
///
/// # Errors
/// `Budget` when there is not enough.
pub(super) fn pin<D: Driver>(driver: &D, bytes: usize) -> Result<*mut u8> {
    let staging = driver.allocate_staging(bytes)?;
    pinned::add(bytes as u64);
    Ok(staging)
}

/// Gives staging memory back.
pub(super) fn unpin<D: Driver>(driver: &D, staging: *mut u8, bytes: usize) {
    driver.free_staging(staging, bytes);
    pinned::remove(bytes as u64);
}
