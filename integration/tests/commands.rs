//! The command line with the real program: what it prints, what it refuses, and how it ends.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use integration::faults::{
    Contents, assert_says, kill_with_helpers, signal, wait_for_export, wait_until,
};
use integration::restored::{allocated, text};
use integration::{Host, assert_guest_is_free, finish, spawn};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vm_fixtures::{Disk, Guest, MIB};

const COMMANDS: [&[&str]; 22] = [
    &[],
    &["repository"],
    &["repository", "init"],
    &["repository", "info"],
    &["backup"],
    &["list"],
    &["show"],
    &["restore"],
    &["verify"],
    &["image"],
    &["image", "get"],
    &["image", "list"],
    &["image", "info"],
    &["image", "check"],
    &["doctor"],
    &["run"],
    &["history"],
    &["config"],
    &["config", "check"],
    &["config", "example"],
    &["completions"],
    &["man"],
];
/// Longest time for what takes a moment.
const WAIT: Duration = Duration::from_secs(120);
/// How long an interrupted command may take to let go: a second, and what a busy machine adds to that.
const LET_GO_MAX: Duration = Duration::from_secs(5);

/// A machine with one disk that holds 4 MiB of data.
fn machine() -> Option<(Guest, Contents)> {
    let guest = Guest::without_os().disk(Disk::new("vda", 16 * MIB)).boot()?;
    let mut contents = Contents::new(&["vda"], 16 * MIB);
    contents.write(&guest, "vda", 1 << 20, 4 << 20, 1);
    Some((guest, contents))
}

/// All files below a folder, with their lengths; of a command that runs not all.
fn files(folder: &Path) -> BTreeSet<(PathBuf, u64)> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        // Who is at work there may have given it its final name just now.
        let Ok(metadata) = entry.metadata() else { continue };
        match metadata.is_dir() {
            true => found.extend(files(&path)),
            false => drop(found.insert((path, metadata.len()))),
        }
    }
    found
}

#[test]
fn the_help_of_each_command_has_examples() {
    let host = Host::without_repository();
    for command in COMMANDS {
        let help = host.ok([command, &["--help"]].concat());
        let wanted = ["Usage: kvmsnap", "Examples:\n  ", "--json"];
        assert!(wanted.iter().all(|word| help.contains(word)), "{command:?}: {help}");
    }
    assert!(host.ok(["--version"]).starts_with("kvmsnap "));
    assert_says(&host.run(["backup"]), 2, "<DOMAIN>");
    assert_says(&host.run(["no-such-command"]), 2, "unrecognized");
}

#[test]
fn man_pages_and_completions_come_from_the_same_definitions() {
    let host = Host::without_repository();
    let folder = host.new_folder();
    host.ok(["man".as_ref(), folder.as_os_str()]);
    for page in
        ["kvmsnap.1", "kvmsnap-backup.1", "kvmsnap-restore.1", "kvmsnap-doctor.1", "kvmsnap.toml.5"]
    {
        let page = fs::read_to_string(folder.join(page)).expect("a page");
        assert!(page.contains(".TH") && page.contains(".SH DESCRIPTION"), "{page}");
    }
    for (shell, word) in [("bash", "complete"), ("zsh", "#compdef"), ("fish", "complete -c")] {
        let script = host.ok(["completions", shell]);
        assert!(script.contains(word) && script.contains("limit-read"), "{shell}");
    }
}

