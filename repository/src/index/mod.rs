//! The index in memory: where each blob is.

pub(crate) mod file;

use std::{collections::HashMap, fmt, sync::Mutex, thread};

use self::file::PackEntry;
use crate::{
    BackendError, BlobId, BlobKind, Defect, FileId, FileKind, FileRef, Repository, RepositoryError,
    crypto,
    lock::SETTLE,
    pack::{self, PackedBlob},
};

/// Marks an entry's pack number as one of a tree blob.
const TREE: u32 = 1 << 31;

/// Where every blob of a repository is: 48 bytes a blob, sorted, in 256 parts by first byte.
pub struct Index {
    parts: Vec<Vec<Entry>>,
    packs: Vec<Pack>,
    files: Vec<IndexedFile>,
}

/// What one index file mentions.
#[derive(Debug, Clone)]
pub(crate) struct IndexedFile {
    pub(crate) id: FileId,
    /// The packs, by number.
    pub(crate) packs: Vec<u32>,
    /// How many blobs these have.
    pub(crate) blobs: usize,
}

/// A copy of a blob: the number of its pack, and its place there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Copied {
    pub(crate) pack: u32,
    pub(crate) blob: PackedBlob,
}

/// One copy of one blob. Kept small: there are millions.
#[derive(Clone, Copy)]
struct Entry {
    id: BlobId,
    /// Number of the pack; the highest bit says that it is a tree.
    pack: u32,
    offset: u32,
    len: u32,
    /// 0 if not compressed.
    uncompressed_len: u32,
}

/// What the index knows of one pack.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pack {
    pub(crate) id: FileId,
    /// `rustic prune` will remove it: its blobs are read but not reused.
    pub(crate) marked: bool,
    /// Found in the pack itself because no index file mentions it.
    pub(crate) salvaged: bool,
    /// Bytes of its sealed blobs.
    pub(crate) blobs_len: u64,
    /// Bytes of its plain header.
    header_len: u64,
}

impl Pack {
    /// How long the file must be, in bytes.
    pub(crate) fn file_len(&self) -> u64 {
        self.blobs_len + self.header_len + crypto::OVERHEAD as u64 + 4
    }
}

/// Where one copy of a blob is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    /// The pack.
    pub pack: FileId,
    /// Of the sealed blob from the start of the pack, in bytes.
    pub offset: u32,
    /// Of the sealed blob, in bytes.
    pub len: u32,
    /// Of the plain blob in bytes; `None` if it is not compressed.
    pub uncompressed_len: Option<u32>,
    /// What the blob is for.
    pub kind: BlobKind,
}

impl Location {
    /// Length of the plain blob in bytes.
    pub fn plain_len(&self) -> u32 {
        self.uncompressed_len.unwrap_or(self.len.saturating_sub(pack::OVERHEAD))
    }
}

impl Index {
    /// Whether a new snapshot may refer to the blob: it is there, and not only in packs that a prune
    /// has marked for deletion.
    pub fn contains(&self, id: &BlobId) -> bool {
        self.is_reusable(BlobKind::Data, id)
    }

    pub(crate) fn is_reusable(&self, kind: BlobKind, id: &BlobId) -> bool {
        self.entries(id).iter().any(|entry| {
            let pack = &self.packs[entry.pack_number()];
            entry.kind() == kind && !pack.marked && !pack.salvaged
        })
    }

    /// Where the blob is, in the copy to be read first.
    pub fn locate(&self, kind: BlobKind, id: &BlobId) -> Option<Location> {
        self.locations(kind, id).next()
    }

    /// Length of a plain data blob in bytes.
    pub fn data_len(&self, id: &BlobId) -> Option<u32> {
        self.locate(BlobKind::Data, id).map(|location| location.plain_len())
    }

    /// Number of blobs, each copy counted.
    pub fn len(&self) -> usize {
        self.parts.iter().map(Vec::len).sum()
    }

    /// There are no blobs.
    pub fn is_empty(&self) -> bool {
        self.parts.iter().all(Vec::is_empty)
    }

    /// Number of packs.
    pub fn pack_count(&self) -> usize {
        self.packs.len()
    }

