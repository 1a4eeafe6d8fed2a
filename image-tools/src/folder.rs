//! Folders with a machine's images: found, opened, made, and changed in one field of their record.
//!
//! A new one is made under another name beside its own, and gets that only when it is whole and durable.

pub mod rework;

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::libc::{O_DIRECTORY, O_NOFOLLOW, O_NONBLOCK};

use crate::error::ImageError;
use crate::record::{ImageRecord, RECORD_NAME, RecordError, is_plain_name};

/// The longest record: checksums of the most disks that anybody has take a tenth.
const RECORD_LEN_MAX: u64 = 64 << 20;
/// What is behind the name of a folder that is being made, and of a record that is being written.
const PARTIAL: &str = ".partial";
/// How often somebody may take a folder away between its creation and its lock.
const TRIES: u32 = 10;

/// A folder with a machine's images, whose record was read and checked.
#[derive(Debug)]
pub struct Image {
    folder: PathBuf,
    record: ImageRecord,
}

impl Image {
    /// Opens a folder. What its record names is a regular file in it, or is missing.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn open(folder: &Path) -> Result<Self, ImageError> {
        let record = read_record(folder)?;
        for name in record.file_names() {
            let path = folder.join(name);
            match fs::symlink_metadata(&path) {
                Ok(metadata) if !metadata.is_file() => return Err(ImageError::NoFile { path }),
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(ImageError::file("look at", path)(error));
                }
                _ => {}
            }
        }
        Ok(Self { folder: folder.to_owned(), record })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What the folder says of itself.
    pub fn record(&self) -> &ImageRecord {
        &self.record
    }

    /// The folder's own name, which a user knows it by.
    pub fn name(&self) -> String {
        let name = self.folder.file_name().unwrap_or(self.folder.as_os_str());
        name.to_string_lossy().into_owned()
    }

    /// Opens one of its files for reading.
    ///
    /// # Errors
    /// [`ImageError::File`], [`ImageError::NoFile`].
    pub fn open_file(&self, name: &str) -> Result<File, ImageError> {
        open_regular(&self.folder.join(name))
    }

    /// Changes the record; the change is durable when this returns.
    ///
    /// # Errors
    /// [`ImageError`]; the record is then still the one before.
    pub fn change(&mut self, change: impl FnOnce(&mut ImageRecord)) -> Result<(), ImageError> {
        let lock = open_folder(&self.folder)?;
        lock_now(&lock, &self.folder)?;
        // Somebody may have changed another field meanwhile.
        let mut record = read_record(&self.folder)?;
        change(&mut record);
        write_record(&self.folder, &record)?;
        self.record = record;
        Ok(())
    }
}

/// The images in a store, by the names of their folders, and those that cannot be used. Folders without a
/// record are none.
///
/// # Errors
/// [`ImageError::File`] when the store cannot be listed.
pub fn list(store: &Path) -> Result<(Vec<Image>, Vec<ImageError>), ImageError> {
    let (mut images, mut unusable) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(store).map_err(ImageError::file("list", store))? {
        let path = entry.map_err(ImageError::file("list", store))?.path();
        let is_hidden = path.file_name().is_none_or(|n| n.as_encoded_bytes().starts_with(b"."));
        if is_hidden || !path.is_dir() {
            continue;
        }
        match Image::open(&path) {
            Ok(image) => images.push(image),
            Err(ImageError::NoImage { .. }) => {}
            Err(error) => unusable.push(error),
        }
    }
    images.sort_by(|one, other| one.folder.cmp(&other.folder));
    Ok((images, unusable))
}

/// What a killed process has left in a store, by the name of its image.
#[derive(Debug, PartialEq, Eq)]
pub enum Unfinished {
    /// A part of an image that never was whole: the next one of that name removes it.
    Part(String),
    /// A whole image in the middle of an update, which the next one finishes.
    Update(String),
}

