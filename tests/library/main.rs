//! The library in this process: data, models and training against other implementations' numbers.

#[path = "../golden/mod.rs"]
mod golden;

mod bf16_products;
mod chat_templates;
mod data_formats;
mod data_pipeline;
mod data_properties;
mod data_tables;
mod documents;
mod golden_models;
mod golden_training;
mod oracle;
mod smollm2;
mod streaming;
mod tokenizer;
mod train_toml;
