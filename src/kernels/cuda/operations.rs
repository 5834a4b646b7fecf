//! Every operation of [`Kernels`] as launches and products.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

use half::bf16;

use super::attention;
use super::driver::{Address, Driver, Gemm, Operand, Product};
use super::launch::{FLAT_THREADS, ROW_THREADS, as_rows, flat, launch, rows as row_grid};
use super::memory::{Allocation, Buffer, Memory, PARTIALS};
use super::offload::Pinned;
use super::plan::cuda_layout;
use super::staging::Staging;
use super::stream;
use super::weight::{self, DeviceWeight, Form};
use super::{Cuda, driver::Argument};
use crate::error::Result;
use crate::kernels::cpu::FrozenMatrix;
use crate::kernels::{
    AttentionShape, Columns, DropoutMask, Kernels, LoraShape, LoraTerm, NormParameters,
    StreamedWeights, TokenLayout,
};
use crate::model::parameters::Parameters;
use crate::model::spec::{Activation, ModelSpec, Norm};
use crate::model::streaming::Streaming;
use crate::plan::{MemoryPlan, RegionType, Settings};
use crate::random;

/// A frozen f32 vector.
pub struct DeviceVector<D: Driver> {
    memory: std::sync::Arc<Allocation<D>>,
    elements: usize,
}

impl<D: Driver> DeviceVector<D> {
    fn argument(&self) -> Argument {
        Argument::Pointer(self.memory.address())
    }
}

/// Losses of a chunk's rows, partial sums and the sum, in one region: the f64 values first.
pub struct LossSum<D: Driver>(Buffer<D>);

impl<D: Driver> LossSum<D> {
    fn partials(&self) -> Address {
        self.0.at(0..2 * PARTIALS)
    }

    fn sum(&self) -> Address {
        self.0.at(2 * PARTIALS..2 * PARTIALS + 2)
    }

    fn losses(&self, rows: usize) -> Address {
        self.0.at(2 * PARTIALS + 2..2 * PARTIALS + 2 + rows)
    }
}

/// Rows of a weight as an operand `[rows, in]`.
struct Panel {
    rows: Range<usize>,
    address: Address,
}

fn operand(address: Address, stride: usize) -> Operand {
    Operand { address, stride, transposed: false, batch_stride: 0 }
}

fn transposed(address: Address, stride: usize) -> Operand {
    Operand { transposed: true, ..operand(address, stride) }
}

impl<D: Driver> Cuda<D> {
    /// `C = alpha·A·B + beta·C`.
    pub(super) fn gemm(
        &self,
        shape: [usize; 3],
        (alpha, beta): (f32, f32),
        (a, b): (Operand, Operand),
        c: Product,
    ) {
        if shape.contains(&0) {
            return;
        }
        self.note(self.driver().gemm(&Gemm { shape, alpha, a, b, beta, c, batches: 1 }));
    }

    /// Copies words to the device for the next operation.
    fn stage(&self, words: &[u32]) -> Option<Argument> {
        let mut state = self.state();
        let staging = state.staging.as_mut().expect("a plan is allocated");
        match staging.upload(words) {
            Ok(address) => Some(Argument::Pointer(address)),
            Err(error) => {
                state.failure.get_or_insert(error);
                None
            }
        }
    }

    /// Boundaries of documents on the device.
    pub(super) fn stage_boundaries(&self, layout: &TokenLayout) -> Option<Argument> {
        let mut state = self.state();
        let staging = state.staging.as_mut().expect("a plan is allocated");
        match staging.boundaries(&layout.boundaries) {
            Ok(address) => Some(Argument::Pointer(address)),
            Err(error) => {
                state.failure.get_or_insert(error);
                None
            }
        }
    }

