//! Training and evaluation data: read, checked, packed.

use std::path::PathBuf;

use crate::cli::train::TrainArgs;
use crate::commands::reading;
use crate::data::encode::Encoder;
use crate::data::files::in_words;
use crate::data::pack::{efficiency, one_per_row, pack};
use crate::data::split::also_trained;
use crate::data::{Batch, DataFiles, DataOptions, Dataset, Document, LoadReport};
use crate::error::Result;
use crate::plural::counted;
use crate::train::events::DataSummary;
use crate::train::feed::Feed;
use crate::train::progress::Progress;

/// Data as the loop takes them.
pub struct Prepared {
    /// Training data.
    pub feed: Feed,
    /// Fingerprint of the training data.
    pub training_sha256: String,
    /// Evaluation batches; may be empty.
    pub evaluation: Vec<Batch>,
    /// Fingerprint of the evaluation data.
    pub evaluation_sha256: Option<String>,
    /// Tokens of the largest batch, evaluation included.
    pub largest_batch_tokens: usize,
    /// Most trained tokens of a batch, evaluation included.
    pub most_batch_targets: usize,
    /// Tokens of the longest document, evaluation included.
    pub longest_document_tokens: usize,
    /// What the logs say of the data.
    pub summaries: Vec<DataSummary>,
}

/// Reads and packs the data of `args`, and says what became of them.
pub fn prepare(args: &TrainArgs, base: &super::Base, progress: &Progress) -> Result<Prepared> {
    let [training, evaluation] = sources(args, base, progress)?;
    let seed = args.optimization.seed;
    let max_length = options(args, base).max_length;
    if let Some(most) = base.spec.trained_length().filter(|&most| most < max_length) {
        let documents = training.documents.iter().chain(&evaluation.documents);
        progress.note(&reading::beyond_training(most, longer_than(most, documents)));
    }
    let both = also_trained(&evaluation.documents, &training.documents);
    if both > 0 {
        let all = counted(evaluation.documents.len(), "evaluation document");
        progress.note(&format!(
            "warning: {both} of {all} are also trained on: their loss does not tell what was learned"
        ));
    }
    let rows = |documents: &[Document]| match args.data.packing {
        true => pack(&lengths(documents), max_length, seed),
        false => one_per_row(documents.len()),
    };
    let training_rows = rows(&training.documents);
    if args.data.packing {
        let share = 100.0 * efficiency(&lengths(&training.documents), &training_rows, max_length);
        let what = counted(training_rows.len(), "sequence");
        progress.note(&format!("packed into {what} of {max_length} tokens, {share:.1}% full"));
    }
    let summaries = vec![training.summary("training", &training_rows)];
    let seed = args.data.shuffle.then_some(seed);
    let rows_per_batch = args.optimization.per_device_train_batch_size.get();
    let feed = Feed::new(training.documents, training_rows, rows_per_batch, seed)?;
    let feed =
        feed.with_files(training.files).with_largest_first(args.evaluation.longest_first_step);
    let mut prepared = Prepared {
        largest_batch_tokens: feed.largest_batch_tokens(),
        most_batch_targets: feed.most_batch_targets(),
        longest_document_tokens: feed.longest_document_tokens(),
        training_sha256: feed.fingerprint(),
        feed,
        evaluation: Vec::new(),
        evaluation_sha256: None,
        summaries,
    };
    if !evaluation.documents.is_empty() {
        let evaluation_rows = rows(&evaluation.documents);
        prepared.summaries.push(evaluation.summary("evaluation", &evaluation_rows));
        let feed = Feed::new(evaluation.documents, evaluation_rows, rows_per_batch, None)?;
        prepared.evaluate(feed.with_files(evaluation.files));
    }
    Ok(prepared)
}

fn longer_than<'d>(tokens: usize, documents: impl Iterator<Item = &'d Document>) -> usize {
    documents.filter(|document| document.input_ids.len() > tokens).count()
}

fn lengths(documents: &[Document]) -> Vec<usize> {
    documents.iter().map(|document| document.input_ids.len()).collect()
}

fn options(args: &TrainArgs, base: &super::Base) -> DataOptions {
    args.data.format.options(args.data.max_length, &base.spec)
}

/// Documents of files, or a part of them.
struct DocumentSet<'a> {
    given: &'a [PathBuf],
    files: DataFiles,
    documents: Vec<Document>,
    /// What was left out or looks wrong.
    notes: Vec<String>,
}

/// The training and the evaluation documents; the latter may be none.
fn sources<'a>(
    args: &'a TrainArgs,
    base: &super::Base,
    progress: &Progress,
) -> Result<[DocumentSet<'a>; 2]> {
    let options = options(args, base);
    let encoder = Encoder::new(&base.tokenizer, base.spec.vocab_size, options.train_on)?;
    let read = |given: &'a [PathBuf]| -> Result<DocumentSet<'a>> {
        let dataset = reading::load(given, &encoder, &options)?;
        let notes = reading::notes(&dataset.report);
        progress.note(&first_line(given, &dataset.report, &notes));
        let Dataset { documents, report } = dataset;
        Ok(DocumentSet { given, files: report.files, documents, notes })
    };
    let mut training = read(&args.data.data)?;
    let (given, files) = (training.given, training.files.clone());
    let mut evaluation = DocumentSet { given, files, documents: Vec::new(), notes: Vec::new() };
    match (&args.data.eval_data[..], args.data.validation_split) {
        ([], Some(share)) if share > 0.0 => {
            (training.documents, evaluation.documents) =
                reading::hold_out(training.documents, share, args.optimization.seed)?;
            let [kept, held_out] = [&training, &evaluation].map(|source| source.documents.len());
            progress.note(&format!(
                "validation split: {held_out} of the documents held out, {kept} to train on"
            ));
        }
        ([], _) => {}
        (given, _) => evaluation = read(given)?,
    }
    Ok([training, evaluation])
}

impl DocumentSet<'_> {
    /// What the logs say of the documents.
    fn summary(&self, name: &str, rows: &[Vec<usize>]) -> DataSummary {
        let lengths = lengths(&self.documents);
        DataSummary {
            name: name.to_string(),
            file: in_words(self.given),
            documents: self.documents.len() as u64,
            tokens: lengths.iter().sum::<usize>() as u64,
            trained_tokens: self.documents.iter().map(Document::num_targets).sum::<usize>() as u64,
            longest_document_tokens: lengths.iter().max().copied().unwrap_or(0) as u64,
            rows: rows.len() as u64,
            notes: self.notes.clone(),
        }
    }
}

impl Prepared {
    fn evaluate(&mut self, mut feed: Feed) {
        self.evaluation_sha256 = Some(feed.fingerprint());
        self.evaluation = (0..feed.num_batches()).map(|index| feed.batch(0, index)).collect();
        self.largest_batch_tokens = self.largest_batch_tokens.max(feed.largest_batch_tokens());
        self.most_batch_targets = self.most_batch_targets.max(feed.most_batch_targets());
        let longest = self.longest_document_tokens.max(feed.longest_document_tokens());
        self.longest_document_tokens = longest;
    }
}

/// A line on a file; nothing that was left out goes unsaid.
fn first_line(given: &[PathBuf], report: &LoadReport, notes: &[String]) -> String {
    let share = 100.0 * report.targets as f64 / report.tokens.max(1) as f64;
    let mut line = format!(
        "{}: {}, {}, {}, {share:.0}% of them trained",
        in_words(given),
        counted(report.records, "record"),
        counted(report.documents, "document"),
        counted(report.tokens, "token"),
    );
    for note in notes {
        line.push_str("; ");
        line.push_str(note);
    }
    line
}
