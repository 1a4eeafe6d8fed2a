use super::*;
use crate::restore::host::DomainHere;

const UUID: &str = "11111111-2222-4333-8444-555555555555";
const NEW_UUID: &str = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee";
const GENERATION: &str = "99999999-bbbb-4ccc-8ddd-eeeeeeeeeeee";
const MAC: &str = "52:54:00:aa:bb:cc";

/// A machine and a host for it; what differs is added by each test.
struct Scene {
    os: &'static str,
    extra: &'static str,
    devices: String,
    host: Host,
    files: Vec<FileManifest>,
    networks: BTreeMap<String, String>,
    disks: Vec<DiskName>,
    name: Option<DomainName>,
    keep_identity: bool,
    start: bool,
}

impl Scene {
    fn new() -> Self {
        let machine = |name: &str, canonical: Option<&str>| MachineType {
            name: name.to_owned(),
            canonical: canonical.map(str::to_owned),
        };
        let mut host = Host::default();
        host.kinds.insert("kvm".to_owned());
        host.machines = vec![
            machine("pc-q35-6.2", None),
            machine("pc-q35-7.2", None),
            machine("q35", Some("pc-q35-7.2")),
            machine("virt-7.1", None),
            machine("virt-7.10", None),
            machine("virt-7.9", None),
        ];
        Self {
            os: "<type arch='x86_64' machine='pc-q35-7.2'>hvm</type>",
            extra: "",
            devices:
                "<disk type='block' device='disk'><driver name='qemu' type='raw' cache='none'/>\
                      <source dev='/dev/vg/web'/><target dev='vda' bus='virtio'/></disk>"
                    .to_owned(),
            host,
            files: Vec::new(),
            networks: BTreeMap::new(),
            disks: vec!["vda".parse().unwrap()],
            name: None,
            keep_identity: false,
            start: false,
        }
    }

    fn device(mut self, xml: &str) -> Self {
        self.devices.push_str(xml);
        self
    }

    fn here(mut self, path: &str) -> Self {
        self.host.paths.insert(path.into());
        self
    }

    fn neighbour(mut self, name: &str, uuid: &str, mac: &str) -> Self {
        let (name, uuid, macs) = (name.to_owned(), uuid.to_owned(), vec![mac.to_owned()]);
        self.host.domains.push(DomainHere { name, uuid, macs, images: Vec::new() });
        self
    }

    fn file(mut self, name: &str, role: Role, source: Option<&str>) -> Self {
        let (name, source) = (name.to_owned(), source.map(str::to_owned));
        self.files.push(FileManifest { name, role, source, size: 1 });
        self
    }

    fn plan(&self) -> Result<Plan, DefineError> {
        let text = format!(
            "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\
             <name>web</name><uuid>{UUID}</uuid><os>{}</os>{}<devices>{}</devices></domain>",
            self.os, self.extra, self.devices
        );
        let place = Place::new("/srv/new".into(), String::new());
        let wanted = Wanted {
            name: self.name.as_ref(),
            keep_identity: self.keep_identity,
            start: self.start,
            place: &place,
            format: Format::Qcow2,
            disks: &self.disks,
            files: &self.files,
            networks: &self.networks,
            uuid: NEW_UUID,
            generation: GENERATION,
        };
        plan(xml::parse(&text).unwrap(), &self.host, &wanted)
    }

    /// The new description and the lines of the plan, as text.
    #[track_caller]
    fn planned(&self) -> (String, Vec<String>) {
        let plan = self.plan().unwrap();
        let lines = plan.lines.iter().map(ToString::to_string).collect();
        (xml::write(&plan.domain), lines)
    }
}

/// Whether an element with these attributes, whatever their order, is in a description.
fn has(text: &str, name: &str, attributes: &[(&str, &str)]) -> bool {
    fn search(element: &Element, name: &str, attributes: &[(&str, &str)]) -> bool {
        let is = |(key, value): &(&str, &str)| {
            element.attributes.get(*key).is_some_and(|found| found == value)
        };
        (element.name == name && attributes.iter().all(is))
            || xml::elements(element).any(|child| search(child, name, attributes))
    }
    search(&xml::parse(text).unwrap(), name, attributes)
}

