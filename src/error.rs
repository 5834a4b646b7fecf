//! One error type for the whole program, sorted by whose fault it is.
//!
//! Every message says what, where, expected and got, in lower case and without a final period;
//! `hint` is the way out when the user has one. [`Error::exit_code`] is what the process returns.

use std::fmt;
use std::io::ErrorKind;
use std::path::Path;

/// Result with the crate's error.
pub type Result<T> = std::result::Result<T, Error>;

/// What a line begins with that tells the way out.
pub(crate) const HINT: &str = "hint: ";

/// What went wrong, by whose fault.
#[derive(Debug)]
pub enum Error {
    /// A flag or setting is wrong or contradicts another: exit code 2.
    Usage(Message),
    /// A file, record or tensor that the user gave is wrong.
    Input(Message),
    /// The run would not fit the memory that it may use.
    Budget(Message),
    /// The operating system refused: which path or act, and its reason.
    Io(Message, std::io::Error),
    /// The numbers went wrong during a run: NaN, Inf, a parameter that does not move.
    Numeric(Message),
    /// The GPU or its libraries: missing, too old, or out of order.
    Gpu(Message),
    /// The user asked to stop; work is saved.
    Interrupted(Message),
}

/// A message and, where there is one, the way out.
#[derive(Debug, Default, Clone)]
pub struct Message {
    /// What, where, expected, got.
    pub what: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Error {
    /// A wrong flag or setting.
    pub fn usage(what: impl fmt::Display) -> Self {
        Error::Usage(Message::new(what))
    }

    /// A wrong file, record or tensor.
    pub fn input(what: impl fmt::Display) -> Self {
        Error::Input(Message::new(what))
    }

    /// Weights that are not what config.json says.
    pub fn mismatched_weights(what: impl fmt::Display) -> Self {
        Error::input(what).hint("the weights and config.json belong to different models")
    }

    /// A plan over its budget.
    pub fn budget(what: impl fmt::Display) -> Self {
        Error::Budget(Message::new(what))
    }

    /// A run whose numbers went wrong.
    pub fn numeric(what: impl fmt::Display) -> Self {
        Error::Numeric(Message::new(what))
    }

    /// A GPU that is not there or does not do what it should.
    pub fn gpu(what: impl fmt::Display) -> Self {
        Error::Gpu(Message::new(what))
    }

    /// The system refused `act` (`"open"`, `"rename"`) on `path`.
    pub fn io(act: &str, path: &Path, source: std::io::Error) -> Self {
        Error::Io(Message::new(format_args!("cannot {act} {}", path.display())), source)
    }

    /// The system has no thread left to give.
    pub fn no_thread(source: std::io::Error) -> Self {
        let hint = "another program, or a limit (`ulimit -u`), leaves no room for it";
        Error::Io(Message::new("cannot start a thread"), source).hint(hint)
    }

    /// Adds the way out; replaces an earlier hint.
    pub fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.message_mut().hint = Some(hint.to_string());
        self
    }

    /// Adds the way out where there is none yet.
    pub fn or_hint(self, hint: impl fmt::Display) -> Self {
        if self.message().hint.is_some() { self } else { self.hint(hint) }
    }

    /// Puts `place: ` (a file, a record, a tensor) before the message.
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        let message = self.message_mut();
        message.what = format!("{place}: {}", message.what);
        self
    }

    /// What is said and the way out; without the system's reason of an `Io`.
    pub fn message(&self) -> &Message {
        match self {
            Error::Usage(m) | Error::Input(m) | Error::Budget(m) => m,
            Error::Io(m, _) | Error::Numeric(m) | Error::Gpu(m) | Error::Interrupted(m) => m,
        }
    }

    /// 2 for wrong usage, 130 after an interrupt, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) => 2,
            Error::Interrupted(_) => 130,
            _ => 1,
        }
    }

    fn message_mut(&mut self) -> &mut Message {
        match self {
            Error::Usage(m) | Error::Input(m) | Error::Budget(m) => m,
            Error::Io(m, _) | Error::Numeric(m) | Error::Gpu(m) | Error::Interrupted(m) => m,
        }
    }
}

impl Message {
    /// A message without a hint.
    pub fn new(what: impl fmt::Display) -> Self {
        Message { what: what.to_string(), hint: None }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let message = self.message();
        f.write_str(&message.what)?;
        if let Error::Io(_, source) = self {
            write!(f, ": {source}")?;
        }
        let of_system = match self {
            Error::Io(_, source) => way_out(source.kind()),
            _ => None,
        };
        match message.hint.as_deref().or(of_system) {
            Some(hint) => write!(f, "\n{HINT}{hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io(_, source) => Some(source),
            _ => None,
        }
    }
}

/// What to do when the system refuses, as far as its reason tells.
fn way_out(kind: ErrorKind) -> Option<&'static str> {
    Some(match kind {
        ErrorKind::NotFound => "check the path",
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "check who may read and write there"
        }
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            "make room, or choose a place on another disk"
        }
        ErrorKind::IsADirectory => "expected a file, this is a folder",
        ErrorKind::NotADirectory => "expected a folder, this is a file",
        _ => return None,
    })
}

/// A candle error as one line, without the backtrace that it carries under `RUST_BACKTRACE`.
pub fn candle_text(error: &candle_core::Error) -> String {
    use candle_core::Error as Candle;
    match error {
        Candle::WithBacktrace { inner, .. } => candle_text(inner),
        Candle::Context { inner, context } => format!("{context}: {}", candle_text(inner)),
        Candle::WrappedContext { wrapped, context } => {
            format!("{context}: {}", first_line(&wrapped.to_string()))
        }
        other => first_line(&other.to_string()).to_string(),
    }
}

/// A message may have another error's text in it, with its backtrace.
fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::backtrace::Backtrace;

    use super::*;

    #[test]
    fn a_candle_error_is_one_line() {
        let inner = Box::new(candle_core::Error::Msg("unknown magic".into()).context("header"));
        let backtrace = Box::new(Backtrace::force_capture());
        let error = candle_core::Error::WithBacktrace { inner, backtrace };
        assert_eq!(candle_text(&error), "header: unknown magic");
        let nested =
            candle_core::Error::Msg(format!("element 1: {error}\n   0: candle_core::bail"));
        assert!(!candle_text(&nested).contains('\n'));
    }
}
