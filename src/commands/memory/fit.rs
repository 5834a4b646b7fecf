//! `nibble memory --fit`: what fits a budget.

use serde_json::{Value, json};

use super::print::STREAMS_FOLDER;
use super::room::{Room, place_in_words};
use super::row_length;
use crate::byte_size::ByteSize;
use crate::cli::memory::MemoryArgs;
use crate::error::{Error, Result};
use crate::figures::{change, thousands};
use crate::plan::fit::{Asked, Fit};
use crate::plan::{Demand, Limit, Policy, Processor, Strategy};
use crate::plural::counted;

/// Prints what fits `--budget`, or the memory that is free here. `assumes_packing`: whether 4-bit weights are
/// planned of which no file is known.
///
/// # Errors
/// `Budget`, after everything is printed, where what was asked for does not fit.
pub(super) fn run(
    args: &MemoryArgs,
    demand: &Demand,
    room: &Room,
    assumes_packing: bool,
) -> Result<()> {
    let limit = limit_to_fit(args, room)?;
    let asked = Asked {
        batch: args.per_device_train_batch_size.get(),
        accumulation: args.gradient_accumulation_steps.get(),
        length: row_length(args, demand.spec),
        logits_chunk: args.logits_chunk_length,
    };
    let chosen = demand.choose(limit);
    let (choice, refusal) = match chosen {
        Ok(choice) => (choice, None),
        Err(refusal @ Error::Budget(_)) => (demand.leanest()?, Some(refusal)),
        Err(error) => return Err(error),
    };
    let fit = Fit::new(demand, asked, limit, &choice);
    if args.json {
        let out = json!({
            "fits": refusal.is_none(),
            "planned_bytes": fit.bytes,
            "refusal": refusal.as_ref().map(self::refusal),
            "fit": fit,
        });
        println!("{out:#}");
    } else {
        print(args, demand, (&fit, asked), (limit, refusal.as_ref()));
        if assumes_packing && fit.streams() {
            println!("\n{STREAMS_FOLDER}");
        }
    }
    refusal.map_or(Ok(()), Err)
}

/// Why nothing fits, for programs.
pub(super) fn refusal(error: &Error) -> Value {
    let message = error.message();
    json!({"error": message.what, "hint": message.hint})
}

fn limit_to_fit(args: &MemoryArgs, room: &Room) -> Result<Limit> {
    if let Some(budget) = args.budget {
        return Ok(Limit::Budget(budget.0));
    }
    room.free_bytes.map(Limit::Free).ok_or_else(|| {
        let device = args.device.device;
        Error::usage(format_args!("`--fit`: `{device}` is not here to be asked what is free"))
            .hint("give its memory as `--budget`, such as `--budget 24GiB`")
    })
}

fn print(
    args: &MemoryArgs,
    demand: &Demand,
    (fit, asked): (&Fit, Asked),
    (limit, refusal): (Limit, Option<&Error>),
) {
    let usable = ByteSize(limit.usable_bytes());
    let of = match limit {
        Limit::Budget(_) => String::new(),
        Limit::Free(bytes) => {
            let place = place_in_words(demand.machine.processor);
            format!(", of the {} {place}", ByteSize(bytes))
        }
    };
    println!("{} in {usable}{of}:", args.base.model.display());
    match refusal {
        None => println!(
            "{} of {} tokens {} with {}: {}",
            counted(asked.batch, "sequence"),
            thousands(asked.length as u64),
            if asked.batch == 1 { "fits" } else { "fit" },
            ByteSize(fit.bytes),
            fit.plan.words,
        ),
        Some(refusal) => println!("does not fit: {refusal}"),
    }
    print_ways(fit, asked, demand);
    if let Some(fastest) = &fit.fastest {
        let which = if refusal.is_none() { "fastest" } else { "fits" };
        println!(
            "\n{which}: {}\n  {}: {}, {:.2}x the time of a token",
            fastest.plan.flags,
            ByteSize(fastest.plan.bytes),
            fastest.plan.words,
            fastest.time,
        );
    }
    println!("\n{:<38} {:>12} {:>12} {:>6}", "one change of this plan", "total", "changes", "time");
    for knob in &fit.knobs {
        let (total, change) = (ByteSize(knob.bytes), change(fit.bytes, knob.bytes));
        let over = if knob.bytes > fit.budget_bytes { "  over the budget" } else { "" };
        println!("{:<38} {total:>12} {change:>12} {:>5.2}x{over}", knob.flags, knob.time);
    }
}

fn print_ways(fit: &Fit, asked: Asked, demand: &Demand) {
    let sequences = format!("sequences of {}", thousands(asked.length as u64));
    let on_gpu = demand.machine.processor == Processor::Gpu;
    let host = if on_gpu { format!(" {:>10}", "pins") } else { String::new() };
    println!(
        "\n{:<38} {:>10} {:>6} {:>16}{host} {sequences:>19}",
        "", "as asked", "time", "longest document"
    );
    for way in &fit.ways {
        let longest = thousands(way.longest_document as u64);
        let (bytes, batch) = (ByteSize(way.bytes), thousands(way.largest_batch as u64));
        let pins = match (on_gpu, way.pinned_bytes) {
            (false, _) => String::new(),
            (true, bytes) => format!(" {:>10}", ByteSize(bytes)),
        };
        let (name, time) = (name(&way.strategy, demand), way.time);
        println!("{name:<38} {bytes:>10} {time:>5.2}x {longest:>16}{pins} {batch:>19}");
    }
    if fit.plan.strategy.dequantized_blocks > 0 {
        println!("(all of them without weights that stay dequantized)");
    }
    if on_gpu {
        println!("(pins: pinned host memory that the longest document also needs)");
    }
    let max_positions = demand.spec.max_positions;
    if fit.ways.iter().any(|way| way.longest_document > max_positions) {
        println!(
            "(the model itself was trained on up to {} tokens)",
            thousands(max_positions as u64)
        );
    }
}

fn name(strategy: &Strategy, demand: &Demand) -> String {
    let Strategy { kept, others, attended, remaking_attention, stream, .. } = *strategy;
    let weights = if stream { "streamed" } else { "resident" };
    if attended > 0 {
        return format!("{attended} attention, offloaded, {weights}");
    }
    if kept == 0 && remaking_attention > 0 {
        let offloaded = demand.spec.num_layers - remaking_attention;
        return format!("attention of {offloaded} offloaded, {weights}");
    }
    if (1..demand.spec.num_layers).contains(&kept) {
        let others = match others {
            Policy::Offload | Policy::AttentionOffloadInput => "rest offloaded",
            Policy::OffloadAttention if remaking_attention > 0 => "some both offloaded",
            Policy::OffloadAttention => "rest both offloaded",
            Policy::Attention => "rest attention",
            Policy::Keep | Policy::Checkpoint => "rest recomputed",
        };
        return format!("{kept} kept, {others}, {weights}");
    }
    let all = match others {
        Policy::Keep => "activations kept",
        Policy::Attention => "attention kept",
        Policy::Checkpoint => "recomputed",
        Policy::Offload | Policy::AttentionOffloadInput => "inputs offloaded",
        Policy::OffloadAttention => "attention offloaded",
    };
    format!("{all}, weights {weights}")
}
