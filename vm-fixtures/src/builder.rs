//! What a machine is to look like, and QEMU's command line for it.

use std::env;
use std::ffi::OsString;
use std::path::Path;

use crate::disk::Disk;
use crate::guest::Guest;
use crate::tools::qemu_available;

const MEMORY_MIB: u32 = 256;
const MEMORY_WITHOUT_OS_MIB: u32 = 64;

/// The plan of a machine; [`Self::boot`] makes it real.
#[derive(Debug, Clone)]
#[must_use]
pub struct GuestBuilder {
    pub(crate) os: bool,
    pub(crate) name: String,
    pub(crate) uuid: String,
    pub(crate) disks: Vec<Disk>,
    pub(crate) memory_mib: u32,
    pub(crate) processors: u32,
    pub(crate) extra: Vec<OsString>,
}

impl GuestBuilder {
    pub(crate) fn new(os: bool) -> Self {
        Self {
            os,
            name: "fixture".to_owned(),
            uuid: random_uuid(),
            disks: Vec::new(),
            memory_mib: if os { MEMORY_MIB } else { MEMORY_WITHOUT_OS_MIB },
            processors: 1,
            extra: Vec::new(),
        }
    }

    /// Adds a disk. In the guest the virtio-blk disks are `/dev/vda`, `/dev/vdb`, … in the order they
    /// were added, those on virtio-scsi `/dev/sda`, ….
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// The machine's name, `fixture` unless told otherwise.
    pub fn name(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    /// The machine's UUID, a random one unless told otherwise.
    pub fn uuid(mut self, uuid: &str) -> Self {
        self.uuid = uuid.to_owned();
        self
    }

    /// Memory in MiB, 256 unless told otherwise.
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Processors, one unless told otherwise.
    pub fn processors(mut self, processors: u32) -> Self {
        self.processors = processors;
        self
    }

    /// More arguments for QEMU, after the fixture's own.
    pub fn args<I: IntoIterator<Item = S>, S: Into<OsString>>(mut self, args: I) -> Self {
        self.extra.extend(args.into_iter().map(Into::into));
        self
    }

    /// Makes the disks, starts QEMU and waits until the machine is up.
    ///
    /// `None`, said aloud, where QEMU is not installed.
    ///
    /// # Panics
    ///
    /// When the machine does not come up, with the tail of its console; when QEMU is missing and
    /// `KVMSNAP_REQUIRE_QEMU=1`.
    #[track_caller]
    pub fn boot(self) -> Option<Guest> {
        qemu_available().then(|| Guest::start(self))
    }

    #[track_caller]
    pub(crate) fn disk_named(&self, id: &str) -> &Disk {
        let found = self.disks.iter().find(|disk| disk.id == id);
        found.unwrap_or_else(|| panic!("the machine has no disk `{id}`"))
    }

    /// `vda`, `vdb`, … and `sda`, `sdb`, …, as the kernel counts them.
    #[track_caller]
    pub(crate) fn device_name(&self, id: &str) -> String {
        let wanted = self.disk_named(id);
        let same_bus = self.disks.iter().filter(|disk| disk.scsi == wanted.scsi);
        let index = same_bus.take_while(|disk| disk.id != id).count();
        let letter = char::from(b'a' + u8::try_from(index).expect("machines have few disks"));
        format!("{}{letter}", if wanted.scsi { "sd" } else { "vd" })
    }

    /// QEMU's arguments, without kernel and initramfs.
    pub(crate) fn args_in(&self, folder: &Path) -> Vec<OsString> {
        let kvm = env::var_os("KVMSNAP_ACCEL").is_some_and(|accel| accel == "kvm");
        let path = |name: &str| folder.join(name).into_os_string().into_string();
        let path = |name: &str| path(name).expect("the fixture's folder has a plain name");
        let socket =
            |id: &str, name: &str| format!("socket,id={id},path={},server=on,wait=off", path(name));
        let accel = if kvm { ["kvm", "-cpu", "host"].as_slice() } else { &["tcg"] };
        let mut args = vec!["-machine", "q35", "-nodefaults", "-display", "none", "-accel"];
        args.extend(accel);
        let mut args: Vec<String> = args.into_iter().map(str::to_owned).collect();
        let mut add = |option: &str, value: String| args.extend([option.to_owned(), value]);
        add("-name", self.name.clone());
        add("-uuid", self.uuid.clone());
        add("-m", self.memory_mib.to_string());
        add("-smp", self.processors.to_string());
        for (id, name) in [("qmp", "qmp.sock"), ("fixture-qmp", "fixture-qmp.sock")] {
            add("-chardev", socket(id, name));
            add("-mon", format!("chardev={id},mode=control"));
        }
        if self.disks.iter().any(|disk| disk.scsi) {
            add("-device", "virtio-scsi-pci,id=scsi".to_owned());
        }
        if self.os {
            add("-append", self.kernel_command_line());
            add("-chardev", format!("file,id=console,path={},append=on", path("console.log")));
            add("-serial", "chardev:console".to_owned());
            add("-device", "virtio-serial-pci".to_owned());
            let agents = [
                ("qga", "qga.sock", "org.qemu.guest_agent.0"),
                ("fixture-qga", "fixture-qga.sock", "org.kvmsnap.fixture.0"),
            ];
            for (id, name, port) in agents {
                add("-chardev", socket(id, name));
                add("-device", format!("virtserialport,chardev={id},name={port}"));
            }
            let log = path("oracle.log");
            add("-chardev", format!("file,id=oracle,path={log},append=on"));
            add("-device", "virtserialport,chardev=oracle,name=org.kvmsnap.oracle.0".to_owned());
        }
        let mut args: Vec<OsString> = args.into_iter().map(OsString::from).collect();
        args.extend(self.disks.iter().flat_map(|disk| disk.args(folder)));
        args.extend(self.extra.iter().cloned());
        args
    }

    pub(crate) fn kernel_command_line(&self) -> String {
        // Without mitigations and address randomisation an emulated kernel boots a third faster. On a loaded
        // host an emulated timer may tick too late for the kernel to find it in time ("timer does not work").
        let mut line =
            "console=ttyS0 quiet loglevel=4 mitigations=off nokaslr tsc=reliable no_timer_check \
                        random.trust_cpu=on"
                .to_owned();
        for disk in &self.disks {
            let device = self.device_name(&disk.id);
            match disk.file_system.filter(|_| disk.mounted) {
                None => line.push_str(&format!(" fixture.wait={device}")),
                Some(file_system) => {
                    let id = &disk.id;
                    line.push_str(&format!(" fixture.mount={device}:{}:{id}", file_system.name()));
                }
            }
        }
        line
    }
}

/// A UUID of version 4 (RFC 9562).
fn random_uuid() -> String {
    let bits = rand::random::<u128>() & !(0xF << 76) | 4 << 76;
    let bits = bits & !(0b11 << 62) | 0b10 << 62;
    let hex = format!("{bits:032x}");
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

#[cfg(test)]
mod tests {
    use super::{GuestBuilder, random_uuid};
    use crate::disk::{Disk, MIB};

    #[test]
    fn disks_are_named_as_the_kernel_counts_them() {
        let plan = GuestBuilder::new(true)
            .disk(Disk::new("root", MIB))
            .disk(Disk::new("data", MIB).scsi())
            .disk(Disk::new("log", MIB));
        assert_eq!(plan.device_name("root"), "vda");
        assert_eq!(plan.device_name("data"), "sda");
        assert_eq!(plan.device_name("log"), "vdb");
    }

    #[test]
    fn uuids_say_their_version() {
        let uuid = random_uuid();
        assert_eq!(uuid.len(), 36);
        assert_eq!(&uuid[14..15], "4");
        assert!(matches!(&uuid[19..20], "8" | "9" | "a" | "b"), "{uuid}");
    }
}
