//! The first half of a block: norm, q, k and v, attention, and the projection onto the stream.

use super::{
    AttentionOutput, Block, BlockActivations, Gradients, Linear, Missing, Pass, Saved, Workspace,
};
use crate::kernels::{
    AttentionInputs, Cache, CachedScratch, Direction, Kernels, LinearInputs, Write,
};
use crate::model::spec::LinearRole;

impl<K: Kernels> Block<K> {
    fn projections(&self) -> Vec<&Linear<K>> {
        use LinearRole::{K as Key, Q, Qkv, V};
        self.linears.iter().filter(|linear| matches!(linear.role, Q | Key | V | Qkv)).collect()
    }

    /// `middle = x + attention(norm(x))`; the output of attention is made if everything is missing, else it
    /// is there.
    pub(super) fn forward_attention(
        &self,
        pass: &Pass<K>,
        x: &K::Buffer,
        BlockActivations { saved, attention, missing }: &mut BlockActivations<K::Buffer>,
        work: &mut Workspace<K::Buffer>,
        cache: Option<Cache<K::Buffer>>,
    ) {
        let (kernels, rows) = (pass.kernels, pass.rows.len());
        let to = (&mut work.norm, &mut work.norm_stats);
        pass.normalize(self.norm1.as_ref(), x, to, self.hidden_size);
        let (ys, lora_x) = (&mut [&mut saved.qkv], &mut saved.lora_x);
        pass.forward_all(&self.projections(), &work.norm, ys, lora_x, &mut work.adapter);
        match self.rotary {
            Some(index) if self.head_norms.is_none() => {
                let tables = work.rotary.of(index);
                kernels.rotary(&self.attention, tables, &mut saved.qkv, rows, Direction::Forward);
            }
            _ => self.norm_heads(pass, saved, work),
        }
        let qkv = work.normed_qkv.as_ref().unwrap_or(&saved.qkv);
        let AttentionOutput { lse, output: o } = &mut **attention;
        let tiles = &mut work.attention;
        match cache {
            None if *missing != Missing::Everything => {}
            None => {
                kernels.attention_forward(&self.attention, pass.layout, qkv, o, lse, tiles);
            }
            Some(cache) => {
                let scratch = CachedScratch { lse, tiles };
                kernels.attention_cached(&self.attention, qkv, cache, rows, o, scratch);
            }
        }
        kernels.copy((x, 0), (&mut saved.middle, 0), rows * self.hidden_size);
        let output = self.expect(LinearRole::O);
        let lora_x = &mut saved.lora_x;
        let (to, write) = match &mut saved.projected {
            Some(projected) => (projected, Write::Over),
            None => (&mut saved.middle, Write::Add),
        };
        pass.forward(output, o, to, lora_x, &mut work.adapter, write);
        if let Some((norms, projected)) = self.post_norms.as_ref().zip(saved.projected.as_ref()) {
            let (middle, stats) = (&mut saved.middle, &mut work.norm_stats);
            kernels.norm_forward(&norms.attention, projected, middle, stats, rows, Write::Add);
        }
    }

    /// Where heads have norms: `work.normed_qkv` from what is saved.
    pub(super) fn norm_heads(
        &self,
        pass: &Pass<K>,
        saved: &Saved<K::Buffer>,
        work: &mut Workspace<K::Buffer>,
    ) {
        let (kernels, rows) = (pass.kernels, pass.rows.len());
        let Some((norms, normed)) = self.head_norms.as_ref().zip(work.normed_qkv.as_mut()) else {
            return;
        };
        kernels.head_norms(norms, &self.attention, &saved.qkv, normed, rows);
        if let Some(index) = self.rotary {
            kernels.rotary(
                &self.attention,
                work.rotary.of(index),
                normed,
                rows,
                Direction::Forward,
            );
        }
    }

    /// Turns the gradient of `middle` in the stream into that of `x`.
    pub(super) fn backward_attention(
        &self,
        pass: &Pass<K>,
        x: &K::Buffer,
        BlockActivations { saved, attention, .. }: &BlockActivations<K::Buffer>,
        work: &mut Workspace<K::Buffer>,
        Gradients { activations: grads, lora }: &mut Gradients<K::Buffer>,
        input_gradient: bool,
    ) {
        let (kernels, rows) = (pass.kernels, pass.rows.len());
        if let Some(norms) = &self.post_norms {
            self.post_norm_backward(pass, &norms.attention, &saved.projected, work, grads);
        }
        let output = self.expect(LinearRole::O);
        let inputs = LinearInputs { x: &attention.output, lora_x: &saved.lora_x };
        let d_o = Some((&mut grads.norm, Write::Over));
        let dy = grads.projected.as_ref().unwrap_or(&grads.stream);
        pass.backward(output, dy, inputs, d_o, lora, &mut work.adapter);
        let inputs = AttentionInputs {
            qkv: work.normed_qkv.as_ref().unwrap_or(&saved.qkv),
            o: &attention.output,
            lse: &attention.lse,
            d_o: &grads.norm,
        };
        let (shape, dqkv, tiles) = (&self.attention, &mut grads.qkv, &mut work.attention);
        kernels.attention_backward(shape, pass.layout, inputs, dqkv, tiles);
        if let Some(index) = self.rotary {
            let tables = work.rotary.of(index);
            kernels.rotary(&self.attention, tables, &mut grads.qkv, rows, Direction::Backward);
        }
        if let Some(norms) = &self.head_norms {
            let shape = &self.attention;
            kernels.head_norms_backward(norms, shape, &saved.qkv, &mut grads.qkv, rows);
        }
        let (norm, stats) = (&mut work.norm, &mut work.norm_stats);
        pass.normalize(self.norm1.as_ref(), x, (norm, stats), self.hidden_size);
        let inputs = LinearInputs { x: norm, lora_x: &saved.lora_x };
        let dx = input_gradient.then_some(&mut grads.norm);
        let adapter = &mut work.adapter;
        pass.backward_all(&self.projections(), &[&grads.qkv], inputs, dx, lora, adapter);
        if input_gradient {
            let (norm, dx) = (self.norm1.as_ref(), &mut grads.stream);
            pass.normalize_backward(norm, &grads.norm, (x, stats), dx, self.hidden_size);
        }
    }
}
