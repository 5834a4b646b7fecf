//! `nibble doctor`: what this machine offers, and how to get what is missing.

use nibble_quant::product::Precision;
use serde_json::{Value, json};

use crate::byte_size::ByteSize;
use crate::cli::doctor::DoctorArgs;
use crate::error::{Error, Result};
use crate::kernels::cuda::Cuda;
use crate::kernels::cuda::devices::{self, DriverInfo, LOWEST_CAPABILITY};
use crate::kernels::cuda::library::Gpu;
use crate::kernels::cuda::search::{self, CUBLAS};
use crate::ledger::resident;
use crate::train::agreement;

/// What was found, or why it was not.
struct Findings {
    threads: usize,
    available_bytes: u64,
    driver: Result<DriverInfo>,
    /// Free bytes of each GPU.
    free_bytes: Vec<Option<u64>>,
    cublas: Result<String>,
    /// Whether the first GPU computes what the CPU does, if it can be asked.
    agreement: Option<Result<()>>,
}

/// Runs the command.
///
/// # Errors
/// None: what is missing or does not work is printed, with the way out.
pub fn run(args: &DoctorArgs) -> Result<()> {
    let driver = devices::driver_info();
    let version = driver.as_ref().map_or(i32::MAX, |driver| driver.cuda_version.0);
    let mut findings = Findings {
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        available_bytes: resident::available_bytes(),
        free_bytes: free_bytes(&driver),
        driver,
        cublas: search::open(&CUBLAS, version).map(|found| found.name),
        agreement: None,
    };
    findings.agreement = findings.first_gpu().map(try_gpu);
    if args.json {
        println!("{:#}", findings.json());
    } else {
        findings.print();
    }
    Ok(())
}

/// What is free on each GPU, where it says so.
fn free_bytes(driver: &Result<DriverInfo>) -> Vec<Option<u64>> {
    let devices = driver.as_ref().map_or(&[][..], |driver| &driver.devices);
    devices.iter().map(|info| devices::free_bytes(info.index as usize).ok()).collect()
}

/// Opens a GPU and compares it with the CPU.
fn try_gpu(index: usize) -> Result<()> {
    agreement::check(&Cuda::new(Gpu::open(index)?)?)
}

/// What is wrong, and the way out.
fn problem(error: &Error) -> Value {
    let message = error.message();
    json!({ "problem": message.what, "fix": message.hint })
}

impl Findings {
    /// The first GPU that Nibble has kernels for, where cuBLAS is there, too.
    fn first_gpu(&self) -> Option<usize> {
        let (Ok(driver), Ok(_)) = (&self.driver, &self.cublas) else { return None };
        driver.first_usable()
    }

    /// Why a GPU cannot be used; `None` if one can.
    fn obstacle(&self) -> Option<String> {
        let what = |error: &Error| error.message().what.clone();
        match (&self.driver, &self.cublas, &self.agreement) {
            (Err(error), ..) | (_, _, Some(Err(error))) => Some(what(error)),
            (Ok(driver), ..) if driver.devices.is_empty() => Some("the driver sees no GPU".into()),
            (Ok(_), Err(error), _) => Some(what(error)),
            (Ok(_), Ok(_), None) => {
                let (major, minor) = LOWEST_CAPABILITY;
                Some(format!("no GPU has compute capability {major}.{minor} or higher"))
            }
            (Ok(_), Ok(_), Some(Ok(()))) => None,
        }
    }

    fn json(&self) -> Value {
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "cpu": {
                "threads": self.threads,
                "available_bytes": self.available_bytes,
                "instructions": Precision::F32.instructions(),
                "fast_bf16": Precision::Bf16.is_fast(),
            },
            "cuda": {
                "usable": self.obstacle().is_none(),
                "obstacle": self.obstacle(),
                "driver": self.driver.as_ref().map_or_else(problem, |driver| json!(driver)),
                "free_bytes": self.free_bytes,
                "cublas": self.cublas.as_ref().map_or_else(problem, |file| json!({"file": file})),
            },
        })
    }

    fn print(&self) {
        let memory = ByteSize(self.available_bytes);
        let instructions = match Precision::F32.instructions() {
            Some(name) => format!("products by {name}"),
            None => "products are slow: neither AVX2 nor NEON".to_string(),
        };
        let bf16 = match Precision::Bf16.is_fast() {
            true => format!(", those of `--bf16` by {}", Precision::BF16_EXTENSION),
            false => String::new(),
        };
        println!("processor    {} threads, {memory} available", self.threads);
        println!("             {instructions}{bf16}");
        match &self.driver {
            Ok(driver) => {
                let (major, minor) = driver.cuda_version;
                println!("CUDA driver  runs CUDA {major}.{minor}");
                for (device, free) in driver.devices.iter().zip(&self.free_bytes) {
                    let (major, minor) = device.capability;
                    let (index, name) = (device.index, &device.name);
                    let free = free.map_or("?".into(), |bytes| ByteSize(bytes).to_string());
                    let total = ByteSize(device.total_bytes);
                    println!("cuda:{index}       {name}, {major}.{minor}, {free} of {total} free");
                }
            }
            Err(error) => print_problem("CUDA driver", error),
        }
        match &self.cublas {
            Ok(file) => println!("cuBLAS       {file}"),
            Err(error) => print_problem("cuBLAS", error),
        }
        println!();
        match self.obstacle() {
            None => println!("the first GPU computes what the CPU does: training runs on it"),
            Some(obstacle) => println!("training runs on the CPU: {obstacle}"),
        }
    }
}

fn print_problem(title: &str, error: &Error) {
    let message = error.message();
    println!("{title:<12} {}", message.what);
    if let Some(fix) = &message.hint {
        println!("{:<12} fix: {fix}", "");
    }
}
