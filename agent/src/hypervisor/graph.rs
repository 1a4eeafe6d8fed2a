//! What QEMU says about its block graph, read into our terms. No I/O.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Bitmap, BitmapHealth, Choice, Disk, HypervisorError, Machine, Skipped, Tracking};
use crate::names::DiskName;

/// Drivers that pass a disk through and hold no format of their own.
const FILTERS: [&str; 7] = [
    "blkdebug",
    "blklogwrites",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "preallocate",
    "throttle",
];
/// Drivers of the file or device that an image lies in.
const PROTOCOLS: [&str; 2] = ["file", "host_device"];
/// Filters of jobs, which stand above the image that they pass through.
const JOB_FILTERS: [&str; 2] = ["mirror_top", "commit_top"];
/// The limits of a device's I/O, as `query-block` tells and `block_set_io_throttle` takes them; those that
/// are always there come first.
const LIMITS: [&str; 20] = [
    "bps",
    "bps_rd",
    "bps_wr",
    "iops",
    "iops_rd",
    "iops_wr",
    "bps_max",
    "bps_rd_max",
    "bps_wr_max",
    "iops_max",
    "iops_rd_max",
    "iops_wr_max",
    "bps_max_length",
    "bps_rd_max_length",
    "bps_wr_max_length",
    "iops_max_length",
    "iops_rd_max_length",
    "iops_wr_max_length",
    "iops_size",
    "group",
];
/// A guard against a graph that names itself.
const DEPTH_MAX: usize = 32;
/// So many images of a disk are read. `query-block` nests their descriptions, and its answer is read to a
/// depth of 128.
const LAYERS_MAX: usize = 100;
/// So many images may lie beneath a new overlay: those above it can be read as well.
pub const BASES_MAX: usize = 64;

/// The part of `query-block` that is used.
#[derive(Debug, Deserialize)]
pub struct BlockDevice {
    #[serde(default)]
    device: String,
    qdev: Option<String>,
    #[serde(default)]
    removable: bool,
    inserted: Option<Inserted>,
}

#[derive(Debug, Deserialize)]
struct Inserted {
    #[serde(rename = "node-name")]
    node_name: Option<String>,
    #[serde(default)]
    ro: bool,
    image: Image,
    #[serde(default)]
    cache: Cache,
    /// Limits among others.
    #[serde(flatten)]
    more: Map<String, Value>,
}

/// How a disk's image is cached.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Cache {
    /// Past the page cache.
    pub direct: bool,
    /// Flushes are left out.
    pub no_flush: bool,
}

#[derive(Debug, Deserialize)]
struct Image {
    #[serde(rename = "virtual-size")]
    virtual_size: u64,
    #[serde(rename = "format-specific")]
    format_specific: Option<FormatSpecific>,
}

#[derive(Debug, Deserialize)]
struct FormatSpecific {
    #[serde(default)]
    data: FormatData,
}

#[derive(Debug, Default, Deserialize)]
struct FormatData {
    compat: Option<String>,
}

/// The part of `query-named-block-nodes` that is used.
#[derive(Debug, Deserialize)]
pub struct NamedNode {
    /// Its name.
    #[serde(rename = "node-name")]
    pub node_name: String,
    /// Its driver.
    pub drv: String,
    #[serde(default)]
    file: String,
    image: Image,
    #[serde(rename = "dirty-bitmaps", default)]
    bitmaps: Vec<NodeBitmap>,
    /// From QEMU 10.1.
    #[serde(default)]
    children: Vec<NodeChild>,
}

#[derive(Debug, Deserialize)]
struct NodeChild {
    child: String,
    #[serde(rename = "node-name")]
    node_name: Option<String>,
}

#[derive(Debug, Deserialize)]
struct NodeBitmap {
    name: Option<String>,
    #[serde(default)]
    recording: bool,
    #[serde(default)]
    persistent: bool,
    #[serde(default)]
    inconsistent: bool,
}

/// The part of `x-debug-query-block-graph` that is used.
#[derive(Debug, Default, Deserialize)]
pub struct RawGraph {
    nodes: Vec<GraphNode>,
    edges: Vec<GraphEdge>,
}

#[derive(Debug, Deserialize)]
struct GraphNode {
    id: u64,
    name: String,
}

#[derive(Debug, Deserialize)]
struct GraphEdge {
    parent: u64,
    child: u64,
    name: String,
}

/// The named nodes and which of them stands on which.
#[derive(Debug)]
pub struct Graph {
    nodes: HashMap<String, NamedNode>,
    below: HashMap<String, String>,
    beneath: HashMap<String, String>,
}

