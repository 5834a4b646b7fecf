//! What adapters put beside large matrices: columns, block diagonals, stacked rows.

use half::bf16;

use crate::emulator::launch;
use crate::support::{POISON, assert_close, band, in_every_order, normal, normal_bf16};

/// Rows and ranks of up to three linears: as of q, k and v, odd, one alone, one without an adapter.
const LINEARS: [[(usize, usize); 3]; 5] = [
    [(64, 16), (24, 16), (24, 16)],
    [(13, 3), (5, 8), (7, 1)],
    [(40, 8), (0, 0), (0, 0)],
    [(9, 4), (6, 0), (11, 12)],
    [(300, 64), (300, 64), (1, 5)],
];
const SCALES: [f32; 3] = [2.0, 0.75, -1.5];

#[test]
fn columns_are_scaled_into_a_band() {
    in_every_order(|device| {
        for (rows, width, from_stride, to_stride) in
            [(5, 16, 16, 32), (700, 48, 56, 64), (4, 3, 3, 8), (9, 13, 17, 21), (1, 8, 8, 24)]
        {
            let from = normal_bf16(rows * from_stride, "columns");
            let mut to = vec![POISON; rows * to_stride];
            launch!(device, "scale_columns_bf16", [2, 1, 1], 64; &from[..], from_stride as i32,
                &mut to[..], to_stride as i32, rows as i32, width as i32, 0.5f32);
            let expected: Vec<f64> = from
                .chunks(from_stride)
                .flat_map(|row| row[..width].iter().map(|x| 0.5 * x.to_f64()))
                .collect();
            assert_eq!(band(&to, width, to_stride), expected);
        }
    });
}

/// `diag(scale · b)` in rows of whole pieces.
fn diagonal(parts: &[(usize, usize); 3], b: &[Vec<f32>]) -> (Vec<f64>, usize) {
    let width = parts.iter().map(|part| part.1).sum::<usize>();
    let padded = width.next_multiple_of(8);
    let (mut out, mut first) = (Vec::new(), 0);
    for ((&(rows, rank), b), scale) in parts.iter().zip(b).zip(SCALES) {
        for row in 0..rows {
            let mut line = vec![0.0; padded];
            for column in 0..rank {
                let value = bf16::from_f32(scale * b[row * rank + column]);
                line[first + column] = value.to_f64();
            }
            out.extend(line);
        }
        first += rank;
    }
    (out, padded)
}

#[test]
fn a_block_diagonal_has_zeros_beside_it() {
    in_every_order(|device| {
        for parts in &LINEARS {
            let rows: usize = parts.iter().map(|part| part.0).sum();
            let number = |i: usize| format!("b{i}");
            let halves: Vec<Vec<bf16>> =
                (0..3).map(|i| normal_bf16(parts[i].0 * parts[i].1, &number(i))).collect();
            let wide: Vec<Vec<f32>> =
                (0..3).map(|i| normal(parts[i].0 * parts[i].1, &number(i))).collect();
            let widened: Vec<Vec<f32>> =
                halves.iter().map(|b| b.iter().map(|x| x.to_f32()).collect()).collect();
            let [sizes, ranks] =
                [0, 1].map(|which| parts.map(|p| if which == 0 { p.0 } else { p.1 } as i32));
            for (from, extra) in [(&widened, 8), (&wide, 8), (&widened, 5)] {
                let (expected, padded) = diagonal(parts, from);
                let stride = padded + extra;
                let mut to = vec![POISON; rows * stride];
                if std::ptr::eq(from, &wide) {
                    launch!(device, "diagonal_f32_bf16", [3, 1, 1], 64;
                        &wide[0][..], &wide[1][..], &wide[2][..], sizes[0], sizes[1], sizes[2],
                        ranks[0], ranks[1], ranks[2], SCALES[0], SCALES[1], SCALES[2],
                        &mut to[..], stride as i32);
                } else {
                    launch!(device, "diagonal_bf16", [3, 1, 1], 64;
                        &halves[0][..], &halves[1][..], &halves[2][..], sizes[0], sizes[1],
                        sizes[2], ranks[0], ranks[1], ranks[2], SCALES[0], SCALES[1], SCALES[2],
                        &mut to[..], stride as i32);
                }
                assert_eq!(band(&to, padded, stride), expected);
            }
        }
    });
}

#[test]
fn rows_are_stacked_and_added_back() {
    in_every_order(|device| {
        for (width, stride) in [(96, 96), (77, 80)] {
            for ranks in [[16, 16, 16], [3, 8, 1], [5, 0, 0], [4, 12, 0]] {
                let rows: usize = ranks.iter().sum();
                let a = [0, 1, 2].map(|i| normal_bf16(ranks[i] * width, &format!("a{i}")));
                let wide = a.clone().map(|a| a.iter().map(|x| x.to_f32()).collect::<Vec<_>>());
                let sizes = ranks.map(|rank| rank as i32);
                let expected: Vec<f64> = a.iter().flatten().map(|x| x.to_f64()).collect();
                let grid = [rows as u32, 1, 1];
                let mut to = vec![POISON; rows * stride];
                launch!(device, "stack_rows_bf16", grid, 64; &a[0][..], &a[1][..], &a[2][..],
                    sizes[0], sizes[1], width as i32, &mut to[..], stride as i32);
                assert_eq!(band(&to, width, stride), expected);
                let mut to = vec![POISON; rows * stride];
                launch!(device, "stack_rows_f32_bf16", grid, 64; &wide[0][..], &wide[1][..],
                    &wide[2][..], sizes[0], sizes[1], width as i32, &mut to[..],
                    stride as i32);
                assert_eq!(band(&to, width, stride), expected);
                let from = normal(rows * width, "gradients");
                let mut sums = wide.clone();
                let [first, second, third] = &mut sums;
                launch!(device, "add_stacked_f32", grid, 64; &from[..], &mut first[..],
                    &mut second[..], &mut third[..], sizes[0], sizes[1], width as i32);
                let got: Vec<f64> = sums.iter().flatten().map(|&x| f64::from(x)).collect();
                let expected: Vec<f64> =
                    expected.iter().zip(&from).map(|(a, g)| a + f64::from(*g)).collect();
                assert_close(&got, &expected, 1e-6, 1e-6);
            }
        }
    });
}
