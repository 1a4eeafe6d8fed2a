//! Files under their temporary names: locked while somebody writes them, taken up by the next restore of
//! the same snapshot after a crash, and swept when nobody will.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use repository::FileId;

use super::RestoreError;

const SUFFIX: &str = ".partial";
/// Hexadecimal digits of the snapshot's id in a name; a collision is harmless, content is verified.
const ID_DIGITS: usize = 16;
/// How often somebody may take the file away between its creation and its lock.
const TRIES: u32 = 10;

/// A file that is being written; removed when dropped, unless it is left for the next restore.
#[derive(Debug)]
pub struct Partial {
    path: PathBuf,
    file: File,
    keep: bool,
}

impl Partial {
    /// Makes and locks the file that becomes `to`, or takes up what a killed restore of the same
    /// snapshot left of it.
    ///
    /// # Errors
    /// [`RestoreError::Busy`], [`RestoreError::Write`].
    pub fn take_up(to: &Path, snapshot: &FileId) -> Result<Self, RestoreError> {
        let path = path_of(to, snapshot);
        let write = |source| RestoreError::Write { path: path.clone(), source };
        for _ in 0..TRIES {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            let file = options.custom_flags(nix::libc::O_NOFOLLOW).open(&path).map_err(write)?;
            match file.try_lock() {
                Err(TryLockError::WouldBlock) => {
                    return Err(RestoreError::Busy { path: to.to_owned() });
                }
                // Without locks nothing is swept either; whoever writes the same writes the same.
                Err(TryLockError::Error(error)) => {
                    tracing::warn!(%error, path = %path.display(), "the file cannot be locked");
                }
                Ok(()) => {}
            }
            // Its last writer may have swept or renamed it just before it let go of the lock.
            if !is_at(&file, &path) {
                continue;
            }
            // It was whole once and has been moved since: somebody's disk, of which this is but a name.
            if has_other_names(&file).map_err(write)? && !is_at(&file, to) {
                fs::remove_file(&path).map_err(write)?;
                continue;
            }
            return Ok(Self { path, file, keep: false });
        }
        Err(RestoreError::Busy { path: to.to_owned() })
    }

    /// Where it is meanwhile.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether it has its final name, too, as a run leaves it that is killed after [`Self::name`].
    pub fn is_named(&self, to: &Path) -> bool {
        is_at(&self.file, to)
    }

    /// The same of what a killed run may have left.
    pub fn has_named(to: &Path, snapshot: &FileId) -> bool {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(nix::libc::O_NOFOLLOW);
        options.open(path_of(to, snapshot)).is_ok_and(|file| is_at(&file, to))
    }

    /// Makes the content durable and gives it its final name, unless that is taken. Where the file system allows
    /// it, it keeps its temporary name beside that until it is dropped.
    ///
    /// # Errors
    /// [`RestoreError::Exists`], [`RestoreError::Rename`], [`RestoreError::Write`].
    pub fn name(&mut self, to: &Path) -> Result<(), RestoreError> {
        let link = |from: &Path, to: &Path| match fs::hard_link(from, to) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => rename_new(from, to),
            linked => linked,
        };
        if !self.is_named(to) {
            self.give_name(to, link)?;
            // Dropped, it takes what is at its temporary name: there is nothing where it was renamed.
            self.keep = false;
        }
        Ok(())
    }

    /// Leaves what was written to the next restore of the same snapshot.
    pub fn leave(mut self) {
        self.keep = true;
    }

    /// Makes the content durable and gives it its final name, unless that is taken; then it goes.
    ///
    /// # Errors
    /// [`RestoreError::Exists`], [`RestoreError::Rename`], [`RestoreError::Write`].
    pub fn publish(mut self, to: &Path) -> Result<(), RestoreError> {
        self.give_name(to, rename_new)
    }

    fn give_name(
        &mut self,
        to: &Path,
        rename: impl Fn(&Path, &Path) -> io::Result<()>,
    ) -> Result<(), RestoreError> {
        let write = |source| RestoreError::Write { path: to.to_owned(), source };
        self.file.sync_all().map_err(write)?;
        crate::effect::about_to("restore: rename").map_err(write)?;
        match rename(&self.path, to) {
            Ok(()) => {
                self.keep = true;
                let folder = to.parent().unwrap_or(Path::new("."));
                File::open(folder).and_then(|folder| folder.sync_all()).map_err(write)
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(RestoreError::Exists { path: to.to_owned() })
            }
            Err(source) => {
                self.keep = true;
                let from = self.path.clone();
                Err(RestoreError::Rename { from, to: to.to_owned(), source })
            }
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.keep {
            // Under the lock. What cannot be removed is taken up or swept by the next restore.
            let _ = fs::remove_file(&self.path);
        }
        // A child process that is just being made has the file open, too, until it becomes another program.
        let _ = self.file.unlock();
    }
}

