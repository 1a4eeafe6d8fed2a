//! Packs are made durable together, and always before an index file mentions them.

mod common;

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use common::{CHUNK, disk, init, noise, open, store};
use repository::{Backend, BackendError, Begun, FileId, FileKind, LocalFolder};

/// A folder that counts, and refuses an index file while any pack is not durable.
#[derive(Debug)]
struct Strict {
    folder: LocalFolder,
    begun: AtomicUsize,
    settled: AtomicUsize,
    settlings: AtomicUsize,
}

impl Backend for Strict {
    fn list(&self, kind: FileKind) -> Result<Vec<(FileId, u64)>, BackendError> {
        self.folder.list(kind)
    }

    fn read(&self, kind: FileKind, id: &FileId) -> Result<Vec<u8>, BackendError> {
        self.folder.read(kind, id)
    }

    fn read_range(
        &self,
        kind: FileKind,
        id: &FileId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), BackendError> {
        self.folder.read_range(kind, id, offset, buffer)
    }

    fn write(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<(), BackendError> {
        if matches!(kind, FileKind::Index | FileKind::Snapshot) {
            let [begun, settled] =
                [&self.begun, &self.settled].map(|count| count.load(Ordering::SeqCst));
            assert_eq!(begun, settled, "{kind:?} before packs are durable");
        }
        self.folder.write(kind, id, content)
    }

    fn begin(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<Begun, BackendError> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        self.folder.begin(kind, id, content)
    }

    fn settle(&self, files: Vec<Begun>) -> Result<(), BackendError> {
        let count = files.len();
        self.folder.settle(files)?;
        self.settled.fetch_add(count, Ordering::SeqCst);
        self.settlings.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn remove(&self, kind: FileKind, id: &FileId) -> Result<(), BackendError> {
        self.folder.remove(kind, id)
    }

    fn location(&self) -> String {
        self.folder.location()
    }
}

fn strict(scratch: &std::path::Path) -> Arc<Strict> {
    let folder = LocalFolder::create(scratch).unwrap();
    let [begun, settled, settlings] = [(); 3].map(|()| AtomicUsize::new(0));
    Arc::new(Strict { folder, begun, settled, settlings })
}

#[test]
fn p1_packs_are_durable_before_the_index_and_few_times_for_many() {
    let scratch = tempfile::tempdir().unwrap();
    let backend = strict(scratch.path());
    let repository = init(backend.clone());
    // 160 MiB that do not compress: ten packs or more.
    let big = noise(1, 160 << 20);
    let (_, stats) = store(&repository, "big", &big, 1 << 20).unwrap();
    assert!(stats.packs >= 10, "{} packs", stats.packs);
    let settlings = backend.settlings.load(Ordering::SeqCst);
    assert!((3..=5).contains(&settlings), "made durable {settlings} times");
    drop(repository);

    let again = open(backend.clone()).unwrap();
    let (_, stats) = store(&again, "small", &disk(7), CHUNK).unwrap();
    assert!(stats.packs > 0);
}
