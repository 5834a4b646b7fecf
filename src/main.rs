//! nibble
fn main() {}
