//! The driver's and cuBLAS' functions, found when the program runs.
//!
//! Only those that are used are declared, with the types of cuda.h and cublas_api.h. Nothing here is
//! needed to build or start the program; a missing library or function is an error that names it.
#![allow(unsafe_code)]
#![allow(clippy::type_complexity)] // C prototypes

use std::borrow::Cow;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt::Display;
use std::ptr;
use std::sync::OnceLock;

use libloading::Library;

use super::search::{self, DRIVER};
use crate::error::{Error, Result};

// cuda.h
const ERROR_OUT_OF_MEMORY: c_int = 2;
const ERROR_DEVICE_UNAVAILABLE: c_int = 46;
const ERROR_NO_DEVICE: c_int = 100;
const ERROR_NO_BINARY_FOR_GPU: c_int = 209;
const ERROR_INVALID_PTX: c_int = 218;
const ERROR_JIT_COMPILER_NOT_FOUND: c_int = 221;
const ERROR_UNSUPPORTED_PTX_VERSION: c_int = 222;
const ERROR_ILLEGAL_ADDRESS: c_int = 700;
const ERROR_LAUNCH_TIMEOUT: c_int = 702;
const ERROR_HARDWARE_STACK: c_int = 714;
const ERROR_LAUNCH_FAILED: c_int = 719;
const ERROR_SYSTEM_NOT_READY: c_int = 802;
const ERROR_DRIVER_MISMATCH: c_int = 803;
const ERROR_COMPAT_NOT_SUPPORTED: c_int = 804;
const ERROR_UNKNOWN: c_int = 999;

/// What the libraries hand out: contexts, streams, events, modules, functions.
pub(super) type Handle = *mut c_void;

