//! Writes the archive an initramfs is made of: cpio in the "newc" format.
//!
//! The kernel unpacks several archives one after the other, later files over earlier ones
//! (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`), so a part that changes
//! often can follow one that is cached.

use std::collections::BTreeSet;
use std::path::{Component, Path};

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const SYMLINK: u32 = 0o120_777;

/// An archive in memory.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    entries: u32,
}

impl Archive {
    /// Adds a directory and those above it.
    pub(crate) fn directory(&mut self, path: &str) {
        let mut so_far = String::new();
        for part in Path::new(path).components() {
            let Component::Normal(part) = part else { continue };
            if !so_far.is_empty() {
                so_far.push('/');
            }
            so_far.push_str(&part.to_string_lossy());
            if self.directories.insert(so_far.clone()) {
                self.entry(&so_far, DIRECTORY, b"");
            }
        }
    }

    /// Adds a file that everybody may read and execute, and the directories above it.
    pub(crate) fn file(&mut self, path: &str, content: &[u8]) {
        self.parent_of(path);
        self.entry(path.trim_start_matches('/'), EXECUTABLE, content);
    }

    /// Adds a symbolic link and the directories above it.
    pub(crate) fn symlink(&mut self, path: &str, to: &str) {
        self.parent_of(path);
        self.entry(path.trim_start_matches('/'), SYMLINK, to.as_bytes());
    }

    /// The finished archive, with its trailer.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, b"");
        // Another archive may follow: the kernel skips zeros between them.
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }

    fn parent_of(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let len = u32::try_from(content.len()).expect("files of an initramfs are small");
        let name_len = u32::try_from(path.len() + 1).expect("paths of an initramfs are short");
        let links = if mode == DIRECTORY { 2 } else { 1 };
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields = [self.entries, mode, 0, 0, links, 0, len, 0, 0, 0, 0, name_len, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::{fs, io::Write};

    use super::Archive;

    #[test]
    fn cpio_itself_unpacks_the_archive() {
        let mut archive = Archive::default();
        archive.file("bin/tool", b"content");
        archive.symlink("bin/sh", "tool");
        archive.directory("lib/modules");
        let bytes = archive.finish();
        let folder = tempfile::tempdir().unwrap();
        let started = Command::new("cpio")
            .args(["-i", "-d", "--quiet"])
            .current_dir(&folder)
            .stdin(Stdio::piped())
            .spawn();
        let Ok(mut cpio) = started else {
            return assert!(!crate::tools::required(), "cpio is missing");
        };
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        assert!(cpio.wait().unwrap().success());
        assert_eq!(fs::read(folder.path().join("bin/tool")).unwrap(), b"content");
        assert_eq!(fs::read(folder.path().join("bin/sh")).unwrap(), b"content");
        assert!(folder.path().join("lib/modules").is_dir());
    }
}
