//! The machine that an image is started in: QEMU's command line, decided without I/O.

use std::path::{Path, PathBuf};

use image_tools::flavour::BootMode;
use serde_json::Value;
use xmltree::Element;

use super::Accel;
use crate::hypervisor::libvirt::xml;

/// The guest agent's port (QEMU's `docs/interop/qemu-ga.rst`).
const AGENT_PORT: &str = "org.qemu.guest_agent.0";
/// What QEMU must not do whatever a guest makes of it (`man qemu-system`, `-sandbox`).
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// What the description of a machine says about how it starts. It comes with the image, so nothing that it
/// names is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shape {
    /// `q35` or `pc`.
    machine: &'static str,
    /// Whether its firmware is UEFI, where it says.
    pub(super) uefi: bool,
    /// The buses of disks, by target.
    buses: Vec<(String, Bus)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bus {
    Virtio,
    Scsi,
    Ahci,
}

impl Shape {
    /// That of a machine of which nothing is known.
    pub(super) fn unknown() -> Self {
        Self { machine: "q35", uefi: false, buses: Vec::new() }
    }

    /// Reads it from libvirt's description of a machine.
    pub(super) fn read(domain: &Element) -> Self {
        let mut shape = Self::unknown();
        if let Some(os) = domain.get_child("os") {
            let machine = xml::attribute(os, "type", "machine").unwrap_or_default();
            if machine == "pc" || machine.starts_with("pc-i440fx") {
                shape.machine = "pc";
            }
            shape.uefi = os.attributes.get("firmware").is_some_and(|firmware| firmware == "efi")
                || xml::attribute(os, "loader", "type") == Some("pflash");
        }
        let devices = domain.get_child("devices").into_iter().flat_map(xml::elements);
        for disk in devices.filter(|device| device.name == "disk") {
            let get = |name| xml::attribute(disk, "target", name);
            if let (Some(target), Some(bus)) = (get("dev"), get("bus")) {
                let bus = match bus {
                    "scsi" => Bus::Scsi,
                    "sata" | "ide" | "usb" => Bus::Ahci,
                    _ => Bus::Virtio,
                };
                shape.buses.push((target.to_owned(), bus));
            }
        }
        shape
    }

    fn bus(&self, target: &str) -> Bus {
        let known = self.buses.iter().find(|(known, _)| known == target);
        known.map_or(Bus::Virtio, |(_, bus)| *bus)
    }
}

/// One disk of the machine.
#[derive(Debug)]
pub(super) struct TrialDisk<'a> {
    /// Its target, like `vda`.
    pub(super) target: &'a str,
    /// The image as a read-only node.
    pub(super) graph: Value,
}

/// A machine to be started.
#[derive(Debug)]
pub(super) struct Machine<'a> {
    /// What its description says.
    pub(super) shape: &'a Shape,
    /// The firmware's code, and a copy of its variables, of a machine with UEFI.
    pub(super) firmware: Option<(&'a Path, &'a Path)>,
    /// Its disks; it starts from the first.
    pub(super) disks: Vec<TrialDisk<'a>>,
    /// Bytes of memory.
    pub(super) memory: u64,
    /// Who runs it.
    pub(super) accel: Accel,
    /// Where QEMU listens for QMP.
    pub(super) qmp: &'a Path,
    /// Where it listens for a client of the guest agent.
    pub(super) agent: &'a Path,
}

impl Machine<'_> {
    /// QEMU's arguments. The serial console is QEMU's standard output.
    pub(super) fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["-nodefaults".to_owned(), "-no-user-config".to_owned()];
        let mut add = |option: &str, value: String| {
            arguments.extend([option.to_owned(), value]);
        };
        add("-name", "kvmsnap-trial".to_owned());
        add("-sandbox", SANDBOX.to_owned());
        add("-machine", format!("{},usb=off,vmport=off", self.shape.machine));
        let (accel, processor) = match self.accel {
            Accel::Kvm => ("kvm", "host"),
            // The plainest processor lacks what some systems are compiled for.
            Accel::Tcg => ("tcg", "max"),
        };
        add("-accel", accel.to_owned());
        add("-cpu", processor.to_owned());
        add("-m", format!("{}k", self.memory >> 10));
        add("-nic", "none".to_owned());
        add("-display", "none".to_owned());
        add("-vga", "std".to_owned());
        let socket = |id: &str, path: &Path| {
            format!("socket,id={id},path={},server=on,wait=off", escape(path))
        };
        add("-chardev", socket("qmp", self.qmp));
        add("-mon", "chardev=qmp,mode=control".to_owned());
        add("-chardev", socket("agent", self.agent));
        add("-device", "virtio-serial-pci".to_owned());
        add("-device", format!("virtserialport,chardev=agent,name={AGENT_PORT}"));
        add("-chardev", "stdio,id=console,signal=off".to_owned());
        add("-serial", "chardev:console".to_owned());
        add("-device", "virtio-rng-pci".to_owned());
        if let Some((code, variables)) = self.firmware {
            let flash = |path: &Path, unit: u32, read_only: &str| {
                let path = escape(path);
                format!("if=pflash,unit={unit},format=raw,file={path},readonly={read_only}")
            };
            add("-drive", flash(code, 0, "on"));
            add("-drive", flash(variables, 1, "off"));
        }
        let has = |bus| self.disks.iter().any(|disk| self.shape.bus(disk.target) == bus);
        if has(Bus::Scsi) {
            add("-device", "virtio-scsi-pci,id=scsi".to_owned());
        }
        if has(Bus::Ahci) {
            add("-device", "ich9-ahci,id=ahci".to_owned());
        }
        let mut ahci_port = 0;
        for (index, disk) in self.disks.iter().enumerate() {
            // QEMU makes an overlay on top and removes its name at once: nothing of it is ever left.
            let image = format!("json:{}", disk.graph).replace(',', ",,");
            add("-drive", format!("if=none,id=disk{index},file={image},snapshot=on,cache=unsafe"));
            let device = match self.shape.bus(disk.target) {
                Bus::Virtio => "virtio-blk-pci".to_owned(),
                Bus::Scsi => "scsi-hd,bus=scsi.0".to_owned(),
                Bus::Ahci => {
                    ahci_port += 1;
                    format!("ide-hd,bus=ahci.{}", ahci_port - 1)
                }
            };
            add("-device", format!("{device},drive=disk{index},bootindex={}", index + 1));
        }
        arguments
    }
}

