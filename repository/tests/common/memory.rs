//! A repository in memory, whose files can be damaged and whose calls can be made to fail.

use std::{
    collections::BTreeMap,
    fmt, io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use repository::{Backend, BackendError, Begun, FileId, FileKind, FileRef};

/// A file takes up whole blocks of so many bytes.
pub(crate) const BLOCK: u64 = 512;

pub(crate) type Files = BTreeMap<(FileKind, FileId), Vec<u8>>;

type Happens = dyn FnMut(FileKind, &mut Files) + Send;

/// What happens meanwhile: hears of each listing before it is made.
#[derive(Default)]
pub(crate) struct Meanwhile(pub(crate) Option<Box<Happens>>);

impl fmt::Debug for Meanwhile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Meanwhile")
    }
}

/// What is refused whatever is there: by kind, `None` for "not found".
pub(crate) type Refused = Mutex<BTreeMap<FileKind, Option<io::ErrorKind>>>;

#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) files: Mutex<Files>,
    pub(crate) meanwhile: Mutex<Meanwhile>,
    /// Listings, reads and removals that are refused.
    pub(crate) no_list: Refused,
    pub(crate) no_read: Refused,
    pub(crate) no_removal: Refused,
    /// As stores that copies were made to without empty folders: it does not find a list of no files.
    pub(crate) no_empty_folders: AtomicBool,
    /// Files of this kind are stored, but the answer is lost.
    pub(crate) lost_answer: Mutex<Option<FileKind>>,
    /// Effects (write, remove) so far.
    pub(crate) effects: AtomicU64,
    /// The effect, counted from 1, from which on all fail; 0 for never.
    pub(crate) fail_from: AtomicU64,
    /// The effect after which they work again.
    pub(crate) fail_until: AtomicU64,
    pub(crate) error: Mutex<Option<io::ErrorKind>>,
    /// So many bytes fit, each file in blocks of [`BLOCK`]; 0 for no bound.
    pub(crate) capacity: AtomicU64,
    /// While true, effects hang.
    pub(crate) hang: AtomicBool,
}

impl Memory {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Fails effects `from..=until`, counted from 1 beginning now.
    pub(crate) fn fail(&self, from: u64, until: u64, error: io::ErrorKind) {
        self.effects.store(0, Ordering::SeqCst);
        self.fail_until.store(until, Ordering::SeqCst);
        self.fail_from.store(from, Ordering::SeqCst);
        *self.error.lock().unwrap() = Some(error);
    }

    /// Bytes that the files take up.
    pub(crate) fn len(&self) -> u64 {
        let files = self.files.lock().unwrap();
        files.values().map(|content| (content.len() as u64).next_multiple_of(BLOCK)).sum()
    }

    pub(crate) fn names(&self) -> Vec<(FileKind, FileId)> {
        self.files.lock().unwrap().keys().copied().collect()
    }

    fn effect(&self, operation: &'static str, file: &str) -> Result<(), BackendError> {
        while self.hang.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let number = self.effects.fetch_add(1, Ordering::SeqCst) + 1;
        let from = self.fail_from.load(Ordering::SeqCst);
        if from == 0 || number < from || number > self.fail_until.load(Ordering::SeqCst) {
            return Ok(());
        }
        let kind = self.error.lock().unwrap().expect("set by `fail`");
        let source = Arc::new(io::Error::from(kind));
        Err(BackendError::Io { operation, file: file.to_owned(), source })
    }
}

fn refused(by: &Refused, kind: FileKind, id: &FileId) -> Result<(), BackendError> {
    match by.lock().unwrap().get(&kind) {
        None => Ok(()),
        Some(None) => Err(missing(kind, id)),
        Some(Some(error)) => {
            let (file, source) = (FileRef { kind, id: *id }.to_string(), Arc::new((*error).into()));
            Err(BackendError::Io { operation: "use", file, source })
        }
    }
}

fn missing(kind: FileKind, id: &FileId) -> BackendError {
    BackendError::NotFound { file: FileRef { kind, id: *id }.to_string() }
}

impl Backend for Memory {
    fn list(&self, kind: FileKind) -> Result<Vec<(FileId, u64)>, BackendError> {
        refused(&self.no_list, kind, &FileId::CONFIG)?;
        let mut files = self.files.lock().unwrap();
        if let Some(happens) = &mut self.meanwhile.lock().unwrap().0 {
            happens(kind, &mut files);
        }
        let of_kind = files.iter().filter(|((of, _), _)| *of == kind);
        let listed: Vec<_> =
            of_kind.map(|((_, id), content)| (*id, content.len() as u64)).collect();
        match listed.is_empty() && self.no_empty_folders.load(Ordering::SeqCst) {
            true => Err(missing(kind, &FileId::CONFIG)),
            false => Ok(listed),
        }
    }

    fn read(&self, kind: FileKind, id: &FileId) -> Result<Vec<u8>, BackendError> {
        refused(&self.no_read, kind, id)?;
        self.files.lock().unwrap().get(&(kind, *id)).cloned().ok_or(missing(kind, id))
    }

    fn read_range(
        &self,
        kind: FileKind,
        id: &FileId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), BackendError> {
        refused(&self.no_read, kind, id)?;
        let files = self.files.lock().unwrap();
        let content = files.get(&(kind, *id)).ok_or(missing(kind, id))?;
        let end = offset + buffer.len() as u64;
        let found = content.get(offset as usize..end as usize);
        let file = FileRef { kind, id: *id }.to_string();
        buffer.copy_from_slice(found.ok_or(BackendError::Truncated { file, end })?);
        Ok(())
    }

    fn write(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<(), BackendError> {
        let file = FileRef { kind, id: *id }.to_string();
        self.effect("write", &file)?;
        let capacity = self.capacity.load(Ordering::SeqCst);
        if capacity > 0 && self.len() + (content.len() as u64).next_multiple_of(BLOCK) > capacity {
            let source = Arc::new(io::Error::from(io::ErrorKind::StorageFull));
            return Err(BackendError::Io { operation: "write", file, source });
        }
        let mut files = self.files.lock().unwrap();
        if kind == FileKind::Config && files.contains_key(&(kind, *id)) {
            return Err(BackendError::Exists { file });
        }
        files.insert((kind, *id), content.to_vec());
        if *self.lost_answer.lock().unwrap() == Some(kind) {
            let source = Arc::new(io::Error::from(io::ErrorKind::ConnectionReset));
            return Err(BackendError::Io { operation: "write", file, source });
        }
        Ok(())
    }

    fn begin(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<Begun, BackendError> {
        self.write(kind, id, content).map(|()| Begun::done())
    }

    fn settle(&self, _: Vec<Begun>) -> Result<(), BackendError> {
        Ok(())
    }

    fn remove(&self, kind: FileKind, id: &FileId) -> Result<(), BackendError> {
        self.effect("remove", &FileRef { kind, id: *id }.to_string())?;
        refused(&self.no_removal, kind, id)?;
        let removed = self.files.lock().unwrap().remove(&(kind, *id));
        removed.map(drop).ok_or(missing(kind, id))
    }

    fn location(&self) -> String {
        "memory".to_owned()
    }
}
