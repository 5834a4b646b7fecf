//! `nibble train`: every flag, its default, and the checks that need no file.
//!
//! Flags carry the names of Hugging Face's `TrainingArguments` in kebab case.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};
use nibble_quant::{BlockFormat, QuantType};

use super::data::DataFormatArgs;
use super::device::DeviceArgs;
use super::intervals::IntervalStrategy;
use super::listed::listed;
use super::lora::LoraArgs;
use super::numbers;
use super::schedule::SchedulerParser;
use crate::byte_size::ByteSize;
use crate::plan::{Activations, Optim, WeightsMode};
use crate::train::adamw::AdamW;
use crate::train::recipe::{EvalRecipe, Every, Length, Recipe, SaveRecipe, steps_per_epoch};
use crate::train::schedule::{SchedulerType, Warmup};
use crate::train::scheduler_kwargs::SchedulerKwargs;
use crate::train::settings::SettingsEcho;

/// Floor of the learning rate as a share of the peak, by default.
pub(super) const MIN_LR_RATE: f64 = 0.1;
/// `--warmup-ratio` by default.
pub(super) const WARMUP_RATIO: f64 = 0.03;
/// `--seed` by default.
pub const SEED: u64 = 42;
/// `--sample-max-new-tokens` by default.
pub(super) const SAMPLE_TOKENS: NonZeroUsize = NonZeroUsize::new(64).unwrap();
/// `--max-length` by default.
pub const MAX_LENGTH: &str = "2048";
/// Forward passes in an optimizer step, by default.
pub const GRADIENT_ACCUMULATION_STEPS: &str = "4";

/// Train a LoRA adapter on a frozen base model
#[derive(Debug, Clone, Args)]
#[command(after_long_help = AFTER_HELP)]
pub struct TrainArgs {
    /// Read settings from this TOML file, under the flags' names; flags on the command line win
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Named set of defaults
    #[arg(long, value_name = "NAME", value_enum)]
    pub preset: Option<Preset>,
    /// The frozen weights.
    #[command(flatten)]
    pub model: BaseModelArgs,
    /// What is trained.
    #[command(flatten)]
    pub lora: LoraArgs,
    /// What is learned from.
    #[command(flatten)]
    pub data: TrainDataArgs,
    /// How it is learned.
    #[command(flatten)]
    pub optimization: OptimizationArgs,
    /// What is watched on the way.
    #[command(flatten)]
    pub evaluation: EvaluationArgs,
    /// What is kept.
    #[command(flatten)]
    pub output: OutputArgs,
    /// What it may use.
    #[command(flatten)]
    pub resources: ResourceArgs,
    /// Where it computes.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// All settings as text, for the log and for `--resume`.
    #[arg(skip)]
    pub settings: SettingsEcho,
}

const AFTER_HELP: &str = "Examples:
  nibble train --model smollm2-nf4 --data train.jsonl --out run
  nibble train --model smollm2-nf4 --data train.jsonl --validation-split 0.05 --eval-steps 50 \\
      --sample-prompt \"Who are you?\" --out run
  nibble train --config run.toml --learning-rate 1e-4 --out run-2
  nibble train --out run --resume

Every setting is saved as OUT/settings.toml, which `--config` reads.";

/// `--preset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// r 64, alpha 16, dropout 0.1, constant learning rate: arXiv 2305.14314, appendix B
    QloraPaper,
}

impl Preset {
    /// The flags that it sets.
    pub fn settings(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Preset::QloraPaper => &[
                ("lora-r", "64"),
                ("lora-alpha", "16"),
                ("lora-dropout", "0.1"),
                ("lr-scheduler-type", "constant"),
            ],
        }
    }
}

/// The frozen weights.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Base model")]
pub struct BaseModelArgs {
    /// Hugging Face folder (dense or 4-bit) or GGUF file
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,
    /// 4-bit type to quantize a dense base to; a base that is already 4-bit is used as stored [default: nf4]
    #[arg(long, value_name = "TYPE", value_enum)]
    pub quantization: Option<Quantization>,
    /// Weights per scale, when quantizing [default: 64]
    #[arg(long, value_name = "WEIGHTS", value_parser = numbers::block_size)]
    pub block_size: Option<usize>,
    /// Also quantize the scales, to 8 bits [default: true]
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1,
          default_missing_value = "true")]
    pub double_quant: Option<bool>,
}

impl BaseModelArgs {
    /// How a dense base is packed; none leaves it as it is.
    pub fn block_format(&self) -> Option<BlockFormat> {
        self.block_format_or(BlockFormat::default())
    }

