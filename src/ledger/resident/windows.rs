//! Memory by Windows' account.
#![allow(unsafe_code)]

use windows_sys::Win32::System::ProcessStatus::{GetProcessMemoryInfo, PROCESS_MEMORY_COUNTERS};
use windows_sys::Win32::System::SystemInformation::{GlobalMemoryStatusEx, MEMORYSTATUSEX};
use windows_sys::Win32::System::Threading::GetCurrentProcess;

/// Bytes in memory now: the working set.
pub fn now_bytes() -> u64 {
    counters().WorkingSetSize as u64
}

/// Bytes in memory now, and 0 for those of mapped files: the system does not count them apart.
pub fn now_and_files() -> (u64, u64) {
    (now_bytes(), 0)
}

/// The most bytes that were in memory at a time.
pub fn peak_bytes() -> u64 {
    counters().PeakWorkingSetSize as u64
}

/// How many of these bytes are in memory: none, as Windows does not tell without asking for each page.
pub fn present_bytes(_bytes: &[u8]) -> Option<u64> {
    None
}

/// Free memory of the system; no more than it still promises, as it promises nothing that it has not.
pub fn free_bytes() -> u64 {
    let mut status =
        MEMORYSTATUSEX { dwLength: size_of::<MEMORYSTATUSEX>() as u32, ..Default::default() };
    // SAFETY: the structure has the size that it says.
    match unsafe { GlobalMemoryStatusEx(&mut status) } {
        0 => u64::MAX,
        _ => status.ullAvailPhys.min(status.ullAvailPageFile),
    }
}

/// Whether this is WSL: Linux programs run there.
pub fn is_wsl() -> bool {
    false
}

/// The system's counters of this process; zeros where the system refuses.
fn counters() -> PROCESS_MEMORY_COUNTERS {
    let mut counters = PROCESS_MEMORY_COUNTERS::default();
    let size = size_of::<PROCESS_MEMORY_COUNTERS>() as u32;
    // SAFETY: the structure has the size that is given; the handle is that of this process.
    unsafe { GetProcessMemoryInfo(GetCurrentProcess(), &mut counters, size) };
    counters
}
