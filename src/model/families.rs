//! `config.json` → [`ModelSpec`], one function per family.
//!
//! Reads both spellings: transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).
//! Missing keys take the defaults of transformers' config classes; an unknown family or a switch
//! that Nibble does not implement is an error that names the field.

use serde_json::{Value, json};

use super::rotary::rotary_from_config;
use super::spec::{Activation, Family, ModelSpec, Norm};
use crate::error::{Error, Result};

/// The spec of the model that `config` (a parsed `config.json`) describes.
///
/// # Errors
/// `Input` naming the field when the family is unknown, a dimension is missing or inconsistent, or
/// a switch has no implementation.
pub fn spec_from_config(config: &Value) -> Result<ModelSpec> {
    const GENERAL: &str = "config.json is damaged or belongs to another kind of model";
    read_spec(&Fields(config)).map_err(|error| error.or_hint(GENERAL))
}

/// Dropout of the base model that transformers applies in training and Nibble does not: the key of
/// `config` and its probability.
pub fn base_dropout(config: &Value) -> Option<(&'static str, f64)> {
    const KEYS: [&str; 4] = ["attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"];
    let of_gpt2 = config["model_type"] == "gpt2";
    let probability = |key: &'static str| {
        let default = if of_gpt2 && key != KEYS[0] { 0.1 } else { 0.0 };
        (key, config[key].as_f64().unwrap_or(default))
    };
    KEYS.map(probability).into_iter().find(|(_, probability)| *probability > 0.0)
}

/// More blocks than any model has.
pub(crate) const MOST_LAYERS: usize = 10_000;

const SUPPORTED: &str =
    "supported families: llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, gpt2";

fn read_spec(fields: &Fields) -> Result<ModelSpec> {
    let spec = match fields.text("model_type")? {
        "llama" => llama(fields, Family::Llama)?,
        "mistral" => mistral(fields)?,
        "qwen2" => qwen2(fields)?,
        "qwen3" => qwen3(fields)?,
        "gemma" => gemma(fields, Family::Gemma)?,
        "gemma2" => gemma2(fields)?,
        "gemma3_text" => gemma3(fields)?,
        "gpt2" => gpt2(fields)?,
        other => {
            return Err(Error::input(format_args!(
                "config.json: model_type `{other}` is not supported"
            ))
            .hint(SUPPORTED));
        }
    };
    validate(&spec)?;
    Ok(spec)
}

fn llama(fields: &Fields, family: Family) -> Result<ModelSpec> {
    fields.unless("hidden_act", |v| v == "silu", "only `silu` is implemented")?;
    fields.unless("pretraining_tp", |v| v == 1, "only 1 is implemented")?;
    decoder(fields, family)
}

/// What all but GPT-2 have in common, with Llama's switches.
fn decoder(fields: &Fields, family: Family) -> Result<ModelSpec> {
    let hidden_size = fields.size("hidden_size")?;
    let num_heads = fields.size("num_attention_heads")?;
    let num_layers = fields.layers("num_hidden_layers")?;
    let head_dim = fields.size_or("head_dim", hidden_size / num_heads.max(1))?;
    let attention_bias = fields.flag_or("attention_bias", false)?;
    Ok(ModelSpec {
        family,
        vocab_size: fields.size("vocab_size")?,
        hidden_size,
        intermediate_size: fields.size("intermediate_size")?,
        num_layers,
        num_heads,
        num_kv_heads: fields.size_or("num_key_value_heads", num_heads)?,
        head_dim,
        norm: Norm::Rms,
        norm_eps: fields.number_or("rms_norm_eps", 1e-6)?,
        norm_plus_one: false,
        post_norms: false,
        embedding_scale: 1.0,
        activation: Activation::Silu,
        gated_mlp: true,
        rotary: Some(rotary_from_config(fields.0)?),
        local_rotary: None,
        learned_positions: None,
        qkv_bias: attention_bias,
        qk_norm: false,
        attention_scale: 1.0 / (head_dim as f32).sqrt(),
        attention_soft_cap: None,
        logit_soft_cap: None,
        output_bias: attention_bias,
        mlp_bias: fields.flag_or("mlp_bias", false)?,
        fused_qkv: false,
        conv1d: false,
        windows: vec![None; num_layers],
        tie_word_embeddings: fields.flag_or("tie_word_embeddings", false)?,
        max_positions: fields.size_or("max_position_embeddings", 2048)?,
        bos_token_id: fields.token_ids("bos_token_id")?.first().copied(),
        eos_token_ids: fields.token_ids("eos_token_id")?,
    })
}

