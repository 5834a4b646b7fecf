//! The CUDA kernels, compiled for the CPU: `build.sh` makes a library of them, this opens it.
//!
//! There are two such libraries: of the sources, and of the committed PTX (`ptx/`). Each is built
//! once per state of what it is made of, in cargo's folder for tests. Without g++ [`devices`] prints why
//! and has none. `NIBBLE_EMULATED` names a library that [`devices`] has instead of both, such
//! as one with AddressSanitizer. With `NIBBLE_TEST_DEVICE=cuda` the committed PTX runs on the first GPU in the
//! emulator's place: the same test bodies, no compiler needed.
#![allow(unsafe_code)]

mod gpu;
mod ptx;

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use half::{bf16, f16};

/// The committed kernels.
pub const PTX: &str = include_str!("../../src/kernels/cuda/device/kernels.ptx");

type Launch = unsafe extern "C" fn(
    *const c_char,
    *const c_uint,
    *const c_uint,
    usize,
    *mut *mut c_void,
) -> c_int;
type Signature = unsafe extern "C" fn(*const c_char) -> *const c_char;
type SetOrder = unsafe extern "C" fn(c_int, c_uint);
type SetMemory = unsafe extern "C" fn(*const Range, usize, c_int);
type CountTraffic = unsafe extern "C" fn(c_int);
type NextTraffic = unsafe extern "C" fn(c_int, *mut u64) -> c_int;

/// What warps did at a line of the PTX: see traffic.hpp.
#[derive(Debug, Clone, Copy)]
pub struct Traffic {
    /// Of kernels.ptx.
    pub line: i32,
    /// Shared memory, or global.
    pub shared: bool,
    /// Or read.
    pub written: bool,
    /// Waits for a bank, or sectors of 32 bytes.
    pub cost: u64,
    /// As few as would do for what was accessed.
    pub fewest: u64,
}

/// Memory that a kernel may read, and write.
#[repr(C)]
struct Range {
    start: u64,
    end: u64,
    written: bool,
}

/// Something that runs the kernels.
pub enum Device {
    /// The CPU.
    Emulated(Emulator),
    /// A GPU, or the stand-in for its driver.
    Gpu(gpu::Gpu),
}

/// The kernels on the CPU.
pub struct Emulator {
    launch: Launch,
    signature: Signature,
    set_order: SetOrder,
    set_memory: SetMemory,
    count_traffic: CountTraffic,
    next_traffic: NextTraffic,
    _library: libloading::Library,
}

/// The order of the emulated threads of a block.
#[derive(Debug, Clone, Copy)]
pub enum Order {
    /// By index; shared memory starts as NaN, asynchronous copies are made at once.
    Up,
    /// From the last; copies are made when they are waited for.
    Down,
    /// Shuffled at every barrier.
    Seeded(u32),
}

/// All three kinds.
pub const ORDERS: [Order; 3] = [Order::Up, Order::Down, Order::Seeded(20_240_607)];

/// One argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub enum Argument {
    /// An address, for the emulator alone.
    Pointer(*const c_void),
    /// A buffer, and whether the kernel may write to it.
    Buffer {
        /// Its first byte.
        address: *const c_void,
        /// Its length.
        bytes: usize,
        /// Made of an exclusive slice.
        written: bool,
    },
    /// int.
    I32(i32),
    /// long long.
    I64(i64),
    /// unsigned.
    U32(u32),
    /// unsigned long long.
    U64(u64),
    /// float.
    F32(f32),
    /// double.
    F64(f64),
}

/// A null pointer.
pub const NULL: Argument = Argument::Pointer(std::ptr::null());

impl Argument {
    /// The letter of emulator.cpp for its kind.
    fn kind(&self) -> u8 {
        match self {
            Argument::Pointer(_) | Argument::Buffer { .. } => b'p',
            Argument::I32(_) | Argument::U32(_) => b'i',
            Argument::I64(_) | Argument::U64(_) => b'l',
            Argument::F32(_) => b'f',
            Argument::F64(_) => b'd',
        }
    }

    fn range(&self) -> Option<Range> {
        let Argument::Buffer { address, bytes, written } = *self else { return None };
        let start = address as u64;
        Some(Range { start, end: start + bytes as u64, written })
    }

    /// Whether nobody knows how much memory is there.
    fn is_unbounded(&self) -> bool {
        matches!(self, Argument::Pointer(address) if !address.is_null())
    }

    fn address(&mut self) -> *mut c_void {
        match self {
            Argument::Pointer(x) | Argument::Buffer { address: x, .. } => {
                std::ptr::from_mut(x).cast()
            }
            Argument::I32(x) => std::ptr::from_mut(x).cast(),
            Argument::I64(x) => std::ptr::from_mut(x).cast(),
            Argument::U32(x) => std::ptr::from_mut(x).cast(),
            Argument::U64(x) => std::ptr::from_mut(x).cast(),
            Argument::F32(x) => std::ptr::from_mut(x).cast(),
            Argument::F64(x) => std::ptr::from_mut(x).cast(),
        }
    }
}