#[test]
fn a_disk_of_any_kind_becomes_a_file() {
    let (xml, lines) = Scene::new().planned();

    assert!(has(&xml, "disk", &[("type", "file"), ("device", "disk")]), "{xml}");
    assert!(has(&xml, "source", &[("file", "/srv/new/vda.qcow2")]), "{xml}");
    assert!(has(&xml, "driver", &[("type", "qcow2"), ("cache", "none")]), "{xml}");
    assert!(!xml.contains("/dev/vg/web"), "{xml}");
    assert!(lines.contains(&"disk vda: /srv/new/vda.qcow2; it was /dev/vg/web".to_owned()));

    let mut scene = Scene::new();
    scene.devices = "<disk type='volume' device='lun' rawio='yes'>\
                     <source pool='p' volume='v'><encryption format='luks'/></source>\
                     <backingStore type='file'><format type='raw'/></backingStore>\
                     <target dev='vda' bus='virtio'/></disk>"
        .to_owned();
    let (xml, lines) = scene.planned();
    assert!(has(&xml, "disk", &[("type", "file"), ("device", "disk")]), "{xml}");
    assert!(has(&xml, "driver", &[("type", "qcow2"), ("name", "qemu")]), "{xml}");
    for gone in ["encryption", "backingStore", "rawio", "pool="] {
        assert!(!xml.contains(gone), "{gone}: {xml}");
    }
    let encrypted = "disk vda: its image was encrypted, the restored one is not";
    assert!(lines.contains(&encrypted.to_owned()), "{lines:?}");
}

#[test]
fn what_nobody_asked_about_stays_as_it_was() {
    let mut scene = Scene::new();
    scene.extra = "<metadata><app:x xmlns:app='http://example.org/app' id='1'>a &amp; b</app:x>\
                   </metadata><unheard of='it'/><qemu:commandline><qemu:arg value='-v'/>\
                   </qemu:commandline>";

    let (xml, lines) = scene.planned();

    assert!(xml.contains("<app:x xmlns:app=\"http://example.org/app\" id=\"1\">a &amp; b</app:x>"));
    assert!(has(&xml, "unheard", &[("of", "it")]), "{xml}");
    assert!(xml.contains("xmlns:qemu=\"http://libvirt.org/schemas/domain/qemu/1.0\""), "{xml}");
    assert!(xml.contains("<qemu:arg value=\"-v\""), "{xml}");
    assert!(lines.iter().any(|line| line.starts_with("QEMU: ")), "{lines:?}");
}

#[test]
fn s14_a_second_machine_gets_an_identity_of_its_own() {
    let mut scene = Scene::new()
        .device(&format!("<interface type='user'><mac address='{MAC}'/></interface>"))
        .neighbour("web", UUID, MAC);
    scene.extra = "<genid>0</genid><sysinfo type='smbios'><system><entry name='uuid'>x</entry>\
                   <entry name='serial'>7</entry></system></sysinfo>";
    let taken = scene.plan().unwrap_err();
    assert!(matches!(taken, DefineError::NameTaken { .. }), "{taken}");
    scene.name = Some("web-2".parse().unwrap());

    let (xml, lines) = scene.planned();

    assert!(!xml.contains(MAC) && !xml.contains(UUID), "{xml}");
    assert!(xml.contains("<name>web-2</name>"), "{xml}");
    assert!(xml.contains(&format!("<uuid>{NEW_UUID}</uuid>")), "{xml}");
    assert!(xml.contains(&format!("<entry name=\"uuid\">{NEW_UUID}</entry>")), "{xml}");
    assert!(xml.contains("<entry name=\"serial\">7</entry>"), "{xml}");
    assert!(xml.contains(&format!("<genid>{GENERATION}</genid>")), "{xml}");
    assert!(lines.contains(&format!("interface {MAC}: gets a new MAC address")), "{lines:?}");
}

#[test]
fn s14_an_identity_is_kept_only_where_nobody_has_a_part_of_it() {
    let device =
        format!("<interface type='user'><mac address='{}'/></interface>", MAC.to_uppercase());
    let scene = || {
        let scene = Scene::new().device(&device);
        Scene { keep_identity: true, name: Some("back".parse().unwrap()), ..scene }
    };
    let plan = scene().plan().unwrap();
    assert_eq!(plan.uuid, UUID);
    assert_eq!(host::macs(&plan.domain), [MAC]);

    let taken = scene().neighbour("web", UUID, "x").plan().unwrap_err();
    assert!(matches!(taken, DefineError::UuidTaken { .. }), "{taken}");
    let taken = scene().neighbour("other", NEW_UUID, MAC).plan().unwrap_err();
    assert_eq!(taken.to_string(), format!("the domain `other` has the MAC address {MAC}"));
}