#[test]
fn snapshots_are_listed_shown_and_named() {
    let Some((guest, mut contents)) = machine() else { return };
    let host = Host::new();
    let first = host.backup(&guest, &["--name", "web"]);
    contents.scribble(&guest, 1);
    let second = host.backup(&guest, &["--name", "web"]);
    let other = host.backup(&guest, &["--name", "db"]);
    // Somebody else's snapshot in the same repository is none of ours.
    let file = host.folder().join("file");
    fs::write(&file, "text").expect("a file");
    host.restic(&["backup", file.to_str().expect("a plain path")]);

    let listed = host.list();
    assert_eq!(listed, [first.clone(), second.clone(), other.clone()], "oldest first, as printed");
    for field in ["id", "short_id", "domain", "uuid", "time", "kind", "method", "consistency"] {
        assert!(listed[1][field].is_string(), "{field}");
    }
    assert_eq!((&second["kind"], &second["parent"]), (&json!("incremental"), &first["id"]));
    assert!(second.as_object().is_some_and(|line| line.contains_key("freeze_ms")));
    let disk = &second["disks"][0];
    for field in ["size", "chunk_size", "bytes_changed", "bytes_read", "bytes_stored"] {
        assert!(disk[field].is_u64(), "{field}");
    }
    assert_eq!(disk["target"], "vda");
    assert!(text(&first, "id").starts_with(text(&first, "short_id")));

    let table = host.ok(["list"]);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 4, "{table}");
    let columns = ["ID", "TIME", "DOMAIN", "KIND", "CONSISTENCY", "SIZE", "CHANGED", "STORED"];
    assert_eq!(lines[0].split_whitespace().collect::<Vec<_>>(), columns);
    for (line, snapshot) in lines[1..].iter().zip(&listed) {
        let words = ["short_id", "domain", "kind", "consistency"].map(|word| text(snapshot, word));
        assert!(words.iter().all(|word| line.contains(word)), "{line}");
        assert!(line.contains("16.00 MiB"), "{line}");
    }
    assert_eq!(host.ok(["list", "db", "--json"]).lines().count(), 1);
    assert_eq!(host.ok(["list", "db", "web", "--json"]).lines().count(), 3);
    assert_eq!(host.ok(["list", "nobody", "--json"]), "");

    let id_of = |name: &str| {
        let shown: Value = serde_json::from_str(&host.ok(["show", "--json", name])).expect("JSON");
        shown["id"].clone()
    };
    assert_eq!(id_of("latest:web"), second["id"]);
    assert_eq!(id_of(text(&other, "short_id")), other["id"]);
    assert_eq!(id_of(text(&first, "id")), first["id"]);
    assert_eq!(id_of(&format!("web@{}", text(&first, "time"))), first["id"], "at or before");
    assert_eq!(id_of(&format!("web@{}", text(&other, "time"))), second["id"]);
    let shown = host.ok(["show", "latest:web"]);
    for word in ["web (", "incremental", "bitmap", "crash", "vda", "16.00 MiB", "kvmsnap "] {
        assert!(shown.contains(word), "{word}: {shown}");
    }
    assert_says(&host.run(["show", "latest:nobody"]), 1, "kvmsnap list");
    assert_says(&host.run(["show", "web@1999-01-01"]), 1, "no snapshot matches");
    assert_says(&host.run(["show", "web@yesterday"]), 1, "not a date and time");
    assert_says(&host.run(["show", "zzzz"]), 1, "kvmsnap list");
    let foreign = host.restic(&["snapshots", "--json", "--path", file.to_str().unwrap_or("")]);
    let foreign: Value = serde_json::from_slice(&foreign).expect("JSON");
    assert_says(&host.run(["show", text(&foreign[0], "id")]), 1, "not made by kvmsnap");

    host.ok(["verify"]);
    host.ok(["verify", "--read-data=50%"]);
    let report: Value =
        serde_json::from_str(&host.ok(["verify", "--read-data", "--json"])).expect("JSON");
    assert_eq!((&report["problems"], &report["packs"]), (&json!(0), &report["packs_read"]));
    host.ok(["verify", "latest:web", "--read-data"]);
    assert_says(&host.run(["verify", "--read-data=0%"]), 2, "above 0%");
    let info: Value =
        serde_json::from_str(&host.ok(["repository", "info", "--json"])).expect("JSON");
    assert_eq!(info["snapshots"], 4);
}

