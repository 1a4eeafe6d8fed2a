//! R02, R05, R12, R16, R25, R30: QEMU dies or hangs, several runs at once, tight limits, unusual machines.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use integration::faults::{
    Contents, STILL_MAX, assert_goes_on, assert_says, kinds, noise, signal, wait_for_export,
    wait_until,
};
use integration::{Host, Outcome, assert_guest_is_free, finish, spawn, tool};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vm_fixtures::oracle::Load;
use vm_fixtures::{Disk, Format, Guest, MIB};

/// Long enough for whatever a test waits for on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

fn machine(size: u64) -> Option<(Guest, Contents)> {
    let guest = Guest::without_os().disk(Disk::new("vda", size)).boot()?;
    Some((guest, Contents::new(&["vda"], size)))
}

fn kind(snapshot: &Value) -> String {
    kinds(snapshot).remove("vda").expect("the disk is in the snapshot")
}

// ---- R02, R12: QEMU -----------------------------------------------------------------------------

/// Bytes that QEMU has read from files and sockets, as the kernel counts them.
fn bytes_read_by(pid: u32) -> u64 {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).expect("a process of ours");
    let line = io.lines().find_map(|line| line.strip_prefix("rchar: ")).expect("proc_pid_io(5)");
    line.trim().parse().expect("a number")
}

#[test]
fn r02_qemu_dies_at_each_tenth_reply_and_the_run_says_so() {
    if !vm_fixtures::qemu_available() {
        return;
    }
    thread::scope(|scope| {
        for worker in 0..3 {
            scope.spawn(move || {
                let (guest, mut contents) = machine(DISK_LEN as u64).expect("QEMU is there");
                let host = Host::new();
                host.backup(&guest, &[]);
                for reply in (0..REPLIES).step_by(10).skip(worker).step_by(3) {
                    dies_at(reply, &host, &guest, &mut contents);
                }
                host.assert_restic_is_content();
            });
        }
    });
}

/// So many answers, each as long as kvmsnap asks of QEMU 7.2.
const REPLIES: usize = 100;
const REPLY_LEN: usize = 64 << 10;
/// A disk of twice as many: on a busy machine there is time to end QEMU before the last one.
const DISK_LEN: usize = 2 * REPLIES * REPLY_LEN;

fn dies_at(reply: usize, host: &Host, guest: &Guest, contents: &mut Contents) {
    contents.write(guest, "vda", 0, DISK_LEN, 100 + reply as u8);
    guest.qemu_io("vda", "flush");
    let before = host.list().len();
    let pid = guest.pid();
    // Before the run, which does not wait for whoever looks at it.
    let until = bytes_read_by(pid) + (reply * REPLY_LEN) as u64;
    let mut running = spawn(host.backup_command(guest, &["--limit-read", "8MiB"]));
    wait_for_export(guest, &mut running);
    wait_until(PATIENCE, "QEMU reads", || {
        assert!(!running.has_ended(), "the backup ended at reply {reply}");
        bytes_read_by(pid) >= until
    });

    guest.kill();

    let outcome = finish(running);
    assert_says(&outcome, 1, "died during the backup");
    assert!(outcome.stderr.contains("nothing was recorded"), "{outcome:?}");
    assert_eq!(host.list().len(), before, "at reply {reply}");
    guest.restart();
    contents.scribble(guest, reply);
    let next = host.backup_and_compare(guest, contents, &[]);
    assert_eq!(kind(&next), "rescan", "at reply {reply}: {next}");
    host.assert_all_clean(guest, &["vda"]);
    contents.scribble(guest, reply + 1);
    let next = host.backup_and_compare(guest, contents, &[]);
    assert_eq!(kind(&next), "incremental", "at reply {reply}: {next}");
    host.assert_all_clean(guest, &["vda"]);
}

