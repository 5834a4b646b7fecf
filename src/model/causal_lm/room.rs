//! Fewer tokens in a pass, where memory turned out to be short.

use super::{Frozen, Model};
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::model::parameters::Part;
use crate::model::spec::ModelSpec;
use crate::model::weights::Weights;
use crate::plan::Settings;

impl<K: Kernels> Model<K> {
    /// The same model, adapter and moments with buffers for fewer tokens in a pass: half as many,
    /// but never fewer than the longest document. The old buffers are given back before the new
    /// ones are asked for; gradients are lost.
    ///
    /// # Errors
    /// `Budget` when there is no memory for one document, or those of the backend.
    pub fn with_fewer_tokens(self) -> Result<Self> {
        let read = |part| self.parameters.values(part).map(|values| values.into_owned());
        let lasting = Part::LASTING.map(read).into_iter().collect::<Result<Vec<_>>>()?;
        let settings = fewer(&self.settings);
        let mut model = self.without_buffers().with_room(settings)?;
        for (part, values) in Part::LASTING.into_iter().zip(&lasting) {
            model.parameters.set_values(part, values);
        }
        Ok(model)
    }

    /// All buffers are given back when this returns.
    fn without_buffers(self) -> Frozen<K> {
        let Model { kernels, spec, weights, dropout, .. } = self;
        Frozen { kernels, spec, weights, dropout }
    }

    /// Whether a pass could have fewer tokens: documents are not cut.
    pub fn can_have_fewer_tokens(&self) -> bool {
        can_be_fewer(&self.settings)
    }

    /// [`on`](Model::on), with fewer tokens in a pass if the memory cannot be had for all of them.
    ///
    /// # Errors
    /// `Budget` when there is no memory for one document.
    pub fn within_reach(
        kernels: K,
        spec: ModelSpec,
        weights: Weights<K>,
        settings: Settings,
        dropout: Option<(f32, u64)>,
    ) -> Result<Self> {
        Frozen { kernels, spec, weights, dropout }.with_room(settings)
    }
}

impl<K: Kernels> Frozen<K> {
    /// With buffers for `settings`, or for fewer tokens where these cannot be had.
    fn with_room(self, mut settings: Settings) -> Result<Model<K>> {
        loop {
            match self.reserve(&settings) {
                Ok(reserved) => return Ok(self.with_buffers(settings, reserved)),
                Err(Error::Budget(_)) if can_be_fewer(&settings) => settings = fewer(&settings),
                Err(error) => return Err(error),
            }
        }
    }
}

fn can_be_fewer(settings: &Settings) -> bool {
    settings.tokens > settings.longest_document
}

fn fewer(settings: &Settings) -> Settings {
    let tokens = (settings.tokens / 2).max(settings.longest_document);
    Settings { tokens, logit_rows: settings.logit_rows.min(tokens), ..settings.clone() }
}
