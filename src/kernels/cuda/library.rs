//! A real GPU. Every return code is looked at.
#![allow(unsafe_code)]

mod driver;

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_uint, c_void};
use std::fmt::Display;
use std::ptr;
use std::sync::mpsc;
use std::time::Duration;

use super::devices::{LOWEST_CAPABILITY, device_info, driver_version};
use super::driver::{Driver, Launch};
use super::functions::{Cublas, CudaFunctions, Handle, open_driver};
use super::search::{self, CUBLAS};
use super::stream::COPY_SLOTS;
use super::{adapted_mlp, attention};
use crate::error::{Error, Result};

/// The kernels, compiled for compute capability 8.0: every later card runs them.
const PTX: &str = include_str!("device/kernels.ptx");

// cuda.h
const FUNCTION_ATTRIBUTE_DYNAMIC_SHARED_BYTES: c_int = 8;
const FUNCTION_ATTRIBUTE_SHARED_CARVEOUT: c_int = 9;
const STREAM_NON_BLOCKING: c_uint = 1;
const EVENT_DISABLE_TIMING: c_uint = 2;
const JIT_ERROR_LOG_BUFFER: c_int = 5;
const JIT_ERROR_LOG_BUFFER_BYTES: c_int = 6;
// cublas_api.h
const CUBLAS_NOT_INITIALIZED: c_int = 1;
const CUBLAS_ALLOC_FAILED: c_int = 3;
const CUBLAS_ARCH_MISMATCH: c_int = 8;
const CUBLAS_EXECUTION_FAILED: c_int = 13;
const CUBLAS_INTERNAL_ERROR: c_int = 14;
const CUBLAS_NOT_SUPPORTED: c_int = 15;
/// Parts of a sum that several blocks made are added in f32, not in the result's bf16.
const MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: c_int = 16;

/// Free memory below which a library that fails is taken to have found none: it does not say so when
/// the code of a kernel, which is loaded when it is first used, has no room.
const SCARCE_BYTES: u64 = 128 << 20;
/// Most parameters of a kernel, with some to spare.
const MOST_ARGUMENTS: usize = 32;

/// One GPU at work.
pub struct Gpu {
    cuda: &'static CudaFunctions,
    cublas: Cublas,
    /// The file that it is.
    cublas_name: String,
    name: String,
    launch_flops: u64,
    index: usize,
    device: c_int,
    context: Handle,
    stream: Handle,
    /// The second stream, and events: what it waits for, and the last copy of each slot.
    copies: Handle,
    queued: Handle,
    copied: [Handle; COPY_SLOTS],
    /// The third stream, and the last that it has.
    ahead: Handle,
    prepared: Handle,
    blas: Handle,
    module: Handle,
    functions: HashMap<&'static str, Handle>,
}

