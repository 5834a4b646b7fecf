//! What was freed goes back to the system.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes from which on a block of memory is a mapping of its own, which ends when it is freed.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MAPPED_BYTES: libc::c_int = 128 << 10;

/// Free bytes whose pages were given back, or were too small for one.
static GIVEN_BACK: AtomicU64 = AtomicU64::new(0);

/// Keeps glibc from raising that size: by itself it does so whenever such a block is freed, and then
/// keeps freed blocks of up to 32 MiB. A run's memory would be the most of its start-up and its
/// steps, not what the plan says.
///
/// # Safety
/// No other thread may run yet: glibc sets such numbers without a lock.
pub unsafe fn return_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: no other thread runs, as the caller promises. A refusal costs memory, nothing else.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES);
    }
}

/// Gives back the pages of what is free between smaller blocks: reading a tokenizer alone leaves 20 MiB
/// of them. Takes milliseconds, for the end of a phase.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: the allocator's own; other threads may allocate meanwhile.
    unsafe {
        libc::malloc_trim(0);
    }
    GIVEN_BACK.store(free_bytes(), Ordering::Relaxed);
}

/// Bytes that the allocator holds free, in pieces between others, beyond those that it had when it last
/// gave back what it could; none where it does not tell.
pub fn free_heap_bytes() -> u64 {
    free_bytes().saturating_sub(GIVEN_BACK.load(Ordering::Relaxed))
}

fn free_bytes() -> u64 {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: reads the allocator's counters.
        let counters = unsafe { libc::mallinfo2() };
        // What is at the end of the heap could be given back.
        counters.fordblks.saturating_sub(counters.keepcost) as u64
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    0
}

#[cfg(test)]
mod tests {
    /// Other tests' memory comes and goes meanwhile: one of some tries must be clear.
    #[test]
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn holes_in_the_heap_show_until_they_are_given_back() {
        use super::{free_bytes, free_heap_bytes, give_back};
        use crate::ledger::resident::now_bytes;
        const HOLES: u64 = 24 << 20;
        let seen = || {
            // Below what is mapped by itself; every second one stays.
            let mut pieces: Vec<Option<Vec<u8>>> =
                (0..1024).map(|_| Some(vec![1; 65536])).collect();
            give_back();
            let before = free_bytes();
            pieces.iter_mut().step_by(2).for_each(|piece| *piece = None);
            let shows = free_bytes() > before + HOLES && free_heap_bytes() > HOLES;
            let resident = now_bytes();
            give_back();
            let gone = now_bytes() + HOLES < resident && free_heap_bytes() < HOLES;
            assert_eq!(pieces.iter().flatten().count(), 512);
            shows && gone
        };
        assert!((0..10).any(|_| seen()));
    }
}
