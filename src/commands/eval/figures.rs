//! What models make of a file: measured one after another, shown side by side.

use serde_json::{Map, Value, json};

use super::super::progress_bar;
use super::predictions::Predicted;
use crate::cli::adapters::NamedAdapter;
use crate::data::{Batch, targets};
use crate::error::Result;
use crate::kernels::Kernels;
use crate::model::{Model, Variant};
use crate::plural::counted;
use crate::report::table::{Align, Table};
use crate::sample::AdaptedModel;
use crate::system::interrupt::Interrupt;

/// What the model without an adapter is called.
pub(super) const BASE: &str = "base";
/// What an adapter is called that is the only one.
const ADAPTER: &str = "adapter";

/// Figures of the base and of adapters.
pub(super) struct Scores<'a> {
    adapters: &'a [NamedAdapter],
    /// None where every adapter is merged into the weights.
    base: Option<Figures>,
    /// Of the first adapters, as many as could be measured.
    adapted: Vec<Figures>,
}

/// What a model makes of the file.
#[derive(Default)]
struct Figures {
    documents: usize,
    targets: usize,
    /// Sum over the trained tokens.
    loss: f64,
    tokens_right: usize,
    /// Documents all of whose trained tokens are right.
    documents_right: usize,
}

impl<'a> Scores<'a> {
    /// Nothing is measured yet.
    pub(super) fn new(adapters: &'a [NamedAdapter]) -> Self {
        Scores { adapters, base: None, adapted: Vec::new() }
    }

    /// Measures the base and the adapters, the first of which `model` comes with.
    ///
    /// # Errors
    /// What is wrong with an adapter, `Budget` and `Interrupted`; what was measured before stays.
    pub(super) fn measure<K: Kernels>(
        &mut self,
        model: &mut AdaptedModel<K>,
        batches: &[Batch],
        interrupt: &Interrupt,
    ) -> Result<()> {
        self.measure_base(model, batches, interrupt)?;
        for (index, adapter) in self.adapters.iter().enumerate() {
            if index > 0 {
                let other = model.open_adapter(&adapter.folder)?;
                model.set_adapter(Some(other))?;
                self.measure_base(model, batches, interrupt)?;
            }
            let (name, model) = (self.name(adapter), model.model_mut()?);
            let figures = Figures::measure(model, batches, Variant::Adapted, name, interrupt)?;
            self.adapted.push(figures);
        }
        if self.base.is_none() {
            eprintln!(
                "note: adapters that are more than LoRA on linear layers are merged into the weights: \
                 figures of the base alone are not shown"
            );
        }
        Ok(())
    }

    /// Once, with the first adapter that leaves the weights as they are.
    fn measure_base<K: Kernels>(
        &mut self,
        model: &mut AdaptedModel<K>,
        batches: &[Batch],
        interrupt: &Interrupt,
    ) -> Result<()> {
        if self.base.is_none() && !model.is_merged() {
            let model = model.model_mut()?;
            self.base = Some(Figures::measure(model, batches, Variant::Base, BASE, interrupt)?);
        }
        Ok(())
    }

    /// Writes a table, or JSON, to stdout; nothing where nothing was measured.
    pub(super) fn print(&self, as_json: bool, predicted: Option<&Predicted>) {
        let Some(any) = self.rows().next().map(|(_, figures)| figures) else { return };
        if as_json {
            println!("{:#}", self.json(any, predicted));
            return;
        }
        let documents = any.documents;
        println!("{}, {}\n", counted(documents, "document"), counted(any.targets, "trained token"));
        let mut table = Table::new([
            ("", Align::Left),
            ("loss", Align::Right),
            ("perplexity", Align::Right),
            ("token accuracy", Align::Right),
            ("exact match", Align::Right),
        ]);
        for (name, figures) in self.rows() {
            table.row([
                name.to_string(),
                format!("{:.4}", figures.loss()),
                format!("{:.3}", figures.loss().exp()),
                format!("{:.1} %", 100.0 * figures.accuracy()),
                format!("{} of {documents}", figures.documents_right),
            ]);
        }
        print!("{table}");
        if let Some(predicted) = predicted {
            predicted.print();
        }
    }

