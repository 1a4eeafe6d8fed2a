//! Who may name an overlay keeps it: definitions of libvirt that can and cannot be read.

use std::fs;
use std::path::Path;
use std::process::Command;

use integration::faults::assert_says;
use integration::libvirt::Scene;
use integration::overlays::lines;
use integration::restored::text;
use integration::{Outcome, tool};
use serde_json::Value;
use vm_fixtures::libvirt::Libvirt;

fn run(scene: &Scene, name: &str) -> Outcome {
    scene.host.run([name, "--json", scene.domain.name()])
}

#[track_caller]
fn ok(scene: &Scene, name: &str) -> Vec<Value> {
    let outcome = run(scene, name);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    lines(&outcome)
}

/// Defines a domain that does not run and has only this disk; it is undefined with the scene's folder.
fn define_other(scene: &Scene, disk: &str) -> String {
    let name = format!("{}-other", scene.domain.name());
    let xml = format!(
        "<domain type='qemu'><name>{name}</name><memory>65536</memory><os><type>hvm</type></os>\
         <devices>{disk}</devices></domain>"
    );
    let file = scene.domain.folder().join("other.xml");
    fs::write(&file, xml).expect("the folder is writable");
    scene.domain.libvirt().virsh(&["define", file.to_str().expect("a plain path")]);
    name
}

#[test]
fn r23_an_overlay_that_a_definition_may_name_is_not_deleted() {
    // A domain that cannot be read keeps the overlays of all others.
    let Some(libvirt) = Libvirt::alone() else { return };
    let scene = Scene::new(&libvirt);
    scene.domain.start();
    let created = ok(&scene, "create");
    let overlay = text(&created[0], "overlay");
    let folder = scene.domain.folder();
    let clone = folder.join("clone.qcow2");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", overlay]);
    tool({
        create.arg(&clone).arg("8M");
        create
    });
    let unread = folder.join("unread.qcow2");
    fs::write(&unread, "no image").expect("the folder is writable");
    let file = |image: &Path| {
        let image = image.display();
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
             <source file='{image}'/><target dev='vda'/><readonly/></disk>"
        )
    };
    let pool = format!("{}-pool", scene.domain.name());
    let target = folder.to_str().expect("a plain path");
    libvirt.virsh(&["pool-define-as", &pool, "dir", "--target", target]);
    let volume = format!(
        "<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/>\
         <source pool='{pool}' volume='clone.qcow2'/><target dev='vda'/></disk>"
    );
    let says = ["still names it", "unread.qcow2 (", "volume `clone.qcow2` of pool"];
    for (disk, says) in [file(&clone), file(&unread), volume].iter().zip(says) {
        let other = define_other(&scene, disk);
        let outcome = run(&scene, "purge");
        assert_says(&outcome, 1, says);
        assert_says(&outcome, 1, &other);
        assert!(Path::new(overlay).exists());
        libvirt.virsh(&["undefine", &other]);
    }

    libvirt.virsh(&["pool-undefine", &pool]);
    // What is not there leads nowhere.
    let gone = define_other(&scene, &file(&folder.join("gone.qcow2")));

    ok(&scene, "purge");

    libvirt.virsh(&["undefine", &gone]);
    assert!(!Path::new(overlay).exists());
}
