//! P4: any damaged byte is found, and named are exactly the snapshots that suffer from it.

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use common::{CHUNK, PASSWORD, init, memory::Memory, noise, open, read_disk, store, text};
use repository::{CheckOptions, CheckReport, FileId, FileKind, Repository, RepositoryError};

/// Two snapshots that share a chunk, each with chunks of its own.
struct Scene {
    memory: Arc<Memory>,
    disks: BTreeMap<FileId, Vec<u8>>,
}

impl Scene {
    fn new() -> Self {
        let memory = Memory::new();
        let repository = init(memory.clone());
        let shared = text(0, 512);
        let disks = [1, 2].map(|seed| [shared.clone(), noise(seed, 200), vec![0; 512]].concat());
        let stored = disks.into_iter().enumerate().map(|(number, disk)| {
            (store(&repository, &format!("vm{number}"), &disk, 512).unwrap().0, disk)
        });
        let disks = stored.collect();
        Self { memory, disks }
    }

    fn open(&self) -> Result<Repository, RepositoryError> {
        open(self.memory.clone())
    }

    /// The snapshots that do not come back bit for bit through what is readable of the index. A
    /// wrong restore is never among them: it fails the test.
    fn failing(&self, repository: &Repository, salvage: bool) -> BTreeSet<FileId> {
        let fails = |(id, disk): &(&FileId, &Vec<u8>)| {
            let Ok(snapshot) = repository.snapshot(id) else { return true };
            let read = match salvage {
                true => repository.index_salvaged(),
                false => repository.index_of_readable(),
            };
            let (index, _) = read.unwrap();
            match read_disk(repository, index, &snapshot) {
                Ok(read) => {
                    assert!(read == **disk, "a wrong restore of {id}");
                    false
                }
                Err(_) => true,
            }
        };
        self.disks.iter().filter(fails).map(|(id, _)| *id).collect()
    }

    fn check(&self, repository: &Repository) -> CheckReport {
        repository.check(&CheckOptions::new(Some(100.0)), &|_| {}).unwrap()
    }

    /// What the damage that was just done means, in short: reported, and attributed exactly.
    fn judge(&self, file: (FileKind, FileId), what: &str) {
        let repository = match self.open() {
            Ok(repository) => repository,
            Err(error) => {
                let found = matches!(
                    error,
                    RepositoryError::Damaged { file: named, .. }
                        if (named.kind, named.id) == file
                ) || matches!(error, RepositoryError::UnusableKdf { .. });
                assert!(found, "{file:?} {what}: {error:?}");
                assert!(matches!(file.0, FileKind::Config | FileKind::Key), "{error:?}");
                return;
            }
        };
        let report = self.check(&repository);
        let named = report
            .problems
            .iter()
            .any(|problem| problem.file.is_some_and(|named| (named.kind, named.id) == file));
        assert!(named, "{file:?} {what}: not found in {report:?}");
        let affected: BTreeSet<FileId> =
            report.problems.iter().flat_map(|p| &p.affected).map(|snapshot| snapshot.id).collect();
        assert_eq!(affected, self.failing(&repository, false), "{file:?} {what}: {report:?}");
        if file.0 == FileKind::Index {
            assert_eq!(self.failing(&repository, true), BTreeSet::new(), "{file:?} {what}");
        }
    }
}

#[test]
fn r19_each_flipped_byte_is_found_with_the_snapshots_it_affects() {
    let scene = Scene::new();
    assert!(scene.check(&scene.open().unwrap()).is_clean());
    let mut flipped = 0;
    for file in scene.memory.names() {
        let len = scene.memory.files.lock().unwrap()[&file].len();
        for at in 0..len {
            let flip = || {
                let mut files = scene.memory.files.lock().unwrap();
                files.get_mut(&file).unwrap()[at] ^= 1 << (at % 8);
            };
            flip();
            scene.judge(file, &format!("byte {at} flipped"));
            flip();
            flipped += 1;
        }
    }
    assert!(flipped > 2000, "{flipped}");
    assert!(scene.check(&scene.open().unwrap()).is_clean());
}

#[test]
fn p4_a_flipped_chunk_affects_only_the_snapshot_that_has_it() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    let (first, _) = store(&repository, "a", &noise(1, 3000), 1000).unwrap();
    let packs: BTreeSet<_> = memory.names().into_iter().collect();
    let (second, _) = store(&repository, "b", &noise(2, 3000), 1000).unwrap();
    let of_second = memory.names().into_iter().filter(|file| !packs.contains(file));
    let mut of_second = of_second.filter(|(kind, _)| *kind == FileKind::Pack);
    let pack = of_second.find(|file| memory.files.lock().unwrap()[file].len() > 3000).unwrap();
    memory.files.lock().unwrap().get_mut(&pack).unwrap()[1500] ^= 1;

    let without_data = repository.check(&CheckOptions::default(), &|_| {}).unwrap();
    assert!(without_data.is_clean(), "sizes are right: {without_data:?}");
    let report = repository.check(&CheckOptions::new(Some(100.0)), &|_| {}).unwrap();
    let [problem] = report.problems.as_slice() else { panic!("{report:?}") };
    assert_eq!(problem.file.unwrap().id, pack.1);
    assert!(problem.blob.is_some());
    let affected: Vec<_> = problem.affected.iter().map(|snapshot| snapshot.id).collect();
    assert_eq!(affected, [second]);
    assert!(problem.affected[0].time.is_some() && problem.affected[0].paths == ["/b"]);
    assert_eq!(common::restore(&repository, &first).unwrap(), noise(1, 3000));
}

