//! R06, R08, R10, R11, R22: what happens to images, scratch and repository below and beside a guest.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use integration::faults::{
    Contents, STILL_MAX, SmallDisk, assert_goes_on, assert_says, kinds, noise, wait_for_export,
};
use integration::{Host, assert_guest_is_free, finish, spawn, tool};
use serde_json::{Value, json};
use vm_fixtures::{Disk, Format, Guest, MIB};

/// A disk of 16 chunks: every unchanged one of them is audited in every backup.
const AUDITED_SIZE: u64 = MIB;

fn machine(size: u64) -> Option<(Guest, Contents)> {
    let guest = Guest::without_os().disk(Disk::new("vda", size)).boot()?;
    Some((guest, Contents::new(&["vda"], size)))
}

fn kind(snapshot: &Value) -> String {
    kinds(snapshot).remove("vda").expect("the disk is in the snapshot")
}

fn reason(snapshot: &Value) -> &str {
    snapshot["disks"][0]["reason"].as_str().unwrap_or_default()
}

fn qemu_img(arguments: &[&str], image: &Path, more: &[&str]) {
    let mut command = Command::new("qemu-img");
    command.args(arguments).arg(image).args(more);
    tool(command);
}

// ---- R06 ----------------------------------------------------------------------------------------

#[test]
fn r06_a_grown_disk_stays_incremental_and_a_shrunk_one_is_read_whole() {
    let Some((guest, mut contents)) = machine(4 * MIB) else { return };
    let host = Host::new();
    contents.scribble(&guest, 1);
    host.backup_and_compare(&guest, &contents, &[]);
    let resize = |size: u64| {
        let arguments = json!({"node-name": Disk::format_node("vda"), "size": size});
        guest.qmp_command("block_resize", &arguments);
    };

    resize(5 * MIB + 512);
    contents.resize("vda", 5 * MIB + 512);
    contents.write(&guest, "vda", 5 << 20, 512, 0x66);
    let grown = host.backup_and_compare(&guest, &contents, &[]);
    assert_eq!(kind(&grown), "incremental", "{grown}");

    // The grown part is zero again: that is a change too.
    contents.zero(&guest, "vda", 5 << 20, 512);
    assert_eq!(kind(&host.backup_and_compare(&guest, &contents, &[])), "incremental");

    let image = guest.quit().remove(0);
    qemu_img(&["resize", "-q", "-f", "qcow2"], &image, &["7M"]);
    guest.restart();
    contents.resize("vda", 7 * MIB);
    contents.write(&guest, "vda", 6 << 20, 4096, 0x67);
    let grown = host.backup_and_compare(&guest, &contents, &[]);
    assert_eq!(kind(&grown), "incremental", "{grown}");

    resize(3 * MIB);
    contents.resize("vda", 3 * MIB);
    contents.scribble(&guest, 2);
    let shrunk = host.backup_and_compare(&guest, &contents, &[]);
    assert_eq!(kind(&shrunk), "rescan", "{shrunk}");

    contents.scribble(&guest, 3);
    assert_eq!(kind(&host.backup_and_compare(&guest, &contents, &[])), "incremental");
    host.assert_all_clean(&guest, &["vda"]);
    host.assert_restic_is_content();
}

#[test]
fn r06_a_disk_cut_and_grown_back_is_read_whole_though_no_bitmap_tells() {
    let size = 32 * MIB;
    // A few clusters, and less than a chunk: neither can be left to chance.
    for cut in [MIB, 64 << 10] {
        let Some((guest, mut contents)) = machine(size) else { return };
        let host = Host::new();
        contents.write_noise(&guest, "vda", 0, 32 << 20, 3);
        host.backup(&guest, &[]);
        for size in [size - cut, size] {
            let arguments = json!({"node-name": Disk::format_node("vda"), "size": size});
            guest.qmp_command("block_resize", &arguments);
            contents.resize("vda", size);
        }

        let next = host.backup_and_compare(&guest, &contents, &[]);

        assert_eq!(kind(&next), "rescan", "{next}");
        host.assert_all_clean(&guest, &["vda"]);
    }
}

// ---- R08 ----------------------------------------------------------------------------------------

