//! What was freed goes back to the system.
#![allow(unsafe_code)]

/// From this size on a block of memory is a mapping of its own, which ends when it is freed.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MAPPED_BYTES: libc::c_int = 128 << 10;

/// Keeps glibc from raising that size: by itself it does so whenever such a block is freed, and then
/// keeps freed blocks of up to 32 MiB. A run's memory would be the most of its start-up and its
/// steps, not what the plan says.
pub fn return_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets a number; no other thread runs yet. A refusal costs memory, nothing else.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES);
    }
}
