//! Which modules of a model the settings select: PEFT's rules over a spec's names.
//!
//! Source: PEFT 0.21.2, `check_target_module_exists` and `get_pattern_key`. Two differences, both
//! towards errors: a listed name, a block number or a pattern key that selects nothing is refused
//! by [`LoraConfig::resolve`] with the nearest names (PEFT only minds when nothing at all matches).

use super::config::{LoraConfig, ModuleNames, TargetModules};
use super::lora::{LoraShape, LoraTarget};
use super::pattern::Pattern;
use crate::error::{Error, Result};
use crate::model::spec::{LinearRole, ModelSpec};
use crate::nearest::nearest;

/// A module that PEFT could adapt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Module {
    /// Hugging Face path.
    pub path: String,
    /// What it is.
    pub kind: ModuleKind,
    /// Input width; of an embedding, its rows.
    pub in_features: usize,
    /// Output width.
    pub out_features: usize,
    /// Whether it has a bias.
    pub bias: bool,
}

/// What a [`Module`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ModuleKind {
    /// A linear of a block.
    Linear(usize, LinearRole),
    /// The output head, a linear that may share the embedding's weight.
    Head,
    /// Tokens or learned positions.
    Embedding,
}

/// Every module of `spec` that PEFT could adapt: embeddings, linears in forward order, head.
pub(super) fn modules(spec: &ModelSpec) -> Vec<Module> {
    let d = spec.hidden_size;
    let module = |path: &str, kind, in_features| Module {
        path: path.to_string(),
        kind,
        in_features,
        out_features: d,
        bias: false,
    };
    let mut all = vec![module(spec.embedding_module(), ModuleKind::Embedding, spec.vocab_size)];
    if let (Some(name), Some(rows)) = (spec.positions_name(), spec.learned_positions) {
        let path = name.trim_end_matches(".weight");
        all.push(module(path, ModuleKind::Embedding, rows));
    }
    for layer in 0..spec.num_layers {
        all.extend(spec.linears(layer).into_iter().map(|linear| Module {
            path: linear.module,
            kind: ModuleKind::Linear(layer, linear.role),
            in_features: linear.in_features,
            out_features: linear.out_features,
            bias: linear.bias,
        }));
    }
    let head = module(spec.head_module(), ModuleKind::Head, d);
    all.push(Module { out_features: spec.vocab_size, ..head });
    all
}

/// A module and the adapter that the settings give it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Selected {
    pub module: Module,
    pub r: usize,
    pub scale: f32,
}

impl LoraConfig {
    /// The linears of `spec` that get an adapter, block by block in forward order.
    ///
    /// # Errors
    /// `Usage` when a setting is impossible, an expression does not compile, a name, block number
    /// or pattern key selects nothing, or the selection holds an embedding or the head, whose
    /// adapters Nibble merges but does not train.
    pub fn resolve(&self, spec: &ModelSpec) -> Result<Vec<LoraTarget>> {
        self.validate()?;
        self.refuse_idle_settings(spec)?;
        let selected = self.select(spec, &[])?;
        if selected.is_empty() {
            let what = "target_modules, its exclusions and layers leave no module to adapt";
            return Err(Error::usage(what).hint("leave some of these settings out"));
        }
        self.refuse_idle_patterns(&selected)?;
        selected.into_iter().map(trained_target).collect()
    }

    /// What PEFT would adapt, `saved` being its `modules_to_save`; nothing is an empty list.
    pub(super) fn select(&self, spec: &ModelSpec, saved: &[String]) -> Result<Vec<Selected>> {
        let rules = Rules::new(self, saved)?;
        let mut selected = Vec::new();
        for module in modules(spec) {
            if rules.select(&module)? {
                let r = first_match(&rules.ranks, &module.path)?.unwrap_or(self.r);
                let alpha = first_match(&rules.alphas, &module.path)?.unwrap_or(self.lora_alpha);
                selected.push(Selected { module, r, scale: self.scale(r, alpha) });
            }
        }
        Ok(selected)
    }

    /// Names and block numbers that match no module are typing errors.
    fn refuse_idle_settings(&self, spec: &ModelSpec) -> Result<()> {
        let modules = modules(spec);
        if let TargetModules::Names(names) = &self.target_modules {
            refuse_idle_names("target_modules", names, &modules)?;
        }
        if let Some(names) = &self.exclude_modules {
            refuse_idle_names("exclude_modules", names, &modules)?;
        }
        for layer in self.layers_to_transform.iter().flatten() {
            if *layer >= spec.num_layers {
                let last = spec.num_layers.saturating_sub(1);
                let what = format_args!(
                    "layers_to_transform names block {layer}, the model has blocks 0 to {last}"
                );
                return Err(Error::usage(what).hint("blocks are counted from 0: leave it out"));
            }
        }
        for list in &self.layers_pattern {
            let number = Pattern::block_number(list)?;
            let numbers = modules.iter().map(|module| number.number(&module.path));
            if numbers.collect::<Result<Vec<_>>>()?.iter().all(Option::is_none) {
                let what = format_args!("layers_pattern: `{list}` is no block list of this model");
                return Err(Error::usage(what).hint("it is `layers` in model.layers.0.mlp"));
            }
        }
        Ok(())
    }

