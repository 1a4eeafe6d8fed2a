//! `kvmsnap copy`: R28, and what a replica is good for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use integration::faults::{Contents, Fault, assert_says, kinds};
use integration::restored::text;
use integration::{Host, finish, spawn, tool};
use serde_json::Value;
use vm_fixtures::{Disk, Guest, MIB};

/// A host with two backups of a guest, and an empty replica with a password of its own.
struct Scene {
    host: Host,
    replica: Host,
    guest: Guest,
    contents: Contents,
}

impl Scene {
    fn new() -> Option<Self> {
        let size = 4 * MIB;
        let guest = Guest::without_os().disk(Disk::new("vda", size)).boot()?;
        let mut contents = Contents::new(&["vda"], size);
        let (host, replica) = (Host::new(), Host::without_repository());
        fs::write(replica.password_file(), "another horse\n").unwrap();
        replica.ok(["repository", "init"]);
        contents.write_noise(&guest, "vda", 0, 2 << 20, 1);
        host.backup(&guest, &[]);
        contents.scribble(&guest, 1);
        host.backup(&guest, &[]);
        Some(Self { host, replica, guest, contents })
    }

    fn copy_command(&self, more: &[&str]) -> Command {
        let mut command = self.host.command(["copy", "--json", "--to"]);
        command.arg(self.replica.repository());
        command.arg("--to-password-file").arg(self.replica.password_file()).args(more);
        command
    }

