//! Printing that never panics, as std's macros do when the disk is full.
//!
//! A failure on stdout is kept, nothing more is printed, and [`flush`] returns it at the end of the
//! program; a failure on stderr is ignored, since lost progress lines must not end work. Unit tests use
//! std's macros, whose output they capture.

use std::fmt::Arguments;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::error::{Error, Result};

/// Whether a reader that is gone ends the process.
static ENDS_WITH_READER: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// A failure that nobody was told of.
static FAILURE: Mutex<Option<io::Error>> = Mutex::new(None);
static FAILED: AtomicBool = AtomicBool::new(false);

/// std's `print!`, but that a failure is kept for [`flush`].
#[cfg(not(test))]
macro_rules! print {
    ($($text:tt)*) => { $crate::printed::write(format_args!($($text)*)) };
}

/// std's `println!`, but that a failure is kept for [`flush`].
#[cfg(not(test))]
macro_rules! println {
    () => { print!("\n") };
    ($($text:tt)*) => { print!("{}\n", format_args!($($text)*)) };
}

/// std's `eprint!`, but that a failure is ignored: there is nobody to tell.
#[cfg(not(test))]
macro_rules! eprint {
    ($($text:tt)*) => { $crate::printed::write_aside(format_args!($($text)*)) };
}

/// std's `eprintln!`, but that a failure is ignored: there is nobody to tell.
#[cfg(not(test))]
macro_rules! eprintln {
    () => { eprint!("\n") };
    ($($text:tt)*) => { eprint!("{}\n", format_args!($($text)*)) };
}

/// Lets `nibble … | head` end as other programs do, quietly: Rust ignores SIGPIPE.
pub fn end_with_reader() {
    let ends = ENDS_WITH_READER.get_or_init(|| Arc::new(AtomicBool::new(true)));
    // Where it is refused, printing fails loudly: no reason to stop here. Windows has no such signal: work
    // goes on to its end, and is quiet.
    #[cfg(unix)]
    {
        use signal_hook::{consts::SIGPIPE, flag::register_conditional_default};
        let _ = register_conditional_default(SIGPIPE, Arc::clone(ends));
    }
    #[cfg(not(unix))]
    let _ = ends;
}

/// Lets work go on without a reader: it has something to save, or to remove. Ctrl-C ends the `tee` behind it,
/// too.
pub fn outlive_reader() {
    if let Some(ends) = ENDS_WITH_READER.get() {
        ends.store(false, Ordering::Relaxed);
    }
}

/// Prints `text` on stderr.
pub fn write_aside(text: Arguments<'_>) {
    let _ = io::stderr().lock().write_fmt(text);
}

/// Prints `text`, unless something before it failed.
pub fn write(text: Arguments<'_>) {
    let mut failure = FAILURE.lock().unwrap_or_else(PoisonError::into_inner);
    if failure.is_none() {
        *failure = io::stdout().lock().write_fmt(text).err();
    }
}

/// Lets what was printed arrive.
///
/// # Errors
/// `Io` when part of it could not be written, but for a reader that the work has outlived, or that no
/// signal tells of.
pub fn flush() -> Result<()> {
    let failure = FAILURE.lock().unwrap_or_else(PoisonError::into_inner).take();
    let written = failure.map_or_else(|| io::stdout().flush(), Err);
    let outlived = ENDS_WITH_READER.get().is_some_and(|ends| !ends.load(Ordering::Relaxed));
    let ignored = outlived || !cfg!(unix);
    let gone = |error: &io::Error| ignored && error.kind() == io::ErrorKind::BrokenPipe;
    let written = if written.as_ref().is_err_and(gone) { Ok(()) } else { written };
    written.map_err(|e| {
        FAILED.store(true, Ordering::Relaxed);
        Error::io("write to", "standard output".as_ref(), e)
    })
}

/// Prints `text` at once.
///
/// # Errors
/// As [`flush`].
pub fn at_once(text: &str) -> Result<()> {
    write(format_args!("{text}"));
    flush()
}

/// Whether [`flush`] has told of a failure: there is nobody to print for.
pub fn failed() -> bool {
    FAILED.load(Ordering::Relaxed)
}
