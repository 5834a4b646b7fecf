//! Resident memory of this process, from `/proc`; 0 where there is none.

use std::fs;

/// Bytes in memory now.
pub fn now_bytes() -> u64 {
    field("VmRSS:")
}

/// The most bytes that were in memory at a time.
pub fn peak_bytes() -> u64 {
    field("VmHWM:")
}

fn field(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let kibibytes =
        line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_large_buffer_shows() {
        const BYTES: usize = 64 << 20;
        let before = now_bytes();
        let buffer = std::hint::black_box(vec![1u8; BYTES]);
        let grown = now_bytes() - before;
        assert!(grown as usize > BYTES / 2 && peak_bytes() >= now_bytes(), "{grown}");
        assert_eq!(buffer[BYTES - 1], 1);
    }
}
