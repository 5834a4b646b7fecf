//! The product with a packed weight as an operation of candle, with its backward.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};

use crate::PackedWeight;
use crate::product::{
    Matrix, MatrixMut, Precision, WeightRef, product_forward, product_input_gradient,
};

/// `y = x·Wᵀ` with W frozen in 4-bit blocks; differentiable in x: `dx = dy·W`.
///
/// Shapes: x `[.., in]`, y `[.., out]`, W `[out, in]`. The product runs in f32 on the CPU; x of
/// another float type is converted, and y converted back. W is decoded panel by panel in both
/// directions: no dense W is ever kept, and no gradient of W is computed, where candle's `matmul`
/// computes and keeps those of both operands.
/// Source: QLoRA, arXiv 2305.14314, equation 5.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use nibble_quant::{BlockFormat, Floats, FrozenLinear, PackedWeight};
///
/// let weight: Vec<f32> = (0..48 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
/// let packed = PackedWeight::quantize(Floats::F32(&weight), [48, 64], &BlockFormat::default())?;
/// let linear = FrozenLinear::new(packed);
/// let x = Var::ones((2, 5, 64), candle_core::DType::F32, &Device::Cpu)?;
/// let y = linear.forward(&x)?;
/// assert_eq!(y.dims(), [2, 5, 48]);
/// let gradients = y.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&x).unwrap().dims(), [2, 5, 64]);
/// # candle_core::Result::Ok(())
/// ```
#[derive(Debug, Clone)]
pub struct FrozenLinear {
    weight: Arc<PackedWeight>,
}

impl FrozenLinear {
    /// A linear without bias; clones share the weight.
    pub fn new(weight: PackedWeight) -> Self {
        FrozenLinear { weight: Arc::new(weight) }
    }

    /// W.
    pub fn weight(&self) -> &PackedWeight {
        &self.weight
    }

    /// `y = x·Wᵀ`.
    ///
    /// # Errors
    /// When the last dimension of x is not W's `in`, or x is no float tensor on the CPU.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if !x.dtype().is_float() {
            bail!("frozen linear: x has type {:?}, expected floats", x.dtype());
        }
        let y = x.to_dtype(DType::F32)?.contiguous()?.apply_op1(FrozenLinearOp::forward(self))?;
        y.to_dtype(x.dtype())
    }
}

/// The product of a [`FrozenLinear`] in one direction, as candle takes it.
struct FrozenLinearOp {
    linear: FrozenLinear,
    /// `dy·W` instead of `x·Wᵀ`.
    backward: bool,
}

impl FrozenLinearOp {
    fn forward(linear: &FrozenLinear) -> Self {
        FrozenLinearOp { linear: linear.clone(), backward: false }
    }

    /// Columns of the argument and of the result.
    fn widths(&self) -> (usize, usize) {
        let [rows, columns] = self.linear.weight.shape();
        if self.backward { (rows, columns) } else { (columns, rows) }
    }

    fn run(&self, values: &[f32], columns: usize, out: &mut [f32], out_columns: usize) {
        let rows = values.len() / columns;
        let argument = Matrix::new(values, (rows, columns, columns));
        let result = MatrixMut::new(out, (rows, out_columns, out_columns));
        let weight = WeightRef::Packed(&self.linear.weight);
        if self.backward {
            product_input_gradient(argument, weight, None, 0.0, result, Precision::F32);
        } else {
            product_forward(argument, weight, None, 0.0, result, Precision::F32);
        }
    }
}

impl CustomOp1 for FrozenLinearOp {
    fn name(&self) -> &'static str {
        if self.backward { "frozen-linear-input-gradient" } else { "frozen-linear" }
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (columns, out_columns) = self.widths();
        let mut shape = layout.dims().to_vec();
        match shape.last_mut() {
            Some(last) if *last == columns => *last = out_columns,
            _ => {
                bail!("{}: x has shape {:?}, expected [.., {columns}]", self.name(), layout.dims())
            }
        }
        let Some((begin, end)) = layout.contiguous_offsets() else {
            bail!("{}: the argument is not contiguous", self.name());
        };
        let values = &storage.as_slice::<f32>()?[begin..end];
        let mut out = vec![0.0; values.len() / columns * out_columns];
        if !values.is_empty() {
            self.run(values, columns, &mut out, out_columns);
        }
        Ok((CpuStorage::F32(out), Shape::from(shape)))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let transposed = FrozenLinearOp { linear: self.linear.clone(), backward: !self.backward };
        gradient.contiguous()?.apply_op1(transposed).map(Some)
    }
}

impl candle_core::Module for FrozenLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        FrozenLinear::forward(self, x)
    }
}
