//! A domain under test: its life under libvirt, and what libvirt says about it.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};

use super::folder::pid_file;
use super::plan::{DomainBuilder, disk_xml};
use super::{Folder, Libvirt};
use crate::builder::GuestBuilder;
use crate::disk::Disk;
use crate::inside::{Inside, lock};
use crate::process::{is_alive, pid_in};

/// How long a domain may take to reach a state, such as shut off after its guest was told to.
const STATE_TIMEOUT: Duration = Duration::from_secs(180);

/// A domain, defined for good; dropping the last of a folder ends and undefines it, with its disks.
#[derive(Debug)]
pub struct Domain {
    name: String,
    inside: Inside,
    plan: Mutex<GuestBuilder>,
    pub(super) printing: Mutex<()>,
    folder: Arc<Folder>,
    libvirt: Libvirt,
}

impl Domain {
    #[track_caller]
    pub(super) fn define(plan: DomainBuilder, libvirt: &Libvirt) -> Self {
        let folder = libvirt.folder();
        let name = format!("{}-{}", folder.name(), plan.plan.name);
        let xml = folder.path().join("domain.xml");
        fs::write(&xml, plan.make(&name, folder.path())).expect("the folder is ours");
        libvirt.virsh(&["define", &xml.to_string_lossy()]);
        Self::new(name, plan.plan, Arc::new(folder), libvirt)
    }

    fn new(name: String, plan: GuestBuilder, folder: Arc<Folder>, libvirt: &Libvirt) -> Self {
        let inside = Inside::new(folder.path());
        for disk in &plan.disks {
            inside.add_device(&disk.id, plan.device_name(&disk.id));
        }
        let (plan, libvirt) = (Mutex::new(plan), libvirt.clone());
        Self { name, inside, plan, printing: Mutex::default(), folder, libvirt }
    }

