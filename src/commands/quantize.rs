//! `nibble quantize`: a base model once into 4-bit blocks.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use nibble_quant::{BlockFormat, FloatType, QuantType};
use regex::Regex;
use serde_json::{Value, json};

use super::{model_folder, progress_bar};
use crate::byte_size::ByteSize;
use crate::checkpoint::atomic::AtomicDir;
use crate::checkpoint::repack::{Repack, RoleSummary, Step};
use crate::checkpoint::writer::ShardWriter;
use crate::checkpoint::{Checkpoint, CheckpointKind, drop_code, set_dtype};
use crate::cli::quantize::QuantizeArgs;
use crate::data::{ChatTokenizer, TokenizerFiles};
use crate::error::{Error, Result};
use crate::model::families::spec_from_config;
use crate::model::spec::TensorRole;
use crate::system::interrupt::Interrupt;

/// Runs the command.
///
/// # Errors
/// Every wrong input before the first byte is written; `Io` when the disk refuses.
pub fn run(args: &QuantizeArgs) -> Result<()> {
    super::threads::set(args.threads)?;
    let checkpoint = Checkpoint::open(&args.model)?;
    super::notes::image_tensors(&checkpoint);
    let spec = spec_from_config(checkpoint.config())?;
    let repack = Repack {
        checkpoint: &checkpoint,
        spec: &spec,
        format: format(args, BlockFormat::default()),
        skip: args.skip.iter().map(|pattern| skip_pattern(pattern)).collect::<Result<_>>()?,
        dtype: dense_type(args, &checkpoint),
        reblock: args.force,
    };
    check_format(args, &repack)?;
    let steps = repack.steps()?;
    check_skipped(&repack, &args.skip)?;
    let interrupt = Interrupt::install()?;
    model_folder::check(&args.out, args.overwrite, &[&args.model])?;
    let folder = AtomicDir::create(&args.out, args.overwrite)?;
    write_side_files(&checkpoint, &steps, args, folder.path())?;
    let started = Instant::now();
    let (summaries, bytes) = stream(&repack, &steps, args, folder.path(), &interrupt)?;
    let seconds = started.elapsed().as_secs_f64();
    if args.check {
        repack.check(&steps, &Checkpoint::open(folder.path())?)?;
    }
    folder.commit()?;
    warn(&repack, &steps);
    print_summary(args, &repack, &summaries, bytes, seconds)
}

/// What a user may not expect of the output.
fn warn(repack: &Repack, steps: &[Step]) {
    if let Some(names) = super::notes::first_of(&repack.not_written()) {
        eprintln!("note: the model has no use for tensor {names}: left out");
    }
    let is_dense = |step: &Step| step.skipped_linear().is_some();
    let stored = repack.kept_format();
    let asked = |format: &BlockFormat| *format == repack.format && !steps.iter().any(is_dense);
    if let Some(format) = stored.filter(|format| !asked(format)) {
        let (kind, nested) = (format.quant_type.as_str(), format.double_quant);
        eprintln!(
            "note: linear layers stay as stored ({kind}, block size {}, double quantization {nested}); \
             `--force` requantizes them",
            format.block_size
        );
    }
}

/// `unasked`, but for what the flags say otherwise.
fn format(args: &QuantizeArgs, unasked: BlockFormat) -> BlockFormat {
    BlockFormat {
        quant_type: args.quant_type.map_or(unasked.quant_type, QuantType::from),
        block_size: args.block_size.unwrap_or(unasked.block_size),
        double_quant: args.double_quant.unwrap_or(unasked.double_quant),
    }
}

/// Refuses a format that is asked for where linears are packed in another already, and stay so.
fn check_format(args: &QuantizeArgs, repack: &Repack) -> Result<()> {
    let Some(stored) = repack.kept_format() else { return Ok(()) };
    if format(args, stored) == stored {
        return Ok(());
    }
    let (kind, size, nested) = (stored.quant_type.as_str(), stored.block_size, stored.double_quant);
    let path = repack.checkpoint.path().display();
    Err(Error::usage(format_args!(
        "{path} is 4-bit already: --quant-type {kind} --block-size {size} --double-quant {nested}"
    ))
    .hint("`--force` requantizes it; quantizing the dense model loses less"))
}

fn skip_pattern(pattern: &str) -> Result<Regex> {
    Regex::new(pattern).map_err(|e| {
        let error = Error::usage(format_args!("--skip: {e}"));
        error.hint("give a regular expression on tensor names, such as `layers\\.0\\.`")
    })
}

/// A pattern that matches nothing leaves nothing dense.
fn check_skipped(repack: &Repack, patterns: &[String]) -> Result<()> {
    let inventory = repack.spec.inventory();
    let matches = |pattern: &Regex| inventory.iter().any(|it| pattern.is_match(&it.name));
    let idle = repack.skip.iter().zip(patterns).find(|(pattern, _)| !matches(pattern));
    idle.map_or(Ok(()), |(_, pattern)| {
        let what = format_args!("--skip: `{pattern}` matches no tensor of the model");
        let example = inventory.iter().find(|it| matches!(it.role, TensorRole::Linear(_)));
        let example = example.map_or("", |tensor| &tensor.name);
        Err(Error::usage(what).hint(format_args!("names are such as {example}")))
    })
}

