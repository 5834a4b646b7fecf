//! What one optimizer step touches, as flat slices.

use std::ops::Range;

use half::bf16;

use crate::kernels::cpu::Cpu;
use crate::model::parameters::OptimizerView;

/// Elements that one task works on; a constant, so that sums do not depend on the thread count.
pub const CHUNK: usize = 1 << 14;

/// Weights, gradients and moments of the same elements. All slices have one length.
pub struct Buffers<'a> {
    /// f32 weights.
    pub master: &'a mut [f32],
    /// f32 gradients.
    pub gradients: &'a mut [f32],
    /// First moments.
    pub first_moment: &'a mut [f32],
    /// Second moments.
    pub second_moment: &'a mut [f32],
    /// bf16 copies of the weights, if the forward pass reads those.
    pub working: Option<&'a mut [bf16]>,
}

impl<'a> From<OptimizerView<'a, Cpu>> for Buffers<'a> {
    fn from(view: OptimizerView<'a, Cpu>) -> Self {
        let OptimizerView { master, gradients, moments: [first, second], working, .. } = view;
        let (first_moment, second_moment) = (&mut *first.floats, &mut *second.floats);
        let working = working.map(|working| &mut **working);
        Buffers { master, gradients, first_moment, second_moment, working }
    }
}

impl<'a> Buffers<'a> {
    /// The buffers cut into pieces of [`CHUNK`], the last one shorter.
    pub fn chunks(self) -> Vec<Buffers<'a>> {
        let mut working = self.working.map(|slice| slice.chunks_mut(CHUNK));
        let weights = self.master.chunks_mut(CHUNK).zip(self.gradients.chunks_mut(CHUNK));
        let moments = self.first_moment.chunks_mut(CHUNK).zip(self.second_moment.chunks_mut(CHUNK));
        weights
            .zip(moments)
            .map(|((master, gradients), (first_moment, second_moment))| Buffers {
                master,
                gradients,
                first_moment,
                second_moment,
                working: working.as_mut().and_then(Iterator::next),
            })
            .collect()
    }

    /// The elements of `range`.
    pub fn slice(&mut self, range: Range<usize>) -> Buffers<'_> {
        Buffers {
            master: &mut self.master[range.clone()],
            gradients: &mut self.gradients[range.clone()],
            first_moment: &mut self.first_moment[range.clone()],
            second_moment: &mut self.second_moment[range.clone()],
            working: self.working.as_deref_mut().map(|slice| &mut slice[range]),
        }
    }
}
