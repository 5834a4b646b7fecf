//! A GPU that is none: host memory, the emulated kernels, and products with f32 sums, whose order
//! depends on their shape.
//!
//! An access outside of an allocation is found.
#![allow(unsafe_code)]

use std::alloc::Layout;
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use half::bf16;
use nibble::Result;
use nibble::kernels::cuda::driver::{Address, Argument, Driver, Gemm, Launch, Operand};
use nibble::plan::RegionType;

use crate::device::Device;
use crate::emulator::{self, Emulator};

/// When a copy of the second stream is made, or a kernel of the third one runs: any time from its
/// place in the queue to the wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copies {
    /// As early as it may be.
    AtOnce,
    /// As late as it may be.
    WhenAwaited,
    /// Never: a wait that is missing, for all who read or overwrite a slot.
    Never,
}

/// What is queued on the third stream.
enum Ahead {
    Kernel {
        kernel: &'static str,
        grid: [u32; 3],
        threads: u32,
        shared_bytes: u32,
        arguments: Vec<Argument>,
    },
    Copy {
        from: Address,
        to: Address,
        bytes: usize,
    },
}

/// A copy that is queued: from, to, bytes, slot.
type Copy = (Address, Address, usize, usize);

pub struct Emulated {
    emulator: &'static Emulator,
    copies: Copies,
    queue: Mutex<Vec<Copy>>,
    ahead: Mutex<Vec<Ahead>>,
    memory: Mutex<HashMap<Address, Layout>>,
    /// Of the device, without staging.
    allocated_bytes: AtomicU64,
}

/// What there is of memory.
const TOTAL_BYTES: u64 = 1 << 30;

impl Emulated {
    /// `None`, aloud, where the kernels cannot be compiled.
    pub fn new(copies: Copies) -> Option<Self> {
        let (memory, queue, ahead) = (Mutex::default(), Mutex::default(), Mutex::default());
        let allocated_bytes = AtomicU64::new(0);
        let emulator = emulator::emulator()?;
        Some(Emulated { emulator, copies, queue, ahead, memory, allocated_bytes })
    }

    /// Puts a copy behind all others of the second stream.
    fn copy_aside(&self, copy: Copy) -> Result<()> {
        self.queue.lock().unwrap().push(copy);
        if self.copies == Copies::AtOnce { self.await_copy(copy.3) } else { Ok(()) }
    }

    /// Puts it behind all others of the third stream.
    fn queue_ahead(&self, ahead: Ahead) -> Result<()> {
        self.ahead.lock().unwrap().push(ahead);
        if self.copies == Copies::AtOnce { self.await_ahead() } else { Ok(()) }
    }

    fn reserve(&self, bytes: usize) -> *mut u8 {
        let layout = Layout::from_size_align(bytes.max(1), 256).unwrap();
        // SAFETY: the layout is not empty.
        let start = unsafe { std::alloc::alloc(layout) };
        assert!(!start.is_null());
        // SAFETY: freshly allocated with this length.
        unsafe { start.write_bytes(0, bytes) };
        self.memory.lock().unwrap().insert(start as Address, layout);
        start
    }

    fn release(&self, address: Address) {
        let layout = self.memory.lock().unwrap().remove(&address).expect("was allocated");
        // SAFETY: allocated by `reserve` with this layout, and removed from the list.
        unsafe { std::alloc::dealloc(address as *mut u8, layout) };
    }

    /// The bytes at an address, which must lie in one allocation.
    #[allow(clippy::mut_from_ref)] // device memory is nobody's borrow
    fn bytes(&self, address: Address, bytes: usize) -> &mut [u8] {
        let memory = self.memory.lock().unwrap();
        let end = address + bytes as u64;
        let inside = |(&start, layout): (&Address, &Layout)| {
            start <= address && end <= start + layout.size() as u64
        };
        assert!(bytes == 0 || memory.iter().any(inside), "{bytes} bytes at {address:#x}");
        // SAFETY: inside an allocation; the backend uses one thread, one operation at a time.
        unsafe { std::slice::from_raw_parts_mut(address as *mut u8, bytes) }
    }

