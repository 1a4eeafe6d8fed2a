//! Nothing is ever deleted that a chain names, on a QEMU that nothing manages: see
//! [`integration::sequences`].

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use integration::overlays::plan;
use integration::restored::text;
use integration::sequences::{self, BLOCK, BLOCKS, DISKS, Ground, Tops, format_of};
use integration::{Host, tool};
use serde_json::{Value, json};
use vm_fixtures::{Disk, Guest, qemu_available};

/// A QEMU whose monitor is at a place that outlives it.
struct Bare {
    host: Host,
    qmp: PathBuf,
    guest: Option<Guest>,
}

impl Bare {
    fn new() -> Self {
        let host = Host::new();
        let qmp = host.folder().join("qmp");
        let bare = Self { host, qmp, guest: None };
        fs::create_dir(bare.host.folder().join("images")).expect("a new folder");
        for disk in DISKS {
            let image = bare.own(disk);
            let size = (BLOCKS * BLOCK).to_string();
            let mut create = Command::new("qemu-img");
            create.args(["create", "-q", "-f", format_of(&image).driver()]).arg(&image).arg(size);
            tool(create);
        }
        bare
    }

    fn guest(&self) -> &Guest {
        self.guest.as_ref().expect("it runs")
    }
}

impl Ground for Bare {
    fn host(&self) -> &Host {
        &self.host
    }

    fn own(&self, disk: &str) -> PathBuf {
        let name = if disk == "vda" { "vda.qcow2" } else { "vdb.raw" };
        self.host.folder().join("images").join(name)
    }

    fn words(&self) -> Vec<String> {
        vec!["--qmp".to_owned(), self.qmp.display().to_string()]
    }

    fn pid(&self) -> Option<u32> {
        self.guest.as_ref().map(Guest::pid)
    }

    fn start(&mut self, tops: &Tops) {
        // QEMU does not replace the socket of one that was killed.
        let _ = fs::remove_file(&self.qmp);
        let disk = |(disk, top): (&&str, &PathBuf)| Disk::existing(disk, top, format_of(top));
        let disks: Vec<Disk> = tops.iter().map(disk).collect();
        // Its firmware need not run.
        self.guest = plan(&self.qmp, disks).args(["-S"]).boot();
    }

    fn quit(&mut self) {
        self.guest.take().expect("it runs").quit();
    }

    fn kill(&mut self) {
        self.guest.take().expect("it ran").kill();
    }

    fn tops(&self) -> Option<Tops> {
        let guest = self.guest.as_ref()?;
        let blocks = guest.qmp_command("query-block", &json!({}));
        let blocks: BTreeMap<&str, &Value> = blocks
            .as_array()
            .expect("a list")
            .iter()
            .filter_map(|block| Some((block["qdev"].as_str()?, block)))
            .collect();
        let top = |disk| {
            let block = blocks.get(guest.device(disk).as_str()).expect("a device");
            (disk, Path::new(text(&block["inserted"], "file")).to_owned())
        };
        Some(DISKS.map(top).into())
    }

    fn qemu_io(&self, disk: &str, command: &str) {
        self.guest().qemu_io(disk, command);
    }

    fn nodes(&self) -> Vec<Value> {
        self.guest().named_nodes()
    }
}

#[test]
fn nothing_is_ever_deleted_that_a_chain_names() {
    if qemu_available() {
        sequences::run((40, 20), 2, Bare::new);
    }
}
