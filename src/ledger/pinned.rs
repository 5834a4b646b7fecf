//! Memory of the host that is pinned beside a GPU: no account of the process tells it apart.

use std::sync::atomic::{AtomicU64, Ordering};

static BYTES: AtomicU64 = AtomicU64::new(0);

/// `bytes` more are pinned.
pub fn add(bytes: u64) {
    BYTES.fetch_add(bytes, Ordering::Relaxed);
}

/// `bytes` of them were given back.
pub fn remove(bytes: u64) {
    BYTES.fetch_sub(bytes, Ordering::Relaxed);
}

/// Bytes that are pinned now, by all GPUs of this process.
pub fn bytes() -> u64 {
    BYTES.load(Ordering::Relaxed)
}
