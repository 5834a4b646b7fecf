//! What a model writes in the place of each document's last answer, beside that answer.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::super::progress_bar;
use crate::checkpoint::atomic::AtomicFile;
use crate::data::{ChatTokenizer, DataFiles, Dataset, Document};
use crate::error::{Error, Message, Result};
use crate::kernels::Kernels;
use crate::model::Model;
use crate::model::spec::ModelSpec;
use crate::plural::counted;
use crate::sample::{Finish, Limits, Sampler, SamplingOptions, Speaker, Wish};
use crate::system::interrupt::Interrupt;

/// A document up to its last answer, and that.
struct Question<'a> {
    /// The line in its file.
    line: usize,
    /// The file, where there are several.
    file: Option<&'a Path>,
    prompt: &'a [u32],
    label: &'a [u32],
}

/// The questions of a file.
pub(super) struct Predictions<'a> {
    questions: Vec<Question<'a>>,
    max_new_tokens: usize,
    stop_strings: &'a [String],
    /// Tokens of the longest prompt with the longest answer.
    pub context_tokens: usize,
}

/// What became of them.
pub(super) struct Predicted {
    pub path: PathBuf,
    pub documents: usize,
    /// Answers whose text is the document's.
    pub right: usize,
    /// Answers that ended at the most tokens that were allowed, not at an end of sequence.
    pub cut: usize,
}

