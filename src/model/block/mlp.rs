//! The second half of a block: norm and MLP, over tiles of tokens.
//!
//! Rows are independent, so a tile gives the rows of the whole; only the sums over tokens in the
//! gradients of A and B are made tile by tile. A layer that keeps its activations has buffers for
//! each tile, all others share those of one.

use std::mem::swap;
use std::ops::Range;

use super::{
    Block, GradientBuffers, Gradients, Linear, Pass, Saved, SavedMlp, TileBuffers, Workspace,
};
use crate::kernels::{Kernels, LinearInputs, Storage, Write};
use crate::model::parameters::Parameters;
use crate::model::spec::{Activation, LinearRole, MlpKind};

/// A gated MLP with its adapters, in a pass over some rows.
pub struct GatedMlp<'a, K: Storage> {
    /// Nonlinearity of the gate.
    pub activation: Activation,
    /// `[F, D]`.
    pub gate: &'a Linear<K>,
    /// `[F, D]`.
    pub up: &'a Linear<K>,
    /// `[D, F]`.
    pub down: &'a Linear<K>,
    /// The adapters.
    pub parameters: &'a Parameters<K>,
    /// Rows of the pass.
    pub rows: usize,
}

/// Where the gradients of a gated MLP's activations go.
pub struct GatedMlpGradients<'a, B> {
    /// The gradient of what gate made, `[t, F]`.
    pub gate: &'a mut B,
    /// The gradient of what up made, `[t, F]`.
    pub up: &'a mut B,
    /// The gradient of what gate and up read, `[t, D]`.
    pub input: &'a mut B,
}

/// Tiles of the rows of a pass, with their numbers.
fn tiles<B>(
    rows: usize,
    tile: &TileBuffers<B>,
) -> impl Iterator<Item = (usize, Range<usize>)> + use<B> {
    let length = tile.tokens;
    (0..rows.div_ceil(length)).map(move |n| (n, n * length..rows.min((n + 1) * length)))
}

impl<K: Kernels> Block<K> {
    /// `out = middle + mlp(norm(middle))`.
    pub(super) fn forward_mlp(
        &self,
        pass: &Pass<K>,
        saved: &mut Saved<K::Buffer>,
        out: &mut K::Buffer,
        work: &mut Workspace<K::Buffer>,
    ) {
        let (kernels, d, buffers) = (pass.kernels, self.hidden_size, saved.mlp.len());
        let Some(mut tile) = work.tile.take() else {
            let mlp = &mut saved.mlp[0];
            self.forward_gate_up(pass, &saved.middle, mlp, work);
            kernels.copy((&saved.middle, 0), (out, 0), pass.rows.len() * d);
            return self.forward_down(pass, mlp, out, work);
        };
        for (number, rows) in tiles(pass.rows.len(), &tile) {
            let (mlp, start) = (&mut saved.mlp[number % buffers], rows.start * d);
            let (elements, pass) = (rows.len() * d, pass.over(rows));
            kernels.copy((&saved.middle, start), (&mut tile.middle, 0), elements);
            self.forward_gate_up(&pass, &tile.middle, mlp, work);
            self.forward_down(&pass, mlp, &mut tile.middle, work);
            kernels.copy((&tile.middle, 0), (out, start), elements);
        }
        work.tile = Some(tile);
    }

    /// Gate and up, which are saved, of the norm.
    fn forward_gate_up(
        &self,
        pass: &Pass<K>,
        middle: &K::Buffer,
        saved: &mut SavedMlp<K::Buffer>,
        work: &mut Workspace<K::Buffer>,
    ) {
        let SavedMlp { gate, up, lora_x, .. } = saved;
        self.normalize_middle(pass, middle, work);
        let (norm, adapter) = (&work.norm, &mut work.adapter);
        let linear = self.expect(LinearRole::Up);
        match self.linear(LinearRole::Gate) {
            Some(first) => {
                pass.forward_all(&[first, linear], norm, &mut [gate, up], lora_x, adapter);
            }
            None => pass.forward(linear, norm, up, lora_x, adapter, Write::Over),
        }
    }

    /// Norm of the MLP's input, into the workspace.
    fn normalize_middle(
        &self,
        pass: &Pass<K>,
        middle: &K::Buffer,
        work: &mut Workspace<K::Buffer>,
    ) {
        let to = (&mut work.norm, &mut work.norm_stats);
        pass.normalize(self.norm2.as_ref(), middle, to, self.hidden_size);
    }

    /// `out += down(h)`, or the norm of that.
    fn forward_down(
        &self,
        pass: &Pass<K>,
        saved: &mut SavedMlp<K::Buffer>,
        out: &mut K::Buffer,
        work: &mut Workspace<K::Buffer>,
    ) {
        let Some(norms) = &self.post_norms else {
            return self.project_down(pass, saved, Some(out), work);
        };
        self.project_down(pass, saved, None, work);
        let projected = saved.projected.as_ref().expect("planned where there are post-norms");
        let (stats, rows) = (&mut work.norm_stats, pass.rows.len());
        pass.kernels.norm_forward(&norms.mlp, projected, out, stats, rows, Write::Add);
    }