macro_rules! functions {
    ($(#[$doc:meta])* $table:ident: $($field:ident = $symbol:literal ($($type:ty),*);)*) => {
        $(#[$doc])*
        pub(super) struct $table { $(pub(super) $field: unsafe extern "C" fn($($type),*) -> c_int,)* }

        impl $table {
            pub(super) fn load(library: &'static Library, name: &str) -> Result<Self> {
                $(
                    // SAFETY: the symbol has this prototype in the library's header.
                    let $field = unsafe {
                        *library
                            .get::<unsafe extern "C" fn($($type),*) -> c_int>(
                                concat!($symbol, "\0").as_bytes(),
                            )
                            .map_err(|e| Error::gpu(format_args!("{name} lacks {}: {e}", $symbol)))?
                    };
                )*
                Ok($table { $($field,)* })
            }
        }
    };
}

functions! {
    /// The functions of libcuda.
    CudaFunctions:
    init = "cuInit" (c_uint);
    driver_version = "cuDriverGetVersion" (*mut c_int);
    device_count = "cuDeviceGetCount" (*mut c_int);
    device_get = "cuDeviceGet" (*mut c_int, c_int);
    device_name = "cuDeviceGetName" (*mut c_char, c_int, c_int);
    device_memory = "cuDeviceTotalMem_v2" (*mut usize, c_int);
    device_attribute = "cuDeviceGetAttribute" (*mut c_int, c_int, c_int);
    context_retain = "cuDevicePrimaryCtxRetain" (*mut Handle, c_int);
    context_release = "cuDevicePrimaryCtxRelease_v2" (c_int);
    context_use = "cuCtxSetCurrent" (Handle);
    memory_info = "cuMemGetInfo_v2" (*mut usize, *mut usize);
    allocate = "cuMemAlloc_v2" (*mut u64, usize);
    free = "cuMemFree_v2" (u64);
    allocate_host = "cuMemHostAlloc" (*mut *mut c_void, usize, c_uint);
    free_host = "cuMemFreeHost" (*mut c_void);
    upload = "cuMemcpyHtoDAsync_v2" (u64, *const c_void, usize, Handle);
    download = "cuMemcpyDtoHAsync_v2" (*mut c_void, u64, usize, Handle);
    copy = "cuMemcpyDtoDAsync_v2" (u64, u64, usize, Handle);
    fill = "cuMemsetD8Async" (u64, u8, usize, Handle);
    stream_priorities = "cuCtxGetStreamPriorityRange" (*mut c_int, *mut c_int);
    stream_create = "cuStreamCreateWithPriority" (*mut Handle, c_uint, c_int);
    stream_destroy = "cuStreamDestroy_v2" (Handle);
    stream_wait_event = "cuStreamWaitEvent" (Handle, Handle, c_uint);
    event_create = "cuEventCreate" (*mut Handle, c_uint);
    event_destroy = "cuEventDestroy_v2" (Handle);
    event_record = "cuEventRecord" (Handle, Handle);
    event_wait = "cuEventSynchronize" (Handle);
    stream_wait = "cuStreamSynchronize" (Handle);
    module_load = "cuModuleLoadDataEx" (
        *mut Handle, *const c_void, c_uint, *mut c_int, *mut *mut c_void
    );
    module_unload = "cuModuleUnload" (Handle);
    module_function = "cuModuleGetFunction" (*mut Handle, Handle, *const c_char);
    function_attribute = "cuFuncSetAttribute" (Handle, c_int, c_int);
    launch = "cuLaunchKernel" (
        Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle,
        *mut *mut c_void, *mut *mut c_void
    );
    error_text = "cuGetErrorString" (c_int, *mut *const c_char);
}

functions! {
    /// The functions of libcublas.
    Cublas:
    create = "cublasCreate_v2" (*mut Handle);
    version = "cublasGetVersion_v2" (Handle, *mut c_int);
    destroy = "cublasDestroy_v2" (Handle);
    set_stream = "cublasSetStream_v2" (Handle, Handle);
    set_math_mode = "cublasSetMathMode" (Handle, c_int);
    set_workspace = "cublasSetWorkspace_v2" (Handle, *mut c_void, usize);
    gemm = "cublasGemmEx" (
        Handle, c_int, c_int, c_int, c_int, c_int, *const c_void, *const c_void, c_int, c_int,
        *const c_void, c_int, c_int, *const c_void, *mut c_void, c_int, c_int, c_int, c_int
    );
    gemm_batched = "cublasGemmStridedBatchedEx" (
        Handle, c_int, c_int, c_int, c_int, c_int, *const c_void, *const c_void, c_int, c_int, i64,
        *const c_void, c_int, c_int, i64, *const c_void, *mut c_void, c_int, c_int, i64, c_int,
        c_int, c_int
    );
}

impl CudaFunctions {
    /// An error for a code that is not zero, saying what could not be done.
    pub(super) fn check(&self, act: impl Display, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let what = format_args!("cannot {act}: {} (CUDA error {code})", self.text(code));
        Err(match code {
            ERROR_OUT_OF_MEMORY => Error::budget(what).hint(
                "lower `--max-length`, give a `--memory-budget`, free the GPU, or use \
                     `--device cpu`",
            ),
            ERROR_NO_BINARY_FOR_GPU | ERROR_INVALID_PTX | ERROR_UNSUPPORTED_PTX_VERSION => {
                Error::gpu(what).hint("update NVIDIA's driver: 525 or newer, for RTX 50 570")
            }
            ERROR_JIT_COMPILER_NOT_FOUND => Error::gpu(what).hint(
                "the driver's libnvidia-ptxjitcompiler is missing: in a container, set \
                 NVIDIA_DRIVER_CAPABILITIES=compute,utility",
            ),
            ERROR_LAUNCH_TIMEOUT => Error::gpu(what).hint(
                "the system ends kernels that hold up the screen for seconds: use a GPU that shows \
                 none, or raise the driver's limit (TdrDelay on Windows)",
            ),
            ERROR_DEVICE_UNAVAILABLE => Error::gpu(what).hint(
                "another process has the GPU to itself (`nvidia-smi -q -d COMPUTE` shows the mode): \
                 end it, or choose another by `--device cuda:N`",
            ),
            ERROR_NO_DEVICE => Error::gpu(what).hint(
                "is one hidden by CUDA_VISIBLE_DEVICES, or the container started without GPU access?",
            ),
            ERROR_SYSTEM_NOT_READY => Error::gpu(what).hint(
                "GPUs that are joined by NVSwitch need a service: start `nvidia-fabricmanager` of the \
                 driver's version",
            ),
            ERROR_DRIVER_MISMATCH => Error::gpu(what).hint(
                "the driver's library and its kernel module are of two versions, as after an update: \
                 restart the machine",
            ),
            ERROR_COMPAT_NOT_SUPPORTED => Error::gpu(what).hint(
                "a `cuda-compat` library that this card does not take is found before the driver's \
                 own: take its folder out of LD_LIBRARY_PATH",
            ),
            ERROR_UNKNOWN => Error::gpu(what).hint(
                "after the machine has slept, `sudo rmmod nvidia_uvm && sudo modprobe nvidia_uvm` or \
                 a restart helps",
            ),
            ERROR_ILLEGAL_ADDRESS | ERROR_HARDWARE_STACK..=ERROR_LAUNCH_FAILED => Error::gpu(what).hint(
                "a kernel before may have gone wrong: with `CUDA_LAUNCH_BLOCKING=1` it is named; \
                 please report it",
            ),
            _ => Error::gpu(what),
        })
    }

    /// An error where pinned memory of the host could not be had. That is no shortage on the GPU,
    /// which a smaller plan would answer by pinning more.
    pub(super) fn check_pinned(&self, bytes: usize, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let text = self.text(code);
        Err(Error::gpu(format_args!(
            "cannot pin {bytes} bytes of the host's memory: {text} (CUDA error {code})"
        ))
        .hint(
            "pin less: `--activations checkpoint`, `--embedding gpu`, `--weights resident`; WSL and \
             containers may allow little",
        ))
    }

    fn text(&self, code: c_int) -> Cow<'static, str> {
        let mut text: *const c_char = ptr::null();
        // SAFETY: writes a pointer to a static string, or null for an unknown code.
        unsafe { (self.error_text)(code, &mut text) };
        if text.is_null() {
            return "unknown error".into();
        }
        // SAFETY: a static string with a final zero.
        unsafe { CStr::from_ptr(text) }.to_string_lossy()
    }
}

/// The driver, initialised.
///
/// # Errors
/// `Gpu` when there is none or it refuses.
pub(super) fn open_driver() -> Result<&'static CudaFunctions> {
    static DRIVER_AT_WORK: OnceLock<CudaFunctions> = OnceLock::new();
    if let Some(cuda) = DRIVER_AT_WORK.get() {
        return Ok(cuda);
    }
    let found = search::open(&DRIVER, 0)?;
    let cuda = CudaFunctions::load(found.library, &found.name)?;
    // SAFETY: cuInit takes 0.
    let code = unsafe { (cuda.init)(0) };
    cuda.check("initialise the CUDA driver", code)?;
    Ok(DRIVER_AT_WORK.get_or_init(|| cuda))
}
