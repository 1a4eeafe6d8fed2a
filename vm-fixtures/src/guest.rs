//! A machine under test: starts QEMU, talks to it beside the program under test, ends it.

mod block_layer;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::builder::GuestBuilder;
use crate::disk::Disk;
use crate::inside::{Inside, lock};
use crate::monitor::{Monitor, QmpFailure};
use crate::process::Process;
use crate::recipe::System;

/// How long QEMU may take until its monitor answers.
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// How long QEMU may take to write its caches back and end.
const QUIT_TIMEOUT: Duration = Duration::from_secs(120);

/// A running machine, its disks and sockets in a folder of its own.
///
/// Methods panic with an account of what happened: a test has nothing else to do with a fixture that
/// does not work. Dropping it kills QEMU and removes the folder.
#[derive(Debug)]
pub struct Guest {
    process: Mutex<Process>,
    monitor: Mutex<Monitor>,
    inside: Inside,
    devices: Mutex<BTreeMap<String, String>>,
    plan: GuestBuilder,
    folder: TempDir,
}

impl Guest {
    /// A machine that boots the fixture's own Linux with two guest agents.
    pub fn builder() -> GuestBuilder {
        GuestBuilder::new(true)
    }

    /// A machine that boots nothing and is there in under a second, for tests of the block layer;
    /// [`Self::qemu_io`] writes to its disks.
    pub fn without_os() -> GuestBuilder {
        GuestBuilder::new(false)
    }

    #[track_caller]
    pub(crate) fn start(plan: GuestBuilder) -> Self {
        let folder = tempfile::Builder::new().prefix("kvmsnap-fixture-").tempdir();
        let folder = folder.expect("the folder for temporary files is writable");
        for disk in &plan.disks {
            disk.create(folder.path());
        }
        let inside = Inside::new(folder.path());
        for disk in &plan.disks {
            inside.add_device(&disk.id, plan.device_name(&disk.id));
        }
        let (process, monitor) = launch(&plan, folder.path());
        let guest = Self {
            process: Mutex::new(process),
            monitor: Mutex::new(monitor),
            inside,
            devices: Mutex::default(),
            plan,
            folder,
        };
        guest.come_up();
        guest
    }

    // ---- where things are -----------------------------------------------------------------------

    /// The QMP socket for the program under test; the fixture itself has another.
    pub fn qmp(&self) -> PathBuf {
        self.folder.path().join("qmp.sock")
    }

    /// The guest agent's socket for the program under test; nobody answers [`Self::without_os`].
    pub fn qga(&self) -> PathBuf {
        self.folder.path().join("qga.sock")
    }

    /// Whether an operating system with its guest agent runs in it.
    pub fn has_agent(&self) -> bool {
        self.plan.os
    }

    /// The machine's name.
    pub fn name(&self) -> &str {
        &self.plan.name
    }

    /// The machine's UUID.
    pub fn uuid(&self) -> &str {
        &self.plan.uuid
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        lock(&self.process).id()
    }

    /// The image of a disk, also when an overlay is on top by now.
    #[track_caller]
    pub fn disk_path(&self, id: &str) -> PathBuf {
        self.plan.disk_named(id).path(self.folder.path())
    }

    // ---- QEMU's view ----------------------------------------------------------------------------

    /// Runs a QMP command, which must succeed, on the fixture's monitor.
    #[track_caller]
    pub fn qmp_command(&self, command: &str, args: &Value) -> Value {
        match self.try_qmp_command(command, args) {
            Ok(value) => value,
            Err(failure) => panic!("`{command}` with {args}: {failure:?}; {}", self.qemu_log()),
        }
    }

    /// Runs a QMP command on the fixture's monitor.
    pub fn try_qmp_command(&self, command: &str, args: &Value) -> Result<Value, QmpFailure> {
        lock(&self.monitor).execute(command, args)
    }

    /// Takes the events that QEMU has sent since the last call.
    pub fn events(&self) -> Vec<Value> {
        lock(&self.monitor).events()
    }

    /// Waits for an event of this name that has not been taken yet.
    #[track_caller]
    pub fn wait_event(&self, name: &str, timeout: Duration) -> Value {
        let event = lock(&self.monitor).wait_event(name, Instant::now() + timeout);
        event.unwrap_or_else(|| panic!("no event `{name}` within {timeout:?}"))
    }

