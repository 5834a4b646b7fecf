mod dense;

use super::search::WORTH_MEMORY;
use super::*;
use crate::adapter::LoraConfig;
use crate::kernels::cuda::{AttnImplementation, cuda_layout};
use crate::model::families::spec_from_config;
use crate::plan::cost::Pace;
use crate::plan::settings::Pieces;
use crate::plan::strategy::typed;
use crate::plan::{BlockRegion, Owner, RegionId, StreamedBytes, layout};

const CHECKPOINT: Strategy = Strategy {
    kept: 0,
    others: Policy::Checkpoint,
    attended: 0,
    remaking_attention: 0,
    stream: false,
    on_host: OnHost::Nothing,
    dequantized_blocks: 0,
    pieces: Pieces::NONE,
};

/// Weights that are codes alone.
fn codes(codes: u64) -> WeightParts {
    WeightParts { codes, ..WeightParts::default() }
}

fn spec_of(config: &str) -> ModelSpec {
    spec_from_config(&serde_json::from_str(config).unwrap()).unwrap()
}

/// Six blocks.
fn golden() -> ModelSpec {
    let text = include_str!("../../../tests/data/models/llama_s0/config.json");
    let spec = spec_of(text);
    ModelSpec { num_layers: 6, windows: vec![None; 6], ..spec }
}

fn settings(spec: &ModelSpec, tokens: usize) -> Settings {
    Settings {
        longest_document: tokens / 2,
        targets: LoraConfig::default().resolve(spec).unwrap(),
        threads: 2,
        ..Settings::of_pass(tokens, 64)
    }
}

/// With all weights in memory, on the CPU.
fn demand<'a>(spec: &'a ModelSpec, settings: &'a Settings) -> Demand<'a> {
    Demand {
        spec,
        weights: WeightBytes {
            resident: codes(1 << 20),
            streamed: None,
            embedding: 0,
            head: 0,
            packs_any: true,
        },
        settings,
        machine: Machine {
            processor: Processor::Cpu,
            layout: &layout,
            process_bytes: 100,
            pinned_bytes: u64::MAX,
        },
        wishes: Wishes { lora_r: Some(16), ..Wishes::default() },
    }
}

/// The same on a GPU.
fn on_gpu<'a>(spec: &'a ModelSpec, settings: &'a Settings) -> Demand<'a> {
    let demand = demand(spec, settings);
    let layout = &|spec: &_, settings: &_| cuda_layout(spec, settings, AttnImplementation::Auto);
    Demand { machine: Machine { layout, processor: Processor::Gpu, ..demand.machine }, ..demand }
}

/// Weights of a model in 4 bits, or in bf16, on a GPU.
fn weights_on_gpu(spec: &ModelSpec, packed: bool) -> WeightBytes {
    let format = packed.then(nibble_quant::BlockFormat::default);
    WeightBytes::of_config(spec, nibble_quant::FloatType::Bf16, format.as_ref(), Processor::Gpu)
}

impl Demand<'_> {
    /// The same demand, allowed something else.
    fn allowing(&self, activations: Activations, weights: WeightsMode) -> Self {
        self.wishing(|wishes| (wishes.activations, wishes.weights) = (activations, weights))
    }

    /// The same demand beside a host with so much memory to be pinned.
    fn pinning(&self, pinned_bytes: u64) -> Self {
        Demand { machine: Machine { pinned_bytes, ..self.machine }, ..self.clone() }
    }

    /// The same demand, computed on `processor`; the layout stays.
    fn computed_on(&self, processor: Processor) -> Self {
        Demand { machine: Machine { processor, ..self.machine }, ..self.clone() }
    }
}

#[test]
fn auto_keeps_as_many_layers_as_fit() {
    let spec = golden();
    // So short that to make attention again costs nothing to speak of.
    let settings = Settings { longest_document: 2, ..settings(&spec, 1024) };
    let demand = demand(&spec, &settings);
    let of = |kept: usize| match kept {
        6 => Strategy::uniform(6, Policy::Keep, false),
        kept => Strategy { kept, ..CHECKPOINT },
    };
    let need = |kept: usize| demand.total_bytes(of(kept));
    for kept in [0, 3, 6] {
        let chosen = demand.choose(Limit::Budget(need(kept))).unwrap();
        assert_eq!(chosen.strategy, of(kept));
        assert_eq!(chosen.settings.policies, of(kept).policies(6));
        let bytes = demand.plan(&chosen.settings).arena_bytes() as u64;
        assert_eq!(bytes + (1 << 20) + 100, need(kept));
    }
    // One byte less: offloading the others' inputs pays for no more than they take.
    let chosen = demand.choose(Limit::Budget(need(3) - 1)).unwrap().strategy;
    assert!(demand.total_bytes(chosen) < need(3));
    assert!(
        chosen.kept == 2 || chosen.others == Policy::Offload || chosen.pieces != Pieces::NONE,
        "{chosen:?}"
    );
    // A tenth of what is free is left alone, but for the leanest plan.
    let free = |bytes| demand.choose(Limit::Free(bytes));
    assert_eq!(free(need(3) * 10 / 9 + 10).unwrap().strategy, of(3));
    assert_ne!(free(need(3)).unwrap().strategy, of(3));
    let leanest = demand.leanest().unwrap().strategy;
    assert_eq!((leanest.kept, leanest.others), (0, Policy::Offload));
    let least = demand.total_bytes(leanest);
    assert_eq!(free(least).unwrap().strategy, leanest);
    let error = free(least - 1).unwrap_err().to_string();
    assert!(error.contains(" are free: 1 B too little\nhint: "), "{error}");
}

