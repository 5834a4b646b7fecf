//! A model small enough to check by hand, for the loop's tests: one linear with a LoRA pair.
//!
//! The loss of a target `y` after token `x` is `½ |e(y) − (W + B A) e(x)|²`, with `e` a fixed
//! random vector for each id. A is `[R, D]`, B `[D, R]`; both have exact gradients.

use crate::model::Variant;
use std::borrow::Cow;
use std::cell::Cell;
use std::ops::Range;
use std::path::Path;

use half::bf16;

use super::adamw::AdamW;
use super::backend::Update;
use super::buffers::Buffers;
use super::clip;
use super::step::rate_groups;
use super::trainee::{AdapterBuffers, Shrinkable, Shrunk, Trainee};
use crate::adapter::LoraPlus;
use crate::data::{Batch, Document};
use crate::error::{Error, Result};
use crate::kernels::TokenLosses;
use crate::model::parameters::{Matrix, ParameterTensor};
use crate::plan::{AdapterRegion, MomentLayout, Optim, Settings, SumOrder};
use crate::random::Stream;

const D: usize = 6;
const R: usize = 2;

pub struct Toy {
    tensors: Vec<ParameterTensor>,
    embeddings: Vec<f32>,
    w: Vec<f32>,
    pub master: Vec<f32>,
    pub gradients: Vec<f32>,
    first_moment: Vec<f32>,
    second_moment: Vec<f32>,
    places: MomentLayout,
    working: Vec<bf16>,
    /// Token id whose gradient is not finite.
    pub poison: Option<u32>,
    /// Whether B never gets a gradient, as after a missing backward pass.
    pub dead_b: bool,
    /// Most tokens in a pass, and those for which there is memory.
    pub room: (usize, usize),
    /// How often there is no memory to write the adapter.
    pub failing_writes: Cell<usize>,
    /// Whether there is no room on the disk for the adapter.
    pub full_disk: bool,
    /// How often there is none for the base model's loss.
    pub failing_bases: usize,
    /// What is added to the base model's loss: 0 unless a test breaks it.
    pub base_error: f32,
}

impl Toy {
    pub fn new() -> Self {
        let random = |name: &str, len| {
            let mut out = vec![0.0; len];
            Stream::new(7, name).fill_normal(0, 0.5, &mut out);
            out
        };
        let tensor = |name: &str, shape: [usize; 2], start: usize, matrix| ParameterTensor {
            name: name.to_string(),
            shape,
            range: start..start + shape[0] * shape[1],
            matrix,
        };
        let elements = 2 * R * D;
        let mut master = random("a", R * D);
        master.extend(vec![0.0; R * D]);
        let mut toy = Toy {
            tensors: vec![
                tensor("toy.lora_A.weight", [R, D], 0, Matrix::A),
                tensor("toy.lora_B.weight", [D, R], R * D, Matrix::B),
            ],
            embeddings: random("embeddings", 64 * D),
            w: random("w", D * D),
            gradients: vec![0.0; elements],
            first_moment: vec![0.0; elements],
            second_moment: vec![0.0; elements],
            places: MomentLayout::new(Optim::AdamwTorch, [R * D, R * D]),
            working: vec![bf16::ZERO; elements],
            master,
            poison: None,
            dead_b: false,
            room: (usize::MAX, usize::MAX),
            failing_writes: Cell::new(0),
            full_disk: false,
            failing_bases: 0,
            base_error: 0.0,
        };
        toy.refresh();
        toy
    }

    /// Updates the weights with the gradients at hand; `number` counts from 1.
    pub fn step(&mut self, number: u64, learning_rate: f64) -> Result<()> {
        let optimizer = AdamW { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.0 };
        let groups = rate_groups(&self.tensors, LoraPlus::default());
        let (optimizer, groups, gradient_scale) = (&optimizer, &groups[..], 1.0);
        self.update(&Update { optimizer, groups, step: number, learning_rate, gradient_scale })
    }

