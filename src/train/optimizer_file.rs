//! Weights and moments of a run in `optimizer.safetensors`, bit for bit.

use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, TensorView};

use super::trainee::Trainee;
use crate::checkpoint::atomic;
use crate::error::{Error, Result};
use crate::model::parameters::{ParameterTensor, Part};
use crate::plan::moments::MOMENT_BLOCK;
use crate::plan::{MomentLayout, MomentPlace};

/// f32 weights (`master.KEY`) and AdamW's moments (`exp_avg.KEY`, `exp_avg_sq.KEY`). Moments in 8
/// bits are bytes, with a scale for each 256 in `exp_avg.absmax.KEY` and `exp_avg_sq.absmax.KEY`.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";

/// A tensor of the file and the bytes of a flat buffer that it holds.
struct Entry {
    key: String,
    dtype: Dtype,
    shape: Vec<usize>,
    part: Part,
    bytes: Range<usize>,
}

/// Everything that the file holds, tensor by tensor.
fn entries(tensors: &[ParameterTensor], moments: &MomentLayout) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut add = |prefix: &str, tensor: &ParameterTensor, dtype, shape: &[usize], part, first| {
        let size = if dtype == Dtype::U8 { 1 } else { size_of::<f32>() };
        let start = first * size;
        let bytes = start..start + shape.iter().product::<usize>() * size;
        let key = format!("{prefix}.{}", tensor.name);
        entries.push(Entry { key, dtype, shape: shape.to_vec(), part, bytes });
    };
    for (tensor, place) in tensors.iter().zip(&moments.places) {
        add("master", tensor, Dtype::F32, &tensor.shape, Part::Master, tensor.range.start);
        for (prefix, floats, codes, absmax) in [
            ("exp_avg", Part::FirstMoment, Part::FirstCodes, Part::FirstAbsmax),
            ("exp_avg_sq", Part::SecondMoment, Part::SecondCodes, Part::SecondAbsmax),
        ] {
            match place {
                MomentPlace::Floats(range) => {
                    add(prefix, tensor, Dtype::F32, &tensor.shape, floats, range.start);
                }
                MomentPlace::Blocks(range) => {
                    let first_code = range.start * MOMENT_BLOCK;
                    add(prefix, tensor, Dtype::U8, &tensor.shape, codes, first_code);
                    let scales = format!("{prefix}.absmax");
                    add(&scales, tensor, Dtype::F32, &[range.len()], absmax, range.start);
                }
            }
        }
    }
    entries
}

/// Writes weights and moments into `folder`.
///
/// # Errors
/// `Io`.
pub fn write<M: Trainee>(model: &M, folder: &Path) -> Result<()> {
    let path = folder.join(OPTIMIZER_FILE);
    let mut buffers = HashMap::new();
    for part in Part::LASTING {
        buffers.insert(part, model.values(part)?);
    }
    let mut views = Vec::new();
    for entry in entries(model.tensors(), model.moments()) {
        let bytes: &[u8] = bytemuck::cast_slice(&buffers[&entry.part]);
        let view = TensorView::new(entry.dtype, entry.shape, &bytes[entry.bytes])
            .map_err(|e| write_error(&path, e))?;
        views.push((entry.key, view));
    }
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(views, Some(metadata), &path)
        .map_err(|e| write_error(&path, e))?;
    atomic::finish_file(&path)
}

fn write_error(path: &Path, error: SafeTensorError) -> Error {
    let source = match error {
        SafeTensorError::IoError(source) => source,
        other => std::io::Error::other(other),
    };
    Error::io("write", path, source)
}

/// Reads weights and moments from `folder` and refreshes the working copy.
///
/// # Errors
/// `Io`, or `Input` when the file is damaged or belongs to another adapter or optimizer.
pub fn read<M: Trainee>(model: &mut M, folder: &Path) -> Result<()> {
    let path = folder.join(OPTIMIZER_FILE);
    let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| Error::input(format_args!("{}: {e}", path.display())))?;
    let entries = entries(model.tensors(), model.moments());
    if file.len() != entries.len() {
        let (got, expected) = (file.len(), entries.len());
        return Err(
            Error::input(format_args!("{got} tensors, expected {expected}")).at(path.display())
        );
    }
    for part in Part::LASTING {
        let mut values = model.values(part)?.into_owned();
        for entry in entries.iter().filter(|entry| entry.part == part) {
            let to = &mut bytemuck::cast_slice_mut::<f32, u8>(&mut values)[entry.bytes.clone()];
            copy(&file, entry, to).map_err(|error| error.at(path.display()))?;
        }
        model.set_values(part, &values);
    }
    Ok(())
}

fn copy(file: &SafeTensors, entry: &Entry, to: &mut [u8]) -> Result<()> {
    let Entry { key, dtype, shape, .. } = entry;
    let view = file.tensor(key).map_err(|_| Error::input(format_args!("no tensor {key}")))?;
    if view.dtype() != *dtype || view.shape() != shape {
        let got = (view.dtype(), view.shape());
        return Err(Error::input(format_args!(
            "tensor {key} is {:?} {:?}, expected {dtype:?} {shape:?}",
            got.0, got.1
        )));
    }
    to.copy_from_slice(view.data());
    Ok(())
}
