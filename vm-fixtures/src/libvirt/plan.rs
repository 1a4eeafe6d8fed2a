//! What a domain is to look like, and its XML (<https://libvirt.org/formatdomain.html>).

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use super::{Domain, Libvirt};
use crate::builder::GuestBuilder;
use crate::disk::Disk;
use crate::recipe::System;
use crate::tools::{available, run};

const FIRMWARE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const FIRMWARE_VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// The plan of a domain; [`Self::boot`] makes it real.
#[derive(Debug, Clone)]
#[must_use]
pub struct DomainBuilder {
    pub(super) plan: GuestBuilder,
    uefi: bool,
    tpm: bool,
    devices: String,
}

impl GuestBuilder {
    /// The same machine as a domain of libvirt. Its name begins with that of its folder; the ids of
    /// its disks must be the names that the guest's kernel gives them: `vda`, `vdb`, `sda`.
    pub fn under_libvirt(self) -> DomainBuilder {
        DomainBuilder { plan: self, uefi: false, tpm: false, devices: String::new() }
    }
}

impl DomainBuilder {
    /// With UEFI firmware; its variables are in `nvram.fd` in the domain's folder.
    pub fn uefi(mut self) -> Self {
        self.uefi = true;
        self
    }

    /// With an emulated TPM 2.0 (swtpm).
    pub fn tpm(mut self) -> Self {
        self.tpm = true;
        self
    }

    /// More devices, as XML.
    pub fn devices_xml(mut self, xml: &str) -> Self {
        self.devices.push_str(xml);
        self
    }

    /// Makes the disks and defines the domain, which stays shut off.
    ///
    /// # Panics
    ///
    /// When libvirt refuses it, or firmware or TPM are not installed.
    #[track_caller]
    pub fn define(self, libvirt: &Libvirt) -> Domain {
        let needed = [(self.tpm, "swtpm", "swtpm"), (self.tpm, "swtpm_setup", "swtpm-tools")];
        for (wanted, program, package) in needed {
            assert!(!wanted || available(program, package), "{program} is missing");
        }
        Domain::define(self, libvirt)
    }

    /// Makes the disks, defines the domain, starts it and waits until the machine is up.
    ///
    /// # Panics
    ///
    /// When it does not come up.
    #[track_caller]
    pub fn boot(self, libvirt: &Libvirt) -> Domain {
        let domain = self.define(libvirt);
        domain.start();
        domain
    }

    /// Puts the files of the domain into its folder and returns its XML.
    #[track_caller]
    pub(super) fn make(&self, name: &str, folder: &Path) -> String {
        let plan = &self.plan;
        for disk in &plan.disks {
            disk.create(folder);
        }
        let kvm = env::var_os("KVMSNAP_ACCEL").is_some_and(|accel| accel == "kvm");
        let kind = if kvm { "kvm" } else { "qemu" };
        let cpu = if kvm { "<cpu mode='host-passthrough'/>" } else { "" };
        let disks = plan.disks.iter().enumerate();
        let disks: String = disks.map(|(i, disk)| disk_xml(plan, disk, i + 1, folder)).collect();
        let tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>";
        let channels = if plan.os { channels(folder) } else { String::new() };
        format!(
            "<domain type='{kind}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\
             <name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>{memory}</memory>\
             <vcpu>{processors}</vcpu><iothreads>{iothreads}</iothreads>\
             <os><type arch='x86_64' machine='q35'>hvm</type>{boot}</os>\
             <features><acpi/></features>{cpu}<devices>{disks}{channels}{tpm}{devices}\
             <controller type='scsi' model='virtio-scsi'/><controller type='usb' model='none'/>\
             <memballoon model='none'/></devices>{qemu}</domain>",
            name = escape(name),
            uuid = escape(&plan.uuid),
            memory = plan.memory_mib,
            processors = plan.processors,
            iothreads =
                if plan.disks.iter().any(|disk| disk.iothread) { plan.disks.len() } else { 0 },
            boot = self.boot_xml(folder),
            tpm = if self.tpm { tpm } else { "" },
            devices = self.devices,
            qemu = self.qemu_xml(folder),
        )
    }

