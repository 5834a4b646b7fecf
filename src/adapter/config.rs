//! The settings of a LoRA adapter, under PEFT's names.

use std::collections::HashSet;
use std::str::FromStr;

use crate::error::{Error, Result};

/// Above the width of any model: a larger rank is a typing error, not a low-rank update.
const MAX_RANK: usize = 1 << 16;

/// Names of modules: written out, or as one regular expression.
///
/// A listed name selects a module of that full path and every module whose path ends in `.name`;
/// an expression must match the full path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModuleNames {
    /// Full paths or trailing parts of paths, such as `q_proj` or `layers.0.mlp.up_proj`.
    List(Vec<String>),
    /// A regular expression over full paths.
    Pattern(String),
}

/// PEFT's `target_modules`: the modules that get an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetModules {
    /// Every linear of every block; not the output head.
    AllLinear,
    /// The modules with these names.
    Names(ModuleNames),
}

/// PEFT's `init_lora_weights`: how a fresh adapter starts. B is zero either way, so that the first
/// step sees the base model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InitLoraWeights {
    /// PEFT's `true`: A uniform in `±1/√in` (Kaiming with a = √5).
    #[default]
    Kaiming,
    /// PEFT's `"gaussian"`: A normal with standard deviation `1/R`.
    Gaussian,
}

/// Settings of a LoRA adapter. Field names and defaults of the regular expressions, ranks and
/// scales are those of PEFT's `LoraConfig`; the default is r 16, alpha 32, no dropout,
/// on all linears.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// R: rank.
    pub r: usize,
    /// Numerator of the scale.
    pub lora_alpha: f64,
    /// Probability that an element of the adapter's input is dropped in training.
    pub lora_dropout: f64,
    /// What gets an adapter.
    pub target_modules: TargetModules,
    /// What does not, although `target_modules` names it.
    pub exclude_modules: Option<ModuleNames>,
    /// Only these block numbers; a module given by its full path is adapted all the same.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Names (regular expressions) of the block list, the part before the number, such as
    /// `layers`; empty takes the first number of the path.
    pub layers_pattern: Vec<String>,
    /// Rank for the modules whose path ends in a key (a regular expression); the first that fits.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alpha for the modules whose path ends in a key (a regular expression); the first that fits.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Scale `alpha / √R` in place of `alpha / R`.
    pub use_rslora: bool,
    /// How a fresh adapter starts.
    pub init_lora_weights: InitLoraWeights,
    /// Whether the base stores its linears as `[in, out]` (GPT-2); a note to PEFT, set from the
    /// model. A and B are stored the same way either way.
    pub fan_in_fan_out: bool,
}

impl Default for LoraConfig {
    fn default() -> Self {
        LoraConfig {
            r: 16,
            lora_alpha: 32.0,
            lora_dropout: 0.0,
            target_modules: TargetModules::AllLinear,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            use_rslora: false,
            init_lora_weights: InitLoraWeights::Kaiming,
            fan_in_fan_out: false,
        }
    }
}

impl LoraConfig {
    /// `lora_dropout`, if there is any.
    pub fn dropout(&self) -> Option<f32> {
        (self.lora_dropout > 0.0).then_some(self.lora_dropout as f32)
    }

    /// `s`: what the product `B A x` is multiplied by for a module of this rank and alpha.
    pub fn scale(&self, r: usize, alpha: f64) -> f32 {
        let rank = r as f64;
        (alpha / if self.use_rslora { rank.sqrt() } else { rank }) as f32
    }