macro_rules! argument_from {
    ($($type:ty => $variant:ident),*) => {$(
        impl From<$type> for Argument {
            fn from(x: $type) -> Self {
                Argument::$variant(x)
            }
        }
    )*};
}
argument_from!(i32 => I32, i64 => I64, u32 => U32, u64 => U64, f32 => F32, f64 => F64);

macro_rules! pointer_from {
    ($($type:ty),*) => {$(
        impl From<&[$type]> for Argument {
            fn from(x: &[$type]) -> Self {
                let (address, bytes) = (x.as_ptr().cast(), size_of_val(x));
                Argument::Buffer { address, bytes, written: false }
            }
        }
        impl From<&mut [$type]> for Argument {
            fn from(x: &mut [$type]) -> Self {
                let (address, bytes) = (x.as_mut_ptr().cast_const().cast(), size_of_val(x));
                Argument::Buffer { address, bytes, written: true }
            }
        }
    )*};
}
pointer_from!(u8, u16, u32, i32, f32, f64, bf16, f16);

/// Launches a kernel: `launch!(device, "name", [1, 1, 1], 256; a, b, ..)`.
#[allow(unused_macros)]
macro_rules! launch {
    ($device:expr, $kernel:expr, $grid:expr, $threads:expr; $($argument:expr),* $(,)?) => {
        launch!($device, $kernel, $grid, $threads, 0; $($argument),*)
    };
    ($device:expr, $kernel:expr, $grid:expr, $threads:expr, $shared:expr; $($argument:expr),* $(,)?) => {
        $device.launch($kernel, $grid, $threads, $shared, &mut [
            $($crate::emulator::Argument::from($argument)),*
        ])
    };
}
#[allow(unused_imports)]
pub(crate) use launch;

impl Device {
    /// The orders of threads that a test runs in: on a GPU its own, twice, as bits must not depend on it.
    pub fn orders(&self) -> &'static [Order] {
        match self {
            Device::Emulated(_) => &ORDERS,
            Device::Gpu(_) => &ORDERS[..2],
        }
    }

    /// Sets the order of this thread's launches; a GPU has its own.
    pub fn order(&self, order: Order) {
        if let Device::Emulated(emulator) = self {
            emulator.order(order);
        }
    }

    /// Runs `kernel`; buffers are as long as kernels.cu says, or this is undefined.
    ///
    /// # Panics
    /// When there is no such kernel, or it does not take the grid, block or kinds of arguments.
    pub fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        threads: u32,
        dynamic_shared_bytes: usize,
        arguments: &mut [Argument],
    ) {
        match self {
            Device::Emulated(emulator) => {
                emulator.launch(kernel, grid, threads, dynamic_shared_bytes, arguments);
            }
            Device::Gpu(gpu) => gpu.launch(kernel, grid, threads, dynamic_shared_bytes, arguments),
        }
    }
}

impl Emulator {
    /// Opens a library made by `build.sh`.
    pub fn open(path: &Path) -> Result<Self, libloading::Error> {
        // SAFETY: the library has no initialisers with effects; the types are emulator.cpp's.
        unsafe {
            let library = libloading::Library::new(path)?;
            let launch = *library.get::<Launch>(b"nibble_launch\0")?;
            let signature = *library.get::<Signature>(b"nibble_signature\0")?;
            let set_order = *library.get::<SetOrder>(b"nibble_emulation\0")?;
            let set_memory = *library.get::<SetMemory>(b"nibble_memory\0")?;
            let count_traffic = *library.get::<CountTraffic>(b"nibble_count_traffic\0")?;
            let next_traffic = *library.get::<NextTraffic>(b"nibble_traffic\0")?;
            Ok(Emulator {
                launch,
                signature,
                set_order,
                set_memory,
                count_traffic,
                next_traffic,
                _library: library,
            })
        }
    }

    /// Sets the order of this thread's launches.
    pub fn order(&self, order: Order) {
        let (order, seed) = match order {
            Order::Up => (0, 1),
            Order::Down => (1, 1),
            Order::Seeded(seed) => (2, seed),
        };
        // SAFETY: sets two thread-local numbers.
        unsafe { (self.set_order)(order, seed) };
    }

    /// What the launches in `run` did to memory, line by line; nothing for kernels that are no PTX.
    pub fn traffic(&self, run: impl FnOnce()) -> Vec<Traffic> {
        // SAFETY: sets what belongs to this thread.
        unsafe { (self.count_traffic)(1) };
        run();
        let (mut all, mut from) = (Vec::new(), 0);
        loop {
            let mut found = [0; 3];
            // SAFETY: writes three numbers.
            let place = unsafe { (self.next_traffic)(from, found.as_mut_ptr()) };
            if place == 0 {
                break;
            }
            let (line, shared, [written, cost, fewest]) = (place / 2, place % 2 == 1, found);
            all.push(Traffic { line, shared, written: written != 0, cost, fewest });
            from = place + 1;
        }
        // SAFETY: as above.
        unsafe { (self.count_traffic)(0) };
        all
    }