    /// All copies of a blob, those in packs that stay first.
    pub(crate) fn locations(
        &self,
        kind: BlobKind,
        id: &BlobId,
    ) -> impl Iterator<Item = Location> + '_ {
        let entries = self.entries(id).iter().filter(move |entry| entry.kind() == kind);
        entries.map(|entry| self.location(entry))
    }

    /// The copy of a blob to be read first: the number of its pack, and its place there.
    pub(crate) fn place(&self, kind: BlobKind, id: &BlobId) -> Option<(usize, PackedBlob)> {
        let entry = self.entries(id).iter().find(|entry| entry.kind() == kind)?;
        Some((entry.pack_number(), entry.blob()))
    }

    /// The blobs of every pack, in the order they have in it.
    pub(crate) fn by_pack(&self) -> HashMap<FileId, Vec<PackedBlob>> {
        let mut packs: Vec<Vec<PackedBlob>> = vec![Vec::new(); self.packs.len()];
        for entry in self.parts.iter().flatten() {
            packs[entry.pack_number()].push(entry.blob());
        }
        for blobs in &mut packs {
            blobs.sort_unstable_by_key(|blob| blob.offset);
        }
        self.packs.iter().map(|pack| pack.id).zip(packs).collect()
    }

    pub(crate) fn packs(&self) -> &[Pack] {
        &self.packs
    }

    /// The files that it was read from.
    pub(crate) fn files(&self) -> &[IndexedFile] {
        &self.files
    }

    /// A number for each blob that the index knows, below [`Index::len`]; several copies share one.
    pub(crate) fn number(&self, kind: BlobKind, id: &BlobId) -> Option<usize> {
        let part = usize::from(id.0[0]);
        let start = self.parts[part].partition_point(|entry| entry.id < *id);
        let of_id = self.parts[part][start..].iter().take_while(|entry| entry.id == *id);
        let at = of_id.zip(start..).find(|(entry, _)| entry.kind() == kind)?.1;
        Some(self.parts[..part].iter().map(Vec::len).sum::<usize>() + at)
    }

    /// All blobs in the order of their ids: the number of each, and its copies.
    pub(crate) fn for_each_blob(&self, mut each: impl FnMut(usize, &[Copied])) {
        let (mut before, mut copies) = (0, Vec::new());
        for part in &self.parts {
            for (at, entries) in chunks_by_id(part) {
                for kind in [BlobKind::Data, BlobKind::Tree] {
                    let of_kind = entries.iter().filter(|entry| entry.kind() == kind);
                    copies.clear();
                    copies.extend(
                        of_kind
                            .map(|entry| Copied { pack: entry.pack & !TREE, blob: entry.blob() }),
                    );
                    if let Some(first) = entries.iter().position(|entry| entry.kind() == kind) {
                        each(before + at + first, &copies);
                    }
                }
            }
            before += part.len();
        }
    }

    fn location(&self, entry: &Entry) -> Location {
        let PackedBlob { kind, offset, len, uncompressed_len, .. } = entry.blob();
        let pack = self.packs[entry.pack_number()].id;
        Location { pack, offset, len, uncompressed_len, kind }
    }

    fn entries(&self, id: &BlobId) -> &[Entry] {
        let part = &self.parts[usize::from(id.0[0])];
        let start = part.partition_point(|entry| entry.id < *id);
        let copies = part[start..].iter().take_while(|entry| entry.id == *id).count();
        &part[start..start + copies]
    }
}

/// The entries of each id, with the place of the first.
fn chunks_by_id(part: &[Entry]) -> impl Iterator<Item = (usize, &[Entry])> {
    part.chunk_by(|a, b| a.id == b.id).scan(0, |at, entries| {
        let start = *at;
        *at += entries.len();
        Some((start, entries))
    })
}

impl fmt::Debug for Index {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (blobs, packs) = (self.len(), self.packs.len());
        f.debug_struct("Index").field("blobs", &blobs).field("packs", &packs).finish()
    }
}

impl Entry {
    fn new(blob: &PackedBlob, pack: u32) -> Self {
        let tree = if blob.kind == BlobKind::Tree { TREE } else { 0 };
        let PackedBlob { id, offset, len, uncompressed_len, .. } = *blob;
        let uncompressed_len = uncompressed_len.unwrap_or(0);
        Self { id, pack: pack | tree, offset, len, uncompressed_len }
    }

    fn kind(&self) -> BlobKind {
        if self.pack & TREE == 0 { BlobKind::Data } else { BlobKind::Tree }
    }

    fn pack_number(&self) -> usize {
        (self.pack & !TREE) as usize
    }

    fn blob(&self) -> PackedBlob {
        let Self { id, offset, len, uncompressed_len, .. } = *self;
        let uncompressed_len = Some(uncompressed_len).filter(|&len| len != 0);
        PackedBlob { id, kind: self.kind(), offset, len, uncompressed_len }
    }
}

