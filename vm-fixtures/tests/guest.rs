//! The fixture itself: a guest boots, obeys, and leaves nothing behind.

use std::time::{Duration, Instant};
use std::{fs, path::Path};

use serde_json::json;
use vm_fixtures::{Disk, FileSystem, Guest, MIB, XFS_SIZE_MIN};

#[test]
fn a_guest_boots_runs_programs_and_keeps_its_files() {
    let plan = Guest::builder()
        .disk(Disk::new("root", 64 * MIB).mounted(FileSystem::Ext4))
        .disk(Disk::new("data", XFS_SIZE_MIN).raw().scsi().mounted(FileSystem::Xfs));
    let Some(guest) = plan.boot() else { return };
    assert!(guest.boot_time() < Duration::from_secs(300), "{:?}", guest.boot_time());
    assert!(guest.is_running());
    assert_eq!(guest.exec(&["sh", "-c", "echo out; echo err >&2; exit 3"]).code, 3);
    guest.write_file("/mnt/root/file", b"ext4");
    guest.write_file("/mnt/data/file", b"xfs");
    guest.sh("sync");

    guest.restart();

    assert_eq!(guest.read_file("/mnt/root/file"), b"ext4");
    assert_eq!(guest.read_file("/mnt/data/file"), b"xfs");
    guest.sh("mount | grep -q '/dev/vda on /mnt/root type ext4'");
    guest.sh("mount | grep -q '/dev/sda on /mnt/data type xfs'");
    assert_eq!(guest.device_file("data"), "/dev/sda");
    let images = guest.shut_down();
    assert_eq!(images, [guest.disk_path("root"), guest.disk_path("data")]);
    vm_fixtures::run("qemu-img", &["check".as_ref(), images[0].as_os_str()]);
}

#[test]
fn the_fixtures_agent_works_while_file_systems_are_frozen() {
    let plan = Guest::builder().disk(Disk::new("vda", 64 * MIB).mounted(FileSystem::Ext4));
    let Some(guest) = plan.boot() else { return };
    let mut agent = TestAgent::connect(&guest.qga());
    assert_eq!(agent.execute("guest-fsfreeze-freeze"), json!(1));
    assert_eq!(agent.execute("guest-fsfreeze-status"), json!("frozen"));

    let writer = guest.spawn(&["sh", "-c", "echo late > /mnt/vda/late && sync"]);
    assert_eq!(guest.sh("echo alive"), "alive\n");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(guest.poll(writer), None, "a frozen file system holds writers back");

    assert_eq!(agent.execute("guest-fsfreeze-thaw"), json!(1));
    let deadline = Instant::now() + Duration::from_secs(30);
    while guest.poll(writer).is_none() {
        assert!(Instant::now() < deadline, "the writer goes on after the thaw");
    }
}

#[test]
fn a_machine_without_an_operating_system_writes_through_its_devices() {
    let plan = Guest::without_os()
        .disk(Disk::new("vda", 8 * MIB).iothread())
        .disk(Disk::new("vdb", 8 * MIB).raw().without_device_id())
        .disk(Disk::new("sda", 8 * MIB).scsi().throttle("x-iops-total=10000"));
    let Some(machine) = plan.boot() else { return };
    for id in ["vda", "vdb", "sda"] {
        machine.qemu_io(id, "write -P 0x22 64k 64k");
        machine.qemu_io(id, "read -P 0x22 64k 64k");
        assert!(machine.qemu_io_unchecked(id, "read -P 0x23 64k 64k").contains("verification"));
    }
    let failing = || machine.qemu_io("vda", "read -P 0x23 64k 64k");
    let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(failing));
    assert!(failed.is_err(), "a pattern that is not there is a failure");
    assert_eq!(machine.active_node("sda"), "sda-throttle");
    assert_eq!(machine.active_node("vdb"), "vdb-format");
    let args = json!({"node": "vda-format", "name": "b0", "persistent": true});
    machine.qmp_command("block-dirty-bitmap-add", &args);
    machine.qemu_io("vda", "write -P 0x33 0 64k");

    machine.restart();

    let bitmaps = machine.bitmaps("vda-format");
    assert_eq!(bitmaps.len(), 1);
    assert_eq!(bitmaps[0]["count"], json!(65536));
    machine.kill();
    assert!(!machine.is_running());
    machine.restart();
    assert_eq!(machine.bitmaps("vda-format")[0]["inconsistent"], json!(true));
}

