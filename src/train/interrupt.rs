//! Ctrl-C and SIGTERM: the first asks the run to save and stop, the second ends it at once.

use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::error::{Error, Message, Result};

/// Exit codes of a second signal are 128 + its number, as shells have it.
const SIGNAL_EXIT_BASE: i32 = 128;

/// Whether the user asked to stop.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Listens from now on.
    ///
    /// # Errors
    /// `Io` when the system refuses a handler.
    pub fn install() -> Result<Self> {
        Self::on(&[SIGINT, SIGTERM])
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

    /// Forgets a signal: the next one is the first again.
    pub fn clear(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    /// As if a signal had come: the next one ends the process.
    pub fn request(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