#[test]
fn p5_a_restore_is_sparse_and_writes_nothing_over() {
    let plan = Guest::without_os().disk(Disk::new("vda", 256 * MIB)).disk(Disk::new("vdb", MIB));
    let Some(guest) = plan.boot() else { return };
    let host = Host::new();
    guest.qemu_io("vda", "write -P 7 100M 1M");
    host.backup(&guest, &[]);
    let folder = host.folder().join("restored");
    let restore = |more: &[&str]| {
        let to = ["restore", "latest:fixture", "--to", folder.to_str().expect("a plain path")];
        host.run([&to[..], more].concat())
    };

    let dry = restore(&["--dry-run", "--json"]);
    assert_eq!(dry.code, Some(0), "{dry:?}");
    assert!(!folder.exists(), "a dry run writes nothing");
    let real = restore(&["--json"]);
    let promised = dry.stdout.replace("\"restored\":false", "\"restored\":true");
    assert_eq!(real.stdout, promised, "the dry run said what would be done");
    let names: BTreeSet<_> = files(&folder).into_iter().map(|(path, _)| path).collect();
    let expected = ["manifest.json", "vda.qcow2", "vdb.qcow2"].map(|name| folder.join(name));
    assert_eq!(names, BTreeSet::from(expected));
    assert!(allocated(&folder.join("vda.qcow2")) < 4 * MIB, "sparse");

    let before = files(&folder);
    assert_says(&restore(&[]), 1, "nothing is ever written over");
    assert_says(&restore(&["--dry-run"]), 1, "exists already");
    assert_says(&restore(&["--disk", "vdz"]), 1, "no disk `vdz`");
    assert_eq!(files(&folder), before);

    assert_eq!(restore(&["--format", "raw", "--disk", "vda"]).code, Some(0));
    let raw = folder.join("vda.raw");
    assert!(!folder.join("vdb.raw").exists(), "only what was asked for");
    assert_eq!(fs::metadata(&raw).expect("a raw image").len(), 256 * MIB);
    assert_eq!(allocated(&raw), MIB, "sparse to the last block");
}

#[test]
fn a_dry_run_changes_nothing_and_says_what_will_be_done() {
    let plan =
        Guest::without_os().disk(Disk::new("vda", 4 * MIB)).disk(Disk::new("vdb", MIB).raw());
    let Some(guest) = plan.boot() else { return };
    let host = Host::new();
    for more in [&[][..], &[], &["--full"], &["--disk", "vda"]] {
        guest.qemu_io("vda", "write -P 7 1M 64k");
        let state = || {
            let bitmaps = guest.bitmaps("vda-format");
            let names = bitmaps.iter().map(|bitmap| bitmap["name"].clone()).collect::<Vec<_>>();
            (files(host.repository()), files(&host.state()), guest.node_names(), names)
        };
        let before = state();

        let dry = host.try_backup(&guest, &[more, &["--dry-run"]].concat());

        assert_eq!(dry.code, Some(0), "{dry:?}");
        assert_eq!(state(), before);
        let plan = dry.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON"));
        let plan: Vec<Value> = plan.collect();
        let real = host.backup(&guest, more);
        let disks = real["disks"].as_array().expect("a list of disks");
        assert_eq!(plan.len(), disks.len());
        for (planned, disk) in plan.iter().zip(disks) {
            for field in ["target", "size", "kind", "reason"] {
                assert_eq!(planned[field], disk[field], "{field}");
            }
            assert_eq!(planned["disk_method"], disk["method"]);
            assert_eq!(planned["method"], real["method"]);
        }
    }
    let said = host.ok(["backup", "--dry-run", "--qmp", guest.qmp().to_str().unwrap_or("")]);
    assert!(said.contains("fixture/vda: 4.00 MiB, incremental by bitmap: dirty bitmap"), "{said}");
    assert!(said.contains("fixture: method bitmap: it runs, and dirty bitmaps tell"), "{said}");
    let raw = host.try_backup(&guest, &["--disk", "vdb", "--method", "bitmap"]);
    assert_says(&raw, 1, "raw images keep no dirty bitmaps");
}