#[test]
fn a_guest_is_reset_paused_and_powered_off() {
    let Some(guest) = Guest::builder().disk(Disk::new("vda", MIB)).boot() else { return };
    guest.write_file("/tmp/gone", b"after a reset");
    guest.pause();
    assert_eq!(guest.status(), "paused");
    guest.resume();
    guest.reset();
    assert!(!guest.exec(&["test", "-e", "/tmp/gone"]).success());
    guest.powerdown();
    assert!(guest.ended().expect("QEMU ended with its guest").success());
}

#[test]
fn a_dropped_guest_leaves_no_process_and_no_files() {
    let Some(machine) = Guest::without_os().disk(Disk::new("vda", MIB)).boot() else { return };
    let (pid, folder) = (machine.pid(), machine.folder().to_path_buf());
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    drop(machine);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert!(!folder.exists());
}

/// The agent as the program under test reaches it.
struct TestAgent {
    stream: std::os::unix::net::UnixStream,
}

impl TestAgent {
    fn connect(socket: &Path) -> Self {
        let stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        Self { stream }
    }

    fn execute(&mut self, command: &str) -> serde_json::Value {
        use std::io::{BufRead as _, BufReader, Write as _};
        let request = json!({"execute": command});
        self.stream.write_all(format!("{request}\n").as_bytes()).unwrap();
        let mut line = String::new();
        BufReader::new(&self.stream).read_line(&mut line).unwrap();
        let reply: serde_json::Value = serde_json::from_str(&line).unwrap();
        reply["return"].clone()
    }
}

#[test]
fn an_existing_image_is_a_disk_of_another_guest() {
    let Some(first) = Guest::without_os().disk(Disk::new("vda", MIB)).boot() else { return };
    first.qemu_io("vda", "write -P 0x44 0 64k");
    let image = first.shut_down().remove(0);
    let disk = Disk::existing("vda", &image, vm_fixtures::Format::Qcow2);
    let second = Guest::without_os().disk(disk).boot().expect("QEMU is there");
    second.qemu_io("vda", "read -P 0x44 0 64k");
    second.quit();
    assert!(fs::exists(&image).unwrap(), "an existing image stays");
}

/// The part of the next test that is killed: this same test, started again.
const VICTIM: &str = "VM_FIXTURES_TEST_VICTIM";

#[test]
fn a_killed_test_leaves_no_qemu() {
    if let Some(answer) = std::env::var_os(VICTIM) {
        // The machine must outlive the thread that started it, and end with the process.
        let start = || Guest::without_os().disk(Disk::new("vda", MIB)).boot();
        let machine = std::thread::spawn(start).join().unwrap().expect("QEMU is there");
        let text = format!("{} {}", machine.pid(), machine.folder().display());
        std::thread::sleep(Duration::from_millis(200));
        assert!(machine.is_running());
        fs::write(Path::new(&answer).with_extension("new"), text).unwrap();
        fs::rename(Path::new(&answer).with_extension("new"), &answer).unwrap();
        std::thread::sleep(Duration::from_secs(60));
        return;
    }
    if !vm_fixtures::qemu_available() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let answer = folder.path().join("answer");
    let mut victim = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_killed_test_leaves_no_qemu"])
        .env(VICTIM, &answer)
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(50);
    while !answer.exists() {
        assert!(Instant::now() < deadline, "the victim has started a machine");
        std::thread::sleep(Duration::from_millis(20));
    }
    victim.kill().unwrap();
    victim.wait().unwrap();
    let text = fs::read_to_string(&answer).unwrap();
    let (pid, left) = text.split_once(' ').unwrap();
    // An orphan's remains are reaped by somebody else: gone, or without a memory map, is dead.
    let maps = format!("/proc/{pid}/maps");
    while fs::read(&maps).is_ok_and(|maps| !maps.is_empty()) {
        assert!(Instant::now() < deadline, "QEMU has ended with its test");
        std::thread::sleep(Duration::from_millis(20));
    }
    fs::remove_dir_all(left).unwrap();
}