/// Most of all ways are never planned: what is chosen is what planning each of them would choose.
#[test]
fn the_search_finds_what_trying_all_would() {
    let spec = golden();
    for (tokens, longest) in [(1024, 2), (1024, 1024), (5000, 5000)] {
        let settings = Settings { longest_document: longest, ..settings(&spec, tokens) };
        for processor in [Processor::Cpu, Processor::Gpu] {
            let streamed =
                Some(StreamedBytes { block: 1 << 17, blocks: 2, ..StreamedBytes::of_vectors(100) });
            let weights = WeightBytes { streamed, ..demand(&spec, &settings).weights };
            for pinned_bytes in [u64::MAX, 1 << 20] {
                let demand = Demand { weights, ..demand(&spec, &settings) };
                let demand = demand.computed_on(processor).pinning(pinned_bytes);
                let candidates = demand.candidates().unwrap();
                let need = |candidate: &Strategy| demand.total_bytes(*candidate);
                let lacking = |c: &Strategy| demand.pinned_for(*c).saturating_sub(pinned_bytes);
                let leanest = demand.leanest_of(&candidates);
                let least = candidates.iter().map(|c| (lacking(c), need(c))).min().unwrap();
                assert_eq!((lacking(&leanest), need(&leanest)), least, "{processor:?} {tokens}");
                let pace = Pace::new(&demand);
                let seconds = |c: &Strategy| pace.seconds_per_token(&demand.choice(*c));
                let mut sizes: Vec<u64> = candidates.iter().map(need).collect();
                sizes.sort_unstable();
                for bytes in sizes.iter().step_by(1 + sizes.len() / 20) {
                    let fitting = candidates.iter().filter(|c| demand.fits(**c, *bytes));
                    let best = fitting.map(seconds).min_by(f64::total_cmp);
                    let most = demand.most_kept(&candidates, *bytes);
                    let found = demand.fastest_of(most.into_iter());
                    let found = found.map(|(seconds, _)| seconds);
                    assert_eq!(found, best, "{processor:?} {tokens} {bytes}");
                }
            }
        }
    }
}

#[test]
fn attention_over_long_documents_is_kept() {
    let spec = golden();
    let settings = Settings { longest_document: 1024, ..settings(&spec, 1024) };
    let demand = demand(&spec, &settings);
    let need = |candidate| demand.total_bytes(candidate);
    let attended = Strategy { others: Policy::Attention, ..CHECKPOINT };
    assert!(need(CHECKPOINT) < need(attended));
    let chosen = demand.choose(Limit::Budget(need(attended))).unwrap();
    assert_eq!(chosen.strategy, attended);
    assert_eq!(
        demand.facts(&chosen).join(", "),
        "0 of 6 blocks keep their activations, 6 the output of attention"
    );
    let plan = demand.plan(&chosen.settings);
    let elements = |owner| {
        let region = plan.region(RegionId::Block(owner, BlockRegion::Attention));
        region.map(|region| region.elements)
    };
    assert_eq!(elements(Owner::Layer(5)), Some(1024 * spec.q_width()));
    assert_eq!(elements(Owner::Recompute), None, "each has its own");
}

#[test]
fn values_of_the_command_line_lead_to_what_they_are_named_for() {
    for (activations, policy) in Activations::UNIFORM {
        assert_eq!(Activations::of_all(policy), activations);
    }
    for on_host in [OnHost::Nothing, OnHost::Input, OnHost::All] {
        assert_eq!(on_host.asked_by().on_host(), on_host);
        assert_eq!(serde_json::json!(on_host), typed(on_host.asked_by()));
    }
    assert_eq!(Activations::of_all(Policy::AttentionOffloadInput), Activations::Auto);
}

