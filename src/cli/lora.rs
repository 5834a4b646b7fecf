//! Flags of the adapter, under PEFT's names.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};
use nibble_quant::FloatType;

use super::listed::listed;
use super::numbers;
use crate::adapter::{InitLoraWeights, LoraConfig, LoraPlus, ModuleNames, TargetModules};
use crate::error::Result;

/// Data type of the trained weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AdapterDtype {
    /// bf16 in matrix products, with f32 master weights and optimizer moments.
    Bf16,
    /// f32 throughout, as PEFT does.
    F32,
}

/// As the adapter's file has it.
impl From<AdapterDtype> for FloatType {
    fn from(dtype: AdapterDtype) -> Self {
        match dtype {
            AdapterDtype::Bf16 => FloatType::Bf16,
            AdapterDtype::F32 => FloatType::F32,
        }
    }
}

/// Settings that `--init-adapter` brings along.
const INIT_ADAPTER_DECIDES: [&str; 10] = [
    "lora_r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
];

/// What is trained, and how it starts.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Adapter")]
pub struct LoraArgs {
    /// LoRA rank
    #[arg(long, value_name = "R", default_value = "16", value_parser = numbers::at_least_one)]
    pub lora_r: NonZeroUsize,
    /// LoRA alpha: the adapter is scaled by alpha / r
    #[arg(long, value_name = "ALPHA", default_value_t = 32.0,
          value_parser = numbers::positive)]
    pub lora_alpha: f64,
    /// Dropout probability of the adapter's inputs
    #[arg(long, value_name = "PROBABILITY", default_value_t = 0.0,
          value_parser = numbers::below_one)]
    pub lora_dropout: f64,
    /// Modules to adapt: `all-linear`, names separated by commas, or a regular expression
    #[arg(long, value_name = "MODULES", default_value = "all-linear",
          value_parser = listed::<TargetModules>(&["all-linear"]), hide_possible_values = true)]
    pub target_modules: TargetModules,
    /// Modules to exclude: names separated by commas, or a regular expression
    #[arg(long, value_name = "MODULES")]
    pub exclude_modules: Option<ModuleNames>,
    /// Indices of the layers to adapt, separated by commas
    #[arg(long, value_name = "INDICES", value_delimiter = ',',
          value_parser = numbers::whole::<usize>)]
    pub layers_to_transform: Vec<usize>,
    /// Name of the layer list in module paths, for `--layers-to-transform`
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub layers_pattern: Vec<String>,
    /// Rank of the modules whose path ends in PATTERN; may be repeated
    #[arg(long, value_name = "PATTERN=R", value_parser = pattern_rank)]
    pub rank_pattern: Vec<(String, usize)>,
    /// Alpha of the modules whose path ends in PATTERN; may be repeated
    #[arg(long, value_name = "PATTERN=ALPHA", value_parser = pattern_alpha)]
    pub alpha_pattern: Vec<(String, f64)>,
    /// Rank-stabilized LoRA: scale by alpha / sqrt(r)
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, default_value_t = false,
          num_args = 0..=1, default_missing_value = "true")]
    pub use_rslora: bool,
    /// Initialization of A: `true` (Kaiming uniform) or `gaussian`
    #[arg(long, value_name = "INIT", default_value = "true",
          value_parser = listed::<InitLoraWeights>(&["true", "gaussian"]),
          hide_possible_values = true)]
    pub init_lora_weights: InitLoraWeights,
    /// LoRA+: ratio of B's learning rate to A's
    #[arg(long, value_name = "RATIO", default_value_t = 1.0,
          value_parser = numbers::positive)]
    pub loraplus_lr_ratio: f64,
    /// Start from this PEFT adapter, with its rank, alpha and modules
    #[arg(long, value_name = "DIR", conflicts_with_all = INIT_ADAPTER_DECIDES)]
    pub init_adapter: Option<PathBuf>,
    /// Data type of the trained weights
    #[arg(long, value_name = "DTYPE", value_enum, default_value_t = AdapterDtype::Bf16)]
    pub adapter_dtype: AdapterDtype,
}

impl LoraArgs {
    /// The adapter's settings, checked.
    ///
    /// # Errors
    /// `Usage` naming the setting.
    pub fn config(&self) -> Result<LoraConfig> {
        let layers = &self.layers_to_transform;
        let config = LoraConfig {
            r: self.lora_r.get(),
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout,
            target_modules: self.target_modules.clone(),
            exclude_modules: self.exclude_modules.clone(),
            layers_to_transform: (!layers.is_empty()).then(|| layers.clone()),
            layers_pattern: self.layers_pattern.clone(),
            rank_pattern: self.rank_pattern.clone(),
            alpha_pattern: self.alpha_pattern.clone(),
            use_rslora: self.use_rslora,
            init_lora_weights: self.init_lora_weights,
            ..LoraConfig::default()
        };
        config.validate()?;
        Ok(config)
    }

    /// LoRA+'s ratio of learning rates.
    pub fn loraplus(&self) -> LoraPlus {
        LoraPlus { lr_ratio: self.loraplus_lr_ratio }
    }
}

fn pattern_rank(text: &str) -> std::result::Result<(String, usize), String> {
    pair(text, |rank| numbers::at_least_one(rank).map(usize::from))
}

fn pattern_alpha(text: &str) -> std::result::Result<(String, f64), String> {
    pair(text, numbers::positive)
}

/// `pattern=number`, split at the last `=` since patterns are regular expressions.
fn pair<T>(
    text: &str,
    number: impl Fn(&str) -> std::result::Result<T, String>,
) -> std::result::Result<(String, T), String> {
    let (pattern, value) = text
        .rsplit_once('=')
        .ok_or_else(|| format!("`{text}` is not PATTERN=NUMBER, such as q_proj=8"))?;
    let value = number(value).map_err(|expected| format!("{expected}, behind the `=`"))?;
    Ok((pattern.trim().to_string(), value))
}
