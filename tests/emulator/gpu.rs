//! The same launches on a GPU, through its driver: buffers are copied there, between guards, and
//! what a kernel may write is copied back.

use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::sync::Mutex;

use super::Argument;

/// Poison before and after every buffer; also the alignment of what lies between.
const GUARD: usize = 256;
/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
const MAX_DYNAMIC_SHARED: c_int = 8;

type Address = u64;
type Handle = *mut c_void;

/// The first GPU with the kernels loaded.
pub struct Gpu {
    driver: libloading::Library,
    context: usize,
    module: usize,
    one_at_a_time: Mutex<()>,
}

/// Calls a function of the driver and panics with its name unless it returns 0.
macro_rules! call {
    ($driver:expr, $name:literal, ($($type:ty),*), $($argument:expr),*) => {{
        // SAFETY: the signature is that of the driver's documentation.
        let status = unsafe {
            let function = $driver
                .get::<unsafe extern "C" fn($($type),*) -> c_int>(concat!($name, "\0").as_bytes())
                .expect($name);
            function($($argument),*)
        };
        assert_eq!(status, 0, $name);
    }};
}

impl Gpu {
    /// Loads the driver and compiles the PTX.
    pub fn open() -> Self {
        // SAFETY: the driver's library.
        let driver = unsafe { libloading::Library::new("libcuda.so.1") }.expect("a CUDA driver");
        let (mut device, mut context, mut module) = (0, std::ptr::null_mut(), std::ptr::null_mut());
        call!(driver, "cuInit", (c_uint), 0);
        call!(driver, "cuDeviceGet", (*mut c_int, c_int), &mut device, 0);
        call!(driver, "cuDevicePrimaryCtxRetain", (*mut Handle, c_int), &mut context, device);
        call!(driver, "cuCtxSetCurrent", (Handle), context);
        let ptx = CString::new(super::PTX).expect("text");
        let text = ptx.as_ptr().cast();
        call!(driver, "cuModuleLoadData", (*mut Handle, *const c_void), &mut module, text);
        let (context, module) = (context as usize, module as usize);
        Gpu { driver, context, module, one_at_a_time: Mutex::new(()) }
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
        let mut copies: HashMap<*const c_void, Address> = HashMap::new();
        let mut values: Vec<u64> = Vec::new();
        for argument in arguments.iter() {
            values.push(match *argument {
                Argument::Pointer(address) => {
                    assert!(address.is_null(), "a buffer has a length");
                    0
                }
                Argument::Buffer { address, bytes, .. } => {
                    *copies.entry(address).or_insert_with(|| self.upload(address, bytes))
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
        let ([x, y, z], none) = (grid, std::ptr::null_mut());
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
            none,
            addresses.as_mut_ptr(),
            std::ptr::null_mut()
        );
        call!(self.driver, "cuCtxSynchronize", (),);
        for argument in arguments.iter() {
            let Argument::Buffer { address, bytes, written } = *argument else { continue };
            let Some(copy) = copies.remove(&address) else { continue };
            // The same buffer may be given twice, to be read and to be written.
            let same = |other: &Argument| {
                matches!(other,
                Argument::Buffer { address: a, written: true, .. } if *a == address)
            };
            self.download(kernel, copy, address, bytes, written || arguments.iter().any(same));
        }
    }

    /// A copy of a buffer between two guards.
    fn upload(&self, address: *const c_void, bytes: usize) -> Address {
        let mut image = vec![0xffu8; bytes + 2 * GUARD];
        // SAFETY: the argument was made of a slice of that many bytes.
        let data = unsafe { std::slice::from_raw_parts(address.cast::<u8>(), bytes) };
        image[GUARD..GUARD + bytes].copy_from_slice(data);
        let mut copy: Address = 0;
        call!(self.driver, "cuMemAlloc_v2", (*mut Address, usize), &mut copy, image.len());
        let from = image.as_ptr().cast();
        call!(
            self.driver,
            "cuMemcpyHtoD_v2",
            (Address, *const c_void, usize),
            copy,
            from,
            image.len()
        );
        copy + GUARD as Address
    }

    /// Frees a copy; its guards must be whole, and what was not to be written unchanged.
    fn download(
        &self,
        kernel: &str,
        copy: Address,
        address: *const c_void,
        bytes: usize,
        written: bool,
    ) {
        let start = copy - GUARD as Address;
        let mut image = vec![0u8; bytes + 2 * GUARD];
        let to = image.as_mut_ptr().cast();
        call!(
            self.driver,
            "cuMemcpyDtoH_v2",
            (*mut c_void, Address, usize),
            to,
            start,
            image.len()
        );
        call!(self.driver, "cuMemFree_v2", (Address), start);
        let whole = image[..GUARD].iter().chain(&image[GUARD + bytes..]).all(|&byte| byte == 0xff);
        assert!(whole, "{kernel} wrote beside a buffer");
        let data = &image[GUARD..GUARD + bytes];
        if written {
            // SAFETY: the argument was made of an exclusive slice of that many bytes.
            unsafe {
                std::ptr::copy_nonoverlapping(data.as_ptr(), address.cast_mut().cast(), bytes);
            }
        } else {
            // SAFETY: as above, shared.
            let before = unsafe { std::slice::from_raw_parts(address.cast::<u8>(), bytes) };
            assert!(data == before, "{kernel} wrote to what it reads");
        }
    }
}
