//! AdamW with moments in 8 bits, for one tensor.
//!
//! A moment is `map[code] · absmax` of its block of 256. A step widens both, makes
//! [`AdamW`](super::adamw::AdamW)'s update in f32, and stores the codes of the map's values that are
//! nearest to `moment / absmax` with the block's new absmax. The maps are bitsandbytes' dynamic
//! maps, signed for the first moment and unsigned for the second. Fresh moments are zero bytes: an
//! absmax of 0 makes every code 0.
//! Source: Dettmers et al., arXiv 2110.02861; twin of `src/kernels/cuda/device/adamw_8bit.cuh`.

use half::bf16;
use nibble_quant::codebook::{dynamic_map, unsigned_dynamic_map};
use rayon::prelude::*;

use super::adamw::{Coefficients, update_run};
use super::backend::Update;
use super::buffers::Buffers;
use crate::kernels::cpu::Cpu;
use crate::model::parameters::{MomentBlocks, OptimizerView};
use crate::plan::MomentPlace;
use crate::plan::moments::MOMENT_BLOCK;

/// One moment of a tensor.
pub struct PackedMoment<'a> {
    /// A byte for each element.
    pub codes: &'a mut [u8],
    /// A scale for each block.
    pub absmax: &'a mut [f32],
}

/// A tensor's weights and what is known of them.
pub struct TensorSlices<'a> {
    /// f32 weights.
    pub master: &'a mut [f32],
    /// f32 gradients.
    pub gradients: &'a mut [f32],
    /// bf16 copies of the weights, if the forward pass reads those.
    pub working: Option<&'a mut [bf16]>,
}

/// A tensor's moments.
enum Moments<'a> {
    Floats([&'a mut [f32]; 2]),
    Packed([PackedMoment<'a>; 2]),
}

impl Update<'_> {
    /// Makes the update on the CPU where some tensors have moments in 8 bits.
    pub(super) fn apply_packed(&self, view: OptimizerView<'_, Cpu>) {
        let ranges = view.tensors.iter().map(|tensor| tensor.range.clone());
        let tensors: Vec<_> = ranges.zip(tensors(view)).collect();
        tensors.into_par_iter().for_each(|(range, (weights, moments))| {
            let Some(rate) = self.rate(&range) else { return };
            let coefficients = self.optimizer.coefficients(self.step, rate, self.gradient_scale);
            match moments {
                Moments::Packed([first, second]) => {
                    update_tensor(&coefficients, weights, first, second);
                }
                Moments::Floats([first_moment, second_moment]) => {
                    let TensorSlices { master, gradients, working } = weights;
                    let buffers =
                        Buffers { master, gradients, first_moment, second_moment, working };
                    update_run(&coefficients, buffers);
                }
            }
        });
    }

    /// Makes the update of one tensor whose moments are in 8 bits; it is all of the first group. For tests.
    pub fn apply_to_packed(
        &self,
        weights: TensorSlices<'_>,
        [first, second]: [PackedMoment<'_>; 2],
    ) {
        let rate = self.learning_rate * self.groups[0].multiplier;
        let coefficients = self.optimizer.coefficients(self.step, rate, self.gradient_scale);
        update_tensor(&coefficients, weights, first, second);
    }
}

/// The flat buffers tensor by tensor.
fn tensors<'a>(view: OptimizerView<'a, Cpu>) -> Vec<(TensorSlices<'a>, Moments<'a>)> {
    let OptimizerView { master, gradients, moments: [first, second], .. } = view;
    let (mut master, mut gradients): (&mut [f32], &mut [f32]) = (master, gradients);
    let mut working: Option<&mut [bf16]> = view.working.map(|working| &mut **working);
    let mut floats: [&mut [f32]; 2] = [&mut first.floats, &mut second.floats];
    let mut packed = [&mut first.blocks, &mut second.blocks].map(|blocks| {
        let MomentBlocks { codes, absmax } = blocks.as_mut().expect("8-bit moments are planned");
        PackedMoment::of_words(codes, absmax)
    });
    let tensors = view.tensors.iter().zip(&view.places.places).map(|(tensor, place)| {
        let elements = tensor.range.len();
        let weights = TensorSlices {
            master: front(&mut master, elements),
            gradients: front(&mut gradients, elements),
            working: working.as_mut().map(|working| front(working, elements)),
        };
        let moments = match place {
            MomentPlace::Floats(_) => {
                Moments::Floats(floats.each_mut().map(|floats| front(floats, elements)))
            }
            MomentPlace::Blocks(blocks) => {
                let [first, second] = &mut packed;
                Moments::Packed([first, second].map(|rest| PackedMoment {
                    codes: &mut front(&mut rest.codes, blocks.len() * MOMENT_BLOCK)[..elements],
                    absmax: front(&mut rest.absmax, blocks.len()),
                }))
            }
        };
        (weights, moments)
    });
    tensors.collect()
}

/// Cuts off the first `elements`.
fn front<'a, T>(rest: &mut &'a mut [T], elements: usize) -> &'a mut [T] {
    rest.split_off_mut(..elements).expect("the plan has room for every tensor")
}