/// What is left unfinished in a store and nobody works on, by name.
///
/// # Errors
/// [`ImageError::File`] when the store cannot be listed.
pub fn unfinished(store: &Path) -> Result<Vec<Unfinished>, ImageError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(store).map_err(ImageError::file("list", store))? {
        let path = entry.map_err(ImageError::file("list", store))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(hidden) = name.and_then(|name| name.strip_prefix('.')) else { continue };
        let left = match hidden.strip_suffix(PARTIAL) {
            Some(name) => Unfinished::Part(name.to_owned()),
            None => match hidden.strip_suffix(rework::WORK) {
                Some(name) => Unfinished::Update(name.to_owned()),
                None => continue,
            },
        };
        if open_folder(&path).is_ok_and(|folder| folder.try_lock().is_ok()) {
            found.push((path, left));
        }
    }
    found.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(found.into_iter().map(|(_, left)| left).collect())
}

/// A folder that is being made under another name, locked meanwhile; removed when dropped.
#[derive(Debug)]
pub struct NewImage {
    partial: PathBuf,
    target: PathBuf,
    lock: File,
    is_whole: bool,
}

impl NewImage {
    /// Makes an empty folder that becomes `target`, private to its owner, and the folders above it. What a
    /// killed process has left of it is removed.
    ///
    /// # Errors
    /// [`ImageError::Name`], [`ImageError::Exists`], [`ImageError::Busy`], [`ImageError::File`].
    pub fn begin(target: &Path) -> Result<Self, ImageError> {
        let name = target.file_name().and_then(|name| name.to_str());
        let Some(name) = name.filter(|name| is_plain_name(name)) else {
            return Err(ImageError::Name { path: target.to_owned() });
        };
        refuse_existing(target)?;
        let partial = target.with_file_name(format!(".{name}{PARTIAL}"));
        let store = partial.parent().filter(|store| !store.as_os_str().is_empty());
        let mut builder = fs::DirBuilder::new();
        builder.mode(0o700).recursive(true);
        builder
            .create(store.unwrap_or(Path::new(".")))
            .map_err(ImageError::file("make", target))?;
        builder.recursive(false);
        for _ in 0..TRIES {
            match builder.create(&partial) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(ImageError::file("make", partial)(error));
                }
                _ => {}
            }
            let lock = match open_folder(&partial) {
                Err(ImageError::File { source, .. })
                    if source.kind() == io::ErrorKind::NotFound =>
                {
                    continue;
                }
                opened => opened?,
            };
            match lock_now(&lock, target) {
                // Its last maker may have removed or renamed it just before it let go of the lock.
                Ok(()) if !is_at(&lock, &partial) => continue,
                locked => locked?,
            }
            let new = Self { partial, target: target.to_owned(), lock, is_whole: false };
            refuse_existing(target)?;
            new.empty()?;
            return Ok(new);
        }
        Err(ImageError::Busy { path: target.to_owned() })
    }

    /// Where its files go meanwhile.
    pub fn folder(&self) -> &Path {
        &self.partial
    }

    /// Writes a file that is none of the disks.
    ///
    /// # Errors
    /// [`ImageError::Name`], [`ImageError::File`].
    pub fn add_file(&self, name: &str, content: &[u8]) -> Result<(), ImageError> {
        let path = self.partial.join(name);
        if !is_plain_name(name) {
            return Err(ImageError::Name { path });
        }
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(&path);
        let written = file.and_then(|mut file| file.write_all(content));
        written.map_err(ImageError::file("write", path))
    }

    /// Writes the record, makes all of it durable, and gives it its name.
    ///
    /// # Errors
    /// [`ImageError`]; nothing has the name then.
    pub fn publish(mut self, record: ImageRecord) -> Result<Image, ImageError> {
        // What nobody could open is not made.
        let path = self.partial.join(RECORD_NAME);
        record.check().map_err(|source| ImageError::Record { path, source })?;
        for name in record.file_names() {
            let path = self.partial.join(name);
            let synced = open_regular(&path)?.sync_all();
            synced.map_err(ImageError::file("make durable", path))?;
        }
        write_record(&self.partial, &record)?;
        rename_new(&self.partial, &self.target).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty => {
                ImageError::Exists { path: self.target.clone() }
            }
            _ => ImageError::file("give its name to", &self.target)(error),
        })?;
        self.is_whole = true;
        let store = self.target.parent().filter(|store| !store.as_os_str().is_empty());
        sync_folder(store.unwrap_or(Path::new(".")))?;
        Ok(Image { folder: self.target.clone(), record })
    }

    /// Removes all that is in it.
    fn empty(&self) -> Result<(), ImageError> {
        for entry in fs::read_dir(&self.partial).map_err(ImageError::file("list", &self.partial))? {
            let entry = entry.map_err(ImageError::file("list", &self.partial))?;
            let path = entry.path();
            let removed = match entry.file_type() {
                Ok(kind) if kind.is_dir() => fs::remove_dir_all(&path),
                _ => fs::remove_file(&path),
            };
            removed.map_err(ImageError::file("remove", path))?;
        }
        Ok(())
    }
}

