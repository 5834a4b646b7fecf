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

    /// Their type.
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
