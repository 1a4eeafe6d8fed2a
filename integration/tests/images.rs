//! `kvmsnap image` on files: hostile images, stores, and what becomes of a copy that does not end well.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use integration::faults::{SmallDisk, assert_says, noise, signal, wait_until};
use integration::images::{Tools, content, line, names};
use integration::{Host, Outcome, finish, spawn, tool};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vm_fixtures::MIB;

const WAIT: Duration = Duration::from_secs(120);

/// A host and a store on it.
struct Scene {
    host: Host,
    store: PathBuf,
}

impl Scene {
    fn new() -> Option<Self> {
        vm_fixtures::qemu_available().then(|| {
            let host = Host::without_repository();
            let store = host.folder().join("store");
            Self { host, store }
        })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.host.folder().join(name)
    }

    fn qemu_img(&self, arguments: &[&str]) {
        let mut command = Command::new("qemu-img");
        command.current_dir(self.host.folder()).args(arguments);
        tool(command);
    }

    /// An empty qcow2 image of 1 GiB, made with more arguments.
    fn qcow2(&self, name: &str, more: &[&str]) -> PathBuf {
        self.qemu_img(&[&["create", "-q", "-f", "qcow2"][..], more, &[name, "1G"]].concat());
        self.file(name)
    }

    fn get_command(&self, file: &Path, format: &str, name: &str) -> Command {
        let mut command = self.host.command(["image", "get", "--json", "--format", format]);
        command.args(["--name", name, "--file"]).arg(file).arg("--into").arg(&self.store);
        command
    }

    fn get(&self, file: &Path, format: &str, name: &str) -> Outcome {
        finish(spawn(self.get_command(file, format, name)))
    }

    /// The same, which must succeed; returns the image's folder.
    #[track_caller]
    fn got(&self, file: &Path, format: &str, name: &str) -> PathBuf {
        let outcome = self.get(file, format, name);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        let line = line(&outcome.stdout);
        PathBuf::from(line["folder"].as_str().expect("a folder"))
    }

    fn image(&self, command: &str, of: &Path) -> Outcome {
        let mut built = self.host.command(["image", command, "--json"]);
        built.arg(of);
        finish(spawn(built))
    }

    /// A raw image with some data.
    fn raw(&self, name: &str) -> (PathBuf, Vec<u8>) {
        let content = [noise(3 << 20, 7), vec![0; 2 << 20], noise(1 << 20, 9)].concat();
        fs::write(self.file(name), &content).expect("the folder is writable");
        (self.file(name), content)
    }

    /// An image is refused before any tool has opened it.
    #[track_caller]
    fn assert_refused(&self, file: &Path, words: &str) {
        let tools = Tools::watched(&self.host);
        let outcome = finish(spawn(tools.used_by(self.get_command(file, "qcow2", "hostile"))));
        assert_says(&outcome, 1, "is refused");
        assert!(outcome.stderr.contains(words), "{words}: {outcome:?}");
        assert_eq!(tools.calls(), Vec::<String>::new(), "{words}");
        assert_eq!(names(&self.store), Vec::<String>::new(), "{words}");
    }
}

fn patch(file: &Path, at: u64, bytes: &[u8]) {
    let mut file = fs::File::options().write(true).open(file).expect("an image");
    file.seek(SeekFrom::Start(at)).and_then(|_| file.write_all(bytes)).expect("it is writable");
}

// ---- the story ----------------------------------------------------------------------------------

#[test]
fn p4_a_kept_image_is_listed_and_checked_and_its_damage_is_told_by_its_place() {
    let Some(scene) = Scene::new() else { return };
    let (file, bytes) = scene.raw("json:,=odd name");

    let kept = scene.got(&file, "raw", "web");

    assert_eq!(content(&scene.host, &kept, "vda"), bytes);
    assert_eq!(names(&kept), ["image.json", "vda.qcow2"]);
    let listed = line(&scene.image("list", &scene.store).stdout);
    let info = line(&scene.image("info", &kept).stdout);
    assert_eq!((&listed["name"], &listed), (&json!("web"), &info));
    assert_eq!(info["disks"][0]["size"], json!(6 * MIB));
    assert_eq!(scene.image("check", &kept).code, Some(0));
    assert_says(&scene.get(&file, "raw", "web"), 1, "exists already");

    patch(&kept.join("vda.qcow2"), 2 << 20, b"damage");

    let checked = scene.image("check", &kept);
    assert_says(&checked, 1, "problem");
    let damaged = &line(&checked.stdout)["damaged"];
    assert_eq!(damaged, &json!([[0, 4 * MIB]]));
    fs::remove_file(kept.join("vda.qcow2")).expect("it is there");
    assert!(scene.image("check", &kept).stdout.contains("missing"));
}

