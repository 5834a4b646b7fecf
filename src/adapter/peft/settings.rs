//! `adapter_config.json`: PEFT's settings in and out.
//!
//! Reading tolerates unknown keys, as PEFT does, and refuses those that change what the adapter
//! computes in a way that Nibble does not implement; of unknown ones, switches (`use_…`) that are
//! on. Writing keeps to the keys that every PEFT release knows, because older ones refuse new keys.

use std::io::ErrorKind;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::super::config::{InitLoraWeights, LoraConfig, ModuleNames, TargetModules};
use crate::checkpoint::not_here;
use crate::error::{Error, Result};

/// File name of the settings in an adapter's folder.
pub const CONFIG_FILE: &str = "adapter_config.json";

/// PEFT's `bias`: which of the base model's biases were trained along.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrainedBias {
    /// No bias.
    #[default]
    None,
    /// The biases of the adapted modules.
    LoraOnly,
    /// Every bias of the model.
    All,
}

/// PEFT's `trainable_token_indices`: rows of an embedding that were trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenIndices {
    /// Path or trailing part of the module's path; `None` is the token embedding.
    pub module: Option<String>,
    /// The rows, in the order of the stored values.
    pub rows: Vec<usize>,
}

/// What `adapter_config.json` says.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PeftSettings {
    /// The LoRA settings.
    pub lora: LoraConfig,
    /// The model that the adapter was trained on.
    pub base_model: Option<String>,
    /// DoRA: each output has a trained magnitude (arXiv 2402.09353).
    pub use_dora: bool,
    /// B has a bias.
    pub lora_bias: bool,
    /// Base biases that were trained along.
    pub bias: TrainedBias,
    /// Modules whose weights were trained in full.
    pub modules_to_save: Vec<String>,
    /// Embedding rows that were trained.
    pub token_indices: Vec<TokenIndices>,
    /// Whether a tied head follows what is done to the embedding.
    pub ensure_weight_tying: bool,
}

/// Settings that change the computed function in ways that Nibble does not implement.
const UNSUPPORTED: [&str; 8] = [
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
];

/// Switches that are read.
const SWITCHES: [&str; 2] = ["use_dora", "use_rslora"];

/// Initialisations that subtract from the base model, which the adapter alone cannot tell.
const BASE_CHANGING: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// Whether an initialisation of this kind changes the base; `kind` has the spellings that PEFT takes, in
/// whatever case.
fn changes_base(kind: &str) -> bool {
    let kind = kind.to_lowercase();
    BASE_CHANGING.iter().any(|name| kind.starts_with(name))
}

/// Why `adapter_config.json` cannot be read: what `dir` is instead.
fn not_an_adapter(dir: &Path, path: &Path, error: std::io::Error) -> Error {
    let shown = dir.display();
    let what = match error.kind() {
        _ if dir.is_file() => format!("{shown} is a file, not an adapter's folder"),
        ErrorKind::NotFound if !dir.exists() => format!("{shown} does not exist"),
        ErrorKind::NotFound if dir.join("config.json").exists() => {
            format!("{shown} is a model, not an adapter")
        }
        ErrorKind::NotFound => format!("{shown} has no {CONFIG_FILE}"),
        _ => return Error::io("read", path, error),
    };
    let error = Error::input(what);
    if dir.join("settings.toml").exists() {
        let hint = "the run in it has not ended: continue it with `nibble train --resume`, or give \
                    one of its checkpoint-N folders";
        return error.hint(hint);
    }
    let elsewhere = (!dir.exists()).then(|| not_here("adapters", dir)).flatten();
    error.hint(elsewhere.unwrap_or(
        "an adapter is a folder with adapter_config.json and adapter_model.safetensors".into(),
    ))
}

impl PeftSettings {
    /// Reads `dir/adapter_config.json`.
    ///
    /// # Errors
    /// `Io` when it cannot be read; `Input` when it is not JSON, is not a LoRA adapter, has a key
    /// of the wrong type, or needs a feature that Nibble lacks.
    pub fn read(dir: &Path) -> Result<Self> {
        Self::read_file(dir).map_err(|error| {
            error.or_hint("compare adapter_config.json with the one that PEFT or Nibble wrote")
        })
    }

