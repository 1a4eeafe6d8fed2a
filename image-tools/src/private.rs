//! Folders for what is needed for a while, below the system's folder for such (`TMPDIR`).
//!
//! Each is locked by its process. So whoever makes the next one can tell those of killed processes, and removes
//! them, with what goes with them.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use tempfile::TempDir;

use crate::folder::{is_at, open_folder};

/// What the names begin with: nobody else's do.
const PREFIX: &str = "kvmsnap-private-";
/// A link in it to a folder elsewhere that goes with it.
const BESIDE: &str = "beside";
/// How often another process may take a folder for a dead one's, between its creation and its lock.
const TRIES: u32 = 10;

/// A folder that its owner alone can read; removed when dropped.
#[derive(Debug)]
pub struct PrivateFolder {
    folder: TempDir,
    _lock: File,
}

impl PrivateFolder {
    /// Makes one, once those that killed processes have left are removed.
    ///
    /// # Errors
    /// Where none can be made.
    pub fn new() -> io::Result<Self> {
        Self::new_in(&std::env::temp_dir())
    }

    fn new_in(parent: &Path) -> io::Result<Self> {
        sweep(parent);
        for _ in 0..TRIES {
            let mut builder = tempfile::Builder::new();
            builder.prefix(PREFIX).permissions(Permissions::from_mode(0o700));
            let folder = builder.tempdir_in(parent)?;
            if let Some(lock) = take(folder.path()) {
                return Ok(Self { folder, _lock: lock });
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Has a folder that another program has made for us go with it; only one does.
    ///
    /// # Errors
    /// Where that cannot be noted.
    pub fn take_along(&self, folder: &Path) -> io::Result<()> {
        symlink(folder, self.path().join(BESIDE))
    }
}

impl Drop for PrivateFolder {
    fn drop(&mut self) {
        remove_beside(self.path());
    }
}

/// Removes what goes with a folder that nobody but us could write to.
fn remove_beside(folder: &Path) {
    if let Ok(beside) = fs::read_link(folder.join(BESIDE))
        && fs::symlink_metadata(&beside).is_ok_and(|found| found.is_dir() && is_of_us(&found))
    {
        let _ = fs::remove_dir_all(beside);
    }
}

fn is_of_us(found: &fs::Metadata) -> bool {
    found.uid() == nix::unistd::geteuid().as_raw()
}

/// The lock of a folder that is still there, unless another process has it.
fn take(folder: &Path) -> Option<File> {
    let lock = open_folder(folder).ok()?;
    (lock.try_lock().is_ok() && is_at(&lock, folder)).then_some(lock)
}

/// Removes what processes of this user have left that are no more. What cannot be removed stays.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let is_named = entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes());
        let is_ours = |found: fs::Metadata| {
            let is_private = found.mode() & 0o077 == 0;
            found.is_dir() && is_private && is_of_us(&found)
        };
        if is_named
            && entry.metadata().is_ok_and(is_ours)
            && let Some(_lock) = take(&entry.path())
        {
            remove_beside(&entry.path());
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const DEAD: &str = "kvmsnap-private-dead";
    const PUBLIC: &str = "kvmsnap-private-public";
    const LINK: &str = "kvmsnap-private-link";

    #[test]
    fn what_a_killed_process_left_goes_with_the_next_one_and_nothing_else() {
        let parent = tempfile::tempdir().unwrap();
        let at = |name: &str| parent.path().join(name);
        for name in [DEAD, PUBLIC, "kvmsnap-other"] {
            fs::create_dir(at(name)).unwrap();
            let mode = if name == PUBLIC { 0o755 } else { 0o700 };
            fs::set_permissions(at(name), Permissions::from_mode(mode)).unwrap();
            fs::write(at(name).join("file"), "").unwrap();
        }
        symlink(at("kvmsnap-other"), at(LINK)).unwrap();
        for (of, beside) in [(DEAD, "dead"), (PUBLIC, "public")] {
            fs::create_dir(at(beside)).unwrap();
            symlink(at(beside), at(of).join(BESIDE)).unwrap();
        }
        let living = PrivateFolder::new_in(parent.path()).unwrap();
        assert!(!at(DEAD).exists() && !at("dead").exists() && at("public").exists());
        fs::create_dir(at("living")).unwrap();
        living.take_along(&at("living")).unwrap();
        assert_eq!(fs::metadata(living.path()).unwrap().mode() & 0o777, 0o700);

        let next = PrivateFolder::new_in(parent.path()).unwrap();

        assert!(living.path().exists() && next.path().exists());
        for name in [PUBLIC, "kvmsnap-other", LINK] {
            assert!(at(name).join("file").exists(), "{name}");
        }
        drop(next);
        assert!(living.path().exists() && at("living").exists());
        drop(living);
        assert!(!at("living").exists());
    }
}