/// One update, block by block.
fn update_tensor(
    coefficients: &Coefficients,
    weights: TensorSlices<'_>,
    first: PackedMoment<'_>,
    second: PackedMoment<'_>,
) {
    let blocks = weights.master.chunks_mut(MOMENT_BLOCK);
    let blocks = blocks.zip(weights.gradients.chunks_mut(MOMENT_BLOCK));
    let mut working = weights.working.map(|working| working.chunks_mut(MOMENT_BLOCK));
    let (mut first, mut second) = (first.blocks(), second.blocks());
    for (master, gradients) in blocks {
        let moments = first.next().zip(second.next()).expect("a scale for each block");
        let ((first_codes, first_absmax), (second_codes, second_absmax)) = moments;
        let (mut wide_first, mut wide_second) = ([0.0; MOMENT_BLOCK], [0.0; MOMENT_BLOCK]);
        let (first_moment, second_moment) =
            (&mut wide_first[..master.len()], &mut wide_second[..master.len()]);
        widen(dynamic_map(), first_codes, *first_absmax, first_moment);
        widen(unsigned_dynamic_map(), second_codes, *second_absmax, second_moment);
        let working = working.as_mut().and_then(Iterator::next);
        let buffers = Buffers {
            master,
            gradients,
            first_moment: &mut *first_moment,
            second_moment: &mut *second_moment,
            working,
        };
        update_run(coefficients, buffers);
        *first_absmax = narrow(dynamic_map(), first_moment, first_codes);
        *second_absmax = narrow(unsigned_dynamic_map(), second_moment, second_codes);
    }
}

impl<'a> PackedMoment<'a> {
    fn of_words(codes: &'a mut [f32], absmax: &'a mut [f32]) -> Self {
        PackedMoment { codes: bytemuck::cast_slice_mut(codes), absmax }
    }

    fn blocks(self) -> impl Iterator<Item = (&'a mut [u8], &'a mut f32)> {
        self.codes.chunks_mut(MOMENT_BLOCK).zip(self.absmax)
    }
}

fn widen(map: &[f32; 256], codes: &[u8], absmax: f32, moments: &mut [f32]) {
    for (moment, &code) in moments.iter_mut().zip(codes) {
        *moment = map[usize::from(code)] * absmax;
    }
}

/// Writes the codes; returns the absmax.
fn narrow(map: &[f32; 256], moments: &[f32], codes: &mut [u8]) -> f32 {
    let absmax = moments.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    for (code, moment) in codes.iter_mut().zip(moments) {
        *code = nearest_code(map, if absmax > 0.0 { moment / absmax } else { 0.0 });
    }
    absmax
}

