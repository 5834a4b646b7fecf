//! The account as a table and as JSON.

use serde_json::{Value, json};

use super::PlannedRun;
use super::room::ASSUMED_CONTEXT_BYTES;
use crate::byte_size::ByteSize;
use crate::checkpoint::PageCache;
use crate::cli::memory::MemoryArgs;
use crate::figures::{change, duration, operations, thousands};
use crate::ledger::rows::Account;
use crate::plan::rates::{GPU_FLOPS_PER_SECOND, PCIE_BYTES_PER_SECOND};
use crate::plan::work::Transfer;
use crate::plan::{Policy, Processor};

/// What `train` asks of weights that a plan streams, where only a config told of them.
pub(super) const STREAMS_FOLDER: &str =
    "streaming needs a 4-bit folder: `nibble quantize` makes one";

/// For people.
pub(super) fn table(args: &MemoryArgs, run: &PlannedRun) {
    let layers = run.model.spec.num_layers;
    let trained: usize = run.settings.targets.iter().map(|target| target.shape.elements()).sum();
    println!(
        "{}: {layers} layers, {} tokens in a forward pass, {} trained parameters",
        args.base.model.display(),
        thousands(run.settings.tokens as u64),
        thousands(trained as u64),
    );
    run.facts.iter().for_each(|fact| println!("{fact}"));
    if run.model.assumes_packing && run.strategy.stream {
        println!("{STREAMS_FOLDER}");
    }
    let pinned = run.account.outside.pinned_bytes;
    if pinned > 0 {
        println!("the host holds {} of pinned memory besides", ByteSize(pinned));
    }
    println!();
    rows(run);
    if let Some(host) = &run.account.host {
        let [resident, mapped] = [host.resident_bytes, host.mapped_bytes].map(ByteSize);
        println!("\n{:<26} {:>12} {:>12}", "on the host", "planned", "measured");
        println!("{:<26} {:>12} {resident:>12}", "the program", "");
        println!("{:<26} {:>12} {mapped:>12}", "of it file-backed", "");
        let [planned, pinned] = [pinned, host.pinned_bytes].map(ByteSize);
        println!("{:<26} {planned:>12} {pinned:>12}", "pinned memory");
    }
    if let Some(cache) = &run.page_cache {
        println!("\n{}: not the program's memory, and freed when needed", cached(cache));
    }
    if let Some(transfer) = run.transfer() {
        println!("\n{}", copies(&transfer));
    }
    if let Some(budget) = args.budget {
        println!("\n{}", beside(&run.account, budget));
    }
    println!("\n{}", run.full_fine_tuning().in_words());
    if let (Some(verdict), None) = (&run.verdict, args.budget) {
        println!("\n{}", verdict.in_words());
    }
    if let Some(assumed) = assumed(run) {
        println!("\n{assumed}");
    }
    if let Some(path) = &args.html {
        println!("\ncharts: {}", path.display());
    }
}

/// The most that is planned, or was measured.
fn most_bytes(account: &Account) -> u64 {
    account.planned_bytes().max(account.peak_bytes.unwrap_or(0))
}

/// The plan, and the run of it where one was made, beside a budget.
fn beside(account: &Account, budget: ByteSize) -> String {
    match account.excess(budget.0) {
        Some(excess) => format!("warning: {excess}"),
        None => {
            let spare = ByteSize(budget.0.saturating_sub(most_bytes(account)));
            format!("fits {budget} with {spare} to spare")
        }
    }
}

/// Whether all fits the budget, or what is free here; `None` where there is neither.
fn fits(args: &MemoryArgs, run: &PlannedRun) -> Option<bool> {
    let within = args.budget.map(|budget| most_bytes(&run.account) <= budget.0);
    within.or_else(|| run.verdict.as_ref().map(|verdict| verdict.fits))
}

/// What of the plan beside weights and arena is only assumed.
fn assumed(run: &PlannedRun) -> Option<&'static str> {
    let outside = &run.account.outside;
    match (outside.processor, &run.model.tokenizer) {
        (Processor::Gpu, _) => (outside.process_bytes == ASSUMED_CONTEXT_BYTES)
            .then_some("the CUDA context is assumed: it depends on card and driver"),
        (Processor::Cpu, None) => {
            Some("program and tokenizer are assumed: there is no tokenizer beside the model")
        }
        (Processor::Cpu, Some(_)) => None,
    }
}

/// What the system keeps of the model's files.
pub(super) fn cached(cache: &PageCache) -> String {
    let [cached, all] = [cache.cached_bytes, cache.file_bytes].map(ByteSize);
    format!("{cached} of the model's {all} are in the system's page cache")
}

/// Whether the GPU would wait for weights.
fn copies(transfer: &Transfer) -> String {
    let (copying, computing) = transfer.seconds();
    let bound = if copying > computing { "copies" } else { "computation" };
    let hidden = match transfer.tokens_to_hide_copies {
        Some(tokens) => format!("copies hide behind {} tokens or more", thousands(tokens)),
        None => "longer steps hide no more of the copies".to_string(),
    };
    format!(
        "a step copies {} to the GPU: {} at {:.0} GB/s (PCIe 4.0 x16), beside {}: {} at\n{:.0} TFLOP/s \
         (an RTX 4090, in practice). It is bound by {bound}; {hidden}",
        ByteSize(transfer.bytes),
        duration(copying),
        PCIE_BYTES_PER_SECOND / 1e9,
        operations(transfer.flops),
        duration(computing),
        GPU_FLOPS_PER_SECOND / 1e12,
    )
}

