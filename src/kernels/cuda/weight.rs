//! Frozen matrices on the device: bf16, or 4-bit blocks that are dequantized just before a product.

use std::any::Any;
use std::marker::PhantomData;
use std::sync::Arc;

use bytes::Bytes;
use half::bf16;
use nibble_quant::codebook::{dynamic_map, unsigned_dynamic_map};
use nibble_quant::{Absmax, BlockFormat, NESTED_BLOCK_SIZE, PackedWeight, QuantType};

use super::Cuda;
use super::driver::{Address, Argument, Driver};
use super::memory::{Allocation, Rows};
use super::pinned::PinnedMemory;
use crate::error::Result;
use crate::kernels::cpu::FrozenMatrix;
use crate::plan::WeightParts;

/// Parts of a weight begin on this many bytes.
const PART_ALIGNMENT_BYTES: usize = 256;

/// A frozen matrix `[out, in]`.
pub struct DeviceWeight<D: Driver> {
    /// `[out, in]`.
    pub shape: [usize; 2],
    pub(super) form: Form,
    /// Bytes that the weight takes, padding included.
    pub(super) bytes: WeightParts,
    /// Where the weight lies, if others take turns with it there.
    pub(super) place: Option<Address>,
    /// Whether the weight lies in pinned memory of the host.
    pub(super) on_host: bool,
    /// Keeps the weight's memory alive.
    _memory: Arc<dyn Any + Send + Sync>,
    _driver: PhantomData<D>,
}

impl<D: Driver> DeviceWeight<D> {
    /// The weight's rows, where products can read them as they lie.
    pub(super) fn operand(&self) -> Option<Rows> {
        match self.form {
            Form::Dense(address) if !self.on_host => Some(Rows { address, stride: self.shape[1] }),
            _ => None,
        }
    }

    /// The weight that others take turns with in the memory at `place`.
    pub(super) fn in_turns_at(self, place: Address) -> Self {
        DeviceWeight { place: Some(place), ..self }
    }
}

/// How a weight is stored.
pub(super) enum Form {
    /// bf16, row-major.
    Dense(Address),
    /// 4-bit blocks.
    Packed(Packed),
}

/// Addresses of a packed weight's parts; 0 is null.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Packed {
    codes: Address,
    values: Address,
    absmax: Address,
    absmax_codes: Address,
    nested_absmax: Address,
    map: Address,
    offset: f32,
    block_shift: i32,
}

impl Packed {
    /// The leading arguments of the kernels that read packed weights, from `codes` to
    /// `block_shift`.
    pub fn arguments(&self) -> [Argument; 8] {
        use Argument::{F32, I32, Pointer};
        [
            Pointer(self.codes),
            Pointer(self.values),
            Pointer(self.absmax),
            Pointer(self.absmax_codes),
            Pointer(self.nested_absmax),
            Pointer(self.map),
            F32(self.offset),
            I32(self.block_shift),
        ]
    }
}

/// The tables that all packed weights share: NF4, FP4, dynamic map; and the optimizer's second map.
pub(super) struct Tables<D: Driver> {
    memory: Arc<Allocation<D>>,
}

impl<D: Driver> Tables<D> {
    pub fn new(driver: &Arc<D>) -> Result<Self> {
        let mut all = Vec::new();
        all.extend_from_slice(QuantType::Nf4.values());
        all.extend_from_slice(QuantType::Fp4.values());
        all.extend_from_slice(dynamic_map());
        all.extend_from_slice(unsigned_dynamic_map());
        let bytes: &[u8] = bytemuck::cast_slice(&all);
        let memory = Allocation::new(driver, bytes.len())?;
        driver.upload(bytes, memory.address())?;
        Ok(Tables { memory })
    }

    fn values(&self, quant_type: QuantType) -> Address {
        self.memory.address() + if quant_type == QuantType::Nf4 { 0 } else { 16 * 4 }
    }

    /// The signed dynamic map.
    pub fn map(&self) -> Address {
        self.memory.address() + 32 * 4
    }

    /// The unsigned dynamic map.
    pub fn unsigned_map(&self) -> Address {
        self.map() + 256 * 4
    }
}

/// A part of a weight as the device has it.
pub(super) enum Part {
    /// The bytes of the host.
    Stored(Bytes),
    /// f32 values that become bf16.
    Rounded(Bytes),
}

impl Part {
    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        match self {
            Part::Stored(bytes) => bytes.len(),
            Part::Rounded(wide) => wide.len() / 2,
        }
    }

    /// Writes the part's bytes.
    pub fn write(&self, to: &mut [u8]) {
        match self {
            Part::Stored(bytes) => to.copy_from_slice(bytes),
            Part::Rounded(wide) => {
                for (to, wide) in to.chunks_exact_mut(2).zip(wide.chunks_exact(4)) {
                    let value = f32::from_le_bytes(wide.try_into().expect("four bytes"));
                    to.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
                }
            }
        }
    }
}

/// The parts of `weight`, in the order in which they lie.
pub(super) fn parts(weight: &FrozenMatrix) -> Vec<Part> {
    let stored = |bytes: &Bytes| Part::Stored(bytes.clone());
    match weight {
        FrozenMatrix::Bf16(data, _) => vec![stored(data)],
        FrozenMatrix::F32(data, _) => vec![Part::Rounded(data.clone())],
        FrozenMatrix::Packed(packed) => match packed.absmax() {
            Absmax::Plain(absmax) => vec![stored(packed.codes()), stored(absmax)],
            Absmax::Nested { codes, absmax, .. } => {
                vec![stored(packed.codes()), stored(codes), stored(absmax)]
            }
        },
    }
}

