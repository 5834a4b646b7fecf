//! What commands print on standard output, whose failure is an error like others.
//!
//! std's `println!` panics when the disk is full. In this crate its name stands for one that keeps
//! the failure, prints nothing more, and leaves it to [`flush`] at the end of the program. (A reader
//! that is gone ends the process before: see `main.rs`.) Unit tests have std's, which they capture.

use std::fmt::Arguments;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

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
/// `Io` when part of it could not be written.
pub fn flush() -> Result<()> {
    let failure = FAILURE.lock().unwrap_or_else(PoisonError::into_inner).take();
    let written = failure.map_or_else(|| io::stdout().flush(), Err);
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
