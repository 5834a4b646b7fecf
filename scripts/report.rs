//! Makes `report.html` again from a run's `metrics.jsonl`, and the checkpoints beside it.
//!
//!     cargo run --release --example report -- RUN/metrics.jsonl report.html

use std::error::Error;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(metrics), Some(page)) = (arguments.next(), arguments.next()) else {
        return Err("usage: report METRICS_JSONL REPORT_HTML".into());
    };
    let events = std::fs::read_to_string(&metrics)?;
    let folder = Path::new(&metrics).parent().unwrap_or(Path::new(""));
    std::fs::write(page, nibble::report::page_of_metrics(&events, folder)?)?;
    Ok(())
}