    /// Checks the numbers and the combinations that PEFT forbids.
    ///
    /// # Errors
    /// `Usage` naming the setting.
    pub fn validate(&self) -> Result<()> {
        let ranks = std::iter::once(("r", self.r))
            .chain(self.rank_pattern.iter().map(|(key, r)| (key.as_str(), *r)));
        for (name, r) in ranks {
            if !(1..=MAX_RANK).contains(&r) {
                return Err(Error::usage(format_args!(
                    "rank of `{name}` is {r}, expected 1 to {MAX_RANK}"
                )));
            }
        }
        let names = self.rank_pattern.iter().map(|(key, _)| key);
        check_named_once("rank_pattern", names)?;
        check_named_once("alpha_pattern", self.alpha_pattern.iter().map(|(key, _)| key))?;
        for (name, alpha) in self.alphas() {
            if !alpha.is_finite() {
                return Err(Error::usage(format_args!(
                    "alpha of `{name}` is {alpha}, expected a number"
                )));
            }
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(Error::usage(format_args!(
                "lora_dropout is {}, expected 0 or more and below 1",
                self.lora_dropout
            )));
        }
        self.validate_layers()
    }

    /// Checks that training can change what the adapter does: with an alpha of 0 no gradient is any but 0.
    ///
    /// # Errors
    /// `Input` naming the setting.
    pub fn check_trainable(&self) -> Result<()> {
        let Some((name, _)) = self.alphas().find(|(_, alpha)| *alpha == 0.0) else { return Ok(()) };
        let what =
            format!("alpha of `{name}` is 0: the adapter changes nothing and gets no gradient");
        Err(Error::input(what)
            .hint("write another alpha into its adapter_config.json, or train a fresh one"))
    }

    /// Every alpha with the name of its setting.
    fn alphas(&self) -> impl Iterator<Item = (&str, f64)> {
        let patterns = self.alpha_pattern.iter().map(|(key, alpha)| (key.as_str(), *alpha));
        std::iter::once(("lora_alpha", self.lora_alpha)).chain(patterns)
    }

    fn validate_layers(&self) -> Result<()> {
        let by_pattern =
            matches!(self.target_modules, TargetModules::Names(ModuleNames::Pattern(_)));
        if by_pattern && (self.layers_to_transform.is_some() || !self.layers_pattern.is_empty()) {
            return Err(Error::usage(
                "layers_to_transform cannot narrow target_modules given as a regular expression",
            )
            .hint(r"put the block numbers in it, such as `.*\.layers\.(0|1)\..*\.q_proj`"));
        }
        if !self.layers_pattern.is_empty() && self.layers_to_transform.is_none() {
            return Err(Error::usage("layers_pattern without layers_to_transform has no effect"));
        }
        Ok(())
    }
}

/// LoRA+ (arXiv 2402.12354): B learns faster than A. Read by the optimizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraPlus {
    /// Learning rate of B over that of A; 1 is plain LoRA.
    pub lr_ratio: f64,
}

impl Default for LoraPlus {
    fn default() -> Self {
        LoraPlus { lr_ratio: 1.0 }
    }
}

/// Characters of a plain list of module names; anything else makes it a regular expression.
fn is_list(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ',' | ' '))
}

impl FromStr for ModuleNames {
    type Err = Error;

    /// `q_proj,v_proj` is a list, as is `["q_proj", "v_proj"]`; text with other characters than those of
    /// names and commas is a regular expression.
    fn from_str(text: &str) -> Result<Self> {
        let names: Vec<String> = match serde_json::from_str(text) {
            Ok(names) => names,
            Err(_) if !is_list(text) => return Ok(ModuleNames::Pattern(text.to_string())),
            Err(_) => {
                let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
                names.map(String::from).collect()
            }
        };
        if names.is_empty() {
            return Err(Error::usage("expected module names, got nothing"));
        }
        Ok(ModuleNames::List(names))
    }
}

impl FromStr for TargetModules {
    type Err = Error;

    /// `all-linear` in any case, or what [`ModuleNames`] reads.
    fn from_str(text: &str) -> Result<Self> {
        if text.trim().eq_ignore_ascii_case("all-linear") {
            return Ok(TargetModules::AllLinear);
        }
        text.parse().map(TargetModules::Names)
    }
}

