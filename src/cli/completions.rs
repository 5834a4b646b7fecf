//! Flags of `nibble completions`.

use clap::Args;
use clap_complete::Shell;

const EXAMPLES: &str = "Examples:
  source <(nibble completions bash)
  nibble completions zsh > ~/.zfunc/_nibble
  nibble completions fish > ~/.config/fish/completions/nibble.fish";

/// Print a shell completion script
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: Shell,
}