#[test]
fn r02_doctor_forgets_a_run_whose_qemu_is_gone() {
    let Some((guest, mut contents)) = machine(4 * MIB) else { return };
    let host = Host::new();
    contents.write(&guest, "vda", 0, 4 << 20, 1);
    guest.qemu_io("vda", "flush");
    let mut running = spawn(host.backup_command(&guest, &["--limit-read", "1MiB"]));
    wait_for_export(&guest, &mut running);
    guest.kill();
    assert_says(&finish(running), 1, "died during the backup");

    assert_says(&host.run(["doctor"]), 1, "left something behind");
    host.ok(["doctor", "--repair"]);
    host.ok(["doctor"]);

    host.assert_nothing_left();
    guest.restart();
    assert_eq!(kind(&host.backup_and_compare(&guest, &contents, &[])), "full");
    host.assert_all_clean(&guest, &["vda"]);
}

#[test]
fn r12_a_qemu_that_hangs_fails_the_run_in_time_and_the_next_run_mends() {
    let Some((guest, mut contents)) = machine(16 * MIB) else { return };
    let host = Host::new();
    contents.scribble(&guest, 1);
    host.backup(&guest, &[]);
    contents.write(&guest, "vda", 0, 16 << 20, 2);
    let more = ["--limit-read", "4MiB", "--timeout", "2"];
    let mut running = spawn(host.backup_command(&guest, &more));
    wait_for_export(&guest, &mut running);
    let pid = guest.pid();
    let start = bytes_read_by(pid);
    wait_until(PATIENCE, "QEMU reads", || {
        assert!(!running.has_ended(), "it is slow");
        bytes_read_by(pid) >= start + (1 << 20)
    });

    guest.signal(Signal::SIGSTOP);
    let stopped = Instant::now();
    let outcome = finish(running);
    let took = stopped.elapsed();
    guest.signal(Signal::SIGCONT);

    // Whichever was silent first: the export, or the monitor, which is asked for the guest's latency.
    let waited = ["no progress for 2.", "no answer to `query-blockstats` within 2s"];
    assert_says(&outcome, 1, "");
    assert!(waited.iter().any(|words| outcome.stderr.contains(words)), "{outcome:?}");
    // That, and once the monitor's deadline, through which it tries to let go; on a busy machine somewhat more.
    assert!(took < Duration::from_secs(2 + 2 + 16), "{took:?}: {outcome:?}");
    assert_goes_on(&guest);
    assert_eq!(host.undo_records(), 1);
    let next = host.backup_and_compare(&guest, &contents, &[]);
    assert_eq!(kind(&next), "incremental", "{next}");
    host.assert_all_clean(&guest, &["vda"]);
    host.assert_restic_is_content();
}

#[test]
fn r01_killed_while_data_is_on_its_way_the_next_run_is_as_if_nothing_had_been() {
    let Some((guest, mut contents)) = machine(32 * MIB) else { return };
    let host = Host::new();
    host.backup(&guest, &[]);
    for (turn, more) in [&[][..], &["--implicit-filter"]].into_iter().cycle().take(8).enumerate() {
        contents.write(&guest, "vda", 0, 32 << 20, 1 + turn as u8);
        kill_at(turn as u64 * (4 << 20), &host, &guest, more);
        assert_goes_on(&guest);
        contents.scribble(&guest, turn);
        let next = host.backup_and_compare(&guest, &contents, more);
        assert_eq!(kind(&next), "incremental", "{next}");
        host.assert_all_clean(&guest, &["vda"]);
    }
    host.assert_restic_is_content();
}

#[test]
fn r01_killed_while_it_reads_a_disk_with_an_io_thread_that_a_guest_writes() {
    let plan = Guest::builder()
        .disk(Disk::new("vda", 32 * MIB).iothread())
        .disk(Disk::new("vdb", 16 * MIB).iothread());
    let Some(guest) = plan.boot() else { return };
    let host = Host::new();
    guest.sh("dd if=/dev/urandom of=/dev/vda bs=1M count=32 conv=fsync 2>/dev/null");
    host.backup(&guest, &[]);
    let load = guest.start_load(&Load::default().mixed().rate(500), &["vdb"]);
    for (turn, more) in [&[][..], &["--implicit-filter"]].into_iter().cycle().take(6).enumerate() {
        guest.sh("dd if=/dev/urandom of=/dev/vda bs=1M count=32 conv=fsync 2>/dev/null");
        kill_at(turn as u64 * (4 << 20), &host, &guest, more);
        assert_goes_on(&guest);
        // With what the killed run left still below the disks.
        guest.sh("dd if=/dev/zero of=/dev/vda bs=1M seek=8 count=4 conv=fsync 2>/dev/null");
        let next = host.backup(&guest, more);
        assert_eq!(next["kind"], "incremental", "{next}");
        host.assert_all_clean(&guest, &["vda", "vdb"]);
    }
    load.stop();
    host.assert_restic_is_content();
}

