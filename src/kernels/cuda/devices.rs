//! Which GPUs there are.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int};
use std::ptr;

use super::functions::{CudaFunctions, open_driver};
use crate::error::Result;

/// Lowest compute capability of the PTX.
pub const LOWEST_CAPABILITY: (i32, i32) = (8, 0);

// cuda.h
const DEVICE_ATTRIBUTE_MULTIPROCESSORS: c_int = 16;
const DEVICE_ATTRIBUTE_KERNEL_TIMEOUT: c_int = 17;
const DEVICE_ATTRIBUTE_MAJOR: c_int = 75;
const DEVICE_ATTRIBUTE_MINOR: c_int = 76;

/// Asks the driver to load a kernel when it is looked up: drivers before CUDA 12.2, on Windows 12.3, would
/// put all of cuBLAS into the GPU's memory.
///
/// # Safety
/// No other thread may run yet: it could read the environment meanwhile.
pub unsafe fn load_kernels_when_used() {
    const LOADING: &str = "CUDA_MODULE_LOADING";
    if std::env::var_os(LOADING).is_none() {
        // SAFETY: no other thread runs, as the caller promises.
        unsafe { std::env::set_var(LOADING, "LAZY") };
    }
}

/// A device as the driver describes it.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct DeviceInfo {
    /// Number for `--device cuda:N`.
    pub index: i32,
    /// Product name.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Multiprocessors.
    pub multiprocessors: i32,
    /// Whether the driver stops kernels that run for seconds, as it does on a card that shows a desktop.
    pub has_kernel_timeout: bool,
    /// Bytes of memory.
    pub total_bytes: u64,
}

/// What the driver says.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct DriverInfo {
    /// Highest CUDA version that it runs, such as 13.0.
    pub cuda_version: (i32, i32),
    /// All devices.
    pub devices: Vec<DeviceInfo>,
}

impl DriverInfo {
    /// Index of the first device that there are kernels for.
    pub fn first_usable(&self) -> Option<usize> {
        let usable = self.devices.iter().find(|device| device.capability >= LOWEST_CAPABILITY)?;
        Some(usable.index as usize)
    }
}

/// Asks the driver for its version and devices; makes no context, so that a card that is full or busy
/// is seen, too.
///
/// # Errors
/// `Gpu` when there is no driver or it refuses.
pub fn driver_info() -> Result<DriverInfo> {
    let cuda = open_driver()?;
    let mut count = 0;
    // SAFETY: initialised by `open_driver`; the out-pointer is valid.
    cuda.check("count the devices", unsafe { (cuda.device_count)(&mut count) })?;
    let devices = (0..count).map(|index| device_info(cuda, index)).collect::<Result<_>>()?;
    Ok(DriverInfo { cuda_version: driver_version(cuda)?, devices })
}

/// Highest CUDA version that the driver runs.
pub(super) fn driver_version(cuda: &CudaFunctions) -> Result<(i32, i32)> {
    let mut version = 0;
    // SAFETY: the out-pointer is valid.
    cuda.check("read the driver's version", unsafe { (cuda.driver_version)(&mut version) })?;
    Ok((version / 1000, version % 1000 / 10))
}

/// What the driver says of device `index`.
pub(super) fn device_info(cuda: &CudaFunctions, index: i32) -> Result<DeviceInfo> {
    let (mut device, mut total, mut name) = (0, 0usize, [0 as c_char; 256]);
    // SAFETY: the out-pointers are valid, the name has the length that is given.
    unsafe {
        cuda.check("open the device", (cuda.device_get)(&mut device, index))?;
        let length = name.len() as c_int - 1;
        cuda.check("read its name", (cuda.device_name)(name.as_mut_ptr(), length, device))?;
        cuda.check("read its memory", (cuda.device_memory)(&mut total, device))?;
    }
    let [major, minor] = [DEVICE_ATTRIBUTE_MAJOR, DEVICE_ATTRIBUTE_MINOR];
    let capability = (attribute(cuda, device, major)?, attribute(cuda, device, minor)?);
    let multiprocessors = attribute(cuda, device, DEVICE_ATTRIBUTE_MULTIPROCESSORS)?;
    let has_kernel_timeout = attribute(cuda, device, DEVICE_ATTRIBUTE_KERNEL_TIMEOUT)? != 0;
    // SAFETY: the driver ends the name with a zero, and the last byte is one.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    let total_bytes = total as u64;
    Ok(DeviceInfo { index, name, capability, multiprocessors, has_kernel_timeout, total_bytes })
}

/// An attribute of a device.
fn attribute(cuda: &CudaFunctions, device: c_int, attribute: c_int) -> Result<c_int> {
    let mut value = 0;
    // SAFETY: the out-pointer is valid.
    let code = unsafe { (cuda.device_attribute)(&mut value, attribute, device) };
    cuda.check("read an attribute of the GPU", code)?;
    Ok(value)
}

/// Free memory of device `index`, beside the context that is made for the question.
///
/// # Errors
/// `Gpu` or `Budget` where no context can be had: the card is full, or another process has it alone.
pub fn free_bytes(index: usize) -> Result<u64> {
    let cuda = open_driver()?;
    let (mut device, mut context, mut free, mut total) = (0, ptr::null_mut(), 0, 0);
    // SAFETY: out-pointers are valid; the context is released after use, and no longer current then.
    unsafe {
        cuda.check("open the device", (cuda.device_get)(&mut device, index as c_int))?;
        cuda.check("use the device", (cuda.context_retain)(&mut context, device))?;
        let answer = cuda.check("use its context", (cuda.context_use)(context)).and_then(|()| {
            cuda.check("read its free memory", (cuda.memory_info)(&mut free, &mut total))
        });
        (cuda.context_use)(ptr::null_mut());
        (cuda.context_release)(device);
        answer?;
    }
    Ok(free as u64)
}
