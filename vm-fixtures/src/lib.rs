//! Small real guests for tests and the demo, and an oracle for the content of their disks.
//!
//! ```no_run
//! use vm_fixtures::{Disk, FileSystem, Guest, MIB};
//!
//! let plan = Guest::builder().disk(Disk::new("vda", 64 * MIB).mounted(FileSystem::Ext4));
//! let Some(guest) = plan.boot() else { return };
//! guest.sh("echo hello > /mnt/vda/file && sync");
//! let images = guest.shut_down();
//! ```
//!
//! Nothing here uses our other crates: what judges must not share a fault with what it judges.
//! Without QEMU tests skip aloud; with `KVMSNAP_REQUIRE_QEMU=1` they fail.

mod builder;
mod cpio;
pub mod debian;
mod disk;
mod files;
mod guest;
mod guest_agent;
mod inner_host;
mod inside;
mod latency;
pub mod libvirt;
mod monitor;
pub mod oracle;
mod port;
mod process;
mod qemu_io;
mod recipe;
pub mod servers;
mod tools;

pub use crate::builder::GuestBuilder;
pub use crate::disk::{Disk, FileSystem, Format, MIB, XFS_SIZE_MIN};
pub use crate::files::{FilesReport, check_files, write_files};
pub use crate::guest::Guest;
pub use crate::guest_agent::Output;
pub use crate::inner_host::InnerHost;
pub use crate::inside::Inside;
pub use crate::latency::{PacedLoad, RunningPaced};
pub use crate::monitor::QmpFailure;
pub use crate::port::Port;
pub use crate::qemu_io::QemuIo;
pub use crate::recipe::oracle_program;
pub use crate::tools::{available, qemu_available, run};