/// The images of a disk, as QEMU has them open.
#[derive(Debug)]
pub struct NodeChain {
    /// The disk.
    pub disk: DiskName,
    /// Its device, as `query-block` calls it.
    pub qdev: String,
    /// The node that the device uses.
    pub root: String,
    /// How the image is cached.
    pub cache: Cache,
    /// The limits of its I/O, as `block_set_io_throttle` takes them.
    pub limits: Map<String, Value>,
    /// Its images, from the top down, without filters.
    pub layers: Vec<Layer>,
}

/// One image of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Its node.
    pub node: String,
    /// The file, by the name that QEMU has for it.
    pub path: PathBuf,
    /// Its format.
    pub format: String,
}

impl Graph {
    /// Joins what the two queries say; `raw` may be empty where QEMU does not offer it.
    pub fn new(named: Vec<NamedNode>, raw: &RawGraph) -> Self {
        let names: HashMap<u64, &str> = raw.nodes.iter().map(|n| (n.id, n.name.as_str())).collect();
        let mut edges: Vec<(&str, &str, &str)> = Vec::new();
        for GraphEdge { parent, child, name } in &raw.edges {
            if let (Some(parent), Some(child)) = (names.get(parent), names.get(child)) {
                edges.push((name, parent, child));
            }
        }
        for node in &named {
            for NodeChild { child, node_name } in &node.children {
                edges.extend(node_name.as_ref().map(|name| (&**child, &*node.node_name, &**name)));
            }
        }
        let of_kind = |kind: &str| {
            let edges = edges.iter().filter(|(name, ..)| *name == kind);
            edges.map(|(_, parent, child)| ((*parent).to_owned(), (*child).to_owned())).collect()
        };
        let (below, beneath) = (of_kind("file"), of_kind("backing"));
        let nodes = named.into_iter().map(|node| (node.node_name.clone(), node)).collect();
        Self { nodes, below, beneath }
    }

    /// The nodes that have an image open: those of its format come before those of its file.
    pub fn nodes_of(&self, image: &Path) -> Vec<&str> {
        let nodes = self.nodes.values().filter(|node| Path::new(&node.file) == image);
        let mut nodes: Vec<_> = nodes.collect();
        nodes.sort_by_key(|node| PROTOCOLS.contains(&node.drv.as_str()));
        nodes.into_iter().map(|node| node.node_name.as_str()).collect()
    }

    /// The images from a node down; `None` where they are too many.
    fn layers(&self, root: &str) -> Option<Vec<Layer>> {
        let (mut layers, mut next) = (Vec::new(), Some(root));
        while let Some(node) = next.and_then(|name| self.nodes.get(name)) {
            let (name, driver) = (&node.node_name, node.drv.as_str());
            next = match FILTERS.contains(&driver) {
                true => self.below.get(name),
                false => self.beneath.get(name),
            }
            .map(String::as_str);
            if !FILTERS.contains(&driver) && !JOB_FILTERS.contains(&driver) {
                if layers.len() == LAYERS_MAX {
                    return None;
                }
                let (path, format) = (PathBuf::from(&node.file), node.drv.clone());
                layers.push(Layer { node: name.clone(), path, format });
            }
        }
        Some(layers)
    }

    /// Whether a node exists.
    pub fn contains(&self, node: &str) -> bool {
        self.nodes.contains_key(node)
    }

    /// The names of all bitmaps on a node, by health.
    pub fn bitmaps(&self, node: &str) -> Vec<Bitmap> {
        let Some(node) = self.nodes.get(node) else { return Vec::new() };
        let health = |bitmap: &NodeBitmap| match bitmap {
            NodeBitmap { inconsistent: true, .. } => BitmapHealth::Inconsistent,
            NodeBitmap { persistent: false, .. } => BitmapHealth::Transient,
            NodeBitmap { recording: false, .. } => BitmapHealth::NotRecording,
            _ => BitmapHealth::Good,
        };
        let named = node.bitmaps.iter().filter_map(|bitmap| {
            Some(Bitmap { name: bitmap.name.clone()?, health: health(bitmap) })
        });
        named.collect()
    }

    /// The node that holds the image's format: the first below `root` that is no filter.
    fn format_node(&self, root: &str) -> Option<&NamedNode> {
        let mut name = root;
        for _ in 0..DEPTH_MAX {
            let node = self.nodes.get(name)?;
            if !FILTERS.contains(&node.drv.as_str()) {
                return Some(node);
            }
            name = self.below.get(name)?;
        }
        None
    }
}

/// The device's id, or the name of its drive where it has none.
fn device_name(device: &BlockDevice) -> Option<&str> {
    let path = device.qdev.as_deref()?;
    let id = match path.strip_prefix("/machine/peripheral/") {
        Some(rest) => rest.split('/').next(),
        None if !path.starts_with('/') => Some(path),
        None => None,
    };
    id.or_else(|| Some(device.device.as_str()).filter(|name| !name.is_empty()))
}