    fn read_file(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG_FILE);
        let text = std::fs::read_to_string(&path).map_err(|e| not_an_adapter(dir, &path, e))?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|e| Error::input(format_args!("{}: not JSON: {e}", path.display())))?;
        Self::from_json(&value).map_err(|e| e.at(path.display()))
    }

    /// The settings in a parsed `adapter_config.json`.
    ///
    /// # Errors
    /// As [`PeftSettings::read`].
    pub fn from_json(value: &Value) -> Result<Self> {
        let keys = Keys(value.as_object().ok_or_else(|| Error::input("expected a JSON object"))?);
        keys.refuse_other_types()?;
        keys.refuse_unsupported()?;
        let settings = PeftSettings {
            lora: keys.lora()?,
            base_model: keys.text("base_model_name_or_path")?.map(String::from),
            use_dora: keys.flag("use_dora")?,
            lora_bias: keys.flag("lora_bias")?,
            bias: keys.bias()?,
            modules_to_save: keys.texts("modules_to_save")?,
            token_indices: keys.token_indices()?,
            ensure_weight_tying: keys.flag("ensure_weight_tying")?,
        };
        settings.lora.validate().map_err(|e| Error::input(&e.message().what))?;
        Ok(settings)
    }
}

/// The JSON of a plain LoRA adapter; `target_modules` written out as `names`, unless it is a list.
pub fn to_json(lora: &LoraConfig, base_model: Option<&str>, names: &[String]) -> Value {
    let target = match &lora.target_modules {
        TargetModules::AllLinear | TargetModules::Names(ModuleNames::Pattern(_)) => json!(names),
        TargetModules::Names(chosen) => module_names(chosen),
    };
    let list = |values: &[String]| (!values.is_empty()).then(|| json!(values));
    let mut config = json!({
        "alpha_pattern": pattern(&lora.alpha_pattern, |alpha| number(*alpha)),
        "base_model_name_or_path": base_model,
        "bias": "none",
        "exclude_modules": lora.exclude_modules.as_ref().map(module_names),
        "fan_in_fan_out": lora.fan_in_fan_out,
        "inference_mode": true,
        "init_lora_weights": match lora.init_lora_weights {
            InitLoraWeights::Kaiming => json!(true),
            InitLoraWeights::Gaussian => json!("gaussian"),
        },
        "layers_pattern": list(&lora.layers_pattern),
        "layers_to_transform": lora.layers_to_transform,
        "lora_alpha": number(lora.lora_alpha),
        "lora_dropout": lora.lora_dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": lora.r,
        "rank_pattern": pattern(&lora.rank_pattern, |r| json!(r)),
        "revision": null,
        "target_modules": target,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": lora.use_rslora,
    });
    // PEFT before 0.14 does not know it.
    if let (None, Some(fields)) = (&lora.exclude_modules, config.as_object_mut()) {
        fields.shift_remove("exclude_modules");
    }
    config
}

fn module_names(names: &ModuleNames) -> Value {
    match names {
        ModuleNames::List(list) => json!(list),
        ModuleNames::Pattern(source) => json!(source),
    }
}

/// The entries of a pattern as PEFT writes it, in the order of the settings: the first key that fits a module
/// wins.
fn pattern<T>(entries: &[(String, T)], value: impl Fn(&T) -> Value) -> Value {
    Value::Object(entries.iter().map(|(key, v)| (key.clone(), value(v))).collect())
}

/// Whole numbers as integers, which is how PEFT users write alpha.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

/// Typed access to the keys; `null` is the same as absent.
struct Keys<'a>(&'a Map<String, Value>);