/// Collects packs into an [`Index`].
struct Builder {
    parts: Vec<Vec<Entry>>,
    packs: Vec<Pack>,
    numbers: HashMap<FileId, u32>,
    files: Vec<IndexedFile>,
}

impl Builder {
    fn new() -> Self {
        Self {
            parts: vec![Vec::new(); 256],
            packs: Vec::new(),
            numbers: HashMap::new(),
            files: Vec::new(),
        }
    }

    /// Returns the pack's number. It may be in several index files: after an interrupted prune, or a
    /// rebuild.
    fn add(&mut self, pack: &PackEntry, marked: bool, salvaged: bool) -> u32 {
        if let Some(&number) = self.numbers.get(&pack.id) {
            self.packs[number as usize].marked |= marked;
            return number;
        }
        let number = u32::try_from(self.packs.len()).ok().filter(|number| number & TREE == 0);
        let number = number.expect("two thousand million packs do not fit in memory");
        self.numbers.insert(pack.id, number);
        let mut known = Pack { id: pack.id, marked, salvaged, blobs_len: 0, header_len: 0 };
        for file::BlobEntry(blob) in &pack.blobs {
            known.blobs_len += u64::from(blob.len);
            known.header_len += blob.entry_len();
            self.parts[usize::from(blob.id.0[0])].push(Entry::new(blob, number));
        }
        self.packs.push(known);
        number
    }

    fn finish(mut self) -> Index {
        for part in &mut self.parts {
            let packs = &self.packs;
            let rank = |entry: &Entry| {
                let pack = &packs[entry.pack_number()];
                (pack.marked, pack.salvaged, entry.pack, entry.offset)
            };
            part.sort_unstable_by(|a, b| a.id.cmp(&b.id).then_with(|| rank(a).cmp(&rank(b))));
            part.shrink_to_fit();
        }
        Index { parts: self.parts, packs: self.packs, files: self.files }
    }
}

impl Repository {
    /// Reads all index files. The first damaged one is an error that names it.
    pub fn index(&self) -> Result<Index, RepositoryError> {
        let (index, damaged) = self.index_of_readable()?;
        match damaged.into_iter().next() {
            Some((_, error)) => Err(error),
            None => Ok(index),
        }
    }

    /// As [`Self::index`], where nobody may have removed an index file meanwhile: one that is listed and
    /// not there is damaged. A listing may be late, so that is believed the second time.
    pub(crate) fn whole_index(&self) -> Result<Index, RepositoryError> {
        let (mut builder, mut damaged) = self.read_index_files()?;
        if damaged.iter().any(is_gone) {
            thread::sleep(SETTLE);
            (builder, damaged) = self.read_index_files()?;
        }
        match damaged.into_iter().next() {
            Some((_, error)) => Err(error),
            None => Ok(builder.finish()),
        }
    }

    /// Reads what is readable of the index and says which files are not.
    pub fn index_of_readable(
        &self,
    ) -> Result<(Index, Vec<(FileRef, RepositoryError)>), RepositoryError> {
        let (builder, damaged) = self.read_index_files()?;
        Ok((builder.finish(), without_removed(damaged)))
    }

    /// As [`Self::index_of_readable`], and takes what the index lacks from the packs themselves. For
    /// reading only: blobs found like this do not count as known to a writer.
    ///
    /// A pack that neither the index nor its own header describes is listed too.
    pub fn index_salvaged(
        &self,
    ) -> Result<(Index, Vec<(FileRef, RepositoryError)>), RepositoryError> {
        let (mut builder, damaged) = self.read_index_files()?;
        let mut damaged = without_removed(damaged);
        for (id, len) in self.backend().list(FileKind::Pack)? {
            if builder.numbers.contains_key(&id) {
                continue;
            }
            match self.read_pack_header(&id, len) {
                Ok(blobs) => {
                    let blobs = blobs.into_iter().map(file::BlobEntry).collect();
                    builder.add(&PackEntry { id, blobs }, false, true);
                }
                Err(error) => damaged.push((FileRef { kind: FileKind::Pack, id }, error)),
            }
        }
        Ok((builder.finish(), damaged))
    }

