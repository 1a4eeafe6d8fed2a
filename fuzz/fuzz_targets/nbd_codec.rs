//! Every decoder of the NBD codec over arbitrary bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nbd::{Command, wire};

fuzz_target!(|input: (u16, u16, &[u8])| {
    let (kind, command, bytes) = input;
    wire::fuzz_all(bytes, kind, Command::from_code(command));
});
