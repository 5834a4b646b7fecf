//! AdamW's moments in 8 bits, where a backend keeps them.

use super::parameters::Part;

/// Moments in 8 bits; codes are bytes in f32 words.
pub struct PackedMoments<B> {
    /// Codes of the first moments.
    pub first_codes: B,
    /// Their scales.
    pub first_absmax: B,
    /// Codes of the second moments.
    pub second_codes: B,
    /// Their scales.
    pub second_absmax: B,
}

impl<B> PackedMoments<B> {
    pub(super) fn buffer(&self, part: Part) -> &B {
        match part {
            Part::FirstCodes => &self.first_codes,
            Part::FirstAbsmax => &self.first_absmax,
            Part::SecondCodes => &self.second_codes,
            Part::SecondAbsmax => &self.second_absmax,
            other => panic!("{other:?} is no moments in 8 bits"),
        }
    }

    pub(super) fn buffer_mut(&mut self, part: Part) -> &mut B {
        match part {
            Part::FirstCodes => &mut self.first_codes,
            Part::FirstAbsmax => &mut self.first_absmax,
            Part::SecondCodes => &mut self.second_codes,
            Part::SecondAbsmax => &mut self.second_absmax,
            other => panic!("{other:?} is no moments in 8 bits"),
        }
    }
}
