use super::*;
use crate::adapter::LoraConfig;
use crate::kernels::cuda::{AttnImplementation, cuda_layout};
use crate::model::families::spec_from_config;
use crate::plan::EmbeddingPlace;
use crate::plan::budget::{Limit, Wishes};
use crate::plan::{Machine, Processor, StreamedBytes, WeightBytes, WeightParts};

fn with_demand<R>(test: impl FnOnce(&Demand) -> R) -> R {
    let text = include_str!("../../../tests/data/models/llama_s0/config.json");
    let mut spec = spec_from_config(&serde_json::from_str(text).unwrap()).unwrap();
    spec.num_layers = 6;
    spec.windows = vec![None; 6];
    let settings = Settings {
        longest_document: 512,
        targets: LoraConfig { r: 64, ..LoraConfig::default() }.resolve(&spec).unwrap(),
        threads: 2,
        ..Settings::of_pass(1024, logit_rows(&spec, 1024, None, Processor::Cpu))
    };
    test(&Demand {
        spec: &spec,
        weights: WeightBytes {
            resident: WeightParts { codes: 9 << 20, ..WeightParts::default() },
            streamed: Some(StreamedBytes::of_vectors(2 << 20)),
            embedding: 0,
            head: 0,
            packs_any: true,
        },
        settings: &settings,
        machine: Machine {
            processor: Processor::Cpu,
            layout: &crate::plan::layout,
            process_bytes: 1 << 20,
            pinned_bytes: u64::MAX,
        },
        wishes: Wishes { lora_r: Some(64), ..Wishes::default() },
    })
}

/// 8B in 4 bits on a GPU.
fn with_8b<R>(test: impl FnOnce(&Demand) -> R) -> R {
    let text = include_str!("../../../tests/data/configs/llama-3.1-8b.json");
    let spec = spec_from_config(&serde_json::from_str(text).unwrap()).unwrap();
    let format = Some(nibble_quant::BlockFormat::default());
    let bf16 = nibble_quant::FloatType::Bf16;
    let weights = WeightBytes::of_config(&spec, bf16, format.as_ref(), Processor::Gpu);
    with_demand(|demand| {
        let targets = LoraConfig::default().resolve(&spec).unwrap();
        let settings = Settings { targets, ..demand.settings.clone() };
        let layout =
            &|spec: &_, settings: &_| cuda_layout(spec, settings, AttnImplementation::Auto);
        let machine = Machine { processor: Processor::Gpu, layout, ..demand.machine };
        test(&Demand { spec: &spec, weights, settings: &settings, machine, ..demand.clone() })
    })
}

const ASKED: Asked = Asked { batch: 2, accumulation: 2, length: 512, logits_chunk: None };

#[test]
fn the_limits_are_the_last_sizes_that_fit() {
    with_demand(|demand| {
        let keep = Strategy::uniform(6, Policy::Keep, false);
        let budget = demand.total_bytes(keep) + 1000;
        let plan = demand.choose(Limit::Budget(budget)).unwrap();
        let fit = Fit::new(demand, ASKED, Limit::Budget(budget), &plan);
        assert!(fit.fits && fit.bytes == budget - 1000);
        assert_eq!(fit.ways.len(), 10);
        assert!(fit.ways.iter().any(|way| way.strategy == fit.plan.strategy), "{:?}", fit.plan);
        for way in &fit.ways {
            let whole = Strategy::uniform(6, way.strategy.others, way.strategy.stream);
            let pieces = Strategy { pieces: Pieces::ALL, ..whole };
            let bytes = |batch, length| {
                let settings = ASKED.sized(demand, batch, length);
                demand
                    .at(&settings)
                    .total_bytes(whole)
                    .min(demand.at(&settings).total_bytes(pieces))
            };
            assert!(bytes(1, way.longest_document) <= budget);
            assert!(bytes(1, way.longest_document + LENGTH_STEP) > budget);
            assert!(bytes(way.largest_batch, 512) <= budget);
            assert!(bytes(way.largest_batch + 1, 512) > budget);
            assert_eq!(way.bytes, demand.total_bytes(whole));
        }
        let [first, recomputed, offloaded] = [0, 1, 2].map(|way| &fit.ways[way]);
        assert!(
            first.strategy.others == Policy::Keep && !first.strategy.stream && first.time == 1.0
        );
        assert!(recomputed.time > 1.15 && recomputed.time < 1.5, "{recomputed:?}");
        assert!(offloaded.time > recomputed.time, "to a drive");
        assert!(offloaded.bytes < recomputed.bytes && recomputed.bytes < first.bytes);
        assert!(recomputed.longest_document > first.longest_document);
    });
}

