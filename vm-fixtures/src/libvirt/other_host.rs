//! A second host on this machine, to migrate to: a libvirtd with folders of its own, and the same images.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::{Domain, URI, try_virsh_at};
use crate::process::Process;

const START_TIMEOUT: Duration = Duration::from_secs(180);
/// What its first process does. It stays there to reap what others leave, and all end with it.
/// libvirtd refuses to migrate to a host with its own uuid, and takes no password from root here. It takes a port
/// for free until its QEMU listens there, so each has ports of its own.
const LIFE: &str = "set -e
    for folder in /run/libvirt /var/lib/libvirt/qemu /var/log/libvirt /etc/libvirt; do
        mkdir -p $folder
        mount -t tmpfs -o mode=0755 tmpfs $folder
    done
    echo 'stdio_handler = \"file\"' > /etc/libvirt/qemu.conf
    echo 'cgroup_controllers = [ ]' >> /etc/libvirt/qemu.conf
    echo \"migration_port_min = $1\" >> /etc/libvirt/qemu.conf
    echo \"migration_port_max = $(($1 + 3))\" >> /etc/libvirt/qemu.conf
    echo \"host_uuid = \\\"$(cat /proc/sys/kernel/random/uuid)\\\"\" > /etc/libvirt/libvirtd.conf
    echo 'auth_unix_rw = \"none\"' >> /etc/libvirt/libvirtd.conf
    libvirtd --pid-file /run/libvirt/other-host.pid &
    wait";

/// A host of its own, as far as libvirt and who talks to it can tell. Dropping it ends it and its guests.
#[derive(Debug)]
pub struct OtherHost {
    uri: String,
    /// A process on it, as this host sees it.
    inhabitant: String,
    _process: Process,
}

impl OtherHost {
    #[track_caller]
    pub(super) fn start() -> Self {
        let namespaces = ["--mount", "--pid", "--mount-proc", "--fork", "--kill-child"];
        let port = own_port().to_string();
        let program = [&["unshare"][..], &namespaces, &["sh", "-c", LIFE, "sh", &port]].concat();
        let program: Vec<OsString> = program.into_iter().map(OsString::from).collect();
        let process = Process::start_program(&program, Stdio::null(), Stdio::null());
        let deadline = Instant::now() + START_TIMEOUT;
        let pid = process.id();
        loop {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
            let inhabitant = children.unwrap_or_default().trim().to_owned();
            let socket = format!("/proc/{inhabitant}/root/run/libvirt/libvirt-sock");
            let uri = format!("qemu+unix:///system?socket={socket}");
            // Before it has folders of its own, the socket is that of this host's libvirtd.
            let pid_file = format!("/proc/{inhabitant}/root/run/libvirt/other-host.pid");
            let is_there = Path::new(&pid_file).exists();
            if is_there && try_virsh_at(&uri, &["uri"]).is_ok() {
                return Self { uri, inhabitant, _process: process };
            }
            assert!(Instant::now() < deadline, "no libvirtd at {uri} within {START_TIMEOUT:?}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The same command, to be run there.
    pub fn there(&self, command: &Command) -> Command {
        let mut there = Command::new("nsenter");
        there.args(["--target", &self.inhabitant, "--mount", "--pid", "--"]);
        there.arg(command.get_program()).args(command.get_args());
        for (variable, value) in command.get_envs() {
            match value {
                Some(value) => there.env(variable, value),
                None => there.env_remove(variable),
            };
        }
        there
    }

    /// Runs a command of `virsh` there, which must succeed, and returns its standard output.
    #[track_caller]
    pub fn virsh(&self, args: &[&str]) -> String {
        match try_virsh_at(&self.uri, args) {
            Ok(output) => output,
            Err(error) => panic!("`virsh {}` on the other host: {error}", args.join(" ")),
        }
    }

    /// Writes one byte over a range of a disk of a domain that runs there, as its device would.
    #[track_caller]
    pub fn write(&self, domain: &Domain, id: &str, offset: usize, len: usize, byte: u8) {
        let device = format!("/machine/peripheral/ua-{id}/virtio-backend");
        let line = format!("qemu-io -d {device} \"write -P {byte:#x} {offset} {len}\"");
        self.virsh(&["qemu-monitor-command", domain.name(), "--hmp", &line]);
    }

    /// The command that migrates a running domain of this machine to it, not started.
    pub fn migration_to(&self, domain: &Domain, more: &[&str]) -> Command {
        migration(domain, URI, &self.uri, more)
    }

    /// The command that migrates it back.
    pub fn migration_from(&self, domain: &Domain, more: &[&str]) -> Command {
        // For libvirt the plain one is on the host that it came from.
        migration(domain, &self.uri, "qemu+unix:///system", more)
    }
}

/// The first of four ports that no other host of these tests has, as far as their processes' numbers tell.
fn own_port() -> u32 {
    static HOSTS: AtomicU32 = AtomicU32::new(0);
    let nth = HOSTS.fetch_add(1, Ordering::Relaxed);
    50_000 + std::process::id() % 900 * 16 + nth % 4 * 4
}

fn migration(domain: &Domain, from: &str, to: &str, more: &[&str]) -> Command {
    let mut virsh = Command::new("virsh");
    virsh.args(["-q", "-c", from, "migrate", domain.name(), to, "--live", "--persistent"]);
    // The images are where both can see them, on a file system that libvirt takes for a local one.
    virsh.args(["--unsafe", "--migrateuri", "tcp://127.0.0.1"]).args(more.iter().map(OsStr::new));
    virsh
}
