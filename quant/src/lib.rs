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
//! # What it is for
//!
//! * **Packing**: [`PackedWeight::quantize`] takes f32, f16 or bf16, NF4 or FP4, blocks of 32 to 4096
//!   elements, with or without double quantization ([`BlockFormat`]). It runs on all threads with the
//!   widest registers that the processor has; [`PackedWeight::quantize_from`] reads the elements a
//!   part at a time, for tensors that are larger than memory should hold. A weight that is NaN or
//!   infinite is an error with its index, because it would poison its block silently.
//! * **bitsandbytes' files**: [`PackedWeight::from_parts`] takes the stored bytes as they are, usually
//!   slices of a mapped file, and [`PackedWeight::codes`] and [`PackedWeight::absmax`] give them back.
//!   [`codebook`] has the tables that go beside them.
//! * **Decoding**: [`PackedWeight::dequantize`], or any rows or range of it, in f32.
//! * **Products**: [`product`] multiplies activations with a weight that stays packed, forward and for
//!   the gradient of the input, with a low-rank addition in the same pass: the inner loop of QLoRA.
//! * **candle**: [`FrozenLinear`] is that product as an operation of candle's graph, with a backward.
//!
//! # A frozen linear in candle's autograd
//!
//! ```
//! use candle_core::{DType, Device, Tensor, Var};
//! use nibble_quant::{BlockFormat, Floats, FrozenLinear, PackedWeight};
//!
//! // y = x Wᵀ + s · x Aᵀ Bᵀ with W frozen in 4 bits: the gradient reaches A, B and x.
//! let weight: Vec<f32> = (0..32 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
//! let packed = PackedWeight::quantize(Floats::F32(&weight), [32, 64], &BlockFormat::default())?;
//! let frozen = FrozenLinear::new(packed);
//! let a = Var::randn(0.0f32, 1.0, (4, 64), &Device::Cpu)?;
//! let b = Var::zeros((32, 4), DType::F32, &Device::Cpu)?;
//! let x = Tensor::randn(0.0f32, 1.0, (10, 64), &Device::Cpu)?;
//! let y = (frozen.forward(&x)? + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * 2.0)?)?;
//! let gradients = y.sqr()?.sum_all()?.backward()?;
//! assert!(gradients.get(&b).is_some());
//! # candle_core::Result::Ok(())
//! ```
//!
//! # What is promised
//!
//! Codes and plain scales are bit for bit those of bitsandbytes, on every case of its CPU backend and
//! of the rules in its CUDA source: ties at every threshold, zero blocks, denormals, partial last
//! blocks. Nested 8-bit scales follow the CUDA source, where bitsandbytes' CPU backend rounds some
//! scales to a code that is not the nearest. Decoding is `value[code] · absmax` in f32, not rounded to
//! the weight's type: round it to get what bitsandbytes returns.
//!
//! `cargo bench -p nibble-quant --bench blocks` prints the speed of all of it beside a plain copy.
//!
//! Sources: QLoRA, arXiv 2305.14314; bitsandbytes `functional.py` and `csrc/kernels.cu`.

mod block;
pub mod codebook;
mod decode;
mod dequantize;
mod dot;
mod float;
mod format;
mod frozen;
mod nested;
mod owned_bytes;
mod packed;
pub mod product;

pub use float::{FloatType, Floats};
pub use format::{BlockFormat, NESTED_BLOCK_SIZE, QuantType};
pub use frozen::FrozenLinear;
pub use nested::{dequantize_absmax, quantize_absmax};
pub use owned_bytes::owned_bytes;
pub use packed::{Absmax, PackedParts, PackedWeight};