fn rows(run: &PlannedRun) {
    let (account, size) = (&run.account, |bytes: u64| ByteSize(bytes).to_string());
    let Some(peak) = account.peak_bytes else {
        for row in &account.rows {
            println!("{:<26} {:>12}", row.name, size(row.planned_bytes));
        }
        println!("{:<26} {:>12}", "total", size(account.planned_bytes()));
        return;
    };
    println!("{:<26} {:>12} {:>12} {:>12}", "", "planned", "measured", "difference");
    let line = |name: &str, planned: u64, measured: u64| {
        let difference = change(planned, measured);
        println!("{name:<26} {:>12} {:>12} {difference:>12}", size(planned), size(measured));
    };
    for row in &account.rows {
        line(&row.name, row.planned_bytes, row.measured_bytes.unwrap_or(0));
    }
    line("total", account.planned_bytes(), peak);
    let share = 100.0 * (peak as f64 / account.planned_bytes() as f64 - 1.0);
    let side = if share < 0.0 { "below" } else { "above" };
    println!("\nthe measured peak is {:.1} % {side} the plan; highest in each phase:", share.abs());
    for row in &account.phases {
        if let Some(measured) = row.measured_bytes {
            let planned: u64 = row.planned_bytes.iter().sum();
            println!("  {:<24} {:>12} {:>12}", row.phase.label(), size(planned), size(measured));
        }
    }
}

/// For programs.
pub(super) fn json(args: &MemoryArgs, run: &PlannedRun) {
    let account = &run.account;
    let components: serde_json::Map<String, Value> =
        account.rows.iter().map(|row| (row.name.clone(), json!(row.planned_bytes))).collect();
    let mut out = json!({
        "model": args.base.model,
        "tokens": run.settings.tokens,
        "kept_blocks": run.settings.count(Policy::Keep),
        "attention_blocks": run.settings.layers_keeping_attention_in_memory(),
        "offloaded_attention_blocks": run.settings.offloaded_attention().len(),
        "streamed": run.strategy.stream,
        "mlp_tile_tokens": run.settings.mlp_tile(),
        "logit_rows": run.settings.logit_rows,
        "total_bytes": account.planned_bytes(),
        "weight_bytes": account.outside.weights.total(),
        "arena_bytes": run.plan.arena_bytes(),
        "offloaded_bytes": run.plan.offloaded_bytes(),
        "pinned_bytes": account.outside.pinned_bytes,
        "full_fine_tuning": run.full_fine_tuning(),
        "here": run.verdict,
        "components": components,
        "phases": account.phases,
        "regions": run.plan.regions,
    });
    if let Some(fits) = fits(args, run) {
        out["fits"] = json!(fits);
    }
    if let Some(transfer) = run.transfer() {
        out["transfer"] = json!(transfer);
    }
    if let Some(peak) = account.peak_bytes {
        out["measured"] = json!({
            "peak_bytes": peak,
            "rows": account.rows,
            "timeline": account.record.samples,
            "page_cache": run.page_cache,
            "host": account.host,
        });
    }
    println!("{out:#}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::rows::Row;

    fn account(planned_bytes: u64, peak_bytes: Option<u64>) -> Account {
        let row = Row { name: "4-bit codes".into(), planned_bytes, measured_bytes: peak_bytes };
        Account { rows: vec![row], peak_bytes, ..Account::default() }
    }

    /// What was measured decides, not what was hoped for.
    #[test]
    fn a_trial_above_its_budget_does_not_fit() {
        let budget = ByteSize(10 << 20);
        let says = |planned: u64, peak| beside(&account(planned << 20, peak), budget);
        assert_eq!(says(8, None), "fits 10.0 MiB with 2.0 MiB to spare");
        assert_eq!(says(8, Some(9 << 20)), "fits 10.0 MiB with 1.0 MiB to spare");
        assert_eq!(says(8, Some(7 << 20)), "fits 10.0 MiB with 2.0 MiB to spare");
        let over = says(8, Some(11 << 20));
        let expected = "warning: the run took 11.0 MiB, 1.0 MiB more than the 10.0 MiB";
        assert!(over.starts_with(expected) && !over.contains("fits"), "{over}");
    }

    /// A small model's are a few milliseconds, a large one's many seconds.
    #[test]
    fn copies_have_the_units_of_their_size() {
        let of = |bytes, flops| copies(&Transfer { bytes, flops, tokens_to_hide_copies: Some(9) });
        let small = of(1 << 20, 2e9);
        assert!(small.contains(": 41.9 µs at 25 GB/s") && small.contains("2.0 GFLOP: 20.0 µs at"));
        let large = of(64 << 30, 3.79e15);
        assert!(large.contains(": 2.7 s at 25 GB/s") && large.contains("3.8 PFLOP: 37.9 s at"));
    }
}