    fn rows(&self) -> impl Iterator<Item = (&str, &Figures)> {
        let base = self.base.iter().map(|figures| (BASE, figures));
        let adapted = self.adapters.iter().zip(&self.adapted);
        base.chain(adapted.map(|(adapter, figures)| (self.name(adapter), figures)))
    }

    /// What a row is called.
    fn name(&self, adapter: &'a NamedAdapter) -> &'a str {
        if self.adapters.len() == 1 { ADAPTER } else { &adapter.name }
    }

    /// The only adapter is `adapter`; several are by name in `adapters`. Those that could not be measured are
    /// null.
    fn json(&self, any: &Figures, predicted: Option<&Predicted>) -> Value {
        let mut out = json!({
            "documents": any.documents,
            "targets": any.targets,
            "base": self.base.as_ref().map(Figures::json),
            "predictions": predicted.map(Predicted::json),
        });
        let measured = |index: usize| self.adapted.get(index).map(Figures::json).into();
        if let [_, _, ..] = self.adapters {
            let named = self.adapters.iter().enumerate();
            let named = named.map(|(index, adapter)| (adapter.name.clone(), measured(index)));
            out["adapters"] = named.collect::<Map<_, _>>().into();
        } else {
            out["adapter"] = measured(0);
        }
        out
    }
}

impl Figures {
    /// Of a pass over all batches.
    fn measure<K: Kernels>(
        model: &mut Model<K>,
        batches: &[Batch],
        variant: Variant,
        name: &str,
        interrupt: &Interrupt,
    ) -> Result<Self> {
        let mut figures = Figures::default();
        let documents = batches.iter().map(|batch| batch.lines.len()).sum();
        let bar = progress_bar::over_count(&format!("scoring {name}"), documents);
        for batch in batches {
            interrupt.check()?;
            bar.set_position(figures.documents as u64);
            let score = model.score(batch, variant)?;
            figures.documents += batch.lines.len();
            figures.targets += batch.num_targets();
            figures.loss += score.loss;
            figures.tokens_right += score.likeliest.iter().filter(|&&right| right).count();
            figures.documents_right += documents_right(batch, &score.likeliest);
        }
        bar.finish_and_clear();
        Ok(figures)
    }

    fn loss(&self) -> f64 {
        self.loss / self.targets as f64
    }

    fn accuracy(&self) -> f64 {
        self.tokens_right as f64 / self.targets as f64
    }

    fn json(&self) -> Value {
        json!({
            "loss": self.loss(),
            "perplexity": self.loss().exp(),
            "mean_token_accuracy": self.accuracy(),
            "exact_match": self.documents_right as f64 / self.documents as f64,
        })
    }
}

fn documents_right(batch: &Batch, likeliest: &[bool]) -> usize {
    let (mut rest, mut right) = (likeliest, 0);
    for document in batch.documents() {
        let targets = targets(&batch.labels[document]).count();
        let (own, others) = rest.split_at(targets);
        right += usize::from(own.iter().all(|&right| right));
        rest = others;
    }
    right
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Document;

    #[test]
    fn a_document_is_right_when_all_its_trained_tokens_are() {
        let document = |labels: &[i32]| Document {
            input_ids: vec![1; labels.len()],
            labels: labels.to_vec(),
            line: 1,
        };
        // The first label of a document has nothing to be foretold from.
        let documents = [document(&[5, -100, 1, 1]), document(&[1, 1]), document(&[-100, 1, 1])];
        let batch = Batch::from_documents(&documents);
        assert_eq!(batch.num_targets(), 5);
        assert_eq!(documents_right(&batch, &[true, false, true, true, true]), 2);
        assert_eq!(documents_right(&batch, &[true, true, false, true, false]), 1);
    }
}
