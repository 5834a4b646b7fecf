//! SmolLM3: a Llama, of which some layers know no positions but by what they may see. Source:
//! transformers `models/smollm3/configuration_smollm3.py`.

use serde_json::Value;

use super::fields::{Fields, unsupported, wrong_type};
use super::llama;
use crate::error::Result;
use crate::model::spec::{Family, ModelSpec};

/// `no_rope_layer_interval` where a file says nothing.
pub(crate) const ROTATION_INTERVAL: usize = 4;

/// Which layers turn where every `interval`-th does not.
pub(crate) fn rotates_every(interval: usize, num_layers: usize) -> Vec<bool> {
    (1..=num_layers).map(|layer| !layer.is_multiple_of(interval)).collect()
}

pub(super) fn smollm3(fields: &Fields) -> Result<ModelSpec> {
    let config = fields.with_defaults([
        ("rope_theta", Value::from(2e6)),
        ("tie_word_embeddings", true.into()),
        ("max_position_embeddings", 32_768.into()),
    ]);
    let fields = &Fields(&config);
    let mut spec = llama(fields, Family::SmolLm3)?;
    spec.num_kv_heads = fields.if_absent("num_key_value_heads", 4).unwrap_or(spec.num_kv_heads);
    spec.rotates = rotates(fields, spec.num_layers)?;
    if fields.flag_or("use_sliding_window", false)? && fields.present("sliding_window").is_some() {
        let window = fields.size("sliding_window")?;
        spec.windows = fields.windows(spec.num_layers, window, |layer| !spec.rotates[layer])?;
    }
    Ok(spec)
}

/// `no_rope_layers`: 1 where a layer turns q and k, in spite of its name.
fn rotates(fields: &Fields, num_layers: usize) -> Result<Vec<bool>> {
    const KEY: &str = "no_rope_layers";
    const INTERVAL: &str = "no_rope_layer_interval";
    let Some(value) = fields.present(KEY) else {
        let interval = fields.size_or(INTERVAL, ROTATION_INTERVAL)?;
        if interval == 0 {
            return Err(unsupported(
                INTERVAL,
                interval,
                "every so many-th layer turns nothing: 1 or more",
            ));
        }
        return Ok(rotates_every(interval, num_layers));
    };
    let listed = value.as_array().filter(|list| list.len() >= num_layers);
    let turns = listed.map(|list| list[..num_layers].iter().map(|turns| turns.as_u64()));
    let turns: Option<Vec<u64>> = turns.and_then(Iterator::collect);
    let turns = turns.filter(|turns| turns.iter().all(|turns| *turns <= 1));
    let turns = turns
        .ok_or_else(|| wrong_type(KEY, &format!("a list of {num_layers} zeros and ones"), value))?;
    Ok(turns.into_iter().map(|turns| turns == 1).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::families::spec_from_config;

    fn read(extra: Value) -> Result<ModelSpec> {
        let mut config = json!({
            "model_type": "smollm3", "hidden_size": 64, "intermediate_size": 64, "vocab_size": 99,
            "num_hidden_layers": 5, "num_attention_heads": 8,
        });
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        spec_from_config(&config)
    }

    #[test]
    fn every_fourth_layer_turns_nothing_unless_it_is_listed() {
        let spec = read(json!({})).unwrap();
        assert_eq!(spec.rotates, [true, true, true, false, true]);
        assert_eq!(spec.rotary.as_ref().unwrap().theta, 2e6);
        assert_eq!((spec.num_kv_heads, spec.tie_word_embeddings), (4, true));
        assert_eq!(spec.max_positions, 32_768);
        assert_eq!([2, 3].map(|layer| spec.rotary_of(layer)), [Some(0), None]);
        let spec = read(json!({"no_rope_layer_interval": 2, "num_key_value_heads": null})).unwrap();
        assert_eq!(spec.rotates, [true, false, true, false, true]);
        assert_eq!(spec.num_kv_heads, 8);
        let listed =
            json!({"no_rope_layers": [0, 1, 1, 0, 1, 1], "rope_parameters": {"rope_theta": 5.0}});
        let spec = read(listed).unwrap();
        assert_eq!(spec.rotates, [false, true, true, false, true]);
        assert_eq!(spec.rotary.unwrap().theta, 5.0);
    }

    #[test]
    fn windows_are_where_nothing_turns() {
        let spec = read(json!({"use_sliding_window": true, "sliding_window": 7})).unwrap();
        assert_eq!(spec.windows, [None, None, None, Some(7), None]);
        let spec = read(json!({"sliding_window": 7})).unwrap();
        assert_eq!(spec.windows, [None; 5]);
    }

    /// The config as the hub has it for SmolLM3-3B, but for the sizes.
    #[test]
    fn the_published_config_is_read() {
        let spec = read(json!({
            "attention_bias": false, "hidden_act": "silu", "max_window_layers": 28,
            "max_position_embeddings": 65536, "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0, 1], "num_key_value_heads": 4, "pretraining_tp": 2,
            "rope_scaling": null, "rope_theta": 5e6, "sliding_window": null,
            "use_sliding_window": false,
        }));
        let spec = spec.unwrap();
        assert_eq!((spec.rotates[3], spec.max_positions), (false, 65_536));
        assert_eq!(spec.rotary.unwrap().theta, 5e6);
    }

    #[test]
    fn a_wrong_list_is_refused() {
        let error = read(json!({"no_rope_layer_interval": 0})).unwrap_err().to_string();
        assert!(error.contains("no_rope_layer_interval = 0 is not supported"), "{error}");
        for wrong in
            [json!([1, 1]), json!([1, 1, 1, 2, 1]), json!("all"), json!([1, 1, true, 0, 1])]
        {
            let error = read(json!({"no_rope_layers": wrong})).unwrap_err().to_string();
            assert!(
                error.contains("`no_rope_layers` must be a list of 5 zeros and ones"),
                "{error}"
            );
        }
    }
}
