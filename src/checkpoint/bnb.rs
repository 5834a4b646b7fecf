//! bitsandbytes' 4-bit state dict.
//!
//! A packed weight `P.weight` (U8 `[n/2, 1]`, or the same bytes viewed as a float type) stands
//! beside `P.weight.absmax`, `.quant_map`, with double quantization `.nested_absmax` and
//! `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4` (or `__fp4`): JSON in a U8 tensor.
//! Source: bitsandbytes `functional.py`, `QuantState.as_dict` and `from_dict`.

use nibble_quant::codebook::dynamic_map;
use nibble_quant::{Absmax, FloatType, NESTED_BLOCK_SIZE, PackedParts, PackedWeight, QuantType};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::ANOTHER_COPY;
use super::raw::RawTensor;
use crate::error::{Error, Result, candle_text};

/// What the names of a packed weight's parts have behind that of the weight.
pub(super) const ABSMAX: &str = ".absmax";
pub(super) const QUANT_MAP: &str = ".quant_map";
pub(super) const NESTED_ABSMAX: &str = ".nested_absmax";
pub(super) const NESTED_QUANT_MAP: &str = ".nested_quant_map";
const PARTS: [&str; 4] = [ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_QUANT_MAP];
const QUANT_STATE: &str = ".quant_state.bitsandbytes__";
const TYPES: [QuantType; 2] = [QuantType::Nf4, QuantType::Fp4];

/// The JSON of a quant state, keys in the order in which bitsandbytes writes them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuantState {
    /// NF4 or FP4.
    pub quant_type: QuantType,
    /// Elements for each absmax.
    pub blocksize: usize,
    /// Type before quantization.
    pub dtype: FloatType,
    /// `[out, in]`.
    pub shape: Vec<usize>,
    /// 256 with double quantization.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nested_blocksize: Option<usize>,
    /// `float32` with double quantization.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nested_dtype: Option<String>,
    /// Mean of absmax with double quantization.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nested_offset: Option<f64>,
}

/// The name of the quant state of the weight `name`.
pub(super) fn quant_state_name(name: &str, quant_type: QuantType) -> String {
    format!("{name}{QUANT_STATE}{}", quant_type.as_str())
}

/// The quant state that belongs to the weight `name`, if `has` says that there is one.
pub(super) fn quant_state_key(name: &str, has: impl Fn(&str) -> bool) -> Option<String> {
    TYPES.into_iter().map(|quant_type| quant_state_name(name, quant_type)).find(|key| has(key))
}

/// Whether `name` is a part of a packed weight.
pub(super) fn is_part(name: &str, has: impl Fn(&str) -> bool) -> bool {
    if TYPES.into_iter().any(|quant_type| name.ends_with(&quant_state_name("", quant_type))) {
        return true;
    }
    let weight = PARTS.iter().find_map(|part| name.strip_suffix(part));
    weight.is_some_and(|weight| quant_state_key(weight, has).is_some())
}

/// Assembles the weight `name` from its parts.
pub(super) fn packed_weight<'a>(
    name: &str,
    state_key: &str,
    get: impl Fn(&str) -> Option<&'a RawTensor>,
) -> Result<PackedWeight> {
    let part = |suffix: &str| {
        get(&format!("{name}{suffix}")).ok_or_else(|| {
            Error::input(format_args!("tensor {name}: part `{name}{suffix}` is missing"))
                .hint("the 4-bit checkpoint is incomplete: download or quantize it again")
        })
    };
    let state = get(state_key).map(|tensor| &tensor.data[..]).unwrap_or_default();
    let state: QuantState = serde_json::from_slice(state)
        .map_err(|e| Error::input(format_args!("tensor {state_key}: damaged quant state: {e}")))?;
    let [rows, columns] = state.shape[..] else {
        return Err(Error::input(format_args!(
            "tensor {name}: quant state has shape {:?}, expected [out, in]",
            state.shape
        )));
    };
    check_map(name, &part(QUANT_MAP)?.data, state.quant_type.values())?;
    PackedWeight::from_parts(PackedParts {
        shape: [rows, columns],
        dtype: state.dtype,
        quant_type: state.quant_type,
        block_size: state.blocksize,
        absmax: absmax(name, &state, part)?,
        codes: part("")?.data.clone(),
    })
    .map_err(|e| {
        Error::input(format_args!("tensor {name}: {}", candle_text(&e))).hint(ANOTHER_COPY)
    })
}

/// The scales of the weight `name`, plain or nested; `part` has its parts.
fn absmax<'a>(
    name: &str,
    state: &QuantState,
    part: impl Fn(&str) -> Result<&'a RawTensor>,
) -> Result<Absmax> {
    let scales = part(ABSMAX)?;
    match (state.nested_blocksize, state.nested_offset) {
        (Some(NESTED_BLOCK_SIZE), Some(offset)) => {
            check_map(name, &part(NESTED_QUANT_MAP)?.data, dynamic_map())?;
            Ok(Absmax::Nested {
                codes: scales.data.clone(),
                absmax: part(NESTED_ABSMAX)?.data.clone(),
                offset: offset as f32,
            })
        }
        (None, _) if scales.dtype == Dtype::F32 => Ok(Absmax::Plain(scales.data.clone())),
        (nested, _) => Err(Error::input(format_args!(
            "tensor {name}: absmax of type {:?} with nested block size {nested:?}, expected F32 \
             without or U8 with {NESTED_BLOCK_SIZE}",
            scales.dtype
        ))),
    }
}

/// The code values are constants of the format; other values mean another format.
fn check_map(name: &str, stored: &[u8], expected: &[f32]) -> Result<()> {
    let same = stored.len() == 4 * expected.len()
        && stored.chunks_exact(4).zip(expected).all(|(bytes, value)| {
            f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) == *value
        });
    if same {
        return Ok(());
    }
    Err(Error::input(format_args!("tensor {name}: quant map differs from bitsandbytes'")))
}
