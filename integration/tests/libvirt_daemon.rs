//! R03: libvirtd ends and is started anew. R04: a guest makes it deaf for a while. In a file of their own,
//! for these tests have to be alone.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use integration::faults::{assert_says, kinds, noise, signal, wait_until};
use integration::libvirt::{SIZE, Scene, WAIT, assert_incremental, takes_sockets};
use integration::overlays::files_in;
use integration::{finish, spawn};
use nix::sys::signal::Signal;
use vm_fixtures::libvirt::Libvirt;
use vm_fixtures::{Disk, Guest};

/// How long a run may take to see that its guest is gone and that there is nothing to let go of.
const END_TIMEOUT: Duration = Duration::from_secs(60);

#[test]
fn r03_a_job_lives_on_while_libvirtd_is_started_anew() {
    let Some(libvirt) = Libvirt::alone() else { return };
    let mut scene = Scene::running(&libvirt);
    for (turn, ending) in [Signal::SIGTERM, Signal::SIGKILL].into_iter().enumerate() {
        scene.write("vda", 0, &noise(512 << 10, turn as u64));
        let running = scene.backup_slowly(&[]);
        let job = scene.domain.virsh("backup-dumpxml", &[]);
        assert_eq!(job.contains("transport='fd'"), takes_sockets(&libvirt), "{job}");

        libvirt.stop_daemon(ending);
        // Else it may have read all, and end its job, before libvirt is asked for that.
        signal(running.pid(), Signal::SIGSTOP);
        libvirt.start_daemon();

        assert_eq!(scene.domain.virsh("backup-dumpxml", &[]), job, "libvirt knows the job again");
        signal(running.pid(), Signal::SIGCONT);
        let snapshot = scene.assert_good(&finish(running));
        assert_eq!(kinds(&snapshot)["vda"], "incremental", "{ending}: {snapshot}");
        scene.scribble();
        assert_incremental(&scene.backup(), "bitmap");
        scene.assert_clean();
    }
}

#[test]
fn r03_a_purge_outlives_a_restart_of_libvirtd_or_the_next_one_goes_on() {
    let Some(libvirt) = Libvirt::alone() else { return };
    let mut scene = Scene::running(&libvirt);
    let purge = |scene: &Scene, more: &[&str]| {
        let mut command = scene.host.command(["purge", "--json", scene.domain.name()]);
        command.args(more);
        command
    };
    for (turn, ending) in [Signal::SIGTERM, Signal::SIGKILL].into_iter().enumerate() {
        scene.host.ok(["create", scene.domain.name()]);
        scene.write("vda", 0, &noise(1 << 20, turn as u64));
        let running = spawn(purge(&scene, &["--limit-rate", "1MiB"]));
        wait_until(WAIT, "it writes back", || scene.domain.xml().contains("<mirror"));

        libvirt.restart(ending);

        let outcome = finish(running);
        assert_eq!(scene.domain.state(), "running", "{outcome:?}");
        scene.scribble();
        let next = finish(spawn(purge(&scene, &[])));
        assert_eq!(next.code, Some(0), "{ending}: {outcome:?}, then {next:?}");
        let xml = scene.domain.xml();
        let on_overlay = |disk: &&str| xml.contains(&format!("-{disk}.qcow2'"));
        let is_back = !["vda", "vdb", "vdc"].iter().any(on_overlay);
        assert!(is_back && !xml.contains("<mirror"), "{xml}");
        assert_eq!(files_in(scene.domain.folder(), "kvmsnap-"), Vec::<PathBuf>::new());
        assert_eq!(files_in(&scene.host.state().join("overlays"), ".json"), Vec::<PathBuf>::new());
        // What the guest wrote is all there, and its dirty bitmaps tell of it.
        let snapshot = scene.backup();
        assert_eq!(kinds(&snapshot)["vda"], "incremental", "{ending}: {snapshot}");
        scene.assert_clean();
    }
}

#[test]
fn r04_a_guest_with_an_agent_that_powers_itself_off_in_mid_job_keeps_nobody_waiting() {
    let Some(libvirt) = Libvirt::alone() else { return };
    let plan = Guest::builder().disk(Disk::new("vda", SIZE)).under_libvirt();
    let mut scene = Scene::of(plan, &["vda"], SIZE, &libvirt);
    scene.domain.start();
    assert_eq!(scene.backup()["consistency"], "filesystem");
    scene.write("vda", 0, &noise(2 << 20, 1));
    let running = scene.backup_at("128KiB", &[]);

    scene.domain.spawn_last(&["poweroff", "-f"]);

    let off = Instant::now();
    let outcome = finish(running);
    assert!(off.elapsed() < END_TIMEOUT, "{:?}: {outcome:?}", off.elapsed());
    // QEMU stands still and serves until libvirt ends it, which the agent that has gone may hold up: on a
    // loaded host for longer than the rest of the reading takes. Then the backup is a good one, and is
    // said to be so where the guest ends before it is let go.
    match outcome.code {
        Some(0) => {}
        _ if outcome.stdout.is_empty() => assert_says(&outcome, 1, "died during the backup"),
        _ => assert_says(&outcome, 1, "the backup is good"),
    }
    // libvirt 9.0 waits twice 30 s for a lock that the job of a guest that is gone holds.
    scene.domain.wait_state("shut off");
    scene.write("vda", 3 << 20, &noise(64 << 10, 2));
    let next = scene.backup();
    assert_eq!(next["method"], "offline", "{next}");
    assert_eq!(kinds(&next)["vda"], "incremental", "{next}");
    scene.assert_clean();
    scene.domain.start();
    scene.scribble();
    assert_incremental(&scene.backup(), "bitmap");
    scene.assert_clean();
}
