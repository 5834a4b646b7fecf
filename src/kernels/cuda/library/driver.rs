//! What a real GPU does as a [`Driver`].

use std::ptr;

use super::Gpu;
use crate::error::Result;
use crate::kernels::cuda::driver::{Address, Driver, Gemm, Launch};
use crate::kernels::cuda::products;

impl Driver for Gpu {
    fn in_words(&self) -> String {
        format!("cuda:{}, {}", self.index, self.name)
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.enter()?;
        let mut address = 0;
        // SAFETY: the out-pointer is valid.
        let code = unsafe { (self.cuda.allocate)(&mut address, bytes) };
        self.cuda.check(format_args!("allocate {bytes} bytes of GPU memory"), code)?;
        Ok(address)
    }

    fn free(&self, address: Address) {
        // Nobody is there to hear of an error.
        if self.finish_all().is_ok() {
            // SAFETY: allocated by `allocate`; its owner is gone, and nothing that is queued uses it.
            unsafe { (self.cuda.free)(address) };
        }
    }

    fn allocate_staging(&self, bytes: usize) -> Result<*mut u8> {
        self.enter()?;
        let mut start = ptr::null_mut();
        // SAFETY: the out-pointer is valid.
        let code = unsafe { (self.cuda.allocate_host)(&mut start, bytes, 0) };
        self.cuda.check_pinned(bytes, code)?;
        Ok(start.cast())
    }

    fn free_staging(&self, staging: *mut u8, _bytes: usize) {
        if self.finish_all().is_ok() {
            // SAFETY: allocated by `allocate_staging`, and nothing that is queued reads it any more.
            unsafe { (self.cuda.free_host)(staging.cast()) };
        }
    }

    fn upload_staged(&self, from: *const u8, to: Address, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: the caller keeps `from` as it is until the next wait.
        let code = unsafe { (self.cuda.upload)(to, from.cast(), bytes, self.stream) };
        self.cuda.check("copy to the GPU", code)
    }

    fn upload(&self, from: &[u8], to: Address) -> Result<()> {
        self.upload_staged(from.as_ptr(), to, from.len())?;
        self.synchronize()
    }

    fn download(&self, from: Address, to: &mut [u8]) -> Result<()> {
        self.enter()?;
        if !to.is_empty() {
            let (start, bytes) = (to.as_mut_ptr().cast(), to.len());
            // SAFETY: `to` is as long as is said, and stays until the wait below.
            let code = unsafe { (self.cuda.download)(start, from, bytes, self.stream) };
            self.cuda.check("copy from the GPU", code)?;
        }
        self.synchronize()
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: both lie in allocations of this device, as `memory` checks.
        let code = unsafe { (self.cuda.copy)(to, from, bytes, self.stream) };
        self.cuda.check("copy inside the GPU", code)
    }

    fn copy_out(&self, from: Address, to: *mut u8, bytes: usize, slot: usize) -> Result<()> {
        self.aside(self.copies, self.copied[slot], |stream| {
            // SAFETY: `from` lies in an allocation and `to` in pinned memory, as their owners check,
            // and stay until the copy was awaited.
            let code = unsafe { (self.cuda.download)(to.cast(), from, bytes, stream) };
            self.cuda.check("offload activations", code)
        })
    }

    fn copy_in(&self, from: *const u8, to: Address, bytes: usize, slot: usize) -> Result<()> {
        self.aside(self.copies, self.copied[slot], |stream| {
            // SAFETY: as above.
            let code = unsafe { (self.cuda.upload)(to, from.cast(), bytes, stream) };
            self.cuda.check("copy to a block", code)
        })
    }

    fn await_copy(&self, slot: usize) -> Result<()> {
        self.wait_for(self.copied[slot])
    }

    fn finish_copy(&self, slot: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: the event is alive; one that was never recorded is no wait.
        let code = unsafe { (self.cuda.event_wait)(self.copied[slot]) };
        self.cuda.check("wait for a copy", code)
    }

    fn zero(&self, to: Address, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: lies in an allocation of this device, as `memory` checks.
        let code = unsafe { (self.cuda.fill)(to, 0, bytes, self.stream) };
        self.cuda.check("zero GPU memory", code)
    }

    fn launch(&self, launch: Launch) -> Result<()> {
        self.enter()?;
        self.launch_on(self.stream, launch)
    }

    fn launch_ahead(&self, launch: Launch) -> Result<()> {
        self.aside(self.ahead, self.prepared, |stream| self.launch_on(stream, launch))
    }

    fn copy_ahead(&self, from: *const u8, to: Address, bytes: usize) -> Result<()> {
        self.aside(self.ahead, self.prepared, |stream| {
            // SAFETY: as above.
            let code = unsafe { (self.cuda.upload)(to, from.cast(), bytes, stream) };
            self.cuda.check("copy a part of the head", code)
        })
    }

    fn await_ahead(&self) -> Result<()> {
        self.wait_for(self.prepared)
    }

    fn gemm(&self, gemm: &Gemm) -> Result<()> {
        self.enter()?;
        let code = products::gemm(&self.cublas, self.blas, gemm)?;
        self.check_blas(format_args!("multiply {gemm}"), code)
    }

    fn set_workspace(&self, address: Address, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: the plan's region, which outlives the model's products.
        let code = unsafe { (self.cublas.set_workspace)(self.blas, address as *mut _, bytes) };
        self.check_blas("give cuBLAS its workspace", code)
    }

    fn memory(&self) -> Result<(u64, u64)> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the out-pointers are valid.
        let code = unsafe { (self.cuda.memory_info)(&mut free, &mut total) };
        self.cuda.check("read the free memory", code)?;
        Ok((free as u64, total as u64))
    }

    fn synchronize(&self) -> Result<()> {
        self.finish(self.stream)
    }
}