#[test]
fn r08_scratch_full_never_hurts_the_guest() {
    let Some((guest, mut contents)) = machine(32 * MIB) else { return };
    let host = Host::new();
    let scratch = SmallDisk::mount(&host.folder().join("scratch"), MIB);
    let scratch_dir = scratch.folder().to_str().expect("a plain path").to_owned();
    host.backup(&guest, &[]);
    contents.write_noise(&guest, "vda", 0, 32 << 20, 1);
    let slowly = ["--limit-read", "4MiB", "--scratch-dir", &scratch_dir];
    let mut running = spawn(host.backup_command(&guest, &slowly));
    wait_for_export(&guest, &mut running);

    // Far more than the scratch holds, from the end, where nothing has been read yet.
    for megabyte in (0..32).rev() {
        let start = Instant::now();
        contents.write(&guest, "vda", megabyte << 20, 1 << 20, 0x55);
        assert!(start.elapsed() < STILL_MAX, "a write took {:?}", start.elapsed());
        assert_eq!(guest.status(), "running");
    }

    let outcome = finish(running);
    assert_says(&outcome, 1, "scratch");
    host.assert_nothing_left();
    assert_guest_is_free(&guest, &["vda"]);
    assert_eq!(host.list().len(), 1);
    let next = host.backup_and_compare(&guest, &contents, &[]);
    assert_eq!(kind(&next), "incremental", "{next}");
    host.assert_all_clean(&guest, &["vda"]);
    host.assert_restic_is_content();
}

/// A file system that has room for the guest's image as it will be, but not for a scratch as well.
#[test]
fn r08_a_scratch_beside_the_image_leaves_the_guest_its_room() {
    let host = Host::new();
    let small = SmallDisk::mount(&host.folder().join("images"), 100 * MIB);
    let image = small.folder().join("vda.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2"], &image, &["80M"]);
    let disk = Disk::existing("vda", &image, Format::Qcow2);
    let Some(guest) = Guest::without_os().disk(disk).boot() else { return };
    let mut contents = Contents::new(&["vda"], 80 * MIB);
    contents.write_noise(&guest, "vda", 0, 40 << 20, 1);
    let mut running = spawn(host.backup_command(&guest, &["--limit-read", "1MiB"]));
    wait_for_export(&guest, &mut running);

    // What is there is written over, from the end, and the image grows to its full size.
    for piece in (0..40).rev() {
        contents.write(&guest, "vda", piece << 20, 1 << 20, 0x55);
        contents.write(&guest, "vda", (40 + piece) << 20, 1 << 20, 0x66);
    }

    let outcome = finish(running);
    assert_says(&outcome, 1, "scratch");
    assert!(host.list().is_empty());
    host.assert_nothing_left();
    assert_guest_is_free(&guest, &["vda"]);
    let roomy = host.folder().to_str().expect("a plain path").to_owned();
    host.backup_and_compare(&guest, &contents, &["--scratch-dir", &roomy]);
}

#[test]
fn r08_a_scratch_folder_that_cannot_be_used_is_named() {
    let Some((guest, mut contents)) = machine(4 * MIB) else { return };
    let host = Host::new();
    contents.scribble(&guest, 1);
    host.backup(&guest, &[]);
    contents.scribble(&guest, 2);
    let read_only = SmallDisk::mount(&host.folder().join("read-only"), MIB);
    let mut remount = Command::new("mount");
    remount.args(["-o", "remount,ro"]).arg(read_only.folder());
    tool(remount);
    let read_only = read_only.folder().to_str().expect("a plain path").to_owned();

    for folder in ["/nonexistent/scratch", &read_only] {
        let outcome = host.try_backup(&guest, &["--scratch-dir", folder]);
        assert_says(&outcome, 1, folder);
        assert!(outcome.stderr.contains("--scratch-dir"), "{outcome:?}");
        host.assert_all_clean(&guest, &["vda"]);
    }
    let next = host.backup_and_compare(&guest, &contents, &[]);
    assert_eq!(kind(&next), "incremental", "{next}");
}

