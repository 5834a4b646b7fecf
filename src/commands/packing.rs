//! Refusal of flags that say how weights are to be packed, where they cannot be.

use crate::checkpoint::Checkpoint;
use crate::cli::train::{BaseModelArgs, Quantization};
use crate::error::{Error, Result};

/// Refuses sizes of blocks for weights that are not packed, and what [`check_packed_as`] does.
pub fn check(base: &BaseModelArgs) -> Result<()> {
    let of_blocks = base.block_size.is_some() || base.double_quant.is_some();
    if base.quantization == Some(Quantization::None) && of_blocks {
        let what = "`--block-size` and `--double-quant` have no effect with `--quantization none`";
        return Err(Error::usage(what).hint("leave them out, or choose `--quantization nf4`"));
    }
    check_packed_as(base)
}

/// Refuses a packing that is asked for where the base is packed in another already.
pub fn check_packed_as(base: &BaseModelArgs) -> Result<()> {
    let asks = base.quantization.is_some() || base.block_size.is_some();
    if !asks && base.double_quant.is_none() {
        return Ok(());
    }
    // What is wrong with the model is told by who opens it to work with it.
    let Ok(checkpoint) = Checkpoint::open(&base.model) else { return Ok(()) };
    let Some(stored) = checkpoint.packed_format() else { return Ok(()) };
    if base.block_format_or(stored) == Some(stored) {
        return Ok(());
    }
    let (model, kind) = (base.model.display(), stored.quant_type.as_str());
    let (size, nested) = (stored.block_size, stored.double_quant);
    Err(Error::usage(format_args!(
        "{model} is 4-bit already: --quantization {kind} --block-size {size} --double-quant {nested}"
    ))
    .hint("leave these flags out, or give the dense model"))
}