#[test]
fn what_is_offloaded_is_said() {
    let spec = golden();
    let settings = settings(&spec, 1024);
    let offload =
        demand(&spec, &settings).allowing(Activations::OffloadAttention, WeightsMode::Auto);
    let chosen = offload.choose(Limit::Free(u64::MAX)).unwrap();
    assert_eq!(chosen.settings.policies, [Policy::OffloadAttention; 6]);
    let said = |choice: &Choice| {
        let bytes = ByteSize(offload.plan(&choice.settings).offloaded_bytes() as u64);
        assert_ne!(bytes, ByteSize(0));
        (offload.facts(choice), format!("{bytes} of inputs and attention offloaded to a file"))
    };
    let (facts, waits) = said(&chosen);
    assert_eq!(facts, ["0 of 6 blocks keep their activations", &waits]);
    let mixed = Strategy { kept: 2, others: Policy::OffloadAttention, ..CHECKPOINT };
    let (facts, waits) = said(&offload.choice(mixed));
    assert_eq!(facts, ["2 of 6 blocks keep their activations", &waits]);
}

/// Where all inputs have to wait elsewhere, what is left holds the output of attention.
#[test]
fn attention_is_kept_beside_offloaded_inputs() {
    let spec = golden();
    let settings = Settings { longest_document: 1024, ..settings(&spec, 1024) };
    let demand = on_gpu(&spec, &settings);
    let need = |candidate| demand.total_bytes(candidate);
    let offload = Strategy { others: Policy::Offload, ..CHECKPOINT };
    let attended = |attended| Strategy { attended, ..offload };
    let each = need(attended(3)) - need(attended(2));
    assert_eq!(each, need(attended(2)) - need(attended(1)));
    assert_eq!(need(attended(6)), need(attended(5)), "none shares any more");
    let chosen = demand.choose(Limit::Budget(need(attended(2)) + each / 2)).unwrap();
    let Strategy { others, attended: kept, .. } = chosen.strategy;
    assert!(others == Policy::Offload && kept >= 2, "{:?}", chosen.strategy);
    let policies = &chosen.settings.policies;
    assert!(policies.iter().all(|policy| policy.offloads()), "{policies:?}");
    assert_eq!(chosen.settings.layers_skipping_attention_recompute(), kept);
    let facts = demand.facts(&chosen);
    assert_eq!(
        facts[0],
        format!("0 of 6 blocks keep their activations, {kept} the output of attention")
    );
    assert!(facts[1].ends_with(" of inputs offloaded to pinned memory"), "{facts:?}");
    assert_eq!(chosen.strategy.flags(6).0, Activations::Auto);
    assert_eq!(demand.pinned_for(chosen.strategy), demand.pinned_for(offload));
}

/// 8B on a document of 32,768 tokens, and a host with room for all inputs and the attention of 20 blocks.
#[test]
fn attention_waits_of_as_many_blocks_as_the_host_has_room_for() {
    use Policy::{Offload, OffloadAttention};
    let spec = spec_of(include_str!("../../../tests/data/configs/llama-3.1-8b.json"));
    let settings = Settings { longest_document: 32_768, ..settings(&spec, 32_768) };
    let plenty = on_gpu(&spec, &settings);
    let both = |remaking_attention| Strategy {
        others: OffloadAttention,
        remaking_attention,
        ..CHECKPOINT
    };
    let [inputs, most] = [both(32), both(12)].map(|way| plenty.pinned_for(way));
    assert_eq!(inputs, 32 * waiting_bytes(&spec, &settings, Offload) as u64);
    let poor = plenty.pinning(most);
    let limit = Limit::Budget(poor.total_bytes(both(12)));
    let chosen = poor.choose(limit).unwrap();
    assert_eq!(chosen.strategy, both(12));
    let policies = [vec![Offload; 12], vec![OffloadAttention; 20]].concat();
    assert_eq!(chosen.settings.policies, policies);
    let facts = poor.facts(&chosen);
    assert!(facts[1].contains(" of inputs and attention of 20 blocks offloaded to"), "{facts:?}");
    // A byte less: one block fewer. Room for all: all.
    let with = |pinned_bytes| plenty.pinning(pinned_bytes).choose(limit).unwrap();
    let [fewer, all] = [most - 1, plenty.pinned_for(both(0))].map(|bytes| with(bytes).strategy);
    assert_eq!([fewer, all], [both(13), both(0)]);
    // What is asked for is done whole, or not.
    let asked = poor.allowing(Activations::OffloadAttention, WeightsMode::Auto);
    let error = asked.choose(limit).unwrap_err().to_string();
    assert!(error.contains("of pinned memory there"), "{error}");
}

