//! What a machine that comes back must be like on this host, and in what that differs from what it was.
//! No I/O: what the host has is told, and what is to be done comes out.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Component, Path, PathBuf};

use serde::Serialize;
use xmltree::{Element, XMLNode};

use super::Format;
use super::define::DefineError;
use super::devices;
use super::host::{self, Host, MachineType};
use crate::hypervisor::Role;
use crate::hypervisor::libvirt::xml;
use crate::manifest::FileManifest;
use crate::names::{DiskName, DomainName};

/// Where libvirt keeps the state of emulated TPMs, in a folder for each domain's uuid.
pub(super) const TPM_STATES: &str = "/var/lib/libvirt/swtpm";

/// Where restored files go.
#[derive(Debug, Clone)]
pub struct Place {
    /// The folder.
    pub folder: PathBuf,
    /// What the names of files begin with, in a folder that others use too.
    pub prefix: String,
    /// Images that have places of their own.
    pub images: BTreeMap<DiskName, PathBuf>,
}

impl Place {
    /// A folder, and what the names of files in it begin with.
    pub fn new(folder: PathBuf, prefix: String) -> Self {
        Self { folder, prefix, images: BTreeMap::new() }
    }

    /// The image of a disk.
    pub fn disk(&self, disk: &DiskName, format: Format) -> PathBuf {
        let own = self.images.get(disk).cloned();
        own.unwrap_or_else(|| self.file(&format!("{disk}.{}", format.as_str())))
    }

    /// A file of the machine.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{}{name}", self.prefix))
    }
}

/// What is asked for.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// Another name than that in the backup.
    pub name: Option<&'a DomainName>,
    /// Whether uuid and MAC addresses stay as they were.
    pub keep_identity: bool,
    /// Whether the machine is to be started.
    pub start: bool,
    /// Where its files go.
    pub place: &'a Place,
    /// The format of its disks.
    pub format: Format,
    /// The disks that are restored.
    pub disks: &'a [DiskName],
    /// The machine's files in the backup.
    pub files: &'a [FileManifest],
    /// The descriptions of networks in the backup, by name.
    pub networks: &'a BTreeMap<String, String>,
    /// A new uuid.
    pub uuid: &'a str,
    /// A new generation id: the guest's clue that time went backwards.
    pub generation: &'a str,
}

/// What kind of a thing a line of the plan tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LineKind {
    /// Something that will be done.
    Step,
    /// Something that is not as it was.
    Difference,
    /// Something that keeps the machine from starting.
    Obstacle,
}

/// A line of the plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Line {
    /// What kind of a thing it tells.
    pub kind: LineKind,
    /// The part of the machine.
    pub about: String,
    /// What becomes of it.
    pub what: String,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.about, self.what)
    }
}

/// A file of the backup that the machine uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy {
    /// Its name in the snapshot.
    pub file: String,
    /// Where it goes.
    pub to: PathBuf,
}

/// How a machine comes back.
#[derive(Debug)]
pub struct Plan {
    /// Its name.
    pub name: String,
    /// Its uuid.
    pub uuid: String,
    /// Its description.
    pub domain: Element,
    /// Networks that are defined and started first.
    pub networks: Vec<String>,
    /// Files that it uses besides its disks.
    pub copies: Vec<Copy>,
    /// The folder of its TPM's state, where that is restored.
    pub tpm: Option<PathBuf>,
    /// What is done, and what differs.
    pub lines: Vec<Line>,
}

impl Plan {
    /// What keeps the machine from starting, in words.
    pub fn obstacles(&self) -> Vec<String> {
        let obstacles = self.lines.iter().filter(|line| line.kind == LineKind::Obstacle);
        obstacles.map(ToString::to_string).collect()
    }
}