// SAFETY: handles may be used from any thread once its context is current, which every call sees to;
// cuBLAS calls are made under `&self` by one model at a time.
unsafe impl Send for Gpu {}
// SAFETY: as above; the table of functions does not change.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// Opens device `index`, compiles the kernels for it and prepares cuBLAS.
    ///
    /// # Errors
    /// `Gpu` naming what is missing and what to do.
    pub fn open(index: usize) -> Result<Self> {
        let cuda = open_driver()?;
        let info = device_info(cuda, index as i32)
            .map_err(|error| error.or_hint("`nibble doctor` lists the GPUs"))?;
        if info.capability < LOWEST_CAPABILITY {
            let (name, (major, minor)) = (info.name, info.capability);
            let (lowest, minor_of_lowest) = LOWEST_CAPABILITY;
            return Err(Error::gpu(format_args!(
                "{name} has compute capability {major}.{minor}, expected \
                 {lowest}.{minor_of_lowest} or higher"
            ))
            .hint("use `--device cpu`"));
        }
        let found = search::open(&CUBLAS, driver_version(cuda)?.0)?;
        let cublas = Cublas::load(found.library, &found.name)?;
        let mut gpu = Gpu {
            cuda,
            cublas,
            cublas_name: found.name,
            name: info.name,
            launch_flops: attention::launch_flops(info.multiprocessors, info.has_kernel_timeout),
            index,
            device: index as c_int,
            context: ptr::null_mut(),
            stream: ptr::null_mut(),
            copies: ptr::null_mut(),
            queued: ptr::null_mut(),
            copied: [ptr::null_mut(); COPY_SLOTS],
            ahead: ptr::null_mut(),
            prepared: ptr::null_mut(),
            blas: ptr::null_mut(),
            module: ptr::null_mut(),
            functions: HashMap::new(),
        };
        gpu.prepare()?;
        gpu.load_kernels()?;
        Ok(gpu)
    }

    /// The product's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What a launch of flash attention may compute at most: [`Cuda::with_launches_of`].
    ///
    /// [`Cuda::with_launches_of`]: super::Cuda::with_launches_of
    pub fn launch_flops(&self) -> u64 {
        self.launch_flops
    }

    fn prepare(&mut self) -> Result<()> {
        let (mut last, mut first) = (0, 0);
        // SAFETY: out-pointers are valid; each handle is made before it is used, and freed by `drop`.
        unsafe {
            let code = (self.cuda.device_get)(&mut self.device, self.device);
            self.cuda.check("open the device", code)?;
            let code = (self.cuda.context_retain)(&mut self.context, self.device);
            self.cuda.check("use the device", code)?;
            self.enter()?;
            let code = (self.cuda.stream_priorities)(&mut last, &mut first);
            self.cuda.check("read the priorities of streams", code)?;
            // What is dequantized ahead gets the multiprocessors that a product leaves, not those that it
            // is waiting for.
            for (stream, priority) in
                [(&mut self.stream, first), (&mut self.copies, first), (&mut self.ahead, last)]
            {
                let code = (self.cuda.stream_create)(stream, STREAM_NON_BLOCKING, priority);
                self.cuda.check("make a stream", code)?;
            }
            for event in self.copied.iter_mut().chain([&mut self.prepared, &mut self.queued]) {
                let code = (self.cuda.event_create)(event, EVENT_DISABLE_TIMING);
                self.cuda.check("make an event", code)?;
            }
            let code = (self.cublas.create)(&mut self.blas);
            self.check_blas("start cuBLAS", code)?;
            let mode = MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
            self.check_blas("set its precision", (self.cublas.set_math_mode)(self.blas, mode))?;
            self.check_blas("use a stream", (self.cublas.set_stream)(self.blas, self.stream))
        }
    }

    /// Compiles the kernels for the card, or takes what the driver kept of the last time, and looks
    /// all of them up: a kernel that is loaded in the middle of a run might find no memory.
    fn load_kernels(&mut self) -> Result<()> {
        let (done, waiting) = mpsc::channel();
        let what = format!("compiling the kernels for {}; the driver keeps them", self.name);
        std::thread::scope(|scope| {
            let tell = move || {
                let patience = Duration::from_secs(1);
                if waiting.recv_timeout(patience) == Err(mpsc::RecvTimeoutError::Timeout) {
                    eprintln!("{what}");
                }
            };
            // Without the thread nobody is told; nothing else is lost.
            let _ = std::thread::Builder::new().spawn_scoped(scope, tell);
            let result = self.compile();
            let _ = done.send(());
            result
        })?;
        let shared: HashMap<_, _> =
            attention::shared_bytes().chain(adapted_mlp::shared_bytes()).collect();
        for kernel in kernels() {
            let name = CString::new(kernel).expect("names have no zero bytes");
            let mut function = ptr::null_mut();
            // SAFETY: the module is loaded, the name ends with a zero.
            let code =
                unsafe { (self.cuda.module_function)(&mut function, self.module, name.as_ptr()) };
            self.cuda.check(format_args!("find kernel {kernel}"), code)?;
            if let Some(&bytes) = shared.get(kernel) {
                let attributes = [
                    (FUNCTION_ATTRIBUTE_DYNAMIC_SHARED_BYTES, bytes as c_int),
                    // Per cent: as many blocks as fit, whatever the driver would guess.
                    (FUNCTION_ATTRIBUTE_SHARED_CARVEOUT, 100),
                ];
                for (attribute, value) in attributes {
                    // SAFETY: a function of the loaded module.
                    let code =
                        unsafe { (self.cuda.function_attribute)(function, attribute, value) };
                    self.cuda.check(format_args!("give {kernel} its shared memory"), code)?;
                }
            }
            self.functions.insert(kernel, function);
        }
        Ok(())
    }

    fn compile(&mut self) -> Result<()> {
        let ptx = CString::new(PTX).expect("PTX is text");
        let mut log = vec![0u8; 4096];
        let mut options = [JIT_ERROR_LOG_BUFFER, JIT_ERROR_LOG_BUFFER_BYTES];
        let mut values = [log.as_mut_ptr().cast(), log.len() as *mut c_void];
        self.enter()?;
        // SAFETY: the PTX ends with a zero; as many values as options, the log as long as is said.
        let code = unsafe {
            (self.cuda.module_load)(
                &mut self.module,
                ptx.as_ptr().cast(),
                options.len() as c_uint,
                options.as_mut_ptr(),
                values.as_mut_ptr(),
            )
        };
        let log = String::from_utf8_lossy(&log);
        let log = log.trim_end_matches('\0').trim();
        let separator = if log.is_empty() { "" } else { ": " };
        self.cuda.check(format_args!("compile the kernels{separator}{log}"), code)
    }

    /// Queues `work` on another stream: behind what the first one has, and marked by `done`.
    fn aside(
        &self,
        stream: Handle,
        done: Handle,
        work: impl FnOnce(Handle) -> Result<()>,
    ) -> Result<()> {
        self.enter()?;
        // SAFETY: both streams and the events are alive.
        unsafe {
            let code = (self.cuda.event_record)(self.queued, self.stream);
            self.cuda.check("mark the work on the GPU", code)?;
            let code = (self.cuda.stream_wait_event)(stream, self.queued, 0);
            self.cuda.check("order work on the GPU", code)?;
            work(stream)?;
            let code = (self.cuda.event_record)(done, stream);
            self.cuda.check("mark the end of work", code)
        }
    }

    /// What the first stream gets from now on waits for `done`.
    fn wait_for(&self, done: Handle) -> Result<()> {
        self.enter()?;
        // SAFETY: stream and event are alive; an event that was never recorded is no wait.
        let code = unsafe { (self.cuda.stream_wait_event)(self.stream, done, 0) };
        self.cuda.check("wait for another stream", code)
    }

    /// Waits for all that a stream has.
    fn finish(&self, stream: Handle) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream is alive.
        let code = unsafe { (self.cuda.stream_wait)(stream) };
        self.cuda.check("finish work on the GPU", code)
    }

    /// Waits for all that is queued.
    fn finish_all(&self) -> Result<()> {
        let streams = [self.stream, self.copies, self.ahead];
        streams.into_iter().try_for_each(|stream| self.finish(stream))
    }

    fn launch_on(&self, stream: Handle, launch: Launch) -> Result<()> {
        let Launch { kernel, grid: [x, y, z], threads, shared_bytes, arguments } = launch;
        let function = *self
            .functions
            .get(kernel)
            .ok_or_else(|| Error::gpu(format_args!("there is no kernel {kernel}")))?;
        let mut pointers = [ptr::null_mut(); MOST_ARGUMENTS];
        for (pointer, argument) in pointers[..arguments.len()].iter_mut().zip(arguments) {
            *pointer = argument.as_pointer();
        }
        let (parameters, extra) = (pointers.as_mut_ptr(), ptr::null_mut());
        // SAFETY: the arguments have the types that the kernel declares (tested with the same
        // sources on the CPU) and are copied before the call returns.
        let code = unsafe {
            (self.cuda.launch)(
                function,
                x,
                y,
                z,
                threads,
                1,
                1,
                shared_bytes,
                stream,
                parameters,
                extra,
            )
        };
        self.cuda.check(format_args!("launch {kernel}"), code)
    }

    /// Makes the context this thread's.
    fn enter(&self) -> Result<()> {
        // SAFETY: the context is retained until `drop`.
        let code = unsafe { (self.cuda.context_use)(self.context) };
        self.cuda.check("use the GPU's context", code)
    }

    fn check_blas(&self, act: impl Display, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let mut version = 0;
        // SAFETY: the out-pointer is valid; without a handle the library says so.
        unsafe { (self.cublas.version)(self.blas, &mut version) };
        let what = format_args!("cannot {act}: status {code} of cuBLAS {version}");
        // A kernel that went wrong before shows in whatever is asked for next.
        self.synchronize().map_err(|error| error.at(what))?;
        let scarce = || matches!(self.memory(), Ok((free, _)) if free < SCARCE_BYTES);
        Err(match code {
            CUBLAS_ALLOC_FAILED => Error::budget(what),
            CUBLAS_NOT_INITIALIZED | CUBLAS_EXECUTION_FAILED | CUBLAS_INTERNAL_ERROR
                if scarce() =>
            {
                Error::budget(what).hint("leave more of the GPU free with `--memory-budget`")
            }
            CUBLAS_ARCH_MISMATCH | CUBLAS_EXECUTION_FAILED | CUBLAS_NOT_SUPPORTED => {
                Error::gpu(what).hint(format_args!(
                    "{} may be older than the card (RTX 50 needs 12.8): set NIBBLE_CUDA_LIB_DIR to \
                     the folder of a newer one",
                    self.cublas_name
                ))
            }
            _ => Error::gpu(what),
        })
    }
}

/// Names of the kernels in the PTX.
fn kernels() -> impl Iterator<Item = &'static str> {
    let name = |line: &'static str| line.strip_prefix(".visible .entry ")?.split('(').next();
    PTX.lines().filter_map(name)
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.context.is_null() {
            return;
        }
        // SAFETY: each handle was made by `prepare`, is not used afterwards, and is null where it
        // was not made.
        unsafe {
            (self.cuda.context_use)(self.context);
            if !self.blas.is_null() {
                (self.cublas.destroy)(self.blas);
            }
            let streams = [self.stream, self.copies, self.ahead];
            for stream in streams.into_iter().filter(|x| !x.is_null()) {
                (self.cuda.stream_destroy)(stream);
            }
            if !self.module.is_null() {
                (self.cuda.module_unload)(self.module);
            }
            let events = self.copied.into_iter().chain([self.prepared, self.queued]);
            for event in events.filter(|x| !x.is_null()) {
                (self.cuda.event_destroy)(event);
            }
            (self.cuda.context_release)(self.device);
        }
    }
}
