//! Forward through all blocks, the head and the loss, and backward.

use std::borrow::Cow;

use super::batch::Targets;
use super::buffers::{Buffers, HeadBuffers};
use super::{Draws, Mode, Model};
use crate::error::Result;
use crate::kernels::{
    Cache, Columns, Direction, HeadChunk, Kernels, LinearTerms, LogitShape, TokenLayout, Write,
};
use crate::model::block::{BlockActivations, Missing, Pass, RotaryBuffers, Variant};
use crate::model::rotary::Reach;
use crate::plan::Policy;

impl<K: Kernels> Model<K> {
    /// cos, sin and the scale of q for every token; frequencies may depend on the length of its
    /// document, and on how much more of it may come.
    pub(super) fn fill_rotary(&mut self, tokens: &TokenLayout, reach: Reach) {
        let (dim, elements) = (self.spec.rotary_dim, tokens.tokens() * self.spec.rotary_dim / 2);
        let RotaryBuffers { tables, query_scale } = &mut self.buffers.work.rotary;
        for (rotary, tables) in self.spec.rotaries().zip(tables) {
            self.kernels.write_tables(tables.each_mut(), elements, |[cos, sin]| {
                rotary.fill_tables(dim, tokens, reach, cos, sin);
            });
        }
        if let Some((scaling, table)) = self.spec.query_scaling.zip(query_scale.as_mut()) {
            self.kernels.write_tables([table], tokens.tokens(), |[scale]| {
                let rows = scale.iter_mut().zip(&tokens.positions);
                rows.for_each(|(scale, &position)| *scale = scaling.factor(position));
            });
        }
    }

    pub(super) fn forward(&mut self, ids: &[u32], tokens: &TokenLayout, mode: Mode) {
        if mode.training.is_some() {
            self.trained_tokens = tokens.tokens();
        }
        let Model { kernels, weights, parameters, buffers, cached_tokens, .. } = self;
        kernels.begin_pass();
        let Buffers { inputs, input_indices, offload, attended, attended_indices, .. } = buffers;
        let Buffers { kept, shared, work, caches, .. } = buffers;
        offload.before_write(kernels, 0);
        let scale = self.spec.stream_scale();
        kernels.embed(ids, &weights.embedding, scale, &mut inputs[input_indices[0]], Write::Over);
        if let Some(streaming) = &mut weights.streaming {
            streaming.leave_table();
        }
        if let Some(positions) = &weights.positions {
            kernels.embed(
                &tokens.positions,
                positions,
                1.0,
                &mut inputs[input_indices[0]],
                Write::Add,
            );
        }
        if let Some(draws) = mode.training {
            let x = (&mut inputs[input_indices[0]], self.spec.hidden_size);
            self.random.add_noise(kernels, draws, tokens, self.spec.noise_scale(), x);
        }
        let pass = Pass {
            kernels,
            parameters,
            layout: tokens,
            dropout: mode.training.and_then(|draws| self.random.dropout(draws)),
            variant: mode.variant,
            single_row: mode.cached && tokens.tokens() == 1,
            rows: 0..tokens.tokens(),
        };
        for (layer, (block, kept)) in weights.blocks.iter().zip(kept).enumerate() {
            if let Some(streaming) = &mut weights.streaming {
                streaming.enter(layer, Direction::Forward);
            }
            let saved = kept.as_mut().or(shared.as_mut()).expect("kept or shared by the plan");
            if mode.training.is_some() {
                offload.written(kernels, inputs, layer, tokens.tokens());
            }
            offload.before_write(kernels, layer + 1);
            offload.before_attention(kernels, layer);
            let [x, out] = inputs
                .get_disjoint_mut([input_indices[layer], input_indices[layer + 1]])
                .expect("neighbours have their own");
            let cache = caches.get_mut(layer).filter(|_| mode.cached);
            let cache = cache.map(|keys_values| Cache { keys_values, past: *cached_tokens });
            let attention = &mut attended[attended_indices[layer]];
            let missing = Missing::Everything;
            let activations = BlockActivations { attention, saved, missing };
            block.forward(&pass, x, out, activations, work, cache);
            if mode.training.is_some() {
                offload.attention_written(kernels, attended, layer, tokens.tokens());
            }
            if let Some(streaming) = &mut weights.streaming {
                streaming.leave(layer, Direction::Forward);
            }
        }
    }

    /// Index of the buffer that holds the last block's output.
    pub(super) fn output_index(&self) -> usize {
        self.buffers.input_indices[self.spec.num_layers]
    }

    /// What the head reads, of some rows.
    pub(super) fn head_inputs(&mut self, rows: &[u32]) {
        let (d, output) = (self.spec.hidden_size, self.output_index());
        let Model { kernels, weights, buffers, .. } = self;
        let head = &mut buffers.head;
        kernels.gather_rows(&buffers.inputs[output], rows, &mut head.input, d);
        let norm = &weights.final_norm;
        kernels.norm_forward(
            norm,
            &head.input,
            &mut head.norm,
            &mut head.stats,
            rows.len(),
            Write::Over,
        );
    }

