//! Whole stories of domains of libvirt: one that writes all the while, several at once, repositories and
//! other tools in turn, what belongs to a machine besides its disks, and what `status` tells of it all.

use std::fs;
use std::path::Path;
use std::process::Command;

use integration::faults::{assert_says, kinds, noise, signal, wait_until};
use integration::libvirt::{SIZE, Scene, WAIT, assert_incremental};
use integration::restored::{disk, text};
use integration::{Host, finish};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vm_fixtures::libvirt::{Domain, Libvirt};
use vm_fixtures::oracle::{Load, judge};
use vm_fixtures::{Disk, FileSystem, Guest, MIB};

/// The disks that the oracle writes, in its numbering; the last one is raw.
const ORACLE_DISKS: [&str; 3] = ["vda", "vdb", "vdc"];

fn snapshots(lines: &str) -> Vec<Value> {
    lines.lines().map(|line| serde_json::from_str(line).expect("a JSON object")).collect()
}

#[test]
fn p1_p7_backups_of_a_working_guest_are_instants_over_all_its_disks() {
    let Some(libvirt) = Libvirt::start() else { return };
    let plan = Guest::builder()
        .disk(Disk::new("vda", 16 * MIB))
        .disk(Disk::new("vdb", 8 * MIB).iothread())
        .disk(Disk::new("vdc", 8 * MIB).raw())
        .disk(Disk::new("vdd", 64 * MIB).mounted(FileSystem::Ext4));
    let domain = plan.under_libvirt().boot(&libvirt);
    let host = Host::new();
    let boot_id = domain.sh("cat /proc/sys/kernel/random/boot_id");
    let load = domain.start_load(&Load::default().mixed().depth(2), &ORACLE_DISKS);
    let take = |turn: u32| {
        domain.sh(&format!("echo {turn} > /mnt/vdd/turn"));
        let acked = domain.oracle_log().acked();
        let line = host.ok(["backup", "--json", "--quiesce", "require", domain.name()]);
        let snapshot: Value = serde_json::from_str(&line).expect("one JSON object");
        (snapshot, acked, domain.oracle_log().issued())
    };

    let backups: Vec<(Value, u64, u64)> = (0..6).map(take).collect();

    let log = load.stop();
    assert_eq!(domain.sh("cat /proc/sys/kernel/random/boot_id"), boot_id, "no reboot");
    host.assert_nothing_left();
    domain.destroy();
    let mut last = 0;
    for (turn, (snapshot, acked, issued)) in backups.iter().enumerate() {
        let parent = turn.checked_sub(1).map_or(&Value::Null, |turn| &backups[turn].0["id"]);
        assert_eq!(&snapshot["parent"], parent, "{snapshot}");
        let kinds = kinds(snapshot);
        let expected = match turn {
            0 => ["full"; 4],
            _ => ["incremental", "incremental", "rescan", "incremental"],
        };
        assert_eq!(kinds.values().collect::<Vec<_>>(), expected, "{snapshot}");
        assert_eq!(snapshot["consistency"], "filesystem", "{snapshot}");
        assert!(snapshot["freeze_ms"].as_u64().is_some_and(|ms| ms < 10_000), "{snapshot}");
        assert_eq!(snapshot["warnings"], json!([]), "{snapshot}");
        assert!(issued > acked, "the guest wrote during the backup");

        let folder = host.restore_as(text(snapshot, "id"), "raw");
        let images = ORACLE_DISKS.map(|disk| folder.join(format!("{disk}.raw")));
        let images = [(0, images[0].as_path()), (1, &images[1]), (2, &images[2])];
        let verdict = judge(&images, &log).expect("images");
        verdict.assert_instant_between(*acked, *issued);
        assert!(verdict.instant() >= last, "instants go forward");
        last = verdict.instant();
        let file_system = folder.join("vdd.raw");
        vm_fixtures::run("e2fsck", &["-f".as_ref(), "-n".as_ref(), file_system.as_os_str()]);
        let said = ["-R", "cat turn"].map(AsRef::as_ref);
        let said = [&said[..], &[file_system.as_os_str()]].concat();
        assert_eq!(vm_fixtures::run("debugfs", &said).trim(), turn.to_string());
        host.assert_restic_yields(snapshot, &folder);
        fs::remove_dir_all(folder).expect("a folder of ours");
    }
    host.assert_restic_is_content();
}