    fn refuse_idle_patterns(&self, selected: &[Selected]) -> Result<()> {
        let ranks = self.rank_pattern.iter().map(|(key, _)| ("rank_pattern", key));
        let alphas = self.alpha_pattern.iter().map(|(key, _)| ("alpha_pattern", key));
        for (setting, key) in ranks.chain(alphas) {
            let pattern = Pattern::suffix(key)?;
            let mut used = false;
            for target in selected {
                used |= pattern.matches(&target.module.path)?;
            }
            if !used {
                let paths = selected.iter().map(|target| target.module.path.as_str());
                return Err(idle(setting, key, paths));
            }
        }
        Ok(())
    }
}

/// The settings with their expressions compiled.
struct Rules<'a> {
    config: &'a LoraConfig,
    target: Option<Names<'a>>,
    exclude: Option<Names<'a>>,
    saved: Vec<Pattern>,
    numbers: Vec<Pattern>,
    ranks: Vec<(Pattern, usize)>,
    alphas: Vec<(Pattern, f64)>,
}

impl<'a> Rules<'a> {
    fn new(config: &'a LoraConfig, saved: &[String]) -> Result<Self> {
        let target = match &config.target_modules {
            TargetModules::AllLinear => None,
            TargetModules::Names(names) => Some(Names::new(names)?),
        };
        let numbers = if config.layers_pattern.is_empty() {
            vec![Pattern::first_number()?]
        } else {
            let lists = config.layers_pattern.iter();
            lists.map(|list| Pattern::block_number(list)).collect::<Result<_>>()?
        };
        // `modules_to_save` covers a module and all that it contains.
        let inside = |name: &String| Pattern::full(&format!(r"(?:^|.*\.){name}(?:$|\..*)"));
        Ok(Rules {
            config,
            target,
            exclude: config.exclude_modules.as_ref().map(Names::new).transpose()?,
            saved: saved.iter().map(inside).collect::<Result<_>>()?,
            numbers,
            ranks: suffixes(&config.rank_pattern)?,
            alphas: suffixes(&config.alpha_pattern)?,
        })
    }

    fn select(&self, module: &Module) -> Result<bool> {
        let path = module.path.as_str();
        if self.exclude.as_ref().map_or(Ok(false), |names| names.contain(path))? {
            return Ok(false);
        }
        for saved in &self.saved {
            if saved.matches(path)? {
                return Ok(false);
            }
        }
        match &self.target {
            None => Ok(matches!(module.kind, ModuleKind::Linear(..)) && self.in_layers(path)?),
            Some(names) if names.names_exactly(path) => Ok(true),
            Some(names) => Ok(names.contain(path)? && self.in_layers(path)?),
        }
    }

    fn in_layers(&self, path: &str) -> Result<bool> {
        let layers = match &self.config.layers_to_transform {
            Some(layers) if !layers.is_empty() => layers,
            _ => return Ok(true),
        };
        for pattern in &self.numbers {
            if let Some(number) = pattern.number(path)? {
                return Ok(layers.contains(&number));
            }
        }
        Ok(false)
    }
}

/// [`ModuleNames`] with its expression compiled.
enum Names<'a> {
    List(&'a [String]),
    Pattern(Pattern),
}

impl<'a> Names<'a> {
    fn new(names: &'a ModuleNames) -> Result<Self> {
        Ok(match names {
            ModuleNames::List(list) => Names::List(list),
            ModuleNames::Pattern(source) => Names::Pattern(Pattern::full(source)?),
        })
    }

    fn names_exactly(&self, path: &str) -> bool {
        matches!(self, Names::List(list) if list.iter().any(|name| name == path))
    }

    fn contain(&self, path: &str) -> Result<bool> {
        match self {
            Names::List(list) => Ok(list.iter().any(|name| ends_in(path, name))),
            Names::Pattern(pattern) => pattern.matches(path),
        }
    }
}