    /// The firmware, and the kernel that it starts.
    fn boot_xml(&self, folder: &Path) -> String {
        let mut xml = String::new();
        if self.uefi {
            xml.push_str(&format!(
                "<loader readonly='yes' type='pflash'>{FIRMWARE}</loader>\
                 <nvram template='{FIRMWARE_VARIABLES}'>{}</nvram>",
                text(&folder.join("nvram.fd"))
            ));
        }
        if self.plan.os {
            let system = System::get();
            // QEMU's user cannot reach the cache, and libvirt gives it these files.
            fs::copy(&system.kernel, folder.join("kernel")).expect("the folder is ours");
            system.write_initramfs(&folder.join("initramfs"));
            xml.push_str(&format!(
                "<kernel>{}</kernel><initrd>{}</initrd><cmdline>{}</cmdline>",
                text(&folder.join("kernel")),
                text(&folder.join("initramfs")),
                escape(&self.plan.kernel_command_line()),
            ));
        }
        xml
    }

    /// What libvirt has no words for.
    fn qemu_xml(&self, folder: &Path) -> String {
        let mut args: Vec<String> = Vec::new();
        if self.plan.os {
            let log = folder.join("oracle.log");
            fs::write(&log, "").expect("the folder is ours");
            let everybody = fs::Permissions::from_mode(0o666);
            fs::set_permissions(&log, everybody).expect("the file is ours");
            // QEMU writes it itself: by way of libvirt a line would come late, and long logs be cut.
            args.extend([
                "-chardev".to_owned(),
                format!("file,id=oracle,path={},append=on", log.display()),
                "-device".to_owned(),
                "virtio-serial-pci,id=fixture-serial,bus=pcie.0,addr=0x1d".to_owned(),
                "-device".to_owned(),
                "virtserialport,bus=fixture-serial.0,chardev=oracle,name=org.kvmsnap.oracle.0"
                    .to_owned(),
            ]);
        }
        args.extend(self.plan.extra.iter().map(|arg| arg.to_string_lossy().into_owned()));
        let args: String =
            args.iter().map(|arg| format!("<qemu:arg value='{}'/>", escape(arg))).collect();
        // What `qemu-io` prints must be in the log when its command is done: line by line.
        let variables = run("stdbuf", &["-oL", "env"]);
        let variables = variables.lines().filter_map(|line| line.split_once('='));
        let variables = variables.filter(|(name, _)| ["LD_PRELOAD", "_STDBUF_O"].contains(name));
        let variables: String = variables
            .map(|(name, value)| format!("<qemu:env name='{name}' value='{}'/>", escape(value)))
            .collect();
        format!("<qemu:commandline>{args}{variables}</qemu:commandline>")
    }
}

/// The console, the guest's agent as libvirt connects to it, and the fixture's own.
fn channels(folder: &Path) -> String {
    format!(
        "<serial type='file'><source path='{}' append='on'/><target port='0'/></serial>\
         <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
         <channel type='unix'><source mode='bind' path='{}'/>\
         <target type='virtio' name='org.kvmsnap.fixture.0'/></channel>",
        text(&folder.join("console.log")),
        text(&folder.join("fixture-qga.sock")),
    )
}

/// One disk. The device gets its id as an alias, which QEMU knows as `ua-<id>`.
#[track_caller]
pub(super) fn disk_xml(plan: &GuestBuilder, disk: &Disk, iothread: usize, folder: &Path) -> String {
    let id = &disk.id;
    assert_eq!(*id, plan.device_name(id), "a domain's disks are named as the guest knows them");
    assert!(disk.is_plain(), "{id}: throttle, blkdebug and device properties are not for libvirt");
    let iothread = if disk.iothread { format!(" iothread='{iothread}'") } else { String::new() };
    format!(
        "<disk type='file' device='disk'>\
         <driver name='qemu' type='{}' discard='unmap'{iothread}/><source file='{}'/>\
         <target dev='{id}' bus='{}'/><alias name='ua-{id}'/></disk>",
        disk.format.driver(),
        text(&disk.path(folder)),
        if disk.scsi { "scsi" } else { "virtio" },
    )
}

fn text(path: &Path) -> String {
    escape(path.to_str().expect("the fixture's paths are text"))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\'', "&apos;")
}