#[test]
fn weights_are_streamed_where_that_saves_recomputation() {
    let spec = golden();
    let settings = settings(&spec, 1024);
    let streamed = Some(StreamedBytes::of_vectors(1 << 20));
    let weights =
        WeightBytes { resident: codes(50 << 20), streamed, ..demand(&spec, &settings).weights };
    let auto = Demand { weights, ..demand(&spec, &settings) };
    let keep = Strategy::uniform(6, Policy::Keep, false);
    let most = auto.total_bytes(keep);
    let choose = |demand: &Demand, bytes| demand.choose(Limit::Budget(bytes)).unwrap().strategy;
    assert_eq!(choose(&auto, most), keep);
    assert_eq!(choose(&auto, most - 1), Strategy { stream: true, ..keep });
    let stream = auto.allowing(Activations::Auto, WeightsMode::Stream);
    assert_eq!(choose(&stream, most), Strategy { stream: true, ..keep });
    let resident = auto.allowing(Activations::Auto, WeightsMode::Resident);
    let error = resident.choose(Limit::Budget(weights.resident.total())).unwrap_err().to_string();
    assert!(error.contains("hint: `--weights stream` would need"), "{error}");
    let dense = Demand { weights: WeightBytes { streamed: None, ..weights }, ..stream };
    let error = dense.choose(Limit::Budget(most)).unwrap_err().to_string();
    assert!(error.contains("nibble quantize"), "{error}");
}

/// Keeping is asked for, and a little is missing: the pieces shrink, whose results are the same.
#[test]
fn pieces_shrink_where_that_is_enough() {
    let spec = golden();
    let settings = settings(&spec, 4096);
    let keep = demand(&spec, &settings).allowing(Activations::Keep, WeightsMode::Auto);
    let whole = Strategy::uniform(6, Policy::Keep, false);
    let bytes = keep.total_bytes(whole);
    assert_eq!(keep.choose(Limit::Budget(bytes)).unwrap().strategy, whole);
    let chosen = keep.choose(Limit::Budget(bytes - 1)).unwrap();
    let tiles = Pieces { tiles: true, ..Pieces::NONE };
    assert_eq!(chosen.strategy, Strategy { pieces: tiles, ..whole });
    assert_eq!((chosen.settings.mlp_tile(), chosen.settings.logit_rows), (1024, 64));
    assert!(keep.total_bytes(chosen.strategy) < bytes);
    // The user's tile stays.
    let own = Settings { mlp_tile_length: Some(2048), logit_rows: 400, ..settings.clone() };
    let chosen = keep.at(&own).choice(Strategy { pieces: Pieces::ALL, ..whole }).settings;
    assert_eq!((chosen.mlp_tile(), chosen.logit_rows), (2048, 100));
}

#[test]
fn a_plan_over_budget_says_what_would_fit() {
    let spec = golden();
    let settings = settings(&spec, 1024);
    let auto = demand(&spec, &settings);
    let keep = auto.allowing(Activations::Keep, WeightsMode::Auto);
    let pieces = Pieces { one_buffer: false, ..Pieces::ALL };
    let least = Strategy { others: Policy::Offload, pieces, ..CHECKPOINT };
    let small = Settings { mlp_tile_length: Some(256), ..settings.clone() };
    let says =
        |demand: &Demand, bytes| demand.choose(Limit::Budget(bytes)).unwrap_err().to_string();
    let text = says(&keep, auto.total_bytes(CHECKPOINT));
    assert!(text.contains("`--activations checkpoint` would need"), "{text}");
    let text = says(&keep, auto.total_bytes(least));
    assert!(text.contains("`--activations offload` would need"), "{text}");
    let text = says(&auto, auto.total_bytes(least) - 1);
    assert!(text.contains("hint: `--mlp-tile-length 256` would need"), "{text}");
    let text = says(&auto, auto.at(&small).total_bytes(least) - 1);
    assert!(text.contains("`--mlp-tile-length 256` with 960 tokens in a forward pass"), "{text}");
    let mut low = small.shorter(64);
    low.targets.iter_mut().for_each(|target| target.shape.rank = 4);
    let fits = auto.at(&low).total_bytes(least);
    for (budget, rank) in [(fits, "`--lora-r 4`"), (fits - 1, "`--lora-r 2`")] {
        let text = says(&auto, budget);
        assert!(text.contains(&format!("64 tokens in a forward pass (`--max-length`), {rank}")));
        // A pass that is as short is not to be lengthened.
        let short = Settings { tokens: 64, ..settings.shorter(64) };
        let text = says(&Demand { settings: &short, ..auto.clone() }, budget);
        assert!(text.contains(rank) && !text.contains("tokens in a forward pass"), "{text}");
    }
    let text = says(&auto, 1000);
    assert!(text.contains("alone take"), "{text}");
    // On the CPU there is one place for an embedding.
    let weights = WeightBytes { embedding: 1 << 19, ..auto.weights };
    let host = Demand { weights, ..auto.clone() };
    let host = host.wishing(|wishes| wishes.embedding = EmbeddingPlace::Host);
    assert_eq!(says(&host, 1000), text);
    low.targets.iter_mut().for_each(|target| target.shape.rank = 1);
    let fits = crate::byte_size::ByteSize(auto.at(&low).total_bytes(least));
    assert!(
        text.contains(&format!("the least that this model can be trained in is {fits}, with ")),
        "{text}"
    );
    assert!(text.contains(", `--lora-r 1`;"), "{text}");
}

