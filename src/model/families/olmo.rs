//! OLMo 2 and 3: blocks without norms before attention and MLP, a norm of all of q and of all of k.
//! Sources: transformers `models/olmo{2,3}/modeling_olmo*.py`, `configuration_olmo*.py`.

use serde_json::Value;

use super::fields::Fields;
use super::layer_kinds::rotary_by_kind;
use super::llama;
use crate::error::Result;
use crate::model::names::Names;
use crate::model::spec::{Family, ModelSpec, QkNorm};

pub(super) fn olmo2(fields: &Fields) -> Result<ModelSpec> {
    any_olmo(fields, Family::Olmo2)
}

/// With windows in all layers but every fourth, which do without a rope scaling.
pub(super) fn olmo3(fields: &Fields) -> Result<ModelSpec> {
    const THETA: f64 = 500_000.0;
    let (config, local) = rotary_by_kind(fields, [THETA; 2])?;
    let mut spec = any_olmo(&Fields(&config), Family::Olmo3)?;
    if let Some(window) = fields.window_or(Some(4096))? {
        let slides = |layer: usize| !(layer + 1).is_multiple_of(4);
        spec.windows = fields.windows(spec.num_layers, window, slides)?;
    }
    spec.local_rotary = Some(local).filter(|local| spec.rotary.as_ref() != Some(local));
    Ok(spec)
}

fn any_olmo(fields: &Fields, family: Family) -> Result<ModelSpec> {
    let config =
        fields.with_defaults([("vocab_size", Value::from(50_304)), ("rms_norm_eps", 1e-5.into())]);
    let mut spec = llama(&Fields(&config), family)?;
    (spec.pre_norms, spec.post_norms, spec.names) = (false, true, &Names::GEMMA2);
    (spec.qk_norm, spec.mlp_bias) = (Some(QkNorm::Whole), false);
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::families::spec_from_config;
    use crate::model::spec::RopeScaling;

    fn config(family: &str, extra: Value) -> Result<ModelSpec> {
        let mut config = json!({
            "model_type": family, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
        });
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        spec_from_config(&config)
    }

    #[test]
    fn an_olmo_is_what_its_classes_make_of_silence() {
        let second = config("olmo2", json!({})).unwrap();
        assert_eq!((second.vocab_size, second.norm_eps), (50_304, 1e-5));
        assert_eq!((second.rotary.as_ref().unwrap().theta, second.windows.len()), (1e4, 5));
        assert_eq!(second.layer_norm_modules(0), None);
        assert_eq!(second.head_norm_widths(), Some([64, 32]));
        let third = config("olmo3", json!({})).unwrap();
        let window = Some(4096);
        assert_eq!(third.windows, [window, window, window, None, window]);
        assert_eq!((third.rotary.unwrap().theta, third.local_rotary), (5e5, None));
    }

    /// As the files of Olmo 3 have it, and as transformers 5 writes it.
    #[test]
    fn layers_with_a_window_do_not_scale() {
        let yarn = json!({
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192,
            "attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1,
        });
        let mut global = yarn.clone();
        global["rope_theta"] = 5e5.into();
        let local = json!({"rope_type": "default", "rope_theta": 5e5});
        for extra in [
            json!({"rope_theta": 500_000, "rope_scaling": yarn}),
            json!({"rope_parameters": {"full_attention": global, "sliding_attention": local}}),
        ] {
            let spec = config("olmo3", extra).unwrap();
            assert!(matches!(spec.rotary.as_ref().unwrap().scaling, RopeScaling::Yarn { .. }));
            let local = spec.local_rotary.as_ref().unwrap();
            assert_eq!((local.theta, &local.scaling), (5e5, &RopeScaling::Default));
            assert_eq!((spec.rotary_of(2), spec.rotary_of(3)), (Some(1), Some(0)));
        }
        let flat = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}});
        let error = config("olmo3", flat).unwrap_err().to_string();
        assert!(error.contains("rope_parameters"), "{error}");
    }
}