/// SIGKILL of a backup once QEMU has read so many bytes for it.
fn kill_at(bytes: u64, host: &Host, guest: &Guest, more: &[&str]) {
    let until = bytes_read_by(guest.pid()) + bytes;
    let mut running = spawn(host.backup_command(guest, more));
    wait_until(PATIENCE, "QEMU reads", || {
        running.has_ended()
            || guest.qmp_command("query-block-exports", &json!({})) != json!([])
                && bytes_read_by(guest.pid()) >= until
    });
    // On a busy host it may have come to its end between two looks.
    if !running.has_ended() {
        signal(running.pid(), Signal::SIGKILL);
    }
    finish(running);
}

// ---- R16: several at once -----------------------------------------------------------------------

#[test]
fn r16_p6_of_several_backups_of_one_guest_one_works_and_the_others_say_who_does() {
    let Some((guest, mut contents)) = machine(8 * MIB) else { return };
    let host = Host::new();
    contents.write(&guest, "vda", 0, 8 << 20, 1);
    let mut first = spawn(host.backup_command(&guest, &["--limit-read", "4MiB"]));
    wait_for_export(&guest, &mut first);
    // It does not come to its end before the others have been told.
    signal(first.pid(), Signal::SIGSTOP);

    let others: Vec<_> = (0..3).map(|_| spawn(host.backup_command(&guest, &[]))).collect();
    for other in others {
        assert_says(&finish(other), 11, &format!("process {}", first.pid()));
    }
    // Also under another name of its socket.
    let link = host.folder().join("other-name.sock");
    std::os::unix::fs::symlink(guest.qmp(), &link).expect("a new link");
    let mut command = host.command(["backup", "--qmp"]);
    command.arg(&link);
    assert_says(&finish(spawn(command)), 11, &format!("process {}", first.pid()));
    let doctor = host.run(["doctor"]);
    assert_eq!(doctor.code, Some(0), "{doctor:?}");
    assert!(doctor.stdout.contains("a backup is running"), "{doctor:?}");

    signal(first.pid(), Signal::SIGCONT);
    assert_eq!(finish(first).code, Some(0));
    host.assert_all_clean(&guest, &["vda"]);

    // Nobody is first.
    for turn in 0..4 {
        contents.scribble(&guest, turn);
        let all: Vec<_> = (0..4).map(|_| spawn(host.backup_command(&guest, &[]))).collect();
        let pids: Vec<String> = all.iter().map(|one| one.pid().to_string()).collect();
        let all: Vec<Outcome> = all.into_iter().map(finish).collect();
        assert!(all.iter().any(|one| one.code == Some(0)), "{all:?}");
        for refused in all.iter().filter(|one| one.code != Some(0)) {
            assert_says(refused, 11, "another kvmsnap");
            assert!(pids.iter().any(|pid| refused.stderr.contains(pid)), "{refused:?}");
        }
        host.assert_holds(host.list().last().expect("there are snapshots"), &contents);
        host.assert_all_clean(&guest, &["vda"]);
    }
    host.assert_restic_is_content();
}