    /// `unasked`, but for what the flags say otherwise; none leaves weights as they are.
    pub fn block_format_or(&self, unasked: BlockFormat) -> Option<BlockFormat> {
        let quant_type = match self.quantization {
            Some(Quantization::Nf4) => QuantType::Nf4,
            Some(Quantization::Fp4) => QuantType::Fp4,
            Some(Quantization::None) => return None,
            None => unasked.quant_type,
        };
        let block_size = self.block_size.unwrap_or(unasked.block_size);
        let double_quant = self.double_quant.unwrap_or(unasked.double_quant);
        Some(BlockFormat { quant_type, block_size, double_quant })
    }
}

/// `--quantization`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Quantization {
    /// 4-bit NormalFloat
    Nf4,
    /// 4-bit float
    Fp4,
    /// No quantization
    None,
}

/// What is learned from.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Data")]
pub struct TrainDataArgs {
    /// Training data in JSONL, JSON, CSV or Parquet: files, folders, or patterns in quotes
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    pub data: Vec<PathBuf>,
    /// Evaluation data, in the same formats
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub eval_data: Vec<PathBuf>,
    /// Fraction of the training data to hold out for evaluation, such as 0.05
    #[arg(long, value_name = "FRACTION", conflicts_with = "eval_data",
          value_parser = numbers::below_one)]
    pub validation_split: Option<f64>,
    /// Maximum sequence length, in tokens; no document may be longer
    #[arg(long, value_name = "TOKENS", default_value = MAX_LENGTH, value_parser = numbers::length)]
    pub max_length: usize,
    /// How records are read.
    #[command(flatten)]
    pub format: DataFormatArgs,
    /// Pack short documents into one sequence; attention stays within each document
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, default_value_t = true,
          num_args = 0..=1, default_missing_value = "true")]
    pub packing: bool,
    /// Shuffle the data in every epoch
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, default_value_t = true,
          num_args = 0..=1, default_missing_value = "true")]
    pub shuffle: bool,
}

impl TrainDataArgs {
    /// Whether some data are for evaluation.
    pub fn has_evaluation(&self) -> bool {
        !self.eval_data.is_empty() || self.validation_split.is_some_and(|share| share > 0.0)
    }
}

/// How it is learned.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Optimization")]
pub struct OptimizationArgs {
    /// Sequences of `--max-length` tokens per forward pass (without packing: documents)
    #[arg(long, value_name = "SEQUENCES", default_value = "1", value_parser = numbers::at_least_one)]
    pub per_device_train_batch_size: NonZeroUsize,
    /// Forward passes per optimizer step
    #[arg(long, value_name = "PASSES", default_value = GRADIENT_ACCUMULATION_STEPS, value_parser = numbers::at_least_one)]
    pub gradient_accumulation_steps: NonZeroUsize,
    /// Peak learning rate
    #[arg(long, value_name = "RATE", default_value = "2e-4",
          value_parser = numbers::positive)]
    pub learning_rate: f64,
    /// Learning rate schedule
    #[arg(long, value_name = "TYPE", value_parser = SchedulerParser, default_value = "cosine")]
    pub lr_scheduler_type: SchedulerType,
    /// Parameters of the schedule under transformers' names, as a JSON object such as `{"num_cycles": 3}`
    #[arg(long, value_name = "JSON")]
    pub lr_scheduler_kwargs: Option<SchedulerKwargs>,
    /// Steps of warmup: linear from 0, but of schedules with a floor there [default: by `--warmup-ratio`]
    #[arg(long, value_name = "STEPS", conflicts_with = "warmup_ratio",
          value_parser = numbers::warmup_steps)]
    pub warmup_steps: Option<u64>,
    /// Warmup as a fraction of all steps, rounded up, but not the last step
    #[arg(long, value_name = "FRACTION", default_value_t = WARMUP_RATIO,
          value_parser = numbers::share)]
    pub warmup_ratio: f64,
    /// Final learning rate of `cosine_with_min_lr` and `cosine_warmup_with_min_lr`, as a fraction of the peak
    #[arg(long, value_name = "FRACTION", default_value_t = MIN_LR_RATE,
          value_parser = numbers::share)]
    pub min_lr_rate: f64,
    /// Total number of optimizer steps; overrides `--num-train-epochs` [default: by epochs]
    #[arg(long, value_name = "STEPS", value_parser = numbers::max_steps)]
    pub max_steps: Option<u64>,
    /// Number of training epochs
    #[arg(long, value_name = "EPOCHS", default_value_t = 1.0,
          value_parser = numbers::positive)]
    pub num_train_epochs: f64,
    /// Maximum gradient norm, for clipping (L2 over all trained weights); 0 disables it
    #[arg(long, value_name = "NORM", default_value_t = 0.3,
          value_parser = numbers::not_negative)]
    pub max_grad_norm: f64,
    /// Weight decay, decoupled as in AdamW
    #[arg(long, value_name = "DECAY", default_value_t = 0.0,
          value_parser = numbers::not_negative)]
    pub weight_decay: f64,
    /// Optimizer: `adamw_torch`, or `adamw_8bit` with 8-bit moments: 2 bytes a parameter, not 8
    #[arg(long, value_name = "NAME", default_value = "adamw_torch",
          value_parser = listed::<Optim>(&Optim::NAMES), hide_possible_values = true)]
    pub optim: Optim,
    /// AdamW's beta1, the decay rate of the first moment
    #[arg(long, value_name = "BETA", default_value_t = 0.9,
          value_parser = numbers::below_one)]
    pub adam_beta1: f64,
    /// AdamW's beta2, the decay rate of the second moment
    #[arg(long, value_name = "BETA", default_value_t = 0.999,
          value_parser = numbers::below_one)]
    pub adam_beta2: f64,
    /// AdamW's epsilon, for numerical stability
    #[arg(long, value_name = "EPSILON", default_value = "1e-8",
          value_parser = numbers::positive)]
    pub adam_epsilon: f64,
    /// NEFTune noise on the embeddings in training; 5 to 15 in the paper [default: none]
    #[arg(long, value_name = "ALPHA", value_parser = numbers::positive_f32)]
    pub neftune_noise_alpha: Option<f32>,
    /// Seed of the initial adapter, the order of the data, dropout and noise
    #[arg(long, value_name = "NUMBER", default_value_t = SEED, value_parser = numbers::whole::<u64>)]
    pub seed: u64,
}

