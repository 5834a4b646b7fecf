//! What is done where memory runs short: something is made smaller, and the work done again.

use crate::error::{Error, Message, Result};

/// Does `work`; where memory runs short, does `shrink` and the same again, until it is done or nothing
/// can be smaller. `work` begins anew each time.
///
/// # Errors
/// Those of `work` that memory has no part in; those of `shrink`, which is given what ran short.
pub fn until_it_fits<C: ?Sized, T>(
    context: &mut C,
    mut work: impl FnMut(&mut C) -> Result<T>,
    mut shrink: impl FnMut(&mut C, Message) -> Result<()>,
) -> Result<T> {
    loop {
        match work(context) {
            Err(Error::Budget(message)) => shrink(context, message)?,
            done => return done,
        }
    }
}
