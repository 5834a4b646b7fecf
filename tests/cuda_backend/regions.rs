//! Regions of small plans of a test's own.

use nibble::plan::{
    BlockRegion, CudaRegion, MemoryPlan, Owner, Region, RegionId, RegionType, WorkRegion,
};

pub const WORKSPACE: RegionId = RegionId::Cuda(CudaRegion::Workspace);
pub const UPLOADS: RegionId = RegionId::Cuda(CudaRegion::Uploads);
pub const DEQUANTIZED: RegionId = RegionId::Cuda(CudaRegion::Dequantized);
pub const X: RegionId = RegionId::Work(WorkRegion::Norm);
pub const Y: RegionId = RegionId::Work(WorkRegion::Gradient);
pub const FROM: RegionId = RegionId::Block(Owner::Layer(0), BlockRegion::Input);
pub const TO: RegionId = RegionId::Block(Owner::Layer(1), BlockRegion::Input);
pub const QKV: RegionId = RegionId::Block(Owner::Recompute, BlockRegion::Qkv);
pub const O: RegionId = RegionId::Block(Owner::Recompute, BlockRegion::Attention);
pub const LSE: RegionId = RegionId::Block(Owner::Recompute, BlockRegion::Lse);
pub const D_O: RegionId = RegionId::Work(WorkRegion::NormGradient);
pub const DQKV: RegionId = RegionId::Work(WorkRegion::QkvGradient);
pub const CACHE: RegionId = RegionId::Cache(0);
pub const WORK: RegionId = RegionId::Work(WorkRegion::Attention);

/// Of these regions, in this order.
pub fn plan(regions: &[(RegionId, RegionType, usize)]) -> MemoryPlan {
    let region = |&(id, dtype, elements): &_| Region::new(id, dtype, elements);
    MemoryPlan { regions: regions.iter().map(region).collect(), offloaded: Vec::new() }
}
