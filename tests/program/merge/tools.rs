//! The command, its inputs, and PEFT's logits to compare with.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nibble::adapter::{Adapter, LoraTarget, PeftAdapter};
use nibble::checkpoint::{Checkpoint, Weight};
use nibble::data::{Batch, Document};
use nibble::model::Model;
use nibble::model::families::spec_from_config;
use nibble::model::spec::ModelSpec;
use nibble::model::weights::Weights;
use nibble::plan::{Policy, Settings};
use nibble_quant::BlockFormat;
use safetensors::SafeTensors;
use tempfile::TempDir;

use crate::training::{self, refused, stdout, succeed};

pub fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

pub fn model_of(case: &str) -> PathBuf {
    data("models").join(case.split('.').next().unwrap())
}

pub fn nibble(arguments: &[&str]) -> Command {
    training::nibble(env!("CARGO_MANIFEST_DIR"), arguments)
}

/// Runs the command, which must succeed; standard output.
pub fn run(arguments: &[&str]) -> String {
    stdout(&succeed(nibble(arguments)))
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A model, an adapter and a place for the output.
pub struct Merge {
    pub root: TempDir,
    pub model: PathBuf,
    pub adapter: PathBuf,
}

impl Merge {
    pub fn new(case: &str) -> Self {
        let root = TempDir::new().unwrap();
        Merge { root, model: model_of(case), adapter: data("adapters").join(case) }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub fn arguments<'a>(&'a self, out: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
        let base = ["merge", "--model", text(&self.model), "--adapter", text(&self.adapter)];
        [&base[..], &["--out", text(out)], more].concat()
    }

    /// Merges into the folder `name`.
    pub fn run(&self, name: &str, more: &[&str]) -> (Checkpoint, String) {
        let out = self.path(name);
        let report = run(&self.arguments(&out, more));
        (Checkpoint::open(&out).unwrap(), report)
    }

    pub fn refused(&self, code: i32, more: &[&str]) -> String {
        let out = self.path("refused");
        let errors = refused(code, nibble(&self.arguments(&out, more)));
        assert!(!out.exists(), "something was written");
        errors
    }

    /// Quantizes the base into a folder and takes that as the model.
    pub fn quantized(self) -> Self {
        self.packed(&[])
    }

    /// Quantizes the base into a folder, with flags that say how, and takes that as the model.
    pub fn packed(mut self, how: &[&str]) -> Self {
        let folder = self.path("base-4bit");
        let base = ["quantize", "--model", text(&self.model), "--out", text(&folder)];
        run(&[&base[..], how].concat());
        self.model = folder;
        self
    }
}

/// A checkpoint's tensors in f32.
pub fn values(checkpoint: &Checkpoint) -> BTreeMap<String, Vec<f32>> {
    let value = |name: &str| match checkpoint.weight(name).unwrap() {
        Weight::Dense(dense) => dense.to_f32(),
        Weight::Packed(packed) => packed.dequantize(),
    };
    checkpoint.tensors().iter().map(|info| (info.name.clone(), value(&info.name))).collect()
}

/// Input rows, and the logits that PEFT gives at their last positions.
pub struct Expected {
    pub rows: Vec<Vec<u32>>,
    pub logits: Vec<f32>,
    pub positions: usize,
}

impl Expected {
    pub fn open(case: &str) -> Self {
        let bytes = fs::read(data("adapters").join(case).join("expected.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let (ids, logits) = (file.tensor("input_ids").unwrap(), file.tensor("logits").unwrap());
        let all: Vec<i64> = bytemuck::allocation::pod_collect_to_vec(ids.data());
        let rows = all.chunks(ids.shape()[1]).map(|row| row.iter().map(|&id| id as u32).collect());
        Expected {
            rows: rows.collect(),
            logits: bytemuck::allocation::pod_collect_to_vec(logits.data()),
            positions: logits.shape()[1],
        }
    }

    /// Our logits at the same positions.
    pub fn logits_of(&self, mut model: Model) -> Vec<f32> {
        let document = |ids: &Vec<u32>| Document {
            labels: ids.iter().map(|&id| id as i32).collect(),
            input_ids: ids.clone(),
            line: 0,
        };
        let batch = Batch::from_documents(&self.rows.iter().map(document).collect::<Vec<_>>());
        let ends = batch.cu_seqlens[1..].iter();
        let wanted = ends.flat_map(|&end| end - self.positions as u32..end).collect::<Vec<u32>>();
        model.logits(&batch, &wanted).unwrap()
    }

    /// Largest difference of our logits, relative to the largest expected one.
    pub fn error(&self, model: Model) -> f32 {
        self.distance(&self.logits_of(model), &self.logits)
    }

    /// Largest difference, relative to the largest expected logit.
    pub fn distance(&self, a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len());
        let largest = self.logits.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
        a.iter().zip(b).fold(0.0_f32, |m, (a, b)| m.max((a - b).abs())) / largest
    }
}

/// The model in a checkpoint, with an adapter or without.
pub fn model(checkpoint: &Checkpoint, adapter: Option<&Path>) -> Model {
    let spec = spec_from_config(checkpoint.config()).unwrap();
    let adapter = adapter.map(|dir| Adapter::load(dir, &spec).unwrap());
    let targets = adapter.as_ref().map(|adapter| adapter.targets.clone()).unwrap_or_default();
    let weights = Weights::load(checkpoint, &spec, None, None).unwrap();
    let mut model = with_weights(spec, weights, targets);
    if let Some(adapter) = adapter {
        model.parameters_mut().load(&adapter);
    }
    model
}

/// The model in a checkpoint, with an adapter merged in while loading.
pub fn model_merged(
    checkpoint: &Checkpoint,
    quantization: Option<&BlockFormat>,
    adapter: &Path,
) -> Model {
    let spec = spec_from_config(checkpoint.config()).unwrap();
    let adapter = PeftAdapter::open(adapter, &spec).unwrap();
    let merge = adapter.merge(&spec).unwrap();
    let weights = Weights::load(checkpoint, &spec, quantization, Some(&merge)).unwrap();
    with_weights(spec, weights, Vec::new())
}

fn with_weights(spec: ModelSpec, weights: Weights, targets: Vec<LoraTarget>) -> Model {
    let settings = Settings {
        longest_document: 32,
        policies: vec![Policy::Keep; spec.num_layers],
        targets,
        bf16_working: false,
        ..Settings::of_pass(64, 8)
    };
    Model::new(spec, weights, settings).unwrap()
}
/// Copies a folder, so that a test may add files.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}
