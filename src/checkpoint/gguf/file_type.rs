//! The types of a file's tensors, by the names of llama.cpp. Sources: `enum llama_ftype` of
//! `include/llama.h`, `src/llama-quant.cpp`.

use candle_core::quantized::GgmlDType;
use clap::ValueEnum;

use super::Architecture;
use super::names::layer_of;
use crate::model::spec::{LinearRole, ModelSpec, TensorRole, TensorSpec};

/// How a file's matrices are stored; norms, biases and learned positions are f32 in any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FileType {
    /// 32 bits
    F32,
    /// IEEE half precision
    F16,
    /// bfloat16
    Bf16,
    /// 8.5 bits per weight, in blocks of 32
    #[value(name = "q8_0")]
    Q8_0,
    /// 6.56 bits per weight, in blocks of 256
    #[value(name = "q6_k")]
    Q6K,
    /// 5.5 bits per weight, 6.56 in the head and in half of the v and down projections
    #[value(name = "q5_k_m")]
    Q5KM,
    /// 4.5 bits per weight, 6.56 in the head and in half of the v and down projections
    #[value(name = "q4_k_m")]
    Q4KM,
}

impl FileType {
    /// `general.file_type`.
    pub fn id(self) -> u32 {
        match self {
            FileType::F32 => 0,
            FileType::F16 => 1,
            FileType::Q8_0 => 7,
            FileType::Q4KM => 15,
            FileType::Q5KM => 17,
            FileType::Q6K => 18,
            FileType::Bf16 => 32,
        }
    }

    /// The type of a matrix that nothing is particular about.
    pub fn dtype(self) -> GgmlDType {
        match self {
            FileType::F32 => GgmlDType::F32,
            FileType::F16 => GgmlDType::F16,
            FileType::Bf16 => GgmlDType::BF16,
            FileType::Q8_0 => GgmlDType::Q8_0,
            FileType::Q6K => GgmlDType::Q6K,
            FileType::Q5KM => GgmlDType::Q5K,
            FileType::Q4KM => GgmlDType::Q4K,
        }
    }

    /// Whether matrices are blocks of codes.
    pub fn is_quantized(self) -> bool {
        self.dtype().block_size() > 1
    }

    /// The type of a tensor of a model, as `llama-quantize` without an importance matrix chooses it.
    /// Blocks do not straddle rows: one with too few columns for its type gets the next of blocks of
    /// 32, and f16 where they are too large, too.
    pub fn of(self, tensor: &TensorSpec, spec: &ModelSpec) -> GgmlDType {
        let columns = tensor.shape.last().copied().unwrap_or(1);
        let fits = |dtype: GgmlDType| columns.is_multiple_of(dtype.block_size());
        let wanted = match tensor.role {
            TensorRole::Norm | TensorRole::Bias | TensorRole::Positions => GgmlDType::F32,
            TensorRole::Linear(role) => {
                let layer = layer_of(&tensor.name).expect("a linear's name says its layer");
                self.of_linear(role, layer, spec)
            }
            TensorRole::Embedding if !spec.tie_word_embeddings => self.dtype(),
            TensorRole::Embedding | TensorRole::Head => match self.dtype() {
                dtype if self.is_quantized() && !fits(dtype) => GgmlDType::Q8_0,
                GgmlDType::Q4K | GgmlDType::Q5K => GgmlDType::Q6K,
                dtype => dtype,
            },
        };
        let next = match wanted {
            GgmlDType::Q4K => GgmlDType::Q5_0,
            GgmlDType::Q5K => GgmlDType::Q5_1,
            GgmlDType::Q6K => GgmlDType::Q8_0,
            _ => GgmlDType::F16,
        };
        [wanted, next].into_iter().find(|dtype| fits(*dtype)).unwrap_or(GgmlDType::F16)
    }

    fn of_linear(self, role: LinearRole, layer: usize, spec: &ModelSpec) -> GgmlDType {
        let mixed = matches!(self, FileType::Q4KM | FileType::Q5KM);
        match role {
            LinearRole::V | LinearRole::Qkv | LinearRole::Down
                if mixed && gets_more(layer, spec.num_layers) =>
            {
                GgmlDType::Q6K
            }
            LinearRole::V if self == FileType::Q4KM && is_70b(spec) => GgmlDType::Q5K,
            _ => self.dtype(),
        }
    }
}

/// The first and the last eighth of the layers, and every third between.
fn gets_more(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// What llama.cpp takes for a 70B, most of which have a small v.
fn is_70b(spec: &ModelSpec) -> bool {
    let like_one = match Architecture::of(spec.family) {
        Architecture::Llama => spec.num_kv_heads < spec.num_heads,
        architecture => architecture == Architecture::Qwen2,
    };
    like_one && spec.num_layers == 80
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use serde_json::Value;

    use super::*;
    use crate::model::families::spec_from_config;

    /// Part of the model to the types of its layers, in order, as `mixtures.json` has them.
    fn mixture(spec: &ModelSpec, file_type: FileType) -> BTreeMap<String, String> {
        let architecture = Architecture::of(spec.family);
        let mut parts = BTreeMap::<String, Vec<String>>::new();
        for tensor in spec.inventory() {
            let dtype = file_type.of(&tensor, spec);
            if dtype == GgmlDType::F32
                || (spec.tie_word_embeddings && tensor.role == TensorRole::Head)
            {
                continue;
            }
            let name = architecture.tensors(&tensor.name).unwrap().remove(0);
            let part = name.trim_end_matches(".weight");
            let part = part.splitn(3, '.').last().unwrap();
            let kind = format!("{dtype:?}").replace("K", "_K");
            parts.entry(part.into()).or_default().push(kind);
        }
        parts.into_iter().map(|(part, kinds)| (part, kinds.join(" "))).collect()
    }

    /// Golden: `gen_gguf_mixtures.py`, by llama.cpp itself.
    #[test]
    fn every_tensor_has_the_type_that_llama_cpp_gives_it() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/gguf/mixtures.json");
        let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        for (name, case) in golden.as_object().unwrap() {
            let spec = spec_from_config(&case["config"]).unwrap();
            for (kind, expected) in case["types"].as_object().unwrap() {
                let expected: BTreeMap<String, String> =
                    serde_json::from_value(expected.clone()).unwrap();
                let file_type = FileType::from_str(kind, false).unwrap();
                assert_eq!(mixture(&spec, file_type), expected, "{name} as {kind}");
            }
        }
    }
}
