//! Nibble: QLoRA fine-tuning from one binary.
//!
//! This is the library under the program; its interface is that of no published crate, and changes with the
//! program. From files to an adapter:
//!
//! 1. [`checkpoint`] opens a model's files: `config.json`, and tensors by their Hugging Face names.
//! 2. [`model::families`] makes a [`ModelSpec`](model::spec::ModelSpec) of `config.json`: the model as data.
//! 3. [`adapter`] is LoRA: which linears it is on, and PEFT's files, in and out.
//! 4. [`plan`] names and sizes every buffer of a run before a weight is read.
//! 5. [`model::weights`] reads the frozen weights, and quantizes those that are not in 4 bits already.
//! 6. [`model::Model`] allocates the plan on a backend of [`kernels`]: the forward and backward passes.
//! 7. [`data`] makes batches of text; [`train`] makes optimizer steps of batches, and checkpoints of steps.
//!
//! ```
//! use nibble::checkpoint::Checkpoint;
//! use nibble::data::{Batch, Document};
//! use nibble::model::families::spec_from_config;
//! use nibble::model::weights::Weights;
//! use nibble::model::{Model, Variant};
//! use nibble::plan::Settings;
//! use nibble_quant::BlockFormat;
//!
//! let checkpoint = Checkpoint::open("tests/data/models/llama_s0".as_ref())?;
//! let spec = spec_from_config(checkpoint.config())?;
//! let weights = Weights::load(&checkpoint, &spec, Some(&BlockFormat::default()), None)?;
//! // Passes of up to 32 tokens, with the logits of 8 of them at a time.
//! let mut model = Model::new(spec, weights, Settings::of_pass(32, 8))?;
//!
//! let input_ids = vec![3, 1, 4, 1, 5, 9, 2, 6];
//! let labels = input_ids.iter().map(|&id| id as i32).collect();
//! let batch = Batch::from_documents(&[Document { input_ids, labels, line: 1 }]);
//! let loss = model.evaluate(&batch, Variant::Base)?.sum / batch.num_targets() as f64;
//! assert!(loss > 0.0);
//! # nibble::Result::Ok(())
//! ```

// `print!`, `println!`, `eprint!` and `eprintln!` in this crate are those of `printed`, not std's, which
// panic when nobody reads.
#[macro_use]
#[doc(hidden)]
pub mod printed;

pub mod adapter;
mod byte_size;
pub mod checkpoint;
#[doc(hidden)]
pub mod cli;
#[doc(hidden)]
pub mod commands;
pub mod data;
pub mod error;
mod figures;
pub mod kernels;
pub mod ledger;
pub mod model;
mod nearest;
pub mod plan;
mod plural;
pub mod random;
pub mod report;
pub mod sample;
pub mod system;
pub mod train;

pub use error::{Error, Result};
