//! `--threads`.

use std::num::NonZeroUsize;

use crate::error::{Error, Result};

/// Sizes the pool that all parallel loops share; all cores by default.
pub fn set(threads: Option<NonZeroUsize>) -> Result<()> {
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads.map_or(0, usize::from));
    let builder = builder.use_current_thread();
    let hint = "ask for fewer; a limit (`ulimit -u`) may leave no room for so many";
    builder.build_global().map_err(|e| Error::usage(format_args!("--threads: {e}")).hint(hint))
}