/// Whether `path` is `name` or ends in `.name`.
pub(super) fn ends_in(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn last_part(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

fn suffixes<T: Copy>(patterns: &[(String, T)]) -> Result<Vec<(Pattern, T)>> {
    patterns.iter().map(|(key, value)| Ok((Pattern::suffix(key)?, *value))).collect()
}

fn first_match<T: Copy>(patterns: &[(Pattern, T)], path: &str) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        if pattern.matches(path)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

fn refuse_idle_names(setting: &str, names: &ModuleNames, modules: &[Module]) -> Result<()> {
    let paths = || modules.iter().map(|module| module.path.as_str());
    // What may be meant, but for what would be refused next.
    let trained = |module: &&Module| matches!(module.kind, ModuleKind::Linear(..));
    let known = || modules.iter().filter(trained).map(|module| module.path.as_str());
    match names {
        ModuleNames::List(list) => {
            match list.iter().find(|name| !paths().any(|path| ends_in(path, name))) {
                Some(name) => Err(idle(setting, name, known())),
                None => Ok(()),
            }
        }
        ModuleNames::Pattern(source) => {
            let pattern = Pattern::full(source)?;
            for path in paths() {
                if pattern.matches(path)? {
                    return Ok(());
                }
            }
            Err(idle(setting, source, known()))
        }
    }
}

/// `setting` holds `name`, which is none of `paths` nor the end of one.
fn idle<'a>(setting: &str, name: &str, paths: impl Iterator<Item = &'a str>) -> Error {
    let mut known: Vec<&str> = Vec::new();
    for path in paths {
        let candidate = if name.contains('.') { path } else { last_part(path) };
        if !known.contains(&candidate) {
            known.push(candidate);
        }
    }
    if setting == "target_modules" {
        known.push("all-linear");
    }
    let error = Error::usage(format_args!("{setting}: `{name}` matches no module of this model"));
    match nearest(name, known.iter().copied()) {
        close if !close.is_empty() => error.hint(format_args!("did you mean {close}?")),
        _ => error.hint(format_args!("modules: {}", list_of(&known))),
    }
}

/// The first names, and how many more there are.
fn list_of(names: &[&str]) -> String {
    const SHOWN: usize = 10;
    let more = names.len().saturating_sub(SHOWN);
    let shown = names[..names.len() - more].join(", ");
    if more > 0 { format!("{shown} and {more} more") } else { shown }
}

/// The target of a linear in a block.
pub(super) fn trained_target(selected: Selected) -> Result<LoraTarget> {
    let Selected { module, r, scale } = selected;
    let ModuleKind::Linear(layer, role) = module.kind else {
        return Err(Error::usage(format_args!(
            "target_modules selects `{}`, whose adapters are not trained",
            module.path
        ))
        .hint("leave it out, or add it to exclude_modules"));
    };
    let (in_features, out_features) = (module.in_features, module.out_features);
    let shape = LoraShape { in_features, out_features, rank: r, scale };
    Ok(LoraTarget { module: module.path, layer, role, shape })
}

#[cfg(test)]
mod tests {
    use super::super::fixtures;
    use super::*;

    fn error_of(config: LoraConfig, spec: &ModelSpec) -> String {
        config.resolve(spec).unwrap_err().to_string()
    }

    fn targeting(names: &str) -> LoraConfig {
        LoraConfig { target_modules: names.parse().unwrap(), ..LoraConfig::default() }
    }

    #[test]
    fn a_name_that_matches_nothing_suggests_the_nearest() {
        let spec = fixtures::llama(2);
        let text = error_of(targeting("q_proj,v_prj"), &spec);
        assert!(text.contains("`v_prj` matches no module"), "{text}");
        assert!(text.contains("hint: did you mean `v_proj`"), "{text}");
        let text = error_of(targeting("model.layers.7.self_attn.q_proj"), &spec);
        assert!(text.contains("did you mean `model.layers."), "{text}");
        let text = error_of(targeting("all_linear"), &spec);
        assert!(text.contains("hint: did you mean `all-linear`"), "{text}");
        let text = error_of(targeting("query_key_value"), &spec);
        assert!(text.contains("hint: modules: q_proj, k_proj"), "{text}");
        let text = error_of(targeting(r".*\.query"), &spec);
        assert!(text.contains("matches no module"), "{text}");
    }

    #[test]
    fn exclusions_patterns_and_blocks_that_match_nothing_are_refused() {
        let spec = fixtures::llama(2);
        let base = LoraConfig::default;
        let exclude = |names: &str| Some(names.parse().unwrap());
        let mut elsewhere = LoraConfig { layers_to_transform: Some(vec![1]), ..base() };
        elsewhere.layers_pattern = vec!["h".into()];
        for (config, words) in [
            (elsewhere, "`h` is no block list"),
            (LoraConfig { exclude_modules: exclude("downproj"), ..base() }, "`down_proj`"),
            (LoraConfig { rank_pattern: vec![("q_prj".into(), 4)], ..base() }, "`q_proj`"),
            (LoraConfig { alpha_pattern: vec![("q_prj".into(), 4.0)], ..base() }, "`q_proj`"),
            (LoraConfig { layers_to_transform: Some(vec![2]), ..base() }, "blocks 0 to 1"),
            (
                LoraConfig { exclude_modules: exclude("self_attn.*|.*_proj"), ..base() },
                "leave no module",
            ),
        ] {
            let text = error_of(config, &spec);
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn heads_and_embeddings_are_not_trained() {
        let text = error_of(targeting("q_proj,lm_head"), &fixtures::llama(2));
        assert!(text.contains("selects `lm_head`"), "{text}");
    }

    #[test]
    fn targets_come_block_by_block_in_forward_order() -> Result<()> {
        let targets = targeting("down_proj,q_proj").resolve(&fixtures::llama(2))?;
        let found: Vec<(usize, LinearRole)> = targets.iter().map(|t| (t.layer, t.role)).collect();
        use LinearRole::{Down, Q};
        assert_eq!(found, [(0, Q), (0, Down), (1, Q), (1, Down)]);
        let down = LoraShape { in_features: 160, out_features: 64, rank: 16, scale: 2.0 };
        assert_eq!(targets[1].shape, down);
        Ok(())
    }
}
