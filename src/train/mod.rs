//! Training: from batches and a model to an adapter, one optimizer step after another.

pub mod adamw;
pub mod buffers;
pub mod clip;
pub mod events;
pub mod recipe;
pub mod schedule;
