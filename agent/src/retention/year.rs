//! A year of hourly backups of a dozen machines, in a real repository, with the clock as an argument.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use jiff::civil::{ISOWeekDate, date};
use repository::{
    BlobId, Index, Kdf, LocalFolder, Node, PruneOptions, Repository, SnapshotFile, Tree, Writer,
    WriterOptions,
};
use serde_json::json;

use super::*;
use crate::catalog::Catalog;

const MACHINES: usize = 12;
const HOURS: i64 = 365 * 24;
const PASSWORD: &str = "correct horse";

/// Clocks of central Europe, with their changes in March and October.
fn zone() -> TimeZone {
    TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap()
}

fn policy() -> Policy {
    Policy {
        last: 3,
        hourly: 24,
        daily: 14,
        weekly: 8,
        monthly: 6,
        yearly: 3,
        within: Some("2d".parse().unwrap()),
        tags: Vec::new(),
    }
}

/// What a machine is at some hour; the last one is defined anew in the summer.
fn machine_of(number: usize, hour: i64) -> Machine {
    let is_new = number == MACHINES - 1 && hour >= 200 * 24;
    let uuid = format!("{number}-{}", u8::from(is_new));
    Machine { domain: format!("vm{number:02}"), uuid }
}

/// Its host was off for ten days in spring.
fn is_off(number: usize, hour: i64) -> bool {
    number == 3 && (2000..2240).contains(&hour)
}

/// All that was ever backed up.
#[derive(Default)]
struct Made {
    of: BTreeMap<Machine, Vec<(FileId, Timestamp)>>,
    protected: BTreeSet<FileId>,
}

/// The record of a machine's backups of one day.
fn save_manifest(writer: &Writer, machine: &Machine, time: Timestamp) -> (BlobId, u64) {
    let manifest = json!({
        "version": 1, "program": "", "run": "0123456789abcdef", "domain": machine.domain,
        "uuid": machine.uuid, "host": "", "time": time, "kind": "full", "method": "bitmap",
        "consistency": "crash", "parent": null, "freeze_ms": null, "pause_ms": null,
        "duration_ms": 1, "warnings": [], "disks": [{
            "target": "vda", "size": 9, "chunk_size": 4096, "format": "qcow2", "image": null,
            "kind": "full", "reason": "", "bitmap": "b", "bytes_changed": 0, "bytes_read": 0,
            "bytes_zero": 0, "bytes_audited": 0, "bytes_stored": 0,
        }],
    });
    let manifest = serde_json::to_vec(&manifest).unwrap();
    let len = manifest.len() as u64;
    (writer.save_blob(Bytes::from(manifest)).unwrap(), len)
}

/// Stores what the backup of one hour consists of; its snapshot file comes later.
fn store(
    writer: &Writer,
    machine: &Machine,
    (manifest, len): (BlobId, u64),
    time: Timestamp,
    template: &SnapshotFile,
) -> SnapshotFile {
    let chunk = format!("{} {time}", machine.domain);
    let size = chunk.len() as u64;
    let chunk = writer.save_blob(Bytes::from(chunk)).unwrap();
    let disk = Node::file("vda.raw", size, vec![chunk], time);
    let folder = writer.save_tree(&Tree::new(vec![disk])).unwrap();
    let name = format!("{}.manifest.json", machine.domain);
    let root = Tree::new(vec![
        Node::dir(&machine.domain, folder, time),
        Node::file(&name, len, vec![manifest], time),
    ]);
    let mut file = template.clone();
    (file.tree, file.time) = (writer.save_tree(&root).unwrap(), time);
    file.paths = vec![format!("/{}", machine.domain)];
    let uuid = format!("uuid={}", machine.uuid);
    file.tags = vec!["kvmsnap".into(), uuid, format!("manifest={manifest}")];
    file
}

/// The backups of one day: stored by one writer for speed, each recorded by itself after its parent.
fn back_up_a_day(
    repository: &Repository,
    index: &Arc<Index>,
    first_hour: i64,
    start: Timestamp,
    made: &mut Made,
) {
    let options = WriterOptions::default();
    let writer = Writer::new(repository, Arc::clone(index), options).unwrap();
    let template = SnapshotFile::new(BlobId::of(b""), start);
    let mut days: Vec<Vec<(Machine, SnapshotFile)>> = Vec::new();
    for number in 0..MACHINES {
        let machine = machine_of(number, first_hour);
        let manifest = save_manifest(&writer, &machine, start);
        let hours = (first_hour..first_hour + 24).filter(|&hour| !is_off(number, hour));
        let one = |hour| {
            let time = start + SignedDuration::from_mins(60 * hour + number as i64);
            let mut file = store(&writer, &machine, manifest, time, &template);
            // Somebody protects the first one of February.
            file.tags.extend((hour == 31 * 24).then(|| PROTECTED.to_owned()));
            (machine.clone(), file)
        };
        days.push(hours.map(one).collect());
    }
    writer.finish().unwrap();
    let made = std::sync::Mutex::new(made);
    std::thread::scope(|scope| {
        for day in days {
            scope.spawn(|| {
                for (machine, mut file) in day {
                    let last =
                        made.lock().unwrap().of.get(&machine).and_then(|of| of.last().copied());
                    file.parent = last.map(|(id, _)| id);
                    let id = repository.save_snapshot(&file).unwrap();
                    let mut made = made.lock().unwrap();
                    if file.tags.iter().any(|tag| tag == PROTECTED) {
                        made.protected.insert(id);
                    }
                    made.of.entry(machine).or_default().push((id, file.time));
                }
            });
        }
    });
}

