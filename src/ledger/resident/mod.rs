//! Resident memory of this process and free memory of the system.

#[cfg(not(windows))]
mod proc;
#[cfg(windows)]
mod windows;

use std::path::Path;

#[cfg(not(windows))]
use proc as system;
#[cfg(windows)]
use windows as system;

use super::control_group;
pub use system::{now_and_files, now_bytes, peak_bytes, present_bytes};

/// Bytes that this process could still take: the system's free memory, or what its control groups
/// leave if that is less.
pub fn available_bytes() -> u64 {
    let left = control_group::left_bytes(Path::new("/")).unwrap_or(u64::MAX);
    system::free_bytes().min(left)
}

/// Bytes that may be pinned for a GPU to read: half of what is available, and no more than 512 MiB in
/// WSL, where reports of the limit begin.
pub fn pinnable_bytes() -> u64 {
    pinnable_of(available_bytes(), system::is_wsl())
}

fn pinnable_of(available: u64, wsl: bool) -> u64 {
    if wsl { (available / 2).min(512 << 20) } else { available / 2 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_what_is_available_is_pinned_and_little_in_wsl() {
        assert_eq!(pinnable_of(64 << 30, false), 32 << 30);
        assert_eq!(pinnable_of(64 << 30, true), 512 << 20);
        assert_eq!(pinnable_of(100 << 20, true), 50 << 20);
    }

    #[cfg(any(target_os = "linux", windows))]
    #[test]
    fn a_large_buffer_shows() {
        const BYTES: usize = 256 << 20;
        // The system sums the counts of its processors now and then.
        const SLACK: u64 = 16 << 20;
        let seen = || {
            let before = now_bytes();
            let buffer = std::hint::black_box(vec![1u8; BYTES]);
            // Read before the peak: other tests' memory comes and goes in the meantime.
            let now = now_bytes();
            let peak = peak_bytes();
            assert_eq!(buffer[BYTES - 1], 1);
            now > before + BYTES as u64 / 2 && peak + SLACK >= now
        };
        assert!((0..20).any(|_| seen()));
    }
}
