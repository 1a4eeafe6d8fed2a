//! Where a load writes: a block device, an image file, or a disk of a running machine.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, fallocate};

use super::block::BLOCK_LEN;
use crate::qemu_io::QemuIo;

/// Something a load writes to. Offsets and lengths are multiples of [`BLOCK_LEN`].
pub trait Target: Sync {
    /// Writes bytes.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes a range read as zeros; gives its room back where `unmap` says so.
    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;
    /// Discards a range.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
}

/// A block device, past the page cache, or an image file.
#[derive(Debug)]
pub struct FileTarget {
    file: File,
    device: bool,
    /// Bytes it holds.
    pub len: u64,
}

/// `FALLOC_FL_NO_HIDE_STALE` of Linux's `falloc.h`: with a hole on a block device, a discard.
const NO_HIDE_STALE: FallocateFlags = FallocateFlags::from_bits_retain(0x04);

impl FileTarget {
    /// Opens a device or a raw image.
    pub fn open(path: &Path) -> io::Result<Self> {
        let device = fs::metadata(path)?.file_type().is_block_device();
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if device {
            options.custom_flags(OFlag::O_DIRECT.bits());
        }
        let mut file = options.open(path)?;
        let len = io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
        Ok(Self { file, device, len })
    }

    /// Asks the device to make everything durable.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn allocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> Result<(), Errno> {
        let signed = |number: u64| i64::try_from(number).map_err(|_| Errno::EINVAL);
        fallocate(&self.file, flags, signed(offset)?, signed(len)?)
    }
}

impl Target for FileTarget {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if !self.device {
            return self.file.write_all_at(bytes, offset);
        }
        // O_DIRECT wants aligned memory.
        let mut buffer = vec![0; bytes.len() + BLOCK_LEN];
        let start = buffer.as_ptr().align_offset(BLOCK_LEN);
        let aligned = &mut buffer[start..start + bytes.len()];
        aligned.copy_from_slice(bytes);
        self.file.write_all_at(aligned, offset)
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let flags = if unmap { hole } else { FallocateFlags::FALLOC_FL_ZERO_RANGE };
        match self.allocate(flags, offset, len) {
            Err(Errno::EOPNOTSUPP) => {
                self.write(offset, &vec![0; usize::try_from(len).expect("operations are small")])
            }
            other => Ok(other?),
        }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let flags = if self.device { hole | NO_HIDE_STALE } else { hole };
        match self.allocate(flags, offset, len) {
            // A hint may be ignored.
            Err(Errno::EOPNOTSUPP) => Ok(()),
            other => Ok(other?),
        }
    }
}

/// A disk of a running machine, written from outside through its device.
pub struct QemuIoTarget<'a> {
    machine: &'a dyn QemuIo,
    id: String,
    buffers: PathBuf,
    next: AtomicU64,
}

impl<'a> QemuIoTarget<'a> {
    /// The disk with this id.
    pub fn new(machine: &'a dyn QemuIo, id: &str) -> Self {
        let buffers = machine.buffers().join(format!("oracle-{id}"));
        fs::create_dir_all(&buffers).expect("the fixture's folder is writable");
        Self { machine, id: id.to_owned(), buffers, next: AtomicU64::new(0) }
    }

    fn run(&self, command: &str) -> io::Result<()> {
        let printed = self.machine.run(&self.id, command);
        match printed.contains("ops;") {
            true => Ok(()),
            false => Err(io::Error::other(format!("`{command}` on {}: {printed}", self.id))),
        }
    }
}

impl Target for QemuIoTarget<'_> {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let name = self.next.fetch_add(1, Ordering::Relaxed);
        let buffer = self.buffers.join(name.to_string());
        fs::write(&buffer, bytes)?;
        let outcome = self.run(&format!("write -s {} {offset} {}", buffer.display(), bytes.len()));
        fs::remove_file(&buffer)?;
        outcome
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let flags = if unmap { "-z -u" } else { "-z" };
        self.run(&format!("write {flags} {offset} {len}"))
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.run(&format!("discard {offset} {len}"))
    }
}
