//! Writes an adapter's folder so that PEFT, vLLM and other readers of its format take it.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::path::Path;

use half::{bf16, f16};
use nibble_quant::FloatType;
use safetensors::{Dtype, View};

use super::super::lora::Adapter;
use super::card::model_card;
use super::settings::{CONFIG_FILE, to_json};
use super::tensors::TENSORS_FILE;
use crate::checkpoint::atomic::{finish_file, write_file};
use crate::error::{Error, Result};

/// File name of the model card.
const CARD_FILE: &str = "README.md";

impl Adapter {
    /// Writes `adapter_config.json`, `adapter_model.safetensors` and `README.md` into `dir`, which
    /// is created if need be. PEFT stores f32; other types round to nearest even. The tensors are
    /// converted one at a time, so that saving needs next to no memory.
    ///
    /// Each file appears whole or not at all; for a folder that does, write into a temporary one
    /// and rename it.
    ///
    /// # Errors
    /// `Io` naming the file when the disk refuses.
    pub fn save(&self, dir: &Path, dtype: FloatType) -> Result<()> {
        let pairs: Vec<[&[f32]; 2]> =
            self.tensors.iter().map(|pair| [&pair.a[..], &pair.b]).collect();
        self.save_pairs(dir, dtype, &pairs)
    }

    /// [`save`](Self::save) with tensors that lie elsewhere: A and B of every target.
    ///
    /// # Errors
    /// `Io` naming the file when the disk refuses.
    pub fn save_pairs(&self, dir: &Path, dtype: FloatType, pairs: &[[&[f32]; 2]]) -> Result<()> {
        assert_eq!(pairs.len(), self.targets.len(), "a pair for each target");
        fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, e))?;
        let settings = to_json(&self.config, self.base_model.as_deref(), &self.suffixes());
        let settings = format!("{settings:#}\n");
        write_file(&dir.join(CONFIG_FILE), settings.as_bytes())?;
        write_file(&dir.join(CARD_FILE), model_card(self).as_bytes())?;
        self.save_tensors(&dir.join(TENSORS_FILE), dtype, pairs)
    }

    fn save_tensors(&self, path: &Path, dtype: FloatType, pairs: &[[&[f32]; 2]]) -> Result<()> {
        let pairs = self.targets.iter().zip(pairs);
        let tensors = pairs.flat_map(|(target, [a, b])| {
            let (r, wide_in, wide_out) = (target.r, target.in_features, target.out_features);
            [
                (target.key_a(), Matrix { values: a, shape: [r, wide_in], dtype }),
                (target.key_b(), Matrix { values: b, shape: [wide_out, r], dtype }),
            ]
        });
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        safetensors::serialize_to_file(tensors, Some(metadata), path)
            .map_err(|e| Error::io("write", path, std::io::Error::other(e)))?;
        finish_file(path)
    }

    /// The distinct last parts of the targets' names, such as `q_proj`: how `all-linear` is written
    /// out, since no reader but PEFT's knows the word.
    fn suffixes(&self) -> Vec<String> {
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

/// A matrix on its way into a file.
struct Matrix<'a> {
    values: &'a [f32],
    shape: [usize; 2],
    dtype: FloatType,
}

impl View for Matrix<'_> {
    fn dtype(&self) -> Dtype {
        match self.dtype {
            FloatType::F32 => Dtype::F32,
            FloatType::F16 => Dtype::F16,
            FloatType::Bf16 => Dtype::BF16,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = self.values.iter();
        Cow::Owned(match self.dtype {
            FloatType::F32 => values.flat_map(|x| x.to_le_bytes()).collect(),
            FloatType::F16 => values.flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
            FloatType::Bf16 => values.flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        })
    }

    fn data_len(&self) -> usize {
        self.values.len() * if self.dtype == FloatType::F32 { 4 } else { 2 }
    }
}