    /// As [`Device::launch`].
    pub fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        threads: u32,
        dynamic_shared_bytes: usize,
        arguments: &mut [Argument],
    ) {
        let name = CString::new(kernel).expect("names have no zero bytes");
        // SAFETY: takes a string and gives a static one or null.
        let signature = unsafe { (self.signature)(name.as_ptr()) };
        assert!(!signature.is_null(), "there is no kernel {kernel}");
        // SAFETY: not null, ends with a zero byte, lives as long as the library.
        let signature = unsafe { CStr::from_ptr(signature) }.to_str().expect("letters");
        let mut kinds: String = arguments.iter().map(|argument| argument.kind() as char).collect();
        if !signature.contains('p') {
            kinds = kinds.replace('p', "l"); // as PTX has it
        }
        assert_eq!(kinds, signature, "kinds of the arguments of {kernel}, and of its parameters");
        let ranges: Vec<Range> = arguments.iter().filter_map(Argument::range).collect();
        let ranges = if arguments.iter().any(Argument::is_unbounded) { &[][..] } else { &ranges };
        let finds_races = c_int::from(!ranges.is_empty());
        // SAFETY: copies the ranges.
        unsafe { (self.set_memory)(ranges.as_ptr(), ranges.len(), finds_races) };
        let mut addresses: Vec<*mut c_void> = arguments.iter_mut().map(Argument::address).collect();
        let block = [threads, 1, 1];
        // SAFETY: each argument outlives the call; types and bounds are the test's to get right.
        let status = unsafe {
            let (grid, block) = (grid.as_ptr(), block.as_ptr());
            (self.launch)(name.as_ptr(), grid, block, dynamic_shared_bytes, addresses.as_mut_ptr())
        };
        assert_ne!(status, 3, "{kernel}: threads race");
        assert_eq!(status, 0, "{kernel} with grid {grid:?} and {threads} threads");
    }
}

/// What tests of this process run on, each in its turn: the sources, the PTX as on a card whose driver is
/// the stand-in, and the PTX; none, with a printed line, where there is nothing.
pub fn devices() -> &'static [Device] {
    static DEVICES: OnceLock<Vec<Device>> = OnceLock::new();
    DEVICES.get_or_init(|| {
        if std::env::var_os("NIBBLE_TEST_DEVICE").is_some_and(|device| device == "cuda") {
            return vec![Device::Gpu(gpu::Gpu::open("libcuda.so.1".as_ref()))];
        }
        let emulated = |path: &PathBuf| Device::Emulated(open(path));
        let mut devices: Vec<Device> = library().iter().map(emulated).collect();
        if std::env::var_os("NIBBLE_EMULATED").is_none() {
            let library = ptx_library(PTX);
            devices.extend(library.iter().map(|path| Device::Gpu(gpu::Gpu::open(path))));
            devices.extend(library.iter().map(emulated));
        }
        devices
    })
}

/// The emulator of the committed PTX, whatever tests run on; `None`, with a printed line, without g++.
pub fn emulator() -> Option<&'static Emulator> {
    static EMULATOR: OnceLock<Option<Emulator>> = OnceLock::new();
    EMULATOR.get_or_init(|| ptx_library(PTX).as_deref().map(open)).as_ref()
}

fn open(path: &Path) -> Emulator {
    Emulator::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The library of the sources; `None`, with a printed line, without g++.
fn library() -> Option<PathBuf> {
    let build = || build("source", |command| command);
    std::env::var_os("NIBBLE_EMULATED").map(PathBuf::from).or_else(build)
}

/// The library of a PTX; `None` without g++.
pub fn ptx_library(ptx: &str) -> Option<PathBuf> {
    let translation = ptx::translate(ptx).unwrap_or_else(|e| panic!("{e}"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kernels.cpp");
    fs::write(&path, &translation).unwrap();
    build(&translation, |command| command.env("NIBBLE_TRANSLATION", &path).arg("-O1").arg("-w"))
}

/// The library of `kernels`, which is made by build.sh with what `set` adds.
fn build(kernels: &str, set: impl FnOnce(&mut Command) -> &mut Command) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut state = DefaultHasher::new();
    kernels.hash(&mut state);
    for folder in ["src/kernels/cuda/device", "quant/src/cuda", "tests/emulator"] {
        let mut files: Vec<PathBuf> =
            fs::read_dir(root.join(folder)).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let sources = ["cu", "cuh", "cpp", "hpp", "sh"];
        files.retain(|file| file.extension().is_some_and(|e| sources.iter().any(|s| e == *s)));
        for file in files {
            fs::read(file).unwrap().hash(&mut state);
        }
    }
    let name = format!("libnibble_emulated-{:016x}.so", state.finish());
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if library.exists() {
        return Some(library);
    }
    if Command::new("g++").arg("--version").output().is_err() {
        // Past the harness, which swallows what a passing test prints.
        let _ = std::io::stderr()
            .write_all(b"skipped: CUDA kernels on the CPU (g++ is not installed)\n");
        return None;
    }
    let script = root.join("tests/emulator/build.sh");
    let status = set(Command::new(script).arg(&library)).status().expect("bash runs build.sh");
    assert!(status.success(), "the emulator compiles");
    Some(library)
}
