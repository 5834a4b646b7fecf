//! Memory that runs short: room is made, and what was being done is done again.

use super::{Parts, Trainer};
use crate::error::{Error, Message, Result};
use crate::train::events::{Event, OutOfMemoryEvent};
use crate::train::trainee::{Shrunk, Trainee};

impl<M: Trainee> Trainer<'_, M> {
    /// Does `work`; where memory runs short, again with a smaller plan, until it is done or no plan
    /// is smaller. `work` begins anew each time.
    pub(super) fn with_room<T>(
        &mut self,
        mut work: impl FnMut(&mut M, &Parts) -> Result<T>,
    ) -> Result<T> {
        loop {
            match work(self.model, &self.parts) {
                Err(Error::Budget(message)) => self.make_room(message)?,
                done => return done,
            }
        }
    }

    /// A smaller plan from now on.
    ///
    /// # Errors
    /// `message`, where there is none.
    pub(super) fn make_room(&mut self, message: Message) -> Result<()> {
        match self.model.shrink()? {
            Some(shrunk) => self.tell_of_shortage(message.what, shrunk),
            None => Err(Error::Budget(message)),
        }
    }

    /// Logs that memory ran short.
    pub(super) fn tell_of_shortage(&mut self, reason: String, shrunk: Shrunk) -> Result<()> {
        let event = OutOfMemoryEvent {
            step: self.state.step,
            epoch: self.epoch(),
            reason,
            from_tokens: shrunk.from_tokens as u64,
            to_tokens: shrunk.to_tokens as u64,
            change: shrunk.change,
        };
        self.parts.progress.out_of_memory(&event);
        self.record(Event::OutOfMemory(event))
    }
}
