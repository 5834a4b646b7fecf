//! Element types of dense tensors, and borrowed elements of any of them.

use std::ops::Range;

use half::{bf16, f16};

/// Element type of a dense tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum FloatType {
    /// 32-bit float.
    #[serde(rename = "float32")]
    F32,
    /// IEEE half precision.
    #[serde(rename = "float16")]
    F16,
    /// bfloat16.
    #[serde(rename = "bfloat16")]
    Bf16,
}

impl FloatType {
    /// PyTorch's name, as in `torch_dtype` and a quant state's `dtype`.
    pub fn as_str(self) -> &'static str {
        match self {
            FloatType::F32 => "float32",
            FloatType::F16 => "float16",
            FloatType::Bf16 => "bfloat16",
        }
    }

    /// The type that PyTorch calls `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        [FloatType::F32, FloatType::F16, FloatType::Bf16].into_iter().find(|t| t.as_str() == name)
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        if self == FloatType::F32 { 4 } else { 2 }
    }

    /// The largest finite value.
    pub fn largest(self) -> f32 {
        match self {
            FloatType::F32 => f32::MAX,
            FloatType::F16 => f16::MAX.to_f32(),
            FloatType::Bf16 => bf16::MAX.to_f32(),
        }
    }

    /// Writes `values` in this type into `bytes`: rounded to nearest even, little-endian. What is far beyond
    /// [`largest`](Self::largest) becomes infinite, NaN stays NaN.
    ///
    /// # Panics
    /// When `bytes` has another length than the values take.
    pub fn round_into(self, values: &[f32], bytes: &mut [u8]) {
        assert_eq!(bytes.len(), values.len() * self.size(), "a place for each value");
        match self {
            FloatType::F32 => put(values, bytes, f32::to_le_bytes),
            FloatType::F16 => put(values, bytes, |value| f16::from_f32(value).to_le_bytes()),
            FloatType::Bf16 => put(values, bytes, |value| bf16::from_f32(value).to_le_bytes()),
        }
    }

    /// Reads the little-endian `bytes` of elements of this type into `values`, without loss.
    ///
    /// # Panics
    /// When `bytes` has another length than the values take.
    pub fn widen_into(self, bytes: &[u8], values: &mut [f32]) {
        assert_eq!(bytes.len(), values.len() * self.size(), "a value for each place");
        match self {
            FloatType::F32 => take(bytes, values, f32::from_le_bytes),
            FloatType::F16 => take(bytes, values, |bytes| f16::from_le_bytes(bytes).to_f32()),
            FloatType::Bf16 => take(bytes, values, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        }
    }
}

fn put<const N: usize>(values: &[f32], bytes: &mut [u8], rounded: impl Fn(f32) -> [u8; N]) {
    for (bytes, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
        *bytes = rounded(*value);
    }
}

fn take<const N: usize>(bytes: &[u8], values: &mut [f32], widened: impl Fn([u8; N]) -> f32) {
    for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
        *value = widened(*bytes);
    }
}

/// Borrowed elements of a dense tensor.
#[derive(Debug, Clone, Copy)]
pub enum Floats<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// IEEE halves.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

impl<'a> Floats<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Floats::F32(v) => v.len(),
            Floats::F16(v) => v.len(),
            Floats::Bf16(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The type of the elements.
    pub fn dtype(&self) -> FloatType {
        match self {
            Floats::F32(_) => FloatType::F32,
            Floats::F16(_) => FloatType::F16,
            Floats::Bf16(_) => FloatType::Bf16,
        }
    }

    /// A part of them.
    pub fn slice(self, range: Range<usize>) -> Self {
        match self {
            Floats::F32(v) => Floats::F32(&v[range]),
            Floats::F16(v) => Floats::F16(&v[range]),
            Floats::Bf16(v) => Floats::Bf16(&v[range]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TYPES: [FloatType; 3] = [FloatType::F32, FloatType::F16, FloatType::Bf16];

    fn written(dtype: FloatType, values: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; values.len() * dtype.size()];
        dtype.round_into(values, &mut bytes);
        bytes
    }

    fn there_and_back(dtype: FloatType, values: &[f32]) -> Vec<f32> {
        let mut back = vec![0.0; values.len()];
        dtype.widen_into(&written(dtype, values), &mut back);
        back
    }

    #[test]
    fn values_are_rounded_to_nearest_even() {
        // 1 and 3 halves of a unit in the last place above 1: ties, to 1 and to 2 units.
        for (dtype, unit) in [(FloatType::F16, 2f32.powi(-10)), (FloatType::Bf16, 2f32.powi(-7))] {
            let got = there_and_back(dtype, &[1.0 + 0.5 * unit, 1.0 + 1.5 * unit, -3.0]);
            assert_eq!(got, [1.0, 1.0 + 2.0 * unit, -3.0], "{dtype:?}");
        }
        assert_eq!(written(FloatType::F32, &[1.0, -0.1]), [0, 0, 128, 63, 205, 204, 204, 189]);
        assert_eq!(written(FloatType::F16, &[1.0, -0.1]), [0, 60, 102, 174]);
        assert_eq!(written(FloatType::Bf16, &[1.0, -0.1]), [128, 63, 205, 189]);
    }

    #[test]
    fn the_largest_value_is_kept_and_twice_as_much_is_infinite() {
        for dtype in TYPES {
            let largest = dtype.largest();
            let got = there_and_back(dtype, &[largest, -largest, 2.0 * largest, f32::NAN]);
            assert_eq!(got[..3], [largest, -largest, f32::INFINITY], "{dtype:?}");
            assert!(got[3].is_nan(), "{dtype:?}");
        }
    }
}