    /// Calls `product` with the whole weight in bf16, or with one panel of rows after another where
    /// the buffer for widened weights is smaller than this one.
    fn for_panels(&self, weight: &DeviceWeight<D>, mut product: impl FnMut(Panel)) {
        let [rows, columns] = weight.shape;
        let packed = match &weight.form {
            Form::Dense(address) => return product(Panel { rows: 0..rows, address: *address }),
            Form::Packed(packed) => packed,
        };
        let buffer = self.state().dequantized.clone().expect("a plan is allocated");
        let height = (buffer.elements / columns).clamp(1, rows);
        for first in (0..rows).step_by(height) {
            let count = height.min(rows - first);
            let address = buffer.at(0..count * columns);
            let mut arguments = packed.arguments().to_vec();
            arguments.extend([
                Argument::I64(first as i64),
                Argument::I64(count as i64),
                Argument::from(columns),
                Argument::Pointer(address),
                Argument::from(columns),
            ]);
            // Elements that a block of eight warps takes in one turn.
            const TURN: usize = 8192;
            let grid = [(count * columns).div_ceil(TURN) as u32, 1, 1];
            self.launch("dequantize_4bit", grid, FLAT_THREADS, &mut arguments);
            product(Panel { rows: first..first + count, address });
        }
    }

    /// Converts between f32 and bf16, `elements` that lie one after another.
    pub(super) fn convert(&self, from: &Buffer<D>, to: &Buffer<D>, elements: usize) {
        if elements == 0 {
            return;
        }
        let (rows, width) = as_rows(elements);
        let (source, target) = (from.argument(elements), to.argument(elements));
        let mut arguments =
            [source, width.into(), target, width.into(), width.into(), 1f32.into(), false.into()];
        let kernel = match (from.dtype, to.dtype) {
            (RegionType::F32, RegionType::Bf16) => "scale_rows_f32_bf16",
            (RegionType::Bf16, RegionType::F32) => "scale_rows_bf16_f32",
            (RegionType::F32, RegionType::F32) => "scale_rows_f32",
            (RegionType::Bf16, RegionType::Bf16) => "scale_rows_bf16",
        };
        self.launch(kernel, row_grid(rows), ROW_THREADS, &mut arguments);
    }
}

fn beta(accumulate: bool) -> f32 {
    if accumulate { 1.0 } else { 0.0 }
}

fn activation_code(activation: Activation) -> i32 {
    match activation {
        Activation::Silu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
    }
}

impl<D: Driver> Kernels for Cuda<D> {
    type Buffer = Buffer<D>;
    type HalfBuffer = Buffer<D>;
    type Memory = Memory<D>;
    type LossSum = LossSum<D>;
    type Weight = DeviceWeight<D>;
    type Vector = DeviceVector<D>;
    type Offload = Pinned<D>;

    fn plan(&self, spec: &ModelSpec, settings: &Settings) -> MemoryPlan {
        cuda_layout(spec, settings)
    }

    fn allocate(&self, plan: &MemoryPlan) -> Result<Memory<D>> {
        {
            // The last plan's memory goes before the next one's is asked for.
            let mut state = self.state();
            (state.staging, state.dequantized) = (None, None);
        }
        let driver = &self.shared.driver;
        let allocation = Allocation::new(driver, plan.arena_bytes())?;
        let mut memory = Memory::new(allocation, &plan.regions);
        let mut tables = 0;
        for region in &plan.regions {
            if region.name.starts_with("rotary.") {
                tables += region.bytes();
            }
        }
        let workspace = memory.region("cuda.workspace");
        driver.set_workspace(workspace.address, workspace.elements * workspace.size())?;
        let staging = Staging::new(driver, memory.region("cuda.uploads"), tables)?;
        let mut state = self.state();
        state.staging = Some(staging);
        state.dequantized = Some(memory.region("cuda.dequantized"));
        drop(state);
        memory.zero_optimizer(driver)?;
        Ok(memory)
    }

    fn offload_store(&self, plan: &MemoryPlan, _folder: Option<&Path>) -> Result<Pinned<D>> {
        Pinned::new(&self.shared.driver, plan)
    }

    fn offload(
        &self,
        store: &mut Pinned<D>,
        from: (&Buffer<D>, usize),
        index: usize,
        elements: usize,
    ) {
        self.note(store.offload(from, index, elements));
    }

    fn fetch(
        &self,
        store: &mut Pinned<D>,
        index: usize,
        (to, slot): (&mut Buffer<D>, usize),
        elements: usize,
    ) {
        self.note(store.fetch(index, (to, slot), elements));
    }

    fn settle(&self, _store: &mut Pinned<D>, slot: usize) {
        self.note(self.driver().await_copy(slot));
    }