/// Plans. `domain` is the stored description.
///
/// # Errors
/// [`DefineError`] where the machine cannot be defined here like that.
pub fn plan(domain: Element, host: &Host, wanted: &Wanted<'_>) -> Result<Plan, DefineError> {
    let original = xml::text(&domain, "name").unwrap_or_default();
    let name = wanted.name.map_or(original, ToString::to_string);
    if host.domains.iter().any(|here| here.name == name) {
        return Err(DefineError::NameTaken { name });
    }
    let plan = Plan {
        uuid: wanted.uuid.to_owned(),
        domain,
        networks: Vec::new(),
        copies: Vec::new(),
        tpm: None,
        lines: Vec::new(),
        name,
    };
    let mut planner = Planner { plan, host, wanted };
    planner.identity()?;
    planner.machine()?;
    planner.firmware();
    planner.kernel();
    devices::plan(&mut planner);
    planner.tpm()?;
    planner.extras();
    let plan = planner.plan;
    match wanted.start {
        true if !plan.obstacles().is_empty() => {
            Err(DefineError::CannotStart { obstacles: plan.obstacles() })
        }
        _ => Ok(plan),
    }
}

/// A plan in the making.
pub(super) struct Planner<'a> {
    pub(super) plan: Plan,
    pub(super) host: &'a Host,
    pub(super) wanted: &'a Wanted<'a>,
}

