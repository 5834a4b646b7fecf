//! A LoRA adapter as a GGUF file, which llama.cpp adds to a model as it runs. Source: llama.cpp
//! `convert_lora_to_gguf.py`, `src/llama-adapter.cpp`.

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value as Metadata;

use super::{Adapter, LoraTarget, LoraTensors};
use crate::checkpoint::atomic::AtomicFile;
use crate::checkpoint::gguf::{
    Architecture, Description, GgufWriter, does_not_fit, encoded, source_row,
};
use crate::error::{Error, Result};
use crate::model::spec::{LinearRole, ModelSpec};

impl Adapter {
    /// Writes `….lora_a` `[R, in]` and `….lora_b` `[out, R]` of every target into `file`. llama.cpp multiplies
    /// by alpha / R with one alpha, which cannot be 0: what a target's scale differs by is in its B. Returns
    /// the bytes.
    ///
    /// # Errors
    /// `Input` for a value that does not fit `dtype`; `Io` when the disk refuses.
    pub fn write_gguf(&self, file: AtomicFile, spec: &ModelSpec, dtype: GgmlDType) -> Result<u64> {
        let architecture = Architecture::of(spec.family);
        let alpha = match self.config.lora_alpha as f32 {
            0.0 => self.config.r as f32,
            alpha => alpha,
        };
        let text = |text: &str| Metadata::String(text.to_string());
        let metadata = [
            ("general.type".to_string(), text("adapter")),
            ("general.architecture".to_string(), text(architecture.name())),
            ("adapter.type".to_string(), text("lora")),
            ("adapter.lora.alpha".to_string(), Metadata::F32(alpha)),
        ];
        let names = |target: &LoraTarget| {
            let names = architecture.tensors(&format!("{}.weight", target.module));
            names.ok_or_else(|| {
                Error::input(format_args!("module {} has no name in GGUF", target.module))
            })
        };
        let names: Vec<Vec<String>> = self.targets.iter().map(names).collect::<Result<_>>()?;
        let described = self.targets.iter().zip(&names);
        let described = described.flat_map(|(target, names)| descriptions(target, names, dtype));
        let mut writer = GgufWriter::create(file, &metadata, described.collect())?;
        let tensors = self.targets.iter().zip(&self.tensors).zip(&names);
        for ((target, LoraTensors { a, b }), names) in tensors {
            let factor = target.shape.scale * target.shape.rank as f32 / alpha;
            let turned = architecture.interleaves_heads()
                && matches!(target.role, LinearRole::Q | LinearRole::K);
            let rows = |row: usize| {
                let source = if turned { source_row(row, spec.head_dim) } else { row };
                b[source * target.shape.rank..(source + 1) * target.shape.rank]
                    .iter()
                    .map(|x| x * factor)
            };
            let b: Vec<f32> = (0..target.shape.out_features).flat_map(rows).collect();
            let parts = b.chunks(b.len() / names.len());
            for values in parts.flat_map(|b| [&a[..], b]) {
                let bytes = encoded(values, dtype)
                    .ok_or_else(|| does_not_fit("adapter", &target.module, values, dtype))?;
                writer.append(&bytes)?;
                writer.end_tensor()?;
            }
        }
        writer.finish()
    }
}

/// A and B for each of the tensors that share the rows of a target's weight: A is the same for all.
fn descriptions(target: &LoraTarget, names: &[String], dtype: GgmlDType) -> Vec<Description> {
    let [a, b] = [
        [target.shape.rank, target.shape.in_features],
        [target.shape.out_features / names.len(), target.shape.rank],
    ];
    let matrix = |name: &str, letter: char, shape: [usize; 2]| Description {
        name: format!("{name}.lora_{letter}"),
        shape: shape.to_vec(),
        dtype,
    };
    names.iter().flat_map(|name| [matrix(name, 'a', a), matrix(name, 'b', b)]).collect()
}
