//! The same model written once more, in candle's tensor operations: one document at a time,
//! gradients by autograd. Slow and plain on purpose.
//!
//! Only operations with a backward are used: not `softmax_last_dim`, `rms_norm`, `layer_norm` or
//! `rope` of candle-nn, through which gradients silently stop.

use std::collections::HashMap;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use nibble::adapter::Adapter;
use nibble::data::Document;
use nibble::model::spec::{
    Activation, LinearRole, LinearSpec, MlpKind, ModelSpec, Norm, QkNorm, RotaryPairs,
};

/// Frozen tensors, trained ones and the spec.
pub struct Twin<'a> {
    spec: &'a ModelSpec,
    dtype: DType,
    frozen: HashMap<String, Tensor>,
    /// A, B and scale by module.
    adapters: HashMap<String, (Var, Var, f64)>,
}

fn tensor(values: &[f32], shape: &[usize], dtype: DType) -> Result<Tensor> {
    Tensor::from_slice(values, shape, &Device::Cpu)?.to_dtype(dtype)
}

impl<'a> Twin<'a> {
    pub fn new(
        spec: &'a ModelSpec,
        weights: &HashMap<String, Vec<f32>>,
        adapter: &Adapter,
        dtype: DType,
    ) -> Result<Self> {
        let tensor = |values: &[f32], shape: &[usize]| tensor(values, shape, dtype);
        let mut frozen = HashMap::new();
        for row in spec.inventory() {
            frozen.insert(row.name.clone(), tensor(&weights[&row.name], &row.shape)?);
        }
        let mut adapters = HashMap::new();
        for (target, values) in adapter.targets.iter().zip(&adapter.tensors) {
            let a = Var::from_tensor(&tensor(
                &values.a,
                &[target.shape.rank, target.shape.in_features],
            )?)?;
            let b = Var::from_tensor(&tensor(
                &values.b,
                &[target.shape.out_features, target.shape.rank],
            )?)?;
            adapters.insert(target.module.clone(), (a, b, f64::from(target.shape.scale)));
        }
        Ok(Twin { spec, dtype, frozen, adapters })
    }

    /// Sum of the token losses of `documents`, and its gradient by PEFT key.
    pub fn gradients(&self, documents: &[Document]) -> Result<(f64, HashMap<String, Vec<f64>>)> {
        let mut loss = Tensor::zeros((), self.dtype, &Device::Cpu)?;
        for document in documents {
            loss = (loss + self.loss(document)?)?;
        }
        let store = loss.backward()?;
        let mut gradients = HashMap::new();
        for (module, (a, b, _)) in &self.adapters {
            for (letter, var) in [("A", a), ("B", b)] {
                let gradient = store.get(var).expect("every operation has a backward");
                let key = format!("base_model.model.{module}.lora_{letter}.weight");
                gradients.insert(key, gradient.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?);
            }
        }
        Ok((loss.to_dtype(DType::F64)?.to_scalar()?, gradients))
    }

    /// Logits `[T, V]` of one document.
    pub fn logits(&self, ids: &[u32]) -> Result<Tensor> {
        let spec = self.spec;
        let embedding = &self.frozen[&format!("{}.weight", spec.embedding_module())];
        let ids = Tensor::new(ids, &Device::Cpu)?;
        let mut x = (embedding.index_select(&ids, 0)? * f64::from(spec.embedding_scale))?;
        if let Some(name) = spec.positions_name() {
            x = (x + self.frozen[name].narrow(0, 0, ids.elem_count())?)?;
        }
        for layer in 0..spec.num_layers {
            x = self.block(layer, &x)?;
        }
        let x = self.norm(spec.final_norm_module(), &x)?;
        let head = self.frozen.get(&format!("{}.weight", spec.head_module()));
        let logits = x.matmul(&head.unwrap_or(embedding).t()?)?;
        capped(&(logits / f64::from(spec.logit_divisor))?, spec.logit_soft_cap)
    }

    fn loss(&self, document: &Document) -> Result<Tensor> {
        let (length, vocab) = (document.input_ids.len(), self.spec.vocab_size);
        let logits = self.logits(&document.input_ids)?;
        let mut picked = vec![0.0; length * vocab];
        let mut scored = vec![0.0; length];
        for (token, label) in document.labels.iter().enumerate().skip(1) {
            if let Ok(label) = usize::try_from(*label) {
                picked[(token - 1) * vocab + label] = 1.0;
                scored[token - 1] = 1.0;
            }
        }
        let picked = tensor(&picked, &[length, vocab], self.dtype)?;
        let largest = logits.max_keepdim(D::Minus1)?.detach();
        let shifted = logits.broadcast_sub(&largest)?;
        let log_sum = shifted.exp()?.sum(D::Minus1)?.log()?;
        (log_sum * tensor(&scored, &[length], self.dtype)?)?.sum_all()?
            - (shifted * picked)?.sum_all()?
    }

