//! The oracle as a program, on the host and inside the guest.

fn main() {}
