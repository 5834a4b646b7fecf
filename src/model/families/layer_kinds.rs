//! Rotary embeddings of layers with and without a window, where a config has one for each kind.

use serde_json::{Value, json};

use super::fields::{Fields, unsupported};
use super::rope::rotary_from_config;
use super::whole_heads;
use crate::error::Result;
use crate::model::spec::Rotary;

const KINDS: [&str; 2] = ["full_attention", "sliding_attention"];

/// The config with the rotary embedding of layers without a window for that of all, and that of layers
/// with one; `theta` and `local_theta` are their bases where it is silent.
///
/// transformers 5 has `rope_parameters` for each kind of layer; those of transformers 4 are for layers
/// without a window.
pub(super) fn rotary_by_kind(
    fields: &Fields,
    [theta, local_theta]: [f64; 2],
) -> Result<(Value, Rotary)> {
    check_kinds(fields)?;
    let mut config = fields.with_defaults([("rope_theta", theta)]);
    let of_kind = |kind| {
        let all = fields.present("rope_parameters")?;
        all.get(kind).filter(|parameters| parameters.is_object()).cloned()
    };
    let [global, local] = KINDS.map(of_kind);
    if let Some(mut global) = global {
        // What was added to the file of a newer transformers goes before what that wrote.
        let added = fields.present("rope_scaling").and_then(Value::as_object);
        if let Some((global, added)) = global.as_object_mut().zip(added) {
            global.extend(added.clone());
        }
        config["rope_parameters"] = global;
        config["rope_scaling"] = Value::Null;
    }
    let longest = config.get("max_position_embeddings").cloned().unwrap_or(131_072.into());
    let local = json!({
        "rope_theta": local_theta, "rope_parameters": local.unwrap_or(json!({})),
        "max_position_embeddings": longest,
    });
    whole_heads(&local)?;
    Ok((config, rotary_from_config(&local)?))
}

/// transformers passes over `rope_parameters` that are not those of a kind of layer.
fn check_kinds(fields: &Fields) -> Result<()> {
    let Some(Value::Object(all)) = fields.present("rope_parameters") else { return Ok(()) };
    match all.keys().find(|key| !KINDS.contains(&key.as_str())) {
        Some(key) => Err(unsupported(
            "rope_parameters",
            format_args!("{{\"{key}\": …}}"),
            "this family has those of `full_attention` and of `sliding_attention`",
        )),
        None => Ok(()),
    }
}