    fn offload_failure(&self, _store: &mut Pinned<D>) -> Result<()> {
        // Kept with all other failures.
        Ok(())
    }

    fn upload_weight(&self, weight: FrozenMatrix) -> Result<DeviceWeight<D>> {
        weight::upload(&self.shared.driver, &self.shared.tables, &weight)
    }

    fn stream_weights(
        &self,
        blocks: Vec<Vec<FrozenMatrix>>,
        pages: Streaming,
    ) -> Result<StreamedWeights<DeviceWeight<D>>> {
        stream::stream(self, blocks, pages)
    }

    fn upload_vector(&self, vector: Vec<f32>) -> Result<DeviceVector<D>> {
        let driver = &self.shared.driver;
        let memory = Allocation::new(driver, 4 * vector.len())?;
        driver.upload(bytemuck::cast_slice(&vector), memory.address())?;
        Ok(DeviceVector { memory, elements: vector.len() })
    }

    fn values<'a>(&self, buffer: &'a Buffer<D>, range: Range<usize>) -> Result<Cow<'a, [f32]>> {
        let from = buffer.at(range.clone());
        Ok(Cow::Owned(if buffer.dtype == RegionType::F32 {
            let mut values = vec![0f32; range.len()];
            self.download(from, bytemuck::cast_slice_mut(&mut values))?;
            values
        } else {
            let mut values = vec![bf16::ZERO; range.len()];
            self.download(from, bytemuck::cast_slice_mut(&mut values))?;
            values.iter().map(|x| x.to_f32()).collect()
        }))
    }

    fn set_values(&self, values: &[f32], buffer: &mut Buffer<D>, offset: usize) {
        let to = buffer.at(offset..offset + values.len());
        let driver = self.driver();
        self.note(if buffer.dtype == RegionType::F32 {
            driver.upload(bytemuck::cast_slice(values), to)
        } else {
            let rounded: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
            driver.upload(bytemuck::cast_slice(&rounded), to)
        });
    }

    fn round(&self, from: &Buffer<D>, to: &mut Buffer<D>, elements: usize) {
        self.convert(from, to, elements);
    }

    fn write_tables(
        &self,
        (first, second): (&mut Buffer<D>, &mut Buffer<D>),
        elements: usize,
        fill: impl FnOnce(&mut [f32], &mut [f32]),
    ) {
        let (mut one, mut two) = (vec![0.0; elements], vec![0.0; elements]);
        fill(&mut one, &mut two);
        let mut state = self.state();
        let staging = state.staging.as_mut().expect("a plan is allocated");
        let result = staging
            .fill(first, elements, |to| to.copy_from_slice(&one))
            .and_then(|()| staging.fill(second, elements, |to| to.copy_from_slice(&two)));
        drop(state);
        self.note(result);
    }

    fn loss_sum(&self, memory: &mut Memory<D>) -> LossSum<D> {
        LossSum(memory.region("cuda.loss"))
    }

    fn clear_loss(&self, sum: &mut LossSum<D>) {
        self.note(self.driver().zero(sum.sum(), 8));
    }

    fn read_loss(&self, sum: &LossSum<D>) -> Result<f64> {
        let mut bytes = [0; 8];
        self.download(sum.sum(), &mut bytes)?;
        Ok(f64::from_le_bytes(bytes))
    }

    fn embed(&self, ids: &[u32], table: &DeviceWeight<D>, x: &mut Buffer<D>, accumulate: bool) {
        let width = table.shape[1];
        let to = x.argument(ids.len() * width);
        let Some(ids_on_device) = self.stage(ids) else { return };
        let grid = row_grid(ids.len());
        match &table.form {
            Form::Dense(address) => launch!(self, "embed_bf16", grid, ROW_THREADS;
                ids_on_device, Argument::Pointer(*address), width, to, width, width, accumulate),
            Form::Packed(packed) => {
                let mut arguments = vec![ids_on_device];
                arguments.extend(packed.arguments());
                arguments.extend([to, width.into(), width.into(), accumulate.into()]);
                self.launch("embed_4bit", grid, ROW_THREADS, &mut arguments);
            }
        }
    }

    fn norm_forward(
        &self,
        norm: &NormParameters<DeviceVector<D>>,
        x: &Buffer<D>,
        y: &mut Buffer<D>,
        stats: &mut Buffer<D>,
        rows: usize,
    ) {
        let width = norm.weight.elements;
        let bias = norm.bias.as_ref().map_or(Argument::Pointer(0), DeviceVector::argument);
        launch!(self, "norm_forward", row_grid(rows), ROW_THREADS;
            x.argument(rows * width), width, norm.weight.argument(), bias, norm.epsilon,
            y.argument(rows * width), width, stats.argument(2 * rows), width,
            norm.kind == Norm::Layer);
    }

    fn norm_backward(
        &self,
        norm: &NormParameters<DeviceVector<D>>,
        dy: &Buffer<D>,
        x: &Buffer<D>,
        stats: &Buffer<D>,
        dx: &mut Buffer<D>,
        rows: usize,
    ) {
        let width = norm.weight.elements;
        launch!(self, "norm_backward", row_grid(rows), ROW_THREADS;
            dy.argument(rows * width), width, x.argument(rows * width), width,
            norm.weight.argument(), stats.argument(2 * rows), dx.argument(rows * width), width,
            width, norm.kind == Norm::Layer);
    }

    fn linear_forward(
        &self,
        weight: &DeviceWeight<D>,
        bias: Option<&DeviceVector<D>>,
        lora: Option<LoraTerm<Buffer<D>>>,
        x: &Buffer<D>,
        (y, band): (&mut Buffer<D>, Columns),
        rows: usize,
        accumulate: bool,
    ) {
        let inner = weight.shape[1];
        let from = x.at(0..rows * inner);
        let to = y.band(band, rows);
        let product =
            |address| Product { address, stride: band.stride, wide: false, batch_stride: 0 };
        self.for_panels(weight, |panel| {
            let c = product(to + 2 * panel.rows.start as u64);
            let operands = (operand(from, inner), transposed(panel.address, inner));
            self.gemm([rows, panel.rows.len(), inner], (1.0, beta(accumulate)), operands, c);
        });
        if let Some(LoraTerm { shape, pair, inner: (ax, columns) }) = lora {
            let b = pair.at(shape.a_elements()..shape.elements());
            let operands =
                (operand(ax.band(columns, rows), columns.stride), transposed(b, shape.rank));
            self.gemm([rows, band.width, shape.rank], (shape.scale, 1.0), operands, product(to));
        }
        if let Some(bias) = bias {
            launch!(self, "add_bias", row_grid(rows), ROW_THREADS;
                Argument::Pointer(to), band.stride, bias.argument(), band.width);
        }
    }

    fn linear_backward(
        &self,
        weight: &DeviceWeight<D>,
        lora: Option<LoraTerm<Buffer<D>>>,
        (dy, band): (&Buffer<D>, Columns),
        dx: &mut Buffer<D>,
        rows: usize,
        accumulate: bool,
    ) {
        let width = weight.shape[1];
        let from = dy.band(band, rows);
        let address = dx.at(0..rows * width);
        let c = Product { address, stride: width, wide: false, batch_stride: 0 };
        self.for_panels(weight, |panel| {
            let operands = (
                operand(from + 2 * panel.rows.start as u64, band.stride),
                operand(panel.address, width),
            );
            let factors = (1.0, beta(accumulate || panel.rows.start > 0));
            self.gemm([rows, width, panel.rows.len()], factors, operands, c);
        });
        if let Some(LoraTerm { shape, pair, inner: (t, columns) }) = lora {
            let a = pair.at(0..shape.a_elements());
            let operands = (operand(t.band(columns, rows), columns.stride), operand(a, width));
            self.gemm([rows, width, shape.rank], (1.0, 1.0), operands, c);
        }
    }

    fn load_pair(&self, parameters: &Parameters<Self>, index: usize, pair: &mut Buffer<D>) {
        let range = parameters.pair_range(index);
        match parameters.working() {
            // The bf16 copies are operands as they are.
            Some(working) => *pair = working.part(range),
            None => {
                let elements = range.len();
                self.convert(&parameters.master_buffer().part(range), pair, elements);
            }
        }
    }

    fn lora_project(
        &self,
        shape: &LoraShape,
        pair: &Buffer<D>,
        x: &Buffer<D>,
        (ax, band): (&mut Buffer<D>, Columns),
        rows: usize,
    ) {
        let inner = shape.in_features;
        let (a, address) = (pair.at(0..shape.a_elements()), ax.band(band, rows));
        let operands = (operand(x.at(0..rows * inner), inner), transposed(a, inner));
        let c = Product { address, stride: band.stride, wide: false, batch_stride: 0 };
        self.gemm([rows, shape.rank, inner], (1.0, 0.0), operands, c);
    }

    fn lora_backward(
        &self,
        shape: &LoraShape,
        pair: &Buffer<D>,
        (dy, band): (&Buffer<D>, Columns),
        x: &Buffer<D>,
        (ax, ax_band): (&Buffer<D>, Columns),
        t: &mut Buffer<D>,
        (gradients, offset): (&mut Buffer<D>, usize),
        rows: usize,
    ) {
        let (rank, inner, outer) = (shape.rank, shape.in_features, shape.out_features);
        let b = pair.at(shape.a_elements()..shape.elements());
        let t = t.at(0..rows * rank);
        let dy = (dy.band(band, rows), band.stride);
        let product = |address, stride, wide| Product { address, stride, wide, batch_stride: 0 };
        let operands = (operand(dy.0, dy.1), operand(b, rank));
        let to_t = product(t, rank, false);
        self.gemm([rows, rank, outer], (shape.scale, 0.0), operands, to_t);
        let middle = offset + shape.a_elements();
        let ga = product(gradients.at(offset..middle), inner, true);
        let operands = (transposed(t, rank), operand(x.at(0..rows * inner), inner));
        self.gemm([rank, inner, rows], (1.0, 1.0), operands, ga);
        let gb = product(gradients.at(middle..offset + shape.elements()), rank, true);
        let operands = (transposed(dy.0, dy.1), operand(ax.band(ax_band, rows), ax_band.stride));
        self.gemm([outer, rank, rows], (shape.scale, 1.0), operands, gb);
    }

    fn lora_input_gradient(
        &self,
        shape: &LoraShape,
        pair: &Buffer<D>,
        t: &Buffer<D>,
        dx: &mut Buffer<D>,
        rows: usize,
    ) {
        let (rank, inner) = (shape.rank, shape.in_features);
        let (t, a) = (t.at(0..rows * rank), pair.at(0..shape.a_elements()));
        let address = dx.at(0..rows * inner);
        let c = Product { address, stride: inner, wide: false, batch_stride: 0 };
        let operands = (operand(t, rank), operand(a, inner));
        self.gemm([rows, inner, rank], (1.0, 0.0), operands, c);
    }

    fn dropout(
        &self,
        mask: &DropoutMask,
        x: &Buffer<D>,
        y: &mut Buffer<D>,
        elements: usize,
        accumulate: bool,
    ) {
        let ([key0, key1], step) =
            random::Stream::new(mask.seed, mask.stream).at(mask.step).parts();
        let (threshold, kept) = random::dropout_factors(mask.probability);
        let (rows, width) = as_rows(elements);
        launch!(self, "dropout", row_grid(rows), ROW_THREADS;
            x.argument(elements), width, y.argument(elements), width, width, mask.first, key0, key1,
            step, threshold, kept, accumulate);
    }

    fn rotary(
        &self,
        shape: &AttentionShape,
        (cos, sin): (&Buffer<D>, &Buffer<D>),
        qkv: &mut Buffer<D>,
        rows: usize,
        backward: bool,
    ) {
        let (half, stride) = (rows * shape.head_dim / 2, shape.qkv_width());
        launch!(self, "rotary", row_grid(rows), ROW_THREADS;
            qkv.argument(rows * stride), stride, cos.argument(half), sin.argument(half),
            shape.num_heads + shape.num_kv_heads, shape.head_dim, backward);
    }

    fn attention_forward(
        &self,
        shape: &AttentionShape,
        layout: &TokenLayout,
        qkv: &Buffer<D>,
        o: &mut Buffer<D>,
        lse: &mut Buffer<D>,
        work: &mut Buffer<D>,
    ) {
        attention::forward(self, shape, layout, qkv, (o, lse), work);
    }

    fn attention_cached(
        &self,
        shape: &AttentionShape,
        qkv: &Buffer<D>,
        (cache, past): (&mut Buffer<D>, usize),
        rows: usize,
        o: &mut Buffer<D>,
        _work: &mut Buffer<D>,
    ) {
        attention::cached(self, shape, qkv, (cache, past), o, rows);
    }

    fn attention_backward(
        &self,
        shape: &AttentionShape,
        layout: &TokenLayout,
        qkv: &Buffer<D>,
        o: &Buffer<D>,
        lse: &Buffer<D>,
        d_o: &Buffer<D>,
        dqkv: &mut Buffer<D>,
        work: &mut Buffer<D>,
    ) {
        attention::backward(self, shape, layout, (qkv, o, lse, d_o), dqkv, work);
    }

    fn mlp_forward(
        &self,
        activation: Activation,
        gate: Option<&Buffer<D>>,
        up: &Buffer<D>,
        out: &mut Buffer<D>,
        elements: usize,
    ) {
        let (rows, width) = as_rows(elements);
        let gate = gate.map_or(Argument::Pointer(0), |gate| gate.argument(elements));
        launch!(self, "mlp_forward", row_grid(rows), ROW_THREADS;
            activation_code(activation), gate, width, up.argument(elements), width,
            out.argument(elements), width, width);
    }

    fn mlp_backward(
        &self,
        activation: Activation,
        gate: Option<&Buffer<D>>,
        up: &Buffer<D>,
        d_out: &mut Buffer<D>,
        d_up: &mut Buffer<D>,
        elements: usize,
    ) {
        let (rows, width) = as_rows(elements);
        let d_out = d_out.argument(elements);
        // Without a gate, d_out becomes the gradient of up.
        let (gate, d_gate, d_up) = match gate {
            Some(gate) => (gate.argument(elements), d_out, d_up.argument(elements)),
            None => (Argument::Pointer(0), Argument::Pointer(0), d_out),
        };
        launch!(self, "mlp_backward", row_grid(rows), ROW_THREADS;
            activation_code(activation), gate, width, up.argument(elements), width, d_out, width,
            d_gate, width, d_up, width, width);
    }

    fn cross_entropy(
        &self,
        logits: &mut Buffer<D>,
        targets: &[u32],
        vocab_size: usize,
        scale: Option<f32>,
        loss: &mut LossSum<D>,
    ) {
        const THREADS: u32 = 1024;
        let rows = targets.len();
        let Some(targets) = self.stage(targets) else { return };
        let losses = Argument::Pointer(loss.losses(rows));
        launch!(self, "cross_entropy_bf16", row_grid(rows), THREADS;
            logits.argument(rows * vocab_size), vocab_size, targets, vocab_size,
            scale.unwrap_or(0.0), scale.is_some(), losses);
        let partials = Argument::Pointer(loss.partials());
        let grid = flat(rows);
        launch!(self, "sum_f32", grid, FLAT_THREADS; losses, rows as i64, partials);
        launch!(self, "sum_partials", [1, 1, 1], FLAT_THREADS;
            partials, grid[0], Argument::Pointer(loss.sum()), true);
    }

    fn gather_rows(&self, from: &Buffer<D>, rows: &[u32], to: &mut Buffer<D>, width: usize) {
        let Some(indices) = self.stage(rows) else { return };
        launch!(self, "gather_rows", row_grid(rows.len()), ROW_THREADS;
            from.argument(0), width, indices, to.argument(rows.len() * width), width, width);
    }

    fn scatter_rows(&self, from: &Buffer<D>, rows: &[u32], to: &mut Buffer<D>, width: usize) {
        let Some(indices) = self.stage(rows) else { return };
        launch!(self, "scatter_rows", row_grid(rows.len()), ROW_THREADS;
            from.argument(rows.len() * width), width, indices, to.argument(0), width, width);
    }

    fn copy(
        &self,
        (from, first): (&Buffer<D>, usize),
        (to, start): (&mut Buffer<D>, usize),
        elements: usize,
    ) {
        let bytes = elements * from.size();
        let (from, to) = (from.at(first..first + elements), to.at(start..start + elements));
        self.note(self.driver().copy(from, to, bytes));
    }

    fn zero(&self, buffer: &mut Buffer<D>, elements: usize) {
        self.note(self.driver().zero(buffer.at(0..elements), elements * buffer.size()));
    }
}