/// What is watched on the way.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Evaluation and logging")]
pub struct EvaluationArgs {
    /// Steps between log lines, or a share of the run below 1
    #[arg(long, value_name = "STEPS", default_value = "1", value_parser = numbers::interval)]
    pub logging_steps: Every,
    /// Steps between evaluations, or a share of the run below 1; each new lowest loss saves a checkpoint [default: once, at the end]
    #[arg(long, value_name = "STEPS", value_parser = numbers::interval)]
    pub eval_steps: Option<Every>,
    /// When to evaluate, whatever `--eval-steps` says [default: by `--eval-steps`]
    #[arg(long, value_name = "WHEN", value_enum)]
    pub eval_strategy: Option<IntervalStrategy>,
    /// Stop after this many evaluations without an improvement
    #[arg(long, value_name = "EVALUATIONS", value_parser = numbers::steps)]
    pub early_stopping_patience: Option<u64>,
    /// Smallest decrease of the evaluation loss that counts as an improvement
    #[arg(long, value_name = "LOSS", default_value_t = 0.0,
          value_parser = numbers::not_negative)]
    pub early_stopping_threshold: f64,
    /// End with the weights that had the lowest evaluation loss
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, default_value_t = false,
          num_args = 0..=1, default_missing_value = "true")]
    pub load_best_model_at_end: bool,
    /// Prompt to answer before the first step and after the last one; may be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub sample_prompt: Vec<String>,
    /// Steps between further answers to `--sample-prompt` [default: none]
    #[arg(long, value_name = "STEPS", value_parser = numbers::steps)]
    pub sample_steps: Option<u64>,
    /// Maximum length of a sample answer, in tokens
    #[arg(long, value_name = "TOKENS", default_value_t = SAMPLE_TOKENS, value_parser = numbers::at_least_one)]
    pub sample_max_new_tokens: NonZeroUsize,
    /// Stop if a trained matrix gets no gradient or does not change
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, default_value_t = true,
          num_args = 0..=1, default_missing_value = "true")]
    pub self_checks: bool,
    /// Begin with the largest batch, so that memory runs out at once or not at all
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, default_value_t = true,
          num_args = 0..=1, default_missing_value = "true")]
    pub longest_first_step: bool,
}

/// What is kept.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Folder for the adapter, its checkpoints and the logs; must not hold anything else
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Steps between checkpoints, or a share of the run below 1
    #[arg(long, value_name = "STEPS", default_value = "100", value_parser = numbers::interval)]
    pub save_steps: Every,
    /// When to save checkpoints, whatever `--save-steps` says; the last step and the lowest evaluation loss always have one [default: steps]
    #[arg(long, value_name = "WHEN", value_enum)]
    pub save_strategy: Option<IntervalStrategy>,
    /// Checkpoints to keep, besides the best one
    #[arg(long, value_name = "CHECKPOINTS", default_value = "2", value_parser = numbers::at_least_one)]
    pub save_total_limit: NonZeroUsize,
    /// Continue the run in `--out` from its newest intact checkpoint, with its settings; a finished run
    /// is extended by more `--num-train-epochs` or `--max-steps`
    #[arg(long)]
    pub resume: bool,
}

