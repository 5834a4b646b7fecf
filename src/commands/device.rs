//! From `--device` and `--attn-implementation` to a backend.

use crate::cli::device::{Device, DeviceArgs};
use crate::error::{Error, Result};
use crate::kernels::cuda::library::Gpu;
use crate::kernels::cuda::{AttnImplementation, Cuda};

/// The GPU that is asked for; `None` for the CPU.
///
/// `auto` is the CPU: the CUDA backend has been tested on emulated kernels alone, and a run must
/// not depend on what was never seen to work.
///
/// # Errors
/// `Gpu` with the reason why the one that is asked for cannot be used, `Usage` for flash attention
/// on the CPU.
pub fn open(args: &DeviceArgs) -> Result<Option<Cuda<Gpu>>> {
    check(args)?;
    let Device::Cuda(index) = args.device else { return Ok(None) };
    let device = args.device;
    let gpu = Gpu::open(index).map_err(|error| error.at(format_args!("--device {device}")))?;
    eprintln!("{device}: this backend has not been confirmed on a card yet (docs/cuda.md)");
    let cuda = Cuda::new(gpu)?.with_attention(args.attn_implementation);
    Ok(Some(cuda.with_embedding(args.embedding)))
}

/// Whether the device has what is asked for.
///
/// # Errors
/// `Usage` for flash attention on the CPU.
pub fn check(args: &DeviceArgs) -> Result<()> {
    match (args.device, args.attn_implementation) {
        (Device::Auto | Device::Cpu, AttnImplementation::Flash) => {
            Err(Error::usage("`--attn-implementation flash` is a path of the CUDA backend")
                .hint("leave it out: the CPU has one path, or use `--device cuda`"))
        }
        _ => Ok(()),
    }
}