#[test]
fn r20_truncated_and_empty_files_are_found_and_never_restored_wrongly() {
    let scene = Scene::new();
    for file in scene.memory.names() {
        let whole = scene.memory.files.lock().unwrap()[&file].clone();
        for len in [0, 1, 3, whole.len() / 2, whole.len() - 1] {
            scene.memory.files.lock().unwrap().insert(file, whole[..len].to_vec());
            scene.judge(file, &format!("cut to {len} bytes"));
        }
        let longer = [whole.as_slice(), b"x"].concat();
        scene.memory.files.lock().unwrap().insert(file, longer);
        scene.judge(file, "with a byte behind it");
        scene.memory.files.lock().unwrap().insert(file, whole);
    }
}

#[test]
fn r20_swapped_files_of_a_kind_are_found() {
    let scene = Scene::new();
    let names = scene.memory.names();
    let swap = |a, b| {
        let mut files = scene.memory.files.lock().unwrap();
        let (of_a, of_b) = (files[&a].clone(), files[&b].clone());
        files.insert(a, of_b);
        files.insert(b, of_a);
    };
    let mut swapped = 0;
    for pair in names.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
        swap(pair[0], pair[1]);
        let repository = scene.open().unwrap();
        let report = scene.check(&repository);
        let named: BTreeSet<_> =
            report.problems.iter().filter_map(|p| p.file).map(|file| file.id).collect();
        assert!(named.contains(&pair[0].1) && named.contains(&pair[1].1), "{report:?}");
        let affected: BTreeSet<FileId> =
            report.problems.iter().flat_map(|p| &p.affected).map(|s| s.id).collect();
        assert_eq!(affected, scene.failing(&repository, false), "{report:?}");
        swap(pair[0], pair[1]);
        swapped += 1;
    }
    assert!(swapped >= 3);
}

#[test]
fn r20_missing_files_are_found_where_anything_needs_them() {
    let scene = Scene::new();
    for file in scene.memory.names() {
        let whole = scene.memory.files.lock().unwrap().remove(&file).unwrap();
        match scene.open() {
            Err(RepositoryError::NotARepository { .. }) => assert_eq!(file.0, FileKind::Config),
            Err(RepositoryError::WrongPassword { .. }) => assert_eq!(file.0, FileKind::Key),
            Err(error) => panic!("{file:?}: {error:?}"),
            Ok(repository) => {
                let report = scene.check(&repository);
                let failing = scene.failing(&repository, false);
                let affected: BTreeSet<FileId> =
                    report.problems.iter().flat_map(|p| &p.affected).map(|s| s.id).collect();
                match file.0 {
                    // Forgotten, as far as anybody can tell.
                    FileKind::Snapshot => assert!(report.is_clean(), "{report:?}"),
                    _ => {
                        assert!(!report.is_clean(), "{file:?}");
                        assert_eq!(affected, failing, "{file:?}: {report:?}");
                    }
                }
                if file.0 == FileKind::Index {
                    assert_eq!(scene.failing(&repository, true), BTreeSet::new());
                }
            }
        }
        scene.memory.files.lock().unwrap().insert(file, whole);
    }
}

#[test]
fn r20_a_damaged_index_stops_writers_and_names_the_file() {
    let scene = Scene::new();
    let index = scene.memory.names().into_iter().find(|(kind, _)| *kind == FileKind::Index);
    let index = index.unwrap();
    scene.memory.files.lock().unwrap().get_mut(&index).unwrap()[40] ^= 1;
    let error = scene.open().unwrap().index().unwrap_err();
    assert!(
        matches!(error, RepositoryError::Damaged { file, .. } if (file.kind, file.id) == index),
        "{error:?}"
    );
}

#[test]
fn r20_a_second_copy_of_a_damaged_chunk_is_used() {
    let memory = Memory::new();
    let repository = init(memory.clone());
    let empty = Arc::new(repository.index().unwrap());
    // Two writers that do not know of each other store the same chunk.
    let save = || {
        let options = repository::WriterOptions::default();
        let writer = repository::Writer::new(&repository, empty.clone(), options).unwrap();
        let id = writer.save_blob(noise(5, CHUNK).into()).unwrap();
        writer.finish().unwrap();
        id
    };
    let id = save();
    assert_eq!(save(), id);
    let index = Arc::new(repository.index().unwrap());
    let first = index.locate(repository::BlobKind::Data, &id).unwrap().pack;
    memory.files.lock().unwrap().get_mut(&(FileKind::Pack, first)).unwrap()[99] ^= 1;
    let reader = repository::Reader::new(&repository, index, 0);
    assert_eq!(reader.blob(&id).unwrap(), noise(5, CHUNK));
    let report = repository.check(&CheckOptions::new(Some(100.0)), &|_| {}).unwrap();
    assert!(!report.is_clean() && report.problems.iter().all(|p| p.affected.is_empty()));
}

#[test]
fn a_wrong_password_is_not_damage() {
    let scene = Scene::new();
    let opened = Repository::open(scene.memory.clone(), b"wrong");
    assert!(matches!(opened, Err(RepositoryError::WrongPassword { .. })));
    assert!(Repository::open(scene.memory.clone(), PASSWORD.as_bytes()).is_ok());
}
