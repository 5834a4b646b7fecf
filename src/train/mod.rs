//! Training: from batches and a model to an adapter, one optimizer step after another.

pub mod adamw;
pub mod adamw_8bit;
pub mod agreement;
pub mod backend;
pub mod base;
pub mod buffers;
pub mod checkpoints;
pub mod checks;
pub mod clip;
mod cuda;
pub mod digest;
pub mod events;
pub mod feed;
pub mod fingerprint;
pub mod lora_model;
pub mod meter;
pub mod optimizer_file;
pub mod preview;
pub mod progress;
pub mod recipe;
pub mod schedule;
pub mod scheduler_kwargs;
pub mod settings;
pub mod start;
pub mod state;
pub mod step;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod toy;
pub mod trainee;
pub mod trainer;
pub mod trial;
