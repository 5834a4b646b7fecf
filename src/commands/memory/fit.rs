//! `nibble memory --fit`: what fits a budget.

use serde_json::json;

use crate::cli::device::Device;
use crate::cli::memory::MemoryArgs;
use crate::cli::size::ByteSize;
use crate::commands::device;
use crate::error::{Error, Result};
use crate::ledger::resident;
use crate::plan::fit::{Asked, Fit, Way};
use crate::plan::{Demand, Limit, Policy};
use crate::report::figures::{change, thousands};

/// Prints what fits `--budget`, or this machine's free memory.
pub(super) fn run(args: &MemoryArgs, demand: &Demand) -> Result<()> {
    let budget = match (args.budget, args.device.device) {
        (Some(budget), _) => budget,
        (None, Device::Cuda(index)) => {
            device::free_bytes(index).map(ByteSize).ok_or_else(|| {
                Error::usage(format_args!(
                    "`--fit`: cuda:{index} is not here to be asked what is free"
                ))
                .hint("give its memory as `--budget`, such as `--budget 24GiB`")
            })?
        }
        (None, _) => ByteSize(resident::available_bytes()),
    };
    let asked = Asked {
        batch: args.per_device_train_batch_size.get(),
        length: args.max_length.get(),
        logits_chunk: args.logits_chunk_length,
    };
    // The plan within the budget; the nearest one where there is none.
    let chosen = demand.choose(Limit::Budget(budget.0));
    let refused = chosen.as_ref().err().map(ToString::to_string);
    let choice = match chosen {
        Ok(choice) => choice,
        Err(_) => demand.choose(Limit::Free(0))?,
    };
    let fit = Fit::new(demand, asked, budget.0, &choice);
    if args.json {
        println!("{:#}", json!({"fits": fit.fits, "planned_bytes": fit.bytes, "fit": fit}));
        return Ok(());
    }
    println!("{} in {budget}:", args.base.model.display());
    match refused {
        None => println!(
            "{} rows of {} tokens fit with {}: {}",
            asked.batch,
            thousands(asked.length as u64),
            ByteSize(fit.bytes),
            choice.in_words(),
        ),
        Some(refusal) => println!("does not fit: {refusal}"),
    }
    print_ways(&fit, asked, demand.spec.max_positions);
    print_fastest(&fit, asked);
    println!("\n{:<34} {:>12} {:>12} {:>6}", "one change of this plan", "total", "changes", "time");
    for knob in &fit.knobs {
        let (total, change) = (ByteSize(knob.bytes).to_string(), change(fit.bytes, knob.bytes));
        println!("{:<34} {total:>12} {change:>12} {:>5.2}x", knob.flags, knob.time);
    }
    Ok(())
}

fn print_ways(fit: &Fit, asked: Asked, max_positions: usize) {
    let rows = format!("rows of {}", thousands(asked.length as u64));
    println!("\n{:<34} {:>12} {:>6} {:>16} {rows:>16}", "", "as asked", "time", "longest document");
    for way in &fit.ways {
        let name = format!(
            "{}, weights {}",
            match way.policy {
                Policy::Keep => "activations kept",
                Policy::Checkpoint => "recomputed",
                Policy::Offload => "inputs offloaded",
            },
            if way.stream { "streamed" } else { "resident" }
        );
        let longest = thousands(way.longest_document as u64);
        let (bytes, batch) = (ByteSize(way.bytes).to_string(), thousands(way.largest_batch as u64));
        println!("{name:<34} {bytes:>12} {:>5.2}x {longest:>16} {batch:>16}", way.time);
    }
    let beyond = |way: &Way| way.longest_document > max_positions;
    if fit.ways.iter().any(beyond) {
        println!(
            "(the model itself was trained on up to {} tokens)",
            thousands(max_positions as u64)
        );
    }
}

/// The micro-batch that is worth more memory.
fn print_fastest(fit: &Fit, asked: Asked) {
    let Some(fastest) = fit.fastest.as_ref().filter(|fastest| fastest.batch != asked.batch) else {
        return;
    };
    println!(
        "\nfastest: --per-device-train-batch-size {} with {}, {:.2}x the time of a token",
        fastest.batch,
        ByteSize(fastest.bytes),
        fastest.time,
    );
}
