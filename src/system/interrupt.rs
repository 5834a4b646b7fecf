//! Ctrl-C, SIGTERM and a terminal that is closed: the first asks the run to save and stop, the second
//! ends it at once. On Windows a terminal that is closed ends it, too: the newest checkpoint is what is left.

use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[cfg(unix)]
use signal_hook::consts::SIGHUP;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::error::{Error, Message, Result};
use crate::printed;

/// Exit codes of a second signal are 128 + its number, as shells have it.
const SIGNAL_EXIT_BASE: i32 = 128;

/// Whether the user asked to stop.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Listens from now on; to the end of the terminal unless that is to be ignored, as under `nohup`.
    /// A reader of the output that is gone ends nothing any more.
    ///
    /// # Errors
    /// `Io` when the system refuses a handler.
    pub fn install() -> Result<Self> {
        printed::outlive_reader();
        let signals: Vec<c_int> = [SIGINT, SIGTERM].into_iter().chain(hangup()).collect();
        Self::on(&signals)
    }

    /// Listens to Ctrl-C only.
    ///
    /// # Errors
    /// As [`install`](Interrupt::install).
    pub fn on_ctrl_c() -> Result<Self> {
        Self::on(&[SIGINT])
    }

    fn on(signals: &[c_int]) -> Result<Self> {
        let interrupt = Interrupt::default();
        for &signal in signals {
            // In this order: the shutdown looks at the flag before this signal sets it.
            let code = SIGNAL_EXIT_BASE + signal;
            flag::register_conditional_shutdown(signal, code, Arc::clone(&interrupt.0))
                .and_then(|_| flag::register(signal, Arc::clone(&interrupt.0)))
                .map_err(|e| Error::Io(Message::new("cannot listen for Ctrl-C"), e))?;
        }
        Ok(interrupt)
    }

    /// Whether a signal came.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// An error once a signal came, for work that leaves nothing behind.
    ///
    /// # Errors
    /// `Interrupted`.
    pub fn check(&self) -> Result<()> {
        if self.requested() {
            return Err(Error::Interrupted(Message::new("interrupted; nothing was written")));
        }
        Ok(())
    }

    /// Forgets a signal: the next one is the first again.
    pub fn clear(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    /// Does what a signal does: the next one ends the process.
    pub fn request(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The end of the terminal, unless it is to be ignored.
#[cfg(unix)]
fn hangup() -> Option<c_int> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    (!is_ignored(SIGHUP, &status)).then_some(SIGHUP)
}

/// Windows has no such signal.
#[cfg(not(unix))]
fn hangup() -> Option<c_int> {
    None
}

/// Whether `status`, `/proc/self/status`, says that this process ignores `signal`.
#[cfg(unix)]
fn is_ignored(signal: c_int, status: &str) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn an_ignored_signal_is_known_by_its_bit() {
        let status =
            |mask: &str| format!("Name:\tnibble\nSigIgn:\t{mask}\nSigCgt:\t0000000000000001\n");
        assert!(is_ignored(SIGHUP, &status("0000000000001001")));
        assert!(!is_ignored(SIGHUP, &status("0000000000001000")));
        assert!(!is_ignored(SIGHUP, ""));
    }
}