impl FromStr for InitLoraWeights {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "true" | "kaiming" => Ok(InitLoraWeights::Kaiming),
            "gaussian" => Ok(InitLoraWeights::Gaussian),
            other => Err(Error::usage(format_args!(
                "init_lora_weights `{other}` is not known, expected `true` or `gaussian`"
            ))),
        }
    }
}

/// Refuses two values for one name, of which one would be ignored.
fn check_named_once<'a>(setting: &str, mut names: impl Iterator<Item = &'a String>) -> Result<()> {
    let mut seen = HashSet::new();
    match names.find(|name| !seen.insert(*name)) {
        Some(name) => {
            let what = format_args!("{setting} has `{name}` twice");
            Err(Error::usage(what).hint("give one value for each name"))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(names: &[&str]) -> ModuleNames {
        ModuleNames::List(names.iter().map(|name| name.to_string()).collect())
    }

    #[test]
    fn names_lists_and_expressions_are_told_apart() -> Result<()> {
        let names: ModuleNames = "q_proj, layers.0.mlp.up_proj,".parse()?;
        assert_eq!(names, list(&["q_proj", "layers.0.mlp.up_proj"]));
        let pattern: ModuleNames = r".*\.(q|v)_proj".parse()?;
        assert_eq!(pattern, ModuleNames::Pattern(r".*\.(q|v)_proj".into()));
        assert_eq!("ALL-linear".parse::<TargetModules>()?, TargetModules::AllLinear);
        assert_eq!("c_attn".parse::<TargetModules>()?, TargetModules::Names(list(&["c_attn"])));
        let json: ModuleNames = r#"["q_proj", "v_proj"]"#.parse()?;
        assert_eq!(json, list(&["q_proj", "v_proj"]));
        assert!([" ,", "[]"].iter().all(|none| none.parse::<ModuleNames>().is_err()));
        Ok(())
    }

    #[test]
    fn scales_are_those_of_the_papers() {
        let plain = LoraConfig { use_rslora: false, ..LoraConfig::default() };
        let rank_stabilised = LoraConfig { use_rslora: true, ..LoraConfig::default() };
        assert_eq!(plain.scale(8, 12.0), 1.5);
        assert_eq!(rank_stabilised.scale(16, 12.0), 3.0);
    }

    #[test]
    fn impossible_settings_are_named() {
        let base = LoraConfig::default;
        let pattern = TargetModules::Names(ModuleNames::Pattern(".*".into()));
        for (config, word) in [
            (LoraConfig { r: 0, ..base() }, "`r`"),
            (LoraConfig { r: usize::MAX, ..base() }, "expected 1 to 65536"),
            (LoraConfig { rank_pattern: vec![("q_proj".into(), 0)], ..base() }, "`q_proj`"),
            (
                LoraConfig {
                    rank_pattern: vec![("q_proj".into(), 4), ("q_proj".into(), 8)],
                    ..base()
                },
                "rank_pattern has `q_proj` twice",
            ),
            (LoraConfig { lora_alpha: f64::NAN, ..base() }, "`lora_alpha`"),
            (LoraConfig { lora_dropout: 1.0, ..base() }, "lora_dropout"),
            (LoraConfig { lora_dropout: -0.1, ..base() }, "lora_dropout"),
            (LoraConfig { lora_dropout: f64::NAN, ..base() }, "lora_dropout"),
            (LoraConfig { layers_pattern: vec!["h".into()], ..base() }, "layers_pattern"),
            (
                LoraConfig {
                    target_modules: pattern,
                    layers_to_transform: Some(vec![0]),
                    ..base()
                },
                "layers_to_transform",
            ),
        ] {
            let error = config.validate().unwrap_err();
            assert!(matches!(error, Error::Usage(_)), "{error}");
            assert!(error.to_string().contains(word), "{error}");
        }
        assert!(base().validate().is_ok());
    }
}
