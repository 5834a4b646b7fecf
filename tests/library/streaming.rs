//! What a model tells those who bring its weights: which block comes, and what is done with.

use std::sync::{Arc, Mutex};

use nibble::checkpoint::Checkpoint;
use nibble::data::{Batch, Document};
use nibble::kernels::Direction;
use nibble::model::streaming::WeightStream;
use nibble::model::weights::Weights;
use nibble::model::{Model, Variant};
use nibble::plan::{Policy, Settings};

use crate::golden::Case;

type Pass<'a> = &'a dyn Fn(&mut Model);

/// Notes what it is told.
struct Notes(Arc<Mutex<Vec<&'static str>>>);

impl Notes {
    fn push(&self, what: &'static str) {
        self.0.lock().unwrap().push(what);
    }
}

impl WeightStream for Notes {
    fn enter(&mut self, _layer: usize, _direction: Direction) {
        self.push("enter");
    }

    fn leave(&mut self, _layer: usize, _direction: Direction) {
        self.push("leave");
    }

    fn leave_table(&mut self) {
        self.push("leave table");
    }

    fn leave_head(&mut self) {
        self.push("leave head");
    }

    fn bytes_in_memory(&self) -> Option<u64> {
        None
    }
}

/// Otherwise the head stays in memory beside the blocks of the next pass, where the plan has no room for it.
#[test]
fn every_pass_that_makes_logits_leaves_the_head() {
    let case = Case::open("llama_s0");
    let spec = case.spec();
    let checkpoint = Checkpoint::open(&case.path).unwrap();
    let mut weights = Weights::load(&checkpoint, &spec, None, None).unwrap();
    let notes = Arc::default();
    weights.streaming = Some(Box::new(Notes(Arc::clone(&notes))));
    let layers = spec.num_layers;
    let settings = Settings {
        policies: vec![Policy::Checkpoint; layers],
        bf16_working: false,
        cache_tokens: 8,
        ..Settings::of_pass(8, 2)
    };
    let mut model = Model::new(spec, weights, settings).unwrap();
    let document = Document { input_ids: vec![5, 6, 7], labels: vec![5, 6, 7], line: 1 };
    let batch = Batch::from_documents(&[document]);
    let mut told = |pass: Pass| {
        notes.lock().unwrap().clear();
        pass(&mut model);
        notes.lock().unwrap().clone()
    };
    let blocks = ["enter", "leave"].repeat(layers);
    let once = [&["enter"][..], &["leave table"], &blocks[1..], &["leave head"]].concat();
    let sorted = |mut notes: Vec<&'static str>| {
        let last = notes.pop();
        notes.sort_unstable();
        (notes, last)
    };
    let passes: [(&str, Pass); 4] = [
        ("evaluate", &|model| assert!(model.evaluate(&batch, Variant::Adapted).unwrap().sum > 0.0)),
        ("score", &|model| drop(model.score(&batch, Variant::Base).unwrap())),
        ("logits", &|model| drop(model.logits(&batch, &[0, 1, 2]).unwrap())),
        ("decode", &|model| drop(model.decode(&[5, 6]).unwrap())),
    ];
    for (name, pass) in passes {
        assert_eq!(sorted(told(pass)), sorted(once.clone()), "{name}");
    }
}
