//! Embedding and head in the host's memory.

use nibble::checkpoint::Checkpoint;
use nibble::data::Batch;
use nibble::kernels::cuda::Cuda;
use nibble::kernels::{Kernels, Storage};
use nibble::model::spec::ModelSpec;
use nibble::model::{Model, Variant};
use nibble::plan::{AdapterRegion, OnHost, Policy, Processor, Settings, WeightBytes, WeightParts};
use nibble_quant::{BlockFormat, FloatType};

use crate::device::Device;
use crate::emulated::Copies;
use crate::golden::Case;
use crate::{Gpu, error_in_norm, gpu, model, nf4, settings, shaped};

/// A model that keeps something on the host, and the bytes that its weights took of the GPU.
fn keeping(gpu: Gpu, what: OnHost, case: &Case, format: Option<BlockFormat>) -> (Model<Gpu>, u64) {
    let gpu = gpu.with_on_host(what);
    gpu.check_model(&case.spec()).unwrap();
    let adapter = Some("adapter_init");
    let settings = settings(case, adapter, &[Policy::Keep], true);
    let before = gpu.driver().counts().allocated_bytes;
    let model = model(&gpu, case, format, adapter, settings);
    let bytes = gpu.driver().counts().allocated_bytes - before - model.arena_bytes();
    (model, bytes as u64)
}

/// Loss and gradients of a step from nothing.
fn step(model: &mut Model<Gpu>, batch: &Batch) -> (f64, Vec<f32>) {
    model.parameters_mut().zero_gradients();
    let loss = model.forward_backward(batch, 1.0 / batch.num_targets() as f32, 0).unwrap().sum;
    (loss, model.parameters().all_values(AdapterRegion::Gradients).unwrap().into_owned())
}

fn batch(case: &Case) -> Batch {
    case.tensors("ref.safetensors").batch("input_ids", "labels").0
}

/// As much less of the GPU's memory as was predicted.
fn assert_moved(
    case: &Case,
    format: Option<BlockFormat>,
    what: OnHost,
    [all, fewer]: [u64; 2],
    measured: WeightParts,
) {
    let checkpoint = Checkpoint::open(&case.path).unwrap();
    let planned =
        WeightBytes::of_checkpoint(&checkpoint, &case.spec(), format.as_ref(), Processor::Gpu);
    assert!(planned.on_host(what) > 0);
    assert_eq!(all - fewer, planned.on_host(what));
    assert_eq!(measured, planned.without(what).resident);
}

#[test]
fn an_input_embedding_on_the_host_gives_the_same_bits() {
    for (name, packed) in [("llama_s0", true), ("mistral_s0", false)] {
        let case = Case::open(name);
        let (batch, format) = (batch(&case), packed.then(|| nf4(true)));
        let Some(gpu) = gpu() else { return };
        let (mut model, all) = keeping(gpu.clone(), OnHost::Nothing, &case, format);
        let expected = step(&mut model, &batch);
        drop(model);
        let (mut model, fewer) = keeping(gpu, OnHost::Input, &case, format);
        assert!(step(&mut model, &batch) == expected && expected.1.iter().any(|x| *x != 0.0));
        assert_moved(&case, format, OnHost::Input, [all, fewer], model.weight_bytes());
    }
}

/// A small model of a vocabulary of four tiles, the last one shorter, and targets in all of them.
fn of_four_tiles(vocab_size: usize, tied: bool) -> (ModelSpec, Batch) {
    let case = Case::open(if tied { "llama_tied_s2" } else { "llama_s0" });
    let mut batch = batch(&case);
    for (index, label) in batch.labels.iter_mut().enumerate().filter(|(_, label)| **label >= 0) {
        *label = (*label + 128 * index as i32) % vocab_size as i32;
    }
    (ModelSpec { vocab_size, ..case.spec() }, batch)
}

