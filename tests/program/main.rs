//! The real binary, mostly as a child process: its commands, flags, files and messages.

#[path = "../gguf_file/mod.rs"]
mod gguf_file;
#[path = "../golden/mod.rs"]
mod golden;
#[path = "../training/mod.rs"]
mod training;

mod ask;
mod command_line;
mod data_cli;
mod device_cli;
mod export;
mod memory_cli;
mod memory_measure;
mod memory_plans;
mod merge;
mod other_settings;
mod out_of_memory;
mod published_memory;
mod quantize;
mod real_model;
mod train_cli;
mod train_flags;
mod train_resume;
