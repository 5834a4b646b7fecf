//! The device under test: emulated, or with `NIBBLE_TEST_DEVICE=cuda` a card.
//!
//! Fresh memory is NaN in every type. Allocations and waits are counted. All tests of a process share
//! one card: a context of its own for each would be compiled for anew.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};

use nibble::error::{Error, Result};
use nibble::kernels::cuda::driver::{Address, Argument, Driver, Gemm, Launch};
use nibble::kernels::cuda::library::Gpu;

use crate::emulated::{Copies, Emulated};

/// f32 elements of cuBLAS' workspace, as a plan has it: with too few a product may fail.
pub const BLAS_WORKSPACE: usize = 8 << 20;

/// What was asked of the driver so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    pub allocations: usize,
    pub allocated_bytes: usize,
    pub waits: usize,
}

/// Work that was queued, to be queued again.
#[derive(Clone)]
pub enum Recorded {
    Launch {
        kernel: &'static str,
        grid: [u32; 3],
        threads: u32,
        shared_bytes: u32,
        arguments: Vec<Argument>,
    },
    Product(Gemm),
}

impl Recorded {
    fn launch(launch: &Launch) -> Self {
        let Launch { kernel, grid, threads, shared_bytes, ref arguments } = *launch;
        let arguments = arguments.to_vec();
        Recorded::Launch { kernel, grid, threads, shared_bytes, arguments }
    }

    /// The kernel, or which kind of product.
    pub fn name(&self) -> &'static str {
        match self {
            Recorded::Launch { kernel, .. } => kernel,
            Recorded::Product(gemm) if is_of_ranks(gemm) => "products of adapters",
            Recorded::Product(_) => "products",
        }
    }
}

/// A driver that is watched.
pub struct Device {
    driver: Arc<dyn Driver>,
    allocations: AtomicUsize,
    allocated_bytes: AtomicUsize,
    waits: AtomicUsize,
    /// The most bytes that one allocation may have.
    most_bytes: AtomicUsize,
    /// Launches until one finds no memory.
    launches_left: AtomicUsize,
    /// Weights that were dequantized, on the first stream and on the third.
    dequantized: [AtomicUsize; 2],
    copied_ahead: AtomicUsize,
    /// `[m, n, k]` of the products that are queued.
    products: Mutex<Vec<[usize; 3]>>,
    /// What is queued, while it is recorded.
    recorded: Mutex<Option<Vec<Recorded>>>,
    /// Whether the base model alone is computed, of weights that are wide already.
    bare: AtomicBool,
}

/// Ranks of an adapter, also of three side by side, are no more than this, all widths of a model more.
const MOST_RANKS: usize = 64;

/// Whether a product is of an adapter alone.
fn is_of_ranks(gemm: &Gemm) -> bool {
    gemm.shape.iter().any(|&size| size <= MOST_RANKS)
}

/// Whether a launch reads or writes nothing but an adapter, or what it adds to rows.
fn is_of_adapters(launch: &Launch) -> bool {
    let kernels = [
        "scale_columns",
        "diagonal",
        "stack_rows",
        "add_stacked",
        "mlp_adapters_project",
        "mlp_adapters_inner",
        "mlp_adapters_gradients",
    ];
    kernels.iter().any(|kernel| launch.kernel.starts_with(kernel))
}

/// What an MLP without adapters launches in place of a launch that has their share in it: kernel, rows and
/// arguments, of which the first ones are the same, and so is the width, behind the rows. No rows where
/// there is no h to make.
fn without_adapters(launch: &Launch) -> Option<(&'static str, u32, Vec<Argument>)> {
    let arguments = &launch.arguments;
    let (kernel, same, rows) = match launch.kernel {
        "mlp_adapters_forward_16" | "mlp_adapters_forward_32" => ("mlp_forward", 7, 9),
        "mlp_adapters_backward_16" | "mlp_adapters_backward_32" => ("mlp_backward", 11, 21),
        _ => return None,
    };
    let all = arguments[..same].iter().chain([&arguments[rows + 1]]).copied().collect();
    let Argument::I32(rows) = arguments[rows] else { panic!("rows are an int") };
    let is_wanted = !matches!(arguments[5], Argument::Pointer(0));
    Some((kernel, if is_wanted { rows as u32 } else { 0 }, all))
}

/// Whether tests run one after the other.
fn is_one_at_a_time() -> bool {
    let arguments: Vec<String> = std::env::args().collect();
    let asked = arguments.windows(2).any(|pair| pair == ["--test-threads", "1"]);
    asked
        || arguments.iter().any(|argument| argument == "--test-threads=1")
        || std::env::var("RUST_TEST_THREADS").is_ok_and(|threads| threads == "1")
}

