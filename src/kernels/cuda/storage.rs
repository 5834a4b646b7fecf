//! [`Storage`] on a GPU.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

use super::driver::Driver;
use super::host::{self, DeviceVector};
use super::loss::{self, LossSum};
use super::memory::{Allocation, Buffer, Memory};
use super::offload::OffloadStore;
use super::plan::{DEQUANTIZED, cuda_layout, idle_in_blocks, staged_bytes};
use super::staging::Staging;
use super::together::StackRoom;
use super::weight::{self, DeviceWeight};
use super::weight_buffers::WeightBuffers;
use super::{Cuda, Lent, rows, stream};
use crate::error::Result;
use crate::kernels::cpu::FrozenMatrix;
use crate::kernels::{Storage, StreamedWeights, TokenLosses};
use crate::model::spec::ModelSpec;
use crate::model::streaming::StreamedPages;
use crate::plan::{CudaRegion, MemoryPlan, OnHost, Region, RegionId, Settings, WeightParts};

impl<D: Driver> Storage for Cuda<D> {
    type Buffer = Buffer<D>;
    type Bf16Buffer = Buffer<D>;
    type Memory = Memory<D>;
    type LossSum = LossSum<D>;
    type Weight = DeviceWeight<D>;
    type Vector = DeviceVector<D>;
    type Offload = OffloadStore<D>;

    fn plan(&self, spec: &ModelSpec, settings: &Settings) -> MemoryPlan {
        cuda_layout(spec, settings, self.attention)
    }

    fn allocate(&self, plan: &MemoryPlan) -> Result<Memory<D>> {
        // The last plan's memory goes before the next one's is asked for.
        self.forget_plan();
        let driver = &self.shared.driver;
        let allocation = Allocation::new(driver, plan.arena_bytes())?;
        let mut memory = Memory::new(allocation, &plan.regions);
        let workspace = memory.region(RegionId::Cuda(CudaRegion::Workspace));
        driver.set_workspace(workspace.address, workspace.elements * workspace.size())?;
        let staging = Staging::new(
            driver,
            memory.region(RegionId::Cuda(CudaRegion::Uploads)),
            staged_bytes(plan),
        )?;
        let mlp_sums = memory.as_f32(&plan.regions, idle_in_blocks(&plan.regions));
        let mut take = |region| {
            let id = RegionId::Cuda(region);
            plan.region(id).map(|_| memory.region(id))
        };
        let mut buffers: Vec<_> =
            DEQUANTIZED.into_iter().filter_map(&mut take).map(|buffer| (buffer, None)).collect();
        let stacked = take(CudaRegion::StackedA);
        let room = |a| StackRoom { a, gradient: take(CudaRegion::StackedGradient) };
        let stack = stacked.map(room);
        // Its memory is a part of what the sums have.
        take(CudaRegion::MlpSums);
        let blocks = |region: &&Region| matches!(region.id, RegionId::DequantizedBlocks(_));
        for region in plan.regions.iter().filter(blocks) {
            let columns = region.pitch.map(|pitch| pitch.width);
            buffers.extend((0..region.count).map(|_| (memory.region(region.id), columns)));
        }
        let weights = WeightBuffers::new(buffers);
        self.state().lent = Some(Lent { staging, weights, stack, mlp_sums });
        memory.zero_optimizer(driver)?;
        Ok(memory)
    }

    fn begin_pass(&self) {
        self.state().lent().weights.begin_pass();
    }

    fn offload_store(&self, plan: &MemoryPlan, _folder: Option<&Path>) -> Result<OffloadStore<D>> {
        OffloadStore::new(&self.shared.driver, plan)
    }

    fn offload(
        &self,
        store: &mut OffloadStore<D>,
        from: (&Buffer<D>, usize),
        index: usize,
        elements: usize,
    ) {
        self.note(store.offload(from, index, elements));
    }

    fn fetch(
        &self,
        store: &mut OffloadStore<D>,
        index: usize,
        (to, slot): (&mut Buffer<D>, usize),
        elements: usize,
    ) {
        self.note(store.fetch(index, (to, slot), elements));
    }

    fn settle(&self, _store: &mut OffloadStore<D>, slot: usize) {
        self.note(self.driver().await_copy(slot));
    }

    fn offload_failure(&self, _store: &mut OffloadStore<D>) -> Result<()> {
        // Kept with all other failures.
        Ok(())
    }

    fn with_on_host(self, what: OnHost) -> Self {
        Cuda { on_host: what, ..self }
    }

    fn head_is_on_host(&self) -> bool {
        self.on_host == OnHost::All
    }

    fn upload_weights(&self, weights: Vec<FrozenMatrix>) -> Result<Vec<DeviceWeight<D>>> {
        weight::upload(&self.shared.driver, &self.shared.tables, weights)
    }

    fn upload_embedding(&self, table: FrozenMatrix, is_head: bool) -> Result<DeviceWeight<D>> {
        let input_on_host = self.on_host == OnHost::Input && !is_head;
        weight::table(self, table, input_on_host || self.on_host == OnHost::All)
    }

    fn upload_head(&self, head: FrozenMatrix) -> Result<DeviceWeight<D>> {
        weight::table(self, head, self.on_host == OnHost::All)
    }

    fn bytes_in_memory(&self, weight: &DeviceWeight<D>) -> WeightParts {
        weight.bytes
    }

    fn stream_weights(
        &self,
        blocks: Vec<Vec<FrozenMatrix>>,
        pages: StreamedPages,
    ) -> Result<StreamedWeights<DeviceWeight<D>>> {
        stream::stream(self, blocks, pages)
    }

    fn upload_vector(&self, vector: Vec<f32>) -> Result<DeviceVector<D>> {
        DeviceVector::upload(&self.shared.driver, &vector)
    }

    fn values<'a>(&self, buffer: &'a Buffer<D>, range: Range<usize>) -> Result<Cow<'a, [f32]>> {
        host::values(self, buffer, range)
    }

    fn set_values(&self, values: &[f32], buffer: &mut Buffer<D>, offset: usize) {
        host::set_values(self, values, buffer, offset);
    }

    fn round(&self, from: &Buffer<D>, to: &mut Buffer<D>, elements: usize) {
        rows::convert(self, from, to, elements);
    }

    fn write_tables<const N: usize>(
        &self,
        tables: [&mut Buffer<D>; N],
        elements: usize,
        fill: impl FnOnce([&mut [f32]; N]),
    ) {
        host::write_tables(self, tables, elements, fill);
    }

    fn loss_sum(&self, memory: &mut Memory<D>) -> LossSum<D> {
        LossSum(memory.region(RegionId::Cuda(CudaRegion::Loss)))
    }

    fn clear_loss(&self, sum: &mut LossSum<D>) {
        loss::clear(self, sum);
    }

    fn read_loss(&self, sum: &LossSum<D>) -> Result<TokenLosses> {
        loss::read(self, sum)
    }
}
