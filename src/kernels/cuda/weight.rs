//! Frozen matrices on the device: bf16, or 4-bit blocks that are widened just before a product.

use std::sync::Arc;

use half::bf16;
use nibble_quant::codebook::{dynamic_map, unsigned_dynamic_map};
use nibble_quant::{Absmax, PackedWeight, QuantType};

use super::driver::{Address, Argument, Driver};
use super::memory::Allocation;
use crate::error::Result;
use crate::kernels::cpu::FrozenMatrix;

/// Parts of a weight begin on this many bytes.
const PART_ALIGNMENT_BYTES: usize = 256;

/// A frozen matrix `[out, in]`.
pub struct DeviceWeight<D: Driver> {
    /// `[out, in]`.
    pub shape: [usize; 2],
    pub(super) form: Form,
    _memory: Arc<Allocation<D>>,
}

/// How it is stored.
pub(super) enum Form {
    /// bf16, row-major.
    Dense(Address),
    /// 4-bit blocks.
    Packed(Packed),
}

/// Addresses of a packed weight's parts; 0 is null.
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

/// Copies `weight` to the device; dense values are rounded to bf16.
pub(super) fn upload<D: Driver>(
    driver: &Arc<D>,
    tables: &Tables<D>,
    weight: &FrozenMatrix,
) -> Result<DeviceWeight<D>> {
    let shape = weight.shape();
    match weight {
        FrozenMatrix::Packed(packed) => upload_packed(driver, tables, packed),
        FrozenMatrix::Bf16(data, _) => upload_dense(driver, shape, data),
        FrozenMatrix::F32(data, _) => {
            let wide: &[f32] = bytemuck::cast_slice(data);
            let rounded: Vec<bf16> = wide.iter().map(|&x| bf16::from_f32(x)).collect();
            upload_dense(driver, shape, bytemuck::cast_slice(&rounded))
        }
    }
}

fn upload_dense<D: Driver>(
    driver: &Arc<D>,
    shape: [usize; 2],
    bytes: &[u8],
) -> Result<DeviceWeight<D>> {
    let memory = Allocation::new(driver, bytes.len())?;
    driver.upload(bytes, memory.address())?;
    let form = Form::Dense(memory.address());
    Ok(DeviceWeight { shape, form, _memory: memory })
}

fn upload_packed<D: Driver>(
    driver: &Arc<D>,
    tables: &Tables<D>,
    weight: &PackedWeight,
) -> Result<DeviceWeight<D>> {
    let (parts, offset): (Vec<&[u8]>, f32) = match weight.absmax() {
        Absmax::Plain(absmax) => (vec![weight.codes(), absmax], 0.0),
        Absmax::Nested { codes, absmax, offset } => (vec![weight.codes(), codes, absmax], *offset),
    };
    let padded = |part: &&[u8]| part.len().next_multiple_of(PART_ALIGNMENT_BYTES);
    let memory = Allocation::new(driver, parts.iter().map(padded).sum())?;
    let (mut addresses, mut next) = (Vec::new(), memory.address());
    for part in &parts {
        driver.upload(part, next)?;
        addresses.push(next);
        next += padded(part) as u64;
    }
    let nested = parts.len() == 3;
    let format = weight.format();
    let packed = Packed {
        codes: addresses[0],
        values: tables.values(format.quant_type),
        absmax: if nested { 0 } else { addresses[1] },
        absmax_codes: if nested { addresses[1] } else { 0 },
        nested_absmax: if nested { addresses[2] } else { 0 },
        map: if nested { tables.map() } else { 0 },
        offset,
        block_shift: format.block_size.trailing_zeros() as i32,
    };
    Ok(DeviceWeight { shape: weight.shape(), form: Form::Packed(packed), _memory: memory })
}
