//! Random access to blobs, by many threads, with a cache bounded in bytes.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use zstd::bulk::Decompressor;

use crate::{
    BlobId, BlobKind, Defect, FileKind, Index, Location, Repository, RepositoryError, Tree, blob,
    pack::PackedBlob,
};

/// Reads blobs and proves that they are what was stored.
pub struct Reader {
    repository: Repository,
    index: Arc<Index>,
    cache: Mutex<Cache>,
    scratch: Mutex<Vec<Scratch>>,
}

/// What one thread needs to open blobs; kept for the next one.
struct Scratch {
    decompressor: Decompressor<'static>,
    sealed: Vec<u8>,
}

/// Scratch buffers longer than this are not kept: those of huge trees.
const SCRATCH_LEN_MAX: usize = 8 << 20;

impl Reader {
    /// A reader that keeps up to `cache_bytes` bytes of data blobs in memory, the last used ones.
    pub fn new(repository: &Repository, index: Arc<Index>, cache_bytes: usize) -> Self {
        let cache = Mutex::new(Cache::new(cache_bytes));
        Self { repository: repository.clone(), index, cache, scratch: Mutex::default() }
    }

    /// The index it goes by.
    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    pub(crate) fn repository(&self) -> &Repository {
        &self.repository
    }

    /// The content of a data blob, verified. Goes to the next copy when one is damaged.
    pub fn blob(&self, id: &BlobId) -> Result<Bytes, RepositoryError> {
        if let Some(found) = self.cache.lock().expect("no panic while locked").get(id) {
            return Ok(found);
        }
        let content = Bytes::from(self.read(BlobKind::Data, id)?);
        self.cache.lock().expect("no panic while locked").put(*id, &content);
        Ok(content)
    }

    /// A folder.
    pub fn tree(&self, id: &BlobId) -> Result<Tree, RepositoryError> {
        Tree::from_json(id, &self.read(BlobKind::Tree, id)?)
    }

    /// The content of a blob, verified, past the cache.
    pub(crate) fn read(&self, kind: BlobKind, id: &BlobId) -> Result<Vec<u8>, RepositoryError> {
        let mut failure = RepositoryError::MissingBlob { id: *id };
        for location in self.index.locations(kind, id) {
            match self.read_copy(id, &location) {
                Ok(content) => return Ok(content),
                // The first copy is the one that should have been good.
                Err(error) if matches!(failure, RepositoryError::MissingBlob { .. }) => {
                    failure = error;
                }
                Err(_) => {}
            }
        }
        Err(failure)
    }

    fn read_copy(&self, id: &BlobId, location: &Location) -> Result<Vec<u8>, RepositoryError> {
        let kept = self.scratch.lock().expect("no panic while locked").pop();
        let mut scratch = match kept {
            Some(scratch) => scratch,
            None => Scratch::new()?,
        };
        let content = self.read_with(id, location, &mut scratch);
        if scratch.sealed.capacity() <= SCRATCH_LEN_MAX {
            self.scratch.lock().expect("no panic while locked").push(scratch);
        }
        content
    }

    fn read_with(
        &self,
        id: &BlobId,
        location: &Location,
        scratch: &mut Scratch,
    ) -> Result<Vec<u8>, RepositoryError> {
        let Location { pack, offset, len, uncompressed_len, kind } = *location;
        let damaged = |source| RepositoryError::DamagedBlob { id: *id, pack, source };
        let len_needed = len as usize;
        if scratch.sealed.len() < len_needed {
            scratch.sealed.resize(len_needed, 0);
        }
        let sealed = &mut scratch.sealed[..len_needed];
        match self.repository.backend().read_range(FileKind::Pack, &pack, offset.into(), sealed) {
            Err(source) if source.is_not_found() => return Err(damaged(Defect::Missing)),
            Err(crate::BackendError::Truncated { end, .. }) => {
                return Err(damaged(Defect::Truncated { len: end }));
            }
            other => other?,
        }
        let blob = PackedBlob { id: *id, kind, offset, len, uncompressed_len };
        let mut content = Vec::new();
        blob::open(self.repository.key(), &mut scratch.decompressor, &blob, sealed, &mut content)
            .map_err(damaged)?;
        Ok(content)
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("index", &self.index).finish_non_exhaustive()
    }
}

impl Scratch {
    fn new() -> Result<Self, RepositoryError> {
        let decompressor = Decompressor::new()
            .map_err(|source| RepositoryError::Compress { source: Arc::new(source) })?;
        Ok(Self { decompressor, sealed: Vec::new() })
    }
}

/// The last used blobs, at most so many bytes of them.
struct Cache {
    len: usize,
    len_max: usize,
    clock: u64,
    blobs: HashMap<BlobId, (Bytes, u64)>,
    by_use: BTreeMap<u64, BlobId>,
}

impl Cache {
    fn new(len_max: usize) -> Self {
        Self { len: 0, len_max, clock: 0, blobs: HashMap::new(), by_use: BTreeMap::new() }
    }

    fn get(&mut self, id: &BlobId) -> Option<Bytes> {
        let (content, used) = self.blobs.get_mut(id)?;
        self.clock += 1;
        self.by_use.remove(used);
        self.by_use.insert(self.clock, *id);
        *used = self.clock;
        Some(content.clone())
    }

    fn put(&mut self, id: BlobId, content: &Bytes) {
        if content.len() > self.len_max || self.blobs.contains_key(&id) {
            return;
        }
        self.clock += 1;
        self.len += content.len();
        self.blobs.insert(id, (content.clone(), self.clock));
        self.by_use.insert(self.clock, id);
        while self.len > self.len_max {
            let Some((_, oldest)) = self.by_use.pop_first() else { return };
            if let Some((content, _)) = self.blobs.remove(&oldest) {
                self.len -= content.len();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_keeps_the_last_used_and_no_more_bytes_than_allowed() {
        let mut cache = Cache::new(100);
        let content = Bytes::from(vec![0; 40]);
        let [a, b, c] = [1, 2, 3].map(|n| BlobId([n; 32]));
        cache.put(a, &content);
        cache.put(b, &content);
        assert!(cache.get(&a).is_some());
        cache.put(c, &content);
        assert!(cache.get(&b).is_none() && cache.get(&a).is_some() && cache.get(&c).is_some());
        assert_eq!((cache.len, cache.blobs.len(), cache.by_use.len()), (80, 2, 2));
        cache.put(b, &Bytes::from(vec![0; 101]));
        assert!(cache.get(&b).is_none());
    }
}
