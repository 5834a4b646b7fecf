//! The same launches on a GPU, through its driver: buffers are copied there, between guards, and
//! what a kernel may write is copied back. The library that has the driver's functions may be their
//! stand-in, `driver.cpp`, too.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;

use super::Argument;

/// Poison before and after every buffer, at least; what lies between is aligned to it as it is here.
const GUARD: usize = 256;
/// Bytes of the compiler's words.
const LOG_BYTES: usize = 4096;
// cuda.h
const JIT_ERROR_LOG: c_int = 5;
const JIT_ERROR_LOG_BYTES: c_int = 6;
const MAX_DYNAMIC_SHARED: c_int = 8;
const STREAM_NON_BLOCKING: c_uint = 1;

type Address = u64;
type Handle = *mut c_void;

/// The first GPU with the kernels loaded.
pub struct Gpu {
    driver: libloading::Library,
    context: usize,
    module: usize,
    stream: usize,
    one_at_a_time: Mutex<()>,
}

/// Calls a function of the driver and returns its status.
macro_rules! status {
    ($driver:expr, $name:literal, ($($type:ty),*), $($argument:expr),*) => {
        // SAFETY: the signature is that of the driver's documentation.
        unsafe {
            let function = $driver
                .get::<unsafe extern "C" fn($($type),*) -> c_int>(concat!($name, "\0").as_bytes())
                .expect($name);
            function($($argument),*)
        }
    };
}

/// The same, and panics with its name unless it returns 0.
macro_rules! call {
    ($driver:expr, $name:literal, $types:tt, $($argument:expr),*) => {
        assert_eq!(status!($driver, $name, $types, $($argument),*), 0, $name)
    };
}

impl Gpu {
    /// Loads the driver and compiles the PTX.
    pub fn open(library: &Path) -> Self {
        // SAFETY: the driver's library.
        let driver = unsafe { libloading::Library::new(library) }.expect("a CUDA driver");
        let (mut device, mut context, mut module) = (0, std::ptr::null_mut(), std::ptr::null_mut());
        call!(driver, "cuInit", (c_uint), 0);
        call!(driver, "cuDeviceGet", (*mut c_int, c_int), &mut device, 0);
        call!(driver, "cuDevicePrimaryCtxRetain", (*mut Handle, c_int), &mut context, device);
        call!(driver, "cuCtxSetCurrent", (Handle), context);
        let ptx = CString::new(super::PTX).expect("text");
        let (text, mut log) = (ptx.as_ptr().cast(), vec![0u8; LOG_BYTES]);
        let mut options = [JIT_ERROR_LOG, JIT_ERROR_LOG_BYTES];
        let mut values: [Handle; 2] = [log.as_mut_ptr().cast(), LOG_BYTES as Handle];
        let status = status!(
            driver,
            "cuModuleLoadDataEx",
            (*mut Handle, *const c_void, c_uint, *mut c_int, *mut Handle),
            &mut module,
            text,
            2,
            options.as_mut_ptr(),
            values.as_mut_ptr()
        );
        assert_eq!(status, 0, "cuModuleLoadDataEx: {}", String::from_utf8_lossy(&log));
        let mut stream = std::ptr::null_mut();
        call!(
            driver,
            "cuStreamCreateWithPriority",
            (*mut Handle, c_uint, c_int),
            &mut stream,
            STREAM_NON_BLOCKING,
            0
        );
        let [context, module, stream] = [context, module, stream].map(|handle| handle as usize);
        Gpu { driver, context, module, stream, one_at_a_time: Mutex::new(()) }
    }