    /// Weights, gradients and moments.
    pub fn buffers(&mut self) -> Buffers<'_> {
        Buffers {
            master: &mut self.master,
            gradients: &mut self.gradients,
            first_moment: &mut self.first_moment,
            second_moment: &mut self.second_moment,
            working: Some(&mut self.working),
        }
    }

    fn refresh(&mut self) {
        self.working.iter_mut().zip(&self.master).for_each(|(w, &m)| *w = bf16::from_f32(m));
    }

    /// Weights that the forward pass reads: rounded, as the real model's.
    fn a_and_b(&self) -> (Vec<f32>, Vec<f32>) {
        let wide: Vec<f32> = self.working.iter().map(|w| w.to_f32()).collect();
        (wide[..R * D].to_vec(), wide[R * D..].to_vec())
    }

    fn embedding(&self, id: u32) -> &[f32] {
        &self.embeddings[id as usize * D..][..D]
    }

    /// Loss of one target, and its gradient if `scale` is given; a hit where no other embedding is nearer.
    fn pair(&mut self, x: u32, y: u32, adapter: f32, scale: Option<f32>) -> TokenLosses {
        let (a, b) = self.a_and_b();
        let (ex, ey) = (self.embedding(x).to_vec(), self.embedding(y).to_vec());
        let dot = |row: &[f32], v: &[f32]| row.iter().zip(v).map(|(p, q)| p * q).sum::<f32>();
        let ax: Vec<f32> = a.chunks(D).map(|row| dot(row, &ex)).collect();
        let error: Vec<f32> = (0..D)
            .map(|i| dot(&self.w[i * D..][..D], &ex) + adapter * dot(&b[i * R..][..R], &ax) - ey[i])
            .collect();
        if let Some(scale) = scale {
            for r in 0..R {
                let back: f32 = (0..D).map(|i| error[i] * b[i * R + r]).sum();
                (0..D).for_each(|j| self.gradients[r * D + j] += scale * back * ex[j]);
                if !self.dead_b {
                    (0..D).for_each(|i| {
                        self.gradients[R * D + i * R + r] += scale * error[i] * ax[r]
                    });
                }
            }
            if self.poison == Some(x) {
                self.gradients[R * D] = f32::INFINITY;
            }
        }
        let square = |distance: &f32| f64::from(distance * distance);
        let sum = error.iter().map(|e| square(e) / 2.0).sum();
        let made: Vec<f32> = error.iter().zip(&ey).map(|(error, y)| error + y).collect();
        let distance = |embedding: &[f32]| -> f64 {
            embedding.iter().zip(&made).map(|(y, made)| square(&(made - y))).sum()
        };
        let own = distance(&ey);
        let nearest = self.embeddings.chunks(D).all(|embedding| distance(embedding) >= own);
        TokenLosses { sum, hits: u64::from(nearest) }
    }

    fn pairs(batch: &Batch) -> Vec<(u32, u32)> {
        let tokens = batch.documents().flat_map(|document| document.start..document.end - 1);
        let pair = |i: usize| Some((batch.input_ids[i], u32::try_from(batch.labels[i + 1]).ok()?));
        tokens.filter_map(pair).collect()
    }

    /// The sum over the parts of a batch; fails in the middle where memory runs short.
    fn in_parts(
        &mut self,
        batch: &Batch,
        pass: impl Fn(&mut Toy, &Batch) -> TokenLosses,
    ) -> Result<TokenLosses> {
        let (most, there_are) = self.room;
        let mut losses = TokenLosses::default();
        for part in batch.split(most).iter() {
            losses += pass(self, part);
            if part.tokens() > there_are {
                return Err(Error::budget("no memory"));
            }
        }
        Ok(losses)
    }

    fn sum(&mut self, batch: &Batch, adapter: f32, scale: Option<f32>) -> TokenLosses {
        Toy::pairs(batch).into_iter().map(|(x, y)| self.pair(x, y, adapter, scale)).sum()
    }
}

impl AdapterBuffers for Toy {
    fn tensors(&self) -> &[ParameterTensor] {
        &self.tensors
    }

    fn moments(&self) -> &MomentLayout {
        &self.places
    }

