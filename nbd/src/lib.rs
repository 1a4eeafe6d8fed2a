//! NBD protocol: asynchronous client, read-only server, shared wire types.
//!
//! - [`wire`]: every message as plain functions over bytes; no I/O, never panics, all lengths bounded.
//! - [`Client`]: reads, block status and trim of one export, pipelined, cancel-safe, with deadlines.
//!
//! The protocol is the `doc/proto.md` of the NetworkBlockDevice project (called *proto.md* below),
//! with its branch `extension-ext-header` for extended headers.

mod client;
mod error;
pub mod wire;

pub use client::{Client, ExportInfo, Options};
pub use error::{Activity, NbdError, RequestInfo};
pub use wire::{Command, Errno, Extent, ProtocolError};