impl Drop for NewImage {
    fn drop(&mut self) {
        if !self.is_whole && is_at(&self.lock, &self.partial) {
            // Under the lock. What cannot be removed goes with the next try.
            let _ = fs::remove_dir_all(&self.partial);
        }
        unlock(&self.lock);
    }
}

fn read_record(folder: &Path) -> Result<ImageRecord, ImageError> {
    let path = folder.join(RECORD_NAME);
    let file = match open_regular(&path) {
        Err(ImageError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            let folder = folder.to_owned();
            return Err(match rework::Rework::is_interrupted(&folder) {
                true => ImageError::Interrupted { path: folder },
                false => ImageError::NoImage { folder },
            });
        }
        file => file?,
    };
    let mut text = Vec::new();
    let read = file.take(RECORD_LEN_MAX + 1).read_to_end(&mut text);
    let len = read.map_err(ImageError::file("read", &path))? as u64;
    let record = match len > RECORD_LEN_MAX {
        true => Err(RecordError::TooLong { len, max: RECORD_LEN_MAX }),
        false => ImageRecord::parse(&text),
    };
    record.map_err(|source| ImageError::Record { path, source })
}

/// Puts a record in place of the one before, or of none. Under the folder's lock.
fn write_record(folder: &Path, record: &ImageRecord) -> Result<(), ImageError> {
    let text = serde_json::to_vec(record).expect("a record has only string keys");
    let (path, partial) =
        (folder.join(RECORD_NAME), folder.join(format!(".{RECORD_NAME}{PARTIAL}")));
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).custom_flags(O_NOFOLLOW);
    let write = |mut file: File| file.write_all(&text).and_then(|()| file.sync_all());
    let written = options.open(&partial).and_then(write);
    let written = written.and_then(|()| fs::rename(&partial, &path));
    written.map_err(ImageError::file("write", path))?;
    sync_folder(folder)
}

/// Opens a file for reading, not what a link leads to, and waits for nobody.
fn open_regular(path: &Path) -> Result<File, ImageError> {
    let mut options = File::options();
    match options.read(true).custom_flags(O_NOFOLLOW | O_NONBLOCK).open(path) {
        Ok(file) => match file.metadata() {
            Ok(metadata) if metadata.is_file() => Ok(file),
            Ok(_) => Err(ImageError::NoFile { path: path.to_owned() }),
            Err(error) => Err(ImageError::file("look at", path)(error)),
        },
        Err(error) if error.raw_os_error() == Some(Errno::ELOOP as i32) => {
            Err(ImageError::NoFile { path: path.to_owned() })
        }
        Err(error) => Err(ImageError::file("read", path)(error)),
    }
}

pub(crate) fn open_folder(folder: &Path) -> Result<File, ImageError> {
    let mut options = File::options();
    let opened = options.read(true).custom_flags(O_DIRECTORY | O_NOFOLLOW).open(folder);
    opened.map_err(ImageError::file("open", folder))
}

/// Locks a folder for whoever makes or changes it.
fn lock_now(folder: &File, named: &Path) -> Result<(), ImageError> {
    match folder.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(ImageError::Busy { path: named.to_owned() }),
        Err(TryLockError::Error(source)) => Err(ImageError::file("lock", named)(source)),
    }
}

/// Gives a lock back. To close the folder is not enough: a child process that is just being made has it open, too,
/// until it becomes another program.
fn unlock(folder: &File) {
    let _ = folder.unlock();
}