// ---- several domains ----------------------------------------------------------------------------

#[test]
fn p1_domains_are_backed_up_by_names_patterns_and_uuids_each_once() {
    let Some(libvirt) = Libvirt::start() else { return };
    // No other test at this time has domains called so.
    let tag = format!("{}", std::process::id());
    let named = |name: &str| {
        let plan = Guest::without_os().name(&format!("{tag}-{name}")).disk(Disk::new("vda", MIB));
        plan.under_libvirt().define(&libvirt)
    };
    let domains = ["web-1", "web-2", "db"].map(named);
    domains[0].start();
    domains[2].start();
    let host = Host::new();
    let of = |lines: &str| -> Vec<String> {
        snapshots(lines).iter().map(|snapshot| text(snapshot, "domain").to_owned()).collect()
    };

    let pattern = format!("*-{tag}-web-*");
    let by_pattern = of(&host.ok(["backup", "--json", &pattern]));
    let (db, web) = (domains[2].uuid(), domains[0].name());
    let by_all_ways = of(&host.ok(["backup", "--json", &db, web, &pattern, web]));
    let unknown = host.run(["backup", "--json", domains[2].name(), "no-such-domain"]);
    let all = host.run(["backup", "--json", "--dry-run", "--all"]);

    let mut webs = [domains[0].name(), domains[1].name()];
    webs.sort_unstable();
    assert_eq!(by_pattern, webs);
    assert_eq!(by_all_ways, [domains[2].name(), domains[0].name(), domains[1].name()]);
    assert_says(&unknown, 2, "libvirt has no domain `no-such-domain`");
    assert!(unknown.stderr.contains("hint: it has "), "{unknown:?}");
    assert!(domains.iter().all(|domain| unknown.stderr.contains(domain.name())), "{unknown:?}");
    assert_eq!(host.list().len(), 5, "before anything was begun");
    // Its exit code is about domains of other tests too, which come and go.
    assert!(domains.iter().all(|domain| all.stdout.contains(domain.name())), "{all:?}");
}

#[test]
fn p1_a_domain_that_fails_keeps_no_other_from_its_backup() {
    let Some(libvirt) = Libvirt::start() else { return };
    let (first, last) = (Scene::new(&libvirt), Scene::new(&libvirt));
    fs::remove_file(first.domain.disk_path("vda")).expect("an image of ours");
    let both = [first.domain.name(), last.domain.name()];

    let outcome = first.host.run([&["backup", "--json"][..], &both].concat());

    assert_says(&outcome, 3, "1 of 2 domains failed");
    assert!(outcome.stderr.contains(&format!("domain `{}`: ", both[0])), "{outcome:?}");
    let made = snapshots(&outcome.stdout);
    assert_eq!(made.len(), 1, "{outcome:?}");
    assert_eq!(made[0]["domain"], both[1]);
    first.host.assert_holds(&made[0], &last.contents);
    first.host.assert_nothing_left();
}

// ---- some of the disks --------------------------------------------------------------------------

#[test]
fn p3_disks_that_were_left_out_stay_incremental() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    let some = |scene: &Scene, more: &[&str]| -> Vec<(String, String)> {
        let outcome = scene.try_backup(more);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        let snapshot = &snapshots(&outcome.stdout)[0];
        kinds(snapshot).into_iter().collect()
    };
    let incremental = |disk: &str| (disk.to_owned(), "incremental".to_owned());
    scene.scribble();
    assert_eq!(some(&scene, &["--disk", "vda"]), [incremental("vda")]);
    scene.scribble();
    assert_eq!(some(&scene, &["--disk", "vdb", "--disk", "vda"]), ["vda", "vdb"].map(incremental));
    scene.scribble();
    let here = format!("{}/vdc", scene.domain.name());
    let excluded = ["--exclude-disk", "vdb", "--exclude-disk", &here, "--exclude-disk", "else/vda"];
    assert_eq!(some(&scene, &excluded), [incremental("vda")]);
    scene.scribble();

    let all = scene.backup();

    assert_eq!(kinds(&all)["vda"], "incremental", "{all}");
    assert_eq!(kinds(&all)["vdb"], "incremental", "{all}");
    scene.scribble();
    assert_incremental(&scene.backup(), "bitmap");
    scene.assert_clean();
    let unknown = scene.try_backup(&["--disk", "vdz"]);
    assert_says(&unknown, 2, "has no disk `vdz`");
    assert!(unknown.stderr.contains("it has vda, vdb, vdc"), "{unknown:?}");
}

