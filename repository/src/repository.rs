//! Creating and opening a repository, and its sealed files.

use std::{
    io::Read,
    sync::{Arc, Mutex, Weak},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    Backend, BackendError, Defect, FileId, FileKind, FileRef, Kdf, RepositoryError,
    crypto::MasterKey,
    key::{self, Unlock},
    lock, polynomial,
};

/// An open repository. Cheap to clone; all clones are the same one.
#[derive(Debug, Clone)]
pub struct Repository {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    backend: Arc<dyn Backend>,
    key: MasterKey,
    key_id: FileId,
    /// Digest of the key file as it was opened; another than its name if it is damaged.
    key_digest: FileId,
    config: Config,
    /// The locks that this program has taken through it.
    locks: Mutex<Vec<Weak<lock::Shared>>>,
}

/// The content of `config`.
#[derive(Debug, Serialize, Deserialize)]
struct Config {
    version: u32,
    id: String,
    chunker_polynomial: String,
}

impl Repository {
    /// Makes a new repository in an empty store and opens it.
    ///
    /// Fails with [`RepositoryError::AlreadyExists`] where there is one, also when another program
    /// makes one at the same moment, and with [`RepositoryError::ConfigMissing`] on the remains of
    /// one.
    pub fn init(
        backend: Arc<dyn Backend>,
        password: &[u8],
        kdf: Kdf,
    ) -> Result<Self, RepositoryError> {
        let location = backend.location();
        if !backend.list(FileKind::Config)?.is_empty() {
            return Err(RepositoryError::AlreadyExists { location });
        }
        for kind in [FileKind::Pack, FileKind::Index, FileKind::Snapshot] {
            if !backend.list(kind)?.is_empty() {
                return Err(RepositoryError::ConfigMissing { location });
            }
        }
        let (key, key_file) = key::create(password, kdf)?;
        let key_id = FileId::of(&key_file);
        let mut id = [0; 32];
        rand::fill(&mut id);
        let config = Config {
            version: 2,
            id: const_hex::encode(id),
            chunker_polynomial: format!("{:x}", polynomial::random()),
        };
        let sealed = key.seal(&serde_json::to_vec(&config).expect("strings are valid JSON"));
        backend.write(FileKind::Key, &key_id, &key_file)?;
        if let Err(source) = backend.write(FileKind::Config, &FileId::CONFIG, &sealed) {
            // It may be there all the same: the answer was lost, and a second try refused.
            let found = backend.read(FileKind::Config, &FileId::CONFIG);
            if found.as_ref().ok() != Some(&sealed) {
                // Without its `config` a key is useless, but only where that is known not to come. The error to
                // report is the first one.
                if found.is_ok() || found.is_err_and(|error| error.is_not_found()) {
                    let _ = backend.remove(FileKind::Key, &key_id);
                }
                return Err(match source {
                    BackendError::Exists { .. } => RepositoryError::AlreadyExists { location },
                    source => source.into(),
                });
            }
        }
        // Other keys belong to attempts that ended before their `config`. Stock restic would try
        // them, open one, and then not understand our files.
        for (other, _) in backend.list(FileKind::Key)? {
            if other != key_id {
                ignore_missing(backend.remove(FileKind::Key, &other))?;
            }
        }
        // Such an attempt may have run beside this one and swept our key for the same reason.
        if !backend.list(FileKind::Key)?.iter().any(|&(other, _)| other == key_id) {
            backend.write(FileKind::Key, &key_id, &key_file)?;
        }
        Ok(Self::new(backend, key, (key_id, key_id), config))
    }