/// Rank 16 on all linears, what is said on the host.
fn random_model(
    gpu: &Gpu,
    what: OnHost,
    spec: &ModelSpec,
    batch: &Batch,
    change: impl Fn(&mut Settings),
) -> (Model<Gpu>, u64) {
    let (gpu, adapter) = (gpu.clone().with_on_host(what), shaped::adapter(spec));
    let mut settings = shaped::settings(spec, &adapter, batch, Policy::Checkpoint);
    (settings.logit_rows, settings.cache_tokens) = (10, 40);
    change(&mut settings);
    let before = gpu.driver().counts().allocated_bytes;
    let weights = shaped::weights(spec).upload(&gpu).unwrap();
    let bytes = gpu.driver().counts().allocated_bytes - before;
    let mut model = Model::with_kernels(gpu, spec.clone(), weights, settings).unwrap();
    model.parameters_mut().load(&adapter);
    (model, bytes as u64)
}

/// A head of its own and the embedding's, of even and of odd rows of logits: the same loss and
/// gradients but for roundings, which are fewer; likewise logits, scores and an answer's.
#[test]
fn a_head_on_the_host_gives_the_same_numbers() {
    for (vocab, tied) in [(1200, false), (1001, true)] {
        let Some(gpu) = gpu() else { return };
        let (spec, batch) = of_four_tiles(vocab, tied);
        let rows: Vec<u32> = (0..batch.tokens() as u32).collect();
        let numbers = |model: &mut Model<Gpu>| {
            let (loss, gradients) = step(model, &batch);
            let evaluated = model.evaluate(&batch, Variant::Adapted).unwrap();
            let error = (evaluated.sum / loss - 1.0).abs();
            assert!(error < 1e-6, "{vocab}: {evaluated:?}, {loss}");
            let (score, logits) =
                (model.score(&batch, Variant::Adapted).unwrap(), model.logits(&batch, &rows));
            let hits = score.likeliest.iter().filter(|hit| **hit).count();
            assert_eq!(evaluated.hits, hits as u64);
            model.clear_cache();
            let decoded = model.decode(&batch.input_ids[..3]).unwrap().into_owned();
            (loss, gradients, score, logits.unwrap(), decoded)
        };
        let (mut model, all) = random_model(&gpu, OnHost::Nothing, &spec, &batch, |_| {});
        let expected = numbers(&mut model);
        // Greedy decoding chooses what has the largest logit.
        let likeliest: Vec<bool> = likeliest(&batch, &expected.3, vocab);
        assert_eq!(expected.2.likeliest, likeliest);
        drop(model);
        gpu.driver().forget_products();
        let (mut model, fewer) = random_model(&gpu, OnHost::All, &spec, &batch, |_| {});
        let got = numbers(&mut model);
        let products = gpu.driver().products();
        assert!(products.iter().all(|[_, n, k]| *n.max(k) < vocab / 2), "{vocab}: four tiles");
        let format = BlockFormat::default();
        let planned = WeightBytes::of_config(&spec, FloatType::F32, Some(&format), Processor::Gpu);
        assert_eq!(all - fewer, planned.on_host(OnHost::All));
        assert_eq!(model.weight_bytes(), planned.without(OnHost::All).resident);
        assert!((got.0 / expected.0 - 1.0).abs() < 1e-5, "{vocab}: {}, {}", got.0, expected.0);
        let off = error_in_norm(&got.1, &expected.1);
        assert!(off < 1e-2, "{vocab}: gradients are off by {off:e}");
        assert!((got.2.loss / expected.2.loss - 1.0).abs() < 1e-5);
        assert!(error_in_norm(&got.3, &expected.3) < 5e-3 && got.2.likeliest.len() > 8);
        assert!(error_in_norm(&got.4, &expected.4) < 5e-3);
    }
}

/// Of each trained token, whether no logit is larger than its own.
fn likeliest(batch: &Batch, logits: &[f32], vocab: usize) -> Vec<bool> {
    let starts: Vec<usize> = batch.cu_seqlens.iter().map(|&start| start as usize).collect();
    let predicts = |row: &usize| !starts.contains(&(row + 1)) && batch.labels[row + 1] >= 0;
    let rows = (0..batch.tokens() - 1).filter(predicts);
    rows.map(|row| {
        let logits = &logits[row * vocab..][..vocab];
        logits.iter().all(|&logit| logit <= logits[batch.labels[row + 1] as usize])
    })
    .collect()
}