    /// Logits of a chunk of rows into the head's buffer; a `single_row` is one that text goes on from.
    pub(super) fn head_logits(&mut self, rows: &[u32], single_row: bool) {
        self.head_inputs(rows);
        let Model { kernels, weights, buffers, spec, .. } = self;
        let (head, columns) = (&mut buffers.head, Columns::all(spec.vocab_size));
        let (terms, y) = (LinearTerms::of(weights.head()), (&mut head.logits, columns));
        if single_row {
            kernels.linear_row(terms, &head.norm, y, Write::Over);
        } else {
            kernels.linear_forward(terms, &head.norm, y, rows.len(), Write::Over);
        }
    }

    /// The first `rows` of the head's logits, capped as the model caps them.
    pub(super) fn capped_logits(&self, rows: usize) -> Result<Cow<'_, [f32]>> {
        let LogitShape { vocab_size, soft_cap } = LogitShape::of(&self.spec);
        let mut logits = self.kernels.values(&self.buffers.head.logits, 0..rows * vocab_size)?;
        if let Some(cap) = soft_cap {
            logits.to_mut().iter_mut().for_each(|logit| *logit = cap * (*logit / cap).tanh());
        }
        Ok(logits)
    }

    /// Leaves the sum of losses in `self.loss`.
    pub(super) fn head_loss(&mut self, targets: &Targets, scale: Option<f32>) {
        let (d, shape) = (self.spec.hidden_size, LogitShape::of(&self.spec));
        if scale.is_some() {
            self.zero_stream_gradient();
        }
        self.kernels.clear_loss(&mut self.loss);
        let chunk = self.settings.head(shape.vocab_size).rows;
        for (rows, ids) in targets.rows.chunks(chunk).zip(targets.ids.chunks(chunk)) {
            self.head_inputs(rows);
            let Model { kernels, weights, buffers, loss, .. } = self;
            let HeadBuffers { logits, input, norm: x, stats, sum, gradient } = &mut buffers.head;
            let chunk = HeadChunk { head: weights.head(), logits, targets: ids, shape };
            kernels.head_loss(chunk, x, sum.as_mut(), scale, loss);
            let gradients = scale.and(gradient.as_mut()).zip(buffers.work.gradients.as_mut());
            let Some((d_input, stream)) = gradients else { continue };
            kernels.zero(d_input, rows.len() * d);
            let norm = &weights.final_norm;
            kernels.norm_backward(norm, x, input, stats, d_input, rows.len());
            kernels.scatter_rows(d_input, rows, &mut stream.stream, d);
        }
        self.leave_head();
    }

    /// After the last logits of a pass.
    pub(super) fn leave_head(&mut self) {
        if let Some(streaming) = &mut self.weights.streaming {
            streaming.leave_head();
        }
    }

    pub(super) fn zero_stream_gradient(&mut self) {
        let elements = self.settings.tokens * self.spec.hidden_size;
        if let Some(gradients) = &mut self.buffers.work.gradients {
            self.kernels.zero(&mut gradients.stream, elements);
        }
    }

    pub(super) fn backward(&mut self, tokens: &TokenLayout, draws: Draws) {
        let dropout = self.random.dropout(draws);
        let Model { kernels, weights, parameters, settings, buffers, .. } = self;
        let Buffers { inputs, input_indices, offload, attended, attended_indices, .. } = buffers;
        let Buffers { kept, shared, work, .. } = buffers;
        let mut gradients = parameters.take_gradients().expect("planned for a backward pass");
        let rows = 0..tokens.tokens();
        let (layout, variant, single_row) = (tokens, Variant::Adapted, false);
        let pass = Pass { kernels, parameters, layout, dropout, variant, single_row, rows };
        for (layer, block) in weights.blocks.iter().enumerate().rev() {
            if let Some(streaming) = &mut weights.streaming {
                streaming.enter(layer, Direction::Backward);
            }
            offload.before_backward(kernels, (inputs, attended), layer, tokens.tokens());
            let missing = match settings.policies[layer] {
                Policy::Keep => Missing::Nothing,
                policy if policy.skips_attention_recompute() => Missing::AllButAttention,
                _ => Missing::Everything,
            };
            let saved = kept[layer].as_mut().or(shared.as_mut()).expect("as in the forward pass");
            let attention = &mut attended[attended_indices[layer]];
            let activations = BlockActivations { attention, saved, missing };
            let x = &inputs[input_indices[layer]];
            block.backward(&pass, x, activations, work, &mut gradients, layer > 0);
            if let Some(streaming) = &mut weights.streaming {
                streaming.leave(layer, Direction::Backward);
            }
        }
        self.parameters.put_gradients(gradients);
    }
}