#[test]
fn r08_the_implicit_filter_does_not_start_without_room_for_all_it_may_need() {
    let Some((guest, mut contents)) = machine(32 * MIB) else { return };
    let host = Host::new();
    host.backup(&guest, &[]);
    let scratch = SmallDisk::mount(&host.folder().join("scratch"), 8 * MIB);
    let folder = scratch.folder().to_str().expect("a plain path").to_owned();
    contents.scribble(&guest, 1);

    let outcome = host.try_backup(&guest, &["--implicit-filter", "--scratch-dir", &folder]);

    assert_says(&outcome, 1, "reserve");
    host.assert_all_clean(&guest, &["vda"]);
    scratch.resize(48 * MIB);
    let more = ["--implicit-filter", "--scratch-dir", &folder];
    assert_eq!(kind(&host.backup_and_compare(&guest, &contents, &more)), "incremental");
    host.assert_all_clean(&guest, &["vda"]);
}

// ---- R10 ----------------------------------------------------------------------------------------

#[test]
fn r10_a_full_repository_fails_at_once_and_still_gives_back_what_it_has() {
    let Some((guest, mut contents)) = machine(64 * MIB) else { return };
    let place = tempfile::tempdir().expect("a temporary folder");
    let small = SmallDisk::mount(&place.path().join("repository"), 24 * MIB);
    let host = Host::with_repository_at(&small.folder().join("r"));
    contents.write_noise(&guest, "vda", 0, 2 << 20, 1);
    let Some((other, mut of_other)) = machine(4 * MIB) else { return };
    let others = Host::new();
    of_other.write_noise(&other, "vda", 0, 1 << 20, 2);
    others.backup(&other, &["--name", "other"]);
    host.backup(&guest, &[]);
    for turn in 1..=3 {
        contents.write_noise(&guest, "vda", 0, 1 << 20, turn + 10);
        host.backup(&guest, &[]);
    }
    let earlier = host.list().pop().expect("a snapshot");
    let before = contents.clone();
    contents.write_noise(&guest, "vda", 8 << 20, 48 << 20, 3);

    let outcome = host.try_backup(&guest, &[]);

    assert_says(&outcome, 1, "space");
    assert!(outcome.stderr.contains("hint: "), "{outcome:?}");
    assert!(outcome.took < Duration::from_secs(60), "{outcome:?}");
    assert_goes_on(&guest);
    assert_guest_is_free(&guest, &["vda"]);
    assert_eq!(host.undo_records(), 0);
    fill(&small.folder().join("filler"));
    assert_eq!(host.list().len(), 4);
    host.ok(["verify", "--read-data"]);
    host.assert_holds(&earlier, &before);
    let outcome = host.try_backup(&guest, &[]);
    assert_says(&outcome, 1, "space");
    assert_guest_is_free(&guest, &["vda"]);
    let copy = || {
        let mut command = others.command(["copy", "--to"]);
        command.arg(host.repository());
        finish(spawn(command))
    };
    assert_says(&copy(), 1, "space");
    // What nobody may drop leaves no room to begin with.
    assert_says(&host.run(["forget", "--keep-last", "4"]), 1, "space");
    assert_says(&host.run(["prune"]), 1, "space");
    assert_eq!(host.list().len(), 4, "nothing is lost");

    host.ok(["forget", "--keep-last", "2"]);
    host.ok(["prune"]);

    assert_eq!(host.list().len(), 2);
    host.ok(["verify", "--read-data"]);
    host.assert_holds(&earlier, &before);
    let copied = copy();
    assert_eq!(copied.code, Some(0), "there is room again: {copied:?}");
    small.resize(128 * MIB);
    let next = host.backup_and_compare(&guest, &contents, &[]);
    assert_eq!(kind(&next), "incremental", "{next}");
    host.assert_all_clean(&guest, &["vda"]);
    host.assert_restic_is_content();
}

/// Leaves no byte free.
fn fill(path: &Path) {
    let mut file = File::create(path).expect("a directory entry needs no room");
    for len in [1 << 20, 4096] {
        while file.write_all(&vec![0xff; len]).is_ok() {}
    }
}

// ---- R11 ----------------------------------------------------------------------------------------