/// The whole is of a short pass, and so is the part: rows of a streamed embedding are those of its tokens.
#[test]
fn the_weights_of_the_least_plan_are_those_of_its_length() {
    let spec = golden();
    let settings = settings(&spec, 1024);
    let rows = StreamedBytes { table: 1 << 30, row: 64 << 10, ..StreamedBytes::of_vectors(100) };
    let weights = WeightBytes { streamed: Some(rows), ..demand(&spec, &settings).weights };
    let demand = Demand { weights, ..demand(&spec, &settings) };
    let text = demand.choose(Limit::Budget(1000)).unwrap_err().to_string();
    // 64 rows, and what is there besides.
    let alone = ByteSize((64 * (64 << 10)) + 100 + demand.machine.process_bytes);
    assert!(text.ends_with(&format!("the frozen weights and data alone take {alone}")), "{text}");
}

/// Which pieces are taken depends on what is free, and the last bits of a run on them.
#[test]
fn a_run_that_goes_on_adds_up_as_before_if_it_can() {
    let spec = golden();
    let settings = settings(&spec, 2048);
    let begun = demand(&spec, &settings);
    let need = |pieces| begun.total_bytes(Strategy { pieces, ..CHECKPOINT });
    let tiles = Pieces { tiles: true, ..Pieces::NONE };
    let tight = begun.allowing(Activations::Checkpoint, WeightsMode::Auto);
    let small = tight.choose(Limit::Budget(need(tiles))).unwrap();
    assert_ne!(small.strategy.pieces, Pieces::NONE);
    let order = small.settings.sum_order();
    let goes_on = begun.wishing(|wishes| wishes.sum_order = Some(order));
    for limit in [Limit::Budget(need(tiles)), Limit::Free(u64::MAX)] {
        let choice = goes_on.choose(limit).unwrap();
        assert_eq!(choice.settings.sum_order(), order, "{:?}", choice.strategy);
    }
    // All else is free: policies change no sum.
    assert_eq!(goes_on.choose(Limit::Free(u64::MAX)).unwrap().strategy.kept, 6);
    assert_ne!(begun.choose(Limit::Free(u64::MAX)).unwrap().settings.sum_order(), order);
    // What does not fit any more, or never could be, is given up.
    let whole = begun.choose(Limit::Free(u64::MAX)).unwrap().settings.sum_order();
    let larger = tight.wishing(|wishes| wishes.sum_order = Some(whole));
    let choice = larger.choose(Limit::Budget(need(tiles))).unwrap();
    assert_eq!(choice.settings.sum_order(), order);
}

/// Of what is free a tenth is left alone, by the plan of a hint as by any.
#[test]
fn a_hint_names_what_its_flags_would_take() {
    let spec = golden();
    let settings = settings(&spec, 1024);
    let auto = demand(&spec, &settings);
    let keep = auto.allowing(Activations::Keep, WeightsMode::Auto);
    let whole = auto.total_bytes(Strategy::uniform(6, Policy::Keep, false));
    for part in [30, 60, 90] {
        let limit = Limit::Free(whole * part / 100);
        let Ok(granted) = auto.choose(limit) else { continue };
        let need = crate::byte_size::ByteSize(auto.total_bytes(granted.strategy));
        let text = keep.choose(limit).unwrap_err().to_string();
        assert!(text.contains("hint: `--activations "), "{text}");
        assert!(text.contains(&format!(" would need {need}")), "{need}: {text}");
    }
}

/// Blocks that keep nothing pin more than those that keep, and take less of the GPU.
#[test]
fn what_can_be_pinned_is_tried_whole() {
    let spec = golden();
    let settings = settings(&spec, 1024);
    let input = (2 * settings.tokens * spec.hidden_size) as u64;
    let plenty = on_gpu(&spec, &settings).wishing(|wishes| wishes.dequantized_blocks = Some(0));
    let pace = Pace::new(&plenty);
    let all = plenty.candidates().unwrap();
    let seconds = |demand: &Demand, c: &Strategy| pace.seconds_per_token(&demand.choice(*c));
    for inputs in [0, 2, 4] {
        let demand = plenty.pinning(inputs * input);
        let most = demand.total_bytes(Strategy::uniform(6, Policy::Keep, false));
        for budget in (1..=20).map(|part| most * part / 20) {
            let fitting = all.iter().filter(|candidate| demand.fits(**candidate, budget));
            let best = fitting.map(|c| seconds(&demand, c)).min_by(f64::total_cmp);
            let chosen = demand.choose(Limit::Budget(budget));
            let chosen = chosen.ok().map(|choice| seconds(&demand, &choice.strategy));
            assert_eq!(chosen, best, "{inputs} inputs, {budget} bytes");
        }
    }
    // Of ways that cannot be pinned the one that lacks the least is named.
    let offload = plenty.allowing(Activations::Offload, WeightsMode::Auto);
    let none = offload.pinning(0);
    let text = none.choose(Limit::Free(u64::MAX)).unwrap_err().to_string();
    let need = crate::byte_size::ByteSize(6 * input);
    assert!(
        text.contains(&format!("needs {need} of pinned memory there, 0 B can be had")),
        "{text}"
    );
}

