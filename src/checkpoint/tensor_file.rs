//! A safetensors file that is written piece by piece: no tensor needs to be in memory as a whole.
//!
//! Its bytes are those that the `safetensors` crate writes: the widest types first, then by name, the
//! header filled up with spaces to 8 bytes, and `"format": "pt"` in its metadata.

use std::collections::HashMap;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::atomic::{self, AtomicFile};
use crate::error::{Error, Result};

/// The most that is in memory of a tensor while it is written or read.
pub const PIECE_BYTES: usize = 1 << 20;

const HEADER_ALIGNMENT: usize = 8;

/// `range` in pieces of at most `most`.
pub fn pieces(range: Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(most).map(move |start| start..end.min(start + most))
}

/// A tensor to write, and where its contents come from.
pub struct NewTensor<S> {
    /// The name of the tensor.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// The dimensions of the tensor.
    pub shape: Vec<usize>,
    /// What the writer of its contents needs to know.
    pub source: S,
}

impl<S> NewTensor<S> {
    /// How many elements it has.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn bytes(&self) -> usize {
        self.elements() * self.dtype.bitsize() / 8
    }
}

/// Takes the bytes of a tensor, in order.
pub struct Sink<'a> {
    path: &'a Path,
    file: BufWriter<&'a mut AtomicFile>,
    missing_bytes: usize,
}

impl Sink<'_> {
    /// Writes the next piece.
    ///
    /// # Errors
    /// `Io` when the disk refuses.
    pub fn append(&mut self, piece: &[u8]) -> Result<()> {
        self.missing_bytes -= piece.len();
        self.file.write_all(piece).map_err(|e| Error::io("write", self.path, e))
    }
}

/// Writes a file of `tensors`; `contents` appends the bytes of each when it is its turn. The file
/// appears whole or not at all.
///
/// # Errors
/// Those of `contents`, and `Io` when the disk refuses.
pub fn write_tensors<S>(
    path: &Path,
    mut tensors: Vec<NewTensor<S>>,
    mut contents: impl FnMut(&NewTensor<S>, &mut Sink) -> Result<()>,
) -> Result<()> {
    tensors.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
    let header = header(&tensors).map_err(|e| Error::io("write", path, e))?;
    atomic::write_with(path, |file| {
        let file = BufWriter::with_capacity(PIECE_BYTES, file);
        let mut sink = Sink { path, file, missing_bytes: 8 + header.len() };
        sink.append(&(header.len() as u64).to_le_bytes())?;
        sink.append(&header)?;
        for tensor in &tensors {
            sink.missing_bytes = tensor.bytes();
            contents(tensor, &mut sink)?;
            assert_eq!(sink.missing_bytes, 0, "{} is written as a whole", tensor.name);
        }
        sink.file.flush().map_err(|e| Error::io("write", path, e))
    })
}

fn header<S>(tensors: &[NewTensor<S>]) -> std::io::Result<Vec<u8>> {
    let mut end = 0;
    let entry = |tensor: &NewTensor<S>| {
        let start = end;
        end += tensor.bytes();
        let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
        (tensor.name.clone(), TensorInfo { dtype, shape, data_offsets: (start, end) })
    };
    let entries = tensors.iter().map(entry).collect();
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let metadata = Metadata::new(Some(metadata), entries).map_err(std::io::Error::other)?;
    let mut header = serde_json::to_vec(&metadata)?;
    header.resize(header.len().next_multiple_of(HEADER_ALIGNMENT), b' ');
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::TensorView;

    /// Names, types and shapes in no order, one of them empty.
    fn tensors() -> Vec<NewTensor<Vec<u8>>> {
        let tensor = |(name, dtype, shape): (&str, Dtype, &[usize])| {
            let mut tensor = NewTensor {
                name: name.to_string(),
                dtype,
                shape: shape.to_vec(),
                source: Vec::new(),
            };
            tensor.source = (0..tensor.bytes()).map(|i| (7 * i + name.len()) as u8).collect();
            tensor
        };
        let list: [(&str, Dtype, &[usize]); 6] = [
            ("b.weight", Dtype::F32, &[3, 5]),
            ("a.codes", Dtype::U8, &[13]),
            ("c \"quoted\"", Dtype::BF16, &[2, 4]),
            ("a.weight", Dtype::F32, &[4]),
            ("none", Dtype::F32, &[0, 4]),
            ("b.codes", Dtype::U8, &[1, 6]),
        ];
        list.map(tensor).into()
    }

    #[test]
    fn the_bytes_are_those_of_the_safetensors_crate() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tensors.safetensors");
        let all = tensors();
        let view = |tensor: &NewTensor<Vec<u8>>| {
            let NewTensor { name, dtype, shape, .. } = tensor;
            let index = all.iter().position(|known| known.name == *name).unwrap();
            (name.clone(), TensorView::new(*dtype, shape.clone(), &all[index].source).unwrap())
        };
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        let expected = safetensors::serialize(all.iter().map(view), Some(metadata)).unwrap();
        for most in [1, 4, 1 << 20] {
            write_tensors(&path, tensors(), |tensor, sink| {
                let mut pieces = pieces(0..tensor.source.len(), most);
                pieces.try_for_each(|piece| sink.append(&tensor.source[piece]))
            })
            .unwrap();
            assert!(std::fs::read(&path).unwrap() == expected, "pieces of {most}");
        }
    }

    #[test]
    fn a_tensor_that_cannot_be_had_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tensors.safetensors");
        let error = write_tensors(&path, tensors(), |tensor, sink| match tensor.dtype {
            Dtype::U8 => Err(Error::budget("no memory")),
            _ => sink.append(&tensor.source),
        });
        assert!(matches!(error, Err(Error::Budget(_))), "{error:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn pieces_are_a_range() {
        assert_eq!(pieces(3..10, 4).collect::<Vec<_>>(), [3..7, 7..10]);
        assert_eq!(pieces(3..3, 4).count(), 0);
    }
}