    /// Reads the header of a pack of `len` bytes.
    pub(crate) fn read_pack_header(
        &self,
        id: &FileId,
        len: u64,
    ) -> Result<Vec<PackedBlob>, RepositoryError> {
        let file = FileRef { kind: FileKind::Pack, id: *id };
        let damaged = |source| RepositoryError::Damaged { file, source };
        let blobs_and_header = len.checked_sub(4).ok_or(damaged(Defect::Truncated { len }))?;
        let mut header_len = [0; 4];
        self.backend().read_range(FileKind::Pack, id, blobs_and_header, &mut header_len)?;
        let header_len = u64::from(u32::from_le_bytes(header_len));
        let offset = blobs_and_header.checked_sub(header_len).ok_or(damaged(Defect::Header))?;
        if header_len > pack::HEADER_LEN_MAX {
            return Err(damaged(Defect::TooLong { len_max: pack::HEADER_LEN_MAX }));
        }
        let mut header = vec![0; header_len as usize];
        self.backend().read_range(FileKind::Pack, id, offset, &mut header)?;
        let plain = self.key().open_in_place(&mut header).map_err(damaged)?;
        let blobs = pack::decode_header(plain).map_err(damaged)?;
        let blobs_len: u64 = blobs.iter().map(|blob| u64::from(blob.len)).sum();
        if blobs_len != offset {
            return Err(damaged(Defect::Header));
        }
        Ok(blobs)
    }

    fn read_index_files(
        &self,
    ) -> Result<(Builder, Vec<(FileRef, RepositoryError)>), RepositoryError> {
        let mut files = self.backend().list(FileKind::Index)?;
        files.sort_unstable();
        let builder = Mutex::new(Builder::new());
        let damaged = Mutex::new(Vec::new());
        let failed = Mutex::new(None);
        let queue = Mutex::new(files.into_iter());
        let next = || queue.lock().expect("no panic while locked").next();
        let read_all = || {
            while let Some((id, _)) = next() {
                let file = FileRef { kind: FileKind::Index, id };
                match self.read_index_file(&id, &builder) {
                    Ok(()) => {}
                    Err(RepositoryError::Backend { source }) if source.is_not_found() => {
                        let error = RepositoryError::Damaged { file, source: Defect::Missing };
                        damaged.lock().expect("no panic while locked").push((file, error));
                    }
                    Err(error @ RepositoryError::Damaged { .. }) => {
                        damaged.lock().expect("no panic while locked").push((file, error));
                    }
                    Err(RepositoryError::Backend { source }) if is_of_file(&source) => {
                        let source = Defect::Unreadable { source: Box::new(source) };
                        let error = RepositoryError::Damaged { file, source };
                        damaged.lock().expect("no panic while locked").push((file, error));
                    }
                    Err(error) => *failed.lock().expect("no panic while locked") = Some(error),
                }
            }
        };
        thread::scope(|scope| {
            scope.spawn(read_all);
            read_all();
        });
        if let Some(error) = failed.into_inner().expect("no panic while locked") {
            return Err(error);
        }
        let mut damaged = damaged.into_inner().expect("no panic while locked");
        damaged.sort_by_key(|&(file, _)| file);
        Ok((builder.into_inner().expect("no panic while locked"), damaged))
    }

    /// A file counts as a whole or not at all: half of a damaged one is no knowledge.
    fn read_index_file(
        &self,
        id: &FileId,
        builder: &Mutex<Builder>,
    ) -> Result<(), RepositoryError> {
        let json = self.read_unpacked(FileKind::Index, id)?;
        let mut packs = Vec::new();
        file::read_packs(&json, |pack, marked| packs.push((pack, marked))).map_err(|source| {
            let file = FileRef { kind: FileKind::Index, id: *id };
            RepositoryError::Damaged { file, source: source.into() }
        })?;
        let mut builder = builder.lock().expect("no panic while locked");
        let blobs = packs.iter().map(|(pack, _)| pack.blobs.len()).sum();
        let packs = packs.into_iter().map(|(pack, marked)| builder.add(&pack, marked, false));
        let file = IndexedFile { id: *id, packs: packs.collect(), blobs };
        builder.files.push(file);
        Ok(())
    }
}

/// A prune that ran meanwhile has put the content of files that are gone elsewhere.
fn without_removed(
    mut damaged: Vec<(FileRef, RepositoryError)>,
) -> Vec<(FileRef, RepositoryError)> {
    damaged.retain(|damaged| !is_gone(damaged));
    damaged
}

fn is_gone((_, error): &(FileRef, RepositoryError)) -> bool {
    matches!(error, RepositoryError::Damaged { source: Defect::Missing, .. })
}

/// It is about this one file: what was read cannot be right, or the store cannot give it, as where its disk is
/// damaged. A store that is away, or not for us, says nothing of a file.
fn is_of_file(error: &BackendError) -> bool {
    match error {
        BackendError::TooLarge { .. } | BackendError::Truncated { .. } => true,
        BackendError::Io { .. } => !error.is_away() && !error.is_read_only() && !error.is_full(),
        _ => false,
    }
}
