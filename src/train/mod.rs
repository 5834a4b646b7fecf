//! Training: from batches and a model to an adapter, one optimizer step after another.

pub mod adamw;
pub mod buffers;
pub mod checks;
pub mod clip;
pub mod digest;
pub mod events;
pub mod feed;
pub mod recipe;
pub mod schedule;
pub mod step;
#[cfg(test)]
mod toy;
pub mod trainee;
