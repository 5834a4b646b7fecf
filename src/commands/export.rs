//! `nibble export`: a model as a GGUF file.

use std::path::Path;
use std::time::Instant;

use candle_core::quantized::gguf_file::Value as Metadata;

use super::progress_bar;
use crate::adapter::Adapter;
use crate::byte_size::ByteSize;
use crate::checkpoint::atomic::{AtomicFile, check_new_file, parent};
use crate::checkpoint::{Checkpoint, Export, gguf_fields};
use crate::cli::export::ExportArgs;
use crate::data::ChatTokenizer;
use crate::error::{Error, Result};
use crate::model::families::spec_from_config;
use crate::model::spec::{Family, ModelSpec};
use crate::system::interrupt::Interrupt;

/// Runs the command.
///
/// # Errors
/// Every wrong input before the first byte is written; `Io` when the disk refuses.
pub fn run(args: &ExportArgs) -> Result<()> {
    super::threads::set(args.threads)?;
    check_new_file(&args.out, args.overwrite)?;
    for input in [Some(&args.model), args.adapter.as_ref()].into_iter().flatten() {
        check_not_part(input, &args.out)?;
    }
    let checkpoint = Checkpoint::open(&args.model)?;
    super::notes::image_tensors(&checkpoint);
    let spec = spec_from_config(checkpoint.config())?;
    let started = Instant::now();
    let bytes = match &args.adapter {
        Some(folder) => {
            if checkpoint.image_tensors() > 0 {
                eprintln!(
                    "note: this adapter is for the GGUF file that `nibble export` makes of the model; \
                     llama.cpp's converter calls its architecture otherwise"
                );
            }
            write_adapter(args, &spec, folder)?
        }
        None => write_model(args, &checkpoint, &spec)?,
    };
    let seconds = started.elapsed().as_secs_f64();
    println!("wrote {} ({}, {seconds:.1} s)", args.out.display(), ByteSize(bytes));
    Ok(())
}

/// Refuses to replace a file that is read: the model's own, or one of its folder that is no GGUF file.
fn check_not_part(input: &Path, output: &Path) -> Result<()> {
    let Ok(read) = input.canonicalize() else { return Ok(()) };
    let is_read = |written: &Path| {
        let within = written.starts_with(&read) && output.extension().is_none_or(|it| it != "gguf");
        written == read || within
    };
    // A link in the folder is replaced, not what it leads to.
    let folder = parent(output).canonicalize().ok();
    let link = folder.zip(output.file_name()).map(|(folder, name)| folder.join(name));
    let written = output.canonicalize().ok().into_iter().chain(link);
    if output.exists() && written.into_iter().any(|written| is_read(&written)) {
        let what = format_args!("{} would be replaced while it is read", output.display());
        return Err(Error::usage(what).hint("choose another `--out`"));
    }
    Ok(())
}

fn write_adapter(args: &ExportArgs, spec: &ModelSpec, folder: &Path) -> Result<u64> {
    if args.outtype.is_quantized() {
        return Err(Error::usage("an adapter's rows are too short for blocks of codes")
            .hint("use `--outtype f16` or `--outtype f32`"));
    }
    let adapter = Adapter::load(folder, spec)?;
    let file = AtomicFile::create(&args.out, args.overwrite)?;
    adapter.write_gguf(file, spec, args.outtype.dtype())
}

fn write_model(args: &ExportArgs, checkpoint: &Checkpoint, spec: &ModelSpec) -> Result<u64> {
    let metadata = metadata(args, spec)?;
    note_windows(spec, &metadata);
    let export = Export { checkpoint, spec, file_type: args.outtype };
    let bar = progress_bar::over_bytes("writing", export.data_bytes()? as u64);
    let interrupt = Interrupt::install()?;
    let file = AtomicFile::create(&args.out, args.overwrite)?;
    let bytes = export.write(file, &metadata, |written| {
        bar.inc(written as u64);
        interrupt.check()
    })?;
    bar.finish_and_clear();
    Ok(bytes)
}

/// The model's, then the tokenizer's.
fn metadata(args: &ExportArgs, spec: &ModelSpec) -> Result<Vec<(String, Metadata)>> {
    let tokenizer = ChatTokenizer::open(&args.model)?;
    let mut fields = gguf_fields(spec)?;
    let name = args.model.file_name().map(|name| name.to_string_lossy().into_owned());
    let name = name.unwrap_or_default();
    let name = tokenizer.gguf_name(name.strip_suffix(".gguf").unwrap_or(&name));
    fields.push(("general.name".into(), Metadata::String(name)));
    fields.push(("general.file_type".into(), Metadata::U32(args.outtype.id())));
    if args.outtype.is_quantized() {
        fields.push(("general.quantization_version".into(), Metadata::U32(2)));
    }
    fields.extend(tokenizer.gguf_fields(spec.vocab_size)?);
    // What ends an answer may be known to the model's config alone.
    let end = spec.eos_token_ids.first().filter(|_| tokenizer.eos().is_none());
    let end = end.map(|&id| ("tokenizer.ggml.eos_token_id".into(), Metadata::U32(id)));
    fields.extend(end);
    Ok(fields)
}

/// llama.cpp computes a family with full attention if its files name no window, and a Phi-3 in any case.
fn note_windows(spec: &ModelSpec, metadata: &[(String, Metadata)]) {
    let named = metadata.iter().any(|(key, _)| key.ends_with(".attention.sliding_window"));
    if named && spec.family != Family::Phi3 {
        return;
    }
    let shortest = spec.windows.iter().flatten().min();
    if let Some(window) = shortest.filter(|window| **window < spec.max_positions) {
        eprintln!(
            "note: llama.cpp computes this model without its sliding window: texts longer than \
             {window} tokens will differ"
        );
    }
}
