//! Flags of `nibble memory`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{ArgAction, Args};

use super::device::DeviceArgs;
use super::listed::listed;
use super::lora::LoraArgs;
use super::numbers;
use super::train::{BaseModelArgs, GRADIENT_ACCUMULATION_STEPS};
use crate::byte_size::ByteSize;
use crate::plan::{Activations, Optim, WeightsMode};

const EXAMPLES: &str = "Examples:
  nibble memory --model smollm2-nf4 --max-length 512
  nibble memory --model Llama-3.1-8B/config.json --lora-r 64 --budget 24GiB --fit
  nibble memory --model smollm2-nf4 --max-length 512 --measure --html memory.html
  nibble memory --config run.toml --fit";

/// Where every byte of a training run would go, before it starts
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct MemoryArgs {
    /// Settings of a run, as `nibble train --config` takes them or OUT/settings.toml has them: those
    /// that are flags here; flags on the command line win
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
    /// Rows of `--max-length` tokens in a forward pass
    #[arg(long, help_heading = "Batch", value_name = "ROWS", default_value = "1", value_parser = numbers::at_least_one)]
    pub per_device_train_batch_size: NonZeroUsize,
    /// Forward passes in an optimizer step; `--fit` keeps the rows of a step where it tries others
    #[arg(long, help_heading = "Batch", value_name = "PASSES", default_value = GRADIENT_ACCUMULATION_STEPS, value_parser = numbers::at_least_one)]
    pub gradient_accumulation_steps: NonZeroUsize,
    /// Longest row, in tokens
    #[arg(long, help_heading = "Batch", value_name = "TOKENS", default_value = "2048", value_parser = numbers::at_least_one)]
    pub max_length: NonZeroUsize,
    /// Activations of a block: `keep` them, or recompute from its input and the output of
    /// `attention`, or from its input (`checkpoint`). With `offload-attention` both of these, with
    /// `offload` the input waits elsewhere: in pinned host memory beside a GPU, on the CPU in a nameless
    /// file
    #[arg(long, help_heading = "Memory and threads", value_name = "POLICY", value_enum, default_value_t = Activations::Auto)]
    pub activations: Activations,
    /// Tokens that the MLP works on at a time; lowers memory for long rows [default: by itself
    /// above 4096]
    #[arg(long, help_heading = "Memory and threads", value_name = "TOKENS", value_parser = numbers::at_least_one)]
    pub mlp_tile_length: Option<NonZeroUsize>,
    /// Tokens whose logits exist at a time, at most; under a head on the host, parts of the logits of
    /// four times as many [default: 128 MiB of them]
    #[arg(long, help_heading = "Memory and threads", value_name = "TOKENS", value_parser = numbers::at_least_one)]
    pub logits_chunk_length: Option<NonZeroUsize>,
    /// Frozen weights of the blocks: all `resident` in memory, or `stream`ed from their 4-bit file
    #[arg(long, help_heading = "Memory and threads", value_name = "MODE", value_enum, default_value_t = WeightsMode::Auto)]
    pub weights: WeightsMode,
    /// Optimizer: `adamw_torch`, or `adamw_8bit` with moments in 8 bits: 2 bytes a parameter, not 8
    #[arg(
        long,
        help_heading = "Memory and threads",
        value_name = "NAME",
        default_value = "adamw_torch",
        value_parser = listed::<Optim>(&Optim::NAMES),
        hide_possible_values = true
    )]
    pub optim: Optim,
    /// Memory that the run may use, such as `24GiB`; with `auto`, as many blocks keep as fit
    #[arg(
        long,
        help_heading = "Memory and threads",
        value_name = "SIZE",
        visible_alias = "memory-budget"
    )]
    pub budget: Option<ByteSize>,
    /// Worker threads [default: one for each core]
    #[arg(long, help_heading = "Memory and threads", value_name = "THREADS", value_parser = numbers::threads)]
    pub threads: Option<NonZeroUsize>,
    /// Show what would fit `--budget` (or the free memory): lengths, batches, what each setting buys
    #[arg(long, help_heading = "Output", action = ArgAction::SetTrue)]
    pub fit: bool,
    /// Make that many real training steps on random tokens, and show what was measured beside the plan
    #[arg(long, help_heading = "Output", value_name = "STEPS", num_args = 0..=1,
          default_missing_value = "2", value_parser = numbers::at_least_one)]
    pub measure: Option<NonZeroUsize>,
    /// Write a page with pictures of the plan, and of what was measured
    #[arg(long, help_heading = "Output", value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Print the plan as JSON, with every region of the arena
    #[arg(long, help_heading = "Output", action = ArgAction::SetTrue)]
    pub json: bool,
}