/// Bytes of the frozen weights where the run computes.
fn weights_of(demand: &Demand, candidate: Strategy) -> u64 {
    demand.outside(&demand.choice(candidate)).weights.total()
}

/// With everything allowed on a GPU: what fits one budget fits a larger one, and no slower.
#[test]
fn more_memory_is_never_slower_and_no_plan_is_over_its_budget() {
    let configs = [
        (include_str!("../../../tests/data/configs/llama-3.1-8b.json"), 32),
        (include_str!("../../../tests/data/configs/qwen2.5-32b.json"), 64),
        (include_str!("../../../tests/data/configs/llama-3.3-70b.json"), 80),
    ];
    for (text, layers) in configs {
        let spec = spec_of(text);
        let weights = weights_on_gpu(&spec, true);
        let settings = settings(&spec, 4096);
        let demand = Demand { weights, ..on_gpu(&spec, &settings) };
        let pace = Pace::new(&demand);
        let (mut slowest, mut mixed) = (f64::INFINITY, 0);
        for gib in (4..200).step_by(5) {
            let budget = gib << 30;
            let Ok(choice) = demand.choose(Limit::Budget(budget)) else { continue };
            assert!(demand.total_bytes(choice.strategy) <= budget);
            let seconds = pace.seconds_per_token(&choice);
            assert!(seconds <= slowest, "{gib} GiB: {seconds:e} after {slowest:e}");
            slowest = seconds;
            let Strategy { kept, others, .. } = choice.strategy;
            let offloads = others.offloads();
            mixed += usize::from((1..layers).contains(&kept) && offloads);
        }
        assert!(mixed > 0, "blocks that keep beside blocks that offload");
        // All in memory, nothing recomputed.
        let keep = Strategy::uniform(layers, Policy::Keep, false);
        let free = demand.choose(Limit::Free(u64::MAX)).unwrap();
        assert_eq!(free.strategy, keep);
        assert_eq!(slowest, pace.seconds_per_token(&free));
        // Where not all of it fits, the embedding goes first; it costs less than a block.
        let all = demand.total_bytes(free.strategy);
        let without = |place| {
            let demand = demand.wishing(|wishes| wishes.embedding = place);
            demand.choose(Limit::Budget(all - 1)).unwrap().strategy
        };
        let chosen = without(EmbeddingPlace::Auto);
        assert_eq!(chosen, Strategy { on_host: OnHost::Input, ..keep });
        let weights = weights_of(&demand, keep) - weights_of(&demand, chosen);
        assert_eq!(weights, demand.weights.embedding);
        assert_eq!(without(EmbeddingPlace::Gpu).on_host, OnHost::Nothing);
        let host = demand.wishing(|wishes| wishes.embedding = EmbeddingPlace::Host);
        let host = host.choose(Limit::Free(u64::MAX)).unwrap();
        assert!(host.strategy.on_host == OnHost::All && host.settings.head_on_host);
        // As much less as embedding and head, but for what a head in tiles works in.
        let weights = weights_of(&demand, keep) - weights_of(&demand, host.strategy);
        assert_eq!(weights, demand.weights.embedding + demand.weights.head);
        let more = demand.plan(&host.settings).arena_bytes() as u64;
        let less = demand.plan(&demand.choice(keep).settings).arena_bytes() as u64;
        assert!(more < less + (100 << 20), "{more}, {less}");
        // The host must have room for what is offloaded or streamed.
        let poor = demand.pinning(0);
        match poor.choose(Limit::Budget(24 << 30)) {
            Ok(Choice { strategy, .. }) => assert_eq!(poor.pinned_for(strategy), 0),
            Err(error) => assert!(layers == 80, "{error}"),
        }
        let streamed = Strategy { stream: true, ..CHECKPOINT };
        let block = demand.weights.streamed.unwrap().block;
        assert_eq!(demand.pinned_for(streamed), 2 * block);
        assert!(demand.pinned(&demand.choice(streamed)) > 2 * block, "uploads are staged, too");
        let poor = poor.allowing(Activations::Offload, WeightsMode::Auto);
        let error = poor.choose(Limit::Budget(200 << 30)).unwrap_err().to_string();
        assert!(error.contains("of pinned memory there, 0 B can be had"), "{error}");
        assert!(error.contains("hint: `--activations keep` would need"), "{error}");
    }
}

