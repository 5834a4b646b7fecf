//! AdamW: the f32 kernel bit for bit with the CPU's; the 8-bit one also against its definition.

use half::bf16;
use nibble::train::adamw::{AdamW, RateGroup};
use nibble::train::adamw_8bit::{PackedMoment, TensorSlices};
use nibble::train::backend::Update;
use nibble::train::buffers::Buffers;
use nibble_quant::codebook::{dynamic_map, unsigned_dynamic_map};

use crate::emulator::{Argument, NULL};
use crate::support::*;

const OPTIMIZER: AdamW = AdamW { beta1: 0.9, beta2: 0.95, epsilon: 1e-6, weight_decay: 0.05 };
const LEARNING_RATE: f64 = 3e-3;

/// keep, first_weight, beta2, second_weight, second_correction, epsilon, negative_step.
fn coefficients(t: i32) -> [f32; 7] {
    let AdamW { beta1, beta2, epsilon, weight_decay } = OPTIMIZER;
    [
        1.0 - LEARNING_RATE * weight_decay,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        (1.0 - beta2.powi(t)).sqrt(),
        epsilon,
        -(LEARNING_RATE / (1.0 - beta1.powi(t))),
    ]
    .map(|x| x as f32)
}

#[test]
fn ten_updates_have_the_bits_of_the_cpu() {
    in_every_order(|device| {
        let len = 1337;
        let (mut master, mut m, mut v) = (normal(len, "w"), vec![0.0; len], vec![0.0; len]);
        let mut working = vec![POISON; len];
        let (mut cpu_master, mut cpu_m, mut cpu_v) = (master.clone(), m.clone(), v.clone());
        let mut cpu_working = vec![POISON; len];
        for t in 1..=10 {
            let mut gradients = normal(len, &format!("g{t}"));
            let scale = [0.1f32 * t as f32];
            let mut arguments: Vec<Argument> = vec![
                (&mut master[..]).into(),
                gradients[..].into(),
                (&mut m[..]).into(),
                (&mut v[..]).into(),
                (&mut working[..]).into(),
                (len as i64).into(),
                scale[..].into(),
            ];
            arguments.extend(coefficients(t).map(Argument::from));
            device.launch("adamw", [3, 1, 1], 128, 0, &mut arguments);
            let buffers = Buffers {
                master: &mut cpu_master,
                gradients: &mut gradients,
                first_moment: &mut cpu_m,
                second_moment: &mut cpu_v,
                working: Some(&mut cpu_working),
            };
            let groups = [RateGroup { range: 0..len, multiplier: 1.0 }];
            OPTIMIZER.update(t as u64, LEARNING_RATE, scale[0], &groups, buffers);
        }
        assert_eq!((master, m, v), (cpu_master, cpu_m, cpu_v));
        assert_eq!(working, cpu_working);
    });
}

#[test]
fn eight_bit_moments_are_the_nearest_codes() {
    in_every_order(|device| {
        let len = 2 * 256 + 99;
        let (signed, unsigned) = (dynamic_map(), unsigned_dynamic_map());
        let mut master = normal(len, "w");
        let (mut m_codes, mut m_absmax) = (vec![0u8; len], vec![0f32; 3]);
        let (mut v_codes, mut v_absmax) = (vec![0u8; len], vec![0f32; 3]);
        let mut working = vec![POISON; len];
        let (mut cpu_master, mut cpu_codes) = (master.clone(), [vec![0u8; len], vec![0u8; len]]);
        let (mut cpu_absmax, mut cpu_working) = ([vec![0f32; 3], vec![0f32; 3]], working.clone());
        for t in 1..=5 {
            let mut gradients = normal(len, &format!("g{t}"));
            gradients[256..512].fill(0.0);
            let read = |map: &[f32], codes: &[u8], absmax: &[f32]| -> Vec<f32> {
                let value = |(i, &code): (usize, &u8)| map[usize::from(code)] * absmax[i / 256];
                codes.iter().enumerate().map(value).collect()
            };
            let (mut m, mut v) =
                (read(signed, &m_codes, &m_absmax), read(unsigned, &v_codes, &v_absmax));
            let mut expected = master.clone();
            let mut arguments: Vec<Argument> = vec![
                (&mut master[..]).into(),
                gradients[..].into(),
                (&mut m_codes[..]).into(),
                (&mut m_absmax[..]).into(),
                (&mut v_codes[..]).into(),
                (&mut v_absmax[..]).into(),
                signed[..].into(),
                unsigned[..].into(),
                if t == 3 { NULL } else { (&mut working[..]).into() },
                (len as i64).into(),
                [0.5f32][..].into(),
            ];
            arguments.extend(coefficients(t).map(Argument::from));
            device.launch("adamw_8bit", [3, 1, 1], 256, 0, &mut arguments);
            let buffers = Buffers {
                master: &mut expected,
                gradients: &mut gradients,
                first_moment: &mut m,
                second_moment: &mut v,
                working: None,
            };
            let groups = [RateGroup { range: 0..len, multiplier: 1.0 }];
            OPTIMIZER.update(t as u64, LEARNING_RATE, 0.5, &groups, buffers);
            assert_eq!(master, expected);
            let update = Update {
                optimizer: &OPTIMIZER,
                groups: &groups,
                step: t as u64,
                learning_rate: LEARNING_RATE,
                gradient_scale: 0.5,
            };
            let weights = TensorSlices {
                master: &mut cpu_master,
                gradients: &mut gradients,
                working: (t != 3).then_some(&mut cpu_working),
            };
            let [first, second] = &mut cpu_codes;
            let [first_absmax, second_absmax] = &mut cpu_absmax;
            let moments = [(first, first_absmax), (second, second_absmax)];
            update.apply_to_packed(
                weights,
                moments.map(|(codes, absmax)| PackedMoment { codes, absmax }),
            );
            assert_eq!((&master, &working), (&cpu_master, &cpu_working), "as the CPU's");
            assert_eq!([&m_codes, &v_codes], cpu_codes.each_ref());
            assert_eq!([&m_absmax, &v_absmax], cpu_absmax.each_ref());
            for (map, exact, codes, absmax) in
                [(&signed[..], &m, &m_codes, &m_absmax), (&unsigned[..], &v, &v_codes, &v_absmax)]
            {
                for (block, exact) in exact.chunks(256).enumerate() {
                    let largest = exact.iter().fold(0f32, |l, x| l.max(x.abs()));
                    assert_eq!(absmax[block], largest);
                    for (i, &x) in exact.iter().enumerate() {
                        let x = if largest > 0.0 { x / largest } else { 0.0 };
                        let distance = |value: f32| (value - x).abs();
                        let got = distance(map[usize::from(codes[256 * block + i])]);
                        let best = map.iter().map(|&v| distance(v)).fold(f32::INFINITY, f32::min);
                        assert_eq!(got, best, "block {block}, element {i}");
                    }
                }
            }
        }
        let rounded: Vec<bf16> = master.iter().map(|&w| bf16::from_f32(w)).collect();
        assert_eq!(working, rounded);
    });
}
