//! The passes of the MLP's nonlinearity with the adapters' share in them, beside the kernels that make one
//! of their results each, and f64.

use half::bf16;

use crate::emulator::{Argument, Device, NULL, ORDERS, devices, launch};
use crate::support::*;

/// Rows, width, ranks of gate, up and down, rows of a chunk, and what lies behind the rows.
struct Shape {
    rows: usize,
    width: usize,
    ranks: [usize; 3],
    chunk: usize,
    behind: usize,
}

const SHAPES: [Shape; 7] = [
    Shape { rows: 37, width: 520, ranks: [16, 16, 16], chunk: 16, behind: 16 },
    Shape { rows: 1, width: 8, ranks: [8, 8, 8], chunk: 16, behind: 8 },
    Shape { rows: 50, width: 72, ranks: [8, 16, 8], chunk: 64, behind: 16 },
    Shape { rows: 65, width: 264, ranks: [32, 32, 32], chunk: 32, behind: 32 },
    Shape { rows: 20, width: 40, ranks: [24, 8, 16], chunk: 16, behind: 24 },
    Shape { rows: 96, width: 16, ranks: [8, 32, 24], chunk: 96, behind: 32 },
    Shape { rows: 33, width: 1032, ranks: [16, 8, 16], chunk: 48, behind: 16 },
];

/// What the kernels are given.
struct Inputs {
    gate: Vec<bf16>,
    up: Vec<bf16>,
    d_out: Vec<bf16>,
    b: [Vec<bf16>; 2],
    /// ax of gate and up side by side, 8 columns of another matrix behind them.
    ax: Vec<bf16>,
    t: Vec<bf16>,
}

/// What they make.
struct Outputs {
    d_gate: Vec<bf16>,
    d_up: Vec<bf16>,
    /// t of gate and up, side by side.
    both: Vec<bf16>,
    gradients: [Vec<f32>; 3],
}

const SCALES: [f32; 2] = [2.0, 0.75];

impl Inputs {
    fn new(shape: &Shape) -> Self {
        let Shape { rows, width, ranks, .. } = *shape;
        Inputs {
            gate: normal_bf16(rows * width, "gate"),
            up: normal_bf16(rows * width, "up"),
            d_out: normal_bf16(rows * width, "d_out"),
            b: [0, 1].map(|i| normal_bf16(width * ranks[i], &format!("b{i}"))),
            ax: normal_bf16(rows * (ranks[0] + ranks[1] + 8), "ax"),
            t: normal_bf16(rows * (ranks[2] + 8), "t"),
        }
    }
}

/// Dynamic shared memory of the entry for adapters of `most` columns.
fn shared_bytes(most: usize) -> usize {
    if most == 16 { 101_376 } else { 82_944 }
}

fn run(device: &Device, shape: &Shape, kind: i32, inputs: &Inputs) -> Outputs {
    let Shape { rows, width, ranks, chunk, behind } = *shape;
    let most = if ranks.iter().all(|&rank| rank <= 16) { 16 } else { 32 };
    let (strips, chunks) = (width.div_ceil(8192 / most), rows.div_ceil(chunk));
    let (stride, wide_stride) = (width as i32, (width + behind) as i32);
    let mut d_gate = with_stride(&inputs.d_out, width, width + behind);
    let mut d_up = vec![POISON; rows * (width + behind)];
    let mut inner = vec![f32::NAN; strips * rows * 2 * most];
    let mut sums = vec![f32::NAN; chunks * 3 * most * width];
    // In place: d_gate is d_out.
    let d_out = Argument::from(&mut d_gate[..]);
    let (kernel, grid) = (format!("mlp_adapters_backward_{most}"), [strips, chunks, 1]);
    let ranks_of = ranks.map(|rank| rank as i32);
    launch!(device, &kernel, grid.map(|x| x as u32), 256, shared_bytes(most);
        kind, &inputs.gate[..], stride, &inputs.up[..], stride, d_out, wide_stride,
        d_out, wide_stride, &mut d_up[..], wide_stride, &inputs.b[0][..], ranks_of[0],
        &inputs.b[1][..], ranks_of[1], &inputs.ax[..], &inputs.ax[ranks[0]..],
        ranks_of[0] + ranks_of[1] + 8, &inputs.t[..], ranks_of[2] + 8, ranks_of[2], rows as i32,
        stride, chunk as i32, &mut inner[..], &mut sums[..]);
    let mut both = vec![POISON; rows * (ranks[0] + ranks[1])];
    let [t_gate, t_up] = [&mut d_gate, &mut d_up].map(|to| Argument::from(&mut to[width..]));
    launch!(device, "mlp_adapters_inner", [2, 1, 1], 64; &inner[..], strips as i32, rows as i32,
        most as i32, ranks_of[0], ranks_of[1], SCALES[0], SCALES[1], t_gate, wide_stride, t_up,
        wide_stride, &mut both[..], ranks_of[0] + ranks_of[1]);
    let mut gradients = ranks.map(|rank| vec![1.0f32; rank * width]);
    let [b_gate, b_up, a_down] = &mut gradients;
    let grid = [width.div_ceil(256) as u32, 3 * most as u32 / 8, 1];
    launch!(device, "mlp_adapters_gradients", grid, 256; &sums[..], chunks as i32, most as i32,
        stride, ranks_of[0], ranks_of[1], ranks_of[2], SCALES[0], SCALES[1], &mut b_gate[..],
        &mut b_up[..], &mut a_down[..]);
    Outputs { d_gate, d_up, both, gradients }
}

