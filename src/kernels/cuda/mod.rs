//! The CUDA backend: bf16 activations and products, f32 statistics, losses, gradients of the
//! adapters and optimizer.
//!
//! [`Cuda`] turns every operation of [`Kernels`] into launches of the
//! kernels in `device/` and cuBLAS products, queued on one stream of a [`Driver`]. Operations do
//! not wait and do not fail: the first error is kept and reported by whatever waits next (a loss, a
//! download).

mod adapted_mlp;
mod attention;
mod dequantized;
pub mod devices;
pub mod driver;
mod frozen;
mod functions;
mod head;
mod host;
mod launch;
pub mod library;
mod linears;
mod loss;
mod low_rank;
pub mod memory;
mod mlp;
mod offload;
pub mod optimizer;
mod pinned;
mod plan;
mod products;
mod row;
mod rows;
pub mod search;
mod staging;
mod storage;
mod stream;
mod together;
mod weight;
mod weight_buffers;

use std::sync::{Arc, Mutex, MutexGuard};

pub use attention::AttnImplementation;
pub use plan::{cuda_layout, staged_bytes, waiting_bytes};
pub use weight::matrix_bytes;

use driver::{Argument, Driver, Gemm};
use memory::{Allocation, Buffer, PARTIALS};
use staging::Staging;
use together::StackRoom;
use weight::{DeviceWeight, Tables};
use weight_buffers::WeightBuffers;

use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::model::spec::ModelSpec;
use crate::plan::OnHost;

/// A GPU as a backend. Clones share it; one model at a time works on it.
pub struct Cuda<D: Driver> {
    shared: Arc<Shared<D>>,
    attention: AttnImplementation,
    /// What a launch of flash attention computes at most.
    launch_flops: u64,
    on_host: OnHost,
}

impl<D: Driver> Kernels for Cuda<D> {
    /// cuBLAS chooses a kernel for each shape.
    const BITS_DEPEND_ON_SHAPE: bool = true;
    const TAKES_BF16: bool = true;

    fn check_model(&self, spec: &ModelSpec) -> Result<()> {
        self.attention.check(spec.head_dim)?;
        self.on_host.check(spec)
    }
}

impl<D: Driver> Clone for Cuda<D> {
    fn clone(&self) -> Self {
        let Cuda { ref shared, attention, launch_flops, on_host } = *self;
        Cuda { shared: shared.clone(), attention, launch_flops, on_host }
    }
}

struct Shared<D: Driver> {
    driver: Arc<D>,
    tables: Tables<D>,
    /// Partial sums, a norm and a gradient scale: the optimizer's numbers.
    scalars: Arc<Allocation<D>>,
    state: Mutex<State<D>>,
}

/// What changes while operations are queued.
struct State<D: Driver> {
    lent: Option<Lent<D>>,
    /// The first error since somebody asked.
    failure: Option<Error>,
}

/// What the plan at work lends to the operations.
struct Lent<D: Driver> {
    staging: Staging<D>,
    weights: WeightBuffers<D>,
    stack: Option<StackRoom<D>>,
    mlp_sums: Option<Buffer<D>>,
}

impl<D: Driver> State<D> {
    fn lent(&mut self) -> &mut Lent<D> {
        self.lent.as_mut().expect("a plan is allocated")
    }
}

/// Bytes of the scalars: partial sums, their sum, the norm, the scale.
const SCALARS_BYTES: usize = 8 * PARTIALS + 24;

impl<D: Driver> Cuda<D> {
    /// Works on `driver`.
    ///
    /// # Errors
    /// `Budget` when not even the tables fit.
    pub fn new(driver: D) -> Result<Self> {
        let driver = Arc::new(driver);
        let tables = Tables::new(&driver)?;
        let scalars = Allocation::new(&driver, SCALARS_BYTES)?;
        let state = Mutex::new(State { lent: None, failure: None });
        let shared = Arc::new(Shared { driver, tables, scalars, state });
        Ok(Cuda {
            shared,
            attention: AttnImplementation::default(),
            launch_flops: attention::LAUNCH_FLOPS,
            on_host: OnHost::Nothing,
        })
    }

    /// The backend with attention computed as is said.
    pub fn with_attention(self, attention: AttnImplementation) -> Self {
        Cuda { attention, ..self }
    }

    /// The backend with launches of flash attention that compute `flops` at most: the same bits.
    pub fn with_launches_of(self, flops: u64) -> Self {
        Cuda { launch_flops: flops, ..self }
    }

    /// Gives back what is left of the last plan, whose model is gone.
    pub fn forget_plan(&self) {
        self.state().lent = None;
    }

    /// The GPU.
    pub fn driver(&self) -> &D {
        &self.shared.driver
    }

    fn state(&self) -> MutexGuard<'_, State<D>> {
        self.shared.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Room for linears that read the same rows, if there is any.
    fn stack_room(&self) -> Option<StackRoom<D>> {
        self.state().lent().stack.clone()
    }

    /// Where an MLP with adapters sums, in f32: buffers of the head, which are idle while blocks work.
    fn mlp_sums(&self) -> Option<Buffer<D>> {
        self.state().lent().mlp_sums.clone()
    }

    /// Keeps the first error for whoever waits next.
    fn note(&self, result: Result<()>) {
        if let Err(error) = result {
            self.state().failure.get_or_insert(error);
        }
    }

    /// The kept error, if there is one; it is told once.
    pub(crate) fn take_failure(&self) -> Result<()> {
        self.state().failure.take().map_or(Ok(()), Err)
    }

    /// What goes to the device through staging; the first error is kept, as [`note`](Cuda::note) does.
    fn through_staging<R>(&self, upload: impl FnOnce(&mut Staging<D>) -> Result<R>) -> Option<R> {
        let mut state = self.state();
        let result = upload(&mut state.lent().staging);
        result.map_err(|error| _ = state.failure.get_or_insert(error)).ok()
    }

    /// Copies bytes from the device after everything that was queued; staging is free again.
    fn download(&self, from: driver::Address, to: &mut [u8]) -> Result<()> {
        self.take_failure()?;
        self.shared.driver.download(from, to)?;
        if let Some(lent) = &mut self.state().lent {
            lent.staging.reuse();
        }
        Ok(())
    }

    /// Queues a product, unless it is empty.
    fn gemm(&self, gemm: Gemm) {
        if !gemm.shape.contains(&0) {
            self.note(self.driver().gemm(&gemm));
        }
    }

    fn launch(
        &self,
        kernel: &'static str,
        grid: [u32; 3],
        threads: u32,
        arguments: &mut [Argument],
    ) {
        self.launch_shared(kernel, grid, threads, 0, arguments);
    }

    /// Launches a kernel with dynamic shared memory, unless the grid is empty.
    fn launch_shared(
        &self,
        kernel: &'static str,
        grid: [u32; 3],
        threads: u32,
        shared_bytes: u32,
        arguments: &mut [Argument],
    ) {
        if grid.contains(&0) {
            return;
        }
        let launch = driver::Launch { kernel, grid, threads, shared_bytes, arguments };
        self.note(self.shared.driver.launch(launch));
    }
}
