//! Flags of `nibble doctor`.

use clap::{ArgAction, Args};

/// Check what this machine offers: processor, memory, GPUs and their libraries, with the fix for what
/// is missing
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print the findings as JSON
    #[arg(long, action = ArgAction::SetTrue)]
    pub json: bool,
}