    fn values(&self, region: AdapterRegion, words: Range<usize>) -> Result<Cow<'_, [f32]>> {
        let buffer = match region {
            AdapterRegion::Master => &self.master[..],
            AdapterRegion::Gradients => &self.gradients,
            AdapterRegion::FirstMoment => &self.first_moment,
            AdapterRegion::SecondMoment => &self.second_moment,
            _ => &[][..],
        };
        Ok(Cow::Borrowed(&buffer[words]))
    }

    fn set_values(&mut self, region: AdapterRegion, first: usize, values: &[f32]) {
        let buffers = self.buffers();
        let buffer: &mut [f32] = match region {
            AdapterRegion::Master => buffers.master,
            AdapterRegion::Gradients => buffers.gradients,
            AdapterRegion::FirstMoment => buffers.first_moment,
            AdapterRegion::SecondMoment => buffers.second_moment,
            _ => &mut [],
        };
        buffer[first..first + values.len()].copy_from_slice(values);
    }

    fn refresh_working(&mut self) {
        self.refresh();
    }
}

impl Shrinkable for Toy {
    fn shrink(&mut self) -> Result<Option<Shrunk>> {
        let from_tokens = self.room.0;
        let to_tokens = from_tokens.min(64) / 2;
        self.room.0 = to_tokens;
        let change = format!("{to_tokens} tokens");
        Ok((to_tokens > 0).then_some(Shrunk { from_tokens, to_tokens, change }))
    }

    fn sum_order(&self) -> Option<SumOrder> {
        Some(Settings::of_pass(self.room.0, 64).sum_order())
    }
}

impl Trainee for Toy {
    fn forward_backward(
        &mut self,
        batch: &Batch,
        scale: f32,
        _micro_batch: u64,
    ) -> Result<TokenLosses> {
        self.in_parts(batch, |toy, part| toy.sum(part, 1.0, Some(scale)))
    }

    fn evaluate(&mut self, batch: &Batch, variant: Variant) -> Result<TokenLosses> {
        if variant == Variant::Adapted {
            return self.in_parts(batch, |toy, part| toy.sum(part, 1.0, None));
        }
        if let Some(left) = self.failing_bases.checked_sub(1) {
            self.failing_bases = left;
            return Err(Error::budget("no memory for the base model"));
        }
        let mut losses = self.sum(batch, 0.0, None);
        losses.sum += f64::from(self.base_error);
        Ok(losses)
    }

    fn zero_gradients(&mut self) {
        self.gradients.fill(0.0);
    }

    fn gradient_norm(&mut self) -> Result<f64> {
        Ok(clip::global_norm(&self.gradients))
    }

    fn update(&mut self, update: &Update) -> Result<()> {
        update.apply(self.buffers());
        Ok(())
    }

    fn write_adapter(&self, folder: &Path) -> Result<()> {
        if let Some(left) = self.failing_writes.get().checked_sub(1) {
            self.failing_writes.set(left);
            return Err(Error::budget("no memory to write"));
        }
        let path = folder.join("adapter_model.safetensors");
        if self.full_disk {
            let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
            return Err(Error::io("write", &path, full));
        }
        let bytes: &[u8] = bytemuck::cast_slice(&self.master);
        std::fs::write(&path, bytes).map_err(|e| Error::io("write", &path, e))
    }

    fn sample(&mut self, prompt: &str) -> Result<String> {
        Ok(format!("{prompt}: {:?}", self.master[R * D]))
    }
}

/// Documents of `lengths` tokens with ids below 60; document `n` stands on line `n + 1`.
pub fn documents(lengths: &[usize]) -> Vec<Document> {
    let stream = Stream::new(3, "documents");
    let document = |(line, &length): (usize, &usize)| {
        let id = |i| stream.at(line as u64).below(i as u64, 60) as u32;
        let input_ids: Vec<u32> = (0..length).map(id).collect();
        let labels = input_ids.iter().enumerate();
        let labels = labels.map(|(i, &id)| if i % 3 == 2 { -100 } else { id as i32 }).collect();
        Document { input_ids, labels, line: line + 1 }
    };
    lengths.iter().enumerate().map(document).collect()
}
