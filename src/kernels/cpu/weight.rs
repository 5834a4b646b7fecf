//! A frozen matrix on the CPU: dense f32 or bf16 as stored (often memory-mapped), or 4-bit blocks.

use bytes::Bytes;
use half::bf16;
use nibble_quant::product::WeightRef;
use nibble_quant::{Absmax, PackedWeight, owned_bytes};

use crate::kernels::Write;
use crate::ledger::resident;
use crate::plan::WeightParts;

/// A frozen matrix `[out, in]`.
#[derive(Debug, Clone)]
pub enum FrozenMatrix {
    /// f32, little-endian, aligned.
    F32(Bytes, [usize; 2]),
    /// bf16, little-endian, aligned.
    Bf16(Bytes, [usize; 2]),
    /// 4-bit blocks.
    Packed(PackedWeight),
}

impl FrozenMatrix {
    /// f32 values; copied only if they are not aligned.
    pub fn from_f32(data: Bytes, shape: [usize; 2]) -> Self {
        FrozenMatrix::F32(aligned::<f32>(data), shape)
    }

    /// bf16 values; copied only if they are not aligned.
    pub fn from_bf16(data: Bytes, shape: [usize; 2]) -> Self {
        FrozenMatrix::Bf16(aligned::<bf16>(data), shape)
    }

    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            FrozenMatrix::F32(_, shape) | FrozenMatrix::Bf16(_, shape) => *shape,
            FrozenMatrix::Packed(packed) => packed.shape(),
        }
    }

    /// in.
    pub fn columns(&self) -> usize {
        self.shape()[1]
    }

    /// Bytes of the stored form.
    pub fn bytes(&self) -> usize {
        match self {
            FrozenMatrix::F32(data, _) | FrozenMatrix::Bf16(data, _) => data.len(),
            FrozenMatrix::Packed(packed) => packed.bytes(),
        }
    }

    /// What of it is in the program's memory, of a mapped file the pages that were read; everything
    /// where the system does not tell.
    pub fn bytes_in_memory(&self) -> WeightParts {
        let bytes = |part: &Bytes| resident::present_bytes(part).unwrap_or(part.len() as u64);
        let none = WeightParts::default();
        match self {
            FrozenMatrix::F32(data, _) | FrozenMatrix::Bf16(data, _) => {
                WeightParts { dense_linears: bytes(data), ..none }
            }
            FrozenMatrix::Packed(packed) => {
                let scales = match packed.absmax() {
                    Absmax::Plain(absmax) => bytes(absmax),
                    Absmax::Nested { codes, absmax, .. } => bytes(codes) + bytes(absmax),
                };
                WeightParts { codes: bytes(packed.codes()), scales, ..none }
            }
        }
    }

    /// All values, widened to f32.
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            FrozenMatrix::F32(data, _) => bytemuck::cast_slice(data).to_vec(),
            FrozenMatrix::Bf16(data, _) => {
                let data: &[bf16] = bytemuck::cast_slice(data);
                data.iter().map(|x| x.to_f32()).collect()
            }
            FrozenMatrix::Packed(packed) => packed.dequantize(),
        }
    }

    /// The matrix as an operand of a product.
    pub fn as_ref(&self) -> WeightRef<'_> {
        match self {
            FrozenMatrix::F32(data, shape) => WeightRef::F32(bytemuck::cast_slice(data), *shape),
            FrozenMatrix::Bf16(data, shape) => WeightRef::Bf16(bytemuck::cast_slice(data), *shape),
            FrozenMatrix::Packed(packed) => WeightRef::Packed(packed),
        }
    }

    /// `scale ·` row `row` into `to`, or added to it.
    pub fn read_row(&self, row: usize, scale: f32, to: &mut [f32], write: Write) {
        let band = row * to.len()..(row + 1) * to.len();
        let put = |to: &mut f32, value: f32| {
            *to = if write.adds() { *to + scale * value } else { scale * value };
        };
        match self {
            FrozenMatrix::F32(data, _) => {
                let data: &[f32] = bytemuck::cast_slice(data);
                to.iter_mut().zip(&data[band]).for_each(|(to, &from)| put(to, from));
            }
            FrozenMatrix::Bf16(data, _) => {
                let data: &[bf16] = bytemuck::cast_slice(data);
                to.iter_mut().zip(&data[band]).for_each(|(to, from)| put(to, from.to_f32()));
            }
            FrozenMatrix::Packed(packed) => {
                let mut values = vec![0.0; to.len()];
                packed.dequantize_rows_into(row..row + 1, &mut values);
                to.iter_mut().zip(values).for_each(|(to, from)| put(to, from));
            }
        }
    }
}

fn aligned<T: bytemuck::Pod + Send>(data: Bytes) -> Bytes {
    if bytemuck::try_cast_slice::<u8, T>(&data).is_ok() {
        return data;
    }
    let copy: Vec<T> = bytemuck::allocation::pod_collect_to_vec(&data);
    owned_bytes(copy)
}
