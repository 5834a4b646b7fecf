//! What repacking did to the tensors of each role: sizes and errors.

use serde::Serialize;

/// Independent sums of squares.
const LANES: usize = 16;

/// Sums over the tensors of one role.
#[derive(Debug, Clone, Default)]
pub struct RoleSummary {
    /// Number of tensors.
    pub tensors: usize,
    /// Elements.
    pub elements: usize,
    /// Bytes in the source.
    pub bytes_before: usize,
    /// Bytes in the output.
    pub bytes_after: usize,
    /// Sums over the tensors whose values changed.
    sums: Sums,
    worst_tensor: String,
}

/// The block that lost most.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WorstBlock<'a> {
    /// The tensor that it is in.
    pub tensor: &'a str,
    /// Number of the block in the flattened tensor.
    pub block: usize,
    /// RMS of the error over RMS of the block.
    pub relative_rms: f64,
}

impl RoleSummary {
    /// The figures as a JSON object.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "tensors": self.tensors,
            "elements": self.elements,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": self.bits_per_weight(),
            "relative_rms_error": self.relative_rms_error(),
            "worst_block": self.worst_block(),
        })
    }

    /// Bits for each element in the output.
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.bytes_after as f64 / self.elements as f64
    }

    /// RMS of the error over RMS of the weights; 0 if no value changed.
    pub fn relative_rms_error(&self) -> f64 {
        self.sums.relative_rms()
    }

    /// The block with the largest error; none if no value changed.
    pub fn worst_block(&self) -> Option<WorstBlock<'_>> {
        (self.sums.worst > 0.0).then_some(WorstBlock {
            tensor: &self.worst_tensor,
            block: self.sums.worst_block,
            relative_rms: self.sums.worst,
        })
    }

    /// Adds the errors of tensor `name`.
    pub(super) fn add(&mut self, name: &str, sums: Sums) {
        if sums.worst > self.sums.worst {
            self.worst_tensor = name.to_string();
        }
        self.sums = self.sums.plus(sums);
    }
}

/// Sums of squares of errors and of values, and the block of largest relative error.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Sums {
    error: f64,
    square: f64,
    worst: f64,
    worst_block: usize,
}

impl Sums {
    /// Sums over whole blocks, the first of which is number `first_block`.
    pub(super) fn of(
        original: &[f32],
        restored: &[f32],
        block_size: usize,
        first_block: usize,
    ) -> Self {
        let blocks = original.chunks(block_size).zip(restored.chunks(block_size)).enumerate();
        blocks.fold(Sums::default(), |sums, (index, (original, restored))| {
            sums.plus(Sums::of_block(original, restored, first_block + index))
        })
    }

    fn of_block(original: &[f32], restored: &[f32], block: usize) -> Self {
        // Sums in lanes: one after the other, each addition would wait for the one before.
        let (mut error, mut square) = ([0.0f32; LANES], [0.0f32; LANES]);
        let (whole, rest) = original.as_chunks::<LANES>();
        let (restored_whole, restored_rest) = restored.as_chunks::<LANES>();
        let mut add = |lane: usize, a: f32, b: f32| {
            error[lane] += (a - b) * (a - b);
            square[lane] += a * a;
        };
        for (a, b) in whole.iter().zip(restored_whole) {
            (0..LANES).for_each(|lane| add(lane, a[lane], b[lane]));
        }
        rest.iter().zip(restored_rest).enumerate().for_each(|(lane, (&a, &b))| add(lane, a, b));
        let sum = |lanes: [f32; LANES]| lanes.iter().map(|&sum| f64::from(sum)).sum();
        let sums = Sums { error: sum(error), square: sum(square), worst: 0.0, worst_block: block };
        Sums { worst: sums.relative_rms(), ..sums }
    }

    /// Sums over both; of equally bad blocks the earlier.
    pub(super) fn plus(self, other: Sums) -> Self {
        let worse = if other.worst > self.worst { other } else { self };
        Sums { error: self.error + other.error, square: self.square + other.square, ..worse }
    }

    fn relative_rms(&self) -> f64 {
        if self.square == 0.0 { 0.0 } else { (self.error / self.square).sqrt() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_add_up_and_the_worst_block_is_named() {
        let original = [1.0, 2.0, 4.0, 0.0, 1.0, 1.0];
        let restored = [1.0, 2.0, 4.0, 1.0, 1.0, 0.0];
        let mut summary = RoleSummary::default();
        summary.add("exact", Sums::of(&original, &original, 2, 0));
        assert_eq!(summary.worst_block(), None);
        summary.add("a", Sums::of(&original, &restored, 2, 10));
        // Squares: 23 each time; errors 0, 1, 1; blocks 0, sqrt(1/16), sqrt(1/2).
        assert!((summary.relative_rms_error() - (2.0f64 / 46.0).sqrt()).abs() < 1e-12);
        let worst = summary.worst_block().unwrap();
        assert_eq!((worst.tensor, worst.block), ("a", 12));
        assert!((worst.relative_rms - 0.5f64.sqrt()).abs() < 1e-12);
    }
}
