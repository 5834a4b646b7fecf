//! Reading, packing or converting, and writing, a part of a tensor at a time.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use nibble_quant::PackedWeight;
use rayon::prelude::*;

use super::summary::{RoleSummary, Sums};
use super::{Repack, Step, quantize};
use crate::checkpoint::tensor_errors::{check_scales, not_finite, unusable};
use crate::checkpoint::writer::{Contents, ShardWriter};
use crate::checkpoint::{Checkpoint, DenseTensor, Elements, Weight};
use crate::error::{Error, Result};
use crate::model::spec::TensorRole;

/// Elements that one parallel task handles: a whole number of blocks of any size. Its buffers are small
/// enough for the heap; larger ones would be mapped and cleared by the system for each task.
const TASK: usize = 1 << 13;
/// Elements that are converted at a time: 16 MiB of bf16.
const PIECE: usize = 1 << 23;
/// Errors of dense tensors are looked at in blocks of this size.
const DENSE_BLOCK: usize = 64;

/// What became of a tensor's values.
enum Change {
    Nothing,
    Rounded(Sums),
}

/// A tensor on its way to the disk, while the next one is packed.
struct Parcel<'a> {
    step: &'a Step,
    contents: Owned,
}

enum Owned {
    /// Blocks, and whether they lie in the source.
    Packed(PackedWeight, bool),
    /// A tensor as it lies in the source.
    Dense(DenseTensor),
    /// Converted elements, one piece after another.
    Pieces(Receiver<Result<Vec<u8>>>),
}

impl Repack<'_> {
    /// Writes all steps; calls `progress(bytes_read)` after each. While one tensor is written, and
    /// the one after the next is read ahead, the next is packed.
    ///
    /// # Errors
    /// `Input` naming the tensor when an element or a scale is not finite, `Io` when the disk refuses.
    pub fn run(
        &self,
        steps: &[Step],
        writer: &mut ShardWriter,
        progress: impl FnMut(usize) -> Result<()>,
    ) -> Result<BTreeMap<TensorRole, RoleSummary>> {
        std::thread::scope(|scope| {
            // Nothing waits in it: besides the tensor that is written only one is in memory.
            let (sender, parcels) = sync_channel(0);
            let write =
                move || parcels.into_iter().try_for_each(|parcel| self.deliver(parcel, writer));
            let writing = std::thread::Builder::new()
                .name("write".into())
                .spawn_scoped(scope, write)
                .map_err(Error::no_thread)?;
            let summaries = self.pack_all(steps, &sender, progress);
            drop(sender);
            let written = writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            written.and(summaries)
        })
    }

    /// Ends early, and without an error of its own, when nobody writes any more.
    fn pack_all<'a>(
        &self,
        steps: &'a [Step],
        sender: &SyncSender<Parcel<'a>>,
        mut progress: impl FnMut(usize) -> Result<()>,
    ) -> Result<BTreeMap<TensorRole, RoleSummary>> {
        let mut summaries = BTreeMap::new();
        for (index, step) in steps.iter().enumerate() {
            if let Some(next) = steps.get(index + 1) {
                self.checkpoint.read_ahead(&next.name);
            }
            let summary: &mut RoleSummary = summaries.entry(step.role).or_default();
            summary.tensors += 1;
            summary.elements += step.shape.iter().product::<usize>();
            summary.bytes_before += step.bytes_before;
            summary.bytes_after += step.bytes_after;
            match self.send(step, sender)? {
                None => break,
                Some(Change::Nothing) => {}
                Some(Change::Rounded(sums)) => summary.add(&step.name, sums),
            }
            progress(step.bytes_before)?;
        }
        Ok(summaries)
    }

    /// Writes one tensor.
    fn deliver(&self, Parcel { step, contents }: Parcel, writer: &mut ShardWriter) -> Result<()> {
        match contents {
            Owned::Packed(packed, stored) => {
                writer.write(&step.name, Contents::Packed(&packed))?;
                if !stored {
                    return Ok(());
                }
            }
            Owned::Dense(dense) => {
                let contents = Contents::Dense(dense.dtype, &step.shape, &dense.data);
                writer.write(&step.name, contents)?;
            }
            Owned::Pieces(pieces) => {
                let (name, shape) = (&step.name, &step.shape);
                return writer.write_pieces(name, step.dtype, shape, pieces.iter());
            }
        }
        self.checkpoint.release(&step.name);
        Ok(())
    }

    /// Compares a written checkpoint with the source, tensor by tensor.
    ///
    /// # Errors
    /// `Input` naming the first tensor that differs.
    pub fn check(&self, steps: &[Step], written: &Checkpoint) -> Result<()> {
        for step in steps {
            let source = self.elements(step)?;
            let same = match (&step.packed, written.weight(&step.name)?) {
                (Some(_), Weight::Packed(packed)) => {
                    same_packed(&self.pack(step, &source)?, &packed)
                }
                (None, Weight::Dense(dense)) => pieces(source.len()).all(|range| {
                    let size = step.dtype.size();
                    let stored = &dense.data[range.start * size..range.end * size];
                    dense.dtype == step.dtype
                        && convert(step, &source, range).is_ok_and(|(bytes, _)| bytes == stored)
                }),
                _ => false,
            };
            self.checkpoint.release(&step.name);
            written.release(&step.name);
            if !same {
                return Err(Error::input(format_args!(
                    "{}: tensor {} differs from its source",
                    written.path().display(),
                    step.name
                ))
                .hint("the disk may be failing: quantize again and check its health"));
            }
        }
        Ok(())
    }

    /// The source of a step in the orientation of the output.
    fn elements(&self, step: &Step) -> Result<Elements> {
        let elements = self.checkpoint.elements(&step.name)?;
        Ok(if step.transposed { elements.transposed() } else { elements })
    }

    /// Hands one tensor over to be written; none when nobody writes any more.
    fn send<'a>(&self, step: &'a Step, sender: &SyncSender<Parcel<'a>>) -> Result<Option<Change>> {
        let source = self.elements(step)?;
        let hand_over = |contents| sender.send(Parcel { step, contents }).is_ok();
        if step.packed.is_some() {
            let packed = self.pack(step, &source)?;
            if source.packed().is_some_and(|from| from.format() == packed.format()) {
                check_scales(&step.name, &packed)?;
                return Ok(hand_over(Owned::Packed(packed, true)).then_some(Change::Nothing));
            }
            let taken = hand_over(Owned::Packed(packed.clone(), false));
            let sums = packing_error(&source, &packed);
            self.checkpoint.release(&step.name);
            return Ok(taken.then_some(Change::Rounded(sums)));
        }
        if let Some(dense) = source.stored().filter(|dense| dense.dtype == step.dtype) {
            dense.check_finite(&step.name)?;
            return Ok(hand_over(Owned::Dense(dense.clone())).then_some(Change::Nothing));
        }
        let (pieces, receiver) = sync_channel(0);
        if !hand_over(Owned::Pieces(receiver)) {
            return Ok(None);
        }
        let mut sums = Sums::default();
        for range in self::pieces(source.len()) {
            let piece = convert(step, &source, range).map(|(bytes, piece)| {
                sums = sums.plus(piece);
                bytes
            });
            if pieces.send(piece).is_err() {
                return Ok(None);
            }
        }
        self.checkpoint.release(&step.name);
        let rounded = source.dtype() != step.dtype;
        Ok(Some(if rounded { Change::Rounded(sums) } else { Change::Nothing }))
    }

    fn pack(&self, step: &Step, source: &Elements) -> Result<PackedWeight> {
        let format = step.packed.expect("the step packs");
        match (source.packed(), source.stored()) {
            (Some(packed), _) if packed.format() == format => Ok(packed.clone()),
            (_, Some(dense)) if dense.dtype == step.dtype => quantize(&step.name, dense, &format),
            _ => {
                let read = |first: usize, out: &mut [f32]| source.read(first, out);
                let shape = [step.shape[0], step.shape[1]];
                PackedWeight::quantize_from(read, step.dtype, shape, &format)
                    .map_err(|e| unusable(&step.name, &e))
            }
        }
    }
}

