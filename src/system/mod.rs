//! What only the operating system knows or does: freed memory, pages, room on disks, signals.

pub mod allocator;
pub mod disk;
pub mod interrupt;
pub mod pages;
