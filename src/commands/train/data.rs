//! Training and evaluation data: read, checked, packed.

use std::path::Path;

use crate::cli::train::TrainArgs;
use crate::data::encode::Encoder;
use crate::data::load::{Dataset, load};
use crate::data::pack::{efficiency, one_per_row, pack};
use crate::data::split::hold_out;
use crate::data::{Batch, Document};
use crate::error::Result;
use crate::train::feed::Feed;
use crate::train::progress::Progress;

/// Data as the loop takes them.
pub struct Prepared {
    /// Training data.
    pub feed: Feed,
    /// Evaluation batches; may be empty.
    pub evaluation: Vec<Batch>,
    /// Fingerprint of the evaluation data.
    pub evaluation_sha256: Option<String>,
    /// Tokens of the largest batch, evaluation included.
    pub largest_batch_tokens: usize,
    /// Tokens of the longest document, evaluation included.
    pub longest_document_tokens: usize,
}

/// Reads and packs the data of `args`, and says what became of them.
pub fn prepare(args: &TrainArgs, base: &super::Base, progress: &Progress) -> Result<Prepared> {
    let options = args.data.format.options(args.data.max_length);
    let encoder = Encoder::new(&base.tokenizer, base.spec.vocab_size, options.train_on)?;
    let read = |path: &Path| -> Result<Vec<Document>> {
        let dataset = load(path, &encoder, &options)?;
        dataset.check(path, &options)?;
        progress.note(&summary(path, &dataset));
        Ok(dataset.documents)
    };
    let all = read(&args.data.data)?;
    let (training, evaluation) = match (&args.data.eval_data, args.data.validation_split) {
        (Some(path), _) => (all, read(path)?),
        (None, Some(share)) if share > 0.0 => hold_out(all, share, args.optimization.seed),
        _ => (all, Vec::new()),
    };
    let max_length = options.max_length;
    let (rows_per_batch, seed) =
        (args.optimization.per_device_train_batch_size.get(), args.optimization.seed);
    let rows = |documents: &[Document]| match args.data.packing {
        true => pack(documents, max_length, seed),
        false => one_per_row(documents),
    };
    let training_rows = rows(&training);
    if args.data.packing {
        let share = 100.0 * efficiency(&training, &training_rows, max_length);
        let count = training_rows.len();
        progress
            .note(&format!("packed into {count} rows of {max_length} tokens, {share:.1}% full"));
    }
    let seed = args.data.shuffle.then_some(seed);
    let feed = Feed::new(training, training_rows, rows_per_batch, seed)?;
    let mut prepared = Prepared {
        largest_batch_tokens: feed.largest_batch_tokens(),
        longest_document_tokens: feed.longest_document_tokens(),
        feed,
        evaluation: Vec::new(),
        evaluation_sha256: None,
    };
    if !evaluation.is_empty() {
        let evaluation_rows = rows(&evaluation);
        prepared.evaluate(Feed::new(evaluation, evaluation_rows, rows_per_batch, None)?);
    }
    Ok(prepared)
}

impl Prepared {
    fn evaluate(&mut self, mut feed: Feed) {
        self.evaluation_sha256 = Some(feed.fingerprint());
        self.evaluation = (0..feed.num_batches()).map(|index| feed.batch(0, index)).collect();
        self.largest_batch_tokens = self.largest_batch_tokens.max(feed.largest_batch_tokens());
        let longest = self.longest_document_tokens.max(feed.longest_document_tokens());
        self.longest_document_tokens = longest;
    }
}

/// One line on a file; nothing that was left out goes unsaid.
fn summary(path: &Path, dataset: &Dataset) -> String {
    let (report, documents) = (&dataset.report, &dataset.documents);
    let tokens: usize = documents.iter().map(|document| document.input_ids.len()).sum();
    let targets: usize = documents.iter().map(Document::num_targets).sum();
    let share = 100.0 * targets as f64 / tokens.max(1) as f64;
    let mut line = format!(
        "{}: {} records, {} documents, {tokens} tokens, {share:.0}% of them trained",
        path.display(),
        report.records,
        documents.len(),
    );
    for (count, what) in [
        (report.without_targets.len(), "without a token to train on, left out"),
        (report.too_long, "longer than `--max-length`"),
        (report.tokens_removed, "tokens removed by truncation"),
        (report.untrained_eos.len(), "whose end-of-sequence is not trained"),
        (report.duplicates.len(), "duplicates"),
    ] {
        if count > 0 {
            line.push_str(&format!("; {count} {what}"));
        }
    }
    line
}