#[test]
fn r11_bad_blocks_are_named_exactly_and_never_become_zeros() {
    let place = tempfile::tempdir().expect("a temporary folder");
    let (raw, qcow2) = (place.path().join("vda.raw"), place.path().join("vdb.qcow2"));
    let data = noise(8 << 20, 4);
    fs::write(&raw, &data).expect("a temporary file");
    let target = qcow2.to_str().expect("a plain path");
    qemu_img(&["convert", "-q", "-f", "raw", "-O", "qcow2"], &raw, &[target]);
    // Sectors below the format: those of the raw image are the guest's, those of qcow2 are not.
    let sector = host_offset(&qcow2, 5 << 20) / 512;
    let bad = |sectors: &[u64]| {
        let one = |sector: &u64| json!({"event": "read_aio", "errno": 5, "sector": sector});
        json!({"inject-error": sectors.iter().map(one).collect::<Vec<_>>()})
    };
    let plan = Guest::without_os()
        .disk(Disk::existing("vda", &raw, Format::Raw).blkdebug(bad(&[2048, 2056, 12_000])))
        .disk(Disk::existing("vdb", &qcow2, Format::Qcow2).blkdebug(bad(&[sector])));
    let Some(guest) = plan.boot() else { return };
    let host = Host::new();
    // Two neighbours count as one range.
    let of_raw = ["bytes 1048576..1056768", "bytes 6144000..6148096"];
    let of_qcow2 = ["bytes 5242880..5246976"];
    for (disk, ranges) in [("vda", &of_raw[..]), ("vdb", &of_qcow2[..])] {
        for more in [&["--disk", disk][..], &["--disk", disk, "--implicit-filter"]] {
            let outcome = host.try_backup(&guest, more);

            assert_says(&outcome, 1, &ranges.join(", "));
            assert!(outcome.stderr.contains(&format!("disk `{disk}`")), "{outcome:?}");
            assert_eq!(outcome.stderr.matches("bytes ").count(), ranges.len(), "{outcome:?}");
            assert!(host.list().is_empty());
            host.assert_nothing_left();
            assert_goes_on(&guest);
            assert_guest_is_free(&guest, &["vda", "vdb"]);
        }
    }
    assert!(guest.bitmaps(&Disk::format_node("vdb")).is_empty());
    host.assert_restic_is_content();
}

/// Where in a qcow2 file a byte of the guest is.
fn host_offset(image: &Path, guest_offset: u64) -> u64 {
    let mut map = Command::new("qemu-img");
    map.args(["map", "-f", "qcow2", "--output=json"]).arg(image);
    let map: Vec<Value> = serde_json::from_slice(&tool(map).stdout).expect("a JSON list");
    let number = |extent: &Value, key: &str| extent[key].as_u64().unwrap_or_default();
    let extent = map.iter().find(|extent| {
        let start = number(extent, "start");
        (start..start + number(extent, "length")).contains(&guest_offset)
    });
    let extent = extent.expect("the map covers the disk");
    number(extent, "offset") + guest_offset - number(extent, "start")
}

// ---- R22 ----------------------------------------------------------------------------------------

#[test]
fn r22_an_image_replaced_by_an_older_copy_of_itself_is_backed_up_as_it_is() {
    let Some((guest, mut contents)) = machine(8 * MIB) else { return };
    let host = Host::new();
    contents.write_noise(&guest, "vda", 0, 8 << 20, 1);
    host.backup(&guest, &[]);
    contents.write_noise(&guest, "vda", 1 << 20, 1 << 20, 2);
    let image = guest.quit().remove(0);
    let copy = host.folder().join("copy.qcow2");
    fs::copy(&image, &copy).expect("room for a copy");
    let older = contents.clone();
    guest.restart();
    contents.write_noise(&guest, "vda", 4 << 20, 1 << 20, 3);
    host.backup_and_compare(&guest, &contents, &[]);
    contents.write_noise(&guest, "vda", 5 << 20, 1 << 20, 4);
    host.backup_and_compare(&guest, &contents, &[]);
    guest.quit();
    fs::copy(&copy, &image).expect("room for a copy");
    guest.restart();
    let mut contents = older;
    contents.write_noise(&guest, "vda", 6 << 20, 4096, 5);

    host.backup_and_compare(&guest, &contents, &[]);

    contents.write_noise(&guest, "vda", 7 << 20, 4096, 6);
    assert_eq!(kind(&host.backup_and_compare(&guest, &contents, &[])), "incremental");
    host.assert_all_clean(&guest, &["vda"]);
}