impl Planner<'_> {
    pub(super) fn step(&mut self, about: &str, what: impl Into<String>) {
        self.line(LineKind::Step, about, what.into());
    }

    pub(super) fn differs(&mut self, about: &str, what: impl Into<String>) {
        self.line(LineKind::Difference, about, what.into());
    }

    pub(super) fn obstacle(&mut self, about: &str, what: impl Into<String>) {
        self.line(LineKind::Obstacle, about, what.into());
    }

    fn line(&mut self, kind: LineKind, about: &str, what: String) {
        let line = Line { kind, about: about.to_owned(), what };
        if !self.plan.lines.contains(&line) {
            self.plan.lines.push(line);
        }
    }

    pub(super) fn is_here(&self, path: &str) -> bool {
        self.host.paths.contains(Path::new(path))
    }

    /// The file of the backup that has this role.
    fn stored(&self, role: Role) -> Option<String> {
        let file = self.wanted.files.iter().find(|file| file.role == role)?;
        Some(file.name.clone())
    }

    fn identity(&mut self) -> Result<(), DefineError> {
        let original = xml::text(&self.plan.domain, "uuid").unwrap_or_default();
        if self.wanted.keep_identity {
            let taken = |here: &&host::DomainHere| here.uuid.eq_ignore_ascii_case(&original);
            if let Some(here) = self.host.domains.iter().find(taken) {
                return Err(DefineError::UuidTaken { uuid: original, by: here.name.clone() });
            }
            for mac in host::macs(&self.plan.domain) {
                if let Some(here) = self.host.domains.iter().find(|here| here.macs.contains(&mac)) {
                    return Err(DefineError::MacTaken { mac, by: here.name.clone() });
                }
            }
            self.plan.uuid.clone_from(&original);
        }
        let (name, uuid) = (self.plan.name.clone(), self.plan.uuid.clone());
        let domain = &mut self.plan.domain;
        domain.attributes.remove("id");
        set_text(domain, "name", &name);
        set_text(domain, "uuid", &uuid);
        // The guest compares it with the last one it saw (Microsoft's "Virtual Machine Generation ID").
        if domain.get_child("genid").is_some() {
            set_text(domain, "genid", self.wanted.generation);
        }
        // libvirt refuses a system uuid that is not the domain's.
        let system = domain.get_mut_child("sysinfo").and_then(|info| info.get_mut_child("system"));
        for entry in system.into_iter().flat_map(elements_mut) {
            if entry.attributes.get("name").is_some_and(|name| name == "uuid") {
                entry.children = vec![XMLNode::Text(uuid.clone())];
            }
        }
        let what = match self.wanted.keep_identity {
            true => format!("{name}, with its uuid {uuid} and its MAC addresses"),
            false => format!("{name}, with the new uuid {uuid}"),
        };
        self.step("domain", what);
        Ok(())
    }

    /// What runs it, and its machine type.
    fn machine(&mut self) -> Result<(), DefineError> {
        let kind = self.plan.domain.attributes.get("type").cloned().unwrap_or_default();
        let Some(os) = self.plan.domain.get_mut_child("os").and_then(|os| os.get_mut_child("type"))
        else {
            return Ok(());
        };
        let arch = os.attributes.get("arch").cloned().unwrap_or_default();
        if !self.host.kinds.contains(&kind) {
            return Err(DefineError::CannotRun { kind, arch });
        }
        let Some(machine) = os.attributes.get("machine").cloned() else { return Ok(()) };
        if self.host.machines.iter().any(|known| known.name == machine) {
            return Ok(());
        }
        let Some(next) = nearest(&machine, &self.host.machines) else {
            return Err(DefineError::NoMachine { machine, arch });
        };
        let next = next.to_owned();
        xml::set(os, "machine", &next);
        self.differs("machine type", format!("{next}; {machine} is unknown here"));
        Ok(())
    }

    /// The firmware and its memory.
    fn firmware(&mut self) {
        let stored = self.stored(Role::Nvram);
        let Some(os) = self.plan.domain.get_child("os") else { return };
        let loader = xml::text(os, "loader").filter(|path| !self.is_here(path));
        let template = xml::attribute(os, "nvram", "template");
        let no_template = template.is_some_and(|path| !self.is_here(path));
        let has_memory = os.get_child("nvram").is_some();
        let memory = self.wanted.place.folder.join(format!("{}_VARS.fd", self.plan.name));
        let Some(os) = self.plan.domain.get_mut_child("os") else { return };
        let mut differs = Vec::new();
        if let Some(path) = loader {
            let is_flash = xml::attribute(os, "loader", "type") == Some("pflash");
            let loader = os.take_child("loader");
            if is_flash {
                // libvirt chooses one of those that the host's packages describe.
                xml::set(os, "firmware", "efi");
                let secure = loader.and_then(|loader| loader.attributes.get("secure").cloned());
                choose_secure_boot(os, secure.is_some_and(|secure| secure == "yes"));
            }
            differs.push(format!("chosen by libvirt; {path} is not here"));
        }
        if let Some(nvram) = os.get_mut_child("nvram") {
            nvram.children = vec![XMLNode::Text(memory.to_string_lossy().into_owned())];
            nvram.attributes.remove("type");
            if no_template {
                nvram.attributes.remove("template");
            }
        }
        for what in differs {
            self.differs("firmware", what);
        }
        match stored {
            Some(file) if has_memory => {
                self.step(
                    "firmware",
                    format!("its variables are restored to {}", memory.display()),
                );
                self.plan.copies.push(Copy { file, to: memory });
            }
            None if has_memory => {
                self.differs("firmware", "its variables are not in the backup: they begin anew");
            }
            _ => {}
        }
    }

    /// What is booted directly.
    fn kernel(&mut self) {
        for (tag, role) in [("kernel", Role::Kernel), ("initrd", Role::Initrd)] {
            let os = self.plan.domain.get_child("os");
            let Some(path) = os.and_then(|os| xml::text(os, tag)) else { continue };
            if self.is_here(&path) {
                continue;
            }
            let Some(file) = self.stored(role) else {
                self.obstacle(tag, format!("{path} is neither here nor in the backup"));
                continue;
            };
            let to = self.wanted.place.file(&file);
            let os = self.plan.domain.get_mut_child("os").expect("it was there above");
            set_text(os, tag, &to.to_string_lossy());
            self.differs(tag, format!("{}; {path} is not here", to.display()));
            self.plan.copies.push(Copy { file, to });
        }
    }

    /// The state of an emulated TPM.
    fn tpm(&mut self) -> Result<(), DefineError> {
        let devices = self.plan.domain.get_child("devices").into_iter().flat_map(xml::elements);
        let emulated = |device: &&Element| {
            device.name == "tpm" && xml::attribute(device, "backend", "type") == Some("emulator")
        };
        let Some(tpm) = devices.into_iter().find(emulated) else { return Ok(()) };
        let backend = tpm.get_child("backend");
        let is_encrypted = backend.is_some_and(|backend| backend.get_child("encryption").is_some());
        let state = Path::new(TPM_STATES).join(&self.plan.uuid);
        let files = self.wanted.files.iter().filter(|file| file.role == Role::Tpm);
        let copies: Vec<Copy> = files.filter_map(|file| tpm_copy(file, &state)).collect();
        if is_encrypted {
            self.differs(
                "tpm",
                "its state is encrypted: libvirt needs the secret that its description names",
            );
        }
        match copies.is_empty() {
            true => self.differs("tpm", "its state is not in the backup: what it sealed is lost"),
            false if self.host.paths.contains(&state) => {
                return Err(DefineError::TpmTaken { state });
            }
            false => {
                self.step("tpm", format!("its state is restored to {}", state.display()));
                self.plan.copies.extend(copies);
                self.plan.tpm = Some(state);
            }
        }
        Ok(())
    }

    fn extras(&mut self) {
        let has_arguments = xml::elements(&self.plan.domain)
            .any(|element| element.name == "commandline" && element.namespace.is_some());
        if has_arguments {
            self.differs("QEMU", "arguments that libvirt has no words for are passed as they are");
        }
    }
}