/// In whole steps of 64, and up to some length: what was asked for, and fits, is in neither.
#[test]
fn the_longest_document_is_no_shorter_than_one_that_fits() {
    with_demand(|demand| {
        for (length, large) in [(100, false), (MOST_TOKENS + 100, true)] {
            let asked = Asked { batch: 1, accumulation: 1, length, logits_chunk: None };
            let settings = asked.sized(demand, 1, length);
            let demand = demand.at(&settings);
            let keep = Strategy::uniform(6, Policy::Keep, false);
            let budget = demand.total_bytes(Strategy { pieces: Pieces::ALL, ..keep });
            let limit = Limit::Budget(budget);
            let fit = Fit::new(&demand, asked, limit, &demand.choose(limit).unwrap());
            let kept = fit.ways.iter().find(|way| way.strategy.kept == 6).unwrap();
            assert_eq!((kept.longest_document, kept.largest_batch), (length, 1));
            assert_eq!(fit.ways.iter().all(|way| way.longest_document == length), large);
        }
    });
}

/// 8B on a card of 24 GiB, rows of 256 tokens: dequantizing the weights for few tokens does not pay.
#[test]
fn the_fastest_micro_batch_fits_and_no_other_one_is_faster() {
    with_8b(|demand| {
        let demand = demand.wishing(|wishes| wishes.dequantized_blocks = Some(0));
        let asked = |batch, accumulation| {
            let asked = Asked { batch, accumulation, length: 256, logits_chunk: None };
            let settings = asked.sized(&demand, batch, 256);
            (asked, settings)
        };
        // What a token takes with the best plan of a micro-batch, by hand.
        let best = |batch: usize, bytes: u64| {
            let (_, settings) = asked(batch, 1);
            let demand = demand.at(&settings);
            let choice = demand.within(bytes)?;
            Some(Pace::new(&demand).seconds_per_token(&choice))
        };
        let limit = Limit::Budget(24 << 30);
        let fastest = |batch, accumulation| {
            let (asked, settings) = asked(batch, accumulation);
            let demand = demand.at(&settings);
            let plan = demand.choose(limit).or_else(|_| demand.leanest()).unwrap();
            Fit::new(&demand, asked, limit, &plan).fastest
        };
        let found = fastest(1, 48).unwrap();
        assert!(found.plan.bytes <= 24 << 30 && found.time < 0.95, "{found:?}");
        assert!(found.batch > 4 && found.plan.strategy.kept > 24, "{found:?}");
        assert_eq!(found.batch * found.accumulation, 48);
        let seconds = best(found.batch, 24 << 30).unwrap();
        assert!((seconds / best(1, 24 << 30).unwrap() / found.time - 1.0).abs() < 1e-9);
        for batch in [1, 2, 3, 4, 6, 8, 12, 16, 24, 48] {
            let other = best(batch, 24 << 30);
            assert!(other.is_none_or(|other| other >= seconds / 1.01), "{batch}: {found:?}");
            let again = fastest(batch, 48 / batch);
            // From where it is as fast, nothing is to be gained; where it does not fit, what does.
            let gain = other.is_none_or(|other| seconds < 0.97 * other);
            assert_eq!(again.is_some(), gain && batch != found.batch, "{batch}: {again:?}");
            if let Some(again) = again {
                assert_eq!((again.batch, &again.plan.words), (found.batch, &found.plan.words));
            }
        }
        let flags = format!(
            "--per-device-train-batch-size {} --gradient-accumulation-steps {} --activations ",
            found.batch, found.accumulation
        );
        assert!(found.plan.flags.starts_with(&flags), "{found:?}");
        assert!(found.plan.flags.ends_with(" --memory-budget 24GiB"), "{found:?}");
        // Where weights stay dequantized, few tokens cost little.
        let settings = asked(1, 48).1;
        let demand = demand.at(&settings).wishing(|wishes| wishes.dequantized_blocks = None);
        let choice = demand.within(24 << 30).unwrap();
        assert!(choice.strategy.kept == 32 && choice.strategy.dequantized_blocks > 24);
        let seconds = Pace::new(&demand).seconds_per_token(&choice);
        assert!(seconds < 0.95 * best(1, 24 << 30).unwrap());
    });
}

