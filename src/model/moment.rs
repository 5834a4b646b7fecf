//! AdamW's moments, where a backend keeps them.

use crate::plan::AdapterRegion;

/// One of AdamW's two moments of all tensors: each tensor's is in f32 or in 8 bits, as
/// [`MomentPlace`](crate::plan::MomentPlace) says.
pub struct Moment<B> {
    /// The moments in f32.
    pub floats: B,
    /// The moments in 8 bits, if there are any.
    pub blocks: Option<MomentBlocks<B>>,
}

/// Moments in 8 bits, in blocks that share a scale.
pub struct MomentBlocks<B> {
    /// A byte for each moment, four in an f32 word.
    pub codes: B,
    /// A scale for each block.
    pub absmax: B,
}

impl<B> Moment<B> {
    /// The buffer of `region`, which is one of this moment.
    pub(super) fn buffer(&self, region: AdapterRegion) -> Option<&B> {
        use AdapterRegion::*;
        match region {
            FirstCodes | SecondCodes => self.blocks.as_ref().map(|blocks| &blocks.codes),
            FirstAbsmax | SecondAbsmax => self.blocks.as_ref().map(|blocks| &blocks.absmax),
            _ => Some(&self.floats),
        }
    }

    /// [`buffer`](Moment::buffer), to be overwritten.
    pub(super) fn buffer_mut(&mut self, region: AdapterRegion) -> Option<&mut B> {
        use AdapterRegion::*;
        match region {
            FirstCodes | SecondCodes => self.blocks.as_mut().map(|blocks| &mut blocks.codes),
            FirstAbsmax | SecondAbsmax => self.blocks.as_mut().map(|blocks| &mut blocks.absmax),
            _ => Some(&mut self.floats),
        }
    }
}
