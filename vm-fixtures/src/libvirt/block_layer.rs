//! QEMU's block layer below libvirt, for judging and for writing to disks from outside.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Domain;
use crate::inside::lock;
use crate::qemu_io::{QemuIo, must_have_worked};

/// How long the way of QEMU's output through virtlogd may take.
const LOG_TIMEOUT: Duration = Duration::from_secs(120);
/// More than one command prints.
const TAIL_LEN: usize = 256 << 10;

impl Domain {
    /// Runs a QMP command, which must succeed, past libvirt.
    #[track_caller]
    pub fn qmp_command(&self, command: &str, args: &Value) -> Value {
        let request = json!({"execute": command, "arguments": args}).to_string();
        let reply = self.virsh("qemu-monitor-command", &[&request]);
        let mut reply: Value = serde_json::from_str(&reply).expect("QMP is JSON");
        assert!(reply.get("error").is_none(), "`{command}` with {args}: {reply}");
        reply["return"].take()
    }

    /// The dirty bitmaps in the image of a disk, as `query-named-block-nodes` tells them.
    #[track_caller]
    pub fn bitmaps(&self, id: &str) -> Vec<Value> {
        let path = self.disk_path(id);
        let nodes = self.qmp_command("query-named-block-nodes", &json!({"flat": true}));
        let nodes = nodes.as_array().expect("nodes are a list");
        let mine = |node: &&Value| {
            node["drv"] == "qcow2" && node["image"]["filename"] == *path.to_string_lossy()
        };
        let node = nodes.iter().find(mine);
        let node = node.unwrap_or_else(|| panic!("no node for {}: {nodes:?}", path.display()));
        node["dirty-bitmaps"].as_array().cloned().unwrap_or_default()
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
        let device = match id.starts_with("sd") {
            true => format!("ua-{id}"),
            false => format!("/machine/peripheral/ua-{id}/virtio-backend"),
        };
        // QEMU prints into its log, and virtlogd brings it there a moment later: commands that do not
        // exist mark the place.
        let _one_at_a_time = lock(&self.printing);
        let marks = [0, 1].map(|_| format!("mark-{:x}", rand::random::<u64>()));
        let lines = [&*marks[0], command, &*marks[1]].map(|command| {
            let line = format!("qemu-io -d {device} \"{command}\"");
            let request =
                json!({"execute": "human-monitor-command", "arguments": {"command-line": line}});
            format!("qemu-monitor-command {} '{request}'", self.name())
        });
        // One virsh for all of them: it takes longer to start than they do.
        let replies = self.libvirt().virsh(&[&lines.join("; ")]);
        let replies = serde_json::Deserializer::from_str(&replies).into_iter::<Value>();
        let replies: Vec<Value> = replies.map(|reply| reply.expect("QMP is JSON")).collect();
        let [_, answer, _] = &*replies else { panic!("`{command}` on {id}: {replies:?}") };
        let answer = answer["return"].as_str().unwrap_or_default().to_owned();
        let deadline = Instant::now() + LOG_TIMEOUT;
        loop {
            if let Some(found) = between(&self.log_path(), &marks) {
                return answer + &found;
            }
            assert!(
                Instant::now() < deadline,
                "`{command}` on {id} has left nothing in QEMU's log"
            );
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl QemuIo for Domain {
    fn buffers(&self) -> &Path {
        self.folder()
    }

    fn run(&self, id: &str, command: &str) -> String {
        self.qemu_io_unchecked(id, command)
    }
}

/// What is between two marks at the end of a log. virtlogd moves a log to `NAME.log.0` at 2 MiB.
fn between(log: &Path, marks: &[String; 2]) -> Option<String> {
    let rotated = log.with_extension("log.0");
    let mut text = fs::read(rotated).unwrap_or_default();
    text.extend(fs::read(log).unwrap_or_default());
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(TAIL_LEN)..]).into_owned();
    let [from, to] = marks.each_ref().map(|mark| format!("command \"{mark}\" not found\n"));
    let from = text.rfind(&from)? + from.len();
    let to = text.rfind(&to)?;
    text.get(from..to).map(str::to_owned)
}