fn mistral(fields: &Fields) -> Result<ModelSpec> {
    let mut spec = llama(fields, Family::Mistral)?;
    if fields.0.get("num_key_value_heads").is_none() {
        spec.num_kv_heads = 8;
    }
    // The class default is 4096; an explicit null (v0.2 and later) switches the window off.
    let window = match fields.0.get("sliding_window") {
        None => Some(4096),
        Some(Value::Null) => None,
        Some(_) => Some(fields.size("sliding_window")?),
    };
    spec.windows = vec![window; spec.num_layers];
    (spec.qkv_bias, spec.output_bias, spec.mlp_bias) = (false, false, false);
    Ok(spec)
}

fn qwen2(fields: &Fields) -> Result<ModelSpec> {
    let mut spec = llama(fields, Family::Qwen2)?;
    if fields.0.get("num_key_value_heads").is_none() {
        spec.num_kv_heads = 32;
    }
    (spec.qkv_bias, spec.output_bias, spec.mlp_bias) = (true, false, false);
    spec.windows = qwen_windows(fields, spec.num_layers)?;
    Ok(spec)
}

fn qwen3(fields: &Fields) -> Result<ModelSpec> {
    let mut spec = llama(fields, Family::Qwen3)?;
    if fields.0.get("num_key_value_heads").is_none() {
        spec.num_kv_heads = 32;
    }
    spec.head_dim = fields.size_or("head_dim", 128)?;
    (spec.qk_norm, spec.mlp_bias) = (true, false);
    spec.windows = qwen_windows(fields, spec.num_layers)?;
    Ok(spec)
}

/// Windows in the layers from `max_window_layers` on, unless `layer_types` has them elsewhere.
fn qwen_windows(fields: &Fields, num_layers: usize) -> Result<Vec<Option<usize>>> {
    if !fields.flag_or("use_sliding_window", false)? {
        return Ok(vec![None; num_layers]);
    }
    let window = fields.size_or("sliding_window", 4096)?;
    let first = fields.size_or("max_window_layers", 28)?;
    let listed = fields.layers_that_slide(num_layers)?;
    let slides = |layer: usize| listed.as_ref().map_or(layer >= first, |listed| listed[layer]);
    Ok((0..num_layers).map(|layer| slides(layer).then_some(window)).collect())
}

/// Sources: transformers `models/gemma{,2,3}/modeling_gemma*.py`, `configuration_gemma*.py`.
fn gemma(fields: &Fields, family: Family) -> Result<ModelSpec> {
    let defaults: &[_] = match family {
        Family::Gemma => &[("vocab_size", 256_000), ("max_position_embeddings", 8192)],
        Family::Gemma2 => &[
            ("vocab_size", 256_000),
            ("num_attention_heads", 8),
            ("num_key_value_heads", 4),
            ("max_position_embeddings", 8192),
        ],
        _ => &[
            ("vocab_size", 262_208),
            ("num_attention_heads", 8),
            ("num_key_value_heads", 4),
            ("max_position_embeddings", 131_072),
        ],
    };
    let mut config = fields.0.clone();
    for (key, value) in [("head_dim", 256)].iter().chain(defaults) {
        if fields.present(key).is_none() {
            config[key] = (*value).into();
        }
    }
    let fields = &Fields(&config);
    for key in ["hidden_activation", "hidden_act"] {
        let tanh = |v: &Value| v == "gelu_pytorch_tanh";
        fields.unless(key, tanh, "only `gelu_pytorch_tanh` is implemented")?;
    }
    fields.unless("use_bidirectional_attention", |v| v == false, "only `false` is implemented")?;
    let mut spec = decoder(fields, family)?;
    spec.activation = Activation::GeluTanh;
    spec.norm_plus_one = true;
    spec.embedding_scale = (spec.hidden_size as f32).sqrt();
    spec.tie_word_embeddings = fields.flag_or("tie_word_embeddings", true)?;
    Ok(spec)
}

fn gemma2(fields: &Fields) -> Result<ModelSpec> {
    let mut spec = gemma(fields, Family::Gemma2)?;
    spec.windows = gemma_windows(fields, spec.num_layers, 2)?;
    later_gemma(fields, &mut spec, [Some(50.0), Some(30.0)])?;
    Ok(spec)
}

