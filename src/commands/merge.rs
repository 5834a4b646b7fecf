//! `nibble merge`: an adapter into its base model's weights.

use std::path::{Path, PathBuf};
use std::slice;
use std::time::Instant;

use nibble_quant::FloatType;
use serde_json::json;

use super::{model_folder, progress_bar};
use crate::adapter::{MergeBase, MergeCost, MergeOnto, MergedModel, PeftAdapter};
use crate::byte_size::ByteSize;
use crate::checkpoint::atomic::AtomicDir;
use crate::checkpoint::writer::ShardWriter;
use crate::checkpoint::{Checkpoint, CheckpointKind, is_there, read_json};
use crate::cli::merge::MergeArgs;
use crate::data::{ChatTokenizer, TemplateChoice, TemplateSources, TokenizerFiles};
use crate::error::{Error, Result};
use crate::model::families::spec_from_config;
use crate::model::spec::ModelSpec;
use crate::system::interrupt::Interrupt;

/// Runs the command.
///
/// # Errors
/// Every wrong input before the first byte is written; `Io` when the disk refuses.
pub fn run(args: &MergeArgs) -> Result<()> {
    super::threads::set(args.threads)?;
    let inputs = [Some(&args.base.model), Some(&args.adapter), args.original.as_ref()];
    let inputs: Vec<&Path> = inputs.into_iter().flatten().map(PathBuf::as_path).collect();
    model_folder::check(&args.out, args.overwrite, &inputs)?;
    super::packing::check(&args.base)?;
    let model = Checkpoint::open(&args.base.model)?;
    super::notes::image_tensors(&model);
    let original = args.original.as_deref().map(Checkpoint::open).transpose()?;
    original.iter().for_each(super::notes::image_tensors);
    let spec = spec_of(&model)?;
    if let Some(original) = &original {
        check_same_shapes(original, &spec)?;
    }
    let base = MergeBase::new(
        &model,
        original.as_ref(),
        args.base.block_format(),
        args.onto.map(MergeOnto::from),
    )?;
    let adapter = PeftAdapter::open(&args.adapter, &spec)?;
    let dtype = args.dtype.map(FloatType::from);
    let merged = MergedModel::new(base, adapter.merge(&spec)?, &spec, dtype)?;
    let interrupt = Interrupt::install()?;
    let folder = AtomicDir::create(&args.out, args.overwrite)?;
    write_side_files(args, &model, &merged, folder.path())?;
    let started = Instant::now();
    let (cost, bytes) = stream(args, &merged, folder.path(), &interrupt)?;
    folder.commit()?;
    report(args, base.onto(), &merged, &cost, bytes, started.elapsed().as_secs_f64())
}

/// What a model is; an error says which of two it is about.
fn spec_of(model: &Checkpoint) -> Result<ModelSpec> {
    spec_from_config(model.config()).map_err(|e| e.at(model.path().display()))
}

/// The original of a 4-bit model has the same tensors.
fn check_same_shapes(original: &Checkpoint, spec: &ModelSpec) -> Result<()> {
    let theirs = spec_of(original)?;
    if theirs.inventory() == spec.inventory() {
        return Ok(());
    }
    let path = original.path().display();
    let tied = |tie_word_embeddings| ModelSpec { tie_word_embeddings, ..theirs.clone() };
    if tied(spec.tie_word_embeddings).inventory() == spec.inventory() {
        let (with, without) = match theirs.tie_word_embeddings {
            false => ("--original", "--model"),
            true => ("--model", "--original"),
        };
        let what = format!("{with} has a head of its own, {without} has not; --original is {path}");
        return Err(Error::input(what)
            .hint("leave out `--original`: the adapter fits the head that it was trained under"));
    }
    Err(Error::input(format_args!("--original {path} is another model than --model"))
        .hint("give the dense model that --model was quantized from"))
}

/// config.json, and the tokenizer: the adapter's if it brings one, otherwise the base's, with the
/// adapter's chat templates.
fn write_side_files(
    args: &MergeArgs,
    model: &Checkpoint,
    merged: &MergedModel,
    folder: &Path,
) -> Result<()> {
    let path = folder.join("config.json");
    let text = format!("{:#}\n", merged.config());
    std::fs::write(&path, text).map_err(|e| Error::io("write", &path, e))?;
    let from_adapter = args.adapter.join("tokenizer.json").exists();
    if model.kind() == CheckpointKind::Gguf && !from_adapter {
        return ChatTokenizer::open_for(
            model.path(),
            &TemplateChoice::default(),
            Some(&args.adapter),
        )?
        .save(folder);
    }
    let source = if from_adapter { &args.adapter } else { model.path() };
    let templates = TemplateSources::of_adapter(&args.adapter)?;
    let speaks = templates.is_some();
    let tokenizer =
        TokenizerFiles::of_folder(source)?.with_templates(templates.filter(|_| !from_adapter));
    model_folder::copy_side_files(model.path(), &tokenizer, folder)?;
    match ChatTokenizer::open(folder) {
        Ok(tokenizer) => write_ends(folder, tokenizer.eos_ids()),
        // Files that nobody asked anything of are copied as they are.
        Err(_) if !speaks => Ok(()),
        Err(error) => Err(error),
    }
}