fn pieces(elements: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..elements).step_by(PIECE).map(move |first| first..(first + PIECE).min(elements))
}

fn same_packed(a: &PackedWeight, b: &PackedWeight) -> bool {
    use nibble_quant::Absmax;
    let same_scales = match (a.absmax(), b.absmax()) {
        (Absmax::Plain(a), Absmax::Plain(b)) => a == b,
        (
            Absmax::Nested { codes: a, absmax: a_absmax, offset: a_offset },
            Absmax::Nested { codes: b, absmax: b_absmax, offset: b_offset },
        ) => a == b && a_absmax == b_absmax && a_offset == b_offset,
        _ => false,
    };
    same_scales
        && a.codes() == b.codes()
        && (a.format(), a.dtype(), a.shape()) == (b.format(), b.dtype(), b.shape())
}

fn packing_error(source: &Elements, packed: &PackedWeight) -> Sums {
    let block_size = packed.format().block_size;
    let parts: Vec<Sums> = (0..source.len().div_ceil(TASK))
        .into_par_iter()
        .map(|task| {
            let first = task * TASK;
            let mut original = vec![0.0; TASK.min(source.len() - first)];
            let mut restored = original.clone();
            source.read(first, &mut original);
            packed.dequantize_range(first, &mut restored);
            Sums::of(&original, &restored, block_size, first / block_size)
        })
        .collect();
    parts.into_iter().fold(Sums::default(), Sums::plus)
}

/// Some elements of `source` in the type of the step, rounded to nearest even, and what that cost.
fn convert(
    step: &Step,
    source: &Elements,
    range: std::ops::Range<usize>,
) -> Result<(Vec<u8>, Sums)> {
    let mut bytes = vec![0; range.len() * step.dtype.size()];
    let tasks = bytes.par_chunks_mut(TASK * step.dtype.size()).enumerate();
    let parts = tasks.map(|(task, bytes)| {
        let first = range.start + task * TASK;
        let mut original = vec![0.0; bytes.len() / step.dtype.size()];
        source.read(first, &mut original);
        step.dtype.round_into(&original, bytes);
        let mut restored = vec![0.0; original.len()];
        step.dtype.widen_into(bytes, &mut restored);
        match restored.iter().position(|value| !value.is_finite()) {
            Some(index) => Err(unfit(step, first + index, original[index])),
            None if step.dtype == source.dtype() => Ok(Sums::default()),
            None => Ok(Sums::of(&original, &restored, DENSE_BLOCK, first / DENSE_BLOCK)),
        }
    });
    let parts: Vec<Result<Sums>> = parts.collect();
    let sums = parts.into_iter().try_fold(Sums::default(), |sums, part| Ok(sums.plus(part?)))?;
    Ok((bytes, sums))
}

/// An error for an element that is not finite in the type of the step.
fn unfit(step: &Step, index: usize, value: f32) -> Error {
    if !value.is_finite() {
        return not_finite(&step.name, &step.shape, index, value);
    }
    let (name, dtype) = (&step.name, step.dtype.as_str());
    Error::input(format_args!("tensor {name}: {value} does not fit {dtype}"))
        .hint("use `--dtype bfloat16`")
}