#[test]
fn several_files_become_the_disks_of_one_image() {
    let Some(scene) = Scene::new() else { return };
    let (one, bytes) = scene.raw("one");
    fs::write(scene.file("two"), noise(700, 3)).expect("the folder is writable");
    let mut command = scene.get_command(&one, "raw", "web");
    command.arg("--file").arg(scene.file("two"));

    let outcome = finish(spawn(command));

    let kept = scene.store.join("web");
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(content(&scene.host, &kept, "vda"), bytes);
    // QEMU counts in sectors.
    assert_eq!(content(&scene.host, &kept, "vdb"), [noise(700, 3), vec![0; 324]].concat());
    assert_eq!(scene.image("check", &kept).code, Some(0));
}

// ---- hostile images -----------------------------------------------------------------------------

#[test]
fn s01_a_header_that_a_guest_wrote_into_its_raw_disk_opens_nothing() {
    let Some(scene) = Scene::new() else { return };
    fs::write(scene.file("secret"), vec![0x5e; 1 << 20]).expect("the folder is writable");
    let disk = scene.qcow2("disk", &["-b", "secret", "-F", "raw"]);
    let bytes = fs::read(&disk).expect("an image");
    let tools = Tools::watched(&scene.host);

    let outcome = finish(spawn(tools.used_by(scene.get_command(&disk, "raw", "web"))));

    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let kept = content(&scene.host, &scene.store.join("web"), "vda");
    assert_eq!(kept[..bytes.len()], bytes, "the very bytes, not what they name");
    assert_eq!(tools.calls().len(), 2, "{:?}", tools.calls());
    for call in tools.calls() {
        let is_spelled_out = !call.contains("disk\"") || call.contains(r#""driver":"raw""#);
        assert!(is_spelled_out && !call.contains("secret"), "{call}");
    }
}

#[test]
fn s02_images_that_name_other_files_are_refused_before_any_tool_opens_them() {
    let Some(scene) = Scene::new() else { return };
    let names = [
        "/etc/passwd",
        "../../etc/passwd",
        r#"json:{"driver":"file","filename":"/etc/passwd"}"#,
        "nbd://127.0.0.1:1/secret",
        "./hostile",
    ];
    for name in names {
        let image = scene.qcow2("hostile", &["-u", "-b", name, "-F", "raw"]);
        scene.assert_refused(&image, "names an image beneath it");
    }
    let image = scene.qcow2("external", &["-o", "data_file=data,data_file_raw=on"]);
    scene.assert_refused(&image, "keeps its data in another file");
    let image = scene.qcow2("encrypted", &[]);
    patch(&image, 32, &1_u32.to_be_bytes());
    scene.assert_refused(&image, "encrypted");
    let (raw, _) = scene.raw("raw");
    scene.assert_refused(&raw, "no qcow2 image");
    scene.qemu_img(&["create", "-q", "-f", "vmdk", "other", "1M"]);
    scene.assert_refused(&scene.file("other"), "no qcow2 image");
}

#[test]
fn s02_an_image_that_was_made_to_name_others_is_told_and_not_opened() {
    let Some(scene) = Scene::new() else { return };
    let (file, _) = scene.raw("disk");
    let kept = scene.got(&file, "raw", "web");
    scene.qemu_img(&[
        "rebase",
        "-u",
        "-f",
        "qcow2",
        "-b",
        "/etc/passwd",
        "-F",
        "raw",
        "store/web/vda.qcow2",
    ]);
    let tools = Tools::watched(&scene.host);
    let mut check = scene.host.command(["image", "check", "--json"]);
    check.arg(&kept);

    let checked = finish(spawn(tools.used_by(check)));

    assert_says(&checked, 1, "problem");
    assert!(checked.stdout.contains("no tool shall open it"), "{checked:?}");
    assert_eq!(tools.calls(), Vec::<String>::new());
}

#[test]
fn s03_bombs_and_loops_are_refused_before_any_tool_opens_them() {
    let Some(scene) = Scene::new() else { return };
    // Offsets of the header's fields: QEMU's docs/interop/qcow2.txt.
    let fields: [(u64, &[u8], &str); 8] = [
        (24, &u64::MAX.to_be_bytes(), "its size is"),
        (24, &(65_u64 << 40).to_be_bytes(), "its size is"),
        (36, &u32::MAX.to_be_bytes(), "its L1 table is"),
        (40, &(1_u64 << 50).to_be_bytes(), "is not in the file"),
        (56, &u32::MAX.to_be_bytes(), "its refcount table is"),
        (60, &u32::MAX.to_be_bytes(), "its number of snapshots is"),
        (72, &[0xff; 8], "marked as corrupt"),
        (72, &(1_u64 << 40).to_be_bytes(), "features that are not known"),
    ];
    for (at, bytes, words) in fields {
        let image = scene.qcow2("bomb", &[]);
        patch(&image, at, bytes);
        scene.assert_refused(&image, words);
    }
    scene.qcow2("loop", &[]);
    let image = scene.qcow2("loop", &["-u", "-b", "./loop", "-F", "qcow2"]);
    scene.assert_refused(&image, "names an image beneath it");
}

#[test]
fn s03_an_image_that_shows_one_piece_of_data_a_million_times_fills_no_store() {
    let Some(scene) = Scene::new() else { return };
    scene.qemu_img(&["create", "-q", "-f", "qcow2", "bomb", "64G"]);
    let image = scene.file("bomb");
    fs::write(scene.file("piece"), [noise(32 << 10, 5), vec![0; 32 << 10]].concat())
        .expect("a file");
    let mut write = Command::new("qemu-io");
    write.current_dir(scene.host.folder()).args([
        "-f",
        "qcow2",
        "-c",
        "write -c -s piece 0 64k",
        "bomb",
    ]);
    tool(write);
    let bytes = fs::read(&image).expect("an image");
    let entry = |at: usize| bytes[at..at + 8].to_vec();
    let offset = |entry: &[u8]| u64::from_be_bytes(entry.try_into().expect("8 bytes")) & !(1 << 63);
    let l1 = offset(&entry(40));
    let l2 = offset(&entry(usize::try_from(l1).expect("it is small")));
    let piece = entry(usize::try_from(l2).expect("it is small"));
    patch(&image, l2, &piece.repeat(8192));
    patch(&image, l1, &l2.to_be_bytes().repeat(128));

    let outcome = scene.get(&image, "qcow2", "bomb");

    assert_says(&outcome, 1, "file too large");
    assert!(outcome.stderr.contains("more than an honest one does"), "{outcome:?}");
    assert_eq!(names(&scene.store), Vec::<String>::new());
}

#[test]
fn s15_names_stay_in_the_store_and_move_no_cursor() {
    let Some(scene) = Scene::new() else { return };
    let (file, _) = scene.raw("disk");
    let long = "x".repeat(255);
    for name in ["../web", "/web", "..", "a/b", "-rf", "a\nb", "a\u{1b}[2J", "", ".web", &long] {
        let mut command = scene.host.command(["image", "get", "--format", "raw", "--file"]);
        command.arg(&file).arg("--into").arg(&scene.store).arg(format!("--name={name}"));
        let outcome = finish(spawn(command));
        assert_eq!(outcome.code, Some(2), "{name:?}: {outcome:?}");
    }
    assert_eq!(names(&scene.store), Vec::<String>::new());
    let kept = scene.got(&file, "raw", "w e b,=");
    let record = fs::read_to_string(kept.join("image.json")).expect("a record");
    let mut record: Value = serde_json::from_str(&record).expect("JSON");
    record["machine"] = json!("a\u{1b}]0;b\u{7}\u{9b}2J\u{202e}c");
    fs::write(kept.join("image.json"), record.to_string()).expect("it is ours");

    for arguments in
        [["list".as_ref(), scene.store.as_os_str()], ["info".as_ref(), kept.as_os_str()]]
    {
        let printed = scene.host.ok(["image".as_ref(), arguments[0], arguments[1]]);
        let is_bad = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
        assert!(printed.contains("b\\u{7}") && !printed.contains(is_bad), "{printed:?}");
    }

    let mut other = record.clone();
    other["origin"] = json!({"\u{1b}[2J": 1});
    fs::write(kept.join("image.json"), other.to_string()).expect("it is ours");
    let outcome = scene.image("info", &kept);
    assert_says(&outcome, 1, "it is no record");
    assert!(!outcome.stderr.contains('\u{1b}'), "{outcome:?}");
    record["disks"][0]["file"] = json!("../../../etc/passwd");
    fs::write(kept.join("image.json"), record.to_string()).expect("it is ours");
    for command in ["info", "check"] {
        assert_says(&scene.image(command, &kept), 1, "no plain name");
    }
    assert_says(&scene.image("list", &scene.store), 1, "cannot be used");
}

// ---- copies that do not end well ----------------------------------------------------------------

#[test]
fn p5_r29_a_get_that_is_killed_or_fails_anywhere_leaves_no_image_and_the_next_one_is_whole() {
    let Some(scene) = Scene::new() else { return };
    let (file, bytes) = scene.raw("disk");
    let title = "image get of a file";
    let effects = scene.host.golden_effects(title, scene.get_command(&file, "raw", "first"));
    for (n, effect) in effects.iter().enumerate() {
        for (fault, left) in [("KVMSNAP_FAIL_AT", 1), ("KVMSNAP_CRASH_AT", 2)] {
            let mut command = scene.get_command(&file, "raw", "web");
            let outcome = finish(spawn({
                command.env(fault, (n + 1).to_string());
                command
            }));

            assert_ne!(outcome.code, Some(0), "{effect}: {outcome:?}");
            let found = names(&scene.store);
            assert!(
                found.len() <= left && !found.contains(&"web".to_owned()),
                "{effect}: {found:?}"
            );
            let listed = scene.image("list", &scene.store);
            assert_eq!(listed.stdout.lines().count(), 1, "only the first: {listed:?}");
            let tells = listed.stderr.contains("web: a part that a killed run has left");
            assert_eq!(tells, found.contains(&".web.partial".to_owned()), "{effect}: {listed:?}");
        }
    }

    let kept = scene.got(&file, "raw", "web");

    assert_eq!(names(&scene.store), ["first", "web"], "what the killed ones left is gone");
    assert_eq!(content(&scene.host, &kept, "vda"), bytes);
}

#[test]
fn r25_a_copy_ends_with_its_run_however_that_ends() {
    let Some(scene) = Scene::new() else { return };
    let (file, _) = scene.raw("disk");
    for (how, code, left) in [(Signal::SIGINT, Some(130), 0), (Signal::SIGKILL, None, 1)] {
        let tools = Tools::hanging(&scene.host);
        let running = spawn(tools.used_by(scene.get_command(&file, "raw", "web")));
        wait_until(WAIT, "it copies", || tools.hangs().is_some());
        let second = scene.get(&file, "raw", "web");
        assert_says(&second, 1, "another process is writing");

        signal(running.pid(), how);

        assert_eq!(finish(running).code, code, "{how}");
        wait_until(WAIT, "its tool ends", || tools.hangs().is_none());
        assert_eq!(names(&scene.store).len(), left, "{how}: {:?}", names(&scene.store));
    }
}

#[test]
fn p1_a_copy_that_is_not_what_it_should_be_is_not_kept() {
    let Some(scene) = Scene::new() else { return };
    let (file, _) = scene.raw("disk");
    let tools = Tools::lying(&scene.host);

    let outcome = finish(spawn(tools.used_by(scene.get_command(&file, "raw", "web"))));

    assert_says(&outcome, 1, "differs from its source");
    assert_eq!(names(&scene.store), Vec::<String>::new());
}

#[test]
fn r24_a_store_without_room_keeps_nothing_and_says_so() {
    let Some(mut scene) = Scene::new() else { return };
    let (file, _) = scene.raw("disk");
    let small = SmallDisk::mount(&scene.file("small"), 2 * MIB);
    scene.store = small.folder().to_owned();

    let outcome = scene.get(&file, "raw", "web");

    assert_says(&outcome, 1, "no space left");
    assert!(outcome.stderr.contains("make room there"), "{outcome:?}");
    assert_eq!(names(&scene.store), Vec::<String>::new());
    small.resize(16 * MIB);
    scene.got(&file, "raw", "web");
}