/// What the chat templates end an answer with, in generation_config.json, which transformers and vLLM heed:
/// the model was trained to end there, be it the tokenizer's end of sequence or not.
fn write_ends(folder: &Path, ends: &[u32]) -> Result<()> {
    let path = folder.join("generation_config.json");
    let mut generation = if is_there(&path) { read_json(&path)? } else { json!({}) };
    // Without a file of its own, generation goes by the model's.
    let config = read_json(&folder.join("config.json"))?;
    let known = generation.get("eos_token_id").unwrap_or(&config["eos_token_id"]);
    let known = known.as_array().map_or(slice::from_ref(known), Vec::as_slice);
    if ends.iter().all(|id| known.iter().any(|known| known == id)) {
        return Ok(());
    }
    let Some(fields) = generation.as_object_mut() else {
        let what = format_args!("{}: expected an object", path.display());
        return Err(Error::input(what).hint("take generation_config.json out of the base's folder"));
    };
    fields.insert("eos_token_id".into(), json!(ends));
    let text = format!("{generation:#}\n");
    std::fs::write(&path, text).map_err(|e| Error::io("write", &path, e))
}

fn stream(
    args: &MergeArgs,
    merged: &MergedModel,
    folder: &Path,
    interrupt: &Interrupt,
) -> Result<(MergeCost, usize)> {
    let announced = merged.announce();
    let bytes: usize = announced.iter().map(|tensor| tensor.bytes).sum();
    let bar = progress_bar::over_bytes("merging", bytes as u64);
    let mut writer = ShardWriter::new(folder, announced, args.max_shard_size.0);
    let cost = merged.write(&mut writer, |written| {
        bar.inc(written as u64);
        interrupt.check()
    })?;
    bar.finish_and_clear();
    Ok((cost, writer.finish()?))
}

fn report(
    args: &MergeArgs,
    onto: MergeOnto,
    merged: &MergedModel,
    cost: &MergeCost,
    bytes: usize,
    seconds: f64,
) -> Result<()> {
    let (tensors, changed) = merged.counts();
    let onto = match onto {
        MergeOnto::Original => "original",
        MergeOnto::Dequantized => "dequantized",
    };
    if args.json {
        let mut out = json!({
            "out": args.out, "onto": onto, "tensors": tensors, "changed": changed,
            "bytes": bytes, "seconds": seconds,
        });
        out["adapted_linears"] = cost.to_json();
        println!("{out:#}");
        return Ok(());
    }
    print_cost(cost);
    if cost.rounding_rms() > cost.change_rms() {
        eprintln!(
            "note: rounding loses more than the adapter changes: `--dtype float32` keeps all of it"
        );
    }
    println!(
        "\nwrote {} ({}, {tensors} tensors, {changed} of them changed, onto the {onto} weights, \
         {seconds:.1} s)",
        args.out.display(),
        ByteSize(bytes as u64),
    );
    eprintln!(
        "use it here with `--quantization none`: quantizing to 4 bits loses more than adapters change"
    );
    Ok(())
}

fn print_cost(cost: &MergeCost) {
    if cost.linears == 0 {
        return;
    }
    let weights = cost.weight_rms();
    let row = |label: &str, rms: f64| {
        println!(
            "{label:<28} {rms:>10.3e} {:>10.3} %",
            100.0 * rms / weights.max(f64::MIN_POSITIVE)
        );
    };
    let layers = format!("{} adapted linear layers", cost.linears);
    println!("{layers:<28} {:>10} {:>12}", "RMS", "of weights");
    println!("{:<28} {weights:>10.3e}", "weights");
    row("adapter update", cost.change_rms());
    row("rounding error", cost.rounding_rms());
    match cost.base_rms() {
        Some(rms) => row("quantization error", rms),
        None => println!("{:<28} {:>10}", "quantization error", "unknown"),
    }
}
