//! A trainable LoRA adapter: the adapted linears and their two matrices each.

use nibble_quant::BlockFormat;

use super::config::{InitLoraWeights, LoraConfig};
use crate::error::Result;
use crate::model::spec::{LinearRole, ModelSpec};
use crate::random::Stream;

/// One adapted linear.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraTarget {
    /// Hugging Face path of the linear, such as `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// The block that it is in.
    pub layer: usize,
    /// What it is in its block.
    pub role: LinearRole,
    /// Dimensions and scale.
    pub shape: LoraShape,
}

impl LoraTarget {
    /// PEFT's key of A.
    pub fn key_a(&self) -> String {
        format!("base_model.model.{}.lora_A.weight", self.module)
    }

    /// PEFT's key of B.
    pub fn key_b(&self) -> String {
        format!("base_model.model.{}.lora_B.weight", self.module)
    }
}

/// One adapter on one linear: `y += scale · (x Aᵀ) Bᵀ`, A `[R, in]`, B `[out, R]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraShape {
    /// Width of x.
    pub in_features: usize,
    /// Width of y.
    pub out_features: usize,
    /// R.
    pub rank: usize,
    /// alpha / R, or alpha / sqrt(R).
    pub scale: f32,
}

impl LoraShape {
    /// Elements of A; those of B follow them.
    pub fn a_elements(&self) -> usize {
        self.rank * self.in_features
    }

    /// Elements of B.
    pub fn b_elements(&self) -> usize {
        self.rank * self.out_features
    }

    /// Elements of A and B: trained numbers.
    pub fn elements(&self) -> usize {
        self.a_elements() + self.b_elements()
    }

    /// This shape with another factor on its scale.
    pub fn scaled(self, factor: f32) -> Self {
        LoraShape { scale: self.scale * factor, ..self }
    }
}

/// The two matrices of one target, row-major.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LoraTensors {
    /// `[R, in]`.
    pub a: Vec<f32>,
    /// `[out, R]`.
    pub b: Vec<f32>,
}

/// A LoRA adapter that can be trained: settings, targets in model order, and their tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// The settings that it was made with.
    pub config: LoraConfig,
    /// PEFT's `base_model_name_or_path`.
    pub base_model: Option<String>,
    /// How training packed a dense base model; its model card says so to whoever loads that again.
    pub base_packing: Option<BlockFormat>,
    /// Whether the base is the text model in a model for text and images, whose modules have other paths.
    pub base_is_part: bool,
    /// The adapted linears, block by block in forward order.
    pub targets: Vec<LoraTarget>,
    /// A and B of the targets, in the same order.
    pub tensors: Vec<LoraTensors>,
}

impl Adapter {
    /// A fresh adapter: A random by PEFT's rules, B zero. The values depend on the seed, the
    /// tensor's name and the element's index only.
    ///
    /// # Errors
    /// Those of [`LoraConfig::resolve`].
    pub fn init(config: LoraConfig, spec: &ModelSpec, seed: u64) -> Result<Self> {
        let targets = config.resolve(spec)?;
        let config = LoraConfig { fan_in_fan_out: spec.projections.are_transposed(), ..config };
        let tensors =
            targets.iter().map(|target| initial(target, config.init_lora_weights, seed)).collect();
        Ok(Adapter {
            config,
            base_model: None,
            base_packing: None,
            base_is_part: false,
            targets,
            tensors,
        })
    }

    /// Trained numbers of all targets.
    pub fn parameters(&self) -> usize {
        self.targets.iter().map(|target| target.shape.elements()).sum()
    }
}

fn initial(target: &LoraTarget, kind: InitLoraWeights, seed: u64) -> LoraTensors {
    let stream = Stream::new(seed, &target.key_a());
    let mut a = vec![0.0; target.shape.a_elements()];
    match kind {
        InitLoraWeights::Kaiming => {
            // Kaiming-uniform with a = √5: gain √(2 / 6), bound gain · √(3 / in) = 1 / √in.
            let bound = 1.0 / (target.shape.in_features as f32).sqrt();
            stream.fill_uniform(0, -bound, bound, &mut a);
        }
        InitLoraWeights::Gaussian => stream.fill_normal(0, 1.0 / target.shape.rank as f32, &mut a),
    }
    LoraTensors { a, b: vec![0.0; target.shape.b_elements()] }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures;
    use super::*;

    #[test]
    fn a_fresh_adapter_has_peft_s_distribution() -> Result<()> {
        let config = LoraConfig { r: 64, ..LoraConfig::default() };
        let spec = fixtures::llama(2);
        let kaiming = Adapter::init(config.clone(), &spec, 42)?;
        let gaussian = Adapter::init(
            LoraConfig { init_lora_weights: InitLoraWeights::Gaussian, ..config },
            &spec,
            42,
        )?;
        assert_eq!(kaiming.targets.len(), 14);
        for (target, tensors) in kaiming.targets.iter().zip(&kaiming.tensors) {
            let bound = 1.0 / (target.shape.in_features as f32).sqrt();
            let largest = tensors.a.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
            assert!(largest <= bound && largest > 0.99 * bound, "{}", target.module);
            // A uniform variable in ±bound has variance bound² / 3; 5 standard errors.
            assert_variance(&tensors.a, f64::from(bound).powi(2) / 3.0, 0.8);
            assert_eq!(tensors.b, vec![0.0; target.shape.out_features * target.shape.rank]);
        }
        for tensors in &gaussian.tensors {
            assert_variance(&tensors.a, (1.0 / 64.0_f64).powi(2), 2.0);
            assert!(tensors.b.iter().all(|&x| x == 0.0));
        }
        Ok(())
    }

    /// `excess` is the variance of x² over the square of the variance.
    fn assert_variance(values: &[f32], expected: f64, excess: f64) {
        let n = values.len() as f64;
        let variance = values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n;
        let error = 5.0 * expected * (excess / n).sqrt();
        assert!((variance - expected).abs() < error, "{variance} {expected} {error}");
    }

    #[test]
    fn initial_values_depend_on_seed_and_name_only() -> Result<()> {
        let spec = fixtures::llama(2);
        let only = |names: &str| -> Result<LoraConfig> {
            Ok(LoraConfig { target_modules: names.parse()?, ..LoraConfig::default() })
        };
        let all = Adapter::init(LoraConfig::default(), &spec, 7)?;
        let some = Adapter::init(only("v_proj")?, &spec, 7)?;
        let other = Adapter::init(only("v_proj")?, &spec, 8)?;
        let place = all.targets.iter().position(|t| t.module == some.targets[1].module);
        assert_eq!(all.tensors[place.unwrap_or(0)], some.tensors[1]);
        assert_ne!(some.tensors[0].a, some.tensors[1].a);
        assert_ne!(some.tensors[0].a, other.tensors[0].a);
        Ok(())
    }

    #[test]
    fn parameters_are_counted() -> Result<()> {
        let config =
            LoraConfig { r: 3, target_modules: "c_attn,wpe".parse()?, ..LoraConfig::default() };
        let error = Adapter::init(config, &fixtures::gpt2(), 0).unwrap_err();
        assert!(error.to_string().contains("`transformer.wpe`"), "{error}");
        let config =
            LoraConfig { r: 3, target_modules: "c_attn".parse()?, ..LoraConfig::default() };
        assert_eq!(Adapter::init(config, &fixtures::gpt2(), 0)?.parameters(), 2 * 3 * (64 + 192));
        Ok(())
    }
}