/// Copies of tiles for each chunk of rows: forward all four, backward the first two, as the last two are
/// still there; and then the first two are, for the next chunk.
fn copies_of(chunks: usize) -> usize {
    2 + 4 * chunks
}

/// Whether the copies of its tiles are as early or as late as they may be, of chunks of rows or all of
/// them, with one buffer and with two; ahead of their turn from the second step on.
#[test]
fn the_tiles_of_a_head_are_there_when_they_are_used() {
    let (spec, batch) = of_four_tiles(1200, false);
    for (ahead, rows) in [(true, 10), (true, 1), (false, 10)] {
        let run = |copies| {
            let gpu = Cuda::new(Device::with(copies)?).unwrap();
            let (mut model, _) = random_model(&gpu, OnHost::All, &spec, &batch, |s| {
                (s.dequantize_ahead, s.logit_rows) = (ahead, rows);
            });
            let first = step(&mut model, &batch);
            assert_eq!(gpu.driver().copied_ahead(), 0);
            let second = step(&mut model, &batch);
            let copied = gpu.driver().copied_ahead();
            Some((first, second, copied))
        };
        let Some((first, second, copied)) = run(Copies::AtOnce) else { return };
        assert!(first == second && first.1.iter().any(|x| *x != 0.0));
        let chunks = batch.num_targets().div_ceil(4 * rows);
        assert_eq!(copied, if ahead { copies_of(chunks) } else { 0 }, "{chunks} chunks");
        if Device::skips_on_a_card("copies at other times") {
            return;
        }
        assert!(run(Copies::WhenAwaited).unwrap() == (first.clone(), second, copied));
        let (again, never, _) = run(Copies::Never).unwrap();
        assert_eq!((again == first, never == first), (true, !ahead));
    }
}

/// Steps of fewer trained tokens, and an evaluation between them: tiles and weights come ahead of their
/// turn all the same.
#[test]
fn another_number_of_trained_tokens_is_no_other_order() {
    let (spec, batch) = of_four_tiles(1200, false);
    let mut fewer = batch.clone();
    fewer.labels[batch.tokens() / 2..].fill(-100);
    let chunks = |batch: &Batch| batch.num_targets().div_ceil(4);
    assert!(chunks(&fewer) > 1 && chunks(&fewer) + 2 < chunks(&batch));
    let Some(gpu) = gpu() else { return };
    let (mut model, _) =
        random_model(&gpu, OnHost::All, &spec, &batch, |settings| settings.logit_rows = 1);
    step(&mut model, &batch);
    for batch in [&fewer, &batch, &fewer, &batch] {
        let before = (gpu.driver().copied_ahead(), gpu.driver().dequantized());
        step(&mut model, batch);
        let copied = gpu.driver().copied_ahead() - before.0;
        assert_eq!(copied, copies_of(chunks(batch)), "{} chunks", chunks(batch));
        // The first ones of all, q, k and v in one product; and those behind the head, where another
        // chunk may have been expected.
        let [in_turn, ahead] = [0, 1].map(|of| gpu.driver().dequantized()[of] - before.1[of]);
        assert!(in_turn <= 3 + 3 && ahead > 25, "{in_turn} in turn, {ahead} ahead");
        model.evaluate(batch, Variant::Adapted).unwrap();
    }
}

#[test]
fn an_embedding_that_is_the_head_moves_with_it() {
    let Some(gpu) = gpu() else { return };
    let tied = Case::open("llama_tied_s2").spec();
    let check = |what| gpu.clone().with_on_host(what).check_model(&tied);
    assert!(check(OnHost::Nothing).is_ok() && check(OnHost::All).is_ok());
    let error = check(OnHost::Input).unwrap_err().to_string();
    assert!(error.contains("is its head, too") && error.contains("--embedding host"), "{error}");
}
