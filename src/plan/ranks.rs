//! Ranks of a run's adapters: looked up for each region of a plan, so they are summed once.

use crate::adapter::LoraTarget;
use crate::model::spec::LinearRole;

/// Number of roles that linears have.
const ROLES: usize = LinearRole::ALL.len();

/// The ranks of each layer's adapters, by role.
#[derive(Debug, Clone)]
pub struct Ranks {
    layers: Vec<[usize; ROLES]>,
}

impl Ranks {
    /// The ranks of `targets` in a model of `layers` layers.
    pub fn new(targets: &[LoraTarget], layers: usize) -> Self {
        let mut ranks = vec![[0; ROLES]; layers];
        for target in targets {
            ranks[target.layer][target.role as usize] += target.shape.rank;
        }
        Ranks { layers: ranks }
    }

    /// Sum of the ranks on some linears of a layer.
    pub fn of(&self, layer: usize, roles: &[LinearRole]) -> usize {
        roles.iter().map(|&role| self.layers[layer][role as usize]).sum()
    }

    /// Sum of the ranks on some linears of the layer where it is largest.
    pub fn most(&self, roles: &[LinearRole]) -> usize {
        (0..self.layers.len()).map(|layer| self.of(layer, roles)).max().unwrap_or(0)
    }
}