    /// Opens a repository with any of its keys.
    pub fn open(backend: Arc<dyn Backend>, password: &[u8]) -> Result<Self, RepositoryError> {
        let location = backend.location();
        let sealed = match backend.read(FileKind::Config, &FileId::CONFIG) {
            Err(source) if source.is_not_found() => {
                return Err(RepositoryError::NotARepository { location });
            }
            other => other?,
        };
        let mut keys = backend.list(FileKind::Key)?;
        keys.sort_unstable();
        let mut failure = RepositoryError::WrongPassword { location };
        for (key_id, _) in keys {
            let file = FileRef { kind: FileKind::Key, id: key_id };
            let content = match backend.read(FileKind::Key, &key_id) {
                Err(source) if source.is_not_found() => continue,
                other => other?,
            };
            let key_digest = FileId::of(&content);
            let intact = key_digest == key_id;
            let damaged = |source| RepositoryError::Damaged { file, source };
            match key::unlock(&content, password) {
                Ok(Unlock::Opened(key)) => match open_config(&key, &sealed) {
                    Ok(config) => {
                        if config.version != 2 {
                            let version = config.version;
                            return Err(RepositoryError::UnsupportedVersion { version });
                        }
                        return Ok(Self::new(backend, key, (key_id, key_digest), config));
                    }
                    Err(source) => {
                        let file = FileRef { kind: FileKind::Config, id: FileId::CONFIG };
                        failure = RepositoryError::Damaged { file, source };
                    }
                },
                Ok(Unlock::WrongPassword) if intact => {}
                Ok(Unlock::Damaged(source)) => failure = damaged(source),
                Ok(Unlock::WrongPassword) | Err(_) if !intact => failure = damaged(Defect::Name),
                Ok(Unlock::WrongPassword) => {}
                Err(refused) => failure = refused,
            }
        }
        Err(failure)
    }

    fn new(
        backend: Arc<dyn Backend>,
        key: MasterKey,
        (key_id, key_digest): (FileId, FileId),
        config: Config,
    ) -> Self {
        let locks = Mutex::default();
        Self { inner: Arc::new(Inner { backend, key, key_id, key_digest, config, locks }) }
    }

    /// The random id of the repository, 64 hexadecimal digits: the same wherever it is moved.
    pub fn id(&self) -> &str {
        &self.inner.config.id
    }

    /// Where the repository is, to show to a person.
    pub fn location(&self) -> String {
        self.inner.backend.location()
    }

    /// The store below.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.inner.backend
    }

    pub(crate) fn locks(&self) -> &Mutex<Vec<Weak<lock::Shared>>> {
        &self.inner.locks
    }

    pub(crate) fn key(&self) -> &MasterKey {
        &self.inner.key
    }

    /// The key file that the password opened.
    pub fn key_id(&self) -> FileId {
        self.inner.key_id
    }

    /// Digest of the key file that the password opened.
    pub(crate) fn key_digest(&self) -> FileId {
        self.inner.key_digest
    }

    /// Reads a sealed JSON file whose name must be the digest of its content.
    pub(crate) fn read_json<T: DeserializeOwned>(
        &self,
        kind: FileKind,
        id: &FileId,
    ) -> Result<T, RepositoryError> {
        let plain = self.read_unpacked(kind, id)?;
        serde_json::from_slice(&plain).map_err(|source| RepositoryError::Damaged {
            file: FileRef { kind, id: *id },
            source: source.into(),
        })
    }

    /// Reads, authenticates and decompresses a snapshot, index or lock file.
    pub(crate) fn read_unpacked(
        &self,
        kind: FileKind,
        id: &FileId,
    ) -> Result<Vec<u8>, RepositoryError> {
        let damaged = |source| RepositoryError::Damaged { file: FileRef { kind, id: *id }, source };
        let mut stored = self.backend().read(kind, id)?;
        if FileId::of(&stored) != *id {
            return Err(damaged(Defect::Name));
        }
        open_unpacked(self.key(), kind, &mut stored).map_err(damaged)
    }

    /// Compresses, seals and stores a snapshot, index or lock file; returns its name.
    pub(crate) fn write_json<T: Serialize>(
        &self,
        kind: FileKind,
        value: &T,
    ) -> Result<FileId, RepositoryError> {
        self.write_json_sized(kind, value).map(|(id, _)| id)
    }

    /// As [`Self::write_json`]; also returns the length of the file in bytes.
    ///
    /// The door that index files and snapshots go through: closed once a lock was lost, for then a prune may
    /// have removed what they are about to mention.
    pub(crate) fn write_json_sized<T: Serialize>(
        &self,
        kind: FileKind,
        value: &T,
    ) -> Result<(FileId, usize), RepositoryError> {
        let sealed = self.seal_json(value)?;
        if kind != FileKind::Lock {
            self.prove_locks()?;
        }
        let id = FileId::of(&sealed);
        self.backend().write(kind, &id, &sealed)?;
        Ok((id, sealed.len()))
    }

    fn seal_json<T: Serialize>(&self, value: &T) -> Result<Vec<u8>, RepositoryError> {
        let json = serde_json::to_vec(value).expect("our own types are valid JSON");
        let compressed = zstd::bulk::compress(&json, zstd::DEFAULT_COMPRESSION_LEVEL)
            .map_err(|source| RepositoryError::Compress { source: Arc::new(source) })?;
        Ok(self.key().seal(&[&[2], compressed.as_slice()].concat()))
    }

    /// Whether `config` is still what it was when the repository was opened.
    pub(crate) fn verify_config(&self) -> Result<(), RepositoryError> {
        let sealed = self.backend().read(FileKind::Config, &FileId::CONFIG)?;
        let file = FileRef { kind: FileKind::Config, id: FileId::CONFIG };
        match open_config(self.key(), &sealed) {
            Ok(config) if config.id == self.inner.config.id => Ok(()),
            Ok(_) => {
                Err(RepositoryError::Damaged { file, source: Defect::OutOfRange { field: "id" } })
            }
            Err(source) => Err(RepositoryError::Damaged { file, source }),
        }
    }
}