#[test]
fn p2_p3_an_interrupted_backup_lets_go_within_a_second() {
    let plan = Guest::without_os().disk(Disk::new("vda", 64 * MIB)).disk(Disk::new("vdb", MIB));
    let Some(guest) = plan.boot() else { return };
    let host = Host::new();
    host.backup(&guest, &[]);
    let mut contents = Contents::new(&["vda", "vdb"], MIB);
    for (turn, signal_sent) in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].iter().enumerate()
    {
        for more in [&["--limit-read", "1MiB"][..], &["--limit-read", "1MiB", "--implicit-filter"]]
        {
            contents.scribble(&guest, turn);
            guest.qemu_io("vda", "write -P 7 8M 48M");
            let mut backup = spawn(host.backup_command(&guest, more));
            wait_for_export(&guest, &mut backup);
            let sent = Instant::now();
            signal(backup.pid(), *signal_sent);

            let outcome = finish(backup);

            assert!(sent.elapsed() < LET_GO_MAX, "{:?} {outcome:?}", sent.elapsed());
            assert_says(&outcome, 130, "interrupted");
            host.assert_all_clean(&guest, &["vda", "vdb"]);
            assert!(guest.is_running());
        }
    }
    let next = host.backup(&guest, &[]);
    assert_eq!(next["kind"], "incremental");
    assert_eq!(host.list().len(), 2);
    host.assert_restic_is_content();
}

#[test]
fn p5_an_interrupted_restore_leaves_nothing() {
    let Some(guest) = Guest::without_os().disk(Disk::new("vda", 1024 * MIB)).boot() else { return };
    let host = Host::new();
    guest.qemu_io("vda", "write -P 7 0 1000M");
    host.backup(&guest, &[]);
    for (sent, format) in [(Signal::SIGINT, "raw"), (Signal::SIGTERM, "qcow2")] {
        let folder = host.new_folder();
        let mut command = host.command(["restore", "latest:fixture", "--format", format, "--to"]);
        command.arg(&folder);
        let mut restore = spawn(command);
        let begun = || files(&folder).iter().any(|(_, len)| *len > 0);
        wait_until(WAIT, "the restore has begun", || {
            assert!(!restore.has_ended(), "there is time to interrupt it");
            begun()
        });
        let start = Instant::now();
        signal(restore.pid(), sent);

        let outcome = finish(restore);

        assert_says(&outcome, 130, "interrupted");
        assert!(start.elapsed() < LET_GO_MAX, "{:?}", start.elapsed());
        assert_eq!(files(&folder), BTreeSet::new(), "nothing is left");
        host.assert_nothing_left();
    }
}

#[test]
fn doctor_mends_what_a_killed_run_left_and_nothing_else() {
    let Some((guest, mut contents)) = machine() else { return };
    let host = Host::new();
    host.backup(&guest, &[]);
    assert_eq!(host.ok(["doctor"]), "nothing is left of earlier runs\n");
    // Things of others that look like ours, made before and after.
    let bitmap = json!({"node": "vda-format", "name": "kvmsnap-of-somebody-else"});
    guest.qmp_command("block-dirty-bitmap-add", &bitmap);
    let node = json!({"driver": "null-co", "node-name": "kvmsnap-foreign", "size": 1 << 20});
    guest.qmp_command("blockdev-add", &node);
    let socket = guest.folder().join("foreign.sock");
    let address = json!({"type": "unix", "path": socket});
    let export = json!({"type": "vhost-user-blk", "id": "foreign", "node-name": "kvmsnap-foreign",
        "addr": address});
    guest.qmp_command("block-export-add", &export);
    let foreign = || {
        let bitmaps = guest.bitmaps("vda-format");
        let exports = guest.qmp_command("query-block-exports", &json!({}));
        let ours = |b: &&Value| b["name"] == "kvmsnap-of-somebody-else";
        let exported =
            exports.as_array().is_some_and(|all| all.iter().any(|e| e["id"] == "foreign"));
        bitmaps.iter().filter(ours).count() == 1
            && guest.node_names().contains(&"kvmsnap-foreign".to_owned())
            && exported
    };
    assert!(foreign());
    contents.scribble(&guest, 1);
    let mut backup = spawn(host.backup_command(&guest, &["--limit-read", "64KiB"]));
    wait_until(WAIT, "the backup reads", || {
        assert!(!backup.has_ended(), "it is slow");
        guest.active_node("vda").starts_with("kvmsnap-")
    });
    kill_with_helpers(backup);

    let report = host.run(["doctor"]);
    assert_says(&report, 1, "kvmsnap doctor --repair");
    assert!(report.stdout.contains("fixture (run "), "{report:?}");
    assert!(guest.active_node("vda").starts_with("kvmsnap-"), "telling is not mending");
    let mended = host.ok(["doctor", "--repair"]);
    assert!(mended.contains("mended"), "{mended}");

    assert_eq!(guest.active_node("vda"), "vda-format");
    assert!(foreign(), "what others made stays");
    assert_eq!(host.undo_records(), 0);
    assert_eq!(host.ok(["doctor", "--repair"]), "nothing is left of earlier runs\n");
    let next = host.backup_and_compare(&guest, &contents, &[]);
    assert_eq!(next["kind"], "incremental");
    host.assert_nothing_left();
    assert!(foreign());

    let mut backup = spawn(host.backup_command(&guest, &[]));
    wait_until(WAIT, "there is an undo record", || host.undo_records() > 0 || backup.has_ended());
    kill_with_helpers(backup);
    guest.kill();
    if host.undo_records() > 0 {
        assert_says(&host.run(["doctor"]), 1, "doctor --repair");
        assert!(host.ok(["doctor", "--repair"]).contains("QEMU has ended"));
    }
    assert_eq!(host.undo_records(), 0);
}