#[test]
fn r22_what_was_written_behind_qemu_is_found_by_the_audit() {
    let Some((guest, mut contents)) = machine(AUDITED_SIZE) else { return };
    let host = Host::new();
    contents.write_noise(&guest, "vda", 0, 1 << 20, 1);
    host.backup(&guest, &[]);
    let image = guest.quit().remove(0);
    // Into the image as a file: QEMU's own tools would set the bits of the bitmap.
    let offset = host_offset(&image, 512 << 10);
    let file = OpenOptions::new().write(true).open(&image).expect("the image is writable");
    file.write_all_at(&[0x99; 512], offset).expect("the image is writable");
    contents.note("vda", 512 << 10, &[0x99; 512]);
    guest.restart();

    let next = host.backup_and_compare(&guest, &contents, &[]);

    assert_eq!(kind(&next), "rescan", "{next}");
    assert!(reason(&next).contains("lied"), "{next}");
    let shown = host.ok(["show", "--json", "latest:fixture"]);
    assert!(shown.contains("though its dirty bitmap says unchanged"), "{shown}");
    contents.write(&guest, "vda", 0, 4096, 0x11);
    assert_eq!(kind(&host.backup_and_compare(&guest, &contents, &[])), "incremental");
    host.assert_all_clean(&guest, &["vda"]);
}

#[test]
fn r22_the_audit_reads_the_share_that_it_is_told_and_says_when_it_is_off() {
    const MANY: u64 = 64 * (64 << 10);
    let Some((guest, mut contents)) = machine(MANY) else { return };
    let host = Host::new();
    contents.write_noise(&guest, "vda", 0, MANY as usize, 1);
    host.backup(&guest, &[]);
    let audited = |more: &[&str]| {
        let snapshot = host.backup(&guest, more);
        assert_eq!(kind(&snapshot), "incremental", "{snapshot}");
        let bytes = snapshot["disks"][0]["bytes_audited"].as_u64().expect("a count of bytes");
        (bytes >> 16, snapshot["warnings"].to_string())
    };

    // The last chunk is always among them.
    let usual = audited(&[]).0;
    assert!((16..=17).contains(&usual), "{usual}");
    assert_eq!(audited(&["--audit", "100%"]), (64, "[]".to_owned()));
    let half = audited(&["--audit", "50"]).0;
    assert!((32..=33).contains(&half), "{half}");
    let (none, warnings) = audited(&["--audit", "0%"]);
    assert_eq!(none, 0);
    assert!(warnings.contains("not audited"), "{warnings}");

    for (share, words) in [("101%", "from 0% to 100%"), ("-1%", "from 0%"), ("some", "like 10%")] {
        let share = format!("--audit={share}");
        assert_says(&host.try_backup(&guest, &[&share]), 2, words);
    }
    host.assert_all_clean(&guest, &["vda"]);
}

#[test]
fn r22_a_bitmap_that_somebody_cleared_removed_or_stopped_is_not_believed() {
    let Some((guest, mut contents)) = machine(AUDITED_SIZE) else { return };
    let host = Host::new();
    contents.write_noise(&guest, "vda", 0, 1 << 20, 1);
    host.backup(&guest, &[]);
    let node = Disk::format_node("vda");
    for (turn, command) in
        ["block-dirty-bitmap-clear", "block-dirty-bitmap-remove", "block-dirty-bitmap-disable"]
            .into_iter()
            .enumerate()
    {
        contents.write_noise(&guest, "vda", (turn % 2) << 19, 256 << 10, 7);
        let bitmap = guest.bitmaps(&node).remove(0)["name"].clone();
        guest.qmp_command(command, &json!({"node": node, "name": bitmap}));
        contents.write_noise(&guest, "vda", 256 << 10, 256 << 10, turn as u64 + 9);

        let next = host.backup_and_compare(&guest, &contents, &[]);

        assert_eq!(kind(&next), "rescan", "{command}: {next}");
        host.assert_all_clean(&guest, &["vda"]);
        contents.write_noise(&guest, "vda", 0, 64 << 10, turn as u64 + 20);
        let next = host.backup_and_compare(&guest, &contents, &[]);
        assert_eq!(kind(&next), "incremental", "after {command}: {next}");
    }
}