/// Bytes that a killed restore of this file has left.
pub(super) fn left_of(to: &Path, snapshot: &FileId) -> u64 {
    fs::symlink_metadata(path_of(to, snapshot)).map_or(0, |metadata| metadata.blocks() * 512)
}

/// Removes what killed restores left in a folder and nobody writes, but for the files whose names end
/// like one that this restore could take up.
pub(super) fn sweep(folder: &Path, snapshot: &FileId, extensions: &[&str]) {
    let kept: Vec<_> =
        extensions.iter().map(|extension| format!(".{extension}{}", suffix(snapshot))).collect();
    // What cannot be listed now shows when the disks are written.
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if !is_partial(name) || kept.iter().any(|kept| name.ends_with(kept)) {
            continue;
        }
        let path = entry.path();
        let open = OpenOptions::new().write(true).custom_flags(nix::libc::O_NOFOLLOW).open(&path);
        let Ok(file) = open else { continue };
        if file.try_lock().is_ok() && is_at(&file, &path) {
            tracing::info!(path = %path.display(), "what a killed restore left is removed");
            let _ = fs::remove_file(path);
        }
    }
}

fn path_of(to: &Path, snapshot: &FileId) -> PathBuf {
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    to.with_file_name(format!(".{name}{}", suffix(snapshot)))
}

fn suffix(snapshot: &FileId) -> String {
    let id = snapshot.to_string();
    format!(".{}{SUFFIX}", &id[..ID_DIGITS])
}

/// Whether a name is one of ours: `.NAME.raw.0123456789abcdef.partial`.
fn is_partial(name: &str) -> bool {
    let parts = name.strip_prefix('.').and_then(|name| name.strip_suffix(SUFFIX));
    let Some((file, id)) = parts.and_then(|parts| parts.rsplit_once('.')) else { return false };
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    let is_ours = |extension| matches!(extension, "raw" | "qcow2" | "json");
    id.len() == ID_DIGITS
        && id.bytes().all(is_digit)
        && file.rsplit_once('.').is_some_and(|(_, extension)| is_ours(extension))
}

/// Whether this file still has that name.
fn is_at(file: &File, path: &Path) -> bool {
    let same = |one: &fs::Metadata, other: &fs::Metadata| {
        (one.dev(), one.ino()) == (other.dev(), other.ino())
    };
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(file), Ok(named)) => file.is_file() && same(&file, &named),
        _ => false,
    }
}

fn has_other_names(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.nlink() > 1)
}