/// A path as a value of one of QEMU's options, where a comma ends it.
fn escape(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// Firmware for UEFI, and empty variables that fit it; where distributions have them.
const FIRMWARE: [(&str, &str); 6] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"),
    ("/usr/share/edk2-ovmf/x64/OVMF_CODE.fd", "/usr/share/edk2-ovmf/x64/OVMF_VARS.fd"),
];

/// A firmware whose variables are as long as those of the machine, or just the first: `len_of` tells how
/// long a file is, where it is there.
pub(super) fn choose_firmware(
    variables: Option<u64>,
    len_of: impl Fn(&Path) -> Option<u64>,
) -> Option<(PathBuf, PathBuf)> {
    let known = FIRMWARE.map(|(code, empty)| (PathBuf::from(code), PathBuf::from(empty)));
    let mut known = known.into_iter().filter(|(code, _)| len_of(code).is_some());
    known.find(|(_, empty)| match (len_of(empty), variables) {
        (Some(len), Some(wanted)) => len == wanted,
        (len, None) => len.is_some(),
        (None, _) => false,
    })
}

/// Whether a machine starts by UEFI, by what is known of it in the order of how sure it is.
pub(super) fn is_uefi(flavour: Option<BootMode>, shape: &Shape, has_variables: bool) -> bool {
    match flavour {
        Some(mode) => mode == BootMode::Uefi,
        None => shape.uefi || has_variables,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const DOMAIN: &str = "<domain><os><type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type>\
        <loader type='pflash'>/etc/shadow</loader></os><devices>\
        <disk><target dev='sda' bus='sata'/></disk><disk><target dev='vda' bus='virtio'/></disk>\
        </devices></domain>";

    #[test]
    fn s02_nothing_that_a_description_names_is_opened() {
        let shape = Shape::read(&xml::parse(DOMAIN).unwrap());
        let graph = json!({"driver": "qcow2", "file": {"driver": "file", "filename": "/a,b"}});
        let disk = |target| TrialDisk { target, graph: graph.clone() };
        let machine = Machine {
            shape: &shape,
            firmware: None,
            disks: vec![disk("sda"), disk("vda")],
            memory: 1 << 30,
            accel: Accel::Tcg,
            qmp: Path::new("/run/qmp"),
            agent: Path::new("/run/agent"),
        };

        let arguments = machine.arguments().join(" ");

        assert!(!arguments.contains("shadow"), "{arguments}");
        assert!(arguments.contains("-machine pc,"), "{arguments}");
        assert!(arguments.contains("ide-hd,bus=ahci.0,drive=disk0,bootindex=1"), "{arguments}");
        assert!(arguments.contains("virtio-blk-pci,drive=disk1,bootindex=2"), "{arguments}");
        assert!(arguments.contains("-nic none"), "{arguments}");
        // A comma would end the value.
        assert!(arguments.contains("\"/a,,b\""), "{arguments}");
    }

    #[test]
    fn the_firmware_is_one_that_takes_the_machines_variables() {
        let len_of = |path: &Path| match path.to_str().unwrap() {
            "/usr/share/OVMF/OVMF_VARS_4M.fd" => Some(540_672),
            "/usr/share/OVMF/OVMF_VARS.fd" => Some(131_072),
            path if path.starts_with("/usr/share/OVMF") => Some(1),
            _ => None,
        };
        let code = |variables| choose_firmware(variables, len_of).map(|(code, _)| code);
        assert_eq!(code(None), Some("/usr/share/OVMF/OVMF_CODE_4M.fd".into()));
        assert_eq!(code(Some(131_072)), Some("/usr/share/OVMF/OVMF_CODE.fd".into()));
        assert_eq!(code(Some(7)), None);
        assert_eq!(choose_firmware(None, |_| None), None);
    }

    #[test]
    fn what_an_appliance_saw_counts_more_than_a_description() {
        let shape = Shape::read(&xml::parse(DOMAIN).unwrap());
        assert!(is_uefi(None, &shape, false));
        assert!(!is_uefi(Some(BootMode::Bios), &shape, true));
        assert!(is_uefi(None, &Shape::unknown(), true));
        assert!(!is_uefi(None, &Shape::unknown(), false));
    }
}