    /// A domain of another name that the program under test has made of this one. The sockets of its
    /// channels and its logs are the same files, so only one of the two may run at a time. Its name
    /// must begin with that of this domain, so that it goes away with the folder.
    ///
    /// # Panics
    ///
    /// When libvirt does not know it.
    #[track_caller]
    pub fn successor(&self, name: &str) -> Self {
        assert!(name.starts_with(self.folder.name()), "nobody would undefine `{name}`");
        self.libvirt.virsh(&["domuuid", name]);
        let plan = lock(&self.plan).clone();
        Self::new(name.to_owned(), plan, self.folder.clone(), &self.libvirt)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The libvirt it is defined in.
    pub fn libvirt(&self) -> &Libvirt {
        &self.libvirt
    }

    /// Runs a command of `virsh` on this domain, which must succeed: `virsh <command> <name> <args>`.
    #[track_caller]
    pub fn virsh(&self, command: &str, args: &[&str]) -> String {
        self.libvirt.virsh(&[&[command, &self.name], args].concat())
    }

    /// Runs a command of `virsh` on this domain: its output, or what it said when it failed.
    pub fn try_virsh(&self, command: &str, args: &[&str]) -> Result<String, String> {
        self.libvirt.try_virsh(&[&[command, &self.name], args].concat())
    }

    /// Its XML: as it runs, or as it is defined where it does not run.
    #[track_caller]
    pub fn xml(&self) -> String {
        self.virsh("dumpxml", &[])
    }

    /// Its UUID.
    #[track_caller]
    pub fn uuid(&self) -> String {
        self.virsh("domuuid", &[]).trim().to_owned()
    }

    /// `running`, `paused`, `shut off` …
    #[track_caller]
    pub fn state(&self) -> String {
        self.virsh("domstate", &[]).trim().to_owned()
    }

    /// QEMU's process id; `None` where it does not run.
    pub fn pid(&self) -> Option<u32> {
        pid_in(&pid_file(&self.name)).map(|pid| pid.as_raw().unsigned_abs())
    }

    /// The image that a disk uses at this moment.
    #[track_caller]
    pub fn disk_path(&self, id: &str) -> PathBuf {
        let mut paths = self.disk_paths();
        paths.remove(id).unwrap_or_else(|| panic!("no disk `{id}`: {paths:?}"))
    }

    /// The images that its disks use at this moment, by the names of the disks.
    #[track_caller]
    pub fn disk_paths(&self) -> BTreeMap<String, PathBuf> {
        let disks = self.virsh("domblklist", &[]);
        let lines = disks.lines().filter_map(|line| line.trim().split_once(char::is_whitespace));
        lines.map(|(target, path)| (target.to_owned(), path.trim().into())).collect()
    }

    /// QEMU's messages.
    pub fn qemu_log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    pub(super) fn log_path(&self) -> PathBuf {
        Path::new("/var/log/libvirt/qemu").join(format!("{}.log", self.name))
    }

    // ---- its life -------------------------------------------------------------------------------

    /// Starts it and waits until the machine is up.
    #[track_caller]
    pub fn start(&self) {
        let started = Instant::now();
        self.inside.went_down();
        self.virsh("start", &[]);
        self.wait_up(started);
    }

    /// Waits for the agents of a domain that somebody has started: the fixture's own, and the one that libvirt
    /// talks to. Nobody says which is there first.
    #[track_caller]
    pub fn wait_up(&self, started: Instant) {
        if lock(&self.plan).os {
            let ended = || self.pid().is_none().then(|| format!("QEMU: {}", self.qemu_log()));
            self.inside.come_up(started, ended);
            self.wait_agent();
        }
    }

    /// Waits until the guest answers libvirt through its agent. One that connects while a backup runs keeps
    /// libvirt 9.0 from ending any job for 30 s.
    #[track_caller]
    pub fn wait_agent(&self) {
        let deadline = Instant::now() + STATE_TIMEOUT;
        while let Err(error) =
            self.try_virsh("qemu-agent-command", &[r#"{"execute":"guest-ping"}"#])
        {
            assert!(Instant::now() < deadline, "no agent after {STATE_TIMEOUT:?}: {error}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Stops the guest's processors.
    #[track_caller]
    pub fn pause(&self) {
        self.virsh("suspend", &[]);
    }

    /// Lets the guest's processors run again.
    #[track_caller]
    pub fn resume(&self) {
        self.virsh("resume", &[]);
    }

    /// Presses the reset button and waits until the guest is up again.
    #[track_caller]
    pub fn reset(&self) {
        let started = Instant::now();
        self.inside.went_down();
        self.virsh("reset", &[]);
        self.wait_up(started);
    }

    /// Powers the guest off from inside and waits until the domain is shut off.
    #[track_caller]
    pub fn powerdown(&self) {
        self.inside.spawn_last(&["sh", "-c", "umount -a -r; poweroff -f"]);
        self.wait_state("shut off");
    }

    /// Unmounts in the guest, then ends QEMU so that it saves its bitmaps.
    #[track_caller]
    pub fn shut_down(&self) {
        if self.state() == "running" {
            self.inside.unmount();
        }
        self.destroy();
    }

    /// Ends QEMU without telling the guest: for its file systems a power cut, for the images a clean
    /// end.
    #[track_caller]
    pub fn destroy(&self) {
        self.virsh("destroy", &[]);
        self.inside.went_down();
    }

    /// SIGKILL for QEMU: nothing is flushed, bitmaps stay marked as in use. Returns once libvirt knows,
    /// if it runs.
    #[track_caller]
    pub fn kill_qemu(&self) {
        let pid = pid_in(&pid_file(&self.name)).expect("its QEMU runs");
        kill(pid, Signal::SIGKILL).expect("root may send signals");
        let deadline = Instant::now() + STATE_TIMEOUT;
        while is_alive(pid) {
            assert!(Instant::now() < deadline, "QEMU runs {STATE_TIMEOUT:?} after SIGKILL");
            thread::sleep(Duration::from_millis(5));
        }
        self.inside.went_down();
        if self.libvirt.try_virsh(&["uri"]).is_ok() {
            self.wait_state("shut off");
        }
    }

    /// Waits until `virsh domstate` says this. One that is shut off has no QEMU any more, though libvirt says so
    /// before that has ended.
    #[track_caller]
    pub fn wait_state(&self, state: &str) {
        let deadline = Instant::now() + STATE_TIMEOUT;
        loop {
            let now = self.state();
            if now == state && (state != "shut off" || self.pid().is_none()) {
                return;
            }
            assert!(Instant::now() < deadline, "`{now}`, not `{state}`, after {STATE_TIMEOUT:?}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    // ---- its disks ------------------------------------------------------------------------------

    /// Adds a disk for good, also to the machine where it runs.
    #[track_caller]
    pub fn attach_disk(&self, disk: &Disk) {
        let folder = self.folder.path();
        let mut plan = lock(&self.plan);
        let id = disk.id.clone();
        disk.create(folder);
        plan.disks.push(disk.clone());
        let file = folder.join(format!("{id}.xml"));
        let iothread = plan.disks.len();
        let xml = disk_xml(&plan, disk, iothread, folder);
        fs::write(&file, xml).expect("the folder is ours");
        self.virsh("attach-device", &[&file.to_string_lossy(), "--persistent"]);
        self.inside.add_device(&id, plan.device_name(&id));
    }

    /// Gives a disk of a running domain another size, in bytes.
    #[track_caller]
    pub fn resize(&self, id: &str, len: u64) {
        self.virsh("blockresize", &[id, &format!("{len}B")]);
    }
}

/// What runs inside is reached on the domain itself: `domain.sh("sync")`.
impl Deref for Domain {
    type Target = Inside;

    fn deref(&self) -> &Inside {
        &self.inside
    }
}