/// Code of the value of an ascending `map` that is nearest to `x`; the lower one of two.
fn nearest_code(map: &[f32; 256], x: f32) -> u8 {
    let mut below = 0u8;
    for step in [128, 64, 32, 16, 8, 4, 2, 1] {
        below += if map[usize::from(below + step)] <= x { step } else { 0 };
    }
    let above = below.saturating_add(1);
    let distance = (map[usize::from(above)] - x, x - map[usize::from(below)]);
    if distance.0 < distance.1 { above } else { below }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::super::adamw::{AdamW, RateGroup};
    use super::*;

    /// Made by `scripts/golden/gen_optimizer.py`.
    const GOLDEN: &[u8] = include_bytes!(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/data/train/adamw_8bit.safetensors"
    ));
    const ELEMENTS: usize = 11 * 383;
    const STEPS: u64 = 6;
    const OPTIMIZER: AdamW = AdamW { beta1: 0.9, beta2: 0.99, epsilon: 1e-6, weight_decay: 0.05 };

    fn floats(file: &SafeTensors, name: &str) -> Vec<f32> {
        let data = file.tensor(name).unwrap().data().to_vec();
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn gradients(file: &SafeTensors, step: u64) -> Vec<f32> {
        let data = file.tensor(&format!("large.grad.{step}")).unwrap().data().to_vec();
        let bits = data.chunks_exact(2).map(|b| u16::from_le_bytes(b.try_into().unwrap()));
        bits.map(|bits| bf16::from_bits(bits).to_f32()).collect()
    }

    #[derive(Clone)]
    struct State {
        master: Vec<f32>,
        codes: [Vec<u8>; 2],
        absmax: [Vec<f32>; 2],
    }

    impl State {
        fn fresh(file: &SafeTensors) -> Self {
            let blocks = ELEMENTS.div_ceil(MOMENT_BLOCK);
            let (codes, absmax) = (vec![0; ELEMENTS], vec![0.0; blocks]);
            let master = floats(file, "large.0");
            State { master, codes: [codes.clone(), codes], absmax: [absmax.clone(), absmax] }
        }

        /// The state of bitsandbytes after `step`.
        fn golden(file: &SafeTensors, step: u64) -> Self {
            let codes = |n| file.tensor(&format!("large.state{n}.{step}")).unwrap().data().to_vec();
            let absmax = |n| floats(file, &format!("large.absmax{n}.{step}"));
            let master = floats(file, &format!("large.{step}"));
            State { master, codes: [codes(1), codes(2)], absmax: [absmax(1), absmax(2)] }
        }

        fn step(&mut self, step: u64, mut gradients: Vec<f32>) {
            let groups = [RateGroup { range: 0..ELEMENTS, multiplier: 1.0 }];
            let update = Update {
                optimizer: &OPTIMIZER,
                groups: &groups,
                step,
                learning_rate: 3e-3,
                gradient_scale: 1.0,
            };
            let State { master, codes: [first, second], absmax: [first_absmax, second_absmax] } =
                self;
            let weights = TensorSlices { master, gradients: &mut gradients, working: None };
            let moments = [
                PackedMoment { codes: first, absmax: first_absmax },
                PackedMoment { codes: second, absmax: second_absmax },
            ];
            update.apply_to_packed(weights, moments);
        }
    }

    /// Largest difference over the largest value.
    fn distance(got: &[f32], expected: &[f32]) -> f32 {
        assert_eq!(got.len(), expected.len());
        let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
        got.iter().zip(expected).fold(0f32, |most, (g, e)| most.max((g - e).abs())) / largest
    }

    /// Each step from bitsandbytes' own state. Its CPU backend looks codes up in a coarse table, so
    /// that a code may be the neighbour of the nearest, and more than that near 0.
    #[test]
    fn each_step_is_that_of_bitsandbytes() {
        let file = SafeTensors::deserialize(GOLDEN).unwrap();
        let mut state = State::fresh(&file);
        for step in 1..=STEPS {
            state.step(step, gradients(&file, step));
            let expected = State::golden(&file, step);
            let error = distance(&state.master, &expected.master);
            assert!(error <= 3e-7, "weights of step {step}: {error:e}");
            for moment in 0..2 {
                let error = distance(&state.absmax[moment], &expected.absmax[moment]);
                assert!(error <= 3e-7, "absmax {moment} of step {step}: {error:e}");
                let (got, theirs) = (&state.codes[moment], &expected.codes[moment]);
                let map = [dynamic_map(), unsigned_dynamic_map()][moment];
                let value = |code: u8| map[usize::from(code)];
                let near = |(a, b): (&u8, &u8)| {
                    a.abs_diff(*b) <= 1 || (value(*a) - value(*b)).abs() < 3e-5
                };
                assert!(got.iter().zip(theirs).all(near), "codes {moment} of step {step}");
                let other = got.iter().zip(theirs).filter(|(a, b)| a != b).count();
                assert!(other <= ELEMENTS / 10, "step {step}: {other} of {ELEMENTS} codes differ");
            }
            state = expected;
        }
    }

    #[test]
    fn six_steps_on_end_stay_with_bitsandbytes() {
        let file = SafeTensors::deserialize(GOLDEN).unwrap();
        let mut state = State::fresh(&file);
        (1..=STEPS).for_each(|step| state.step(step, gradients(&file, step)));
        let (expected, begin) = (State::golden(&file, STEPS).master, floats(&file, "large.0"));
        let norm = |a: &[f32], b: &[f32]| {
            a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
        };
        let error = norm(&state.master, &expected) / norm(&begin, &expected);
        assert!(error < 1e-2, "{error:e} of the way");
    }

    #[test]
    fn codes_are_the_nearest() {
        for map in [dynamic_map(), unsigned_dynamic_map()] {
            for i in -2000..=2000 {
                let x = i as f32 / 2000.0;
                let distance = |code: usize| (map[code] - x).abs();
                let best = (0..256).map(distance).fold(f32::INFINITY, f32::min);
                assert_eq!(distance(nearest_code(map, x).into()), best, "{x}");
            }
        }
    }
}
