//! Small files that are there whole or not at all, and stay: what was there before is there until then.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde::Serialize;

/// How the names of files begin that are not yet written.
const PARTIAL: &str = ".partial-";
/// One is written within milliseconds: what is not after this time never will be.
const PARTIAL_AGE_MAX: Duration = Duration::from_secs(600);

/// Puts a record in place of the one before, or of none, for its owner alone; it is durable when this returns.
///
/// # Errors
/// The system's; the file is then still the one before.
pub fn write_json(path: &Path, record: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(record).map_err(io::Error::other)?;
    write(path, &text, 0o600)
}

/// As [`write_json`], with any content, for those whom `mode` names.
///
/// # Errors
/// The system's; the file is then still the one before.
pub fn write(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    let folder = folder.unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(PARTIAL).tempfile_in(folder)?;
    file.write_all(content)?;
    // Whatever this process masks.
    file.as_file().set_permissions(Permissions::from_mode(mode))?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    File::open(folder)?.sync_all()
}

/// Removes what a process that was killed while it wrote a file has left: it names nothing that was done.
pub fn sweep(path: &Path) {
    let partial = path
        .file_name()
        .is_some_and(|name| name.as_encoded_bytes().starts_with(PARTIAL.as_bytes()));
    let age = || SystemTime::now().duration_since(fs::metadata(path).ok()?.modified().ok()?).ok();
    if partial && age().is_some_and(|age| age > PARTIAL_AGE_MAX) {
        // Where it cannot be removed it does no harm.
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_exchanged_whole_and_is_for_whom_it_is_meant() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
        write_json(&path, &1).unwrap();
        assert_eq!((fs::read(&path).unwrap(), mode()), (b"1".to_vec(), 0o600));
        write(&path, b"two", 0o644).unwrap();
        assert_eq!((fs::read(&path).unwrap(), mode()), (b"two".to_vec(), 0o644));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(write(&dir.path().join("no/a"), b"", 0o600).is_err());
    }

    #[test]
    fn what_a_killed_writer_left_is_swept_and_what_a_live_one_writes_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let files = [".partial-old", ".partial-young", "notes"].map(|name| dir.path().join(name));
        let [old, young, foreign] = files.each_ref().map(|path| File::create(path).unwrap());
        let long_ago = SystemTime::now() - 2 * PARTIAL_AGE_MAX;
        for file in [&old, &foreign] {
            file.set_modified(long_ago).unwrap();
        }
        drop(young);
        files.iter().for_each(|path| sweep(path));
        assert_eq!(files.each_ref().map(|path| path.exists()), [false, true, true]);
    }
}
