//! The messages of the NBD protocol as plain functions over bytes.
//!
//! Nothing here does I/O, and nothing a peer sends makes it panic or allocate more than a constant
//! times the bytes that really arrived. Numbers are big-endian on the wire (proto.md,
//! "Conventions"). Fixed-size messages decode from arrays, so that their length cannot be wrong.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::as_conversions)]

mod coverage;
mod cursor;
mod error;
mod fuzz;
mod handshake;
mod transmission;

pub use coverage::Coverage;
pub use error::{Command, Errno, ProtocolError, Refusal};
pub use fuzz::fuzz_all;
pub use handshake::*;
pub use transmission::*;

/// Longest string on the wire: names, contexts, messages (proto.md, "Conventions").
pub const STRING_LEN_MAX: usize = 4096;

/// A run of bytes of an export with one status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes, never 0.
    pub length: u64,
    /// Meaning given by the metadata context; see [`STATE_HOLE`] and [`STATE_ZERO`].
    pub flags: u64,
}

/// `base:allocation`: the range is not allocated (`NBD_STATE_HOLE`).
pub const STATE_HOLE: u64 = 1;
/// `base:allocation`: the range reads as zeros (`NBD_STATE_ZERO`).
pub const STATE_ZERO: u64 = 2;
/// `qemu:dirty-bitmap:…`: the range is dirty (`docs/interop/nbd.txt` of QEMU).
pub const STATE_DIRTY: u64 = 1;