/// A QOM path that `qom-set` takes.
fn device_path(qdev: &str) -> String {
    match qdev.starts_with('/') {
        true => qdev.to_owned(),
        false => format!("/machine/peripheral/{qdev}"),
    }
}

/// The images of each disk that can be named and has any.
///
/// # Errors
/// [`HypervisorError::ChainTooLong`]: a part of a chain would read as zeros what lies in the rest.
pub fn chains(devices: &[BlockDevice], graph: &Graph) -> Result<Vec<NodeChain>, HypervisorError> {
    let chain = |device: &BlockDevice| {
        let inserted = device.inserted.as_ref()?;
        let root = inserted.node_name.clone()?;
        let (disk, qdev) = (device_name(device)?.parse().ok()?, device.qdev.clone()?);
        let limit = |name: &&str| Some(((*name).to_owned(), inserted.more.get(*name)?.clone()));
        let limits = LIMITS.iter().filter_map(limit).collect();
        let Some(layers) = graph.layers(&root) else {
            return Some(Err(HypervisorError::ChainTooLong { disk, max: LAYERS_MAX }));
        };
        Some(Ok(NodeChain { disk, qdev, root, cache: inserted.cache, limits, layers }))
    };
    devices.iter().filter_map(chain).collect()
}

/// Says which devices are disks that can be backed up, and why the others are not.
///
/// # Errors
/// [`HypervisorError::TwoDisks`] and [`HypervisorError::DiskName`]: nothing is stored under a name that
/// means two things or could be a path.
pub fn read_machine(
    uuid: String,
    runs: bool,
    devices: &[BlockDevice],
    graph: &Graph,
    choice: &Choice,
) -> Result<Machine, HypervisorError> {
    let mut machine =
        Machine { uuid, runs, shut_off: None, disks: Vec::new(), skipped: Vec::new() };
    for (index, device) in devices.iter().enumerate() {
        let fallback = format!("disk{index}");
        let label = device_name(device).map_or_else(
            || Some(device.device.clone()).filter(|name| !name.is_empty()).unwrap_or(fallback),
            str::to_owned,
        );
        match read_disk(device, &label, graph, choice)? {
            Ok(disk) if machine.disks.iter().any(|other| other.target == disk.target) => {
                return Err(HypervisorError::TwoDisks { disk: disk.target });
            }
            Ok(disk) => machine.disks.push(disk),
            Err(skipped) => machine.skipped.push(skipped),
        }
    }
    Ok(machine)
}

fn read_disk(
    device: &BlockDevice,
    label: &str,
    graph: &Graph,
    choice: &Choice,
) -> Result<Result<Disk, Skipped>, HypervisorError> {
    let no_disk = |reason: &str| Ok(Err(Skipped::no_disk(label, reason)));
    let Some(inserted) = &device.inserted else { return no_disk("no medium is inserted") };
    let Some(qdev) = &device.qdev else { return no_disk("no device uses it") };
    if device.removable {
        return no_disk("it is a removable medium");
    }
    if inserted.image.virtual_size == 0 {
        return no_disk("it is empty: 0 bytes");
    }
    if let Some(skipped) = choice.leaves_out(label) {
        return Ok(Err(skipped));
    }
    let disk = |reason: &str| Ok(Err(Skipped::disk(label, reason)));
    if inserted.ro {
        return disk("it is read-only");
    }
    let Some(root) = &inserted.node_name else { return disk("its node has no name") };
    let target: DiskName = label.parse().map_err(HypervisorError::DiskName)?;
    let format = graph.format_node(root);
    let driver = format.map_or("unknown", |node| node.drv.as_str());
    let format_name = format.map_or(root, |node| &node.node_name).clone();
    let tracking = match format {
        None => Tracking::Unsupported("its format is hidden below a filter".into()),
        Some(node) if node.drv != "qcow2" => {
            Tracking::Unsupported(format!("{} images keep no dirty bitmaps", node.drv))
        }
        Some(node) if compat(&node.image) == Some("0.10") => {
            Tracking::Unsupported("qcow2 version 2 keeps no dirty bitmaps".into())
        }
        Some(node) => Tracking::Bitmaps(graph.bitmaps(&node.node_name)),
    };
    let image = format.map(|node| PathBuf::from(&node.file)).filter(|path| path.is_absolute());
    Ok(Ok(Disk {
        target,
        device: device_path(qdev),
        root: root.clone(),
        format: format_name,
        driver: driver.to_owned(),
        size: inserted.image.virtual_size,
        image,
        tracking,
    }))
}