#[test]
fn sockets_that_are_no_monitor_are_told_apart() {
    let Some((guest, _)) = machine() else { return };
    let host = Host::new();
    let backup = |socket: &Path| {
        host.run([
            "backup".as_ref(),
            "--qmp".as_ref(),
            socket.as_os_str(),
            "--name".as_ref(),
            "x".as_ref(),
        ])
    };
    let file = host.folder().join("file");
    fs::write(&file, "no socket").expect("a file");
    assert_says(&backup(&file), 1, "is QEMU running");
    assert_says(&backup(Path::new("/nowhere/qmp.sock")), 1, "is QEMU running");
    let dead = host.folder().join("dead.sock");
    drop(UnixListener::bind(&dead).expect("a socket"));
    assert_says(&backup(&dead), 1, "is QEMU running");
    // A guest agent speaks JSON too, but only when it is asked.
    let silent = host.folder().join("qga.sock");
    let listener = UnixListener::bind(&silent).expect("a socket");
    let agent = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        let mut asked = Vec::new();
        // Ends when the client gives up.
        let _ = stream.read_to_end(&mut asked);
        asked
    });
    assert_says(&backup(&silent), 1, "hint: ");
    assert_eq!(agent.join().expect("a thread of ours"), b"", "nothing was said to it");
    let wrong = host.folder().join("wrong.sock");
    let listener = UnixListener::bind(&wrong).expect("a socket");
    let other = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").expect("a client that listens");
    });
    assert_says(&backup(&wrong), 1, "--qmp takes the socket of");
    other.join().expect("a thread of ours");

    let taken = UnixStream::connect(guest.qmp()).expect("QEMU's monitor");
    assert_says(&backup(&guest.qmp()), 1, "one client a socket");
    drop(taken);
    assert!(host.list().is_empty());
    host.assert_nothing_left();
    assert_guest_is_free(&guest, &["vda"]);
    host.backup(&guest, &[]);
}

