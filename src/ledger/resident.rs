//! Resident memory of this process and free memory of the system, from `/proc`; where there is no
//! `/proc`, nothing is resident and everything is free.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use super::control_group;

/// Bytes in memory now.
pub fn now_bytes() -> u64 {
    field("VmRSS:")
}

/// Bytes in memory now, all and of mapped files: the second and third field of `/proc/self/statm`.
pub fn now_and_files() -> (u64, u64) {
    const PAGE_BYTES: u64 = 4096;
    let text = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let mut fields = text.split_whitespace().skip(1).map(|field| field.parse::<u64>());
    let mut next = || fields.next().and_then(Result::ok).unwrap_or(0) * PAGE_BYTES;
    (next(), next())
}

/// The most bytes that were in memory at a time.
pub fn peak_bytes() -> u64 {
    field("VmHWM:")
}

/// Of `bytes`, those whose pages are in this process' memory, by `/proc/self/pagemap`; none where
/// the system does not tell.
pub fn present_bytes(bytes: &[u8]) -> Option<u64> {
    const PAGE_BYTES: usize = 4096;
    const PRESENT: u64 = 1 << 63;
    let (begin, end) = (bytes.as_ptr() as usize, bytes.as_ptr() as usize + bytes.len());
    let (first, last) = (begin / PAGE_BYTES, end.div_ceil(PAGE_BYTES));
    let mut file = fs::File::open("/proc/self/pagemap").ok()?;
    file.seek(SeekFrom::Start(first as u64 * 8)).ok()?;
    let mut entries = vec![0; (last - first) * 8];
    file.read_exact(&mut entries).ok()?;
    let present = entries.chunks_exact(8).enumerate().filter(|(_, entry)| {
        u64::from_le_bytes((*entry).try_into().expect("eight bytes")) & PRESENT != 0
    });
    let inside = |(index, _): (usize, &[u8])| {
        let page = (first + index) * PAGE_BYTES;
        ((page + PAGE_BYTES).min(end) - page.max(begin)) as u64
    };
    Some(present.map(inside).sum())
}

/// Bytes that this process could still take: the system's free memory, or what its control groups
/// leave if that is less.
pub fn available_bytes() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = kibibytes(&meminfo, "MemAvailable:").unwrap_or(u64::MAX);
    free.min(control_group::left_bytes(Path::new("/")).unwrap_or(u64::MAX))
}

/// Bytes that may be pinned for a GPU to read: half of what is available, and no more than 512 MiB in
/// WSL, where reports of the limit begin.
pub fn pinnable_bytes() -> u64 {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    pinnable_of(available_bytes(), &release)
}

fn pinnable_of(available: u64, kernel_release: &str) -> u64 {
    let wsl = kernel_release.to_ascii_lowercase().contains("microsoft");
    if wsl { (available / 2).min(512 << 20) } else { available / 2 }
}

fn field(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    kibibytes(&status, name).unwrap_or(0)
}

/// The value of a line such as `VmRSS:    1234 kB`, in bytes.
fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn half_of_what_is_available_is_pinned_and_little_in_wsl() {
        assert_eq!(pinnable_of(64 << 30, "6.8.0-45-generic\n"), 32 << 30);
        assert_eq!(pinnable_of(64 << 30, "5.15.153.1-microsoft-standard-WSL2\n"), 512 << 20);
        assert_eq!(pinnable_of(100 << 20, "4.4.0-19041-Microsoft\n"), 50 << 20);
    }

    #[test]
    fn some_memory_is_available_and_no_more_than_there_is() {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
        let total = kibibytes(&meminfo, "MemTotal:").unwrap();
        assert!((1..=total).contains(&available_bytes()));
    }

    #[test]
    fn pages_are_present_once_they_are_written() {
        const BYTES: usize = 8 << 20;
        let mut buffer = vec![0u8; BYTES];
        let before = present_bytes(&buffer).unwrap();
        buffer[BYTES / 2..].fill(1);
        let after = present_bytes(&buffer).unwrap();
        // Large pages may bring neighbours.
        assert!(before < BYTES as u64 / 2 && after >= BYTES as u64 / 2, "{before} {after}");
        assert_eq!(present_bytes(&buffer[BYTES - 100..]), Some(100));
        assert_eq!(present_bytes(&[]), Some(0));
    }

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