    /// `[rows, columns]` of an operand in f32, for matrix `batch`.
    fn operand(&self, operand: &Operand, [rows, columns]: [usize; 2], batch: usize) -> Vec<f32> {
        let stored = if operand.transposed { [columns, rows] } else { [rows, columns] };
        let elements = (stored[0] - 1) * operand.stride + stored[1];
        let start = operand.address + 2 * (batch * operand.batch_stride) as u64;
        let values: &[bf16] = bytemuck::cast_slice(self.bytes(start, 2 * elements));
        let at = |row: usize, column: usize| {
            let (row, column) = if operand.transposed { (column, row) } else { (row, column) };
            values[row * operand.stride + column].to_f32()
        };
        (0..rows * columns).map(|i| at(i / columns, i % columns)).collect()
    }
}

fn kernel_argument(argument: &Argument) -> emulator::Argument {
    match *argument {
        Argument::Pointer(address) => emulator::Argument::Pointer(address as *const _),
        Argument::I32(x) => emulator::Argument::I32(x),
        Argument::U32(x) => emulator::Argument::U32(x),
        Argument::I64(x) => emulator::Argument::I64(x),
        Argument::U64(x) => emulator::Argument::U64(x),
        Argument::F32(x) => emulator::Argument::F32(x),
        Argument::F64(x) => emulator::Argument::F64(x),
    }
}

