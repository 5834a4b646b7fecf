//! Memory by Linux' account, in `/proc`; where there is no `/proc`, nothing is resident and everything is
//! free.

use std::fs;
use std::io::{Read, Seek, SeekFrom};

use crate::system::pages::page_bytes;

/// Bytes in memory now.
pub fn now_bytes() -> u64 {
    field("VmRSS:")
}

/// Bytes in memory now, all and of mapped files: the second and third field of `/proc/self/statm`.
pub fn now_and_files() -> (u64, u64) {
    let page_bytes = page_bytes() as u64;
    let text = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let mut fields = text.split_whitespace().skip(1).map(|field| field.parse::<u64>());
    let mut next = || fields.next().and_then(Result::ok).unwrap_or(0) * page_bytes;
    (next(), next())
}

/// The most bytes that were in memory at a time.
pub fn peak_bytes() -> u64 {
    field("VmHWM:")
}

/// How many of `bytes` are on pages in this process' memory, by `/proc/self/pagemap`; none where the system
/// does not tell.
pub fn present_bytes(bytes: &[u8]) -> Option<u64> {
    const PRESENT: u64 = 1 << 63;
    let page_bytes = page_bytes();
    let (begin, end) = (bytes.as_ptr() as usize, bytes.as_ptr() as usize + bytes.len());
    let (first, last) = (begin / page_bytes, end.div_ceil(page_bytes));
    let mut file = fs::File::open("/proc/self/pagemap").ok()?;
    file.seek(SeekFrom::Start(first as u64 * 8)).ok()?;
    let mut entries = vec![0; (last - first) * 8];
    file.read_exact(&mut entries).ok()?;
    let present = entries.chunks_exact(8).enumerate().filter(|(_, entry)| {
        u64::from_le_bytes((*entry).try_into().expect("eight bytes")) & PRESENT != 0
    });
    let inside = |(index, _): (usize, &[u8])| {
        let page = (first + index) * page_bytes;
        ((page + page_bytes).min(end) - page.max(begin)) as u64
    };
    Some(present.map(inside).sum())
}

/// Free memory of the system.
pub fn free_bytes() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    kibibytes(&meminfo, "MemAvailable:").unwrap_or(u64::MAX)
}

/// Whether this is WSL.
pub fn is_wsl() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    is_release_of_wsl(&release)
}

fn is_release_of_wsl(release: &str) -> bool {
    release.to_ascii_lowercase().contains("microsoft")
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
    fn wsl_is_known_by_its_kernel() {
        assert!(is_release_of_wsl("5.15.153.1-microsoft-standard-WSL2\n"));
        assert!(is_release_of_wsl("4.4.0-19041-Microsoft\n"));
        assert!(!is_release_of_wsl("6.8.0-45-generic\n"));
    }

    #[test]
    fn some_memory_is_available_and_no_more_than_there_is() {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
        let total = kibibytes(&meminfo, "MemTotal:").unwrap();
        assert!((1..=total).contains(&free_bytes()));
    }

    #[test]
    fn pages_are_present_once_they_are_written() {
        const BYTES: usize = 8 << 20;
        // The heap may give pages that were written before.
        let mut buffer = memmap2::MmapMut::map_anon(BYTES).unwrap();
        let before = present_bytes(&buffer).unwrap();
        buffer[BYTES / 2..].fill(1);
        let after = present_bytes(&buffer).unwrap();
        // Large pages may bring neighbours.
        assert!(before < BYTES as u64 / 2 && after >= BYTES as u64 / 2, "{before} {after}");
        assert_eq!(present_bytes(&buffer[BYTES - 100..]), Some(100));
        assert_eq!(present_bytes(&[]), Some(0));
    }
}