/// What activations leave of a card is for weights in bf16: of as many blocks as are asked for and fit, or by
/// itself, where passes are short.
#[test]
fn what_memory_is_left_holds_weights() {
    let spec = spec_of(include_str!("../../../tests/data/configs/llama-3.1-8b.json"));
    let [packed, dense] = [true, false].map(|packed| weights_on_gpu(&spec, packed));
    let [short, long] = [256, 4096].map(|tokens| settings(&spec, tokens));
    let of = |settings| Demand { weights: packed, ..on_gpu(&spec, settings) };
    let keep = Strategy::uniform(32, Policy::Keep, false);
    let with = |blocks| Strategy { dequantized_blocks: blocks, ..keep };
    let chosen = |demand: &Demand, bytes| demand.choose(Limit::Budget(bytes)).unwrap().strategy;
    // q, k and v, o, gate, up, down, each with a rank of 16 below its rows, and room for it behind them.
    let (d, kv, f, r, room) = (4096u64, 1024, 14_336, 16, 64);
    let wide = (d + 2 * kv + 3 * r + d + r + 2 * (f + r)) * (d + room);
    let block = 2 * (wide + (d + r) * (f + room));
    for settings in [&short, &long] {
        let asked = of(settings).wishing(|wishes| {
            (wishes.dequantized_blocks, wishes.embedding) = (Some(31), EmbeddingPlace::Gpu);
        });
        let need = |blocks| asked.total_bytes(with(blocks));
        for blocks in [1, 2, 31] {
            let padding = (need(blocks) - need(0)).abs_diff(blocks as u64 * block);
            assert!(padding < blocks as u64 * 5 * 256);
            assert_eq!(chosen(&asked, need(blocks)), with(blocks));
            assert_eq!(chosen(&asked, need(blocks) - 1), with(blocks - 1));
        }
        assert_eq!(chosen(&asked, 2 * need(32)), with(31));
        let facts = asked.facts(&asked.choice(with(2)));
        assert_eq!(facts[1], "weights of 2 of 32 blocks stay dequantized");
    }
    let (short, long) = (of(&short), of(&long));
    let short = short.wishing(|wishes| wishes.embedding = EmbeddingPlace::Gpu);
    assert_eq!(chosen(&short, short.total_bytes(with(32))), with(32));
    assert_eq!(chosen(&short, short.total_bytes(with(12))), with(12));
    assert_eq!(chosen(&short, short.total_bytes(with(1))), with(0), "less than 1 % of a step");
    assert_eq!(chosen(&long, long.total_bytes(with(32))), with(0));
    // With room for one block none is dequantized for its gradients again.
    let pace = Pace::new(&long);
    let seconds = |blocks| {
        let strategy = Strategy { dequantized_blocks: blocks, ..CHECKPOINT };
        pace.seconds_per_token(&long.choice(strategy))
    };
    let saved = |blocks: usize| seconds(blocks - 1) - seconds(blocks);
    assert!(saved(1) > 10.0 * saved(2), "{:e}, {:e}", saved(1), saved(2));
    // Streamed ones leave, dense ones have nothing to keep, and the CPU has a cache.
    let asked = short.wishing(|wishes| wishes.dequantized_blocks = Some(32));
    for (mode, processor, blocks) in [
        (WeightsMode::Resident, Processor::Gpu, 32),
        (WeightsMode::Stream, Processor::Gpu, 1),
        (WeightsMode::Resident, Processor::Cpu, 0),
    ] {
        let demand = asked.computed_on(processor).wishing(|wishes| wishes.weights = mode);
        assert_eq!(chosen(&demand, u64::MAX).dequantized_blocks, blocks);
    }
    for mode in [WeightsMode::Resident, WeightsMode::Stream] {
        let demand = Demand { weights: dense, ..asked.wishing(|wishes| wishes.weights = mode) };
        let error = demand.choose(Limit::Budget(u64::MAX)).unwrap_err().to_string();
        assert!(error.contains("the weights of this base are not in 4 bits\nhint: "), "{error}");
        let none = demand.wishing(|wishes| wishes.dequantized_blocks = None);
        assert_eq!(chosen(&none, u64::MAX).dequantized_blocks, 0);
    }
}

