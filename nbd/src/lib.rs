//! NBD protocol: asynchronous client, read-only server, shared wire types.
//!
//! - [`wire`]: every message as plain functions over bytes; no I/O, never panics, all lengths bounded.
//! - [`Client`]: reads, block status and trim of one export, pipelined, cancel-safe, with deadlines.
//! - [`Server`]: serves one read-only [`Source`] on a Unix socket, holes kept.
//!
//! The protocol is the `doc/proto.md` of the NetworkBlockDevice project (called *proto.md* below),
//! with its branch `extension-ext-header` for extended headers.

mod client;
mod error;
mod server;
pub mod wire;

pub use client::{Client, ExportInfo, Options};
pub use error::{Activity, NbdError, RequestInfo};
pub use server::{Server, ServerOptions, Source};
pub use wire::{Command, Errno, Extent, ProtocolError};