/// Whether the domain runs or not.
#[test]
fn p1_a_disk_that_is_left_out_is_not_touched_and_its_absence_stays_known() {
    let Some(libvirt) = Libvirt::start() else { return };
    let scene = Scene::new(&libvirt);
    scene.domain.start();
    fs::remove_file(scene.domain.disk_path("vdb")).expect("an image of ours");
    let here = format!("{}/vdb", scene.domain.name());
    let reasons = ["excluded with --exclude-disk", "only other disks were asked for with --disk"];
    for method in ["bitmap", "offline"] {
        if method == "offline" {
            scene.domain.destroy();
        }
        for (more, reason) in [
            (&["--exclude-disk", "vdb"][..], reasons[0]),
            (&["--exclude-disk", &here], reasons[0]),
            (&["--disk", "vda", "--disk", "vdc"], reasons[1]),
        ] {
            let outcome = scene.try_backup(more);
            assert_eq!(outcome.code, Some(0), "{method}: {outcome:?}");
            let made = snapshots(&outcome.stdout).remove(0);
            assert_eq!(made["method"], method, "{made}");
            assert_eq!(kinds(&made).into_keys().collect::<Vec<_>>(), ["vda", "vdc"], "{made}");
            let left_out = json!([{"device": "vdb", "reason": reason, "is_disk": true}]);
            assert_eq!(made["skipped"], left_out, "{made}");
            assert_eq!(scene.host.list().last(), Some(&made));
        }
    }

    let failed = scene.try_backup(&[]);

    assert_says(&failed, 1, "hint: --exclude-disk leaves the disk out");
    let latest = format!("latest:{}", scene.domain.name());
    let shown = scene.host.ok(["show", &latest]);
    assert!(shown.contains(&format!("left out     vdb: {}", reasons[1])), "{shown}");
    let table = scene.host.ok(["list"]);
    assert!(table.lines().next().is_some_and(|line| line.ends_with("LEFT OUT")), "{table}");
    assert!(table.lines().skip(1).all(|line| line.ends_with("vdb")), "{table}");
    let to = scene.host.new_folder().join("restored");
    let restored = scene.host.run(["restore", &latest, "--to", &to.to_string_lossy()]);
    assert_eq!(restored.code, Some(0), "{restored:?}");
    assert!(restored.stderr.contains("disk `vdb` is not in this snapshot"), "{restored:?}");
    let unknown = scene.try_backup(&["--disk", "vdz"]);
    assert!(unknown.stderr.contains("hint: it has vda, vdb, vdc"), "{unknown:?}");
    let typo = scene.try_backup(&["--exclude-disk", "vdb", "--exclude-disk", &format!("{here}x")]);
    assert!(typo.code == Some(0) && typo.stderr.contains("has no disk `vdbx`"), "{typo:?}");
    assert_says(&scene.try_backup(&["--disk", "vdb", "--exclude-disk", "vdb"]), 2, "is left out");
    scene.host.assert_nothing_left();
}

/// A secret of libvirt's that goes away.
struct Secret {
    libvirt: Libvirt,
    uuid: String,
}

impl Secret {
    #[track_caller]
    fn new(domain: &Domain, content: &str) -> Self {
        let (uuid, folder) = (domain.uuid(), domain.folder());
        let (xml, file) = (folder.join("secret.xml"), folder.join("secret"));
        let described =
            format!("<secret ephemeral='yes' private='no'><uuid>{uuid}</uuid></secret>");
        fs::write(&xml, described).and_then(|()| fs::write(&file, content)).expect("our folder");
        domain.libvirt().virsh(&["secret-define", &xml.to_string_lossy()]);
        let secret = Self { libvirt: domain.libvirt().clone(), uuid };
        let set = ["secret-set-value", &secret.uuid, "--plain", "--file", &file.to_string_lossy()];
        domain.libvirt().virsh(&set);
        secret
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        // Where it cannot be removed it goes with libvirtd.
        let _ = self.libvirt.try_virsh(&["secret-undefine", &self.uuid]);
    }
}