#[test]
fn an_unknown_machine_type_becomes_the_nearest_of_its_family() {
    let at = |machine: &str| {
        let mut scene = Scene::new();
        let os = format!("<type arch='x86_64' machine='{machine}'>hvm</type>");
        scene.os = Box::leak(os.into_boxed_str());
        scene.plan().map(|plan| xml::write(&plan.domain))
    };
    assert!(at("pc-q35-6.2").unwrap().contains("pc-q35-6.2"));
    assert!(has(&at("pc-q35-9.1").unwrap(), "type", &[("machine", "pc-q35-7.2")]));
    assert!(has(&at("pc-q35-rhel9.2.0").unwrap(), "type", &[("machine", "pc-q35-7.2")]));
    assert!(has(&at("virt-9.0").unwrap(), "type", &[("machine", "virt-7.10")]));
    let unknown = at("s390-ccw-virtio-7.2").unwrap_err();
    assert!(matches!(unknown, DefineError::NoMachine { .. }), "{unknown}");
    let mut scene = Scene::new();
    scene.host.kinds.clear();
    let unable = scene.plan().unwrap_err();
    assert!(matches!(unable, DefineError::CannotRun { .. }), "{unable}");
}

#[test]
fn firmware_that_is_not_here_is_chosen_anew_and_its_variables_come_back() {
    const LOADER: &str = "/usr/share/OVMF/OVMF_CODE.fd";
    let mut scene = Scene::new().file("nvram", Role::Nvram, Some("/var/lib/web.fd"));
    scene.os = "<type arch='x86_64' machine='pc-q35-7.2'>hvm</type>\
                <loader readonly='yes' secure='no' type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader>\
                <nvram type='file' template='/usr/share/OVMF/VARS.fd'><source file='/var/lib/web.fd'/>\
                </nvram>";

    let (xml, lines) = scene.planned();

    assert!(has(&xml, "os", &[("firmware", "efi")]), "{xml}");
    assert!(has(&xml, "feature", &[("name", "secure-boot"), ("enabled", "no")]), "{xml}");
    assert!(!xml.contains(LOADER), "{xml}");
    assert!(xml.contains("<nvram>/srv/new/web_VARS.fd</nvram>"), "{xml}");
    assert!(lines.contains(&format!("firmware: chosen by libvirt; {LOADER} is not here")));
    let copies = scene.plan().unwrap().copies;
    let to = PathBuf::from("/srv/new/web_VARS.fd");
    assert_eq!(copies, [Copy { file: "nvram".to_owned(), to }]);

    let mut scene = scene.here(LOADER);
    scene.files.clear();
    let (xml, lines) = scene.planned();
    assert!(xml.contains(LOADER) && !has(&xml, "os", &[("firmware", "efi")]), "{xml}");
    assert!(lines.iter().any(|line| line.contains("they begin anew")), "{lines:?}");
}

#[test]
fn a_kernel_that_is_not_here_comes_from_the_backup() {
    let mut scene = Scene::new().here("/boot/initrd").file("kernel", Role::Kernel, Some("/boot/k"));
    scene.os = "<type arch='x86_64' machine='q35'>hvm</type><kernel>/boot/k</kernel>\
                <initrd>/boot/initrd</initrd>";

    let (xml, _) = scene.planned();

    assert!(xml.contains("<kernel>/srv/new/kernel</kernel>"), "{xml}");
    assert!(xml.contains("<initrd>/boot/initrd</initrd>"), "{xml}");
    scene.files.clear();
    assert_eq!(
        scene.plan().unwrap().obstacles(),
        ["kernel: /boot/k is neither here nor in the backup"]
    );
}

