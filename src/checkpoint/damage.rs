//! What is wrong with a damaged safetensors file, in words: safetensors' own errors leave out which
//! tensor, what it expected and what it got.

use safetensors::{Dtype, SafeTensorError};
use serde_json::{Map, Value};

use crate::error::Error;

/// Bytes of the length in front of the header.
const LENGTH_BYTES: usize = size_of::<u64>();

/// What the names of all kinds of FP8 begin with.
const FP8: &str = "F8_";

/// What a repository that was cloned without Git LFS has in place of a large file, if `bytes` are that.
pub fn lfs_pointer(bytes: &[u8]) -> Option<Error> {
    bytes.starts_with(b"version https://git-lfs.github.com/spec/").then(|| {
        Error::input("a Git LFS pointer, not the file itself")
            .hint("run `git lfs pull` in the folder, or download the file")
    })
}

/// An error for the file `bytes` that safetensors refused with `error`.
pub fn damaged_safetensors(bytes: &[u8], error: &SafeTensorError) -> Error {
    if let Some(pointer) = lfs_pointer(bytes) {
        return pointer;
    }
    if let Some(unread) = unknown_fp8(bytes) {
        return unread;
    }
    let what = explain(bytes).unwrap_or_else(|| error.to_string());
    Error::input(format_args!("damaged safetensors file: {what}")).hint(
        "the download may have been cut short: compare the size with the source's, or download \
         it again",
    )
}

/// The way out of weights in a form that only the tool reads that made it.
pub const OTHER_TOOL: &str =
    "the weights were quantized by another tool: get the model's BF16 or F16 weights";

/// An error for a tensor of a type that is not read.
pub fn unread_type(name: &str, dtype: &str) -> Error {
    let what = "expected F32, F16, BF16 or bitsandbytes 4-bit";
    let hint = match dtype {
        "F64" => "save the model in F32 or BF16, with transformers' `save_pretrained`",
        _ if dtype.starts_with(FP8) => "FP8 is not supported: get the model's BF16 or F16 weights",
        _ => OTHER_TOOL,
    };
    Error::input(format_args!("tensor {name} has type {dtype}, {what}")).hint(hint)
}

/// A tensor of a kind of FP8 that safetensors does not know.
fn unknown_fp8(bytes: &[u8]) -> Option<Error> {
    let (length, rest) = bytes.split_first_chunk::<LENGTH_BYTES>()?;
    let header = rest.get(..usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    let header: Map<String, Value> = serde_json::from_slice(header).ok()?;
    let is_known = |dtype: &Value| serde_json::from_value::<Dtype>(dtype.clone()).is_ok();
    header.iter().find_map(|(name, tensor)| {
        let dtype = tensor["dtype"].as_str().filter(|dtype| dtype.starts_with(FP8))?;
        (!is_known(&tensor["dtype"])).then(|| unread_type(name, dtype))
    })
}

/// The first lie of the header.
fn explain(bytes: &[u8]) -> Option<String> {
    let total = bytes.len();
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Some(format!("{total} bytes, too few for the length of a header"));
    };
    let length = u64::from_le_bytes(*length);
    let Some(header) = usize::try_from(length).ok().and_then(|length| rest.get(..length)) else {
        return Some(format!("the header should have {length} bytes, the file has {total} bytes"));
    };
    let header: Map<String, Value> = match serde_json::from_slice(header) {
        Ok(header) => header,
        Err(error) => return Some(format!("the header is no JSON object: {error}")),
    };
    let mut tensors: Vec<(&String, [usize; 2])> = Vec::new();
    for (name, tensor) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        match extent(tensor) {
            Ok(extent) => tensors.push((name, extent)),
            Err(what) => return Some(format!("tensor {name}: {what}")),
        }
    }
    tensors.sort_by_key(|(_, extent)| *extent);
    let mut before = ("the header", 0);
    for (name, [begin, end]) in tensors {
        if begin != before.1 {
            return Some(format!(
                "tensor {name} begins at byte {begin} of the data, {} ends at {}",
                before.0, before.1
            ));
        }
        before = (name, end);
    }
    let data = rest.len() - length as usize;
    (data != before.1).then(|| {
        format!(
            "the header describes {} bytes of data, the file has {total} bytes, {data} of them data",
            before.1
        )
    })
}

/// First and last byte of a tensor if its type, shape and offsets fit each other.
fn extent(tensor: &Value) -> Result<[usize; 2], String> {
    let numbers = |key: &str| -> Result<Vec<usize>, String> {
        serde_json::from_value(tensor[key].clone()).map_err(|e| format!("`{key}`: {e}"))
    };
    let dtype: Dtype =
        serde_json::from_value(tensor["dtype"].clone()).map_err(|e| format!("`dtype`: {e}"))?;
    let (shape, offsets) = (numbers("shape")?, numbers("data_offsets")?);
    let [begin, end] = offsets[..] else {
        return Err(format!("`data_offsets` is {offsets:?}, expected [begin, end]"));
    };
    let bits = shape.iter().try_fold(dtype.bitsize(), |bits, &size| bits.checked_mul(size));
    let expected = bits.filter(|bits| bits.is_multiple_of(8)).map(|bits| bits / 8);
    if expected.is_none() || end.checked_sub(begin) != expected {
        let expected = expected.map_or("no whole number of".to_string(), |n| n.to_string());
        return Err(format!(
            "{dtype:?} {shape:?} needs {expected} bytes, bytes {begin} to {end} are given"
        ));
    }
    Ok([begin, end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()
    }

    #[test]
    fn every_lie_is_named() {
        let a = r#""a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}"#;
        for (bytes, says) in [
            (vec![0; 5], "5 bytes, too few for the length of a header"),
            (vec![255; 20], "the header should have 18446744073709551615 bytes, the file has 20"),
            (file("[1]", 0), "the header is no JSON object"),
            (
                file(&format!("{{{a}}}"), 23),
                "the header describes 24 bytes of data, the file has 88 bytes, 23 of them data",
            ),
            (
                file(
                    &format!(r#"{{{a},"b":{{"dtype":"U8","shape":[4],"data_offsets":[20,24]}}}}"#),
                    24,
                ),
                "tensor b begins at byte 20 of the data, a ends at 24",
            ),
            (
                file(r#"{"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,24]}}"#, 24),
                "tensor a: BF16 [2, 3] needs 12 bytes, bytes 0 to 24 are given",
            ),
            (
                file(r#"{"a":{"dtype":"F33","shape":[2,3],"data_offsets":[0,24]}}"#, 24),
                "tensor a: `dtype`: unknown variant `F33`",
            ),
            (
                file(
                    r#"{"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,4]}}"#,
                    4,
                ),
                "tensor a: U8 [4294967296, 4294967296] needs no whole number of bytes",
            ),
        ] {
            let error = safetensors::SafeTensors::deserialize(&bytes).unwrap_err();
            let text = damaged_safetensors(&bytes, &error).to_string();
            assert!(text.contains(says), "{text}");
        }
    }

    #[test]
    fn a_kind_of_fp8_that_nobody_knows_is_no_damage() {
        let bytes = file(r#"{"a":{"dtype":"F8_E4M3FN","shape":[4],"data_offsets":[0,4]}}"#, 4);
        let error = safetensors::SafeTensors::deserialize(&bytes).unwrap_err();
        let text = damaged_safetensors(&bytes, &error).to_string();
        assert!(text.starts_with("tensor a has type F8_E4M3FN, expected F32, F16, BF16"), "{text}");
        assert!(text.contains("hint: FP8 is not supported"), "{text}");
    }
}
