//! A right operand that several products on one thread share.

use super::{Band, Block, CACHE_LINE, Isa, Matrix, MatrixMut, Operand, Panels, Precision};

/// The right operand `[K, N]` of several products, packed once: K is one chain.
#[derive(Debug, Clone, Copy)]
pub struct PackedOperand<'a> {
    panels: Panels<'a>,
    rows: usize,
    isa: Isa,
}

impl<'a> PackedOperand<'a> {
    /// Elements that packing `[rows, columns]` takes.
    pub fn elements(rows: usize, columns: usize) -> usize {
        rows * columns.next_multiple_of(CACHE_LINE)
    }

    /// Packs `b` into the first [`elements`](Self::elements) of `into`, for products in `precision`;
    /// fastest where they begin at a cache line.
    ///
    /// # Panics
    /// When `into` is too short.
    pub fn pack(b: Matrix, into: &'a mut [f32], precision: Precision) -> Self {
        let (isa, rows, columns) = (Isa::detect(precision), b.rows, b.columns);
        let steps = rows.div_ceil(precision.per_step());
        let data = &mut into[..steps * columns.next_multiple_of(isa.lanes())];
        let a = Matrix { rows: 0, columns: rows, ..b };
        let visits = [vec![Block { a, b: Operand::Dense(b), k: 0..rows, scale: 1.0 }]];
        let (width, alpha, beta, stream) = (isa.columns(), 1.0, 0.0, false);
        let band = Band { isa, visits: &visits, width, alpha, beta, stream };
        band.pack(0..columns, data, false);
        PackedOperand { panels: Panels { data, columns, unused: 0 }, rows, isa }
    }

    /// `c = alpha·a·b + beta·c` on this thread, with as many of b's first rows and columns as `a`
    /// has columns and `c` has.
    ///
    /// # Panics
    /// When there are not as many, or `a` and `c` differ in rows.
    pub fn gemm(&self, alpha: f32, a: Matrix, beta: f32, c: MatrixMut) {
        assert_eq!(a.rows, c.rows, "rows of a product agree");
        let (used, columns) = (a.columns, c.columns);
        assert!(used <= self.rows && columns <= self.panels.columns, "rows and columns exist");
        if a.rows == 0 || columns == 0 {
            return;
        }
        // The panels are there: nothing reads `b`.
        let b = Operand::Dense(Matrix { rows: used, columns, ..a });
        let visits = [vec![Block { a, b, k: 0..used, scale: 1.0 }]];
        let (isa, width, stream) = (self.isa, self.isa.columns(), false);
        let band = Band { isa, visits: &visits, width, alpha, beta, stream };
        let steps = |rows: usize| rows.div_ceil(isa.precision().per_step());
        let panels = Panels { unused: steps(self.rows) - steps(used), ..self.panels };
        band.compute(Some(panels), 0, c, false);
    }
}