    /// QEMU's run state, such as `running`, `paused` or `io-error`.
    #[track_caller]
    pub fn status(&self) -> String {
        self.qmp_command("query-status", &json!({}))["status"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    /// Whether QEMU lives and the guest's processors run.
    pub fn is_running(&self) -> bool {
        let status = self.try_qmp_command("query-status", &json!({}));
        status.is_ok_and(|status| status["running"] == json!(true))
    }

    /// How QEMU ended; `None` while it lives.
    pub fn ended(&self) -> Option<ExitStatus> {
        lock(&self.process).ended()
    }

    // ---- its life -------------------------------------------------------------------------------

    /// Stops the guest's processors.
    #[track_caller]
    pub fn pause(&self) {
        self.qmp_command("stop", &json!({}));
    }

    /// Lets the guest's processors run again.
    #[track_caller]
    pub fn resume(&self) {
        self.qmp_command("cont", &json!({}));
    }

    /// Presses the reset button and waits until the guest is up again.
    #[track_caller]
    pub fn reset(&self) {
        self.events();
        self.qmp_command("system_reset", &json!({}));
        self.wait_event("RESET", START_TIMEOUT);
        self.inside.went_down();
        self.come_up();
    }

    /// Powers the guest off from inside and waits until QEMU has ended.
    #[track_caller]
    pub fn powerdown(&self) {
        self.spawn_last(&["sh", "-c", "umount -a -r; poweroff -f"]);
        self.wait_end("the guest was powered off");
    }

    /// Unmounts in the guest, quits QEMU so that it saves its bitmaps, and returns the disks' images.
    #[track_caller]
    pub fn shut_down(&self) -> Vec<PathBuf> {
        if self.plan.os && self.is_running() {
            self.inside.unmount();
        }
        self.quit()
    }

    /// Quits QEMU without telling the guest: for its file systems a power cut, for the images a clean
    /// end. Returns the disks' images.
    #[track_caller]
    pub fn quit(&self) -> Vec<PathBuf> {
        // QEMU may be gone before its answer is.
        let _ = self.try_qmp_command("quit", &json!({}));
        self.wait_end("it was told to quit");
        self.plan.disks.iter().map(|disk| disk.path(self.folder.path())).collect()
    }

    /// SIGKILL: nothing is flushed, bitmaps stay marked as in use.
    pub fn kill(&self) {
        lock(&self.process).kill();
    }

    /// Sends QEMU any other signal, such as SIGSTOP and SIGCONT.
    pub fn signal(&self, signal: Signal) {
        lock(&self.process).signal(signal);
    }

    /// Starts QEMU again on the same images, ending it first where it still runs.
    #[track_caller]
    pub fn restart(&self) {
        if self.ended().is_none() {
            self.shut_down();
        }
        self.inside.went_down();
        let (process, monitor) = launch(&self.plan, self.folder.path());
        *lock(&self.process) = process;
        *lock(&self.monitor) = monitor;
        self.come_up();
    }

    /// Waits until QEMU has ended by itself.
    #[track_caller]
    pub fn wait_end(&self, why: &str) -> ExitStatus {
        let ended = lock(&self.process).wait(Instant::now() + QUIT_TIMEOUT);
        ended.unwrap_or_else(|| panic!("QEMU runs {QUIT_TIMEOUT:?} after {why}"))
    }

    /// Finds the devices and waits for the agent.
    #[track_caller]
    fn come_up(&self) {
        let started = Instant::now();
        let blocks = self.qmp_command("query-block", &json!({}));
        let blocks = blocks.as_array().expect("a list of devices");
        let device = |disk: &Disk| {
            let nodes = [Disk::format_node(&disk.id), format!("{}-throttle", disk.id)];
            let mine = |block: &&Value| nodes.iter().any(|n| block["inserted"]["node-name"] == **n);
            let qdev = blocks.iter().find(mine).and_then(|block| block["qdev"].as_str());
            let qdev = qdev.unwrap_or_else(|| panic!("no device for {} in {blocks:?}", disk.id));
            (disk.id.clone(), qdev.to_owned())
        };
        *lock(&self.devices) = self.plan.disks.iter().map(device).collect();
        if !self.plan.os {
            return;
        }
        self.inside.come_up(started, || {
            let mut process = lock(&self.process);
            process.ended()?;
            Some(format!("QEMU: {}; {}", process.describe_end(), self.qemu_log()))
        });
    }

    fn qemu_log(&self) -> String {
        read_log(self.folder.path())
    }
}

fn read_log(folder: &Path) -> String {
    match fs::read_to_string(folder.join("qemu.log")) {
        Ok(log) if !log.trim().is_empty() => format!("QEMU said:\n{log}\n"),
        _ => String::new(),
    }
}

/// What runs inside is reached on the machine itself: `guest.sh("sync")`.
impl Deref for Guest {
    type Target = Inside;

    fn deref(&self) -> &Inside {
        &self.inside
    }
}

/// Starts QEMU and connects to the fixture's monitor.
#[track_caller]
fn launch(plan: &GuestBuilder, folder: &Path) -> (Process, Monitor) {
    let mut system_args = Vec::new();
    if plan.os {
        let system = System::get();
        let initramfs = folder.join("initramfs");
        system.write_initramfs(&initramfs);
        system_args = vec![
            OsString::from("-kernel"),
            system.kernel.into_os_string(),
            OsString::from("-initrd"),
            initramfs.into_os_string(),
        ];
    }
    for socket in ["qmp.sock", "fixture-qmp.sock", "qga.sock", "fixture-qga.sock"] {
        // QEMU does not replace the socket of one that was killed.
        let _ = fs::remove_file(folder.join(socket));
    }
    let append = |name: &str| {
        let file = File::options().create(true).append(true).open(folder.join(name));
        file.expect("the fixture's folder is writable")
    };
    let mut args = plan.args_in(folder);
    args.extend(system_args);
    let mut process = Process::start(&args, append("qemu.out"), append("qemu.log"));
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        if let Some(monitor) = Monitor::connect(&folder.join("fixture-qmp.sock"), deadline) {
            return (process, monitor);
        }
        assert!(
            process.ended().is_none() && Instant::now() < deadline,
            "QEMU's monitor does not answer: {}\n{}{args:?}",
            process.describe_end(),
            read_log(folder)
        );
        thread::sleep(Duration::from_millis(5));
    }
}
