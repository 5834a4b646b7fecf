//! Memory that runs short in a run: it goes on with a smaller plan, and says so.

use super::Trainer;
use crate::error::{Message, Result};
use crate::model::shortage::until_it_fits;
use crate::train::events::{Event, OutOfMemoryEvent};
use crate::train::trainee::{Shrunk, Trainee};

impl<M: Trainee> Trainer<'_, M> {
    /// Does `work`, where memory runs short with a smaller plan.
    pub(super) fn until_it_fits<T>(
        &mut self,
        work: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<T> {
        until_it_fits(self, work, Self::shrink)
    }

    fn shrink(&mut self, message: Message) -> Result<()> {
        let reason = message.what.clone();
        let shrunk = self.model.shrink_or(message)?;
        self.tell_of_shortage(reason, shrunk)
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
        self.context.progress.out_of_memory(&event);
        self.record(Event::OutOfMemory(event))
    }
}