#[test]
fn r16_p6_two_guests_go_into_one_repository_at_once() {
    let machine = |name: &str| {
        let guest = Guest::without_os().name(name).disk(Disk::new("vda", 8 * MIB)).boot()?;
        Some((guest, Contents::new(&["vda"], 8 * MIB)))
    };
    let Some((one, mut of_one)) = machine("one") else { return };
    let Some((other, mut of_other)) = machine("other") else { return };
    let host = Host::new();
    for turn in 0..3 {
        // Half of it is the same on both, so that both store the same chunks at the same time.
        of_one.write_noise(&one, "vda", 0, 4 << 20, 100 + turn);
        of_other.write_noise(&other, "vda", 0, 4 << 20, 100 + turn);
        of_one.write_noise(&one, "vda", 4 << 20, 1 << 20, 200 + turn);
        of_other.write_noise(&other, "vda", 4 << 20, 1 << 20, 300 + turn);

        let both = [&one, &other].map(|guest| spawn(host.backup_command(guest, &[])));
        let both = both.map(finish);

        for (outcome, contents) in both.iter().zip([&of_one, &of_other]) {
            assert_eq!(outcome.code, Some(0), "{outcome:?}");
            let snapshot: Value = serde_json::from_str(&outcome.stdout).expect("a JSON object");
            assert_eq!(kind(&snapshot), if turn == 0 { "full" } else { "incremental" });
            host.assert_holds(&snapshot, contents);
        }
    }
    assert_eq!(host.list().len(), 6);
    host.assert_all_clean(&one, &["vda"]);
    host.assert_all_clean(&other, &["vda"]);
    host.assert_restic_is_content();
}

/// Lock files; restic writes each under another name first.
fn locks(host: &Host) -> usize {
    let locks = fs::read_dir(host.repository().join("locks")).expect("a repository");
    locks.flatten().filter(|entry| entry.file_name().len() == 64).count()
}

#[test]
fn r16_stock_restic_removes_nothing_while_we_write_and_we_wait_for_nobody() {
    let Some((guest, mut contents)) = machine(8 * MIB) else { return };
    let host = Host::new();
    contents.write(&guest, "vda", 0, 8 << 20, 1);
    host.backup(&guest, &[]);
    contents.write(&guest, "vda", 0, 8 << 20, 2);
    let mut running = spawn(host.backup_command(&guest, &["--limit-read", "4MiB"]));
    wait_for_export(&guest, &mut running);
    // Its lock stays meanwhile, however long that takes.
    signal(running.pid(), Signal::SIGSTOP);

    for arguments in [&["prune"][..], &["forget", "--keep-last", "1", "--prune"]] {
        let outcome = finish(spawn(host.restic_command(arguments)));
        assert_ne!(outcome.code, Some(0), "{outcome:?}");
        assert!(outcome.stderr.contains("already locked"), "{outcome:?}");
    }
    assert!(!running.has_ended(), "the backup was to run all the while");
    signal(running.pid(), Signal::SIGCONT);
    assert_eq!(finish(running).code, Some(0));
    assert_eq!(host.list().len(), 2);

    // Now restic holds an exclusive lock, for as long as it stands still; it reads a KiB a second.
    let pruning = spawn(host.restic_command(&["prune", "--limit-download", "1"]));
    wait_until(PATIENCE, "restic has its lock", || locks(&host) > 0);
    signal(pruning.pid(), Signal::SIGSTOP);
    let outcome = host.try_backup(&guest, &[]);
    assert_says(&outcome, 11, &format!("{}", pruning.pid()));
    assert_guest_is_free(&guest, &["vda"]);
    assert_eq!(host.undo_records(), 0);
    assert_eq!(locks(&host), 1, "only restic's own lock is there");

    // Its owner dies: the lock binds nobody any more (R18).
    signal(pruning.pid(), Signal::SIGKILL);
    finish(pruning);
    let next = host.backup_and_compare(&guest, &contents, &[]);
    assert_eq!(kind(&next), "incremental", "{next}");
    host.assert_all_clean(&guest, &["vda"]);
    host.assert_restic_is_content();
}

// ---- R25: limits --------------------------------------------------------------------------------

/// A backup under a limit of `prlimit(1)`.
fn backup_limited(host: &Host, guest: &Guest, limit: &str) -> Outcome {
    let backup = host.backup_command(guest, &[]);
    let mut limited = Command::new("prlimit");
    limited.arg(limit).arg(backup.get_program()).args(backup.get_args());
    limited.envs(backup.get_envs().filter_map(|(name, value)| Some((name, value?))));
    finish(spawn(limited))
}