impl Device {
    /// `None`, aloud, where kernels cannot be compiled for the emulator. A card that is asked for
    /// and missing fails the test.
    pub fn open() -> Option<Self> {
        Self::with(Copies::AtOnce)
    }

    /// The same, an emulator with copies of the second stream made when it says.
    pub fn with(copies: Copies) -> Option<Self> {
        let driver: Arc<dyn Driver> = if Self::is_a_card() {
            assert!(is_one_at_a_time(), "models share cuBLAS there: `--test-threads 1`");
            static CARD: OnceLock<Arc<Gpu>> = OnceLock::new();
            let open = || Arc::new(Gpu::open(0).expect("NIBBLE_TEST_DEVICE=cuda needs a card"));
            CARD.get_or_init(open).clone()
        } else {
            Arc::new(Emulated::new(copies)?)
        };
        Some(Self::watching(driver))
    }

    /// Whether a real card is under test, where `what` cannot be tried: that is printed.
    pub fn skips_on_a_card(what: &str) -> bool {
        let card = Self::is_a_card();
        if card {
            println!("skipped: {what}");
        }
        card
    }

    /// Whether a real card is under test.
    pub fn is_a_card() -> bool {
        match std::env::var("NIBBLE_TEST_DEVICE").as_deref() {
            Ok("cuda") => true,
            Ok(other) => panic!("NIBBLE_TEST_DEVICE is `{other}`, expected `cuda`"),
            Err(_) => false,
        }
    }

    fn watching(driver: Arc<dyn Driver>) -> Self {
        let zero = || AtomicUsize::new(0);
        let (allocations, allocated_bytes, waits) = (zero(), zero(), zero());
        let never = || AtomicUsize::new(usize::MAX);
        let (most_bytes, launches_left) = (never(), never());
        let products = Mutex::default();
        Device {
            driver,
            allocations,
            allocated_bytes,
            waits,
            most_bytes,
            launches_left,
            dequantized: [zero(), zero()],
            copied_ahead: zero(),
            products,
            recorded: Mutex::default(),
            bare: AtomicBool::new(false),
        }
    }

    /// The launches and products that `call` queues.
    pub fn record(&self, call: impl FnOnce()) -> Vec<Recorded> {
        *self.recorded.lock().unwrap() = Some(Vec::new());
        call();
        self.recorded.lock().unwrap().take().unwrap()
    }

    /// Queues it again.
    pub fn replay(&self, recorded: &Recorded) {
        match recorded.clone() {
            Recorded::Launch { kernel, grid, threads, shared_bytes, mut arguments } => {
                let arguments = &mut arguments[..];
                self.driver.launch(Launch { kernel, grid, threads, shared_bytes, arguments })
            }
            Recorded::Product(gemm) => self.driver.gemm(&gemm),
        }
        .unwrap();
    }

    fn note(&self, work: impl FnOnce() -> Recorded) {
        if let Some(recorded) = self.recorded.lock().unwrap().as_mut() {
            recorded.push(work());
        }
    }

    /// From now on, or no longer, leaves out what dequantizes weights and what is of adapters alone; products
    /// are without the columns that an adapter has in them. The numbers mean nothing then.
    pub fn set_bare(&self, bare: bool) {
        self.bare.store(bare, Relaxed);
    }

    fn is_bare(&self) -> bool {
        self.bare.load(Relaxed)
    }

    /// Lets no allocation have more than `bytes` from now on.
    pub fn limit(&self, bytes: usize) {
        self.most_bytes.store(bytes, Relaxed);
    }

    /// Lets one launch fail for want of memory, after `launches` that do not.
    pub fn fail_after(&self, launches: usize) {
        self.launches_left.store(launches, Relaxed);
    }

    /// Weights that were dequantized in their turn, and ahead of it.
    pub fn dequantized(&self) -> [usize; 2] {
        [0, 1].map(|stream| self.dequantized[stream].load(Relaxed))
    }

    /// Copies to the buffers of dequantized weights ahead of their turn.
    pub fn copied_ahead(&self) -> usize {
        self.copied_ahead.load(Relaxed)
    }

    /// `[m, n, k]` of all products since the last [`forget_products`](Self::forget_products).
    pub fn products(&self) -> Vec<[usize; 3]> {
        self.products.lock().unwrap().clone()
    }

    pub fn forget_products(&self) {
        self.products.lock().unwrap().clear();
    }

    pub fn counts(&self) -> Counts {
        Counts {
            allocations: self.allocations.load(Relaxed),
            allocated_bytes: self.allocated_bytes.load(Relaxed),
            waits: self.waits.load(Relaxed),
        }
    }
}