fn refuse_existing(target: &Path) -> Result<(), ImageError> {
    if rework::Rework::is_interrupted(target) {
        return Err(ImageError::Interrupted { path: target.to_owned() });
    }
    match fs::symlink_metadata(target) {
        Ok(_) => Err(ImageError::Exists { path: target.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(ImageError::file("look at", target)(error)),
    }
}

fn sync_folder(folder: &Path) -> Result<(), ImageError> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(ImageError::file("make durable", folder))
}

/// Whether this folder still has that name.
pub(crate) fn is_at(folder: &File, path: &Path) -> bool {
    match (folder.metadata(), fs::symlink_metadata(path)) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

/// Gives a folder its name, unless that is taken.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        // NFS and others do not know the flag. A folder with files in it is never replaced anyway.
        Err(Errno::EINVAL | Errno::ENOSYS) => fs::rename(from, to),
        renamed => renamed.map_err(io::Error::from),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use jiff::Timestamp;

    use super::rework::Rework;
    use super::*;
    use crate::record::{
        BootSign, BootTrial, DiskFile, FileSums, Origin, OtherFile, RECORD_VERSION,
    };

    fn record() -> ImageRecord {
        let sums = FileSums { sha256: "0".repeat(64), extent_len: 4, crc32: vec![7] };
        let (target, file) = ("vda".into(), "vda.qcow2".into());
        ImageRecord {
            version: RECORD_VERSION,
            machine: "web".into(),
            time: Timestamp::UNIX_EPOCH,
            origin: Origin::File("/a".into()),
            disks: vec![DiskFile { target, file, size: 512, file_len: 4, sums }],
            files: vec![OtherFile { file: "domain.xml".into(), sha256: "0".repeat(64) }],
            flavour: None,
            boot: None,
        }
    }

    fn fill(new: &NewImage) {
        new.add_file("vda.qcow2", b"disk").unwrap();
        new.add_file("domain.xml", b"<domain/>").unwrap();
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string();
        let mut names: Vec<_> = entries.map(|entry| name(entry).unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn p5_an_image_appears_whole_or_not_at_all() {
        let store = tempfile::tempdir().unwrap();
        let target = store.path().join("a").join("web");
        let given_up = NewImage::begin(&target).unwrap();
        fill(&given_up);
        assert_eq!(names(&store.path().join("a")), [".web.partial"]);
        drop(given_up);
        assert!(names(&store.path().join("a")).is_empty());
        let new = NewImage::begin(&target).unwrap();
        fill(&new);

        let made = new.publish(record()).unwrap();

        assert_eq!(names(&store.path().join("a")), ["web"]);
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o700);
        let found = list(target.parent().unwrap()).unwrap();
        assert_eq!((found.0.len(), found.1.len()), (1, 0));
        assert_eq!((found.0[0].record(), found.0[0].name()), (made.record(), "web".into()));
        assert!(matches!(NewImage::begin(&target), Err(ImageError::Exists { .. })));
    }

    #[test]
    fn p5_a_record_that_names_what_is_not_there_gives_no_image() {
        let store = tempfile::tempdir().unwrap();
        let new = NewImage::begin(&store.path().join("web")).unwrap();
        new.add_file("vda.qcow2", b"disk").unwrap();

        let refused = new.publish(record()).unwrap_err();

        assert!(matches!(refused, ImageError::File { .. }), "{refused}");
        assert!(names(store.path()).is_empty());
    }

    #[test]
    fn r29_what_a_killed_maker_left_goes_and_a_live_one_is_not_disturbed() {
        let store = tempfile::tempdir().unwrap();
        let target = store.path().join("web");
        let left = store.path().join(".web.partial");
        fs::create_dir_all(left.join("appliance")).unwrap();
        fs::write(left.join("vda.qcow2"), "half").unwrap();
        symlink(store.path(), left.join("link")).unwrap();

        let first = NewImage::begin(&target).unwrap();

        assert!(names(first.folder()).is_empty());
        assert!(matches!(NewImage::begin(&target), Err(ImageError::Busy { .. })));
        drop(first);
        assert!(store.path().exists() && names(store.path()).is_empty());
    }

    #[test]
    fn s15_a_name_that_is_no_plain_name_makes_nothing() {
        let store = tempfile::tempdir().unwrap();
        for name in ["..", "-rf", ".hidden", "a\nb", "a\u{1b}[2J", &"x".repeat(255)] {
            let refused = NewImage::begin(&store.path().join(name));
            assert!(matches!(refused, Err(ImageError::Name { .. })), "{name:?}");
        }
        assert!(names(store.path()).is_empty());
    }

    #[test]
    fn what_killed_processes_left_is_told_and_what_others_work_on_is_not() {
        let store = tempfile::tempdir().unwrap();
        let at = |name: &str| store.path().join(name);
        for name in [".web.partial", ".db.update", ".git", ".file.partial.txt"] {
            fs::create_dir(at(name)).unwrap();
        }
        let _at_work = NewImage::begin(&at("shop")).unwrap();

        let found = unfinished(store.path()).unwrap();

        assert_eq!(found, [Unfinished::Update("db".into()), Unfinished::Part("web".into())]);
    }

    #[test]
    fn r29_a_lock_ends_with_its_holder_whoever_has_the_folder_open() {
        let store = tempfile::tempdir().unwrap();
        let target = store.path().join("web");
        let new = NewImage::begin(&target).unwrap();
        // As a child process has it between its beginning and its program's.
        let _copy = new.lock.try_clone().unwrap();
        fill(&new);
        new.publish(record()).unwrap();
        let rework = Rework::begin(&target).unwrap();
        let _copy = rework.lock().try_clone().unwrap();
        rework.prepare().unwrap();
        rework.take(&record()).unwrap();
        drop(rework);

        let rework = Rework::begin(&target).unwrap();

        assert!(rework.is_under_way());
    }

    /// Whoever is killed between two steps of giving an image its name back leaves one that the next gives it.
    #[test]
    fn r29_an_image_gets_its_name_back_wherever_its_update_was_interrupted() {
        for has_new_record in [false, true] {
            let store = tempfile::tempdir().unwrap();
            let target = store.path().join("web");
            let new = NewImage::begin(&target).unwrap();
            fill(&new);
            new.publish(record()).unwrap();
            let next = ImageRecord { machine: "shop".into(), ..record() };
            let rework = Rework::begin(&target).unwrap();
            rework.prepare().unwrap();
            rework.take(&next).unwrap();
            assert!(matches!(Image::open(&target), Err(ImageError::Interrupted { .. })));
            assert!(matches!(NewImage::begin(&target), Err(ImageError::Interrupted { .. })));
            if has_new_record {
                rework.image().unwrap().change(|now| *now = next.clone()).unwrap();
            }
            drop(rework);

            let rework = Rework::begin(&target).unwrap();
            assert!(rework.is_under_way());
            let next = rework.next().unwrap();
            let image = rework.give_back(next).unwrap();

            assert_eq!(image.record().machine, "shop");
            assert_eq!(names(store.path()), ["web"]);
        }
    }

    #[test]
    fn s02_links_and_devices_in_a_foreign_folder_are_not_followed() {
        let store = tempfile::tempdir().unwrap();
        let target = store.path().join("web");
        let new = NewImage::begin(&target).unwrap();
        fill(&new);
        new.publish(record()).unwrap();
        fs::remove_file(target.join("vda.qcow2")).unwrap();
        symlink("/etc/passwd", target.join("vda.qcow2")).unwrap();
        assert!(matches!(Image::open(&target), Err(ImageError::NoFile { .. })));

        fs::rename(target.join(RECORD_NAME), store.path().join("elsewhere")).unwrap();
        symlink(store.path().join("elsewhere"), target.join(RECORD_NAME)).unwrap();

        let (found, unusable) = list(store.path()).unwrap();
        assert!(found.is_empty());
        assert!(matches!(&unusable[..], [ImageError::NoFile { .. }]), "{unusable:?}");
    }

    #[test]
    fn one_field_changes_and_the_others_stay() {
        let store = tempfile::tempdir().unwrap();
        let new = NewImage::begin(&store.path().join("web")).unwrap();
        fill(&new);
        let mut image = new.publish(record()).unwrap();
        let mut other = Image::open(image.folder()).unwrap();
        image.change(|record| record.machine = "db".into()).unwrap();
        let (time, sign) = (Timestamp::UNIX_EPOCH, Some(BootSign::Agent));
        let trial = BootTrial { time, sign, host: Some("db".into()), elapsed_ms: 7 };

        other.change(|record| record.boot = Some(trial.clone())).unwrap();

        let read = Image::open(image.folder()).unwrap();
        assert_eq!((&read.record().machine[..], &read.record().boot), ("db", &Some(trial)));
        assert_eq!(names(image.folder()), ["domain.xml", RECORD_NAME, "vda.qcow2"]);
    }
}