/// 8B on a card of 24 GiB, rows of 256 tokens: the weights of all blocks stay dequantized.
#[test]
fn weights_that_stay_are_a_knob_and_in_no_row() {
    with_8b(|demand| {
        let asked = Asked { batch: 1, accumulation: 1, length: 256, logits_chunk: None };
        let settings = asked.sized(demand, 1, 256);
        let (demand, limit) = (demand.at(&settings), Limit::Budget(24 << 30));
        let plan = demand.choose(limit).unwrap();
        let fit = Fit::new(&demand, asked, limit, &plan);
        assert_eq!(fit.plan.strategy.dequantized_blocks, 32);
        assert!(fit.plan.flags.contains(" --dequantized-blocks 32 "), "{}", fit.plan.flags);
        assert!(fit.ways.iter().all(|way| way.strategy.dequantized_blocks == 0));
        let knob = |flags: &str| fit.knobs.iter().find(|knob| knob.flags == flags).unwrap();
        let with = |stream, dequantized_blocks| {
            demand.total_bytes(Strategy { stream, dequantized_blocks, ..plan.strategy })
        };
        let none = knob("--dequantized-blocks 0");
        assert!(none.bytes == with(false, 0) && none.time > 1.05, "{none:?}");
        // Streamed weights leave.
        let stream = knob("--weights stream");
        assert!(stream.bytes == with(true, 1) && stream.time > 1.05, "{stream:?}");
    });
}

#[test]
fn every_knob_says_what_it_changes() {
    with_demand(|demand| {
        let plan = demand.choose(Limit::Free(u64::MAX)).unwrap();
        let bytes = demand.total_bytes(plan.strategy);
        let fit = Fit::new(demand, ASKED, Limit::Budget(bytes), &plan);
        let flags: Vec<&str> = fit.knobs.iter().map(|knob| knob.flags.as_str()).collect();
        let expected = [
            "--activations attention",
            "--activations offload-attention",
            "--activations checkpoint",
            "--activations offload",
            "--weights stream",
            "--per-device-train-batch-size 1",
            "--max-length 256",
            "--mlp-tile-length 256",
            "--logits-chunk-length 256",
            "--optim adamw_8bit",
            "--adapter-dtype f32",
            "--lora-r 32",
        ];
        assert_eq!(flags, expected);
        assert!(fit.knobs.iter().all(|knob| knob.bytes < bytes), "{:?}", fit.knobs);
        let time = |flags: &str| fit.knobs.iter().find(|k| k.flags == flags).unwrap().time;
        assert!(time("--activations checkpoint") > 1.15);
        assert!(time("--activations attention") < time("--activations checkpoint"));
        assert!(time("--activations offload") > time("--activations checkpoint"));
        assert!(time("--activations offload-attention") > time("--activations attention"));
        assert_eq!(time("--adapter-dtype f32"), 1.0);
    });
}

/// The row of the plan's way is the plan, whatever pieces and places that needs.
#[test]
fn the_row_of_a_plan_is_the_plan() {
    with_8b(|demand| {
        let settings = ASKED.sized(demand, 2, 512);
        let demand = demand.at(&settings);
        for mib in (3_000..9_000).step_by(457) {
            let limit = Limit::Budget(mib << 20);
            for embedding in [EmbeddingPlace::Auto, EmbeddingPlace::Gpu] {
                let demand = demand.wishing(|wishes| {
                    (wishes.embedding, wishes.dequantized_blocks) = (embedding, Some(0));
                });
                let Ok(plan) = demand.choose(limit) else { continue };
                let fit = Fit::new(&demand, ASKED, limit, &plan);
                let row = fit.ways.iter().find(|way| {
                    let Strategy { kept, others, attended, remaking_attention, stream, .. } =
                        plan.strategy;
                    let own = way.strategy;
                    (own.kept, own.attended, own.remaking_attention, own.stream)
                        == (kept, attended, remaking_attention, stream)
                        && (own.others == others || kept == 32)
                });
                let row = row.unwrap_or_else(|| panic!("{:?}", plan.strategy));
                assert_eq!((row.bytes, row.strategy), (fit.bytes, plan.strategy), "{mib}");
            }
        }
    });
}
