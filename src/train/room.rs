//! Memory that runs short: room is made, and what was being done is done again.

use super::trainee::{Shrunk, Trainee};
use crate::error::{Error, Message, Result};

/// Does `work`; where memory runs short, `make_room`, and the same again, until it is done or no room can
/// be made. `work` begins anew each time.
///
/// # Errors
/// Those of `work` that memory has no part in; those of `make_room`.
pub fn with_room<C: ?Sized, T>(
    context: &mut C,
    mut work: impl FnMut(&mut C) -> Result<T>,
    mut make_room: impl FnMut(&mut C, Message) -> Result<()>,
) -> Result<T> {
    loop {
        match work(context) {
            Err(Error::Budget(message)) => make_room(context, message)?,
            done => return done,
        }
    }
}

/// A smaller plan for `model` from now on.
///
/// # Errors
/// `message`, where no plan is smaller; those of [`Trainee::shrink`].
pub fn shrink<M: Trainee>(model: &mut M, message: Message) -> Result<Shrunk> {
    model.shrink()?.ok_or(Error::Budget(message))
}
