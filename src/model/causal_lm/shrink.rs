//! Smaller buffers, where memory turned out to be short.

use super::{Frozen, Model};
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::model::parameters::LASTING;
use crate::model::shortage::until_it_fits;
use crate::model::spec::ModelSpec;
use crate::model::weights::Weights;
use crate::plan::{AdapterRegion, Settings, leaner};

impl<K: Kernels> Model<K> {
    /// The same model, adapter and moments with the buffers of the next smaller plan. The old ones
    /// are given back before the new ones are asked for; gradients are lost.
    ///
    /// # Errors
    /// `Budget` when there is no memory for the smallest plan either, or those of the backend.
    pub fn with_smaller_plan(self) -> Result<Self> {
        let read = |region| self.parameters.all_values(region).map(|values| values.into_owned());
        let lasting = LASTING.map(read).into_iter().collect::<Result<Vec<_>>>()?;
        let settings = leaner(&self.settings).unwrap_or_else(|| self.settings.clone());
        let mut model = self.without_buffers().with_buffers_that_fit(settings)?;
        for (region, values) in LASTING.into_iter().zip(&lasting) {
            model.parameters.replace(region, values);
        }
        // What did not arrive is known when something is read: now, or an adapter of zeros would go on.
        model.parameters.values(AdapterRegion::Master, 0..1)?;
        Ok(model)
    }

    /// The model without its buffers, which are given back when this returns.
    fn without_buffers(self) -> Frozen<K> {
        let Model { kernels, spec, weights, random, .. } = self;
        Frozen { kernels, spec, weights, random }
    }

    /// Whether there is a smaller plan.
    pub fn can_be_smaller(&self) -> bool {
        leaner(&self.settings).is_some()
    }

    /// [`with_kernels`](Model::with_kernels), with a smaller plan if the memory of this one cannot be had.
    ///
    /// # Errors
    /// `Budget` when there is no memory for the smallest plan either.
    pub fn shrunk_to_fit(
        kernels: K,
        spec: ModelSpec,
        weights: Weights<K>,
        settings: Settings,
    ) -> Result<Self> {
        let (frozen, settings) = Frozen::new(kernels, spec, weights, settings);
        frozen.with_buffers_that_fit(settings)
    }
}

impl<K: Kernels> Frozen<K> {
    /// The model with buffers for `settings`, or for a smaller plan where these cannot be had.
    fn with_buffers_that_fit(self, mut settings: Settings) -> Result<Model<K>> {
        let shrink = |settings: &mut Settings, message| {
            *settings = leaner(settings).ok_or(Error::Budget(message))?;
            Ok(())
        };
        let reserved = until_it_fits(&mut settings, |settings| self.reserve(settings), shrink)?;
        Ok(self.with_buffers(settings, reserved))
    }
}
