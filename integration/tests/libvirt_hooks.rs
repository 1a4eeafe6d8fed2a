//! Scripts in a real guest, through libvirt and its agent, around a point in time.

use std::fs;

use integration::Host;
use integration::faults::assert_says;
use serde_json::{Value, json};
use vm_fixtures::libvirt::Libvirt;
use vm_fixtures::{Disk, FileSystem, Guest, MIB};

#[test]
fn scripts_in_the_guest_leave_what_they_did_before_the_point_in_time() {
    let Some(libvirt) = Libvirt::start() else { return };
    let plan = Guest::builder().disk(Disk::new("vda", 64 * MIB).mounted(FileSystem::Ext4));
    let domain = plan.under_libvirt().boot(&libvirt);
    let host = Host::new();
    let hook = |at: &str, line: &str, required: bool| {
        let command = json!(["/bin/sh", "-c", line]);
        let required = if required { "required = true" } else { "" };
        format!(
            "[[domain.\"*\".hook]]\nat = {at:?}\nwhere = \"guest\"\ncommand = {command}\n{required}\n"
        )
    };
    let note = "echo $KVMSNAP_AT $KVMSNAP_DOMAIN >> /mnt/vda/told";
    let notes = ["before", "freeze", "thaw"].map(|at| hook(at, note, false)).concat();
    fs::write(host.config(), format!("[domain.\"*\"]\ntrim = true\n{notes}"))
        .expect("a configuration");

    let line = host.ok(["backup", "--json", domain.name()]);

    let made: Value = serde_json::from_str(&line).expect("one JSON object");
    assert_eq!(
        (&made["consistency"], &made["warnings"]),
        (&json!("application"), &json!([])),
        "{made}"
    );
    let name = domain.name();
    let told = format!("before {name}\nfreeze {name}");
    assert_eq!(domain.sh("cat /mnt/vda/told").trim(), format!("{told}\nthaw {name}"));
    let folder = host.restore(&format!("latest:{name}"));
    let image = folder.join("vda.raw");
    let said = ["-R".as_ref(), "cat told".as_ref(), image.as_os_str()];
    assert_eq!(vm_fixtures::run("debugfs", &said).trim(), told);

    fs::write(host.config(), hook("freeze", "echo no; exit 3", true)).expect("a configuration");
    assert_says(&host.run(["backup", "--json", name]), 1, "it ended with 3");
    assert_eq!(domain.sh("echo goes on > /mnt/vda/told; cat /mnt/vda/told").trim(), "goes on");
    assert_eq!(host.list().len(), 1);
    host.assert_nothing_left();
}
