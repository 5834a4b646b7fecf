//! What disks have left.

use std::path::Path;

/// Bytes that are free where `folder` is, for this user; none where the system does not tell.
#[cfg(unix)]
pub fn free_bytes(folder: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(folder).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Bytes that are free where `folder` is, for this user; none where Windows does not tell.
#[cfg(windows)]
#[allow(unsafe_code)]
pub fn free_bytes(folder: &Path) -> Option<u64> {
    use std::os::windows::ffi::OsStrExt;
    use std::ptr::null_mut;

    use windows_sys::Win32::Storage::FileSystem::GetDiskFreeSpaceExW;

    // Names of shares need the last separator.
    let end = [u16::from(b'\\'), 0];
    let name: Vec<u16> = folder.as_os_str().encode_wide().chain(end).collect();
    let mut free = 0;
    // SAFETY: the name ends with a zero; what is not asked for may be null.
    let known = unsafe { GetDiskFreeSpaceExW(name.as_ptr(), &mut free, null_mut(), null_mut()) };
    (known != 0).then_some(free)
}
