//! Training: from batches and a model to an adapter, one optimizer step after another.

pub mod events;