#[test]
fn media_that_are_not_here_are_ejected_and_disks_that_are_not_restored_left_out() {
    let cdrom = |file: &str, target: &str| {
        format!(
            "<disk type='file' device='cdrom'><source file='{file}'/><target dev='{target}'/>\
             <readonly/></disk>"
        )
    };
    let scene = Scene::new()
        .device(&cdrom("/iso/gone.iso", "sda"))
        .device(&cdrom("/iso/here.iso", "sdb"))
        .device("<disk type='file' device='disk'><source file='/x'/><target dev='vdb'/></disk>")
        .device("<disk type='file'><source file='/y'/><target dev='vdc'/><readonly/></disk>")
        .here("/iso/here.iso")
        .here("/x")
        .here("/y");

    let (xml, lines) = scene.planned();

    assert!(!xml.contains("/iso/gone.iso") && xml.contains("/iso/here.iso"), "{xml}");
    assert!(has(&xml, "target", &[("dev", "sda")]), "the drive stays: {xml}");
    assert!(!has(&xml, "target", &[("dev", "vdb")]) && has(&xml, "target", &[("dev", "vdc")]));
    assert!(lines.contains(&"disk sda: ejected; /iso/gone.iso is not here".to_owned()));
    assert!(lines.iter().any(|line| line.starts_with("disk vdb: left out")), "{lines:?}");
}

#[test]
fn a_network_is_taken_from_the_backup_or_keeps_the_machine_from_starting() {
    let network = "<interface type='network'><source network='lab'/></interface>";
    let bridge = "<interface type='bridge'><source bridge='br7'/></interface>";
    let mut scene = Scene::new().device(network).device(network);
    scene.start = true;
    let refused = scene.plan().unwrap_err();
    let text =
        "the machine could not be started here: network lab: is neither here nor in the backup";
    assert_eq!(refused.to_string(), text);

    scene.networks.insert("lab".to_owned(), "<network/>".to_owned());
    assert_eq!(scene.plan().unwrap().networks, ["lab"]);

    scene.host.networks.insert("lab".to_owned(), false);
    assert!(scene.plan().unwrap_err().to_string().contains("`virsh net-start lab`"));
    scene.host.networks.insert("lab".to_owned(), true);
    assert!(scene.plan().unwrap().networks.is_empty());

    let mut scene = scene.device(bridge);
    assert!(scene.plan().unwrap_err().to_string().contains("br7 is not here"));
    scene.host.links.insert("br7".to_owned());
    scene.plan().unwrap();
}

#[test]
fn a_tpm_gets_its_state_under_the_new_uuid_and_never_anothers() {
    let tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>";
    let source = format!("{TPM_STATES}/{UUID}/tpm2/tpm2-00.permall");
    let mut scene = Scene::new().device(tpm).file("tpm", Role::Tpm, Some(&source));
    let plan = scene.plan().unwrap();
    let to = Path::new(TPM_STATES).join(NEW_UUID).join("tpm2/tpm2-00.permall");
    assert_eq!(plan.copies, [Copy { file: "tpm".to_owned(), to }]);
    assert_eq!(plan.tpm, Some(Path::new(TPM_STATES).join(NEW_UUID)));

    scene.keep_identity = true;
    let scene = scene.here(&format!("{TPM_STATES}/{UUID}"));
    let taken = scene.plan().unwrap_err();
    assert!(matches!(taken, DefineError::TpmTaken { .. }), "{taken}");

    // A name that leads out of the folder is none of a TPM's state.
    let scene = Scene::new().device(tpm).file("tpm", Role::Tpm, Some("/var/../.."));
    assert!(scene.plan().unwrap().copies.is_empty());
}

#[test]
fn whatever_else_the_host_lacks_is_said() {
    let scene = Scene::new()
        .device("<emulator>/usr/libexec/qemu-kvm</emulator>")
        .device("<serial type='file'><source path='/gone/console.log'/></serial>")
        .device("<filesystem><source dir='/share'/></filesystem>")
        .device("<tpm><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>")
        .device("<hostdev mode='subsystem' type='pci'/>")
        .device("<graphics type='vnc' port='-1'/>");

    let (xml, lines) = scene.planned();

    assert!(!xml.contains("emulator"), "{xml}");
    for line in [
        "emulator: chosen by libvirt; /usr/libexec/qemu-kvm is not here",
        "serial: /gone is not here",
        "filesystem: /share is not here",
        "tpm: /dev/tpm0 is not here",
        "passed-through device: it is named as on the other host: check that it is the right one",
        "vnc console: has no password: without --with-secrets a backup has none",
    ] {
        assert!(lines.contains(&line.to_owned()), "{line}: {lines:#?}");
    }
}