/// What it may use.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Memory and threads")]
pub struct ResourceArgs {
    /// Worker threads [default: one per core]
    #[arg(long, value_name = "THREADS", value_parser = numbers::threads)]
    pub threads: Option<NonZeroUsize>,
    /// Gradient checkpointing: `keep` all activations of a block, or recompute them from its input and
    /// the output of `attention`, or from its input (`checkpoint`). With `offload-attention` both of
    /// these, with `offload` the input is offloaded: to pinned host memory beside a GPU, to an unlinked
    /// file in `--out` on the CPU
    #[arg(long, value_name = "POLICY", value_enum, default_value_t = Activations::Auto)]
    pub activations: Activations,
    /// Tokens that the MLP processes at a time: fewer save memory in long sequences [default: 4096, or 1024 where memory is short]
    #[arg(long, value_name = "TOKENS", value_parser = numbers::at_least_one)]
    pub mlp_tile_length: Option<NonZeroUsize>,
    /// Tokens whose logits are in memory at a time, no more than 128 MiB of logits; with the LM head on the
    /// host, four times as many, each with part of its logits [default: 128 MiB, or a quarter of it]
    #[arg(long, value_name = "TOKENS", value_parser = numbers::at_least_one)]
    pub logits_chunk_length: Option<NonZeroUsize>,
    /// Frozen weights of the blocks: all `resident` in memory, or `stream`ed from the file: of a
    /// 4-bit folder, or a dense one with `--quantization none`
    #[arg(long, value_name = "MODE", value_enum, default_value_t = WeightsMode::Auto)]
    pub weights: WeightsMode,
    /// On a GPU: blocks whose 4-bit weights stay dequantized, too, or as many of them as fit; of streamed weights
    /// one at most. Faster with few tokens, for 2 bytes a weight [default: all that fit, where that saves 1 % of a
    /// step or more]
    #[arg(long, value_name = "BLOCKS", value_parser = numbers::whole::<usize>)]
    pub dequantized_blocks: Option<usize>,
    /// Memory that the run may use, such as `8GiB` [default: the free memory]
    #[arg(long, value_name = "SIZE")]
    pub memory_budget: Option<ByteSize>,
}

impl EvaluationArgs {
    /// How often there is an evaluation; once, at the end, where nothing is said.
    pub(super) fn every(&self) -> Option<Every> {
        IntervalStrategy::every(self.eval_strategy).or(self.eval_steps)
    }
}

impl OptimizationArgs {
    /// What the learning rate falls to, as a share of the peak.
    fn floor(&self) -> f64 {
        let kwargs = self.lr_scheduler_kwargs.as_ref();
        let share = kwargs.and_then(|it| {
            it.min_lr_rate.or_else(|| it.min_lr.map(|rate| rate / self.learning_rate))
        });
        share.unwrap_or(self.min_lr_rate)
    }
}

impl TrainArgs {
    /// What the schedule is told beside its own flags.
    pub(super) fn scheduler_kwargs(&self) -> SchedulerKwargs {
        self.optimization.lr_scheduler_kwargs.clone().unwrap_or_default()
    }

    /// The settings of the training loop, for a pass over the data of `num_batches` forward passes.
    pub fn recipe(&self, num_batches: usize) -> Recipe {
        let (o, e) = (&self.optimization, &self.evaluation);
        let length = o.max_steps.map_or(Length::Epochs(o.num_train_epochs), Length::Steps);
        let gradient_accumulation_steps = o.gradient_accumulation_steps.get();
        let each = steps_per_epoch(num_batches, gradient_accumulation_steps);
        let steps = |every: Every| every.steps(length.steps(each), each);
        let (save_strategy, save_steps) = (self.output.save_strategy, self.output.save_steps);
        Recipe {
            per_device_train_batch_size: o.per_device_train_batch_size.get(),
            gradient_accumulation_steps,
            learning_rate: o.learning_rate,
            scheduler_type: o.lr_scheduler_type,
            warmup: o.warmup_steps.map_or(Warmup::Ratio(o.warmup_ratio), Warmup::Steps),
            min_lr_rate: o.floor(),
            scheduler_kwargs: self.scheduler_kwargs(),
            length,
            max_grad_norm: o.max_grad_norm,
            optimizer: AdamW {
                beta1: o.adam_beta1,
                beta2: o.adam_beta2,
                epsilon: o.adam_epsilon,
                weight_decay: o.weight_decay,
            },
            loraplus: self.lora.loraplus(),
            logging_steps: steps(e.logging_steps),
            evaluation: EvalRecipe {
                steps: e.every().map(steps),
                patience: e.early_stopping_patience,
                threshold: e.early_stopping_threshold,
                load_best_at_end: e.load_best_model_at_end,
            },
            saving: SaveRecipe {
                steps: steps(IntervalStrategy::every(save_strategy).unwrap_or(save_steps)),
                total_limit: self.output.save_total_limit.get(),
            },
            sample_steps: e.sample_steps,
            self_checks: e.self_checks,
            longest_first_step: e.longest_first_step,
        }
    }
}
