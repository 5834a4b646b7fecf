//! From `--device` and what goes with it to a backend.

use nibble_quant::product::Precision;

use crate::byte_size::ByteSize;
use crate::cli::device::{Device, DeviceArgs};
use crate::error::{Error, Result};
use crate::kernels::Storage;
use crate::kernels::cpu::Cpu;
use crate::kernels::cuda::devices::{self, driver_info};
use crate::kernels::cuda::driver::Driver;
use crate::kernels::cuda::library::Gpu;
use crate::kernels::cuda::search;
use crate::kernels::cuda::{AttnImplementation, Cuda};
use crate::plan::EmbeddingPlace;
use crate::train::agreement;
use crate::train::backend::Surroundings;

/// The GPU that is asked for, or with `auto` found; `None` for the CPU. It has computed as the CPU does, by
/// [`agreement::check`].
///
/// # Errors
/// `Gpu` with the reason why the one that is asked for cannot be used, `Usage` for what only a GPU
/// has. With `auto` the reason is told, and the CPU taken.
pub fn open(args: &DeviceArgs) -> Result<Option<Cuda<Gpu>>> {
    let device = resolve(args)?;
    let Device::Cuda(index) = device else { return Ok(None) };
    let flash = args.attn_implementation == AttnImplementation::Flash;
    match open_gpu(args, index) {
        Ok(gpu) => Ok(Some(gpu)),
        Err(error) if args.device == Device::Auto && !flash => {
            eprintln!("{}", error.at(format_args!("the CPU is used, not cuda:{index}")));
            Ok(None)
        }
        Err(error) => Err(error.at(format_args!("--device {device}"))),
    }
}

/// The CPU, with products as they are asked for. Where the processor is slower in bf16, that is told.
pub fn cpu(args: &DeviceArgs) -> Cpu {
    let precision = match args.bf16 {
        Some(true) => Precision::Bf16,
        _ => Precision::F32,
    };
    if precision == Precision::Bf16 && !precision.is_fast() {
        let extension = Precision::BF16_EXTENSION;
        eprintln!("note: `--bf16` is slower than f32 on this processor, which has no {extension}");
    }
    Cpu { precision }
}

/// Whether the CPU computes in f32 although nobody asked for it, and it is made for bf16.
pub fn would_be_faster_in_bf16(args: &DeviceArgs) -> bool {
    args.bf16.is_none() && Precision::Bf16.is_fast()
}

fn open_gpu(args: &DeviceArgs, index: usize) -> Result<Cuda<Gpu>> {
    let gpu = Gpu::open(index)?;
    let launch_flops = gpu.launch_flops();
    let cuda = Cuda::new(gpu)?.with_attention(args.attn_implementation);
    let cuda = cuda.with_launches_of(launch_flops);
    let verdict = verify(&cuda)?;
    cuda.forget_plan();
    let (free, total) = cuda.driver().memory()?;
    let (name, free, total) = (cuda.driver().name(), ByteSize(free), ByteSize(total));
    eprintln!("cuda:{index}: {name}, {free} of {total} free, {verdict}");
    Ok(cuda.with_on_host(args.embedding.on_host()))
}

/// What a GPU's results are found to be. With `NIBBLE_UNVERIFIED_GPU=1` wrong ones are no error: for
/// `scripts/gpu_check.sh` alone, which measures the rest of such a GPU and says so.
fn verify(cuda: &Cuda<Gpu>) -> Result<&'static str> {
    match agreement::check(cuda) {
        Ok(()) => Ok("computes as the CPU does"),
        Err(error) if std::env::var_os("NIBBLE_UNVERIFIED_GPU").is_some_and(|it| it == "1") => {
            eprintln!("{}", error.at("warning: results are wrong"));
            Ok("DOES NOT compute as the CPU does")
        }
        Err(error) => Err(error),
    }
}

/// Where a run is planned: with `auto` on the first GPU that Nibble has kernels for, and on the CPU
/// where there is none, or bf16 is not wanted.
///
/// # Errors
/// `Usage` for what only a GPU has.
pub fn resolve(args: &DeviceArgs) -> Result<Device> {
    let device = match args.device {
        Device::Auto if args.bf16 == Some(false) => Device::Cpu,
        Device::Auto => first_gpu().map_or(Device::Cpu, Device::Cuda),
        device => device,
    };
    if device == Device::Cpu && args.attn_implementation == AttnImplementation::Flash {
        return Err(Error::usage("`--attn-implementation flash` is a path of the CUDA backend")
            .hint("leave it out: the CPU has one path, or use `--device cuda`"));
    }
    if let (Device::Cuda(_), Some(false)) = (device, args.bf16) {
        return Err(Error::usage("`--bf16 false`: the CUDA backend computes in bf16")
            .hint("leave it out, or use `--device cpu`"));
    }
    if device == Device::Cpu && args.embedding != EmbeddingPlace::Auto {
        return Err(Error::usage(
            "`--embedding` is for a GPU: beside the CPU all is in its memory",
        )
        .hint("leave it out, or use `--device cuda`"));
    }
    Ok(device)
}

/// Whether weights of so many blocks may be asked to stay dequantized.
///
/// # Errors
/// `Usage` on the CPU.
pub fn check_dequantized_blocks(asked: Option<usize>, on_gpu: bool) -> Result<()> {
    if on_gpu || asked.is_none_or(|blocks| blocks == 0) {
        return Ok(());
    }
    let what = "`--dequantized-blocks` is for a GPU: the CPU dequantizes into its cache";
    Err(Error::usage(what).hint("leave it out, or use `--device cuda`"))
}

/// The memory of GPU `index`, if there is one: what a run may have is all of it, what is in use has
/// the context that is made for the question, and other programs' memory.
pub fn surroundings(index: usize) -> Option<Surroundings> {
    let total = driver_info().ok()?.devices.get(index)?.total_bytes;
    Some(Surroundings::of_gpu(devices::free_bytes(index).ok()?, total))
}

/// The first GPU that there are kernels for. Where there is no driver, there is nothing to tell; one that
/// refuses is told of.
fn first_gpu() -> Option<usize> {
    search::open(&search::DRIVER, 0).ok()?;
    match driver_info() {
        Ok(info) => info.first_usable(),
        Err(error) => {
            eprintln!("{}", error.at("the CPU is used, not a GPU"));
            None
        }
    }
}
