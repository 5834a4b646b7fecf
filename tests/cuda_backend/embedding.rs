//! The embedding in the host's memory.

use nibble::checkpoint::Checkpoint;
use nibble::kernels::Kernels;
use nibble::model::parameters::Part;
use nibble::plan::{Place, Policy, WeightBytes};

use crate::golden::Case;
use crate::{gpu, model, nf4, settings};

/// The same loss and gradients, with as much less of the GPU's memory as was predicted.
#[test]
fn an_embedding_on_the_host_gives_the_same_bits() {
    for (name, packed) in [("llama_s0", true), ("mistral_s0", false)] {
        let case = Case::open(name);
        let (batch, _) = case.tensors("ref.safetensors").batch("input_ids", "labels");
        let format = packed.then(|| nf4(true));
        let run = |on_host: bool| {
            let gpu = gpu()?;
            let gpu = if on_host { gpu.with_embedding_on_host() } else { gpu };
            gpu.check(&case.spec()).unwrap();
            let adapter = Some("adapter_init");
            let settings = settings(&case, adapter, &[Policy::Keep], true);
            let before = gpu.driver().counts().allocated_bytes;
            let mut model = model(&gpu, &case, format, adapter, settings, None);
            let bytes = gpu.driver().counts().allocated_bytes - before - model.arena_bytes();
            let scale = 1.0 / batch.num_targets as f32;
            let loss = model.forward_backward(&batch, scale, 0).unwrap();
            let gradients = model.parameters().values(Part::Gradients).unwrap().into_owned();
            Some(((loss.to_bits(), gradients), bytes as u64, model.weight_bytes()))
        };
        let Some((expected, bytes, _)) = run(false) else { return };
        let (got, fewer, measured) = run(true).unwrap();
        assert!(got == expected && got.1.iter().any(|x| *x != 0.0), "{name}");
        let checkpoint = Checkpoint::open(&case.path).unwrap();
        let planned =
            WeightBytes::of_checkpoint(&checkpoint, &case.spec(), format.as_ref(), Place::Gpu);
        assert_eq!(bytes - fewer, planned.embedding, "{name}");
        assert_eq!(measured, planned.with_embedding_on_host().resident, "{name}");
    }
}

#[test]
fn an_embedding_that_is_the_head_stays() {
    let Some(gpu) = gpu() else { return };
    let tied = Case::open("llama_tied_s2").spec();
    assert!(gpu.check(&tied).is_ok());
    let error = gpu.with_embedding_on_host().check(&tied).unwrap_err().to_string();
    assert!(error.contains("is its head, too"), "{error}");
}