/// The first `width` columns of rows of `stride`.
fn columns(values: &[bf16], width: usize, stride: usize) -> Vec<f64> {
    values.chunks_exact(stride).flat_map(|row| wide(&row[..width])).collect()
}

/// `out[i, j] = Σ_k left(i, k)·right(k, j)`, and the largest sum of magnitudes.
fn product(
    [m, n, k]: [usize; 3],
    left: impl Fn(usize, usize) -> f64,
    right: impl Fn(usize, usize) -> f64,
) -> (Vec<f64>, f64) {
    let (mut out, mut most) = (Vec::with_capacity(m * n), 0f64);
    for i in 0..m {
        for j in 0..n {
            let terms = (0..k).map(|k| left(i, k) * right(k, j));
            let (sum, size) = terms.fold((0.0, 0.0), |(s, a), x| (s + x, a + x.abs()));
            out.push(sum);
            most = most.max(size);
        }
    }
    (out, most)
}

/// Compares the outputs.
fn check(device: &Device, shape: &Shape, kind: i32) {
    let Shape { rows, width, ranks, behind, .. } = *shape;
    let inputs = Inputs::new(shape);
    let Outputs { d_gate, d_up, both, gradients } = run(device, shape, kind, &inputs);
    let [mut h, mut dg, mut du] = [0; 3].map(|_| vec![POISON; rows * width]);
    let (grid, n) = ([rows as u32, 1, 1], width as i32);
    launch!(device, "mlp_forward", grid, 32; kind, &inputs.gate[..], n, &inputs.up[..], n,
        &mut h[..], n, n);
    launch!(device, "mlp_backward", grid, 32; kind, &inputs.gate[..], n, &inputs.up[..], n,
        &inputs.d_out[..], n, &mut dg[..], n, &mut du[..], n, n);
    let stride = width + behind;
    let made = [&d_gate, &d_up].map(|values| columns(values, width, stride));
    for (made, expected) in made.iter().zip([&dg, &du]) {
        assert_close(made, &wide(expected), 1e-6, BF16_ROUNDING);
    }
    let [dg, du] = &made;
    let h = wide(&h);
    let ax_stride = ranks[0] + ranks[1] + 8;
    let close = |got: &[f64], (expected, most): (Vec<f64>, f64), scale: f64, rounding: f64| {
        let expected: Vec<f64> = expected.iter().map(|x| scale * x).collect();
        assert_close(got, &expected, 2e-6 * most * scale + 1e-6, rounding);
    };
    // t: behind the rows, and side by side.
    for (which, matrix) in [(0, dg), (1, du)] {
        let (rank, b) = (ranks[which], wide(&inputs.b[which]));
        let expected =
            product([rows, rank, width], |i, k| matrix[i * width + k], |k, j| b[k * rank + j]);
        let source = if which == 0 { &d_gate } else { &d_up };
        let tails: Vec<bf16> =
            source.chunks_exact(stride).flat_map(|row| &row[width..]).copied().collect();
        let tails = band(&tails, rank, behind);
        let beside: Vec<bf16> = both
            .chunks_exact(ranks[0] + ranks[1])
            .flat_map(|row| &row[which * ranks[0]..][..rank])
            .copied()
            .collect();
        assert_eq!(tails, wide(&beside));
        close(&tails, expected, SCALES[which].into(), BF16_ROUNDING);
    }
    // Gradients, added to ones.
    let less_one = |values: &[f32]| values.iter().map(|x| f64::from(*x) - 1.0).collect::<Vec<_>>();
    for (which, matrix) in [(0, dg), (1, du)] {
        let first = which * ranks[0];
        let expected = product(
            [width, ranks[which], rows],
            |i, k| matrix[k * width + i],
            |k, j| inputs.ax[k * ax_stride + first + j].to_f64(),
        );
        close(&less_one(&gradients[which]), expected, SCALES[which].into(), 1e-6);
    }
    let expected = product(
        [ranks[2], width, rows],
        |i, k| inputs.t[k * (ranks[2] + 8) + i].to_f64(),
        |k, j| h[k * width + j],
    );
    close(&less_one(&gradients[2]), expected, 1.0, 1e-5);
}