#[test]
fn r25_tight_limits_fail_clearly_and_damage_nothing() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let (raw, image) = (place.path().join("vda.raw"), place.path().join("vda.qcow2"));
    let data = noise(4 << 20, 5);
    fs::write(&raw, &data).expect("a temporary file");
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-q", "-f", "raw", "-O", "qcow2"]).arg(&raw).arg(&image);
    tool(convert);
    let disk = Disk::existing("vda", &image, Format::Qcow2);
    let Some(guest) = Guest::without_os().disk(disk).boot() else { return };
    let mut contents = Contents::new(&["vda"], 4 * MIB);
    contents.note("vda", 0, &data);
    let host = Host::new();
    host.backup(&guest, &[]);
    let check = |limit: &str, outcome: &Outcome| {
        assert_ne!(outcome.code, Some(101), "{limit}: {outcome:?}");
        assert!(!outcome.stderr.contains("panicked"), "{limit}: {outcome:?}");
        assert_goes_on(&guest);
        if outcome.code.is_some() && host.undo_records() == 0 {
            assert_guest_is_free(&guest, &["vda"]);
        }
    };

    // A scratch file, then a pack, that may not become as large as it has to.
    for (turn, limit) in [16 << 10, 4 << 20].into_iter().enumerate() {
        contents.write_noise(&guest, "vda", 0, 4 << 20, 50 + turn as u64);
        let limit = format!("--fsize={limit}");
        let outcome = backup_limited(&host, &guest, &limit);
        assert_says(&outcome, 1, "file too large");
        check(&limit, &outcome);
        host.assert_nothing_left();
    }
    for files in [8, 16, 32, 63, 64] {
        contents.scribble(&guest, files);
        let limit = format!("--nofile={files}");
        let outcome = backup_limited(&host, &guest, &limit);
        match files {
            64.. => assert_eq!(outcome.code, Some(0), "{outcome:?}"),
            _ => assert_says(&outcome, 1, &format!("only {files} open files are allowed")),
        }
        check(&limit, &outcome);
    }
    // With less not even the shared libraries load, which the loader says itself.
    for mebibytes in [128, 256, 511, 512] {
        contents.scribble(&guest, mebibytes);
        let limit = format!("--as={}", mebibytes << 20);
        let outcome = backup_limited(&host, &guest, &limit);
        match mebibytes {
            512.. => assert_eq!(outcome.code, Some(0), "{outcome:?}"),
            _ => assert_says(&outcome, 1, "address space"),
        }
        check(&limit, &outcome);
    }
    for mebibytes in [8, 96, 255, 256] {
        contents.scribble(&guest, mebibytes);
        let limit = format!("--data={}", mebibytes << 20);
        let outcome = backup_limited(&host, &guest, &limit);
        match mebibytes {
            256.. => assert_eq!(outcome.code, Some(0), "{outcome:?}"),
            _ => assert_says(&outcome, 1, "bytes of memory"),
        }
        check(&limit, &outcome);
    }
    let next = host.backup_and_compare(&guest, &contents, &[]);
    assert_eq!(kind(&next), "incremental", "{next}");
    host.assert_all_clean(&guest, &["vda"]);
    host.assert_restic_is_content();
}

// ---- R05: the guest leaves ----------------------------------------------------------------------

/// A second QEMU of the same machine, that waits for its guest at a socket.
fn migration_target(guest: &Guest, disks: &[&str], uri: &str) -> Guest {
    let existing = |id: &&str| Disk::existing(id, &guest.disk_path(id), Format::Qcow2);
    let plan = Guest::without_os().name(guest.name()).uuid(guest.uuid());
    let plan = disks.iter().map(existing).fold(plan, vm_fixtures::GuestBuilder::disk);
    plan.args(["-incoming", uri]).boot().expect("QEMU is there")
}

