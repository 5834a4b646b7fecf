//! Flags of `nibble memory`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{ArgAction, Args};

use super::device::DeviceArgs;
use super::listed::listed;
use super::lora::LoraArgs;
use super::numbers;
use super::train::{BaseModelArgs, GRADIENT_ACCUMULATION_STEPS, MAX_LENGTH};
use crate::byte_size::ByteSize;
use crate::plan::{Activations, Optim, WeightsMode};

const EXAMPLES: &str = "Examples:
  nibble memory --model smollm2-nf4 --max-length 512
  nibble memory --model Llama-3.1-8B/config.json --lora-r 64 --budget 24GiB --fit
  nibble memory --model smollm2-nf4 --max-length 512 --measure --html memory.html
  nibble memory --config run.toml --fit";

/// Show where every byte of a training run will go, before it starts
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct MemoryArgs {
    /// Read the settings that are flags here from this TOML file, a file for `nibble train --config` or
    /// OUT/settings.toml of a run; flags on the command line win
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The base model; a bare config.json will do.
    #[command(flatten)]
    pub base: BaseModelArgs,
    /// The adapter.
    #[command(flatten)]
    pub lora: LoraArgs,
    /// Where it computes.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Sequences of `--max-length` tokens per forward pass
    #[arg(long, help_heading = "Batch", value_name = "SEQUENCES", default_value = "1", value_parser = numbers::at_least_one)]
    pub per_device_train_batch_size: NonZeroUsize,
    /// Forward passes per optimizer step; what `--fit` tries leaves the sequences per step as they are
    #[arg(long, help_heading = "Batch", value_name = "PASSES", default_value = GRADIENT_ACCUMULATION_STEPS, value_parser = numbers::at_least_one)]
    pub gradient_accumulation_steps: NonZeroUsize,
    /// Maximum sequence length, in tokens
    #[arg(long, help_heading = "Batch", value_name = "TOKENS", default_value = MAX_LENGTH, value_parser = numbers::at_least_one)]
    pub max_length: NonZeroUsize,
    /// Gradient checkpointing: `keep` all activations of a block, or recompute them from its input and
    /// the output of `attention`, or from its input (`checkpoint`). With `offload-attention` both of
    /// these, with `offload` the input is offloaded: to pinned host memory beside a GPU, to an unlinked
    /// file on the CPU
    #[arg(long, help_heading = "Memory and threads", value_name = "POLICY", value_enum, default_value_t = Activations::Auto)]
    pub activations: Activations,
    /// Tokens that the MLP processes at a time: fewer save memory in long sequences [default: 4096, or 1024 where memory is short]
    #[arg(long, help_heading = "Memory and threads", value_name = "TOKENS", value_parser = numbers::at_least_one)]
    pub mlp_tile_length: Option<NonZeroUsize>,
    /// Tokens whose logits are in memory at a time, no more than 128 MiB of logits; with the LM head on the
    /// host, four times as many, each with part of its logits [default: 128 MiB, or a quarter of it]
    #[arg(long, help_heading = "Memory and threads", value_name = "TOKENS", value_parser = numbers::at_least_one)]
    pub logits_chunk_length: Option<NonZeroUsize>,
    /// Frozen weights of the blocks: all `resident` in memory, or `stream`ed from the file: of a
    /// 4-bit folder, or a dense one with `--quantization none`
    #[arg(long, help_heading = "Memory and threads", value_name = "MODE", value_enum, default_value_t = WeightsMode::Auto)]
    pub weights: WeightsMode,
    /// On a GPU: blocks whose 4-bit weights stay dequantized, too, or as many of them as fit; of streamed weights
    /// one at most. Faster with few tokens, for 2 bytes a weight [default: all that fit, where that saves 1 % of a
    /// step or more]
    #[arg(long, help_heading = "Memory and threads", value_name = "BLOCKS", value_parser = numbers::whole::<usize>)]
    pub dequantized_blocks: Option<usize>,
    /// Optimizer: `adamw_torch`, or `adamw_8bit` with 8-bit moments: 2 bytes a parameter, not 8
    #[arg(
        long,
        help_heading = "Memory and threads",
        value_name = "NAME",
        default_value = "adamw_torch",
        value_parser = listed::<Optim>(&Optim::NAMES),
        hide_possible_values = true
    )]
    pub optim: Optim,
    /// Memory that the run may use, such as `24GiB`; `auto` settings are chosen to fit it
    #[arg(
        long,
        help_heading = "Memory and threads",
        value_name = "SIZE",
        visible_alias = "memory-budget"
    )]
    pub budget: Option<ByteSize>,
    /// Worker threads [default: one per core]
    #[arg(long, help_heading = "Memory and threads", value_name = "THREADS", value_parser = numbers::threads)]
    pub threads: Option<NonZeroUsize>,
    /// Show what fits `--budget` or the free memory: lengths, batch sizes, what each setting saves
    #[arg(long, help_heading = "Output", action = ArgAction::SetTrue)]
    pub fit: bool,
    /// Run this many real training steps on random tokens [2 without a number], and show the measured memory beside
    /// the plan
    #[arg(long, help_heading = "Output", value_name = "STEPS", num_args = 0..=1,
          default_missing_value = "2", value_parser = numbers::at_least_one)]
    pub measure: Option<NonZeroUsize>,
    /// Write an HTML page with charts of the plan, and of what was measured
    #[arg(long, help_heading = "Output", value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Print the plan as JSON, with every region of the arena
    #[arg(long, help_heading = "Output", action = ArgAction::SetTrue)]
    pub json: bool,
}
