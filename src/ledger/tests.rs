use super::*;

fn sample(seconds: f64, phase: Phase, resident_bytes: u64) -> Sample {
    Sample { seconds, phase, resident_bytes, file_bytes: resident_bytes / 2 }
}

#[test]
fn peaks_are_kept_by_phase_and_survive_thinning() {
    let mut record = Record::default();
    for (index, bytes) in [5, 9, 7, 3, 8, 2].into_iter().enumerate() {
        let phase = if index < 4 { Phase::Forward } else { Phase::Save };
        record.add(sample(index as f64, phase, bytes));
    }
    assert_eq!((record.peak_of(Phase::Forward), record.peak_of(Phase::Save)), (Some(9), Some(8)));
    assert_eq!(record.peak_of(Phase::Eval), None);
    assert_eq!(record.peak_file_bytes(), 4);
    record.thin();
    let kept: Vec<u64> = record.samples.iter().map(|sample| sample.resident_bytes).collect();
    assert_eq!(kept, [9, 7, 8]);
}

/// A run of hours: a short peak late in it is seen, and samples stay few and in order.
#[test]
fn a_long_record_stays_short_and_keeps_late_peaks() {
    let (mut record, looks) = (Record::default(), 400_000);
    for index in 0..looks {
        let late = if index == looks - 7 { 50 } else { 0 };
        let phase = if index % 5 == 4 { Phase::Optimizer } else { Phase::Forward };
        record.add(sample(0.01 * index as f64, phase, 100 + index % 9 + late));
    }
    assert!(record.samples.len() <= MOST_SAMPLES);
    assert!(record.samples.len() > MOST_SAMPLES / 4, "{}", record.samples.len());
    assert!(record.samples.is_sorted_by(|a, b| a.seconds < b.seconds));
    let highest = record.samples.iter().map(|sample| sample.resident_bytes).max();
    assert_eq!(highest, Some(150 + (looks - 7) % 9));
    assert_eq!(record.peak_of(Phase::Forward), highest);
}

/// No phase is too short to be seen: each one is looked at where it ends.
#[cfg(target_os = "linux")]
#[test]
fn phases_of_no_length_are_recorded() {
    let seen = || {
        let recorder = Recorder::start();
        for phase in [Phase::Forward, Phase::Loss, Phase::Backward, Phase::Save, Phase::Load] {
            enter(phase);
        }
        let record = recorder.record();
        let ended = [Phase::Forward, Phase::Loss, Phase::Backward, Phase::Save];
        ended.iter().all(|&phase| record.peak_of(phase).is_some_and(|bytes| bytes > 0))
    };
    // Other tests of this process enter phases in the meantime.
    assert!((0..50).any(|_| seen()));
}

/// What looking costs steps: `cargo test --release --lib recorder_costs -- --ignored --nocapture`.
/// The work of a step is a sum over 8 MiB in four phases, about 2 ms.
#[cfg(target_os = "linux")]
#[test]
#[ignore = "a measurement"]
fn recorder_costs() {
    let values = vec![1.0f32; 2 << 20];
    let step = || {
        for phase in [Phase::Forward, Phase::Loss, Phase::Backward, Phase::Optimizer] {
            enter(phase);
            std::hint::black_box(std::hint::black_box(&values).iter().sum::<f32>());
        }
    };
    let seconds_a_step = || {
        const STEPS: u32 = 100;
        let start = Instant::now();
        (0..STEPS).for_each(|_| step());
        start.elapsed().as_secs_f64() / f64::from(STEPS)
    };
    let least = |recorded: bool| {
        let once = || {
            let _recorder = recorded.then(Recorder::start);
            seconds_a_step()
        };
        (0..7).map(|_| once()).fold(f64::INFINITY, f64::min)
    };
    let (without, with) = (least(false), least(true));
    let look = {
        const LOOKS: u32 = 20_000;
        let start = Instant::now();
        for _ in 0..LOOKS {
            std::hint::black_box(Sample::now(start));
        }
        start.elapsed().as_secs_f64() / f64::from(LOOKS)
    };
    println!(
        "a step: {:.3} ms, recorded {:.3} ms ({:+.2} %); a look: {:.1} µs",
        1e3 * without,
        1e3 * with,
        100.0 * (with / without - 1.0),
        1e6 * look
    );
}

#[cfg(target_os = "linux")]
#[test]
fn a_recorder_sees_a_buffer_come_and_go() {
    const BYTES: usize = 192 << 20;
    let seen = || {
        let recorder = Recorder::start();
        let before = recorder.look();
        let buffer = std::hint::black_box(vec![1u8; BYTES]);
        std::thread::sleep(4 * INTERVAL);
        drop(buffer);
        let record = recorder.record();
        let highest = record.samples.iter().map(Sample::anonymous_bytes).max().unwrap();
        record.samples.len() >= 3 && highest > before.anonymous_bytes() + BYTES as u64 / 2
    };
    // Memory of other tests of this process comes and goes in the meantime.
    assert!((0..20).any(|_| seen()));
}
