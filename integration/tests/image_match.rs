//! Which templates fit a machine's files.

use std::fs;
use std::path::Path;
use std::process::Command;

use integration::faults::assert_says;
use integration::image_folder::{image_folder, record};
use integration::{Host, finish, spawn, tool};
use serde_json::{Value, json};
use vm_fixtures::qemu_available;

/// A template of a machine that starts by BIOS, with LVM; `edit` changes what is known of its disks.
fn template(host: &Host, name: &str, edit: impl FnOnce(&mut Value)) {
    let disk = host.folder().join("empty.qcow2");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg("4M");
    tool(create);
    let folder = image_folder(&host.folder().join("store").join(name), &disk, &[]);
    let mut record = record(&folder);
    record["flavour"] = json!({
        "boot": "bios",
        "disks": [{"size": 8 << 20, "table": "dos", "partitions": [
            {"number": 1, "start": 1 << 20, "size": 7 << 20, "kind": "0x8e"},
        ]}],
        "volume_groups": [
            {"name": "vg0", "volumes": [["root", 4 << 20], ["swap", 1 << 20], ["var", 2 << 20]]},
        ],
        "file_systems": [
            {"device": "/dev/mapper/vg0-root", "kind": "ext4", "mount": "/"},
            {"device": "/dev/mapper/vg0-swap", "kind": "swap", "mount": "swap"},
            {"device": "/dev/mapper/vg0-var", "kind": "xfs", "mount": "/var"},
        ],
    });
    edit(&mut record);
    fs::write(folder.join("image.json"), record.to_string()).expect("a folder of ours");
}

/// The files of a machine with an ext4 root, XFS `/var` and swap.
fn tree(host: &Host) -> String {
    let tree = host.folder().join("tree");
    fs::create_dir_all(tree.join("etc")).expect("a folder of ours");
    fs::create_dir_all(tree.join("var")).expect("a folder of ours");
    let table = "UUID=b0-0a / ext4 defaults 0 1\nUUID=b0-0b /var xfs defaults 0 0\n\
        UUID=b0-0c none swap sw 0 0\n";
    fs::write(tree.join("etc/fstab"), table).expect("a folder of ours");
    tree.to_str().expect("a plain path").to_owned()
}

fn store(host: &Host) -> String {
    host.folder().join("store").to_str().expect("a plain path").to_owned()
}

/// One template fits; of the others everything that is in the way is told, and who was never looked at.
#[test]
fn templates_that_fit_are_found_and_the_others_say_why_not() {
    if !qemu_available() {
        return;
    }
    let host = Host::without_repository();
    template(&host, "alike", |_| {});
    template(&host, "btrfs", |record| {
        record["flavour"]["file_systems"][0]["kind"] = json!("btrfs");
        record["flavour"]["file_systems"][2]["mount"] = json!("/srv");
    });
    template(&host, "small", |record| {
        record["flavour"]["volume_groups"][0]["volumes"][2][1] = json!(64 << 10);
    });
    template(&host, "unseen", |record| record["flavour"] = Value::Null);
    let tree = tree(&host);
    fs::write(Path::new(&tree).join("var/data"), vec![7; 100_000]).expect("a folder of ours");

    let outcome = host.run(["image", "match", "--json", "--tree", &tree, &store(&host)]);

    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let lines = outcome.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON"));
    let lines: Vec<Value> = lines.collect();
    let told = |name: &str| lines.iter().find(|line| line["name"] == name).expect(name);
    assert_eq!(told("alike")["fits"], true, "{lines:?}");
    assert_eq!(told("btrfs")["fits"], false, "{lines:?}");
    let misfits = told("btrfs")["misfits"].to_string();
    for words in ["/ is ext4 on the tree's machine, btrfs", "at /var", "/srv"] {
        assert!(misfits.contains(words), "{words}: {misfits}");
    }
    let misfits = told("small")["misfits"].to_string();
    assert!(misfits.contains("at /var have 100000 bytes or more"), "{misfits}");
    assert_eq!(told("unseen")["fits"], Value::Null, "{lines:?}");
}

/// Where none fits, the exit code says so, and what can be done.
#[test]
fn a_machine_that_no_template_fits_is_told() {
    if !qemu_available() {
        return;
    }
    let host = Host::without_repository();
    template(&host, "unseen", |record| record["flavour"] = Value::Null);

    let outcome = host.run(["image", "match", "--tree", &tree(&host), &store(&host)]);

    assert_says(&outcome, 1, "no template in ");
    assert!(outcome.stderr.contains("image info TEMPLATE --look"), "{outcome:?}");
    assert!(outcome.stdout.contains("unseen: nobody has looked"), "{outcome:?}");
    let mut remote = host.command(["image", "match", "--tree", "rsync://store/shop"]);
    remote.arg(store(&host));
    let outcome = finish(spawn(remote));
    assert_says(&outcome, 2, "no folder of this host");
    assert!(outcome.stderr.contains("image update"), "{outcome:?}");
}
