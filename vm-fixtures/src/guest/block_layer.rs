//! QEMU's block layer as the fixture's monitor shows it, and a way to write to its disks from outside.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::Guest;
use crate::inside::lock;
use crate::qemu_io::{QemuIo, must_have_worked};

impl Guest {
    /// All nodes of the block layer, as `query-named-block-nodes` tells them.
    #[track_caller]
    pub fn named_nodes(&self) -> Vec<Value> {
        match self.qmp_command("query-named-block-nodes", &json!({"flat": true})) {
            Value::Array(nodes) => nodes,
            other => panic!("nodes are a list, not {other}"),
        }
    }

    /// The names of all nodes, sorted.
    #[track_caller]
    pub fn node_names(&self) -> Vec<String> {
        let name = |node: &Value| node["node-name"].as_str().unwrap_or_default().to_owned();
        let mut names: Vec<_> = self.named_nodes().iter().map(name).collect();
        names.sort();
        names
    }

    /// The dirty bitmaps of a node, by its name.
    #[track_caller]
    pub fn bitmaps(&self, node: &str) -> Vec<Value> {
        let found = self.named_nodes().into_iter().find(|found| found["node-name"] == node);
        let mut found =
            found.unwrap_or_else(|| panic!("no node `{node}`: {:?}", self.node_names()));
        match found["dirty-bitmaps"].take() {
            Value::Array(bitmaps) => bitmaps,
            _ => Vec::new(),
        }
    }

    /// The node that a disk's device reads and writes through at this moment.
    #[track_caller]
    pub fn active_node(&self, id: &str) -> String {
        let device = self.device(id);
        let blocks = self.qmp_command("query-block", &json!({}));
        let blocks = blocks.as_array().expect("a list of devices");
        let block = blocks.iter().find(|block| block["qdev"] == *device);
        let block = block.unwrap_or_else(|| panic!("no device `{device}` in {blocks:?}"));
        block["inserted"]["node-name"].as_str().unwrap_or_default().to_owned()
    }

    /// Runs a `qemu-io` command such as `write -P 0x22 64k 64k` on a disk as its device would, through
    /// whatever filters are on top, and returns what it printed.
    #[track_caller]
    pub fn qemu_io(&self, id: &str, command: &str) -> String {
        must_have_worked(id, command, self.qemu_io_unchecked(id, command))
    }

    /// Like [`Self::qemu_io`], for commands that are expected to fail.
    #[track_caller]
    pub fn qemu_io_unchecked(&self, id: &str, command: &str) -> String {
        let line = format!("qemu-io -d {} \"{command}\"", self.device(id));
        let mut monitor = lock(&self.monitor);
        // QEMU prints to its standard output, not to the monitor.
        let before = read_from(self.folder.path(), 0).len();
        let args = json!({"command-line": line});
        let answer = monitor.execute("human-monitor-command", &args);
        let answer = answer.unwrap_or_else(|failure| panic!("`{command}` on {id}: {failure:?}"));
        let printed = read_from(self.folder.path(), before);
        answer.as_str().unwrap_or_default().to_owned() + &printed
    }

    /// What `query-block` calls a disk's device: the part of it that owns the block backend, such as
    /// `/machine/peripheral/vda/virtio-backend`, or the id for SCSI.
    #[track_caller]
    pub fn device(&self, id: &str) -> String {
        let devices = lock(&self.devices);
        devices.get(id).unwrap_or_else(|| panic!("no disk `{id}`: {devices:?}")).clone()
    }
}

impl QemuIo for Guest {
    fn buffers(&self) -> &Path {
        self.folder.path()
    }

    fn run(&self, id: &str, command: &str) -> String {
        self.qemu_io_unchecked(id, command)
    }
}

/// What QEMU has printed to standard output, from this offset.
fn read_from(folder: &Path, offset: usize) -> String {
    let printed = fs::read(folder.join("qemu.out")).unwrap_or_default();
    String::from_utf8_lossy(printed.get(offset..).unwrap_or_default()).into_owned()
}
