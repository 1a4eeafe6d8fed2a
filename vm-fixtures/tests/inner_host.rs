//! A guest that plays the host.

use vm_fixtures::{InnerHost, MIB};

#[test]
fn an_inner_host_has_a_device_mapper_and_runs_qemu() {
    let Some(host) = InnerHost::boot(&[], &[64 * MIB]) else { return };

    host.sh("pvcreate -q /dev/vdb && vgcreate -q vg /dev/vdb && lvcreate -q -y -n lv -L 16m vg");

    assert_eq!(host.sh("lvs --noheadings -o lv_full_name,lv_size").trim(), "vg/lv 16.00m");
    let disk = "driver=raw,node-name=disk,file.driver=host_device,file.filename=/dev/vg/lv";
    host.sh(&format!(
        "qemu-system-x86_64 -S -m 32 -nodefaults -display none -blockdev {disk} \
         -device virtio-blk-pci,drive=disk -daemonize -pidfile /tmp/pid && kill $(cat /tmp/pid)"
    ));
}
