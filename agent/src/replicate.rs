//! What a replica lacks: decided from the lists of snapshots of both repositories, without I/O.

mod failed;

use std::collections::{HashMap, HashSet};

use repository::{FileId, SnapshotFile};

pub use self::failed::Failed;
use crate::catalog::uuid_of;

/// Snapshots with their names, oldest first.
pub type Listed = Vec<(FileId, SnapshotFile)>;

/// What is to be copied.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Lacking {
    /// The snapshots, each after the one that it continues.
    pub snapshots: Listed,
    /// How many older ones the replica lacks: it has dropped them.
    pub older: usize,
}

/// What of the source a replica lacks. Of each machine only what is newer than the last that both have:
/// what a replica has dropped by its own rules is not to come back, unless `older` asks for it.
pub fn lacking(source: Listed, replica: &[(FileId, SnapshotFile)], older: bool) -> Lacking {
    let there: HashSet<FileId> = replica.iter().map(|(id, file)| file.first_id(id)).collect();
    let is_there = |(id, file): &(FileId, SnapshotFile)| there.contains(&file.first_id(id));
    let machine = |file: &SnapshotFile| (file.paths.clone(), uuid_of(file).map(str::to_owned));
    let common = source.iter().enumerate().filter(|(_, snapshot)| is_there(snapshot));
    let newest_common: HashMap<_, usize> =
        common.map(|(place, (_, file))| (machine(file), place)).collect();
    let mut lacking = Lacking::default();
    for (place, snapshot) in source.into_iter().enumerate() {
        let is_older = newest_common.get(&machine(&snapshot.1)).is_some_and(|last| place < *last);
        match (is_there(&snapshot), is_older) {
            (true, _) => {}
            (false, true) if !older => lacking.older += 1,
            (false, _) => lacking.snapshots.push(snapshot),
        }
    }
    lacking
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use repository::BlobId;

    use super::*;

    fn snapshot(number: u8, domain: &str, original: Option<u8>) -> (FileId, SnapshotFile) {
        let time = Timestamp::from_second(1_700_000_000 + i64::from(number)).unwrap();
        let mut file = SnapshotFile::new(BlobId([number; 32]), time);
        file.paths = vec![format!("/{domain}")];
        file.original = original.map(|number| FileId([number; 32]));
        (FileId([number; 32]), file)
    }

    fn numbers(lacking: &Lacking) -> Vec<u8> {
        lacking.snapshots.iter().map(|(id, _)| id.0[0]).collect()
    }

    #[test]
    fn a_new_replica_lacks_all_and_one_that_was_copied_to_only_what_came_after() {
        let source: Listed = (1..=4).map(|n| snapshot(n, "web", None)).collect();
        assert_eq!(numbers(&lacking(source.clone(), &[], false)), [1, 2, 3, 4]);
        let replica = [snapshot(101, "web", Some(2))];
        let lacks = lacking(source.clone(), &replica, false);
        assert_eq!((numbers(&lacks), lacks.older), (vec![3, 4], 1));
        assert_eq!(numbers(&lacking(source, &replica, true)), [1, 3, 4]);
    }

    #[test]
    fn each_machine_has_a_last_common_snapshot_of_its_own() {
        let source = vec![
            snapshot(1, "web", None),
            snapshot(2, "db", None),
            snapshot(3, "web", None),
            snapshot(4, "db", None),
        ];
        let replica = [snapshot(103, "web", Some(3))];
        assert_eq!(numbers(&lacking(source, &replica, false)), [2, 4]);
    }

    #[test]
    fn a_snapshot_whose_tags_were_changed_is_the_same() {
        let source = vec![snapshot(9, "web", Some(1)), snapshot(2, "web", None)];
        let replica = [snapshot(101, "web", Some(1)), snapshot(102, "web", Some(2))];
        assert_eq!(lacking(source, &replica, true), Lacking::default());
    }
}