/// Makes an encrypted image of SIZE bytes. `qemu-img` measures how fast it derives a key, and some versions,
/// Debian's 7.2 among them, give up where the system has not yet counted a tick of their thread
/// (`qcrypto_pbkdf2_count_iters`).
fn create_luks(image: &Path, passphrase: &str) {
    for _ in 0..20 {
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "luks", "--object"]);
        create.arg(format!("secret,id=key,data={passphrase}"));
        create.args(["-o", "key-secret=key,iter-time=10"]).arg(image).arg(SIZE.to_string());
        let output = create.output().expect("qemu-img runs");
        if output.status.success() {
            return;
        }
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains("accurate CPU usage"), "{stderr}");
    }
    panic!("qemu-img cannot measure itself here");
}

#[test]
fn p1_an_encrypted_disk_is_stored_as_its_guest_sees_it() {
    const PASSPHRASE: &str = "correct horse";
    let Some(libvirt) = Libvirt::start() else { return };
    let plan = Guest::without_os().disk(Disk::new("vda", SIZE));
    let mut scene = Scene::of(plan.under_libvirt(), &["vda"], SIZE, &libvirt);
    let folder = scene.domain.folder().to_owned();
    let (image, xml) = (folder.join("vdb.luks"), folder.join("vdb.xml"));
    create_luks(&image, PASSPHRASE);
    let (place, uuid) = (image.display(), scene.domain.uuid());
    let disk = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{place}'>\
         <encryption format='luks'><secret type='passphrase' uuid='{uuid}'/></encryption></source>\
         <target dev='vdb' bus='virtio'/><alias name='ua-vdb'/></disk>"
    );
    fs::write(&xml, disk).expect("the domain's folder is writable");
    scene.domain.virsh("attach-device", &[&xml.to_string_lossy(), "--config"]);
    scene.contents.add("vdb", SIZE);
    let _secret = Secret::new(&scene.domain, PASSPHRASE);
    scene.domain.start();
    // What was never written reads as nobody knows what.
    scene.write("vdb", 0, &noise(SIZE as usize, 9));
    for (turn, expected) in [["full", "full"], ["incremental", "rescan"]].iter().enumerate() {
        let bytes = noise(200 << 10, turn as u64);
        scene.write("vda", turn << 20, &bytes);
        scene.write("vdb", turn << 20, &bytes);

        let made = scene.backup();

        assert_eq!(kinds(&made).values().collect::<Vec<_>>(), expected, "{made}");
        scene.assert_clean_but_bitmaps();
    }
}

// ---- others that use the same domain ------------------------------------------------------------

#[test]
fn p3_two_repositories_in_turn_have_a_chain_each() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    let other = Host::new();
    for turn in 0..3 {
        for (index, host) in [&other, &scene.host].into_iter().enumerate() {
            let line = host.ok(["backup", "--json", scene.domain.name()]);
            let snapshot = &snapshots(&line)[0];
            host.assert_holds(snapshot, &scene.contents);
            let first = turn == 0 && index == 0;
            let expected = if first { "full" } else { "incremental" };
            assert_eq!(kinds(snapshot)["vda"], expected, "{turn}: {snapshot}");
            assert_eq!(kinds(snapshot)["vdb"], expected, "{turn}: {snapshot}");
        }
        scene.scribble();
        // Whether it runs makes no difference.
        if turn == 1 {
            scene.domain.destroy();
        }
    }
    scene.domain.start();
    assert_incremental(&scene.backup(), "bitmap");
    assert_incremental(
        &snapshots(&other.ok(["backup", "--json", scene.domain.name()]))[0],
        "bitmap",
    );
    assert_eq!(scene.checkpoints().len(), 2);
    other.assert_nothing_left();
    scene.assert_clean_but_bitmaps();
}