#[test]
fn r05_a_migration_wins_and_the_guest_stays_incremental() {
    const DISKS: [&str; 2] = ["vda", "vdb"];
    for more in [&[][..], &["--implicit-filter"]] {
        let disks = DISKS.map(|id| Disk::new(id, 4 * MIB));
        let plan = disks.into_iter().fold(Guest::without_os(), vm_fixtures::GuestBuilder::disk);
        let Some(guest) = plan.boot() else { return };
        let (host, mut contents) = (Host::new(), Contents::new(&DISKS, 4 * MIB));
        contents.scribble(&guest, 1);
        host.backup_and_compare(&guest, &contents, more);
        contents.write(&guest, "vda", 0, 4 << 20, 2);
        let uri = format!("unix:{}", host.folder().join("incoming").display());
        let target = migration_target(&guest, &DISKS, &uri);
        let limited = [&["--limit-read", "64KiB"], more].concat();
        let mut running = spawn(host.backup_command(&guest, &limited));
        wait_for_export(&guest, &mut running);
        let bandwidth = |bytes: u64| {
            guest.qmp_command("migrate-set-parameters", &json!({"max-bandwidth": bytes}));
        };
        bandwidth(4 << 10);

        guest.qmp_command("migrate", &json!({"uri": uri}));

        let begun = Instant::now();
        wait_until(PATIENCE, "the run ends", || running.has_ended());
        let took = begun.elapsed();
        let outcome = finish(running);
        assert_says(&outcome, 1, "the guest is being migrated");
        assert!(took < 12 * STILL_MAX, "{more:?}: {took:?}: {outcome:?}");
        host.assert_all_clean(&guest, &DISKS);
        assert_eq!(guest.qmp_command("query-migrate", &json!({}))["status"], "active");
        bandwidth(1 << 30);
        wait_until(PATIENCE, "the guest runs there", || target.is_running());
        guest.quit();
        contents.scribble(&target, 3);
        let next = host.backup_and_compare(&target, &contents, more);
        assert!(kinds(&next).values().all(|kind| kind == "incremental"), "{more:?}: {next}");
        host.assert_all_clean(&target, &DISKS);
    }
}

// ---- R30: unusual machines ----------------------------------------------------------------------

#[test]
fn r30_a_paused_guest_is_backed_up_and_stays_paused() {
    let plan = Guest::without_os().disk(Disk::new("vda", 4 * MIB)).disk(Disk::new("vdb", 4 * MIB));
    let Some(guest) = plan.boot() else { return };
    let host = Host::new();
    let mut contents = Contents::new(&["vda", "vdb"], 4 * MIB);
    for (turn, more) in [&[][..], &[], &["--implicit-filter"]].into_iter().enumerate() {
        contents.scribble(&guest, turn);
        guest.pause();
        host.backup_and_compare(&guest, &contents, more);
        assert_eq!(guest.status(), "paused");
        host.assert_nothing_left();
        assert_guest_is_free(&guest, &["vda", "vdb"]);
        guest.resume();
    }
    // The guest pauses in the middle of it.
    contents.write(&guest, "vda", 0, 4 << 20, 9);
    let mut running = spawn(host.backup_command(&guest, &["--limit-read", "4MiB"]));
    wait_for_export(&guest, &mut running);
    guest.pause();
    assert_eq!(finish(running).code, Some(0));
    assert_eq!(guest.status(), "paused");
    // QEMU closes descriptors that it was passed only while the guest runs.
    guest.resume();
    host.backup(&guest, &[]);
    host.assert_all_clean(&guest, &["vda", "vdb"]);
}

#[test]
fn r30_what_is_no_disk_is_left_out_and_nothing_left_is_an_error() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let iso = place.path().join("cd.iso");
    fs::write(&iso, vec![7; 2 << 20]).expect("a temporary file");
    let file = |node: &str| {
        format!("driver=file,node-name={node},filename={},read-only=on", iso.display())
    };
    let others = || {
        Guest::without_os().args([
            "-device".to_owned(),
            "virtio-scsi-pci,id=others".to_owned(),
            "-blockdev".to_owned(),
            file("iso"),
            "-device".to_owned(),
            "scsi-cd,bus=others.0,drive=iso,id=cd0".to_owned(),
            "-device".to_owned(),
            "scsi-cd,bus=others.0,id=empty0".to_owned(),
            "-blockdev".to_owned(),
            file("fixed"),
            "-device".to_owned(),
            "virtio-blk-pci,drive=fixed,id=fixed0".to_owned(),
        ])
    };
    let host = Host::new();
    let Some(none) = Guest::without_os().boot() else { return };
    assert_says(&host.try_backup(&none, &[]), 1, "has no disk to back up");
    host.assert_nothing_left();

    let guest = others().boot().expect("QEMU is there");
    let outcome = host.try_backup(&guest, &[]);
    assert_says(&outcome, 1, "has no disk to back up");
    for reason in ["cd0: it is a removable medium", "empty0: no medium", "fixed0: it is read-only"]
    {
        assert!(outcome.stderr.contains(reason), "{reason}: {outcome:?}");
    }

    let guest = others().disk(Disk::new("vda", MIB)).boot().expect("QEMU is there");
    let snapshot = host.backup(&guest, &[]);
    assert_eq!(kinds(&snapshot).into_keys().collect::<Vec<_>>(), ["vda"]);
    let words = "`cd0` of domain `fixture` is left out: it is a removable medium";
    assert_says(&host.try_backup(&guest, &["--disk", "cd0"]), 2, words);
    host.assert_all_clean(&guest, &["vda"]);
    assert!(host.list().len() == 1);
}

