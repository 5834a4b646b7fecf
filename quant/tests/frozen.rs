//! The frozen product in candle's autograd against a dense matmul there.

use candle_core::{DType, Device, Result, Tensor, Var};
use nibble_quant::{BlockFormat, Floats, FrozenLinear, PackedWeight, QuantType};

fn values(count: usize, phase: f32) -> Vec<f32> {
    (0..count).map(|i| (i as f32 * 0.731 + phase).sin()).collect()
}

/// A packed weight `[out, in]` and its decoded values.
fn weight(out: usize, columns: usize, quant_type: QuantType) -> (FrozenLinear, Tensor) {
    let format = BlockFormat { quant_type, ..BlockFormat::default() };
    let source = values(out * columns, 0.3);
    let packed = PackedWeight::quantize(Floats::F32(&source), [out, columns], &format).unwrap();
    let dense = Tensor::from_vec(packed.dequantize(), (out, columns), &Device::Cpu).unwrap();
    (FrozenLinear::new(packed), dense)
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    assert_eq!(a.dims(), b.dims());
    (a.to_dtype(DType::F32)? - b.to_dtype(DType::F32)?)?.abs()?.flatten_all()?.max(0)?.to_scalar()
}

/// `sum(c · (x·Wᵀ)²)` and its gradient in x, with the product made by `forward`.
fn loss(x: &Var, forward: impl Fn(&Tensor) -> Result<Tensor>) -> Result<(Tensor, Tensor)> {
    let y = forward(x)?;
    let count = y.elem_count();
    let c = Tensor::from_vec(values(count, 1.1), y.shape(), &Device::Cpu)?;
    let gradients = (y.sqr()? * c)?.sum_all()?.backward()?;
    Ok((y, gradients.get(x).expect("the product has a backward").clone()))
}

#[test]
fn value_and_gradient_are_those_of_the_dense_product() -> Result<()> {
    for (rows, out, columns, quant_type) in [
        (1, 64, 128, QuantType::Nf4),
        (7, 33, 65, QuantType::Nf4),
        (40, 96, 256, QuantType::Fp4),
        (130, 17, 30, QuantType::Nf4),
    ] {
        let (frozen, dense) = weight(out, columns, quant_type);
        let x = Var::from_vec(values(rows * columns, 2.0), (rows, columns), &Device::Cpu)?;
        let (y, dx) = loss(&x, |x| frozen.forward(x))?;
        let (expected, expected_dx) = loss(&x, |x| x.matmul(&dense.t()?))?;
        let scale = columns as f32;
        assert!(largest_difference(&y, &expected)? < 1e-6 * scale, "{out}x{columns}");
        assert!(largest_difference(&dx, &expected_dx)? < 1e-5 * scale, "{out}x{columns}");
    }
    Ok(())
}

#[test]
fn leading_dimensions_stay_and_views_are_read_as_they_look() -> Result<()> {
    let (frozen, dense) = weight(24, 40, QuantType::Nf4);
    let all = Var::from_vec(values(3 * 40 * 6, 0.0), (3, 40, 6), &Device::Cpu)?;
    // Transposed and narrowed: neither contiguous nor at the start of its storage.
    let view = |x: &Tensor| x.transpose(1, 2)?.narrow(1, 2, 3);
    let (y, dx) = loss(&all, |x| frozen.forward(&view(x)?))?;
    let dense_product = |x: &Tensor| {
        let x = view(x)?.contiguous()?.reshape((9, 40))?;
        x.matmul(&dense.t()?)?.reshape((3, 3, 24))
    };
    let (expected, expected_dx) = loss(&all, dense_product)?;
    assert_eq!(y.dims(), [3, 3, 24]);
    assert!(largest_difference(&y, &expected)? < 1e-4);
    assert!(largest_difference(&dx, &expected_dx)? < 1e-3);
    Ok(())
}

#[test]
fn other_float_types_come_back_as_they_went_in() -> Result<()> {
    let (frozen, dense) = weight(16, 64, QuantType::Nf4);
    let x = Tensor::from_vec(values(5 * 64, 0.5), (5, 64), &Device::Cpu)?.to_dtype(DType::BF16)?;
    let x = Var::from_tensor(&x)?;
    let y = frozen.forward(&x)?;
    assert_eq!(y.dtype(), DType::BF16);
    let expected = x.to_dtype(DType::F32)?.matmul(&dense.t()?)?;
    // Half a step of bf16 at the largest value.
    let largest = expected.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    assert!(largest_difference(&y, &expected)? <= largest / 256.0);
    let gradients = y.sum_all()?.backward()?;
    assert_eq!(gradients.get(&x).unwrap().dtype(), DType::BF16);
    Ok(())
}

#[test]
fn gradients_pass_through_several_products() -> Result<()> {
    let (frozen, dense) = weight(12, 20, QuantType::Nf4);
    let x = Var::from_vec(values(4 * 20, 0.9), (4, 20), &Device::Cpu)?;
    // The backward of the second runs through the first.
    let (again, dense_again) = weight(20, 12, QuantType::Nf4);
    let (y, dx) = loss(&x, |x| again.forward(&frozen.forward(x)?.tanh()?))?;
    let dense_product = |x: &Tensor| x.matmul(&dense.t()?)?.tanh()?.matmul(&dense_again.t()?);
    let (expected, expected_dx) = loss(&x, dense_product)?;
    assert!(largest_difference(&y, &expected)? < 1e-4);
    assert!(largest_difference(&dx, &expected_dx)? < 1e-3);
    Ok(())
}

#[test]
fn wrong_arguments_are_errors() {
    let (frozen, _) = weight(16, 64, QuantType::Nf4);
    for (x, says) in [
        (Tensor::zeros((5, 63), DType::F32, &Device::Cpu), "[5, 63], expected [.., 64]"),
        (Tensor::zeros((), DType::F32, &Device::Cpu), "[], expected [.., 64]"),
        (Tensor::zeros((5, 64), DType::U32, &Device::Cpu), "U32, expected floats"),
    ] {
        let error = frozen.forward(&x.unwrap()).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let empty = Tensor::zeros((0, 64), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(frozen.forward(&empty).unwrap().dims(), [0, 16]);
}