fn dense_type(args: &QuantizeArgs, checkpoint: &Checkpoint) -> Option<FloatType> {
    let from_gguf = (checkpoint.kind() == CheckpointKind::Gguf).then_some(FloatType::Bf16);
    args.dtype.map(FloatType::from).or(from_gguf)
}

/// config.json with `quantization_config`, and the tokenizer.
fn write_side_files(
    checkpoint: &Checkpoint,
    steps: &[Step],
    args: &QuantizeArgs,
    folder: &Path,
) -> Result<()> {
    let mut config = checkpoint.config().clone();
    if let Some(fields) = config.as_object_mut() {
        let dense: Vec<&str> = steps.iter().filter_map(Step::skipped_linear).collect();
        match steps.iter().find_map(Step::format) {
            Some(format) => {
                let quantization = quantization_config(&format, &dense);
                fields.insert("quantization_config".into(), quantization);
            }
            None => drop(fields.shift_remove("quantization_config")),
        }
        drop_code(fields);
        if let Some(dtype) = args.dtype {
            set_dtype(fields, dtype.into());
        }
    }
    let path = folder.join("config.json");
    std::fs::write(&path, format!("{config:#}\n")).map_err(|e| Error::io("write", &path, e))?;
    if checkpoint.kind() == CheckpointKind::Gguf {
        return ChatTokenizer::open(checkpoint.path())?.save(folder);
    }
    let model = checkpoint.path();
    model_folder::copy_side_files(model, &TokenizerFiles::of_folder(model)?, folder)
}

/// What makes `transformers` load the folder as pre-quantized.
fn quantization_config(format: &BlockFormat, dense_linears: &[&str]) -> Value {
    let mut skipped: Vec<&str> = dense_linears.to_vec();
    if !skipped.is_empty() {
        // A list replaces transformers' default, which keeps the head dense.
        skipped.push("lm_head");
    }
    let skipped = if skipped.is_empty() { Value::Null } else { json!(skipped) };
    json!({
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": format.quant_type.as_str(),
        "bnb_4bit_use_double_quant": format.double_quant,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes",
    })
}

fn stream(
    repack: &Repack,
    steps: &[Step],
    args: &QuantizeArgs,
    folder: &Path,
    interrupt: &Interrupt,
) -> Result<(BTreeMap<TensorRole, RoleSummary>, usize)> {
    let bytes: usize = steps.iter().map(|step| step.bytes_before).sum();
    let bar = progress_bar::over_bytes("quantizing", bytes as u64);
    let mut writer = ShardWriter::new(folder, Repack::announce(steps), args.max_shard_size.0);
    let summaries = repack.run(steps, &mut writer, |read| {
        bar.inc(read as u64);
        interrupt.check()
    })?;
    bar.finish_and_clear();
    Ok((summaries, writer.finish()?))
}

fn print_summary(
    args: &QuantizeArgs,
    repack: &Repack,
    summaries: &BTreeMap<TensorRole, RoleSummary>,
    bytes: usize,
    seconds: f64,
) -> Result<()> {
    if args.json {
        let roles: serde_json::Map<String, Value> = summaries
            .iter()
            .map(|(role, summary)| (role.name().to_string(), summary.to_json()))
            .collect();
        let mut out = json!({"out": args.out, "bytes": bytes, "seconds": seconds});
        out["checked"] = args.check.into();
        out["roles"] = roles.into();
        println!("{out:#}");
        return Ok(());
    }
    println!(
        "{:<12} {:>7} {:>11} {:>11} {:>12} {:>10}  worst block",
        "role", "tensors", "before", "after", "bits/weight", "RMS error"
    );
    for (role, summary) in summaries {
        println!("{}", table_row(role.name(), summary).trim_end());
    }
    let read: usize = summaries.values().map(|summary| summary.bytes_before).sum();
    let rate = read as f64 / seconds.max(1e-9) / 1e9;
    let checked = if args.check { ", checked against the source" } else { "" };
    let copied = if repack.copies_through() { " (4-bit layers copied as stored)" } else { "" };
    println!(
        "\nwrote {} ({} in {seconds:.1} s, {rate:.2} GB/s read{checked}){copied}",
        args.out.display(),
        ByteSize(bytes as u64)
    );
    Ok(())
}

fn table_row(label: &str, summary: &RoleSummary) -> String {
    let worst = summary.worst_block().map_or(String::new(), |worst| {
        format!("{:.1} %  {} block {}", 100.0 * worst.relative_rms, worst.tensor, worst.block)
    });
    let error = match summary.worst_block() {
        Some(_) => format!("{:.2} %", 100.0 * summary.relative_rms_error()),
        None => "exact".into(),
    };
    format!(
        "{label:<12} {:>7} {:>11} {:>11} {:>12.3} {error:>10}  {worst}",
        summary.tensors,
        ByteSize(summary.bytes_before as u64),
        ByteSize(summary.bytes_after as u64),
        summary.bits_per_weight(),
    )
}
