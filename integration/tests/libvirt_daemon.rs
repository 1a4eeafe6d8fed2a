//! R03: libvirtd ends and is started anew. In a file of its own, for its test has to be alone.

use integration::faults::{kinds, noise};
use integration::finish;
use integration::libvirt::{Scene, assert_incremental};
use nix::sys::signal::Signal;
use vm_fixtures::libvirt::Libvirt;

#[test]
fn r03_a_job_lives_on_while_libvirtd_is_started_anew() {
    let Some(libvirt) = Libvirt::alone() else { return };
    let mut scene = Scene::running(&libvirt);
    for (turn, ending) in [Signal::SIGTERM, Signal::SIGKILL].into_iter().enumerate() {
        scene.write("vda", 0, &noise(512 << 10, turn as u64));
        let running = scene.backup_slowly(&[]);
        let job = scene.domain.virsh("backup-dumpxml", &[]);

        libvirt.restart(ending);

        assert_eq!(scene.domain.virsh("backup-dumpxml", &[]), job, "libvirt knows the job again");
        let snapshot = scene.assert_good(&finish(running));
        assert_eq!(kinds(&snapshot)["vda"], "incremental", "{ending}: {snapshot}");
        scene.scribble();
        assert_incremental(&scene.backup(), "bitmap");
        scene.assert_clean();
    }
}
