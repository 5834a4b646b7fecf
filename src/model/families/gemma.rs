//! Gemma 1, 2 and 3. Sources: transformers `models/gemma{,2,3}/modeling_gemma*.py`,
//! `configuration_gemma*.py`.

use half::{bf16, f16};
use nibble_quant::FloatType;
use serde_json::Value;

use super::decoder;
use super::fields::{Fields, wrong_type};
use super::layer_kinds::rotary_by_kind;
use crate::checkpoint::dtype_of;
use crate::error::Result;
use crate::model::names::Names;
use crate::model::spec::{Activation, Family, ModelSpec, QkNorm};

type Defaults = &'static [(&'static str, i64)];

const GEMMA: Defaults = &[("vocab_size", 256_000), ("max_position_embeddings", 8192)];

const GEMMA2: Defaults = &[
    ("vocab_size", 256_000),
    ("num_attention_heads", 8),
    ("num_key_value_heads", 4),
    ("max_position_embeddings", 8192),
];

const GEMMA3: Defaults = &[
    ("vocab_size", 262_208),
    ("num_attention_heads", 8),
    ("num_key_value_heads", 4),
    ("max_position_embeddings", 131_072),
];

pub(super) fn gemma(fields: &Fields) -> Result<ModelSpec> {
    any_gemma(fields, Family::Gemma, GEMMA)
}

/// What all three have in common; `defaults` holds where the config is silent.
fn any_gemma(fields: &Fields, family: Family, defaults: Defaults) -> Result<ModelSpec> {
    let config = fields.with_defaults([("head_dim", 256)].iter().chain(defaults).copied());
    let fields = &Fields(&config);
    for key in ["hidden_activation", "hidden_act"] {
        let tanh = |v: &Value| v == "gelu_pytorch_tanh";
        fields.unless(key, tanh, "only `gelu_pytorch_tanh` is implemented")?;
    }
    fields.unless("use_bidirectional_attention", |v| v == false, "only `false` is implemented")?;
    let mut spec = decoder(fields, family)?;
    spec.activation = Activation::GeluTanh;
    spec.norm_plus_one = true;
    spec.embedding_scale = rounded((spec.hidden_size as f32).sqrt(), fields);
    spec.tie_word_embeddings = fields.flag_or("tie_word_embeddings", true)?;
    Ok(spec)
}

/// `scale` rounded as by transformers: in the type of the embedding, in which these models were trained (50.5
/// for √2560 in bf16).
fn rounded(scale: f32, fields: &Fields) -> f32 {
    match dtype_of(fields.0) {
        Some(FloatType::Bf16) => bf16::from_f32(scale).to_f32(),
        Some(FloatType::F16) => f16::from_f32(scale).to_f32(),
        _ => scale,
    }
}

pub(super) fn gemma2(fields: &Fields) -> Result<ModelSpec> {
    let mut spec = any_gemma(fields, Family::Gemma2, GEMMA2)?;
    spec.windows = gemma_windows(fields, spec.num_layers, 2)?;
    later_gemma(fields, &mut spec, [Some(50.0), Some(30.0)])?;
    Ok(spec)
}

pub(super) fn gemma3(fields: &Fields) -> Result<ModelSpec> {
    const THETA: f64 = 1e6;
    const LOCAL_THETA: f64 = 1e4;
    let local_theta = fields.number_or("rope_local_base_freq", LOCAL_THETA)?;
    let (config, local) = rotary_by_kind(fields, [THETA, local_theta])?;
    let mut spec = any_gemma(&Fields(&config), Family::Gemma3, GEMMA3)?;
    spec.local_rotary = Some(local);
    spec.qk_norm = Some(QkNorm::Heads);
    let pattern = fields.size_or("sliding_window_pattern", 6)?;
    spec.windows = gemma_windows(fields, spec.num_layers, pattern)?;
    // transformers reads it and applies none.
    const CAP: &str = "attn_logit_softcapping";
    fields.unless(CAP, Value::is_null, "scores of a Gemma 3 have no cap")?;
    later_gemma(fields, &mut spec, [None, None])?;
    Ok(spec)
}

/// What the second and the third Gemma have in common; caps of scores and logits where the config is
/// silent.
fn later_gemma(
    fields: &Fields,
    spec: &mut ModelSpec,
    [scores, logits]: [Option<f32>; 2],
) -> Result<()> {
    (spec.post_norms, spec.names) = (true, &Names::GEMMA2);
    let scalar = fields.positive_or("query_pre_attn_scalar", Some(256.0))?;
    let scalar = scalar
        .ok_or_else(|| wrong_type("query_pre_attn_scalar", "a number above 0", &Value::Null))?;
    spec.attention_scale = (1.0 / f64::from(scalar).sqrt()) as f32;
    spec.attention_soft_cap = fields.positive_or("attn_logit_softcapping", scores)?;
    spec.logit_soft_cap = fields.positive_or("final_logit_softcapping", logits)?;
    Ok(())
}