fn gemma3(fields: &Fields) -> Result<ModelSpec> {
    const THETA: f64 = 1e6;
    const LOCAL_THETA: f64 = 1e4;
    let mut config = fields.0.clone();
    // transformers 5 has one rotary embedding for each kind of layer, transformers 4 keys for both.
    let of_kind = |kind| {
        let all = fields.present("rope_parameters")?;
        all.get(kind).filter(|parameters| parameters.is_object()).cloned()
    };
    if let Some(global) = of_kind("full_attention") {
        config["rope_parameters"] = global;
    }
    if fields.present("rope_theta").is_none() {
        config["rope_theta"] = THETA.into();
    }
    let theta = fields.number_or("rope_local_base_freq", LOCAL_THETA)?;
    let local = of_kind("sliding_attention").unwrap_or(json!({}));
    let local = json!({"rope_theta": theta, "rope_parameters": local});
    let mut spec = gemma(&Fields(&config), Family::Gemma3)?;
    spec.local_rotary = Some(rotary_from_config(&local)?);
    spec.qk_norm = true;
    let pattern = fields.size_or("sliding_window_pattern", 6)?;
    spec.windows = gemma_windows(fields, spec.num_layers, pattern)?;
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
    spec.post_norms = true;
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
    let listed = fields.layers_that_slide(num_layers)?;
    let slides = |layer: usize| match &listed {
        Some(listed) => listed[layer],
        None => !(layer + 1).is_multiple_of(pattern.max(1)),
    };
    Ok((0..num_layers).map(|layer| slides(layer).then_some(window)).collect())
}

fn gpt2(fields: &Fields) -> Result<ModelSpec> {
    let hidden_size = fields.size("n_embd")?;
    let num_heads = fields.size("n_head")?;
    let num_layers = fields.layers("n_layer")?;
    fields.unless("scale_attn_weights", |v| v == true, "only `true` is implemented")?;
    fields.unless(
        "scale_attn_by_inverse_layer_idx",
        |v| v == false,
        "only `false` is implemented",
    )?;
    fields.unless("add_cross_attention", |v| v == false, "only `false` is implemented")?;
    let activation = match fields.text_or("activation_function", "gelu_new")? {
        "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
        "gelu" => Activation::Gelu,
        other => return Err(unsupported("activation_function", other, "use `gelu_new` or `gelu`")),
    };
    let positions = fields.size_or("n_positions", 1024)?;
    Ok(ModelSpec {
        family: Family::Gpt2,
        vocab_size: fields.size("vocab_size")?,
        hidden_size,
        intermediate_size: fields.size_or("n_inner", 4 * hidden_size)?,
        num_layers,
        num_heads,
        num_kv_heads: num_heads,
        head_dim: hidden_size / num_heads.max(1),
        norm: Norm::Layer,
        norm_eps: fields.number_or("layer_norm_epsilon", 1e-5)?,
        norm_plus_one: false,
        post_norms: false,
        embedding_scale: 1.0,
        activation,
        gated_mlp: false,
        rotary: None,
        local_rotary: None,
        learned_positions: Some(positions),
        qkv_bias: true,
        qk_norm: false,
        attention_scale: 1.0 / ((hidden_size / num_heads.max(1)) as f32).sqrt(),
        attention_soft_cap: None,
        logit_soft_cap: None,
        output_bias: true,
        mlp_bias: true,
        fused_qkv: true,
        conv1d: true,
        windows: vec![None; num_layers],
        tie_word_embeddings: fields.flag_or("tie_word_embeddings", true)?,
        max_positions: positions,
        bos_token_id: fields.token_ids("bos_token_id")?.first().copied(),
        eos_token_ids: fields.token_ids("eos_token_id")?,
    })
}

/// Dimensions that do not fit each other are found here, before any weight is read.
fn validate(spec: &ModelSpec) -> Result<()> {
    let sizes = [
        ("vocab_size", spec.vocab_size),
        ("hidden_size (n_embd)", spec.hidden_size),
        ("intermediate_size (n_inner)", spec.intermediate_size),
        ("num_hidden_layers (n_layer)", spec.num_layers),
        ("num_attention_heads (n_head)", spec.num_heads),
        ("num_key_value_heads", spec.num_kv_heads),
        ("head_dim", spec.head_dim),
    ];
    // Larger values are lies: no model comes near, and products of them must not overflow.
    const LIMIT: usize = 1 << 24;
    if let Some((name, value)) = sizes.iter().find(|(_, v)| *v == 0 || *v > LIMIT) {
        return Err(Error::input(format_args!("config.json: {name} is {value}")));
    }
    if spec.windows.contains(&Some(0)) {
        let what = "config.json: sliding_window is 0: no token would see itself";
        return Err(Error::input(what).hint("null, where the family has it, is no window"));
    }
    if !spec.num_heads.is_multiple_of(spec.num_kv_heads) {
        return Err(Error::input(format_args!(
            "config.json: num_attention_heads {} is not a multiple of num_key_value_heads {}",
            spec.num_heads, spec.num_kv_heads
        )));
    }
    if spec.rotary.is_some() && !spec.head_dim.is_multiple_of(2) {
        let what = format_args!("config.json: head_dim {} is odd", spec.head_dim);
        return Err(Error::input(what).hint("rotary embedding needs an even head_dim"));
    }
    if spec.fused_qkv && spec.q_width() != spec.hidden_size {
        return Err(Error::input(format_args!(
            "config.json: n_embd {} is not a multiple of n_head {}",
            spec.hidden_size, spec.num_heads
        )));
    }
    Ok(())
}

