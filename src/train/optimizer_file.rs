//! Weights and moments of a run in `optimizer.safetensors`, bit for bit.

use std::ops::Range;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::trainee::AdapterBuffers;
use crate::checkpoint::MappedFile;
use crate::checkpoint::tensor_file::{NewTensor, PIECE_BYTES, pieces, write_tensors};
use crate::error::{Error, Result};
use crate::model::parameters::ParameterTensor;
use crate::plan::moments::MOMENT_BLOCK;
use crate::plan::{AdapterRegion, MomentLayout, MomentPlace};

/// f32 weights (`master.KEY`) and AdamW's moments (`exp_avg.KEY`, `exp_avg_sq.KEY`). Moments in 8
/// bits are bytes, with a scale for each 256 in `exp_avg.absmax.KEY` and `exp_avg_sq.absmax.KEY`.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";

/// A tensor of the file and the bytes of a flat buffer that it holds.
struct Entry {
    key: String,
    dtype: Dtype,
    shape: Vec<usize>,
    region: AdapterRegion,
    bytes: Range<usize>,
}

impl Entry {
    /// The entry's bytes in pieces that begin with a word.
    fn pieces(&self) -> impl Iterator<Item = Range<usize>> {
        pieces(self.bytes.clone(), PIECE_BYTES)
    }
}

/// The words of a flat buffer that hold some of its bytes.
fn words(bytes: &Range<usize>) -> Range<usize> {
    bytes.start / size_of::<f32>()..bytes.end.div_ceil(size_of::<f32>())
}

/// Everything that the file holds, tensor by tensor.
fn entries(tensors: &[ParameterTensor], moments: &MomentLayout) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut add =
        |prefix: &str, tensor: &ParameterTensor, dtype, shape: &[usize], region, first| {
            let size = if dtype == Dtype::U8 { 1 } else { size_of::<f32>() };
            let start = first * size;
            let bytes = start..start + shape.iter().product::<usize>() * size;
            let key = format!("{prefix}.{}", tensor.name);
            entries.push(Entry { key, dtype, shape: shape.to_vec(), region, bytes });
        };
    for (tensor, place) in tensors.iter().zip(&moments.places) {
        add("master", tensor, Dtype::F32, &tensor.shape, AdapterRegion::Master, tensor.range.start);
        for (prefix, floats, codes, absmax) in [
            (
                "exp_avg",
                AdapterRegion::FirstMoment,
                AdapterRegion::FirstCodes,
                AdapterRegion::FirstAbsmax,
            ),
            (
                "exp_avg_sq",
                AdapterRegion::SecondMoment,
                AdapterRegion::SecondCodes,
                AdapterRegion::SecondAbsmax,
            ),
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

/// Writes weights and moments into `folder`, piece by piece: beside a GPU that takes no more of the
/// host's memory than a piece.
///
/// # Errors
/// `Io`, or those of the backend.
pub fn write<M: AdapterBuffers>(model: &M, folder: &Path) -> Result<()> {
    let tensor = |entry: Entry| {
        let (name, dtype, shape) = (entry.key.clone(), entry.dtype, entry.shape.clone());
        NewTensor { name, dtype, shape, source: entry }
    };
    let tensors = entries(model.tensors(), model.moments()).into_iter().map(tensor).collect();
    write_tensors(&folder.join(OPTIMIZER_FILE), tensors, |tensor, sink| {
        let entry: &Entry = &tensor.source;
        for bytes in entry.pieces() {
            let values = model.values(entry.region, words(&bytes))?;
            sink.append(&bytemuck::cast_slice(&values)[..bytes.len()])?;
        }
        Ok(())
    })
}

/// Reads weights and moments from `folder`, piece by piece, and refreshes the working copy.
///
/// # Errors
/// `Io`, or `Input` when the file is damaged or belongs to another adapter or optimizer.
pub fn read<M: AdapterBuffers>(model: &mut M, folder: &Path) -> Result<()> {
    let path = folder.join(OPTIMIZER_FILE);
    let mapped = MappedFile::open(&path)?;
    let file = SafeTensors::deserialize(&mapped.bytes)
        .map_err(|e| Error::input(format_args!("{}: {e}", path.display())))?;
    let entries = entries(model.tensors(), model.moments());
    if file.len() != entries.len() {
        let (got, expected) = (file.len(), entries.len());
        return Err(
            Error::input(format_args!("{got} tensors, expected {expected}")).at(path.display())
        );
    }
    let view = |entry| view(&file, entry).map_err(|error| error.at(path.display()));
    let views = entries.iter().map(view).collect::<Result<Vec<_>>>()?;
    for (entry, view) in entries.iter().zip(&views) {
        for bytes in entry.pieces() {
            // The last word of codes may have some that are no tensor's.
            let mut values = model.values(entry.region, words(&bytes))?.into_owned();
            let from = &view.data()[bytes.start - entry.bytes.start..][..bytes.len()];
            bytemuck::cast_slice_mut(&mut values)[..from.len()].copy_from_slice(from);
            model.set_values(entry.region, words(&bytes).start, &values);
        }
        mapped.release(view.data());
    }
    model.refresh_working();
    Ok(())
}

/// The tensor of an entry, which must have its type and shape.
fn view<'a>(file: &SafeTensors<'a>, entry: &Entry) -> Result<TensorView<'a>> {
    let Entry { key, dtype, shape, .. } = entry;
    let view = file.tensor(key).map_err(|_| Error::input(format_args!("no tensor {key}")))?;
    if view.dtype() != *dtype || view.shape() != shape {
        let got = (view.dtype(), view.shape());
        return Err(Error::input(format_args!(
            "tensor {key} is {:?} {:?}, expected {dtype:?} {shape:?}",
            got.0, got.1
        )));
    }
    Ok(view)
}