    fn copy(&self, more: &[&str]) -> Vec<Value> {
        let outcome = finish(spawn(self.copy_command(more)));
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The replica's snapshots with the ids that they have at the source.
    fn restore_by_restic(&self) -> PathBuf {
        let to = tempfile::tempdir_in(self.replica.folder()).unwrap().keep();
        self.replica.restic(&["restore", "latest", "--target", to.to_str().unwrap()]);
        to
    }
}

#[test]
fn p1_a_replica_restores_what_the_guest_had_and_a_second_copy_sends_nothing() {
    let Some(mut scene) = Scene::new() else { return };
    let planned = scene.copy(&["--dry-run"]);
    assert_eq!(planned.len(), 2);
    assert!(scene.replica.list().is_empty(), "a dry run copies nothing");

    let copied = scene.copy(&["--read-back", "100%"]);

    assert_eq!(copied.len(), 3, "two snapshots and a summary: {copied:?}");
    assert!(copied[2]["bytes_read_back"].as_u64().unwrap() >= 2 << 20, "{copied:?}");
    let (here, there) = (scene.host.list(), scene.replica.list());
    let shown = |snapshot: &Value| {
        ["domain", "time", "kind", "method", "disks"].map(|field| snapshot[field].clone())
    };
    assert_eq!(
        here.iter().map(shown).collect::<Vec<_>>(),
        there.iter().map(shown).collect::<Vec<_>>()
    );
    scene.replica.assert_holds(&there[1], &scene.contents);
    let restored = scene.restore_by_restic();
    scene.contents.assert_restored(&restored.join(text(&there[1], "domain")));
    scene.replica.assert_restic_is_content();
    scene.host.assert_restic_is_content();

    let again = scene.copy(&[]);
    assert_eq!((again.len(), &again[0]["snapshots"]), (1, &Value::from(0)), "{again:?}");
    // The next one only has to be told from the last one that both have.
    scene.contents.scribble(&scene.guest, 2);
    let third = scene.host.backup(&scene.guest, &[]);
    assert_eq!(kinds(&third)["vda"], "incremental");
    let next = scene.copy(&[]);
    assert_eq!(next[0]["source"], third["id"]);
    assert!(next[0]["bytes_sent"].as_u64().unwrap() < 1 << 20, "{next:?}");
    scene.host.assert_nothing_left();
    scene.replica.assert_nothing_left();
}

#[test]
fn p3_a_backup_into_a_replica_is_a_chain_of_its_own() {
    let Some(mut scene) = Scene::new() else { return };
    scene.copy(&[]);
    scene.contents.scribble(&scene.guest, 2);

    // Not incremental: the dirty bitmap that the copied snapshot tells of belongs to the source.
    let first = scene.replica.backup_and_compare(&scene.guest, &scene.contents, &[]);
    assert_eq!(kinds(&first)["vda"], "rescan", "{first}");

    scene.contents.scribble(&scene.guest, 3);
    for host in [&scene.host, &scene.replica] {
        let next = host.backup_and_compare(&scene.guest, &scene.contents, &[]);
        assert_eq!(kinds(&next)["vda"], "incremental", "{next}");
    }
}

#[test]
fn a_replica_that_dropped_snapshots_does_not_get_them_back_unasked() {
    let Some(scene) = Scene::new() else { return };
    scene.copy(&[]);
    scene.replica.restic(&["forget", scene.replica.list()[0]["id"].as_str().unwrap(), "--prune"]);
    let again = scene.copy(&[]);
    assert_eq!(again[0]["snapshots"], 0, "{again:?}");
    assert_eq!(again[0]["older_not_copied"], 1, "{again:?}");
    assert_eq!(scene.copy(&["--older"])[1]["snapshots"], 1);
    assert_eq!(scene.replica.list().len(), 2);
}

#[test]
fn only_what_was_named_is_copied_and_nonsense_is_refused() {
    let Some(scene) = Scene::new() else { return };
    let snapshots = scene.host.list();
    let id = snapshots[1]["id"].as_str().unwrap();
    let domain = text(&snapshots[1], "domain");
    assert_eq!(scene.copy(&[id])[0]["source"], *id);
    assert_eq!(scene.replica.list().len(), 1);
    // A snapshot that is named is copied however old it is.
    let older = snapshots[0]["short_id"].as_str().unwrap();
    assert_eq!(scene.copy(&[domain])[0]["snapshots"], 0);
    assert_eq!(scene.copy(&[older])[1]["snapshots"], 1);

    // A machine that has no snapshots is nothing, whatever its name looks like.
    let machine = format!("--machine={}/{}", domain, text(&snapshots[1], "uuid"));
    let nobody = format!("--machine={id}/{}", text(&snapshots[1], "uuid"));
    assert_eq!(scene.copy(&[&nobody, &machine, "--older"])[0]["snapshots"], 0);
    assert_eq!(scene.copy(&[&nobody, "--dry-run"]), [Value::Null; 0]);
    let unknown = finish(spawn(scene.copy_command(&["no-such-domain"])));
    assert_says(&unknown, 1, "no snapshot");
    let itself = scene.host.repository().to_str().unwrap().to_owned();
    let refused = scene.host.run(["copy", "--to", &itself]);
    assert_says(&refused, 2, "is the same repository");
    let nowhere = scene.host.run(["copy", "--to", "/no/such/folder"]);
    assert_says(&nowhere, 10, "does not exist");
}

#[test]
fn p4_of_a_damaged_source_the_good_snapshots_are_copied_and_the_others_named() {
    let Some(mut scene) = Scene::new() else { return };
    scene.contents.write_noise(&scene.guest, "vda", 3 << 20, 1 << 20, 9);
    let packs = || {
        let mut packs = Vec::new();
        for folder in fs::read_dir(scene.host.repository().join("data")).unwrap() {
            let files = fs::read_dir(folder.unwrap().path()).unwrap();
            packs.extend(files.map(|file| file.unwrap().path()));
        }
        packs
    };
    let before = packs();
    let damaged = scene.host.backup(&scene.guest, &[]);
    let new = packs().into_iter().filter(|pack| !before.contains(pack));
    let big = new.max_by_key(|pack| pack.metadata().unwrap().len()).unwrap();
    let mut bytes = fs::read(&big).unwrap();
    bytes[1000] ^= 1;
    fs::write(&big, bytes).unwrap();

    let outcome = finish(spawn(scene.copy_command(&[])));

    assert_says(&outcome, 3, "1 of 3 snapshots were not copied");
    let short = damaged["id"].as_str().unwrap().chars().take(8).collect::<String>();
    assert!(outcome.stderr.contains(&short), "{outcome:?}");
    assert_eq!(scene.replica.list().len(), 2);
    scene.replica.assert_restic_is_content();
}

#[test]
fn r28_killed_at_any_effect_a_copy_leaves_whole_snapshots_and_goes_on() {
    let Some(scene) = Scene::new() else { return };
    let empty = scene.host.folder().join("empty");
    copy_folder(scene.replica.repository(), &empty);
    let effects = scene.host.effects(scene.copy_command(&[]));
    assert!(effects.len() >= 8, "{effects:?}");
    for n in 1..=effects.len() {
        fs::remove_dir_all(scene.replica.repository()).unwrap();
        copy_folder(&empty, scene.replica.repository());

        let outcome = finish(spawn(Fault::Crash.at(n, scene.copy_command(&[]))));

        assert_eq!(outcome.code, None, "killed at {n}: {outcome:?}");
        scene.replica.ok(["verify", "--read-data"]);
        scene.copy(&[]);
        let there = scene.replica.list();
        assert_eq!(there.len(), 2, "after {}", effects[n - 1]);
        scene.replica.assert_holds(&there[1], &scene.contents);
    }
    scene.replica.assert_restic_is_content();
}

fn copy_folder(from: &Path, to: &Path) {
    let mut command = Command::new("cp");
    command.arg("-a").args([from, to]);
    tool(command);
}
