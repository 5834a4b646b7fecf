//! Rates that a step's time is estimated from. They are assumptions: of plans that fit, what is chosen
//! depends on their ratios alone.

/// Bytes that PCIe 4.0 with 16 lanes moves in one direction in a second, about.
pub const PCIE_BYTES_PER_SECOND: f64 = 25e9;
/// Floating-point operations that an RTX 4090 sustains in bf16 in a second, about: 60 % of its peak.
pub const GPU_FLOPS_PER_SECOND: f64 = 1e14;
/// Bytes that an RTX 4090's memory moves in a second.
pub(super) const GPU_MEMORY_BYTES_PER_SECOND: f64 = 1e12;
/// Bytes that a drive reads or writes in a second, about.
pub(super) const DRIVE_BYTES_PER_SECOND: f64 = 1e9;
/// Floating-point operations of a CPU's thread in a second, about.
pub(super) const THREAD_FLOPS_PER_SECOND: f64 = 1e11;
/// Bytes that a CPU's thread moves between its cache and its registers in a second, about.
pub(super) const THREAD_CACHE_BYTES_PER_SECOND: f64 = 3e10;
