//! Where a repository is, and its store with every effect counted.

use std::fmt;
use std::io;
use std::sync::Arc;

use repository::{Backend, BackendError, Begun, FileId, FileKind, LocalFolder};

use crate::effect;

/// Opens the store at a location: a local folder.
///
/// # Errors
/// [`BackendError`] when the folder is not there.
pub fn open(location: &str) -> Result<Arc<dyn Backend>, BackendError> {
    Ok(Arc::new(Counted(LocalFolder::open(location)?)))
}

/// Makes the store at a location.
///
/// # Errors
/// [`BackendError`] when the folder cannot be made.
pub fn create(location: &str) -> Result<Arc<dyn Backend>, BackendError> {
    Ok(Arc::new(Counted(LocalFolder::create(location)?)))
}

/// A store that announces what it changes.
struct Counted<B>(B);

impl<B: Backend> Counted<B> {
    fn about_to(&self, operation: &'static str, kind: FileKind) -> Result<(), BackendError> {
        self.announce(operation, &format!("repository: {operation} {}", kind_name(kind)))
    }

    fn announce(&self, operation: &'static str, effect: &str) -> Result<(), BackendError> {
        effect::about_to(effect).map_err(|source: io::Error| BackendError::Io {
            operation,
            file: self.0.location(),
            source: Arc::new(source),
        })
    }
}

fn kind_name(kind: FileKind) -> &'static str {
    match kind {
        FileKind::Config => "config",
        FileKind::Key => "key",
        FileKind::Snapshot => "snapshot",
        FileKind::Index => "index",
        FileKind::Pack => "pack",
        FileKind::Lock => "lock",
    }
}

impl<B: fmt::Debug> fmt::Debug for Counted<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<B: Backend> Backend for Counted<B> {
    fn list(&self, kind: FileKind) -> Result<Vec<(FileId, u64)>, BackendError> {
        self.0.list(kind)
    }

    fn read(&self, kind: FileKind, id: &FileId) -> Result<Vec<u8>, BackendError> {
        self.0.read(kind, id)
    }

    fn read_range(
        &self,
        kind: FileKind,
        id: &FileId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), BackendError> {
        self.0.read_range(kind, id, offset, buffer)
    }

    fn write(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<(), BackendError> {
        self.about_to("write", kind)?;
        self.0.write(kind, id, content)
    }

    fn begin(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<Begun, BackendError> {
        self.about_to("write", kind)?;
        self.0.begin(kind, id, content)
    }

    fn settle(&self, files: Vec<Begun>) -> Result<(), BackendError> {
        if !files.is_empty() {
            self.announce("write", "repository: settle packs")?;
        }
        self.0.settle(files)
    }

    fn remove(&self, kind: FileKind, id: &FileId) -> Result<(), BackendError> {
        self.about_to("remove", kind)?;
        self.0.remove(kind, id)
    }

    fn location(&self) -> String {
        self.0.location()
    }

    fn sweep(&self) -> Result<usize, BackendError> {
        self.0.sweep()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p1_packs_are_made_durable_together() {
        let scratch = tempfile::tempdir().unwrap();
        let store = create(scratch.path().to_str().unwrap()).unwrap();
        let contents: [&[u8]; 2] = [b"a pack", b"another"];
        let begin = |content| store.begin(FileKind::Pack, &FileId::of(content), content);
        let begun = contents.map(|content| begin(content).unwrap());

        assert_eq!(store.list(FileKind::Pack).unwrap(), [], "they were settled one by one");

        store.settle(begun.into()).unwrap();
        assert_eq!(store.list(FileKind::Pack).unwrap().len(), 2);
    }
}