/// In short passes weights that stay are worth more than an embedding on the GPU.
#[test]
fn more_memory_is_never_slower_in_short_passes() {
    let spec = spec_of(include_str!("../../../tests/data/configs/llama-3.1-8b.json"));
    let weights = weights_on_gpu(&spec, true);
    for tokens in [64, 256] {
        let settings = settings(&spec, tokens);
        let demand = Demand { weights, ..on_gpu(&spec, &settings) };
        let pace = Pace::new(&demand);
        let (mut slowest, mut elsewhere) = (f64::INFINITY, 0);
        for mib in (4000..24_000).step_by(300) {
            let Ok(choice) = demand.choose(Limit::Budget(mib << 20)) else { continue };
            let seconds = pace.seconds_per_token(&choice);
            // Less than 1 % is not worth the memory.
            let before = slowest / WORTH_MEMORY;
            assert!(seconds <= before, "{tokens} tokens, {mib} MiB: {seconds:e} {slowest:e}");
            slowest = seconds;
            let Strategy { on_host, dequantized_blocks, .. } = choice.strategy;
            elsewhere += usize::from(on_host == OnHost::Input && dequantized_blocks > 0);
        }
        assert!(elsewhere > 0, "{tokens} tokens");
    }
}

/// 32B with its embedding on the GPU by wish: the embedding is what is moved, nothing else.
#[test]
fn the_nearest_plan_changes_the_least() {
    let spec = spec_of(include_str!("../../../tests/data/configs/qwen2.5-32b.json"));
    let weights = weights_on_gpu(&spec, true);
    let settings = Settings { logit_rows: 220, ..settings(&spec, 4096) };
    let asked = Demand { weights, ..on_gpu(&spec, &settings) };
    let asked = asked.allowing(Activations::Checkpoint, WeightsMode::Resident);
    let asked = asked.wishing(|wishes| wishes.embedding = EmbeddingPlace::Gpu);
    let leanest = asked.leanest().unwrap().strategy;
    let least = asked.total_bytes(leanest);
    let says = |bytes| asked.choose(Limit::Budget(bytes)).unwrap_err().to_string();
    let text = says(least - 1);
    assert!(text.contains("hint: `--embedding host-input` would need"), "{text}");
    let all = Strategy { on_host: OnHost::All, ..leanest };
    let text = says(asked.total_bytes(all));
    assert!(text.contains("hint: `--embedding host` would need"), "{text}");
    let text = says(asked.total_bytes(all) - (64 << 20));
    assert!(text.contains("hint: `--weights stream` would need"), "{text}");
    // One change of several at once comes before the optimizer, which changes the result.
    let text = says(4 << 30);
    for flag in ["--weights stream", "--embedding host", "--activations offload"] {
        assert!(text.contains(flag), "{text}");
    }
    assert!(!text.contains("adamw_8bit"), "{text}");
}

/// What is typed does what is said: ranks of patterns stay, those of an adapter are its own.
#[test]
fn a_hint_of_a_rank_is_what_the_flag_does() {
    let spec = golden();
    let mut settings = settings(&spec, 64);
    settings.targets.iter_mut().for_each(|target| target.shape.rank = 16);
    settings.targets[0].shape.rank = 64;
    let auto = demand(&spec, &settings);
    let with = |rank| {
        let settings = auto.with_rank(&settings, rank);
        let ranks: Vec<usize> = settings.targets.iter().map(|target| target.shape.rank).collect();
        assert!(ranks[0] == 64 && ranks[1..].iter().all(|r| *r == rank), "{ranks:?}");
        auto.at(&settings).total_bytes(auto.at(&settings).leanest().unwrap().strategy)
    };
    let says =
        |demand: &Demand, bytes| demand.choose(Limit::Budget(bytes)).unwrap_err().to_string();
    let text = says(&auto, with(4));
    let need = crate::byte_size::ByteSize(with(4));
    assert!(text.ends_with(&format!("hint: `--lora-r 4` would need {need}")), "{text}");
    let text = says(&auto, 1000);
    let need = crate::byte_size::ByteSize(with(1));
    assert!(text.contains(&format!("trained in is {need}, with `--lora-r 1`; ")), "{text}");
    let fixed = auto.wishing(|wishes| wishes.lora_r = None);
    let text = says(&fixed, 1000);
    let need = crate::byte_size::ByteSize(with(16));
    assert!(
        !text.contains("--lora-r") && text.contains(&format!("trained in is {need}; ")),
        "{text}"
    );
}

/// Rows of logits that were asked for are not lowered; that they would have to be is said.
#[test]
fn sizes_that_were_asked_for_are_kept() {
    let spec = golden();
    let settings = Settings { logit_rows: 1024, ..settings(&spec, 1024) };
    let auto = demand(&spec, &settings);
    let asked = auto.wishing(|wishes| wishes.logit_rows_given = true);
    let least = asked.total_bytes(asked.leanest().unwrap().strategy);
    assert!(auto.total_bytes(auto.leanest().unwrap().strategy) < least);
    for bytes in [least, 2 * least, u64::MAX] {
        assert_eq!(asked.choose(Limit::Budget(bytes)).unwrap().settings.logit_rows, 1024);
    }
    let text = asked.choose(Limit::Budget(least - 1)).unwrap_err().to_string();
    assert!(text.contains("hint: ") && text.contains("`--logits-chunk-length 64`"), "{text}");
}
