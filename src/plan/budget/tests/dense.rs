//! Bases that are not in 4-bit blocks: products read their weights as they lie.

use super::*;
use crate::plan::{Component, Settings};

fn buffers(demand: &Demand, settings: &Settings) -> usize {
    let parts = demand.plan(settings).by_component();
    let buffers = parts.into_iter().find(|(part, _)| *part == Component::DequantizedWeight);
    buffers.map_or(0, |(_, bytes)| bytes)
}

#[test]
fn nothing_is_dequantized_of_a_dense_base() {
    let spec = spec_of(include_str!("../../../../tests/data/configs/llama-3.1-8b.json"));
    let settings = settings(&spec, 8192);
    let tiles = Pieces { tiles: true, ..Pieces::NONE };
    for processor in [Processor::Cpu, Processor::Gpu] {
        for (packed, dequantizes) in [(true, true), (false, false)] {
            let weights = weights_on_gpu(&spec, packed);
            let demand = Demand { weights, ..on_gpu(&spec, &settings) }.computed_on(processor);
            let pace = Pace::new(&demand);
            let seconds =
                |pieces| pace.seconds_per_token(&demand.choice(Strategy { pieces, ..CHECKPOINT }));
            // Each tile of the MLP would dequantize its weights again.
            assert_eq!(seconds(tiles) > seconds(Pieces::NONE), dequantizes, "{processor:?}");
        }
    }
}

/// A head on the host comes in tiles of 8,192 rows, one at work and one on its way.
#[test]
fn a_dense_base_has_buffers_for_the_tiles_of_a_head_alone() {
    let spec = spec_of(include_str!("../../../../tests/data/configs/llama-3.1-8b.json"));
    let settings = settings(&spec, 512);
    let demand = Demand { weights: weights_on_gpu(&spec, false), ..on_gpu(&spec, &settings) };
    let of = |on_host, pieces| {
        buffers(&demand, &demand.choice(Strategy { on_host, pieces, ..CHECKPOINT }).settings)
    };
    let tile = 2 * 8192 * spec.hidden_size;
    let one_buffer = Pieces { one_buffer: true, ..Pieces::NONE };
    assert_eq!(of(OnHost::Nothing, Pieces::NONE), 0);
    assert_eq!(of(OnHost::All, Pieces::NONE), 2 * tile);
    assert_eq!(of(OnHost::All, one_buffer), tile);
    let packed = Demand { weights: weights_on_gpu(&spec, true), ..demand.clone() };
    assert!(buffers(&packed, &packed.choice(CHECKPOINT).settings) > 2 * tile);
    // Fewer buffers are a way out only where there are any.
    let ways = |place| demand.wishing(|wishes| wishes.embedding = place).pieces().count();
    assert_eq!((ways(EmbeddingPlace::Gpu), ways(EmbeddingPlace::Auto)), (4, 8));
}