/// Gives a file its final name, unless that is taken.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        // NFS and others do not know the flag; a second name and the end of the first do the same.
        Err(Errno::EINVAL | Errno::ENOSYS) => {
            fs::hard_link(from, to).and_then(|()| fs::remove_file(from))
        }
        renamed => renamed.map_err(io::Error::from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SNAPSHOT: FileId = FileId([0xab; 32]);

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string();
        let mut names: Vec<_> = entries.map(|entry| name(entry).unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn p5_a_file_has_one_writer_and_goes_when_that_one_gives_up() {
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("vda.raw");
        let first = Partial::take_up(&to, &SNAPSHOT).unwrap();

        let second = Partial::take_up(&to, &SNAPSHOT).unwrap_err();

        assert!(matches!(second, RestoreError::Busy { .. }), "{second:?}");
        sweep(folder.path(), &FileId([1; 32]), &[]);
        assert_eq!(names(folder.path()), [".vda.raw.abababababababab.partial"]);
        drop(first);
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn p5_a_disk_that_was_moved_is_not_written_to_by_a_name_that_a_killed_run_left() {
        let folder = tempfile::tempdir().unwrap();
        let (to, moved) = (folder.path().join("vda.raw"), folder.path().join("moved"));
        let mut killed = Partial::take_up(&to, &SNAPSHOT).unwrap();
        fs::write(killed.path(), "a disk").unwrap();
        killed.name(&to).unwrap();
        killed.leave();
        let again = Partial::take_up(&to, &SNAPSHOT).unwrap();
        assert!(again.is_named(&to), "it may be gone on with");
        again.leave();
        fs::rename(&to, &moved).unwrap();

        let next = Partial::take_up(&to, &SNAPSHOT).unwrap();

        next.file().set_len(0).unwrap();
        assert_eq!(fs::read_to_string(&moved).unwrap(), "a disk");
    }

    #[test]
    fn p5_a_whole_file_never_takes_the_name_of_another() {
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("vda.raw");
        let late = Partial::take_up(&to, &SNAPSHOT).unwrap();
        fs::write(&to, "somebody's").unwrap();

        let refused = late.publish(&to).unwrap_err();

        assert!(matches!(refused, RestoreError::Exists { .. }), "{refused:?}");
        assert_eq!(names(folder.path()), ["vda.raw"]);
        assert_eq!(fs::read_to_string(&to).unwrap(), "somebody's");
    }

    #[test]
    fn p5_what_a_killed_run_has_named_is_told_from_what_others_have() {
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("vda.qcow2");
        let mut first = Partial::take_up(&to, &SNAPSHOT).unwrap();
        assert!(!Partial::has_named(&to, &SNAPSHOT));
        first.name(&to).unwrap();
        assert!(Partial::has_named(&to, &SNAPSHOT) && !Partial::has_named(&to, &FileId([1; 32])));

        let killed = std::mem::ManuallyDrop::new(first);
        killed.file().unlock().unwrap();
        let mut next = Partial::take_up(&to, &SNAPSHOT).unwrap();

        assert!(next.is_named(&to));
        next.name(&to).unwrap();
        drop(next);
        assert_eq!(names(folder.path()), ["vda.qcow2"]);
        assert!(!Partial::has_named(&to, &SNAPSHOT));
    }

    #[test]
    fn p5_only_files_that_are_ours_and_of_no_use_are_swept() {
        let folder = tempfile::tempdir().unwrap();
        let stay = [
            ".vda.raw.0123456789abcdef.other",
            ".vda.raw.abababababababab.partial",
            ".vda.vmdk.0123456789abcdef.partial",
            ".vdb.raw.abababababababab.partial",
            ".vdb.raw.notanid.partial",
            "vda.raw.0123456789abcdef.partial",
        ];
        let go = [
            ".vda.raw.0123456789abcdef.partial",
            ".vda.qcow2.abababababababab.partial",
            ".manifest.json.0123456789abcdef.partial",
        ];
        stay.iter().chain(&go).for_each(|name| fs::write(folder.path().join(name), "x").unwrap());
        let link = ".vdc.raw.0123456789abcdef.partial";
        std::os::unix::fs::symlink("vda.raw", folder.path().join(link)).unwrap();

        sweep(folder.path(), &SNAPSHOT, &["raw"]);

        let mut expected = stay.to_vec();
        expected.insert(5, link);
        assert_eq!(names(folder.path()), expected);
    }
}