#[test]
fn r22_bitmaps_of_others_stay_and_forgotten_ones_of_ours_go() {
    let Some((guest, mut contents)) = machine(4 * MIB) else { return };
    let host = Host::new();
    contents.scribble(&guest, 1);
    host.backup(&guest, &[]);
    let node = Disk::format_node("vda");
    let ours = guest.bitmaps(&node).remove(0)["name"].as_str().expect("a name").to_owned();
    let flip = |name: &str, at: usize| {
        let mut name = name.to_owned().into_bytes();
        name[at] = if name[at] == b'0' { b'1' } else { b'0' };
        String::from_utf8(name).expect("hexadecimal digits")
    };
    let forgotten = flip(&ours, ours.len() - 1);
    // The repository's id stands in the middle.
    let of_another_repository = flip(&ours, "kvmsnap-".len());
    let foreign = ["somebody-elses".to_owned(), of_another_repository];
    for name in foreign.iter().chain([&forgotten]) {
        let arguments = json!({"node": node, "name": name, "persistent": true});
        guest.qmp_command("block-dirty-bitmap-add", &arguments);
    }
    contents.scribble(&guest, 2);

    let next = host.backup_and_compare(&guest, &contents, &[]);

    assert_eq!(kind(&next), "incremental", "{next}");
    let left: Vec<_> = guest.bitmaps(&node).iter().map(|bitmap| bitmap["name"].clone()).collect();
    assert_eq!(left.len(), 3, "{left:?}");
    assert!(foreign.iter().all(|name| left.contains(&json!(name))), "{left:?}");
    assert!(!left.contains(&json!(forgotten)), "{left:?}");
}

#[test]
fn p3_a_guest_under_two_names_has_a_chain_under_each() {
    let Some((guest, mut contents)) = machine(4 * MIB) else { return };
    let host = Host::new();
    let bitmaps = || guest.bitmaps(&Disk::format_node("vda")).len();
    for turn in 0..3 {
        for (index, name) in ["web", "db"].into_iter().enumerate() {
            contents.scribble(&guest, 2 * turn + index);
            let snapshot = host.backup_and_compare(&guest, &contents, &["--name", name]);
            let expected = if turn == 0 { "full" } else { "incremental" };
            assert_eq!(kind(&snapshot), expected, "{name}: {snapshot}");
            assert_eq!(bitmaps(), if turn == 0 { index + 1 } else { 2 }, "{name}, {turn}");
        }
    }

    // Where all backups under a name are gone nobody needs its bitmap.
    let of_db = host.list().into_iter().filter(|snapshot| snapshot["domain"] == "db");
    let ids: Vec<String> = of_db.filter_map(|s| Some(s["id"].as_str()?.to_owned())).collect();
    assert_eq!(ids.len(), 3);
    let ids = ids.iter().map(String::as_str);
    host.restic(&["forget"].into_iter().chain(ids).collect::<Vec<_>>());
    contents.scribble(&guest, 9);
    let last = host.backup_and_compare(&guest, &contents, &["--name", "web"]);
    assert_eq!((kind(&last), bitmaps()), ("incremental".to_owned(), 1), "{last}");
}

#[test]
fn r22_two_repositories_keep_their_own_bitmaps() {
    let Some((guest, mut contents)) = machine(4 * MIB) else { return };
    let (one, other) = (Host::new(), Host::new());
    for turn in 0..6 {
        contents.scribble(&guest, turn);
        let host = if turn % 3 == 1 { &other } else { &one };
        let snapshot = host.backup_and_compare(&guest, &contents, &[]);
        let expected = if turn < 2 { "full" } else { "incremental" };
        assert_eq!(kind(&snapshot), expected, "{snapshot}");
    }
    assert_eq!(guest.bitmaps(&Disk::format_node("vda")).len(), 2);
}
