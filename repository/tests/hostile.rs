//! S16: a repository whose maker knows the password and means harm.

mod common;

use std::{collections::BTreeMap, sync::Arc};

use aes256ctr_poly1305aes::{
    Aes256CtrPoly1305Aes, Key, Nonce,
    aead::{AeadInPlace, generic_array::GenericArray},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use common::{PASSWORD, init, memory::Memory, store};
use repository::{
    Backend, BlobId, Defect, FileId, FileKind, Index, Reader, Repository, RepositoryError,
};
use serde_json::{Value, json};

/// Forges files of a repository with its own master key, found independently of the code under test.
struct Forger {
    memory: Arc<Memory>,
    repository: Repository,
    cipher: Aes256CtrPoly1305Aes,
}

impl Forger {
    fn new() -> Self {
        let memory = Memory::new();
        let repository = init(memory.clone());
        let keys = memory.list(FileKind::Key).unwrap();
        let file = memory.read(FileKind::Key, &keys[0].0).unwrap();
        let file: Value = serde_json::from_slice(&file).unwrap();
        let bytes = |value: &Value| BASE64_STANDARD.decode(value.as_str().unwrap()).unwrap();
        let number = |name: &str| file[name].as_u64().unwrap();
        let params =
            scrypt::Params::new(number("N").ilog2() as u8, number("r") as u32, number("p") as u32);
        let mut user_key = [0; 64];
        scrypt::scrypt(PASSWORD.as_bytes(), &bytes(&file["salt"]), &params.unwrap(), &mut user_key)
            .unwrap();
        let data = bytes(&file["data"]);
        let (nonce, sealed) = data.split_at(16);
        let (text, tag) = sealed.split_at(sealed.len() - 16);
        let mut master = text.to_vec();
        Aes256CtrPoly1305Aes::new(Key::from_slice(&user_key))
            .decrypt_in_place_detached(
                Nonce::from_slice(nonce),
                b"",
                &mut master,
                GenericArray::from_slice(tag),
            )
            .unwrap();
        let master: Value = serde_json::from_slice(&master).unwrap();
        let parts = [&master["encrypt"], &master["mac"]["k"], &master["mac"]["r"]];
        let key = parts.map(bytes).concat();
        let cipher = Aes256CtrPoly1305Aes::new(Key::from_slice(&key));
        Self { memory, repository, cipher }
    }

    fn seal(&self, plain: &[u8]) -> Vec<u8> {
        let (nonce, mut text) = ([9; 16], plain.to_vec());
        let tag = self
            .cipher
            .encrypt_in_place_detached(Nonce::from_slice(&nonce), b"", &mut text)
            .unwrap();
        [nonce.as_slice(), &text, &tag].concat()
    }

    fn put(&self, kind: FileKind, stored: &[u8]) -> FileId {
        let id = FileId::of(stored);
        self.memory.write(kind, &id, stored).unwrap();
        id
    }

    /// A pack of one blob with `frame` in it, and an index file that claims `claimed` plain bytes.
    fn blob(
        &self,
        kind: &str,
        id: BlobId,
        frame: &[u8],
        claimed: u64,
    ) -> Result<Index, RepositoryError> {
        let sealed = self.seal(frame);
        let pack = self.put(FileKind::Pack, &sealed);
        let mut blob = BTreeMap::from([("id", json!(id)), ("type", json!(kind))]);
        blob.extend([("offset", json!(0)), ("length", json!(sealed.len()))]);
        blob.insert("uncompressed_length", json!(claimed));
        let index = json!({ "packs": [{ "id": pack, "blobs": [blob] }] });
        self.put(FileKind::Index, &self.seal(&serde_json::to_vec(&index).unwrap()));
        self.repository.index()
    }

    fn read(&self, index: Index, id: &BlobId) -> Defect {
        let reader = Reader::new(&self.repository, Arc::new(index), 0);
        match reader.blob(id) {
            Err(RepositoryError::DamagedBlob { source, .. }) => source,
            other => panic!("{other:?}"),
        }
    }
}

/// Peak of the memory of this process in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// A frame of `len` zeros that does not say how long it is.
fn anonymous_frame(len: usize) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.include_contentsize(false).unwrap();
    std::io::copy(&mut std::io::Read::take(std::io::repeat(0), len as u64), &mut encoder).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn s16_a_frame_that_unpacks_to_more_than_promised_is_refused() {
    let forger = Forger::new();
    let id = BlobId::of(b"promised");
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    assert!(bomb.len() < 16 << 10);
    let index = forger.blob("data", id, &bomb, 8).unwrap();
    let defect = forger.read(index, &id);
    assert!(matches!(defect, Defect::Length { expected: 8, .. }), "{defect:?}");
}

#[test]
fn s16_a_frame_without_a_length_is_stopped_at_the_promised_one() {
    let before = peak();
    let forger = Forger::new();
    let id = BlobId::of(b"promised");
    let index = forger.blob("data", id, &anonymous_frame(1 << 30), 100).unwrap();
    let defect = forger.read(index, &id);
    assert!(matches!(defect, Defect::Compression), "{defect:?}");
    // The other tests of this file run beside it; a bomb that goes off would take a thousand.
    assert!(peak() - before < 400 << 20);
}

#[test]
fn s16_a_frame_shorter_than_promised_is_refused() {
    let forger = Forger::new();
    let id = BlobId::of(b"promised");
    let short = zstd::bulk::compress(b"short", 1).unwrap();
    let index = forger.blob("data", id, &short, 1 << 20).unwrap();
    let defect = forger.read(index, &id);
    assert!(matches!(defect, Defect::Length { actual: 5, .. }), "{defect:?}");
}

#[test]
fn s16_other_content_under_an_id_is_refused() {
    let forger = Forger::new();
    let id = BlobId::of(b"promised");
    let other = zstd::bulk::compress(b"another.", 1).unwrap();
    let index = forger.blob("data", id, &other, 8).unwrap();
    assert!(matches!(forger.read(index, &id), Defect::Digest));
}

#[test]
fn s16_absurd_lengths_in_the_index_are_refused_when_it_is_read() {
    for claimed in [u64::from(u32::MAX), u64::MAX, (64 << 20) + 1] {
        let forger = Forger::new();
        let made = forger.blob("data", BlobId::of(b"x"), b"frame", claimed);
        assert!(matches!(made, Err(RepositoryError::Damaged { .. })), "{made:?}");
    }
}

#[test]
fn s16_unpacked_files_stop_at_their_bound() {
    let forger = Forger::new();
    // 1 GiB of spaces is fine JSON, were it not for the bound.
    let mut encoder = zstd::Encoder::new(vec![2], 1).unwrap();
    std::io::copy(&mut std::io::Read::take(std::io::repeat(b' '), 1 << 30), &mut encoder).unwrap();
    let bomb = forger.seal(&encoder.finish().unwrap());
    let snapshot = forger.put(FileKind::Snapshot, &bomb);
    let read = forger.repository.snapshot(&snapshot);
    let bound = FileKind::Snapshot.len_max();
    assert!(
        matches!(
            read,
            Err(RepositoryError::Damaged { source: Defect::TooLong { len_max }, .. }) if len_max == bound
        ),
        "{read:?}"
    );
    // It does not hide the others.
    let (good, _) = store(&forger.repository, "vm", b"disk", 4096).unwrap();
    let snapshots = forger.repository.snapshots().unwrap();
    assert!(snapshots.good.len() == 1 && snapshots.good[0].0 == good);
    assert!(snapshots.damaged.len() == 1 && snapshots.damaged[0].0 == snapshot);
}

#[test]
fn s16_a_pack_whose_header_lies_about_itself_is_refused() {
    let forger = Forger::new();
    let (id, _) = store(&forger.repository, "vm", b"disk", 4096).unwrap();
    for header_len in [0_u32, 1, 31, 1000, u32::MAX] {
        let forged = [vec![0; 100], header_len.to_le_bytes().to_vec()].concat();
        forger.put(FileKind::Pack, &forged);
    }
    forger.put(FileKind::Pack, b"");
    let (_, damaged) = forger.repository.index_salvaged().unwrap();
    assert_eq!(damaged.len(), 6);
    assert_eq!(common::restore(&forger.repository, &id).unwrap(), b"disk");
}

#[test]
fn blobs_only_in_packs_marked_for_deletion_are_read_but_not_reused() {
    let forger = Forger::new();
    let content = common::noise(3, 5000);
    let id = BlobId::of(&content);
    let sealed = forger.seal(&content);
    let pack = forger.put(FileKind::Pack, &sealed);
    let blob = json!({ "id": id, "type": "data", "offset": 0, "length": sealed.len() });
    let marked = json!({ "packs": [], "packs_to_delete":
        [{ "id": pack, "time": "2026-01-01T00:00:00Z", "blobs": [blob] }] });
    forger.put(FileKind::Index, &forger.seal(&serde_json::to_vec(&marked).unwrap()));
    let index = forger.repository.index().unwrap();
    assert!(!index.contains(&id));
    assert_eq!(index.data_len(&id), Some(5000));
    let (snapshot, stats) = store(&forger.repository, "vm", &content, 5000).unwrap();
    assert!(stats.fresh_bytes >= 5000, "stored once more: {stats:?}");
    assert!(forger.repository.index().unwrap().contains(&id));
    forger.memory.remove(FileKind::Pack, &pack).unwrap();
    assert_eq!(common::restore(&forger.repository, &snapshot).unwrap(), content);
}