fn unsupported(field: &str, value: impl std::fmt::Display, hint: &str) -> Error {
    Error::input(format_args!("config.json: {field} = {value} is not supported")).hint(hint)
}

/// Typed access to a JSON object; null counts as absent.
struct Fields<'a>(&'a Value);

impl<'a> Fields<'a> {
    fn present(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn required(&self, key: &str) -> Result<&'a Value> {
        self.present(key)
            .ok_or_else(|| Error::input(format_args!("config.json: field `{key}` is missing")))
    }

    fn text(&self, key: &str) -> Result<&'a str> {
        let value = self.required(key)?;
        value.as_str().ok_or_else(|| wrong_type(key, "text", value))
    }

    fn text_or(&self, key: &str, default: &'static str) -> Result<&'a str> {
        if self.present(key).is_some() { self.text(key) } else { Ok(default) }
    }

    fn size(&self, key: &str) -> Result<usize> {
        let value = self.required(key)?;
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        size.ok_or_else(|| wrong_type(key, "a non-negative whole number", value))
    }

    /// A number of blocks: more than any model has would only take memory.
    fn layers(&self, key: &str) -> Result<usize> {
        let layers = self.size(key)?;
        if layers > MOST_LAYERS {
            let what =
                format_args!("config.json: {key} is {layers}, expected at most {MOST_LAYERS}");
            return Err(Error::input(what));
        }
        Ok(layers)
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.present(key).is_some() { self.size(key) } else { Ok(default) }
    }

    fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        match self.present(key) {
            Some(value) => value.as_f64().ok_or_else(|| wrong_type(key, "a number", value)),
            None => Ok(default),
        }
    }

    /// A number above 0. Only an absent key takes the default: null stands for none.
    fn positive_or(&self, key: &str, default: Option<f32>) -> Result<Option<f32>> {
        let Some(value) = self.0.get(key) else { return Ok(default) };
        if value.is_null() {
            return Ok(None);
        }
        let number = value.as_f64().map(|number| number as f32);
        let number = number.filter(|number| number.is_normal() && *number > 0.0);
        number.map(Some).ok_or_else(|| wrong_type(key, "a number above 0", value))
    }

    fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.present(key) {
            Some(value) => value.as_bool().ok_or_else(|| wrong_type(key, "true or false", value)),
            None => Ok(default),
        }
    }

    /// `id` or `[id, …]`.
    fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let Some(value) = self.present(key) else { return Ok(Vec::new()) };
        let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match value {
            Value::Array(items) => items.iter().map(one).collect::<Option<Vec<_>>>(),
            single => one(single).map(|id| vec![id]),
        };
        ids.ok_or_else(|| wrong_type(key, "a token id or a list of them", value))
    }

    /// Which layers have a window, where `layer_types` says so.
    fn layers_that_slide(&self, num_layers: usize) -> Result<Option<Vec<bool>>> {
        const KEY: &str = "layer_types";
        let Some(value) = self.present(KEY) else { return Ok(None) };
        let kinds = value.as_array().map_or(&[][..], Vec::as_slice);
        if kinds.len() != num_layers {
            return Err(wrong_type(KEY, &format!("a list of {num_layers} names"), value));
        }
        let slides = |kind: &Value| match kind.as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => Err(unsupported(KEY, kind, "use `full_attention` or `sliding_attention`")),
        };
        kinds.iter().map(slides).collect::<Result<_>>().map(Some)
    }

    /// An error when `key` is present and `supported` refuses its value.
    fn unless(&self, key: &str, supported: impl Fn(&Value) -> bool, hint: &str) -> Result<()> {
        match self.present(key) {
            Some(value) if !supported(value) => Err(unsupported(key, value, hint)),
            _ => Ok(()),
        }
    }
}

fn wrong_type(key: &str, expected: &str, got: &Value) -> Error {
    Error::input(format_args!("config.json: field `{key}` must be {expected}, got {got}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::spec::RopeScaling;

    #[test]
    fn dropout_of_the_base_is_known_by_every_name() {
        let llama = |extra: Value| {
            let mut config = json!({"model_type": "llama"});
            config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            base_dropout(&config)
        };
        assert_eq!(llama(json!({})), None);
        assert_eq!(llama(json!({"attention_dropout": 0.0})), None);
        assert_eq!(llama(json!({"attention_dropout": 0.2})), Some(("attention_dropout", 0.2)));
        // GPT-2's class has it by default.
        let gpt2 = json!({"model_type": "gpt2", "attn_pdrop": 0.0});
        assert_eq!(base_dropout(&gpt2), Some(("resid_pdrop", 0.1)));
    }

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

        for (family, extra, says) in [
            ("gemma", json!({"hidden_act": "gelu"}), "hidden_act"),
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