    fn block(&self, layer: usize, x: &Tensor) -> Result<Tensor> {
        let linears = self.spec.linears(layer);
        let linear = |role, x: &Tensor| self.linear(find(&linears, role), x);
        let [first, second] = optional(self.spec.layer_norm_modules(layer));
        let normed = self.norm_if(first, x.clone())?;
        let (q, kv) = (self.spec.q_width(), self.spec.kv_width());
        let (q, k, v) = if linears.iter().any(|linear| linear.role == LinearRole::Qkv) {
            let all = linear(LinearRole::Qkv, &normed)?;
            (all.narrow(1, 0, q)?, all.narrow(1, q, kv)?, all.narrow(1, q + kv, kv)?)
        } else {
            let of = |role| linear(role, &normed);
            (of(LinearRole::Q)?, of(LinearRole::K)?, of(LinearRole::V)?)
        };
        let mixed = self.attention(layer, &q, &k, &v)?;
        let [post_attention, post_mlp] = optional(self.spec.post_norm_modules(layer));
        let add = |x: &Tensor, module: Option<String>, y: Tensor| {
            x + (self.norm_if(module, y)? * f64::from(self.spec.residual_scale))?
        };
        let x = add(x, post_attention, linear(LinearRole::O, &mixed)?)?;
        let normed = self.norm_if(second, x.clone())?;
        let up = linear(LinearRole::Up, &normed)?;
        let inner = match self.spec.projections.mlp() {
            MlpKind::FusedGated => {
                let f = self.spec.intermediate_size;
                (activate(self.spec.activation, &up.narrow(1, 0, f)?)? * up.narrow(1, f, f)?)?
            }
            MlpKind::Gated => {
                let gate = linear(LinearRole::Gate, &normed)?;
                (activate(self.spec.activation, &gate)? * up)?
            }
            MlpKind::Plain => activate(self.spec.activation, &up)?,
        };
        add(&x, post_mlp, linear(LinearRole::Down, &inner)?)
    }

