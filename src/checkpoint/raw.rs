//! Tensors as the files of a folder hold them.

use bytes::Bytes;
use safetensors::Dtype;

/// A tensor as the header of its file describes it.
#[derive(Debug, Clone)]
pub(super) struct RawTensor {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) data: Bytes,
}