    /// Runs a kernel and waits for it; see [`Device::launch`](super::Device::launch).
    pub fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        threads: u32,
        dynamic_shared_bytes: usize,
        arguments: &mut [Argument],
    ) {
        let _guard = self.one_at_a_time.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        call!(self.driver, "cuCtxSetCurrent", (Handle), self.context as Handle);
        let (name, mut function) = (CString::new(kernel).unwrap(), std::ptr::null_mut());
        let module = self.module as Handle;
        call!(
            self.driver,
            "cuModuleGetFunction",
            (*mut Handle, Handle, *const c_char),
            &mut function,
            module,
            name.as_ptr()
        );
        let shared = dynamic_shared_bytes as c_int;
        call!(
            self.driver,
            "cuFuncSetAttribute",
            (Handle, c_int, c_int),
            function,
            MAX_DYNAMIC_SHARED,
            shared
        );
        let copies: Vec<Copied> =
            ranges(arguments).into_iter().map(|range| self.upload(range)).collect();
        let mut values: Vec<u64> = Vec::new();
        for argument in arguments.iter() {
            values.push(match *argument {
                Argument::Pointer(address) => {
                    assert!(address.is_null(), "a buffer has a length");
                    0
                }
                Argument::Buffer { address, .. } => {
                    let address = address as usize;
                    let here =
                        |copy: &&Copied| copy.host.start <= address && address <= copy.host.end;
                    let copy = copies.iter().find(here).expect("every buffer is in a copy");
                    copy.device + (address - copy.host.start) as Address
                }
                Argument::I32(x) => u64::from(x as u32),
                Argument::I64(x) => x as u64,
                Argument::U32(x) => u64::from(x),
                Argument::U64(x) => x,
                Argument::F32(x) => u64::from(x.to_bits()),
                Argument::F64(x) => x.to_bits(),
            });
        }
        // Little-endian: the first bytes of a word are the value of any smaller type.
        let mut addresses: Vec<*mut c_void> =
            values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
        let ([x, y, z], stream) = (grid, self.stream as Handle);
        call!(
            self.driver,
            "cuLaunchKernel",
            (
                Handle,
                c_uint,
                c_uint,
                c_uint,
                c_uint,
                c_uint,
                c_uint,
                c_uint,
                Handle,
                *mut *mut c_void,
                *mut *mut c_void
            ),
            function,
            x,
            y,
            z,
            threads,
            1,
            1,
            dynamic_shared_bytes as c_uint,
            stream,
            addresses.as_mut_ptr(),
            std::ptr::null_mut()
        );
        self.wait();
        for copy in copies {
            let written = arguments
                .iter()
                .filter(|argument| matches!(argument, Argument::Buffer { written: true, .. }));
            let written = written
                .filter_map(host_range)
                .filter(|range| copy.host.start <= range.start && range.end <= copy.host.end);
            let written: Vec<_> = written.collect();
            self.download(kernel, copy, &written);
        }
    }

    fn wait(&self) {
        call!(self.driver, "cuStreamSynchronize", (Handle), self.stream as Handle);
    }

    /// A copy of some memory of the host between two guards.
    fn upload(&self, host: Range<usize>) -> Copied {
        let lead = lead(&host);
        let mut image = vec![0xffu8; lead + host.len() + GUARD];
        // SAFETY: arguments were made of slices that fill the range.
        let data = unsafe { std::slice::from_raw_parts(host.start as *const u8, host.len()) };
        image[lead..lead + host.len()].copy_from_slice(data);
        let mut copy: Address = 0;
        call!(self.driver, "cuMemAlloc_v2", (*mut Address, usize), &mut copy, image.len());
        let from = image.as_ptr().cast();
        call!(
            self.driver,
            "cuMemcpyHtoDAsync_v2",
            (Address, *const c_void, usize, Handle),
            copy,
            from,
            image.len(),
            self.stream as Handle
        );
        self.wait();
        Copied { host, device: copy + lead as Address }
    }

    /// Frees a copy; its guards must be whole, and what is not in one of the ranges that were to be written
    /// unchanged.
    fn download(&self, kernel: &str, Copied { host, device }: Copied, written: &[Range<usize>]) {
        let (lead, bytes) = (lead(&host), host.len());
        let start = device - lead as Address;
        let mut image = vec![0u8; lead + bytes + GUARD];
        let to = image.as_mut_ptr().cast();
        call!(
            self.driver,
            "cuMemcpyDtoHAsync_v2",
            (*mut c_void, Address, usize, Handle),
            to,
            start,
            image.len(),
            self.stream as Handle
        );
        self.wait();
        call!(self.driver, "cuMemFree_v2", (Address), start);
        let whole = image[..lead].iter().chain(&image[lead + bytes..]).all(|&byte| byte == 0xff);
        assert!(whole, "{kernel} wrote beside a buffer");
        let data = &image[lead..lead + bytes];
        for range in written {
            let (to, own) =
                (range.start as *mut u8, &data[range.start - host.start..][..range.len()]);
            // SAFETY: the argument was made of an exclusive slice of that many bytes.
            unsafe { std::ptr::copy_nonoverlapping(own.as_ptr(), to, own.len()) };
        }
        // SAFETY: as in `upload`.
        let now = unsafe { std::slice::from_raw_parts(host.start as *const u8, bytes) };
        assert!(data == now, "{kernel} wrote to what it reads");
    }
}

/// Memory of the host, and where it is on the device.
struct Copied {
    host: Range<usize>,
    device: Address,
}

/// Bytes before the copy of what lies there.
fn lead(host: &Range<usize>) -> usize {
    GUARD + host.start % GUARD
}

/// Where a buffer lies.
fn host_range(argument: &Argument) -> Option<Range<usize>> {
    match *argument {
        Argument::Buffer { address, bytes, .. } => Some(address as usize..address as usize + bytes),
        _ => None,
    }
}

/// The memory of all buffers: those that touch or overlap are one, as a kernel may walk from one into the
/// other.
fn ranges(arguments: &[Argument]) -> Vec<Range<usize>> {
    let mut all: Vec<_> = arguments.iter().filter_map(host_range).collect();
    all.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<usize>> = Vec::new();
    for range in all {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}