#[test]
fn a_checkpoint_of_another_tool_stays_as_it_is() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::running(&libvirt);
    let disks = ["vda,checkpoint=bitmap", "vdb,checkpoint=bitmap", "vdc,checkpoint=no"];
    let disks = disks.iter().flat_map(|disk| ["--diskspec", disk]);
    let arguments: Vec<&str> = ["foreign"].into_iter().chain(disks).collect();
    scene.domain.virsh("checkpoint-create-as", &arguments);
    let counted = |domain: &Domain| -> Vec<u64> {
        let of_disk = |disk| {
            let bitmaps = domain.bitmaps(disk);
            let foreign = bitmaps.iter().find(|bitmap| bitmap["name"] == "foreign");
            foreign.expect("it is there")["count"].as_u64().expect("a count of bytes")
        };
        ["vda", "vdb"].map(of_disk).to_vec()
    };
    let mut before = vec![0, 0];
    for turn in 0..4 {
        scene.scribble();
        let off = turn == 2;
        if off {
            scene.domain.destroy();
        }
        assert_incremental(&scene.backup(), if off { "offline" } else { "bitmap" });
        if off {
            scene.domain.start();
        }
        let now = counted(&scene.domain);
        assert!(now[0] >= before[0] + 128 * 1024, "{before:?}, {now:?}: it counts every write");
        before = now;
        let described = scene.domain.virsh("checkpoint-dumpxml", &["foreign", "--size"]);
        assert_eq!(described.matches("size='").count(), 2, "{described}");
    }
    assert_eq!(scene.checkpoints().len(), 2, "{:?}", scene.checkpoints());
    scene.assert_clean_but_bitmaps();
}

// ---- the machine --------------------------------------------------------------------------------

#[test]
fn p7_the_machine_is_stored_beside_its_disks_without_its_secrets() {
    const SECRET: &str = "canary7";
    let Some(libvirt) = Libvirt::start() else { return };
    let plan = Guest::without_os().disk(Disk::new("vda", SIZE)).under_libvirt().uefi();
    let console = format!("<graphics type='vnc' port='-1' passwd='{SECRET}'/>");
    let scene = Scene::of(plan.devices_xml(&console), &["vda"], SIZE, &libvirt);
    scene.domain.start();
    // Firmware that finds nothing to boot writes that down, sooner or later.
    scene.domain.virsh("suspend", &[]);

    let plain = scene.backup();
    let told = scene.backup_with(&["--with-secrets"]);

    let path = |name: &str| match name {
        "manifest.json" => format!("/{}.{name}", scene.domain.name()),
        _ => format!("/{}/{name}", scene.domain.name()),
    };
    let file = |snapshot: &Value, name: &str| -> Vec<u8> {
        scene.host.restic(&["dump", text(snapshot, "id"), &path(name)])
    };
    let listed = scene.host.restic(&["ls", text(&plain, "id")]);
    let listed = String::from_utf8_lossy(&listed);
    for name in ["domain.xml", "domain-live.xml", "nvram", "vda.raw", "manifest.json"] {
        assert!(listed.lines().any(|line| line == path(name)), "{name}: {listed}");
    }
    let description = String::from_utf8(file(&plain, "domain.xml")).expect("XML is text");
    assert!(description.contains(&format!("<uuid>{}</uuid>", scene.domain.uuid())));
    let nvram = fs::read(scene.domain.folder().join("nvram.fd")).expect("firmware has memory");
    assert!(file(&plain, "nvram") == nvram, "{} bytes of firmware memory", nvram.len());
    for (snapshot, has_it) in [(&plain, false), (&told, true)] {
        for name in ["domain.xml", "domain-live.xml", "manifest.json"] {
            let text = String::from_utf8_lossy(&file(snapshot, name)).into_owned();
            let expected = has_it && name != "manifest.json";
            assert_eq!(text.contains(SECRET), expected, "{name}: {text}");
        }
    }
    scene.assert_clean();
}

// ---- status -------------------------------------------------------------------------------------

/// What `status` tells of a domain.
#[track_caller]
fn status(scene: &Scene) -> Value {
    let line = scene.host.ok(["status", "--json", scene.domain.name()]);
    let mut lines = snapshots(&line);
    assert_eq!(lines.len(), 1, "{line}");
    lines.remove(0)
}

