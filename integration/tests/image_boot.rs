//! Images are started in throw-away machines, and brought back under libvirt.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use integration::faults::{signal, wait_until};
use integration::image_folder::{image_folder, record, sha256};
use integration::{Host, finish, spawn, tool};
use nix::sys::signal::Signal;
use serde_json::Value;
use vm_fixtures::debian::{Debian, Machine};
use vm_fixtures::qemu_available;

/// How long a whole system may take to start: it is emulated, beside others.
const BOOT_SECONDS: &str = "600";
const BOOT_TIMEOUT: Duration = Duration::from_secs(640);

/// An image with nothing on it.
fn empty_image(host: &Host) -> PathBuf {
    let disk = host.folder().join("empty.qcow2");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg("4M");
    tool(create);
    image_folder(&host.folder().join("images/empty"), &disk, &[])
}

/// The QEMUs that have an image open.
fn machines_on(image: &Path) -> Vec<u32> {
    let image = image.to_str().expect("a plain path");
    let entries = fs::read_dir("/proc").expect("Linux").flatten();
    let is_ours = |pid: &u32| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        command.contains("-name kvmsnap-trial") && command.contains(image)
    };
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).filter(is_ours).collect()
}

/// The files of an image that its trial must leave alone, with their checksums.
fn content(image: &Path) -> Vec<(String, String)> {
    let names = ["vda.qcow2", "nvram.fd", "domain.xml"].into_iter();
    let there = names.filter(|name| image.join(name).exists());
    there.map(|name| (name.to_owned(), sha256(&image.join(name)))).collect()
}

/// Tries an image, which must come up, and returns what was printed. `wait` is what is waited for.
#[track_caller]
fn boot(host: &Host, image: &Path, wait: &str) -> Value {
    let before = content(image);
    let mut command = host.command(["image", "boot", "--json", "--deadline", BOOT_SECONDS]);
    command.arg(image).args(["--wait", wait]);
    let mut running = spawn(command);
    wait_until(BOOT_TIMEOUT, "the trial ends", || running.has_ended());
    let outcome = finish(running);
    let log = fs::read_to_string(image.join("boot/console.log")).unwrap_or_default();
    assert_eq!(outcome.code, Some(0), "{outcome:?}\n{log}");

    assert_eq!(content(image), before, "the trial wrote to the image");
    assert!(machines_on(image).is_empty());
    let screen = fs::read(image.join("boot/screen.png")).expect("a picture of the screen");
    assert_eq!(&screen[1..4], b"PNG");
    let left: Vec<_> = fs::read_dir(image.join("boot")).unwrap().flatten().collect();
    assert_eq!(left.len(), 2, "{left:?}");
    serde_json::from_str(&outcome.stdout).expect("one line of JSON")
}

/// A real system shows by its login prompt that it is up, and its image is as it was: also firmware for UEFI gets
/// a copy of the machine's variables.
#[test]
fn a_machine_with_uefi_is_started_with_a_copy_of_its_variables() {
    let Some(debian) = Debian::get() else { return };
    let host = Host::without_repository();
    let variables = fs::read("/usr/share/OVMF/OVMF_VARS_4M.fd").expect("package ovmf");
    let disk = debian.disk(Machine::Uefi);
    let files = [("nvram.fd", variables.as_slice())];
    let image = image_folder(&host.folder().join("images/cedar"), &disk, &files);

    let told = boot(&host, &image, "login");

    assert_eq!(told["boot"]["sign"], "login", "{told}");
    assert_eq!(record(&image)["boot"], told["boot"]);
    assert!(told["boot"]["elapsed_ms"].as_u64() > Some(1000), "{told}");
    let log = fs::read_to_string(image.join("boot/console.log")).expect("a log");
    assert!(log.contains("cedar login:"), "{log}");
}

/// What does not start is told with what can be looked at, noted, and ends in time.
#[test]
fn an_image_that_does_not_start_is_told_within_its_deadline() {
    if !qemu_available() {
        return;
    }
    let host = Host::without_repository();
    let image = empty_image(&host);
    let before = content(&image);

    let path = image.to_str().expect("a plain path");
    let outcome = host.run(["image", "boot", path, "--deadline", "3"]);

    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("did not come up within 3 s"), "{outcome:?}");
    assert!(outcome.stderr.contains("boot/console.log"), "{outcome:?}");
    assert!(machines_on(&image).is_empty());
    assert_eq!(record(&image)["boot"]["sign"], Value::Null);
    assert!(record(&image)["boot"]["elapsed_ms"].is_u64());
    assert!(image.join("boot/screen.png").exists());
    assert_eq!(content(&image), before);
}

/// A machine may start again, as one does whose files SELinux has labelled, but not for ever.
#[test]
fn a_machine_that_starts_again_and_again_has_ended() {
    if !qemu_available() {
        return;
    }
    let host = Host::without_repository();
    // mov dx, 0x3f8; mov al, 'x'; out dx, al; mov al, 0xfe; out 0x64, al; jmp $: says so on its console, and
    // has the keyboard's controller reset the processor.
    let code = b"\xba\xf8\x03\xb0x\xee\xb0\xfe\xe6\x64\xeb\xfe";
    let mut sector = [0; 512];
    sector[..code.len()].copy_from_slice(code);
    sector[510..].copy_from_slice(&[0x55, 0xAA]);
    let raw = host.folder().join("raw");
    fs::write(&raw, [&sector[..], &[0; 512 << 10]].concat()).expect("a folder of ours");
    let disk = host.folder().join("again.qcow2");
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "qcow2"]).args([&raw, &disk]);
    tool(convert);
    let image = image_folder(&host.folder().join("images/again"), &disk, &[]);

    let outcome = host.run(["image", "boot", image.to_str().expect("plain"), "--deadline", "100"]);

    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("ended before it was up"), "{outcome:?}");
    let log = fs::read_to_string(image.join("boot/console.log")).expect("a log");
    assert!(log.matches('x').count() > 1, "it was not let start again");
}

/// A machine on trial never outlives the program, however that ends.
#[test]
fn a_trial_that_is_ended_leaves_no_machine() {
    if !qemu_available() {
        return;
    }
    let host = Host::without_repository();
    let image = empty_image(&host);
    for (how, code) in [(Signal::SIGKILL, None), (Signal::SIGINT, Some(130))] {
        let mut command = host.command(["image", "boot"]);
        // One that is killed leaves its sockets there.
        command.arg(&image).env("TMPDIR", host.folder());
        let running = spawn(command);
        let within = Duration::from_secs(180);
        wait_until(within, "QEMU runs", || machines_on(&image).len() == 1);

        signal(running.pid(), how);

        assert_eq!(finish(running).code, code, "{how}");
        wait_until(within, "QEMU is gone", || machines_on(&image).is_empty());
        assert!(record(&image)["boot"].is_null(), "no trial has ended");
    }
}

/// A hostile image is not given to QEMU.
#[test]
fn s02_an_image_that_names_another_file_is_not_started() {
    if !qemu_available() {
        return;
    }
    let host = Host::without_repository();
    let mut create = Command::new("qemu-img");
    let disk = host.folder().join("hostile.qcow2");
    create.args(["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/passwd"]);
    create.arg(&disk).arg("4M");
    tool(create);
    let image = image_folder(&host.folder().join("images/hostile"), &disk, &[]);

    let outcome = host.run(["image", "boot", image.to_str().expect("a plain path")]);

    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("/etc/passwd"), "{outcome:?}");
    assert!(machines_on(&image).is_empty());
}
