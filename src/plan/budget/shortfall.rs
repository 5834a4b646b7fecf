//! A limit that nothing fits: the nearest settings that would, by the fewest changes.

use super::{Activations, Choice, Demand, Limit, Strategy, WeightsMode, Wishes};
use crate::byte_size::ByteSize;
use crate::error::Error;
use crate::plan::cost::Pace;
use crate::plan::embedding::EmbeddingPlace;
use crate::plan::fit::{LENGTH_STEP, largest, smallest_pieces};
use crate::plan::moments::Optim;
use crate::plan::processor::Processor;
use crate::plan::settings::{Pieces, Policy, Settings};
use crate::plan::strategy::typed;

/// What a demand fixes and could leave open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Activations,
    Weights,
    Embedding,
    /// Sizes of tiles and chunks.
    Pieces,
    /// The optimizer: the only wish that changes what is computed.
    Optim,
}

const WISHES: [Wish; 5] =
    [Wish::Activations, Wish::Weights, Wish::Embedding, Wish::Pieces, Wish::Optim];

impl Demand<'_> {
    /// The error of a limit that nothing fits; `leanest` is the least that was allowed.
    pub(super) fn shortfall(&self, limit: Limit, leanest: Strategy) -> Error {
        let (error, most) = (self.too_little(limit, leanest), limit.most_bytes());
        if let Some((flags, bytes)) = self.nearest(limit) {
            return error.hint(format_args!("{flags} would need {}", ByteSize(bytes)));
        }
        let (settings, kept_optim) = (self.settings.clone(), |wish: &Wish| *wish != Wish::Optim);
        let wishes: Vec<Wish> = WISHES.into_iter().filter(kept_optim).collect();
        self.granting(&wishes, settings, |demand| error.hint(demand.shorter_hint(self, most)))
    }

    fn too_little(&self, limit: Limit, leanest: Strategy) -> Error {
        let need = self.total_bytes(leanest);
        let pinned = self.pinned_for(leanest);
        let most = limit.most_bytes();
        if need <= most {
            return Error::budget(format_args!(
                "what waits on the host needs {} of pinned memory there, {} can be had: half of what \
                 is free, 512 MiB in WSL",
                ByteSize(pinned),
                ByteSize(self.machine.pinned_bytes)
            ));
        }
        let [need, most, lack] = [need, most, need - most].map(ByteSize);
        let there_is = match (limit, self.machine.processor) {
            (Limit::Budget(_), _) => format!("budget is {most}"),
            (Limit::Free(_), Processor::Cpu) => format!("{most} are free"),
            (Limit::Free(_), Processor::Gpu) => format!("with what is in use, the GPU has {most}"),
        };
        Error::budget(format_args!("plan needs {need}, {there_is}: {lack} too little"))
    }

    /// Flags of the plan within `limit` that changes the fewest of what is asked for, and its bytes; of
    /// several the fastest, but first the one that only moves an embedding. What changes no result
    /// comes before what does.
    fn nearest(&self, limit: Limit) -> Option<(String, u64)> {
        let mut changes: Vec<Vec<Wish>> = (1..1u32 << WISHES.len())
            .map(|set| {
                let chosen = |(bit, wish): (usize, Wish)| (set >> bit & 1 == 1).then_some(wish);
                WISHES.into_iter().enumerate().filter_map(chosen).collect()
            })
            .filter(|wishes: &Vec<Wish>| wishes.iter().all(|wish| self.fixes(*wish)))
            .collect();
        let size = |wishes: &Vec<Wish>| {
            (wishes.contains(&Wish::Optim), wishes.len(), wishes[..] != [Wish::Embedding])
        };
        changes.sort_by_key(size);
        changes.chunk_by(|a, b| size(a) == size(b)).find_map(|changes| {
            let fitting = changes.iter().filter_map(|wishes| {
                self.granting(wishes, self.settings.clone(), |demand| {
                    let choice = demand.chosen(limit)?;
                    let seconds = Pace::new(demand).seconds_per_token(&choice);
                    let need = demand.total_bytes(choice.strategy);
                    let flags = self.changed_flags(demand.settings, &choice, self.settings.tokens);
                    Some((seconds, flags, need))
                })
            });
            let fastest = fitting.min_by(|a, b| a.0.total_cmp(&b.0));
            fastest.map(|(_, flags, need)| (flags.join(", "), need))
        })
    }

    /// Whether something else could be had by granting it.
    fn fixes(&self, wish: Wish) -> bool {
        match wish {
            Wish::Activations => self.wishes.activations != Activations::Auto,
            Wish::Weights => {
                self.wishes.weights != WeightsMode::Auto && self.weights.streamed.is_some()
            }
            Wish::Embedding => {
                self.wishes.embedding != EmbeddingPlace::Auto && self.places_embedding()
            }
            Wish::Pieces => true,
            Wish::Optim => {
                let packed = Settings { optim: Optim::Adamw8bit, ..self.settings.clone() };
                self.settings.optim != Optim::Adamw8bit && packed.moments().blocks > 0
            }
        }
    }

    /// Whether embedding and head could be in two places.
    pub(in crate::plan) fn places_embedding(&self) -> bool {
        self.machine.processor == Processor::Gpu && self.weights.head > 0
    }

    /// Calls `with` a demand that leaves open what is granted.
    fn granting<R>(
        &self,
        granted: &[Wish],
        mut settings: Settings,
        with: impl FnOnce(&Demand) -> R,
    ) -> R {
        // A hint has what is needed, not what memory could be filled with.
        let mut wishes = Wishes { dequantized_blocks: Some(0), ..self.wishes };
        for wish in granted {
            match wish {
                Wish::Activations => wishes.activations = Activations::Auto,
                Wish::Weights => wishes.weights = WeightsMode::Auto,
                Wish::Embedding => wishes.embedding = EmbeddingPlace::Auto,
                Wish::Pieces => {
                    smallest_pieces(&mut settings);
                    wishes.logit_rows_given = false;
                }
                Wish::Optim => settings.optim = Optim::Adamw8bit,
            }
        }
        with(&Demand { settings: &settings, wishes, ..self.clone() })
    }

    /// Flags that lead to `choice` of a demand with `settings` in passes of at most `tokens`, where it is not
    /// what this one asks for.
    fn changed_flags(&self, settings: &Settings, choice: &Choice, tokens: usize) -> Vec<String> {
        let mut flags = Vec::new();
        let (activations, weights, embedding) = choice.strategy.flags(self.spec.num_layers);
        if ![Activations::Auto, activations].contains(&self.wishes.activations) {
            flags.push(format!("`--activations {}`", typed(activations)));
        }
        if ![WeightsMode::Auto, weights].contains(&self.wishes.weights) {
            flags.push(format!("`--weights {}`", typed(weights)));
        }
        if ![EmbeddingPlace::Auto, embedding].contains(&self.wishes.embedding)
            && self.places_embedding()
        {
            flags.push(format!("`--embedding {}`", typed(embedding)));
        }
        let [new, asked] = [settings, self.settings].map(|settings| settings.shorter(tokens));
        if new.mlp_tile() != asked.mlp_tile() {
            flags.push(format!("`--mlp-tile-length {}`", new.mlp_tile()));
        }
        if new.logit_rows != asked.logit_rows {
            flags.push(format!("`--logits-chunk-length {}`", new.logit_rows));
        }
        if settings.optim != self.settings.optim {
            flags.push("`--optim adamw_8bit`".to_string());
        }
        flags
    }

    /// A hint where everything is allowed: the longest forward pass within `bytes`, then the highest rank,
    /// then what the least plan of all needs. `asked` is the demand that allowed less.
    fn shorter_hint(&self, asked: &Demand, bytes: u64) -> String {
        let least = self.least();
        let choice = self.choice(least);
        let flags = |tokens| asked.changed_flags(self.settings, &choice, tokens);
        let with = |flags: Vec<String>, rest: String| match flags.is_empty() {
            true => rest,
            false => format!("{} with {rest}", flags.join(", ")),
        };
        if let Some((tokens, need)) = self.longest_fit(bytes, least) {
            let shorter = format!(
                "{tokens} tokens in a forward pass would need {}: lower `--max-length` or \
                 `--per-device-train-batch-size`",
                ByteSize(need)
            );
            return with(flags(tokens), shorter);
        }
        let mut changes = flags(LENGTH_STEP);
        if self.settings.tokens > LENGTH_STEP {
            changes.push(format!("{LENGTH_STEP} tokens in a forward pass (`--max-length`)"));
        }
        match self.highest_rank_fit(bytes, least) {
            Ok((rank, need)) => {
                changes.push(format!("`--lora-r {rank}`"));
                format!("{} would need {}", changes.join(", "), ByteSize(need))
            }
            Err(need) => {
                changes.extend(self.wishes.lora_r.map(|_| "`--lora-r 1`".to_string()));
                let with = if changes.is_empty() { "" } else { ", with " };
                // Of streamed weights a short pass reads fewer rows of the embedding, too.
                let shortest = self.settings.shorter(LENGTH_STEP);
                let outside = self.at(&shortest).outside(&choice).total();
                format!(
                    "the least that this model can be trained in is {}{with}{}; the frozen weights \
                     and data alone take {}",
                    ByteSize(need),
                    changes.join(", "),
                    ByteSize(outside)
                )
            }
        }
    }

    /// The way that takes the least of this memory, and no more of the host's than there is.
    fn least(&self) -> Strategy {
        let stream = self.weights.streamed.is_some();
        let places = self.embedding_places();
        let streams = [stream, false];
        let with = |others, stream, on_host| Strategy {
            on_host,
            pieces: self.pieces().last().unwrap_or(Pieces::NONE),
            ..Strategy::uniform(self.spec.num_layers, others, stream)
        };
        let others = [Policy::Offload, Policy::Checkpoint];
        let ways = streams.into_iter().flat_map(|stream| {
            let at = move |others| {
                places.iter().rev().map(move |&on_host| with(others, stream, on_host))
            };
            others.into_iter().flat_map(at)
        });
        let plainest = with(Policy::Checkpoint, false, places[0]);
        ways.into_iter().find(|way| self.can_be_pinned(way)).unwrap_or(plainest)
    }

    /// `settings` with another `--lora-r`, which leaves ranks of `--rank-pattern` as they are; `settings` may
    /// have a lower one already.
    pub(in crate::plan) fn with_rank(&self, settings: &Settings, rank: usize) -> Settings {
        let mut settings = settings.clone();
        for (target, asked) in settings.targets.iter_mut().zip(&self.settings.targets) {
            if Some(asked.shape.rank) == self.wishes.lora_r {
                target.shape.rank = rank;
            }
        }
        settings
    }

    /// The largest forward pass that fits, and what it needs.
    fn longest_fit(&self, budget: u64, strategy: Strategy) -> Option<(usize, u64)> {
        let need =
            |steps| self.at(&self.settings.shorter(steps * LENGTH_STEP)).total_bytes(strategy);
        let steps = largest(self.settings.tokens / LENGTH_STEP, |steps| need(steps) <= budget);
        (steps > 0).then(|| (steps * LENGTH_STEP, need(steps)))
    }

    /// The highest `--lora-r` that fits with the shortest forward pass, and what it needs; what the lowest
    /// one needs where none does, or the ranks are an adapter's.
    fn highest_rank_fit(&self, budget: u64, strategy: Strategy) -> Result<(usize, u64), u64> {
        let mut settings = self.settings.shorter(LENGTH_STEP);
        let mut rank = self.wishes.lora_r.unwrap_or(0) / 2;
        let mut least = self.at(&settings).total_bytes(strategy);
        while rank > 0 {
            settings = self.with_rank(&settings, rank);
            least = self.at(&settings).total_bytes(strategy);
            if least <= budget {
                return Ok((rank, least));
            }
            rank /= 2;
        }
        Err(least)
    }
}
