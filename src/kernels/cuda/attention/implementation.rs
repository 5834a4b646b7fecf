//! Which kernels compute attention: asked for, and there for a width of heads.

use clap::ValueEnum;

use super::flash::{FLASH_WIDTHS, Flash, flash_width};
use crate::error::{Error, Result};

/// Columns of a head that `attention_decode` holds.
const WIDEST: usize = 256;

/// How attention is computed on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum AttnImplementation {
    /// Flash if there are kernels for the model's head size, else exact.
    #[default]
    Auto,
    /// Flash attention: scores are computed and used tile by tile.
    #[value(alias = "flash_attention_2")]
    Flash,
    /// Whole rows of scores: slower, for any head size.
    #[value(alias = "eager")]
    Exact,
}

impl AttnImplementation {
    /// Checks that there are kernels for heads of this width.
    ///
    /// # Errors
    /// `Usage` for the flash kernels and a width that they lack, and for one that none has.
    pub fn check(self, head_dim: usize) -> Result<()> {
        if head_dim > WIDEST {
            let what =
                format_args!("heads of {head_dim} columns, the CUDA backend has up to {WIDEST}");
            return Err(Error::usage(what).hint("use `--device cpu`"));
        }
        if self != AttnImplementation::Flash || FLASH_WIDTHS.contains(&head_dim) {
            return Ok(());
        }
        let what = format_args!(
            "`--attn-implementation flash` has kernels for heads of {FLASH_WIDTHS:?}, this model's \
             have {head_dim} columns"
        );
        Err(Error::usage(what).hint("use `--attn-implementation exact`, or leave it to `auto`"))
    }

    /// The flash kernels, if heads of this width shall have them.
    pub(super) fn flash(self, head_dim: usize) -> Option<Flash> {
        if self == AttnImplementation::Exact { None } else { flash_width(head_dim) }
    }
}
