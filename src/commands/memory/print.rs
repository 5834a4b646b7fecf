//! The account as a table and as JSON.

use serde_json::{Value, json};

use super::PlannedRun;
use super::room::ASSUMED_CONTEXT_BYTES;
use crate::byte_size::ByteSize;
use crate::checkpoint::PageCache;
use crate::cli::memory::MemoryArgs;
use crate::plan::work::{ASSUMED_BYTES_PER_SECOND, ASSUMED_FLOPS_PER_SECOND, Transfer};
use crate::plan::{Place, Policy};
use crate::report::figures::{change, thousands};

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
        copies(&transfer);
    }
    if let Some(budget) = args.budget {
        let free = ByteSize(budget.0.saturating_sub(run.account.planned_bytes()));
        println!("\nfits {budget} with {free} to spare");
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

/// What of the plan beside weights and arena is only assumed.
fn assumed(run: &PlannedRun) -> Option<&'static str> {
    let outside = &run.account.outside;
    match (outside.place, &run.model.tokenizer) {
        (Place::Gpu, _) => (outside.process_bytes == ASSUMED_CONTEXT_BYTES)
            .then_some("the CUDA context is assumed: it depends on card and driver"),
        (Place::Cpu, None) => {
            Some("program and tokenizer are assumed: there is no tokenizer beside the model")
        }
        (Place::Cpu, Some(_)) => None,
    }
}

/// What the system keeps of the model's files.
pub(super) fn cached(cache: &PageCache) -> String {
    let [cached, all] = [cache.cached_bytes, cache.file_bytes].map(ByteSize);
    format!("{cached} of the model's {all} are in the system's page cache")
}

/// Whether the GPU would wait for weights.
fn copies(transfer: &Transfer) {
    let (copying, computing) = transfer.seconds();
    let bound = if copying > computing { "copies" } else { "computation" };
    let hidden = match transfer.tokens_to_hide_copies {
        Some(tokens) => format!("copies hide behind {} tokens or more", thousands(tokens)),
        None => "longer steps hide no more of the copies".to_string(),
    };
    println!(
        "\na step copies {} to the GPU: {copying:.1} s at {:.0} GB/s (PCIe 4.0 x16), beside {:.1} \
         PFLOP: {computing:.1} s at\n{:.0} TFLOP/s (an RTX 4090, in practice). It is bound by \
         {bound}; {hidden}",
        ByteSize(transfer.bytes),
        ASSUMED_BYTES_PER_SECOND / 1e9,
        transfer.flops / 1e15,
        ASSUMED_FLOPS_PER_SECOND / 1e12,
    );
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
        "attention_blocks": run.settings.keeping_attention_in_memory(),
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
    if let Some(transfer) = run.transfer() {
        out["transfer"] = json!(transfer);
    }
    if let Some(peak) = account.peak_bytes {
        out["measured"] = json!({
            "peak_bytes": peak,
            "rows": account.rows,
            "timeline": account.record.moments,
            "page_cache": run.page_cache,
            "host": account.host,
        });
    }
    println!("{out:#}");
}
