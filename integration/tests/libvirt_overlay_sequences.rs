//! Nothing is ever deleted that a chain names, on domains of libvirt, which are defined anew in between, also
//! with another uuid: see [`integration::sequences`].

use std::fs;
use std::path::PathBuf;

use integration::Host;
use integration::faults::signal;
use integration::sequences::{self, BLOCK, BLOCKS, DISKS, Ground, Tops};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vm_fixtures::libvirt::{Domain, Libvirt};
use vm_fixtures::{Disk, Guest};

/// A domain, and how it was defined at first.
struct Defined {
    host: Host,
    domain: Domain,
    /// With its disks' own images.
    definition: String,
    /// How often its uuid has changed.
    uuids: u32,
}

impl Defined {
    fn new(libvirt: &Libvirt) -> Self {
        let size = (BLOCKS * BLOCK) as u64;
        let plan = Guest::without_os().disk(Disk::new("vda", size));
        let domain = plan.disk(Disk::new("vdb", size).raw()).under_libvirt().define(libvirt);
        let definition = fs::read_to_string(domain.folder().join("domain.xml"));
        let definition = definition.expect("its definition");
        Self { host: Host::new(), domain, definition, uuids: 0 }
    }

    /// Defines it by this description, with the uuid of the last.
    fn define(&self, definition: &str) {
        let file = self.domain.folder().join("anew.xml");
        fs::write(&file, definition).expect("the folder is writable");
        self.domain.libvirt().virsh(&["define", file.to_str().expect("a plain path")]);
    }

    fn inactive(&self) -> String {
        self.domain.virsh("dumpxml", &["--inactive"])
    }

    /// The same description with another uuid; what is defined from here on has that.
    fn with_other_uuid(&mut self, description: &str) -> String {
        let uuid = self.domain.uuid();
        self.uuids += 1;
        let other = format!("{}{:012x}", &uuid[..24], self.uuids);
        self.definition = self.definition.replace(&uuid, &other);
        description.replace(&uuid, &other)
    }

    fn undefine(&self) {
        self.domain.virsh("undefine", &["--checkpoints-metadata"]);
    }
}

impl Ground for Defined {
    fn host(&self) -> &Host {
        &self.host
    }

    fn own(&self, disk: &str) -> PathBuf {
        let name = if disk == "vda" { "vda.qcow2" } else { "vdb.raw" };
        self.domain.folder().join(name)
    }

    fn words(&self) -> Vec<String> {
        vec![self.domain.name().to_owned()]
    }

    fn pid(&self) -> Option<u32> {
        self.domain.pid()
    }

    fn start(&mut self, _: &Tops) {
        self.domain.start();
    }

    fn quit(&mut self) {
        self.domain.destroy();
    }

    fn kill(&mut self) {
        if let Some(pid) =
            self.domain.pid().filter(|pid| PathBuf::from(format!("/proc/{pid}")).exists())
        {
            signal(pid, Signal::SIGKILL);
        }
        self.domain.wait_state("shut off");
    }

    fn tops(&self) -> Option<Tops> {
        let listed = self.domain.virsh("domblklist", &[]);
        let lines = listed.lines().filter_map(|line| line.trim().split_once(char::is_whitespace));
        let found = |disk| {
            let line = lines.clone().find(|(target, _)| *target == disk).expect("a disk");
            (disk, PathBuf::from(line.1.trim()))
        };
        Some(DISKS.map(found).into())
    }

    fn qemu_io(&self, disk: &str, command: &str) {
        self.domain.qemu_io(disk, command);
    }

    fn nodes(&self) -> Vec<Value> {
        let nodes = self.domain.qmp_command("query-named-block-nodes", &json!({"flat": true}));
        nodes.as_array().expect("a list").clone()
    }

    fn is_defined(&self) -> bool {
        true
    }

    fn define_on(&mut self, tops: &Tops) {
        let mut definition = self.definition.clone();
        for (disk, top) in tops.iter().filter(|(disk, top)| **top != self.own(disk)) {
            let format = if *disk == "vda" { "qcow2" } else { "raw" };
            let driver = |format: &str, image: &PathBuf| {
                format!("type='{format}' discard='unmap'/><source file='{}'/>", image.display())
            };
            let own = driver(format, &self.own(disk));
            assert!(definition.contains(&own), "{own} is not in {definition}");
            definition = definition.replace(&own, &driver("qcow2", top));
        }
        self.define(&definition);
    }

    fn define_anew(&mut self, way: usize) -> &'static str {
        let runs = self.pid().is_some();
        let (current, first) = (self.inactive(), self.definition.clone());
        match way {
            0 => {
                self.define(&first);
                "as at first"
            }
            1 if runs => {
                self.define(&current);
                "as it was"
            }
            1 => {
                self.undefine();
                self.define(&current);
                "as it was, and undefined before"
            }
            2 | 3 if runs => "not, for it runs",
            2 => {
                let anew = self.with_other_uuid(&current);
                self.undefine();
                self.define(&anew);
                "as it was with another uuid"
            }
            _ => {
                let anew = self.with_other_uuid(&first);
                self.undefine();
                self.define(&anew);
                "as at first with another uuid"
            }
        }
    }
}

#[test]
fn nothing_is_ever_deleted_that_a_chain_or_a_definition_names() {
    let Some(libvirt) = Libvirt::start() else { return };
    sequences::run((4, 2), 3, || Defined::new(&libvirt));
}