impl Driver for Emulated {
    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.allocated_bytes.fetch_add(bytes.max(1) as u64, Relaxed);
        Ok(self.reserve(bytes) as Address)
    }

    fn free(&self, address: Address) {
        let bytes = self.memory.lock().unwrap()[&address].size();
        self.allocated_bytes.fetch_sub(bytes as u64, Relaxed);
        self.release(address);
    }

    fn allocate_staging(&self, bytes: usize) -> Result<*mut u8> {
        Ok(self.reserve(bytes))
    }

    fn free_staging(&self, staging: *mut u8, _bytes: usize) {
        self.release(staging as Address);
    }

    fn upload_staged(&self, from: *const u8, to: Address, bytes: usize) -> Result<()> {
        self.bytes(to, bytes).copy_from_slice(self.bytes(from as Address, bytes));
        Ok(())
    }

    fn upload(&self, from: &[u8], to: Address) -> Result<()> {
        self.bytes(to, from.len()).copy_from_slice(from);
        Ok(())
    }

    fn download(&self, from: Address, to: &mut [u8]) -> Result<()> {
        to.copy_from_slice(self.bytes(from, to.len()));
        Ok(())
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.bytes(to, bytes).copy_from_slice(self.bytes(from, bytes));
        Ok(())
    }

    fn copy_out(&self, from: Address, to: *mut u8, bytes: usize, slot: usize) -> Result<()> {
        self.copy_aside((from, to as Address, bytes, slot))
    }

    fn copy_in(&self, from: *const u8, to: Address, bytes: usize, slot: usize) -> Result<()> {
        self.copy_aside((from as Address, to, bytes, slot))
    }

    fn await_copy(&self, slot: usize) -> Result<()> {
        let mut queue = self.queue.lock().unwrap();
        // Copies are made in order: all up to the last one of this slot.
        let count = queue.iter().rposition(|copy| copy.3 == slot).map_or(0, |last| last + 1);
        for (from, to, bytes, _) in queue.drain(..count) {
            if self.copies != Copies::Never {
                self.bytes(to, bytes).copy_from_slice(self.bytes(from, bytes));
            }
        }
        Ok(())
    }

    fn finish_copy(&self, slot: usize) -> Result<()> {
        self.await_copy(slot)
    }

    fn zero(&self, to: Address, bytes: usize) -> Result<()> {
        self.bytes(to, bytes).fill(0);
        Ok(())
    }

    fn launch(&self, launch: Launch) -> Result<()> {
        let mut arguments: Vec<_> = launch.arguments.iter().map(kernel_argument).collect();
        let shared = launch.shared_bytes as usize;
        self.emulator.launch(launch.kernel, launch.grid, launch.threads, shared, &mut arguments);
        Ok(())
    }

    fn launch_ahead(&self, launch: Launch) -> Result<()> {
        let Launch { kernel, grid, threads, shared_bytes, arguments } = launch;
        let arguments = arguments.to_vec();
        self.queue_ahead(Ahead::Kernel { kernel, grid, threads, shared_bytes, arguments })
    }

    fn copy_ahead(&self, from: *const u8, to: Address, bytes: usize) -> Result<()> {
        self.queue_ahead(Ahead::Copy { from: from as Address, to, bytes })
    }

    fn await_ahead(&self) -> Result<()> {
        let due = std::mem::take(&mut *self.ahead.lock().unwrap());
        for ahead in due.into_iter().filter(|_| self.copies != Copies::Never) {
            match ahead {
                Ahead::Kernel { kernel, grid, threads, shared_bytes, mut arguments } => {
                    let arguments = &mut arguments[..];
                    self.launch(Launch { kernel, grid, threads, shared_bytes, arguments })?;
                }
                Ahead::Copy { from, to, bytes } => {
                    self.bytes(to, bytes).copy_from_slice(self.bytes(from, bytes));
                }
            }
        }
        Ok(())
    }

    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        let [m, n, k] = gemm.shape;
        let begin = first_term(gemm);
        for batch in 0..gemm.batches {
            let a = self.operand(&gemm.a, [m, k], batch);
            let b = self.operand(&gemm.b, [k, n], batch);
            let mut sums = vec![0f32; m * n];
            for (row, sums) in sums.chunks_exact_mut(n).enumerate() {
                for inner in (begin..k).chain(0..begin) {
                    let b = &b[inner * n..(inner + 1) * n];
                    let factor = a[row * k + inner];
                    sums.iter_mut().zip(b).for_each(|(sum, b)| *sum += factor * b);
                }
            }
            let size = gemm.c.dtype.bytes();
            let start = gemm.c.address + (size * batch * gemm.c.batch_stride) as u64;
            let bytes = self.bytes(start, size * ((m - 1) * gemm.c.stride + n));
            for (index, sum) in sums.iter().enumerate() {
                let at = index / n * gemm.c.stride + index % n;
                let result = |before: f32| match gemm.beta {
                    0.0 => gemm.alpha * sum,
                    beta => gemm.alpha * sum + beta * before,
                };
                if gemm.c.dtype == RegionType::F32 {
                    let c: &mut [f32] = bytemuck::cast_slice_mut(bytes);
                    c[at] = result(c[at]);
                } else {
                    let c: &mut [bf16] = bytemuck::cast_slice_mut(bytes);
                    c[at] = bf16::from_f32(result(c[at].to_f32()));
                }
            }
        }
        Ok(())
    }

    fn set_workspace(&self, address: Address, bytes: usize) -> Result<()> {
        assert!(address.is_multiple_of(256), "cublasSetWorkspace would refuse {address:#x}");
        self.bytes(address, bytes);
        Ok(())
    }

    fn memory(&self) -> Result<(u64, u64)> {
        Ok((TOTAL_BYTES - self.allocated_bytes.load(Relaxed), TOTAL_BYTES))
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}

/// Where a sum begins. A library has kernels for shapes, strides and alignments of operands, and each of them
/// sums in an order of its own.
fn first_term(gemm: &Gemm) -> usize {
    let [m, n, k] = gemm.shape;
    let alignment = |address: Address| 1 << address.trailing_zeros().min(4);
    let of_operand = |operand: &Operand| {
        2 * operand.stride + alignment(operand.address) + usize::from(operand.transposed)
    };
    let (a, b) = (of_operand(&gemm.a), of_operand(&gemm.b));
    let c = gemm.c.stride + alignment(gemm.c.address);
    (31 * m + 17 * n + 7 * k + 13 * a + 11 * b + 5 * c) % k
}

/// For `scripts/gpu_check.sh --rehearse`, which has its driver from there.
#[test]
fn is_compiled() {
    if Device::skips_on_a_card("the emulator") {
        return;
    }
    if let Some(library) = emulator::ptx_library(emulator::PTX) {
        println!("EMULATED {}", library.display());
    }
}