/// Windows in all layers but every `pattern`th, unless `layer_types` has them elsewhere.
fn gemma_windows(fields: &Fields, num_layers: usize, pattern: usize) -> Result<Vec<Option<usize>>> {
    let window = match fields.0.get("sliding_window") {
        None => 4096,
        Some(_) => fields.size("sliding_window")?,
    };
    fields.windows(num_layers, window, |layer| !(layer + 1).is_multiple_of(pattern.max(1)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::families::spec_from_config;
    use crate::model::spec::RopeScaling;

    #[test]
    fn a_gemma_is_what_its_classes_make_of_silence() {
        let config = |family: &str, extra: Value| {
            let mut config = json!({
                "model_type": family, "hidden_size": 64, "intermediate_size": 96,
                "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 1,
            });
            config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            spec_from_config(&config)
        };
        let first = config("gemma", json!({"hidden_activation": null})).unwrap();
        let scale = |dtype: &str| {
            let extra = json!({"hidden_size": 2560, "torch_dtype": dtype});
            config("gemma3_text", extra).unwrap().embedding_scale
        };
        let scales = ["float32", "float16", "bfloat16"].map(scale);
        assert_eq!(scales, [2560f32.sqrt(), 50.59375, 50.5]);
        assert_eq!((first.activation, first.head_dim), (Activation::GeluTanh, 256));
        assert_eq!((first.embedding_scale, first.vocab_size), (8.0, 256_000));
        assert!(first.tie_word_embeddings && first.norm_plus_one && !first.post_norms);
        assert_eq!(first.windows, [None; 7]);

        let second = config("gemma2", json!({"query_pre_attn_scalar": 144})).unwrap();
        assert_eq!(second.attention_scale, 1.0 / 12.0);
        assert_eq!((second.attention_soft_cap, second.logit_soft_cap), (Some(50.0), Some(30.0)));
        assert_eq!(second.windows[..3], [Some(4096), None, Some(4096)]);
        let uncapped = config("gemma2", json!({"attn_logit_softcapping": null})).unwrap();
        assert_eq!(uncapped.attention_soft_cap, None);

        let third = config("gemma3_text", json!({"sliding_window": 512})).unwrap();
        assert_eq!((third.windows[4], third.windows[5]), (Some(512), None));
        assert_eq!((third.rotary_of(4), third.rotary_of(5)), (Some(1), Some(0)));
        let nested = |local: Value| {
            let both = json!({
                "full_attention": {"rope_type": "linear", "factor": 8, "rope_theta": 5e5},
                "sliding_attention": local,
            });
            config("gemma3_text", json!({"rope_parameters": both})).unwrap().local_rotary.unwrap()
        };
        for local in [json!({"rope_type": "default"}), json!(null)] {
            let local = nested(local);
            assert_eq!((local.theta, local.scaling), (1e4, RopeScaling::Default));
        }
        let thetas: Vec<f64> = third.rotaries().map(|rotary| rotary.theta).collect();
        assert_eq!((thetas, third.logit_soft_cap), (vec![1e6, 1e4], None));

        // transformers 5 has what a user added beside what it wrote.
        let both = json!({
            "full_attention": {"rope_type": "default", "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "dynamic", "factor": 2.0},
        });
        let scaling = json!({"rope_type": "linear", "factor": 8.0});
        let more = json!({"rope_parameters": both, "rope_scaling": scaling, "max_position_embeddings": 64});
        let stretched = config("gemma3_text", more).unwrap();
        let global = stretched.rotary.unwrap();
        assert_eq!((global.theta, global.scaling), (5e5, RopeScaling::Linear { factor: 8.0 }));
        let dynamic = RopeScaling::Dynamic { factor: 2.0, original_max_position_embeddings: 64 };
        assert_eq!(stretched.local_rotary.unwrap().scaling, dynamic);

        for (family, extra, says) in [
            ("gemma3_text", json!({"attn_logit_softcapping": 50.0}), "scores of a Gemma 3"),
            ("gemma", json!({"hidden_act": "gelu"}), "hidden_act"),
            ("gemma3_text", json!({"rope_parameters": {"rope_theta": 5e5}}), "rope_parameters"),
            ("gemma2", json!({"attn_logit_softcapping": 1e39}), "attn_logit_softcapping"),
            ("gemma2", json!({"query_pre_attn_scalar": null}), "query_pre_attn_scalar"),
            ("gemma2", json!({"sliding_window": 0}), "sliding_window"),
            ("gemma2", json!({"sliding_window": null}), "sliding_window"),
            ("gemma2", json!({"layer_types": ["full_attention"]}), "a list of 7 names"),
            ("gemma2", json!({"layer_types": vec!["chunked_attention"; 7]}), "chunked_attention"),
            ("gemma2", json!({"final_logit_softcapping": 0}), "final_logit_softcapping"),
            ("gemma3_text", json!({"use_bidirectional_attention": true}), "bidirectional"),
            ("gemma3", json!({}), "gemma3_text"),
        ] {
            let error = config(family, extra).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