impl<'a> Keys<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, expected: &str) -> Error {
        let got = self.0.get(key).map(Value::to_string).unwrap_or_default();
        Error::input(format_args!("`{key}`: expected {expected}, got {got}"))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.get(key).map(|v| v.as_str().ok_or_else(|| self.wrong(key, "text"))).transpose()
    }

    fn flag(&self, key: &str) -> Result<bool> {
        match self.get(key) {
            None => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    fn number(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_f64().ok_or_else(|| self.wrong(key, "a number")),
        }
    }

    fn rank(&self, default: usize) -> Result<usize> {
        match self.get("r") {
            None => Ok(default),
            Some(value) => index(value).ok_or_else(|| self.wrong("r", "a whole number")),
        }
    }

    /// One text or a list of them.
    fn texts(&self, key: &str) -> Result<Vec<String>> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::String(text)) => Ok(vec![text.clone()]),
            Some(value) => strings(value).ok_or_else(|| self.wrong(key, "a list of names")),
        }
    }

    fn module_names(&self, key: &str) -> Result<Option<ModuleNames>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(source)) => Ok(Some(ModuleNames::Pattern(source.clone()))),
            Some(value) => match strings(value) {
                Some(list) if list.is_empty() => Ok(None),
                Some(list) => Ok(Some(ModuleNames::List(list))),
                None => Err(self.wrong(key, "a list of names or a regular expression")),
            },
        }
    }

    fn pattern<T>(
        &self,
        key: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<(String, T)>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let wrong = || self.wrong(key, "names and their numbers");
        let object = value.as_object().ok_or_else(wrong)?;
        object.iter().map(|(k, v)| Ok((k.clone(), read(v).ok_or_else(wrong)?))).collect()
    }

    /// Defaults of missing keys are those of PEFT's `LoraConfig`.
    fn lora(&self) -> Result<LoraConfig> {
        let target_modules = match self.module_names("target_modules")? {
            Some(ModuleNames::Pattern(name)) if name.eq_ignore_ascii_case("all-linear") => {
                TargetModules::AllLinear
            }
            Some(names) => TargetModules::Names(names),
            None => return Err(Error::input("`target_modules` is missing")),
        };
        let layers_to_transform = match self.get("layers_to_transform") {
            None => None,
            Some(value) => Some(
                index(value)
                    .map(|one| vec![one])
                    .or_else(|| value.as_array()?.iter().map(index).collect())
                    .ok_or_else(|| self.wrong("layers_to_transform", "block numbers"))?,
            ),
        };
        Ok(LoraConfig {
            r: self.rank(8)?,
            lora_alpha: self.number("lora_alpha", 8.0)?,
            lora_dropout: self.number("lora_dropout", 0.0)?,
            target_modules,
            exclude_modules: self.module_names("exclude_modules")?,
            layers_to_transform,
            layers_pattern: self.texts("layers_pattern")?,
            rank_pattern: self.pattern("rank_pattern", index)?,
            alpha_pattern: self.pattern("alpha_pattern", Value::as_f64)?,
            use_rslora: self.flag("use_rslora")?,
            init_lora_weights: self.init()?,
            fan_in_fan_out: self.flag("fan_in_fan_out")?,
        })
    }

    fn init(&self) -> Result<InitLoraWeights> {
        match self.get("init_lora_weights") {
            Some(Value::String(kind)) if kind == "gaussian" => Ok(InitLoraWeights::Gaussian),
            Some(Value::String(kind)) if changes_base(kind) => {
                Err(Error::input(format_args!(
                    "`init_lora_weights` is \"{kind}\": the adapter belongs to a changed base model"
                ))
                .hint(
                    "convert it in PEFT: save_pretrained(.., path_initial_model_for_weight_conversion=..)",
                ))
            }
            _ => Ok(InitLoraWeights::Kaiming),
        }
    }

    fn bias(&self) -> Result<TrainedBias> {
        match self.text("bias")? {
            None | Some("none") => Ok(TrainedBias::None),
            Some("lora_only") => Ok(TrainedBias::LoraOnly),
            Some("all") => Ok(TrainedBias::All),
            Some(_) => Err(self.wrong("bias", "\"none\", \"lora_only\" or \"all\"")),
        }
    }

    fn token_indices(&self) -> Result<Vec<TokenIndices>> {
        let key = "trainable_token_indices";
        let rows = |value: &Value| -> Result<Vec<usize>> {
            let list = value.as_array().and_then(|list| list.iter().map(index).collect());
            list.ok_or_else(|| self.wrong(key, "token numbers"))
        };
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Object(modules)) => modules
                .iter()
                .map(|(name, v)| Ok(TokenIndices { module: Some(name.clone()), rows: rows(v)? }))
                .collect(),
            Some(value) => Ok(vec![TokenIndices { module: None, rows: rows(value)? }]),
        }
    }

    fn refuse_other_types(&self) -> Result<()> {
        match self.text("peft_type")? {
            Some("LORA") => Ok(()),
            Some(other) => {
                Err(Error::input(format_args!("`peft_type` is {other}, expected LORA")).hint(
                    "prompt, prefix and other adapters add no weights that Nibble can apply or merge",
                ))
            }
            None => Err(Error::input("`peft_type` is missing, expected LORA")),
        }
    }

    fn refuse_unsupported(&self) -> Result<()> {
        let set = |key: &&&str| match self.get(key) {
            None | Some(Value::Bool(false)) => false,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::Object(map)) => !map.is_empty(),
            Some(_) => true,
        };
        let unknown = self.0.iter().filter(|(key, value)| {
            key.starts_with("use_") && **value == true && !SWITCHES.contains(&key.as_str())
        });
        let unknown = unknown.map(|(key, _)| key.as_str());
        match UNSUPPORTED.iter().find(set).copied().or(unknown.min()) {
            None => Ok(()),
            Some(key) => {
                Err(Error::input(format_args!("`{key}` is set, which is not implemented"))
                    .hint("merge the adapter in PEFT and use the merged model"))
            }
        }
    }
}

fn index(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|number| usize::try_from(number).ok())
}

fn strings(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|v| v.as_str().map(String::from)).collect()
}