    fn linear(&self, spec: &LinearSpec, x: &Tensor) -> Result<Tensor> {
        let mut y = x.matmul(&self.frozen[&format!("{}.weight", spec.module)].t()?)?;
        if spec.bias {
            y = y.broadcast_add(&self.frozen[&format!("{}.bias", spec.module)])?;
        }
        match self.adapters.get(&spec.module) {
            Some((a, b, scale)) => y + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * *scale)?,
            None => Ok(y),
        }
    }

    fn norm_if(&self, module: Option<String>, x: Tensor) -> Result<Tensor> {
        module.map_or(Ok(x.clone()), |module| self.norm(&module, &x))
    }

    fn norm(&self, module: &str, x: &Tensor) -> Result<Tensor> {
        let weight = &self.frozen[&format!("{module}.weight")];
        let weight = &(weight + if self.spec.norm_plus_one { 1.0 } else { 0.0 })?;
        let centred = match self.spec.norm {
            Norm::Rms => x.clone(),
            Norm::Layer => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
        };
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        // Kernels hold epsilon in f32, as transformers does on the CPU.
        let epsilon = f64::from(self.spec.norm_eps as f32);
        let y = centred.broadcast_div(&(variance + epsilon)?.sqrt()?)?.broadcast_mul(weight)?;
        match self.spec.norm {
            Norm::Rms => Ok(y),
            Norm::Layer => y.broadcast_add(&self.frozen[&format!("{module}.bias")]),
        }
    }

    /// Causal attention within one document, each key head shared by a group of query heads.
    fn attention(&self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (length, width) = (q.dim(0)?, self.spec.head_dim);
        let group = self.spec.num_heads / self.spec.num_kv_heads;
        let heads = |x: &Tensor, count: usize| {
            x.contiguous()?.reshape((length, count, width))?.transpose(0, 1)?.contiguous()
        };
        let shared = |x: Tensor| {
            let kv_heads = self.spec.num_kv_heads;
            let spread = x.unsqueeze(1)?.broadcast_as((kv_heads, group, length, width))?;
            spread.contiguous()?.reshape((self.spec.num_heads, length, width))
        };
        let [q_norm, k_norm] = optional(self.spec.head_norm_modules(layer));
        let normed = |norm: Option<String>, x: &Tensor, count: usize| match self.spec.qk_norm {
            Some(QkNorm::Whole) => heads(&self.norm_if(norm, x.clone())?, count),
            _ => self.norm_if(norm, heads(x, count)?),
        };
        let q = normed(q_norm, q, self.spec.num_heads)?;
        let k = normed(k_norm, k, self.spec.num_kv_heads)?;
        let (q, k) = (self.scale(self.rotate(layer, &q)?)?, shared(self.rotate(layer, &k)?)?);
        let v = shared(heads(v, self.spec.num_kv_heads)?)?;
        let scores = q.matmul(&k.transpose(1, 2)?.contiguous()?)?;
        let scores = (scores * f64::from(self.spec.attention_scale))?;
        let scores = capped(&scores, self.spec.attention_soft_cap)?;
        let scores =
            scores.broadcast_add(&mask(length, self.spec.windows[layer])?.to_dtype(self.dtype)?)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        weights.matmul(&v)?.transpose(0, 1)?.contiguous()?.reshape((length, self.spec.q_width()))
    }

    /// Llama 4's temperature, positions from 0.
    fn scale(&self, q: Tensor) -> Result<Tensor> {
        let Some(scaling) = self.spec.query_scaling else { return Ok(q) };
        let length = q.dim(1)?;
        let factor = |position: usize| {
            let lengths = position as f64 / scaling.original_max_position_embeddings as f64;
            1.0 + scaling.beta * (1.0 + lengths.floor()).ln()
        };
        let factors: Vec<f64> = (0..length).map(factor).collect();
        let factors = Tensor::from_vec(factors, (1, length, 1), &Device::Cpu)?;
        q.broadcast_mul(&factors.to_dtype(self.dtype)?)
    }

    /// Of halves or of neighbours, positions from 0.
    fn rotate(&self, layer: usize, x: &Tensor) -> Result<Tensor> {
        let local = self.spec.local_rotary.as_ref().filter(|_| self.spec.windows[layer].is_some());
        let rotary = local.or(self.spec.rotary.as_ref()).filter(|_| self.spec.rotates[layer]);
        let Some(rotary) = rotary else { return Ok(x.clone()) };
        let (heads, length, head_dim) = x.dims3()?;
        let width = self.spec.rotary_dim;
        let (half, rest) = (width / 2, head_dim - width);
        let (frequencies, factor) = rotary.inverse_frequencies(width, length);
        let table = |f: fn(f64) -> f64| {
            // The angle is an f32 product in every implementation.
            let angle = |i: usize| f64::from((i / half) as f32 * frequencies[i % half]);
            let values = (0..length * half).map(|i| f(angle(i)) * f64::from(factor));
            Tensor::from_vec(values.collect::<Vec<f64>>(), (length, half), &Device::Cpu)?
                .to_dtype(self.dtype)
        };
        let (cos, sin) = (table(f64::cos)?, table(f64::sin)?);
        let neighbours = self.spec.rotary_pairs == RotaryPairs::Neighbours;
        let turned = x.narrow(2, 0, width)?.contiguous()?;
        // Pairs are columns of [2, half], or rows of [half, 2].
        let turned = match neighbours {
            true => turned.reshape((heads, length, half, 2))?.transpose(2, 3)?.contiguous()?,
            false => turned.reshape((heads, length, 2, half))?,
        };
        let (a, b) = (turned.narrow(2, 0, 1)?.squeeze(2)?, turned.narrow(2, 1, 1)?.squeeze(2)?);
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        let turned = Tensor::stack(&[first, second], if neighbours { 3 } else { 2 })?;
        let turned = turned.reshape((heads, length, width))?;
        if rest == 0 {
            return Ok(turned);
        }
        Tensor::cat(&[turned, x.narrow(2, width, rest)?], 2)
    }
}

fn find(linears: &[LinearSpec], role: LinearRole) -> &LinearSpec {
    linears.iter().find(|linear| linear.role == role).expect("the block has it")
}

/// `c·tanh(x / c)`.
fn capped(x: &Tensor, cap: Option<f32>) -> Result<Tensor> {
    match cap.map(f64::from) {
        Some(cap) => (x / cap)?.tanh()? * cap,
        None => Ok(x.clone()),
    }
}

/// 0 where a query may look, far below every score elsewhere.
fn mask(length: usize, window: Option<usize>) -> Result<Tensor> {
    let allowed = |i: usize| {
        let (query, key) = (i / length, i % length);
        key <= query && window.is_none_or(|window| query - key < window)
    };
    let values = (0..length * length).map(|i| if allowed(i) { 0.0 } else { -1e30 });
    Tensor::from_vec(values.collect::<Vec<f64>>(), (1, length, length), &Device::Cpu)
}

fn activate(kind: Activation, x: &Tensor) -> Result<Tensor> {
    let factor = match kind {
        Activation::Silu => (x.neg()?.exp()? + 1.0)?.recip()?,
        Activation::Gelu => (((x / std::f64::consts::SQRT_2)?.erf()? + 1.0)? * 0.5)?,
        Activation::GeluTanh => {
            let inner = ((x + (x.powf(3.0)? * 0.044715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
            ((inner.tanh()? + 1.0)? * 0.5)?
        }
    };
    x * factor
}

/// A pair of modules, of which there are both or none.
fn optional(modules: Option<[String; 2]>) -> [Option<String>; 2] {
    modules.map_or([None, None], |modules| modules.map(Some))
}