    /// h into the workspace, and `out += h·Wdᵀ`, or that product to where it is saved.
    fn project_down(
        &self,
        pass: &Pass<K>,
        saved: &mut SavedMlp<K::Buffer>,
        out: Option<&mut K::Buffer>,
        work: &mut Workspace<K::Buffer>,
    ) {
        let is_projected = self.project_hidden(pass, saved, Some(&mut work.mlp));
        if !is_projected {
            self.hidden(pass, saved, work);
        }
        let SavedMlp { lora_x, projected, .. } = saved;
        let (down, write) =
            (self.expect(LinearRole::Down), if out.is_some() { Write::Add } else { Write::Over });
        let to = out.or(projected.as_mut()).expect("planned where there are post-norms");
        let (h, adapter) = (&work.mlp, &mut work.adapter);
        if is_projected {
            return pass.forward_projected(down, h, to, lora_x, &mut adapter.pair, write);
        }
        pass.forward(down, h, to, lora_x, adapter, write);
    }

    /// h, to `h` if it is wanted, and what the down projection's adapter reads of it, `h·Aᵀ`, in one
    /// operation; `false`, and nothing done, where the backend has none for this MLP.
    fn project_hidden(
        &self,
        pass: &Pass<K>,
        saved: &mut SavedMlp<K::Buffer>,
        h: Option<&mut K::Buffer>,
    ) -> bool {
        let mlp = self.gated(pass).filter(|_| !pass.single_row);
        mlp.is_some_and(|mlp| pass.kernels.adapted_mlp_forward(&mlp, saved, h))
    }

    /// `h = act(gate) ∘ up` into the workspace.
    fn hidden(&self, pass: &Pass<K>, saved: &SavedMlp<K::Buffer>, work: &mut Workspace<K::Buffer>) {
        let (kernels, h, rows) = (pass.kernels, &mut work.mlp, pass.rows.len());
        let width = self.intermediate_size;
        if self.mlp == MlpKind::FusedGated {
            return kernels.fused_mlp_forward(self.activation, &saved.up, h, rows, width);
        }
        let gate = self.linear(LinearRole::Gate).map(|_| &saved.gate);
        kernels.mlp_forward(self.activation, gate, &saved.up, h, rows * width);
    }

    /// Turns the gradient of the block's output in the stream into that of `middle`.
    pub(super) fn backward_mlp(
        &self,
        pass: &Pass<K>,
        saved: &mut Saved<K::Buffer>,
        work: &mut Workspace<K::Buffer>,
        grads: &mut Gradients<K::Buffer>,
        recompute: bool,
    ) {
        let (kernels, d, buffers) = (pass.kernels, self.hidden_size, saved.mlp.len());
        let Some(mut tile) = work.tile.take() else {
            let (mlp, middle) = (&mut saved.mlp[0], &saved.middle);
            return self.backward_rows(pass, middle, mlp, work, grads, recompute);
        };
        for (number, rows) in tiles(pass.rows.len(), &tile) {
            let (mlp, start) = (&mut saved.mlp[number % buffers], rows.start * d);
            let (elements, pass) = (rows.len() * d, pass.over(rows));
            kernels.copy((&saved.middle, start), (&mut tile.middle, 0), elements);
            let gradient = tile.gradient.as_mut().expect("planned for a backward pass");
            kernels.copy((&grads.activations.stream, start), (gradient, 0), elements);
            swap(&mut grads.activations.stream, gradient);
            self.backward_rows(&pass, &tile.middle, mlp, work, grads, recompute);
            swap(&mut grads.activations.stream, gradient);
            kernels.copy((gradient, 0), (&mut grads.activations.stream, start), elements);
        }
        work.tile = Some(tile);
    }

    /// [`backward_mlp`](Block::backward_mlp) for the rows of a pass, which lie at the front of every buffer.
    fn backward_rows(
        &self,
        pass: &Pass<K>,
        middle: &K::Buffer,
        saved: &mut SavedMlp<K::Buffer>,
        work: &mut Workspace<K::Buffer>,
        grads: &mut Gradients<K::Buffer>,
        recompute: bool,
    ) {
        let mut has_hidden = false;
        if recompute {
            self.forward_gate_up(pass, middle, saved, work);
            has_hidden = self.recompute_down(pass, saved, work);
        }
        if let Some(norms) = &self.post_norms {
            let grads = &mut grads.activations;
            self.post_norm_backward(pass, &norms.mlp, &saved.projected, work, grads);
        }
        if !recompute || self.post_norms.is_some() {
            self.normalize_middle(pass, middle, work);
        }
        if !self.backward_adapted(pass, saved, work, grads) {
            if !has_hidden {
                self.hidden(pass, saved, work);
            }
            self.backward_linears(pass, saved, work, grads);
        }
        let GradientBuffers { norm: dy, stream, .. } = &mut grads.activations;
        let x = (middle, &work.norm_stats);
        pass.normalize_backward(self.norm2.as_ref(), dy, x, stream, self.hidden_size);
    }