#[test]
fn r30_a_huge_sparse_disk_costs_what_its_data_costs() {
    const SIZE: u64 = 8 << 40;
    let Some(guest) = Guest::without_os().disk(Disk::new("vda", SIZE)).boot() else { return };
    let host = Host::new();
    guest.qemu_io("vda", &format!("write -P 1 {} 1M", SIZE / 2));
    for (turn, expected) in ["full", "incremental", "incremental"].into_iter().enumerate() {
        let outcome = host.try_backup(&guest, &[]);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        assert!(outcome.took < Duration::from_secs(60), "{outcome:?}");
        let made: Value = serde_json::from_str(&outcome.stdout).expect("one JSON object");
        assert_eq!(kind(&made), expected, "{made}");
        let read = made["disks"][0]["bytes_read"].as_u64().expect("a number");
        let audited = made["disks"][0]["bytes_audited"].as_u64().expect("a number");
        assert!(read + audited <= 16 << 20, "{made}");
        guest.qemu_io("vda", &format!("write -P 2 {} 64k", turn * (1 << 40)));
    }
    host.assert_all_clean(&guest, &["vda"]);
}

#[test]
fn r30_empty_tiny_and_absurd_disks_have_a_defined_outcome() {
    let odd = MIB + 512;
    let plan = Guest::without_os()
        .disk(Disk::new("tiny", 512))
        .disk(Disk::new("odd", odd))
        .disk(Disk::new("empty", 0).raw());
    let Some(guest) = plan.boot() else { return };
    let host = Host::new();
    guest.qemu_io("tiny", "write -P 5 0 512");
    guest.qemu_io("odd", &format!("write -P 6 {MIB} 512"));
    for _ in 0..2 {
        let made = host.backup(&guest, &[]);
        let folder = host.restore(made["id"].as_str().expect("an id"));
        assert_eq!(fs::read(folder.join("tiny.raw")).expect("restored"), [5; 512]);
        let restored = fs::read(folder.join("odd.raw")).expect("restored");
        assert_eq!(restored.len() as u64, odd);
        assert!(restored[MIB as usize..].iter().all(|byte| *byte == 6));
        assert_eq!(kinds(&made).len(), 2, "{made}");
    }
    host.assert_all_clean(&guest, &["tiny", "odd"]);
    host.assert_restic_is_content();

    let absurd = Disk::new("vda", 60 << 50).create_options("cluster_size=2M");
    let guest = Guest::without_os().disk(absurd).boot().expect("QEMU is there");
    let outcome = host.try_backup(&guest, &[]);
    assert_says(&outcome, 1, "at most 32 tib");
    assert!(outcome.took < Duration::from_secs(60), "{outcome:?}");
    assert_guest_is_free(&guest, &["vda"]);
    host.assert_nothing_left();
}

#[test]
fn r16_a_monitor_that_somebody_else_uses_is_named() {
    let Some((guest, _)) = machine(MIB) else { return };
    let host = Host::new();
    let held = std::os::unix::net::UnixStream::connect(guest.qmp()).expect("QEMU listens");
    let start = Instant::now();
    let outcome = host.try_backup(&guest, &[]);
    assert_says(&outcome, 1, "hint: qemu serves one client");
    assert!(start.elapsed() < Duration::from_secs(60), "{outcome:?}");
    drop(held);
    host.backup(&guest, &[]);
}
