//! How long a step takes, about: what plans that fit are compared by.
//!
//! ```text
//! step = max(compute + dequantize + logits, copies) + 2 % of copies + files + rows + tiles
//! compute    = 2·(multiply-adds, recomputed ones included) / rate of products
//! dequantize = 2.5 bytes · (weights of the blocks, once a pass, tile and direction) / rate of memory;
//!              where a GPU has room for those of N blocks in bf16, those of all others, once a direction;
//!              a quarter of it where it dequantizes ahead, beside the products; nothing of a dense base
//! logits     = bytes of the head, twice a chunk of logits / rate of memory
//! copies     = bytes to a GPU, or from the files of streamed weights, behind the computation
//! rows       = the tokens' rows of an embedding on the host, over the bus
//! tiles      = of a head on the host: a third product with it, and what products do not hide of its copies
//! files      = what is offloaded on the CPU, written and read
//! ```

use super::budget::{Choice, Demand};
use super::embedding::OnHost;
use super::processor::Processor;
use super::rates::{
    DRIVE_BYTES_PER_SECOND, GPU_FLOPS_PER_SECOND, GPU_MEMORY_BYTES_PER_SECOND,
    PCIE_BYTES_PER_SECOND, THREAD_CACHE_BYTES_PER_SECOND, THREAD_FLOPS_PER_SECOND,
};
use super::settings::{Policy, Settings};
use super::strategy::Strategy;
use super::work::{Transfer, Work};
use crate::model::spec::BlockHalf;

/// Bytes that dequantizing a weight moves: read as 4 bits and a scale, written as bf16 (on the CPU, as f32
/// that stays in the cache).
const BYTES_TO_DEQUANTIZE: f64 = 2.5;
/// Share of the time of dequantizing that stays beside products, which share the multiprocessors and the
/// memory with it.
const DEQUANTIZED_BESIDE: f64 = 0.25;
/// Share of the time of copies that stays though they hide behind the computation.
const EXPOSED_SHARE: f64 = 0.02;

/// Rates of the processor that a step runs on.
#[derive(Debug, Clone, Copy)]
struct Rates {
    flops: f64,
    memory: f64,
    copies: f64,
}

impl Rates {
    fn of(processor: Processor, threads: usize) -> Self {
        let threads = threads as f64;
        match processor {
            Processor::Gpu => Rates {
                flops: GPU_FLOPS_PER_SECOND,
                memory: GPU_MEMORY_BYTES_PER_SECOND,
                copies: PCIE_BYTES_PER_SECOND,
            },
            Processor::Cpu => Rates {
                flops: THREAD_FLOPS_PER_SECOND * threads,
                memory: THREAD_CACHE_BYTES_PER_SECOND * threads,
                copies: DRIVE_BYTES_PER_SECOND,
            },
        }
    }
}

/// What a step of a model costs, before its policies are chosen.
pub(super) struct Pace<'a> {
    demand: &'a Demand<'a>,
    rates: Rates,
    work: Work,
    /// Weights of a block: attention's, and the MLP's.
    elements: [f64; 2],
}

impl<'a> Pace<'a> {
    /// The pace of a model in documents as long as those of `demand`.
    pub fn new(demand: &'a Demand) -> Self {
        let linears = demand.spec.linears(0);
        let elements = |half: BlockHalf| -> f64 {
            let here = linears.iter().filter(|linear| BlockHalf::of(linear.role) == half);
            here.map(|linear| (linear.in_features * linear.out_features) as f64).sum()
        };
        Pace {
            demand,
            rates: Rates::of(demand.machine.processor, demand.settings.threads),
            work: Work::of_token(demand.spec, demand.settings.longest_document),
            elements: [BlockHalf::Attention, BlockHalf::Mlp].map(elements),
        }
    }

