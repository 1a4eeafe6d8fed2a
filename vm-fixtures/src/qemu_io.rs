//! Writing to the disks of a running machine from outside, by QEMU's own `qemu-io`.

use std::path::Path;

/// A machine whose QEMU runs `qemu-io` commands on its disks.
pub trait QemuIo: Sync {
    /// A folder that QEMU can read.
    fn buffers(&self) -> &Path;
    /// Runs a command such as `write -P 0x22 64k 64k` on a disk and returns what it printed.
    fn run(&self, id: &str, command: &str) -> String;
}

/// Returns what a command printed. It has no exit code, only words: `write failed: …`, `Pattern
/// verification failed …`.
#[track_caller]
pub(crate) fn must_have_worked(id: &str, command: &str, printed: String) -> String {
    let lower = printed.to_lowercase();
    let bad = ["fail", "error", "invalid", "not found", "non-numeric", "cannot", "usage"];
    let bad = bad.iter().any(|word| lower.contains(word));
    assert!(!bad, "`{command}` on {id}: {printed}");
    printed
}
