//! The fixture itself under libvirt: a domain boots, obeys, survives its daemon, and leaves nothing
//! behind.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use vm_fixtures::libvirt::Libvirt;
use vm_fixtures::oracle::{Load, Log, QemuIoTarget, Region, Target, judge, judge_image};
use vm_fixtures::{Disk, FileSystem, Format, Guest, MIB};

#[test]
fn a_domain_boots_writes_restarts_and_leaves_nothing_behind() {
    let Some(libvirt) = Libvirt::start() else { return };
    let plan = Guest::builder()
        .name("web")
        .disk(Disk::new("vda", 64 * MIB).mounted(FileSystem::Ext4))
        .disk(Disk::new("vdb", 8 * MIB))
        .disk(Disk::new("vdc", 8 * MIB).raw());
    let domain = plan.under_libvirt().boot(&libvirt);
    domain.write_file("/mnt/vda/file", b"content");
    domain.sh("sync");
    let log = domain.start_load(&Load::default().count(200), &["vdb", "vdc"]);
    let log = log.wait(Duration::from_secs(300));
    let ping = domain.virsh("qemu-agent-command", &[r#"{"execute":"guest-ping"}"#]);
    assert!(ping.contains("return"), "libvirt has an agent of its own: {ping}");

    domain.shut_down();
    domain.start();

    assert_eq!(domain.read_file("/mnt/vda/file"), b"content");
    domain.reset();
    assert_eq!(domain.read_file("/mnt/vda/file"), b"content");
    domain.powerdown();
    assert_eq!(log.acked(), 200);
    let (vdb, raw) = (domain.disk_path("vdb"), domain.folder().join("vdb.copy"));
    vm_fixtures::run("qemu-img", &["convert".as_ref(), vdb.as_os_str(), raw.as_os_str()]);
    let verdict = judge(&[(0, &raw), (1, &domain.disk_path("vdc"))], &log).unwrap();
    verdict.assert_instant_between(200, 200);
    domain.start();
    let (name, folder) = (domain.name().to_owned(), domain.folder().to_path_buf());
    let pid = domain.pid().expect("it runs");
    drop(domain);
    assert!(fs::read(format!("/proc/{pid}/maps")).map_or(true, |maps| maps.is_empty()));
    assert!(!folder.exists());
    assert!(!libvirt.virsh(&["list", "--all", "--name"]).contains(&name));
    for place in ["/var/log/libvirt/qemu", "/etc/libvirt/qemu", "/run/libvirt/qemu"] {
        for entry in fs::read_dir(place).unwrap() {
            let file = entry.unwrap().file_name().to_string_lossy().into_owned();
            assert!(!file.contains(&name), "{file} is left in {place}");
        }
    }
}

#[test]
fn a_domain_without_an_operating_system_is_written_to_from_outside() {
    let Some(libvirt) = Libvirt::start() else { return };
    let plan = Guest::without_os()
        .disk(Disk::new("vda", 8 * MIB).iothread())
        .disk(Disk::new("vdb", 8 * MIB).raw())
        .disk(Disk::new("sda", 8 * MIB).scsi());
    let domain = plan.under_libvirt().boot(&libvirt);
    for id in ["vda", "vdb"] {
        domain.qemu_io(id, "write -P 0x22 64k 64k");
        domain.qemu_io(id, "read -P 0x22 64k 64k");
        assert!(domain.qemu_io_unchecked(id, "read -P 0x23 64k 64k").contains("verification"));
    }
    let checkpoint = domain.folder().join("checkpoint.xml");
    fs::write(
        &checkpoint,
        "<domaincheckpoint><name>c0</name><disks>\
        <disk name='vda' checkpoint='bitmap'/><disk name='vdb' checkpoint='no'/>\
        <disk name='sda' checkpoint='no'/></disks></domaincheckpoint>",
    )
    .unwrap();
    domain.virsh("checkpoint-create", &[checkpoint.to_str().unwrap()]);
    let target = QemuIoTarget::new(&domain, "sda");
    let regions = [Region { disk: 0, from: 0, to: 8 * MIB }];
    let mut log = Vec::new();
    Load::default().mixed().count(20).run(&regions, &[&target as &dyn Target], &mut log).unwrap();
    domain.attach_disk(&Disk::new("vdc", 4 * MIB));
    domain.qemu_io("vdc", "write -P 0x33 0 64k");
    domain.resize("vdc", 6 * MIB);
    assert!(domain.virsh("domblkinfo", &["vdc"]).contains("6291456"));

    for id in ["sda", "vdc"] {
        domain.qemu_io(id, "flush");
    }
    domain.kill_qemu();
    assert_eq!(domain.state(), "shut off");
    let log = Log::parse(std::str::from_utf8(&log).unwrap()).unwrap();
    let verdict = judge_image(&domain.disk_path("sda"), Format::Qcow2, &log).unwrap();
    verdict.assert_instant_between(20, 20);
    domain.start();

    assert!(domain.bitmaps("vda").is_empty(), "one that was never saved is not there");
    assert_eq!(domain.virsh("checkpoint-list", &["--name"]).trim(), "c0");
    domain.qemu_io("vdc", "read -P 0x33 0 64k");
}

#[test]
fn a_domain_that_was_made_of_another_goes_away_with_it() {
    let Some(libvirt) = Libvirt::start() else { return };
    let first = Guest::without_os().disk(Disk::new("vda", MIB)).under_libvirt().boot(&libvirt);
    first.qemu_io("vda", "write -P 0x44 0 64k");
    first.shut_down();
    let name = format!("{}-restored", first.name());
    let xml = first.xml().replace(first.name(), &name);
    let xml = xml.replace(&first.uuid(), "6b1f2a54-3a1b-4d0a-9d5e-0c7f5a2e9b11");
    let file = first.folder().join("restored.xml");
    fs::write(&file, xml).unwrap();
    libvirt.virsh(&["define", file.to_str().unwrap()]);

    let second = first.successor(&name);

    second.start();
    second.qemu_io("vda", "read -P 0x44 0 64k");
    assert_eq!(first.state(), "shut off");
    drop(first);
    assert_eq!(second.state(), "running");
    drop(second);
    assert!(!libvirt.virsh(&["list", "--all", "--name"]).contains(&name));
}

#[test]
fn machines_live_on_while_their_daemon_is_killed_and_started() {
    let Some(libvirt) = Libvirt::alone() else { return };
    let domain = Guest::without_os().disk(Disk::new("vda", MIB)).under_libvirt().boot(&libvirt);
    let pid = domain.pid().expect("it runs");
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        libvirt.stop_daemon(signal);
        assert!(libvirt.try_virsh(&["uri"]).is_err());
        libvirt.start_daemon();
        assert_eq!(domain.pid(), Some(pid));
        assert_eq!(domain.state(), "running");
        domain.qemu_io("vda", "write -P 0x22 0 64k");
    }
    libvirt.stop_daemon(Signal::SIGTERM);
    let folder = domain.folder().to_path_buf();
    drop(domain);
    assert!(!folder.exists() && fs::read(format!("/proc/{pid}/maps")).is_err());
}

#[test]
fn a_domain_with_firmware_and_tpm_boots() {
    let Some(libvirt) = Libvirt::start() else { return };
    let plan = Guest::builder().disk(Disk::new("vda", 64 * MIB).mounted(FileSystem::Ext4));
    let domain = plan.under_libvirt().uefi().tpm().boot(&libvirt);
    domain.sh("test -d /sys/firmware/efi");
    assert!(domain.folder().join("nvram.fd").is_file());
    let state = format!("/var/lib/libvirt/swtpm/{}", domain.uuid());
    assert!(Path::new(&state).is_dir());
    drop(domain);
    assert!(!Path::new(&state).exists());
}

/// The part of the next test that is killed: this same test, started again.
const VICTIM: &str = "VM_FIXTURES_LIBVIRT_VICTIM";

#[test]
fn the_domain_of_a_killed_test_is_swept_by_the_next() {
    let Some(libvirt) = Libvirt::start() else { return };
    if let Some(answer) = std::env::var_os(VICTIM) {
        let domain = Guest::without_os().disk(Disk::new("vda", MIB)).under_libvirt().boot(&libvirt);
        let answer = Path::new(&answer);
        fs::write(answer.with_extension("new"), domain.name()).unwrap();
        fs::rename(answer.with_extension("new"), answer).unwrap();
        std::thread::sleep(Duration::from_secs(400));
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let answer = folder.path().join("answer");
    let mut victim = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_domain_of_a_killed_test_is_swept_by_the_next"])
        .env(VICTIM, &answer)
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(300);
    while !answer.exists() {
        assert!(Instant::now() < deadline, "the victim has started a domain");
        std::thread::sleep(Duration::from_millis(20));
    }
    let name = fs::read_to_string(&answer).unwrap();
    // From its end on any other test may sweep it.
    assert!(libvirt.virsh(&["list", "--name"]).contains(&name));
    victim.kill().unwrap();
    victim.wait().unwrap();

    let next = Libvirt::start().expect("it was there before");

    assert!(!next.virsh(&["list", "--all", "--name"]).contains(&name));
}