fn forget(repository: &Repository, now: Timestamp, is_first: bool) {
    let catalog = Catalog::new(repository, Arc::new(repository.index().unwrap()));
    let gathered = gather(&catalog, |_| true, &[]).unwrap();
    assert!(gathered.broken.is_empty(), "{:?}", gathered.broken);
    let rules = policy();
    let earlier = |_: &Machine| (!is_first).then_some(&rules);
    for group in plan(&gathered.candidates, &rules, earlier, now, &zone()) {
        assert!(is_first || group.unexpected.is_none(), "{now}: {:?}", group.machine);
        group.dropped().for_each(|gone| repository.remove_snapshot(&gone.id).unwrap());
    }
}

/// What the period is called that a time lies in.
type Name = fn(&jiff::Zoned) -> String;

/// The rules once more, by somebody who knows nothing of how they are carried out.
fn promised(all: &[(FileId, Timestamp)], protected: &BTreeSet<FileId>) -> BTreeSet<FileId> {
    let policy = policy();
    let zone = zone();
    let (newest, newest_time) = *all.last().unwrap();
    let mut kept: BTreeSet<FileId> = all.iter().rev().take(3).map(|(id, _)| *id).collect();
    kept.insert(newest);
    let two_days = SignedDuration::from_hours(48);
    for (id, time) in all {
        if protected.contains(id) || *time > newest_time - two_days {
            kept.insert(*id);
        }
    }
    let periods: [(u32, Name); 5] = [
        (policy.hourly, |at| format!("{} {}", at.date(), at.hour())),
        (policy.daily, |at| at.date().to_string()),
        (policy.weekly, |at| {
            let week = ISOWeekDate::from(at.date());
            format!("{} {}", week.year(), week.week())
        }),
        (policy.monthly, |at| format!("{} {}", at.year(), at.month())),
        (policy.yearly, |at| at.year().to_string()),
    ];
    for (count, period) in periods {
        let mut last_of: Vec<(String, FileId)> = Vec::new();
        for (id, time) in all {
            let name = period(&time.to_zoned(zone.clone()));
            // Oldest first: a period that came before the last one does not come again.
            match last_of.last_mut() {
                Some((known, last)) if *known == name => *last = *id,
                _ => last_of.push((name, *id)),
            }
        }
        if last_of.len() < count as usize {
            kept.insert(all[0].0);
        }
        kept.extend(last_of.iter().rev().take(count as usize).map(|(_, id)| *id));
    }
    kept
}

#[test]
fn a_year_of_hourly_backups_ends_with_the_snapshots_that_the_rules_promise() {
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() { memory } else { Path::new("/tmp") };
    let scratch = tempfile::tempdir_in(place).unwrap();
    let folder = scratch.path().join("repository");
    let backend = Arc::new(LocalFolder::create(&folder).unwrap());
    let repository = Repository::init(backend, PASSWORD.as_bytes(), Kdf::WEAK_FOR_TESTS).unwrap();
    let start = date(2026, 1, 1).to_zoned(zone()).unwrap().timestamp();
    // What is stored is always new, so nobody needs to know what is there.
    let index = Arc::new(repository.index().unwrap());
    let mut made = Made::default();
    let mut options = PruneOptions::default();
    options.patience = Duration::from_secs(1);
    for day in 0..HOURS / 24 {
        back_up_a_day(&repository, &index, day * 24, start, &mut made);
        let now = start + SignedDuration::from_hours((day + 1) * 24);
        if day % 7 == 6 || day + 1 == HOURS / 24 {
            forget(&repository, now, day == 6);
        }
        if day % 60 == 59 {
            repository.prune(&options, &|_| Ok(())).unwrap();
        }
    }

    let report = repository.prune(&options, &|_| Ok(())).unwrap();

    let left = repository.snapshots().unwrap().good;
    let left: BTreeSet<FileId> = left.into_iter().map(|(id, _)| id).collect();
    let mut expected = BTreeSet::new();
    for all in made.of.values() {
        expected.extend(promised(all, &made.protected));
    }
    assert_eq!(made.of.values().map(Vec::len).sum::<usize>(), MACHINES * HOURS as usize - 240);
    assert_eq!(left.len(), expected.len());
    assert!(left == expected, "other snapshots are left than the rules promise");
    let packs = report.packs - report.packs_removed;
    assert!(packs < 1000 && report.snapshots == left.len() as u64, "{report:?}");
    judge(&folder);
}

/// Stock restic finds nothing wrong.
fn judge(folder: &Path) {
    let mut restic = Command::new("restic");
    restic.args(["--no-cache", "check", "--read-data", "--repo"]).arg(folder);
    restic.env("RESTIC_PASSWORD", PASSWORD).env_remove("RESTIC_REPOSITORY");
    match restic.output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{text}");
        }
        Err(error) => {
            let required = std::env::var("KVMSNAP_REQUIRE_QEMU").is_ok_and(|value| value == "1");
            assert!(!required, "restic is not installed, and KVMSNAP_REQUIRE_QEMU=1: {error}");
        }
    }
}
