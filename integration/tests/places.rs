//! Repositories elsewhere: backups over SFTP, S3 and REST, on real servers. R14, S09, S12.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use integration::faults::{Contents, STILL_MAX, assert_says, kinds, wait_until};
use integration::{Host, Running, assert_guest_is_free, finish, spawn};
use vm_fixtures::servers::{REST_PASSWORD, Rest, S3_SECRET, Server};
use vm_fixtures::{Disk, Guest, MIB};

fn machine(size: u64) -> Option<(Guest, Contents)> {
    let guest = Guest::without_os().disk(Disk::new("vda", size)).boot()?;
    Some((guest, Contents::new(&["vda"], size)))
}

/// A full backup, an incremental one, restores, and stock restic's opinion.
fn keeps_backups(server: &Server) {
    let Some((guest, mut contents)) = machine(8 * MIB) else { return };
    let host = Host::with_repository_on(server);
    contents.write_noise(&guest, "vda", 0, 3 << 20, 1);
    let full = host.backup_and_compare(&guest, &contents, &[]);
    assert_eq!(kinds(&full)["vda"], "full");
    contents.scribble(&guest, 2);
    let next = host.backup_and_compare(&guest, &contents, &[]);
    assert_eq!(kinds(&next)["vda"], "incremental");
    assert_guest_is_free(&guest, &["vda"]);
    host.ok(["verify", "--read-data"]);
    host.assert_restic_is_content();
    assert_eq!(host.list().len(), 2);
}

#[test]
fn p7_backups_over_sftp_restore_and_restic_reads_them() {
    let Some(server) = Server::sftp() else { return };
    keeps_backups(&server);
}

#[test]
fn p7_backups_into_s3_restore_and_restic_reads_them() {
    let Some(server) = Server::s3() else { return };
    keeps_backups(&server);
}

#[test]
fn p7_backups_to_a_rest_server_restore_and_restic_reads_them() {
    let Some(server) = Server::rest(Rest::Free) else { return };
    keeps_backups(&server);
}

#[test]
fn s12_where_nothing_can_be_removed_backups_go_on_and_forget_says_why_not() {
    let Some(server) = Server::rest(Rest::AppendOnly) else { return };
    let Some((guest, mut contents)) = machine(4 * MIB) else { return };
    let host = Host::with_repository_on(&server);
    let first = host.backup(&guest, &[]);
    contents.scribble(&guest, 1);
    let next = host.backup_and_compare(&guest, &contents, &[]);
    assert_eq!(kinds(&next)["vda"], "incremental");

    let refused = host.run(["forget", "--snapshot", first["id"].as_str().unwrap()]);

    assert_says(&refused, 1, "cannot remove rest:http://keeper@");
    assert!(refused.stderr.contains("forget and prune where it is kept"), "{refused:?}");
    assert_eq!(host.list().len(), 2);
}

#[test]
fn s09_neither_errors_nor_logs_show_a_password_or_a_key() {
    let Some(server) = Server::rest(Rest::Free) else { return };
    let Some((guest, _)) = machine(4 * MIB) else { return };
    let host = Host::with_repository_on(&server);
    let said = host.try_backup(&guest, &["-v", "-v"]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(!said.stderr.contains(REST_PASSWORD), "{}", said.stderr);
    let mut command = host.command(["list", "-v", "-v"]);
    command.env("KVMSNAP_REST_PASSWORD", "canary");
    let refused = finish(spawn(command));
    assert_says(&refused, 1, "401");
    assert!(!refused.stderr.contains("canary"), "{}", refused.stderr);

    let Some(server) = Server::s3() else { return };
    let host = Host::with_repository_on(&server);
    let said = host.run(["list", "-v", "-v"]);
    assert_eq!(said.code, Some(0), "{said:?}");
    let leaks = |text: &str| text.contains(S3_SECRET) || text.contains("X-Amz-Signature");
    assert!(!leaks(&said.stderr), "{}", said.stderr);
    let mut command = host.command(["list"]);
    command.env("KVMSNAP_REPOSITORY", "rest:http://keeper:canary@127.0.0.1/");
    let refused = finish(spawn(command));
    assert_says(&refused, 2, "must not hold a password");
    assert!(!refused.stderr.contains("canary"), "{}", refused.stderr);
}

#[test]
fn r14_a_server_that_is_away_is_no_repository_for_now() {
    let Some(mut server) = Server::rest(Rest::Free) else { return };
    let host = Host::with_repository_on(&server);
    server.kill();
    let refused = host.run(["list"]);
    assert_says(&refused, 10, "connection refused");
    assert!(refused.took < Duration::from_secs(60), "{refused:?}");
    server.restart();
    host.ok(["list"]);
}

/// The server stands still in the middle of a pack: the guest must not feel it, and only this backup is lost.
fn survives_silence(mut server: Server) {
    let Some((guest, mut contents)) = machine(24 * MIB) else { return };
    let host = Host::with_repository_on(&server);
    host.backup(&guest, &[]);
    contents.write_noise(&guest, "vda", 0, 20 << 20, 1);
    let before = bytes_in(server.folder());
    let slowly = ["--limit-upload", "4MiB", "--server-timeout", "5s"];
    let running = spawn(host.backup_command(&guest, &slowly));
    let mut running = Some(running);
    wait_until(Duration::from_secs(60), "a part of a pack has arrived", || {
        assert!(!running.as_mut().is_some_and(Running::has_ended), "it ended before");
        bytes_in(server.folder()) > before + (256 << 10)
    });

    server.stop();

    for piece in 0..8 {
        let start = Instant::now();
        contents.write(&guest, "vda", piece << 20, 1 << 20, 0x55);
        assert!(start.elapsed() < STILL_MAX, "a write took {:?}", start.elapsed());
    }
    let outcome = finish(running.take().expect("it was started"));
    assert_says(&outcome, 10, server.location());
    assert!(outcome.stderr.contains("try again once it is there"), "{outcome:?}");
    assert!(outcome.took < Duration::from_secs(120), "{outcome:?}");
    assert_guest_is_free(&guest, &["vda"]);
    assert_eq!(host.undo_records(), 0);
    server.resume();
    let next = host.backup_and_compare(&guest, &contents, &[]);
    assert_eq!(kinds(&next)["vda"], "incremental", "{next}");
    assert_eq!(host.list().len(), 2, "nothing half is shown");
    // The lock that could not be taken back is that of a process that is gone.
    host.ok(["prune"]);
    host.assert_restic_is_content();
}

fn bytes_in(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(entry_is) if entry_is.is_dir() => bytes_in(&entry.path()),
        Ok(entry_is) => entry_is.len(),
        // It has just gone, or got its final name.
        Err(_) => 0,
    });
    sizes.sum()
}

#[test]
fn r14_a_rest_server_that_hangs_while_chunks_are_sent_costs_one_backup() {
    let Some(server) = Server::rest(Rest::Free) else { return };
    survives_silence(server);
}

#[test]
fn r14_an_sftp_server_that_hangs_while_chunks_are_sent_costs_one_backup() {
    let Some(server) = Server::sftp() else { return };
    survives_silence(server);
}
