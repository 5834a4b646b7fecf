//! What only the operating system knows or does: freed memory, pages, room on disks.

pub mod allocator;
pub mod disk;
pub mod pages;