impl Driver for Device {
    fn allocate(&self, bytes: usize) -> Result<Address> {
        if bytes > self.most_bytes.load(Relaxed) {
            return Err(Error::budget(format_args!("cannot allocate {bytes} bytes")));
        }
        self.allocations.fetch_add(1, Relaxed);
        self.allocated_bytes.fetch_add(bytes, Relaxed);
        let address = self.driver.allocate(bytes)?;
        // All ones is a NaN in bf16, f32 and f64.
        self.driver.upload(&vec![0xff; bytes], address)?;
        Ok(address)
    }

    fn free(&self, address: Address) {
        self.driver.free(address);
    }

    fn allocate_staging(&self, bytes: usize) -> Result<*mut u8> {
        self.allocations.fetch_add(1, Relaxed);
        self.driver.allocate_staging(bytes)
    }

    fn free_staging(&self, staging: *mut u8, bytes: usize) {
        self.driver.free_staging(staging, bytes);
    }

    fn upload_staged(&self, from: *const u8, to: Address, bytes: usize) -> Result<()> {
        self.driver.upload_staged(from, to, bytes)
    }

    fn upload(&self, from: &[u8], to: Address) -> Result<()> {
        self.waits.fetch_add(1, Relaxed);
        self.driver.upload(from, to)
    }

    fn download(&self, from: Address, to: &mut [u8]) -> Result<()> {
        self.waits.fetch_add(1, Relaxed);
        self.driver.download(from, to)
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.driver.copy(from, to, bytes)
    }

    fn copy_out(&self, from: Address, to: *mut u8, bytes: usize, slot: usize) -> Result<()> {
        self.driver.copy_out(from, to, bytes, slot)
    }

    fn copy_in(&self, from: *const u8, to: Address, bytes: usize, slot: usize) -> Result<()> {
        self.driver.copy_in(from, to, bytes, slot)
    }

    fn await_copy(&self, slot: usize) -> Result<()> {
        self.driver.await_copy(slot)
    }

    fn finish_copy(&self, slot: usize) -> Result<()> {
        self.driver.finish_copy(slot)
    }

    fn zero(&self, to: Address, bytes: usize) -> Result<()> {
        self.driver.zero(to, bytes)
    }

    fn launch(&self, launch: Launch) -> Result<()> {
        let dequantizes = launch.kernel == "dequantize_4bit";
        if dequantizes {
            self.dequantized[0].fetch_add(1, Relaxed);
        }
        self.note(|| Recorded::launch(&launch));
        if self.is_bare() && (dequantizes || is_of_adapters(&launch)) {
            return Ok(());
        }
        if self.is_bare()
            && let Some((kernel, rows, mut arguments)) = without_adapters(&launch)
        {
            if rows == 0 {
                return Ok(());
            }
            let (grid, threads, arguments) = ([rows, 1, 1], 256, &mut arguments[..]);
            return self.driver.launch(Launch {
                kernel,
                grid,
                threads,
                shared_bytes: 0,
                arguments,
            });
        }
        match self.launches_left.load(Relaxed) {
            usize::MAX => self.driver.launch(launch),
            0 => {
                self.launches_left.store(usize::MAX, Relaxed);
                Err(Error::budget(format_args!("cannot launch {}", launch.kernel)))
            }
            left => {
                self.launches_left.store(left - 1, Relaxed);
                self.driver.launch(launch)
            }
        }
    }

    fn launch_ahead(&self, launch: Launch) -> Result<()> {
        assert_eq!(launch.kernel, "dequantize_4bit");
        self.dequantized[1].fetch_add(1, Relaxed);
        self.note(|| Recorded::launch(&launch));
        if self.is_bare() {
            return Ok(());
        }
        self.driver.launch_ahead(launch)
    }

    fn copy_ahead(&self, from: *const u8, to: Address, bytes: usize) -> Result<()> {
        self.copied_ahead.fetch_add(1, Relaxed);
        self.driver.copy_ahead(from, to, bytes)
    }

    fn await_ahead(&self) -> Result<()> {
        self.driver.await_ahead()
    }

    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        self.products.lock().unwrap().push(gemm.shape);
        self.note(|| Recorded::Product(*gemm));
        if self.is_bare() {
            let [m, n, k] = gemm.shape;
            if is_of_ranks(gemm) {
                return Ok(());
            }
            // Widths are multiples; what is more is an adapter's.
            let shape = [m, n, k / MOST_RANKS * MOST_RANKS];
            return self.driver.gemm(&Gemm { shape, ..*gemm });
        }
        self.driver.gemm(gemm)
    }

    fn set_workspace(&self, address: Address, bytes: usize) -> Result<()> {
        self.driver.set_workspace(address, bytes)
    }

    fn memory(&self) -> Result<(u64, u64)> {
        self.driver.memory()
    }

    fn synchronize(&self) -> Result<()> {
        self.waits.fetch_add(1, Relaxed);
        self.driver.synchronize()
    }
}