/// Bytes on the device of a matrix of `elements`: packed in `format`, or in bf16.
pub fn matrix_bytes(elements: usize, format: Option<&BlockFormat>) -> usize {
    let parts = match format {
        None => vec![elements * size_of::<bf16>()],
        Some(format) => {
            let blocks = elements.div_ceil(format.block_size);
            let codes = elements.div_ceil(2);
            match format.double_quant {
                true => vec![codes, blocks, 4 * blocks.div_ceil(NESTED_BLOCK_SIZE)],
                false => vec![codes, 4 * blocks],
            }
        }
    };
    parts.into_iter().map(|bytes| bytes.next_multiple_of(PART_ALIGNMENT_BYTES)).sum()
}

/// Bytes from the beginning of each part to that of the next.
pub(super) fn padded_bytes(part: &Part) -> usize {
    part.bytes().next_multiple_of(PART_ALIGNMENT_BYTES)
}

/// `weight`, whose parts lie from `start` on.
pub(super) fn at<D: Driver>(
    tables: &Tables<D>,
    weight: &FrozenMatrix,
    start: Address,
    memory: &Arc<impl Any + Send + Sync>,
) -> DeviceWeight<D> {
    let mut next = start;
    let place = |part: &Part| {
        let bytes = padded_bytes(part) as u64;
        next += bytes;
        next - bytes
    };
    let addresses: Vec<Address> = parts(weight).iter().map(place).collect();
    let shape = weight.shape();
    let bytes = (next - start) as usize;
    let (form, bytes) = match weight {
        FrozenMatrix::Packed(packed) => {
            let form = Form::Packed(packed_at(tables, packed, &addresses));
            (form, WeightParts::packed(shape[0] * shape[1], bytes))
        }
        _ => {
            let dense = WeightParts { dense_linears: bytes as u64, ..WeightParts::default() };
            (Form::Dense(addresses[0]), dense)
        }
    };
    let _memory = memory.clone();
    let (place, on_host) = (None, false);
    DeviceWeight { shape, form, bytes, place, on_host, _memory, _driver: PhantomData }
}

fn packed_at<D: Driver>(
    tables: &Tables<D>,
    weight: &PackedWeight,
    addresses: &[Address],
) -> Packed {
    let (nested, offset) = match weight.absmax() {
        Absmax::Plain(_) => (false, 0.0),
        Absmax::Nested { offset, .. } => (true, *offset),
    };
    let format = weight.format();
    Packed {
        codes: addresses[0],
        values: tables.values(format.quant_type),
        absmax: if nested { 0 } else { addresses[1] },
        absmax_codes: if nested { addresses[1] } else { 0 },
        nested_absmax: if nested { addresses[2] } else { 0 },
        map: if nested { tables.map() } else { 0 },
        offset,
        block_shift: format.block_size.trailing_zeros() as i32,
    }
}

/// Copies `weights` to the device, into one allocation; dense values are rounded to bf16.
pub(super) fn upload<D: Driver>(
    driver: &Arc<D>,
    tables: &Tables<D>,
    weights: Vec<FrozenMatrix>,
) -> Result<Vec<DeviceWeight<D>>> {
    if weights.is_empty() {
        return Ok(Vec::new());
    }
    let bytes = |weight: &FrozenMatrix| parts(weight).iter().map(padded_bytes).sum::<usize>();
    let memory = Allocation::new(driver, weights.iter().map(bytes).sum())?;
    let mut next = memory.address();
    let place = |weight: FrozenMatrix| {
        let start = next;
        for part in parts(&weight) {
            write(driver, &part, next)?;
            next += padded_bytes(&part) as u64;
        }
        Ok(at(tables, &weight, start, &memory))
    };
    weights.into_iter().map(place).collect()
}

/// An embedding or a head, on the device or in pinned memory of the host.
pub(super) fn table<D: Driver>(
    cuda: &Cuda<D>,
    table: FrozenMatrix,
    on_host: bool,
) -> Result<DeviceWeight<D>> {
    let (driver, tables) = (&cuda.shared.driver, &cuda.shared.tables);
    if on_host {
        return pin(driver, tables, &table);
    }
    let mut uploaded = upload(driver, tables, vec![table])?;
    Ok(uploaded.pop().expect("one was given"))
}

fn write<D: Driver>(driver: &Arc<D>, part: &Part, to: Address) -> Result<()> {
    match part {
        Part::Stored(bytes) => driver.upload(bytes, to),
        Part::Rounded(_) => {
            let mut rounded = vec![0; part.bytes()];
            part.write(&mut rounded);
            driver.upload(&rounded, to)
        }
    }
}

/// Writes `weight` to pinned memory of the host, which kernels read where it lies, and copies do.
fn pin<D: Driver>(
    driver: &Arc<D>,
    tables: &Tables<D>,
    weight: &FrozenMatrix,
) -> Result<DeviceWeight<D>> {
    let parts = parts(weight);
    let bytes = parts.iter().map(padded_bytes).sum::<usize>().max(1);
    let mut pinned = PinnedMemory::new(driver, bytes)?;
    // SAFETY: no copy knows it yet.
    #[allow(unsafe_code)]
    let mut rest = unsafe { pinned.slice_mut(0..bytes) };
    for part in &parts {
        let (own, later) = rest.split_at_mut(padded_bytes(part));
        part.write(&mut own[..part.bytes()]);
        rest = later;
    }
    let start = pinned.start() as Address;
    let weight = at(tables, weight, start, &Arc::new(pinned));
    Ok(DeviceWeight { bytes: WeightParts::default(), on_host: true, ..weight })
}
