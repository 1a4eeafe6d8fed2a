//! kvmsnap.
fn main() {}