    /// A gated MLP without dropout, for operations on all of it.
    fn gated<'a>(&'a self, pass: &Pass<'a, K>) -> Option<GatedMlp<'a, K>> {
        let gate = self.linear(LinearRole::Gate).filter(|_| pass.dropout.is_none())?;
        let (up, down) = (self.expect(LinearRole::Up), self.expect(LinearRole::Down));
        let (parameters, rows) = (pass.parameters, pass.rows.len());
        Some(GatedMlp { activation: self.activation, gate, up, down, parameters, rows })
    }

    /// The gradients of the adapters and of the norm's output, all in one operation; `false`, and nothing
    /// done, where the backend has none for this MLP.
    fn backward_adapted(
        &self,
        pass: &Pass<K>,
        saved: &SavedMlp<K::Buffer>,
        work: &mut Workspace<K::Buffer>,
        Gradients { activations, lora }: &mut Gradients<K::Buffer>,
    ) -> bool {
        let Some(mlp) = self.gated(pass) else { return false };
        let GradientBuffers { mlp: gate, stream, norm: input, projected, .. } = activations;
        let inputs = (projected.as_ref().unwrap_or(stream), &work.norm);
        let (_, t) = work.adapter.of_backward();
        let to = GatedMlpGradients { gate, up: &mut work.mlp, input };
        pass.kernels.adapted_mlp_backward(&mlp, saved, inputs, to, lora, t)
    }

    /// [`backward_adapted`](Block::backward_adapted) in one operation after another, from h in the workspace.
    fn backward_linears(
        &self,
        pass: &Pass<K>,
        saved: &mut SavedMlp<K::Buffer>,
        work: &mut Workspace<K::Buffer>,
        Gradients { activations: grads, lora }: &mut Gradients<K::Buffer>,
    ) {
        let down = self.expect(LinearRole::Down);
        let (dx, dy) = (Some((&mut grads.mlp, Write::Over)), grads.projected.as_ref());
        let dy = dy.unwrap_or(&grads.stream);
        let inputs = LinearInputs { x: &work.mlp, lora_x: &saved.lora_x };
        pass.backward(down, dy, inputs, dx, lora, &mut work.adapter);
        self.hidden_backward(pass, saved, work, &mut grads.mlp);
        let inputs = LinearInputs { x: &work.norm, lora_x: &saved.lora_x };
        let adapter = &mut work.adapter;
        let up = self.expect(LinearRole::Up);
        match self.linear(LinearRole::Gate) {
            Some(gate) => {
                let (dys, dx) = (&[&grads.mlp, &work.mlp], Some(&mut grads.norm));
                pass.backward_all(&[gate, up], dys, inputs, dx, lora, adapter);
            }
            None => {
                let fused = self.mlp == MlpKind::FusedGated;
                let dy = if fused { &saved.up } else { &grads.mlp };
                let dx = Some((&mut grads.norm, Write::Over));
                pass.backward(up, dy, inputs, dx, lora, adapter);
            }
        }
    }

    /// Turns the gradient of h in `d_out` into those of gate and up: there and in the workspace, or, where
    /// one linear makes both, in place of what it made.
    fn hidden_backward(
        &self,
        pass: &Pass<K>,
        saved: &mut SavedMlp<K::Buffer>,
        work: &mut Workspace<K::Buffer>,
        d_out: &mut K::Buffer,
    ) {
        let (kernels, rows, width) = (pass.kernels, pass.rows.len(), self.intermediate_size);
        if self.mlp == MlpKind::FusedGated {
            return kernels.fused_mlp_backward(self.activation, &mut saved.up, d_out, rows, width);
        }
        let gate = self.linear(LinearRole::Gate).map(|_| &saved.gate);
        let elements = rows * width;
        kernels.mlp_backward(self.activation, gate, &saved.up, d_out, &mut work.mlp, elements);
    }

    /// What the backward pass reads of the down projection: its product only where that has a norm. Whether
    /// h is left in the workspace.
    fn recompute_down(
        &self,
        pass: &Pass<K>,
        saved: &mut SavedMlp<K::Buffer>,
        work: &mut Workspace<K::Buffer>,
    ) -> bool {
        if self.post_norms.is_some() {
            self.project_down(pass, saved, None, work);
            return true;
        }
        let down = self.expect(LinearRole::Down);
        let Some(adapter) = &down.adapter else { return false };
        let adapts = |mlp: GatedMlp<K>| pass.kernels.adapts_mlp_backward(&mlp);
        let is_read = !self.gated(pass).is_some_and(adapts);
        if self.project_hidden(pass, saved, is_read.then_some(&mut work.mlp)) {
            return is_read;
        }
        self.hidden(pass, saved, work);
        pass.project(down, adapter, &work.mlp, &mut saved.lora_x, &mut work.adapter);
        true
    }
}
