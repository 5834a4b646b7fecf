//! Writes an adapter's folder so that PEFT, vLLM and other readers of its format take it.

use std::borrow::Cow;
use std::fs;
use std::ops::Range;
use std::path::Path;

use nibble_quant::FloatType;
use safetensors::Dtype;

use super::super::config::TargetModules;
use super::super::lora::Adapter;
use super::card::model_card;
use super::settings::{CONFIG_FILE, to_json};
use super::tensors::TENSORS_FILE;
use crate::checkpoint::atomic::write_file;
use crate::checkpoint::tensor_file::{NewTensor, PIECE_BYTES, pieces, write_tensors};
use crate::error::{Error, Result};

/// File name of the model card.
const CARD_FILE: &str = "README.md";

/// What gives some elements of the tensor of a number.
pub type Values<'a> = &'a dyn Fn(usize, Range<usize>) -> Result<Cow<'a, [f32]>>;

/// The files of an adapter but for the values of its tensors: what is left of an [`Adapter`] once a model has
/// taken those over.
#[derive(Debug, Clone)]
pub struct AdapterFiles {
    settings: String,
    card: String,
    /// Names and shapes of A and B of every target in turn.
    tensors: Vec<(String, Vec<usize>)>,
}

impl Adapter {
    /// Gives the tensors up: a model has their values.
    pub fn into_files(self) -> AdapterFiles {
        self.files()
    }

    /// Writes `adapter_config.json`, `adapter_model.safetensors` and `README.md` into `dir`: see
    /// [`AdapterFiles::write`].
    ///
    /// # Errors
    /// `Io` naming the file when the disk refuses.
    pub fn save(&self, dir: &Path, dtype: FloatType) -> Result<()> {
        self.files().write(dir, dtype, &|tensor, elements| {
            let pair = &self.tensors[tensor / 2];
            let values = if tensor % 2 == 0 { &pair.a } else { &pair.b };
            Ok(Cow::Borrowed(&values[elements]))
        })
    }

    fn files(&self) -> AdapterFiles {
        let settings = to_json(&self.config, self.base_model.as_deref(), &self.module_names());
        let tensors = self.targets.iter().flat_map(|target| {
            let (r, wide_in, wide_out) =
                (target.shape.rank, target.shape.in_features, target.shape.out_features);
            [(target.key_a(), vec![r, wide_in]), (target.key_b(), vec![wide_out, r])]
        });
        AdapterFiles {
            settings: format!("{settings:#}\n"),
            card: model_card(self),
            tensors: tensors.collect(),
        }
    }

    /// What `all-linear` and an expression are written out as. No reader but PEFT's knows the word: the
    /// distinct last parts of the targets' names, such as `q_proj`. An expression may match what is no
    /// linear, such as a whole block, which PEFT refuses: their names.
    fn module_names(&self) -> Vec<String> {
        if self.config.target_modules != TargetModules::AllLinear {
            return self.targets.iter().map(|target| target.module.clone()).collect();
        }
        let mut suffixes: Vec<String> = Vec::new();
        for target in &self.targets {
            let suffix = target.module.rsplit('.').next().unwrap_or(&target.module);
            if !suffixes.iter().any(|known| known == suffix) {
                suffixes.push(suffix.to_string());
            }
        }
        suffixes
    }
}

impl AdapterFiles {
    /// Writes the files into `dir`, which is created if need be; `values` has elements of a tensor, where A
    /// and B of every target are counted in turn. PEFT stores f32; other types round to nearest even. The
    /// tensors are converted piece by piece, so that saving needs next to no memory.
    ///
    /// Each file appears whole or not at all; for a folder that does, write into a temporary one
    /// and rename it.
    ///
    /// # Errors
    /// Those of `values`, and `Io` naming the file when the disk refuses.
    pub fn write(&self, dir: &Path, dtype: FloatType, values: Values<'_>) -> Result<()> {
        fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, e))?;
        write_file(&dir.join(CONFIG_FILE), self.settings.as_bytes())?;
        write_file(&dir.join(CARD_FILE), self.card.as_bytes())?;
        self.write_tensors(&dir.join(TENSORS_FILE), dtype, values)
    }

    fn write_tensors(&self, path: &Path, dtype: FloatType, values: Values<'_>) -> Result<()> {
        let tensor = |(index, (name, shape)): (usize, &(String, Vec<usize>))| NewTensor {
            name: name.clone(),
            dtype: stored_type(dtype),
            shape: shape.clone(),
            source: index,
        };
        let tensors = self.tensors.iter().enumerate().map(tensor).collect();
        write_tensors(path, tensors, |tensor, sink| {
            for piece in pieces(0..tensor.elements(), PIECE_BYTES / size_of::<f32>()) {
                let values = values(tensor.source, piece)?;
                let mut bytes = vec![0; values.len() * dtype.size()];
                dtype.round_into(&values, &mut bytes);
                sink.append(&bytes)?;
            }
            Ok(())
        })
    }
}

fn stored_type(dtype: FloatType) -> Dtype {
    match dtype {
        FloatType::F32 => Dtype::F32,
        FloatType::F16 => Dtype::F16,
        FloatType::Bf16 => Dtype::BF16,
    }
}
