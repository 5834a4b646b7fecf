//! `adapter_model.safetensors`: the tensors of an adapter as they are stored.

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use nibble_quant::FloatType;
use safetensors::{Dtype, SafeTensors};

use crate::checkpoint::{DenseTensor, damaged_safetensors};
use crate::error::{Error, Result};

/// File name of the tensors in an adapter's folder.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";
/// PEFT's older file, a Python pickle.
const PICKLE_FILE: &str = "adapter_model.bin";

/// Reads the tensors of the adapter in `dir`.
///
/// # Errors
/// `Io` when the file cannot be read; `Input` when it is not safetensors, is cut, or holds a tensor
/// that is not f32, f16 or bf16, or a value that is not finite.
pub fn read(dir: &Path) -> Result<BTreeMap<String, DenseTensor>> {
    let path = dir.join(TENSORS_FILE);
    let data = Bytes::from(std::fs::read(&path).map_err(|e| {
        let error = Error::io("read", &path, e);
        match dir.join(PICKLE_FILE).exists() {
            true => error.hint("adapter_model.bin is a pickle: load and save it once in PEFT"),
            false => error,
        }
    })?);
    let file = SafeTensors::deserialize(&data)
        .map_err(|e| damaged_safetensors(&data, &e).at(path.display()))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.iter() {
        let place = || format!("{}: `{name}`", path.display());
        let dtype = match view.dtype() {
            Dtype::F32 => FloatType::F32,
            Dtype::F16 => FloatType::F16,
            Dtype::BF16 => FloatType::Bf16,
            other => {
                let what = format_args!("expected F32, F16 or BF16, got {other:?}");
                let error = Error::input(what).at(place());
                return Err(error.hint("save the adapter once in PEFT with float weights"));
            }
        };
        let (shape, data) = (view.shape().to_vec(), data.slice_ref(view.data()));
        let tensor = DenseTensor { dtype, shape, data };
        if let Some(index) = tensor.to_f32().iter().position(|x| !x.is_finite()) {
            let what = format_args!("element {index} is not a finite number");
            let error = Error::input(what).at(place());
            return Err(error.hint("its training went wrong: take an earlier checkpoint"));
        }
        tensors.insert(name.to_string(), tensor);
    }
    Ok(tensors)
}