/// Has libvirt choose firmware with or without Secure Boot, as it was; firmware that it chose in the
/// first place says so itself.
fn choose_secure_boot(os: &mut Element, wanted: bool) {
    if os.get_child("firmware").is_some() {
        return;
    }
    let mut feature = xml::element("feature", &[("name", "secure-boot")]);
    xml::set(&mut feature, "enabled", if wanted { "yes" } else { "no" });
    let mut firmware = xml::element("firmware", &[]);
    xml::add(&mut firmware, feature);
    xml::add(os, firmware);
    if wanted {
        xml::add(os, xml::element("loader", &[("secure", "yes")]));
    }
}

/// Where a part of a TPM's state goes: its last two names, `tpm2/tpm2-00.permall`, below the folder.
fn tpm_copy(file: &FileManifest, state: &Path) -> Option<Copy> {
    let source = Path::new(file.source.as_ref()?);
    let names: Vec<Component<'_>> = source.components().collect();
    let [.., folder @ Component::Normal(_), name @ Component::Normal(_)] = names.as_slice() else {
        return None;
    };
    Some(Copy { file: file.name.clone(), to: state.join(folder).join(name) })
}

/// The machine type of the same family that is nearest to one which is not there: what the family's
/// alias stands for, else its newest.
fn nearest<'a>(machine: &str, known: &'a [MachineType]) -> Option<&'a str> {
    let family = |name: &str| name.rsplit_once('-').map_or(name, |(family, _)| family).to_owned();
    let wanted = family(machine);
    let canonical = known.iter().filter_map(|known| known.canonical.as_deref());
    let aliased = canonical.into_iter().find(|name| family(name) == wanted);
    let versions = |name: &str| -> Vec<u32> {
        let digits = name.split(|c: char| !c.is_ascii_digit());
        digits.filter_map(|digits| digits.parse().ok()).collect()
    };
    let names =
        known.iter().filter(|known| known.canonical.is_none()).map(|known| known.name.as_str());
    let of_family = names.filter(|name| name.contains('-') && family(name) == wanted);
    aliased.or_else(|| of_family.max_by_key(|name| versions(name)))
}

/// Gives a child of this name a text, a new one where there is none.
pub(super) fn set_text(parent: &mut Element, name: &str, text: &str) {
    match parent.get_mut_child(name) {
        Some(child) => child.children = vec![XMLNode::Text(text.to_owned())],
        None => xml::add(parent, xml::with_text(name, text)),
    }
}

fn elements_mut(parent: &mut Element) -> impl Iterator<Item = &mut Element> {
    parent.children.iter_mut().filter_map(XMLNode::as_mut_element)
}

#[cfg(test)]
mod tests;