impl<'a> Predictions<'a> {
    /// What is wrong with the file or the documents is found before the model is read.
    ///
    /// # Errors
    /// `Usage` when a document is trained from its first token on, or the file is there already.
    pub(super) fn new(
        dataset: &'a Dataset,
        spec: &ModelSpec,
        path: &Path,
        (max_new_tokens, stop_strings): (usize, &'a [String]),
    ) -> Result<Self> {
        let files = &dataset.report.files;
        let questions = dataset.documents.iter().map(|document| Question::of(document, files));
        let questions = questions.collect::<Result<Vec<_>>>()?;
        let longest = questions.iter().map(|question| question.prompt.len()).max().unwrap_or(0);
        let context_tokens = spec.possible_length(longest.saturating_add(max_new_tokens));
        super::check_is_new("--predictions", path)?;
        Ok(Predictions { questions, max_new_tokens, stop_strings, context_tokens })
    }

    /// The way out where memory is refused: it may be that of the longest answer.
    pub(super) fn shorter(&self) -> String {
        let most = self.max_new_tokens;
        format!("lower `--max-new-tokens`, which is {most}, or `--max-length`")
    }

    /// Lets the model answer, always by the likeliest token; a line is written whenever one is done, and the
    /// file has its name when all are, or with those that are when Ctrl-C is pressed.
    ///
    /// # Errors
    /// Those of the model and of [`AtomicFile::commit`], `Io` when the file cannot be written, `Interrupted`.
    pub(super) fn make<K: Kernels>(
        self,
        mut file: AtomicFile,
        model: &mut Model<K>,
        tokenizer: ChatTokenizer,
        prefill_tokens: usize,
        interrupt: &Interrupt,
    ) -> Result<Predicted> {
        let context_tokens = self.context_tokens;
        let speaker = Speaker::new(tokenizer, &model.spec().eos_token_ids)?;
        let (max_new_tokens, stop_strings) = (self.max_new_tokens, self.stop_strings);
        let limits = Limits { max_new_tokens, context_tokens, prefill_tokens, stop_strings };
        let bar = progress_bar::over_count("answering", self.questions.len());
        let (mut right, mut cut) = (0, 0);
        for (answered, question) in self.questions.iter().enumerate() {
            let Question { line, file: source, prompt, label } = question;
            let mut predict = String::new();
            let mut sampler = Sampler::new(SamplingOptions::greedy())?;
            let finish = speaker.extend(model, prompt.to_vec(), &mut sampler, limits, |piece| {
                predict.push_str(piece);
                Ok(if interrupt.requested() { Wish::Stop } else { Wish::Continue })
            })?;
            if interrupt.requested() {
                bar.finish_and_clear();
                return Err(self.interrupted(file, answered));
            }
            cut += usize::from(finish == Finish::Length);
            let finish_reason = if finish == Finish::Length { "length" } else { "stop" };
            let label = speaker.answer_text(label)?;
            right += usize::from(predict == label);
            let prompt = speaker.prompt_text(prompt)?;
            let mut record = json!({
                "line": line, "prompt": prompt, "predict": predict, "label": label,
                "finish_reason": finish_reason,
            });
            if let Some(source) = source {
                record["file"] = source.display().to_string().into();
            }
            let written = file.write_all(format!("{record}\n").as_bytes());
            written.map_err(|e| Error::io("write", file.destination(), e))?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        let path = file.destination().to_path_buf();
        file.commit()?;
        Ok(Predicted { path, documents: self.questions.len(), right, cut })
    }

    /// Leaves the first answers, if there are any, under the name that was asked for.
    fn interrupted(&self, file: AtomicFile, answered: usize) -> Error {
        let path = file.destination().to_path_buf();
        let done = match answered {
            0 => "no document was answered".to_string(),
            _ => match file.commit() {
                Ok(_) => format!(
                    "{answered} of {} are answered in {}",
                    counted(self.questions.len(), "document"),
                    path.display()
                ),
                Err(error) => return error,
            },
        };
        Error::Interrupted(Message::new(format_args!("interrupted: {done}")))
    }
}

impl<'a> Question<'a> {
    fn of(document: &'a Document, files: &'a DataFiles) -> Result<Self> {
        let Document { input_ids, labels, line } = document;
        let end = labels.iter().rposition(|&label| label >= 0).map_or(0, |last| last + 1);
        let start = labels[..end].iter().rposition(|&label| label < 0).map_or(0, |last| last + 1);
        let (file, own_line) = files.locate(*line);
        if start == 0 {
            let place = match file {
                None => format!("record {line}"),
                Some(_) => files.place(*line),
            };
            let what = format_args!("--predictions: {place} has nothing before its answer");
            return Err(Error::usage(what).hint(
                "give prompts with answers, and leave `--train-on all` out: plain text has no prompt",
            ));
        }
        let (prompt, label) = (&input_ids[..start], &input_ids[start..end]);
        Ok(Question { line: own_line, file, prompt, label })
    }
}

impl Predicted {
    /// Tells of the file below the table.
    pub(super) fn print(&self) {
        let (path, answers) = (self.path.display(), counted(self.documents, "answer"));
        println!("\nwrote {path}: {answers}, {} of them equal to the label", self.right);
        if self.cut > 0 {
            let cut = self.cut;
            println!("{cut} cut off: at `--max-new-tokens`, or where there are no more positions");
        }
    }

    pub(super) fn json(&self) -> serde_json::Value {
        json!({
            "file": self.path,
            "documents": self.documents,
            "exact_match": self.right as f64 / self.documents as f64,
            "cut": self.cut,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(labels: &[i32]) -> Document {
        Document { input_ids: (0..labels.len() as u32).collect(), labels: labels.to_vec(), line: 7 }
    }

    #[test]
    fn a_question_ends_before_the_last_answer() {
        let asked = document(&[-100, -100, 2, -100, 4, 5, -100]);
        let files = DataFiles::default();
        let question = Question::of(&asked, &files).unwrap();
        assert_eq!((question.prompt, question.label), (&[0, 1, 2, 3][..], &[4, 5][..]));
        for labels in [&[0, 1, 2][..], &[0, -100]] {
            let error = Question::of(&document(labels), &files).err().unwrap().to_string();
            assert!(error.contains("record 7 has nothing before its answer"), "{error}");
        }
    }

    /// Each file has lines of its own.
    #[test]
    fn questions_of_several_files_are_found_again() {
        let line = r#"{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}"#;
        let (folder, dataset) = super::super::fixtures::dataset(&[line, &format!("\n{line}\n")]);
        let files = &dataset.report.files;
        let question = Question::of(&dataset.documents[1], files).unwrap();
        let path = folder.path().join("1.jsonl");
        assert_eq!((question.file, question.line), (Some(path.as_path()), 2));
        let whole = Document { labels: vec![1, 2, 3], ..dataset.documents[1].clone() };
        let error = Question::of(&whole, files).err().unwrap().to_string();
        let place = format!("{}:2 has nothing before its answer", path.display());
        assert!(error.contains(&place), "{error}");
    }
}