    /// Seconds for a token of a step.
    pub fn seconds_per_token(&self, choice: &Choice) -> f64 {
        let Choice { strategy: Strategy { stream, on_host, .. }, settings } = choice;
        let (rates, spec, weights) = (self.rates, self.demand.spec, &self.demand.weights);
        let (layers, tokens) = (spec.num_layers, settings.tokens);
        let share = 1.0 - settings.count(Policy::Keep) as f64 / layers as f64;
        let offloaded = self.demand.plan(settings).offloaded_bytes() as u64;
        let (in_copies, in_files) = match self.demand.machine.processor {
            Processor::Gpu => (offloaded, 0),
            Processor::Cpu => (0, 2 * offloaded),
        };
        let block = weights.streamed.filter(|_| *stream).map_or(0, |weights| weights.block);
        let work = self.work.of_step(settings);
        let transfer = Transfer::new(layers, block, in_copies, tokens, work);
        let products = transfer.flops / rates.flops;
        let compute = products
            + self.dequantizing(settings, share, products)
            + self.reading_the_head(settings) / rates.memory;
        let copies = transfer.bytes as f64 / rates.copies;
        let files = in_files as f64 / DRIVE_BYTES_PER_SECOND;
        let rows = if *on_host == OnHost::Nothing { 0 } else { 2 * tokens * spec.hidden_size };
        let rows = rows as f64 / rates.copies;
        let tiles = if *on_host == OnHost::All { self.tiles_of_the_head(settings) } else { 0.0 };
        (compute.max(copies) + EXPOSED_SHARE * copies + files + rows + tiles) / tokens as f64
    }

    /// Seconds that a head on the host adds: logits are made twice, and its tiles come twice for each
    /// chunk of rows, behind one product and behind two; with one buffer, behind none.
    fn tiles_of_the_head(&self, settings: &Settings) -> f64 {
        let head = (self.demand.spec.vocab_size * self.demand.spec.hidden_size) as f64;
        let product = 2.0 * head * settings.tokens as f64 / self.rates.flops;
        let copy = self.chunks(settings) * 2.0 * head / self.rates.copies;
        let beside = |products: f64| if settings.dequantize_ahead { products } else { 0.0 };
        let wait = |products: f64| (copy - beside(products)).max(0.0);
        let waits = wait(product) + wait(2.0 * product);
        product + waits + EXPOSED_SHARE * 2.0 * copy
    }

    fn chunks(&self, settings: &Settings) -> f64 {
        let rows = settings.head(self.demand.spec.vocab_size).rows;
        settings.tokens.div_ceil(rows.max(1)) as f64
    }

    /// Seconds that dequantizing the blocks' weights adds to a step whose products take `products`.
    fn dequantizing(&self, settings: &Settings, share: f64, products: f64) -> f64 {
        let (demand, [attention, mlp]) = (self.demand, self.elements);
        if !demand.weights.packs_linears() {
            return 0.0;
        }
        let layers = demand.spec.num_layers as f64;
        let weights = match settings.dequantized_blocks {
            0 => {
                let tiles = settings.tokens.div_ceil(settings.mlp_tile().max(1)) as f64;
                (2.0 + share) * layers * (attention + tiles * mlp)
            }
            // Both passes begin with the blocks that the one before has left there.
            blocks => 2.0 * (layers - blocks as f64).max(0.0) * (attention + mlp),
        };
        let seconds = BYTES_TO_DEQUANTIZE * weights / self.rates.memory;
        match (demand.machine.processor, settings.dequantize_ahead) {
            (Processor::Gpu, true) => seconds - (1.0 - DEQUANTIZED_BESIDE) * seconds.min(products),
            _ => seconds,
        }
    }

    /// Bytes of the head that each chunk of logits reads, forward and backward.
    fn reading_the_head(&self, settings: &Settings) -> f64 {
        let spec = self.demand.spec;
        let head = 2.0 * (spec.vocab_size * spec.hidden_size) as f64;
        2.0 * self.chunks(settings) * head
    }
}
