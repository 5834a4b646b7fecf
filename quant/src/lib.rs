//! 4-bit blocks compatible with bitsandbytes, and products with weights that stay packed.
//!
//! A weight `[out, in]` is flattened row by row and cut into blocks (64 elements by default). Each
//! block stores `absmax = max|w|` and a 4-bit code for every `w / absmax`; with double quantization
//! the absmax values are themselves stored in 8 bits. Bytes are those that bitsandbytes writes.
//!
//! ```
//! use nibble_quant::{BlockFormat, Floats, PackedWeight};
//!
//! let weight: Vec<f32> = (0..64 * 128).map(|i| (i as f32 * 0.37).sin()).collect();
//! let packed = PackedWeight::quantize(Floats::F32(&weight), [64, 128], &BlockFormat::default())?;
//! assert_eq!(packed.bytes(), 64 * 128 / 2 + 128 + 4 + 4); // codes, scales, scale of scales, offset
//! let restored = packed.dequantize();
//! let error = weight.iter().zip(&restored).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
//! assert!(error < 0.16);
//! # candle_core::Result::Ok(())
//! ```
//!
//! Sources: QLoRA, arXiv 2305.14314; bitsandbytes `functional.py` and `csrc/kernels.cu`.

mod block;
pub mod codebook;
mod decode;
mod dequantize;
mod float;
mod format;
mod nested;
mod packed;
pub mod product;

pub use float::{FloatType, Floats};
pub use format::{BlockFormat, NESTED_BLOCK_SIZE, QuantType};
pub use nested::{dequantize_absmax, quantize_absmax};
pub use packed::{Absmax, PackedParts, PackedWeight};