/// h and `x·Aᵀ` of the down projection, which has the third rank; without h where that is not wanted.
fn run_forward(device: &Device, shape: &Shape, kind: i32, wanted: bool) -> [Vec<bf16>; 2] {
    let Shape { rows, width, ranks: [.., rank], chunk, behind } = *shape;
    let Inputs { gate, up, .. } = Inputs::new(shape);
    let a = normal_bf16(rank * width, "a");
    let most = if rank <= 16 { 16 } else { 32 };
    let (strips, chunks) = (width.div_ceil(512), rows.div_ceil(chunk));
    let mut h = vec![POISON; rows * (width + behind)];
    let mut inner = vec![f32::NAN; strips * rows * most];
    let out = if wanted { Argument::from(&mut h[..]) } else { NULL };
    let (kernel, grid) =
        (format!("mlp_adapters_forward_{most}"), [strips as u32, chunks as u32, 1]);
    let [rank_of, stride] = [rank, width].map(|x| x as i32);
    launch!(device, &kernel, grid, 256, 98_304; kind, &gate[..], stride, &up[..], stride, out,
        (width + behind) as i32, &a[..], rank_of, rows as i32, stride, chunk as i32,
        &mut inner[..]);
    let mut ax = vec![POISON; rows * (rank + 8)];
    launch!(device, "mlp_adapters_project", [2, 1, 1], 64; &inner[..], strips as i32, rows as i32,
        most as i32, rank_of, &mut ax[..], rank_of + 8);
    [h, ax]
}

fn check_forward(device: &Device, shape: &Shape, kind: i32) {
    let Shape { rows, width, ranks: [.., rank], behind, .. } = *shape;
    let inputs = Inputs::new(shape);
    let [h, ax] = run_forward(device, shape, kind, true);
    let (grid, n) = ([rows as u32, 1, 1], width as i32);
    let mut expected = vec![POISON; rows * width];
    launch!(device, "mlp_forward", grid, 32; kind, &inputs.gate[..], n, &inputs.up[..], n,
        &mut expected[..], n, n);
    let h = band(&h, width, width + behind);
    assert_close(&h, &wide(&expected), 1e-6, BF16_ROUNDING);
    let a = wide(&normal_bf16(rank * width, "a"));
    let (projected, most) =
        product([rows, rank, width], |i, k| h[i * width + k], |k, j| a[j * width + k]);
    let got = band(&ax, rank, rank + 8);
    assert_close(&got, &projected, 2e-6 * most + 1e-6, BF16_ROUNDING);
    let [_, alone] = run_forward(device, shape, kind, false);
    assert_eq!(band(&alone, rank, rank + 8), got);
}

#[test]
fn the_forward_pass_has_the_projection_of_what_it_makes() {
    in_every_order(|device| {
        for (number, shape) in SHAPES.iter().enumerate() {
            check_forward(device, shape, number as i32 % 3);
        }
    });
}

#[test]
fn the_share_of_the_adapters_is_that_of_products_of_their_own() {
    in_every_order(|device| {
        for (number, shape) in SHAPES.iter().enumerate() {
            check(device, shape, number as i32 % 3);
        }
    });
}

/// Each sum has one order.
#[test]
fn every_run_gives_the_same_bits() {
    for device in devices() {
        for shape in &SHAPES[2..5] {
            let inputs = Inputs::new(shape);
            let bits = |&order| {
                device.order(order);
                let Outputs { d_gate, d_up, both, gradients } = run(device, shape, 0, &inputs);
                let [h, ax] = run_forward(device, shape, 0, true);
                let halves = [d_gate, d_up, both, h, ax]
                    .map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
                (halves, gradients.map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>()))
            };
            let mut all = ORDERS.iter().map(bits);
            let first = all.next().unwrap();
            assert!(all.all(|other| other == first));
        }
    }
}

/// For tests of the tests; what is wrong is a panic.
pub fn is_right(device: &Device) -> bool {
    check(device, &SHAPES[2], 0);
    true
}

/// The same with adapters of more than 16 columns.
pub fn is_wide_right(device: &Device) -> bool {
    check(device, &SHAPES[4], 0);
    true
}

/// The same of the forward pass.
pub fn is_forward_right(device: &Device) -> bool {
    check_forward(device, &SHAPES[2], 0);
    true
}

/// For counts of what it does to memory.
pub fn run_once(device: &Device, most: usize) {
    let shape = Shape { rows: 64, width: 512, ranks: [most; 3], chunk: 64, behind: most };
    run(device, &shape, 0, &Inputs::new(&shape));
    run_forward(device, &shape, 0, true);
}