fn compat(image: &Image) -> Option<&str> {
    image.format_specific.as_ref()?.data.compat.as_deref()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn device(qdev: Option<&str>, name: &str, size: u64) -> Value {
        json!({"device": name, "qdev": qdev, "removable": false, "something": "newer",
            "inserted": {"node-name": "n", "ro": false, "image": {"virtual-size": size}}})
    }

    fn machine(devices: Value) -> Result<Machine, HypervisorError> {
        let nodes = json!([{"node-name": "n", "drv": "throttle", "file": "/i", "image": {"virtual-size": 9}},
            {"node-name": "q", "drv": "qcow2", "file": "/i.qcow2", "image": {"virtual-size": 9},
             "dirty-bitmaps": [
                {"name": "a", "recording": true, "persistent": true},
                {"name": "b", "recording": false, "persistent": true, "inconsistent": true},
                {"name": "c", "recording": true, "persistent": false},
                {"recording": true}]}]);
        let raw = json!({"nodes": [{"id": 1, "name": "n"}, {"id": 2, "name": "q"}],
            "edges": [{"parent": 1, "child": 2, "name": "file"}]});
        let graph = Graph::new(
            serde_json::from_value(nodes).unwrap(),
            &serde_json::from_value(raw).unwrap(),
        );
        let devices: Vec<BlockDevice> = serde_json::from_value(devices).unwrap();
        read_machine(String::new(), true, &devices, &graph, &Choice::default())
    }

    #[test]
    fn disks_are_named_by_the_devices_id_and_bitmaps_found_below_filters() {
        let machine = machine(json!([
            device(Some("/machine/peripheral/vda/virtio-backend"), "", 9),
            device(Some("vdb"), "drive7", 9),
            device(Some("/machine/peripheral-anon/device[1]/virtio-backend"), "virtio0", 9),
        ]))
        .unwrap();
        let names: Vec<_> = machine.disks.iter().map(|disk| disk.target.as_str()).collect();
        assert_eq!(names, ["vda", "vdb", "virtio0"]);
        assert_eq!(machine.disks[1].device, "/machine/peripheral/vdb");
        assert_eq!(machine.disks[0].format, "q");
        let Tracking::Bitmaps(bitmaps) = &machine.disks[0].tracking else { panic!() };
        let health: Vec<_> = bitmaps.iter().map(|bitmap| bitmap.health).collect();
        use BitmapHealth::*;
        assert_eq!(health, [Good, Inconsistent, Transient]);
    }

    #[test]
    fn r30_devices_that_are_no_disk_are_left_out_with_a_reason() {
        let machine = machine(json!([
            {"device": "cd", "qdev": "cd0", "removable": true},
            {"device": "cd", "qdev": "cd1", "removable": true, "inserted":
                {"node-name": "n", "image": {"virtual-size": 9}}},
            device(None, "unused", 9),
            device(Some("empty"), "", 0),
        ]))
        .unwrap();
        assert!(machine.disks.is_empty());
        let reasons: Vec<_> = machine.skipped.iter().map(|s| s.reason.as_str()).collect();
        assert_eq!(
            reasons,
            [
                "no medium is inserted",
                "it is a removable medium",
                "no device uses it",
                "it is empty: 0 bytes"
            ]
        );
    }

    #[test]
    fn s15_a_device_id_that_is_a_path_or_used_twice_is_refused() {
        let twice = json!([device(Some("a"), "", 9), device(Some("a"), "", 9)]);
        assert!(matches!(machine(twice), Err(HypervisorError::TwoDisks { .. })));
        let path = json!([device(Some("/machine/x"), "../../etc", 9)]);
        assert!(matches!(machine(path), Err(HypervisorError::DiskName(_))));
    }

    #[test]
    fn p1_a_chain_is_told_whole_or_not_at_all() {
        let graph = |count: usize| {
            let node = |n: usize| {
                json!({"node-name": format!("n{n}"), "drv": "qcow2",
                "file": format!("/{n}"), "image": {"virtual-size": 9}})
            };
            let named = json!((0..count).map(node).collect::<Vec<_>>());
            let id = |n: usize| json!({"id": n, "name": format!("n{n}")});
            let edge = |n: usize| json!({"parent": n, "child": n + 1, "name": "backing"});
            let edges: Vec<_> = (0..count - 1).map(edge).collect();
            let raw = json!({"nodes": (0..count).map(id).collect::<Vec<_>>(), "edges": edges});
            Graph::new(
                serde_json::from_value(named).unwrap(),
                &serde_json::from_value(raw).unwrap(),
            )
        };
        let mut device = device(Some("vda"), "", 9);
        device["inserted"]["node-name"] = "n0".into();
        let devices: Vec<BlockDevice> = serde_json::from_value(json!([device])).unwrap();
        let whole = chains(&devices, &graph(LAYERS_MAX)).unwrap();
        assert_eq!(whole[0].layers.len(), LAYERS_MAX);
        let refused = chains(&devices, &graph(LAYERS_MAX + 1)).unwrap_err();
        let words = refused.to_string();
        assert_eq!(
            words,
            format!("disk `vda` has more than {LAYERS_MAX} images in its backing chain")
        );
    }
}
