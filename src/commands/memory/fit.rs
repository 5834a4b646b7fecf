//! `nibble memory --fit`: what fits a budget.

use serde_json::json;

use crate::cli::memory::MemoryArgs;
use crate::cli::size::ByteSize;
use crate::error::Result;
use crate::ledger::resident;
use crate::plan::fit::{Asked, Fit, Way};
use crate::plan::{Choice, Demand, Limit, Policy};
use crate::report::figures::{change, thousands};

/// Prints what fits `--budget`, or this machine's free memory.
pub(super) fn run(args: &MemoryArgs, demand: &Demand) -> Result<()> {
    let budget = args.budget.unwrap_or_else(|| ByteSize(resident::available_bytes()));
    let asked =
        Asked { batch: args.per_device_train_batch_size.get(), length: args.max_length.get() };
    // The plan within the budget; the nearest one where there is none.
    let chosen = demand.choose(Limit::Budget(budget.0));
    let refused = chosen.as_ref().err().map(ToString::to_string);
    let Choice { policies, stream } = match chosen {
        Ok(choice) => choice,
        Err(_) => demand.choose(Limit::Free(0))?,
    };
    let kept = policies.iter().filter(|policy| **policy == Policy::Keep).count();
    let fit = Fit::new(demand, asked, budget.0, (kept, stream))?;
    let plan = demand.plan(policies).arena_bytes() as u64;
    let planned = plan + demand.weight_bytes(stream) + demand.process_bytes;
    if args.json {
        let fits = refused.is_none();
        println!("{:#}", json!({"fits": fits, "planned_bytes": planned, "fit": fit}));
        return Ok(());
    }
    println!("{} in {budget}:", args.base.model.display());
    match refused {
        None => println!(
            "{} rows of {} tokens fit with {}: {kept} of {} blocks keep their activations{}",
            asked.batch,
            thousands(asked.length as u64),
            ByteSize(planned),
            demand.spec.num_layers,
            if stream { ", weights streamed" } else { "" }
        ),
        Some(refusal) => println!("does not fit: {refusal}"),
    }
    print_ways(&fit, asked, demand.spec.max_positions);
    println!("\n{:<34} {:>12} {:>12} {:>6}", "one change of this plan", "total", "changes", "work");
    for knob in &fit.knobs {
        let (total, change) = (ByteSize(knob.bytes).to_string(), change(planned, knob.bytes));
        println!("{:<34} {total:>12} {change:>12} {:>5.2}x", knob.flags, knob.work);
    }
    Ok(())
}

fn print_ways(fit: &Fit, asked: Asked, max_positions: usize) {
    let rows = format!("rows of {}", thousands(asked.length as u64));
    println!("\n{:<34} {:>12} {:>6} {:>16} {rows:>16}", "", "as asked", "work", "longest document");
    for way in &fit.ways {
        let name = format!(
            "{}, weights {}",
            if way.keep { "activations kept" } else { "recomputed" },
            if way.stream { "streamed" } else { "resident" }
        );
        let longest = thousands(way.longest_document as u64);
        let (bytes, batch) = (ByteSize(way.bytes).to_string(), thousands(way.largest_batch as u64));
        println!("{name:<34} {bytes:>12} {:>5.2}x {longest:>16} {batch:>16}", way.work);
    }
    let beyond = |way: &Way| way.longest_document > max_positions;
    if fit.ways.iter().any(beyond) {
        println!(
            "(the model itself was trained on up to {} tokens)",
            thousands(max_positions as u64)
        );
    }
}
