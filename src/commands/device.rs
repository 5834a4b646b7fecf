//! From `--device` to a backend.

use crate::cli::device::Device;
use crate::error::Result;
use crate::kernels::cuda::Cuda;
use crate::kernels::cuda::library::Gpu;

/// The GPU that is asked for; `None` for the CPU.
///
/// `auto` is the CPU: the CUDA backend has been tested on emulated kernels alone, and a run must
/// not depend on what was never seen to work.
///
/// # Errors
/// `Gpu` with the reason why the one that is asked for cannot be used.
pub fn open(device: Device) -> Result<Option<Cuda<Gpu>>> {
    let Device::Cuda(index) = device else { return Ok(None) };
    let gpu = Gpu::open(index).map_err(|error| error.at(format_args!("--device {device}")))?;
    eprintln!("{device}: this backend has not been confirmed on a card yet (docs/cuda.md)");
    Cuda::new(gpu).map(Some)
}