/// A file that is gone already is as good as removed.
pub(crate) fn ignore_missing(removed: Result<(), BackendError>) -> Result<(), BackendError> {
    match removed {
        Err(source) if source.is_not_found() => Ok(()),
        other => other,
    }
}

fn open_config(key: &MasterKey, sealed: &[u8]) -> Result<Config, Defect> {
    let mut sealed = sealed.to_vec();
    let config: Config = serde_json::from_slice(key.open_in_place(&mut sealed)?)?;
    // Files of this host are called by it.
    match config.id.parse::<FileId>() {
        Ok(_) => Ok(config),
        Err(_) => Err(Defect::OutOfRange { field: "id" }),
    }
}

/// Opens the stored bytes of an unpacked file: JSON as it is, or `2` and a zstd frame of JSON.
pub(crate) fn open_unpacked(
    key: &MasterKey,
    kind: FileKind,
    stored: &mut [u8],
) -> Result<Vec<u8>, Defect> {
    let plain = key.open_in_place(stored)?;
    match plain {
        [b'{' | b'[', ..] => Ok(plain.to_vec()),
        [2, frame @ ..] => decompress_bounded(frame, kind.len_max()),
        _ => Err(Defect::OutOfRange { field: "encoding" }),
    }
}

/// Decompresses a frame of unknown length, but never more than `len_max` bytes.
fn decompress_bounded(frame: &[u8], len_max: u64) -> Result<Vec<u8>, Defect> {
    let decoder = zstd::Decoder::with_buffer(frame).map_err(|_| Defect::Compression)?;
    let mut plain = Vec::new();
    let read = decoder.take(len_max + 1).read_to_end(&mut plain);
    let len = read.map_err(|_| Defect::Compression)?;
    if len as u64 > len_max {
        return Err(Defect::TooLong { len_max });
    }
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s16_a_repository_cannot_name_a_file_of_this_host() {
        let key = MasterKey::new(&[7; 64]);
        let open = |id: &str| {
            let polynomial = "25b468838dcb75";
            let config =
                serde_json::json!({"version": 2, "id": id, "chunker_polynomial": polynomial});
            open_config(&key, &key.seal(config.to_string().as_bytes()))
        };
        assert!(open(&"5f".repeat(32)).is_ok());
        for id in ["", "/etc/passwd", "../jobs", &"5g".repeat(32), &"5f".repeat(33)] {
            assert!(matches!(open(id), Err(Defect::OutOfRange { field: "id" })), "{id}");
        }
    }
}