#[test]
fn names_repositories_and_passwords_that_are_wrong_are_refused() {
    let Some((guest, _)) = machine() else { return };
    let host = Host::without_repository();
    let backup = |more: &[&str]| host.try_backup(&guest, more);
    assert_says(&backup(&[]), 10, "kvmsnap repository init");
    assert_says(&host.run(["list"]), 10, "kvmsnap repository init");
    let folder = host.new_folder();
    fs::write(folder.join("letter"), "dear").expect("a file");
    let location = folder.to_str().expect("a plain path");
    assert_says(&host.run(["list", "-r", location]), 10, "kvmsnap repository init");
    assert_eq!(files(&folder).len(), 1, "nothing was made of it");
    host.ok(["repository", "init"]);
    assert_says(&host.run(["repository", "init"]), 1, "holds a repository already");
    let mut without = host.command(["list"]);
    without.env_remove("KVMSNAP_REPOSITORY");
    assert_says(&finish(spawn(without)), 2, "--repository");
    let mut without = host.command(["list"]);
    without.env_remove("KVMSNAP_PASSWORD_FILE");
    assert_says(&finish(spawn(without)), 2, "--password-file");

    for name in ["../x", "a/b", "", "-rf", ".."] {
        assert_says(&backup(&[&format!("--name={name}")]), 2, "name");
    }
    assert_says(&backup(&["--disk", "vdz"]), 2, "it has vda");
    assert_says(&backup(&["--limit-read", "fast"]), 2, "KiB");
    let password = host.folder().join("other");
    let with = |content: &str| {
        fs::write(&password, content).expect("a password file");
        let file = password.to_str().expect("a plain path");
        host.try_backup(&guest, &["--password-file", file])
    };
    assert_says(&with("wrong\n"), 12, "password");
    assert_says(&with("\n"), 1, "is empty");
    assert_says(&backup(&["--password-file", "/nowhere"]), 1, "/nowhere");
    assert_guest_is_free(&guest, &["vda"]);
    assert!(host.list().is_empty());
    host.assert_nothing_left();
}

#[test]
fn a_locked_repository_or_domain_is_told_from_a_broken_one() {
    let Some((guest, _)) = machine() else { return };
    let host = Host::new();
    let slow = ["--limit-read", "256KiB"];
    guest.qemu_io("vda", "write -P 3 0 16M");
    let mut first = spawn(host.backup_command(&guest, &slow));
    wait_for_export(&guest, &mut first);
    assert_says(&host.try_backup(&guest, &[]), 11, "another kvmsnap (process ");
    assert!(!host.restic_command(&["prune"]).output().expect("restic runs").status.success());
    signal(first.pid(), Signal::SIGINT);
    assert_says(&finish(first), 130, "interrupted");

    host.backup(&guest, &[]);
    host.assert_nothing_left();
}

#[test]
fn r30_disks_of_no_bytes_and_of_60_pib_have_a_defined_outcome() {
    const PIB: u64 = 1 << 50;
    let plan = Guest::without_os()
        .disk(Disk::new("vda", 4 * MIB))
        .disk(Disk::new("vdb", 0).raw())
        .disk(Disk::new("vdc", 60 * PIB).create_options("cluster_size=2M"));
    let Some(guest) = plan.boot() else { return };
    let host = Host::new();
    assert_says(
        &host.try_backup(&guest, &[]),
        1,
        "`vdc` has 67553994410557440 bytes, at most 32 TiB",
    );
    assert_says(&host.try_backup(&guest, &["--disk", "vdb"]), 2, "it has vda, vdc");
    host.assert_nothing_left();
    assert_guest_is_free(&guest, &["vda", "vdb", "vdc"]);

    let snapshot = host.backup(&guest, &["--disk", "vda"]);
    assert_eq!(snapshot["disks"].as_array().map(Vec::len), Some(1));
    let qmp = guest.qmp();
    let mut dry = host.command(["backup", "--dry-run", "--disk", "vda", "--qmp"]);
    dry.arg(&qmp);
    let dry = finish(spawn(dry));
    assert!(dry.stdout.contains("fixture/vdb: left out: it is empty: 0 bytes"), "{dry:?}");

    let alone = Guest::without_os().disk(Disk::new("vda", 0).raw()).boot().expect("QEMU is there");
    assert_says(&host.try_backup(&alone, &[]), 1, "no disk to back up (vda: it is empty: 0 bytes)");
    host.assert_nothing_left();
}

/// Output that nobody reads any more ends a command without a complaint.
#[test]
fn a_closed_pipe_is_no_failure() {
    let host = Host::new();
    let mut shell = Command::new("sh");
    let program = host.command(["completions", "zsh"]);
    shell.args(["-c", "(\"$0\" completions zsh; echo $? >&2) | true"]).arg(program.get_program());
    let outcome = finish(spawn(shell));
    assert_eq!(outcome.stderr, "0\n");
}
