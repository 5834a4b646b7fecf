//! Updates with moments in 8 bits: the whole state as the CPU's, bit for bit.

use nibble::adapter::LoraConfig;
use nibble::kernels::cpu::Cpu;
use nibble::model::parameters::LASTING;
use nibble::random::Stream;

use super::*;

const OPTIMIZER: AdamW = AdamW { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.01 };

#[test]
fn updates_in_8_bits_leave_what_the_cpu_leaves() {
    let Some(gpu) = gpu() else { return };
    let case = Case::open("llama_s0");
    let config = LoraConfig { r: 64, ..LoraConfig::default() };
    let adapter = Adapter::init(config, &case.spec(), 5).unwrap();
    let mut plan = settings(&case, None, &[Policy::Keep], true);
    (plan.targets, plan.optim) = (adapter.targets.clone(), Optim::Adamw8bit);
    let mut device = model(&gpu, &case, None, None, plan.clone());
    let weights =
        Weights::load(&Checkpoint::open(&case.path).unwrap(), &case.spec(), None, None).unwrap();
    let mut host = Model::new(case.spec(), weights, plan).unwrap();
    device.parameters_mut().load(&adapter);
    host.parameters_mut().load(&adapter);
    let loraplus = LoraPlus { lr_ratio: 4.0 };
    let groups = step::rate_groups(host.parameters().tensors(), loraplus);
    let mut gradients = vec![0.0; host.parameters().elements()];
    for step in 1..=4 {
        Stream::new(step, "gradients").fill_normal(0, 1e-2, &mut gradients);
        device.parameters_mut().replace(AdapterRegion::Gradients, &gradients);
        host.parameters_mut().replace(AdapterRegion::Gradients, &gradients);
        let (optimizer, groups) = (&OPTIMIZER, &groups[..]);
        let update = Update { optimizer, groups, step, learning_rate: 1e-3, gradient_scale: 0.5 };
        gpu.update(device.parameters_mut(), &update).unwrap();
        Cpu::default().update(host.parameters_mut(), &update).unwrap();
        for region in LASTING {
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let (got, expected) =
                (device.parameters().all_values(region), host.parameters().all_values(region));
            let (got, expected) = (bits(&got.unwrap()), bits(&expected.unwrap()));
            assert!(got.iter().any(|&word| word != 0), "{region:?} is in use");
            assert!(got == expected, "{region:?} after step {step}");
        }
    }
}
