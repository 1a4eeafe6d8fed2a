//! A machine under test: starts QEMU, talks to it beside the program under test, ends it.

mod block_layer;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::builder::GuestBuilder;
use crate::disk::Disk;
use crate::guest_agent::{GuestAgent, Output};
use crate::monitor::{Monitor, QmpFailure};
use crate::process::Process;
use crate::recipe::System;

/// How long QEMU may take until its monitor answers.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the guest may take until its agent answers: many times what it takes on an idle machine.
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);
/// How long a program in the guest may run unless the caller says otherwise.
const EXEC_TIMEOUT: Duration = Duration::from_secs(60);
const UNMOUNT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long QEMU may take to write its caches back and end.
const QUIT_TIMEOUT: Duration = Duration::from_secs(60);
const CONSOLE_TAIL_LEN: usize = 4000;

/// A running machine, its disks and sockets in a folder of its own.
///
/// Methods panic with an account of what happened: a test has nothing else to do with a fixture that
/// does not work. Dropping it kills QEMU and removes the folder.
#[derive(Debug)]
pub struct Guest {
    process: Mutex<Process>,
    monitor: Mutex<Monitor>,
    agent: Mutex<Option<GuestAgent>>,
    devices: Mutex<BTreeMap<String, String>>,
    plan: GuestBuilder,
    boot_time: Mutex<Duration>,
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
        let (process, monitor) = launch(&plan, folder.path());
        let guest = Self {
            process: Mutex::new(process),
            monitor: Mutex::new(monitor),
            agent: Mutex::new(None),
            devices: Mutex::default(),
            plan,
            boot_time: Mutex::default(),
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

    /// The folder that holds everything of this machine; files put there go with it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
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

    /// How long the last boot took, from the start of QEMU to the agent's first answer.
    pub fn boot_time(&self) -> Duration {
        *lock(&self.boot_time)
    }

    /// The image of a disk, also when an overlay is on top by now.
    #[track_caller]
    pub fn disk_path(&self, id: &str) -> PathBuf {
        self.plan.disk_named(id).path(self.folder.path())
    }

    /// The device file of a disk inside the guest, such as `/dev/vda`.
    #[track_caller]
    pub fn device_file(&self, id: &str) -> String {
        format!("/dev/{}", self.plan.device_name(id))
    }

    /// What the guest has written to its serial console since its first start.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(
            &fs::read(self.folder.path().join("console.log")).unwrap_or_default(),
        )
        .into_owned()
    }

    // ---- inside the guest -----------------------------------------------------------------------

    /// Runs a program in the guest to its end, also while its file systems are frozen.
    #[track_caller]
    pub fn exec(&self, command: &[&str]) -> Output {
        self.exec_within(command, EXEC_TIMEOUT)
    }

    /// Runs a shell script in the guest, which must succeed, and returns its standard output.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        let output = self.exec(&["sh", "-c", script]);
        assert!(output.success(), "`{script}` failed in the guest: {output:?}");
        output.stdout
    }

    /// Like [`Self::exec`] with another deadline.
    #[track_caller]
    pub fn exec_within(&self, command: &[&str], timeout: Duration) -> Output {
        let deadline = Instant::now() + timeout;
        let pid = self.spawn(command);
        loop {
            if let Some(output) = self.poll(pid) {
                return output;
            }
            assert!(
                Instant::now() < deadline,
                "`{}` still runs in the guest after {timeout:?}; console:\n{}",
                command.join(" "),
                self.console_tail()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Starts a program in the guest and returns its process id for [`Self::poll`].
    #[track_caller]
    pub fn spawn(&self, command: &[&str]) -> i64 {
        self.with_agent(|agent| agent.start(command))
    }

    /// What became of a program that [`Self::spawn`] started; `None` while it runs. Tells it once.
    #[track_caller]
    pub fn poll(&self, pid: i64) -> Option<Output> {
        self.with_agent(|agent| agent.poll(pid))
    }

    /// Reads a file of the guest.
    #[track_caller]
    pub fn read_file(&self, path: &str) -> Vec<u8> {
        self.with_agent(|agent| agent.read_file(path))
    }

    /// Writes a file in the guest, without `fsync`.
    #[track_caller]
    pub fn write_file(&self, path: &str, content: &[u8]) {
        self.with_agent(|agent| agent.write_file(path, content));
    }

    /// Runs a command of the guest agent on the fixture's own agent.
    #[track_caller]
    pub fn agent_command(&self, command: &str, args: &Value) -> Value {
        self.with_agent(|agent| agent.execute(command, args))
    }

    #[track_caller]
    fn with_agent<T>(&self, act: impl FnOnce(&mut GuestAgent) -> Result<T, String>) -> T {
        let mut agent = lock(&self.agent);
        let agent = agent.as_mut().expect("a machine without an operating system has no agent");
        match act(agent) {
            Ok(value) => value,
            Err(message) => panic!("{message}; console:\n{}", self.console_tail()),
        }
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
        *lock(&self.agent) = None;
        self.come_up();
    }

    /// Powers the guest off from inside and waits until QEMU has ended.
    #[track_caller]
    pub fn powerdown(&self) {
        self.spawn(&["sh", "-c", "umount -a -r; poweroff -f"]);
        self.wait_end("the guest was powered off");
    }

    /// Unmounts in the guest, quits QEMU so that it saves its bitmaps, and returns the disks' images.
    #[track_caller]
    pub fn shut_down(&self) -> Vec<PathBuf> {
        if self.plan.os && self.is_running() {
            let mut agent = lock(&self.agent);
            if let Some(agent) = agent.as_mut() {
                // Best effort: a guest that hangs or is frozen must still be quit.
                let _ = agent.run(
                    &["sh", "-c", "cd /; umount /mnt/* 2>/dev/null; sync"],
                    Instant::now() + UNMOUNT_TIMEOUT,
                );
            }
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
        *lock(&self.agent) = None;
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
        let socket = self.folder.path().join("fixture-qga.sock");
        let deadline = started + BOOT_TIMEOUT;
        loop {
            let part = deadline.min(Instant::now() + Duration::from_secs(5));
            let agent = GuestAgent::connect(&socket, part);
            if agent.is_some() {
                *lock(&self.agent) = agent;
                break;
            }
            let ended = lock(&self.process).ended();
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "the guest has no agent after {:?}; QEMU: {}; {}console:\n{}",
                started.elapsed(),
                lock(&self.process).describe_end(),
                self.qemu_log(),
                self.console_tail()
            );
        }
        *lock(&self.boot_time) = started.elapsed();
    }

    fn console_tail(&self) -> String {
        let console = self.console();
        let mut start = console.len().saturating_sub(CONSOLE_TAIL_LEN);
        while !console.is_char_boundary(start) {
            start += 1;
        }
        console[start..].to_owned()
    }

    fn qemu_log(&self) -> String {
        read_log(self.folder.path())
    }
}

/// A panic in one thread of a test says nothing about the state behind the lock.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn read_log(folder: &Path) -> String {
    match fs::read_to_string(folder.join("qemu.log")) {
        Ok(log) if !log.trim().is_empty() => format!("QEMU said:\n{log}\n"),
        _ => String::new(),
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