/// How the next backup will be taken: the kind, and a part of the reason, of each disk.
#[track_caller]
fn assert_next(status: &Value, expected: [(&str, &str); 3]) {
    assert_eq!(status["problem"], Value::Null, "{status}");
    let next = status["next"].as_array().expect("a list of disks");
    assert_eq!(next.len(), 3, "{status}");
    for (next, (kind, reason)) in next.iter().zip(expected) {
        assert_eq!(next["kind"], kind, "{status}");
        assert!(text(next, "reason").contains(reason), "{status}");
        assert_eq!(next["tracked"], kind == "incremental", "{status}");
    }
}

/// `status` and `--dry-run` change nothing, so they cannot know.
#[test]
fn status_does_not_announce_a_rescan_where_a_lost_checkpoint_may_be_found_again() {
    const RAW: (&str, &str) = ("rescan", "raw images keep no dirty bitmaps");
    const HOPE: (&str, &str) = ("incremental", "if QEMU still has it");
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::new(&libvirt);
    scene.backup();
    scene.domain.start();
    assert_eq!(scene.checkpoints(), Vec::<String>::new());

    let status = status(&scene);
    let planned = snapshots(&scene.host.ok(["backup", "--dry-run", "--json", scene.domain.name()]));

    assert_next(&status, [HOPE, HOPE, RAW]);
    assert_next(&json!({"next": planned, "problem": null}), [HOPE, HOPE, RAW]);
    assert_eq!(scene.checkpoints(), Vec::<String>::new(), "nothing was changed");
    scene.scribble();
    assert_incremental(&scene.backup(), "bitmap");
    scene.assert_clean();
}

#[test]
fn status_tells_how_the_next_backup_is_taken_and_what_is_left() {
    const RAW: (&str, &str) = ("rescan", "raw images keep no dirty bitmaps");
    const TRACKED: (&str, &str) = ("incremental", "dirty bitmap");
    let Some(libvirt) = Libvirt::start() else { return };
    let mut scene = Scene::new(&libvirt);
    let never = status(&scene);
    assert_eq!((&never["state"], &never["last"]), (&json!("shut off"), &Value::Null), "{never}");
    assert_next(&never, [("full", "no earlier backup"); 3]);
    scene.domain.start();

    let first = scene.backup();

    let running = status(&scene);
    assert_eq!((&running["state"], &running["last"]["id"]), (&json!("running"), &first["id"]));
    assert_next(&running, [TRACKED, TRACKED, RAW]);
    scene.domain.destroy();
    let off = status(&scene);
    assert_eq!(off["state"], "shut off");
    assert_next(&off, [TRACKED, TRACKED, RAW]);
    scene.domain.start();
    scene.write("vda", 0, &noise(2 << 20, 1));
    scene.flush();

    let backup = scene.backup_slowly(&[]);
    assert_eq!(status(&scene)["leftovers"], json!([]), "a run that is at work has left nothing");
    let guards = scene.guards();
    guards.iter().for_each(|guard| signal(*guard, Signal::SIGSTOP));
    signal(backup.pid(), Signal::SIGKILL);
    finish(backup);
    let left = status(&scene);
    assert_eq!(left["leftovers"].as_array().map(Vec::len), Some(1), "{left}");
    assert_eq!(left["last"]["id"], first["id"], "{left}");
    guards.iter().for_each(|guard| signal(*guard, Signal::SIGCONT));
    wait_until(WAIT, "the guard undoes it", || scene.host.undo_records() == 0);
    let undone = status(&scene);
    assert_eq!(undone["leftovers"], json!([]), "{undone}");
    assert_next(&undone, [TRACKED, TRACKED, RAW]);

    scene.domain.kill_qemu();
    scene.domain.start();
    let killed = status(&scene);
    let broken = ("rescan", "QEMU ended without closing the image");
    assert_next(&killed, [broken, broken, RAW]);
    let next = scene.backup();
    assert_eq!(disk(&next, "vda")["kind"], "rescan", "as it was told: {next}");
    assert_eq!(status(&scene)["last"]["id"], next["id"]);
    scene.assert_clean();
}
