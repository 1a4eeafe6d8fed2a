//! The operating system of a fixture guest, reached through the fixture's own agent: the same whether
//! QEMU was started by us or by libvirt.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::guest_agent::{GuestAgent, Output};

/// How long the guest may take until its agent answers: many times what it takes on an idle machine.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);
/// How long a program in the guest may run unless the caller says otherwise.
const EXEC_TIMEOUT: Duration = Duration::from_secs(180);
const UNMOUNT_TIMEOUT: Duration = Duration::from_secs(60);
const CONSOLE_TAIL_LEN: usize = 4000;

/// What runs in a machine: programs, files, its console.
///
/// Methods panic with an account of what happened: a test has nothing else to do with a fixture that
/// does not work.
#[derive(Debug)]
pub struct Inside {
    folder: PathBuf,
    agent: Mutex<Option<GuestAgent>>,
    device_names: Mutex<BTreeMap<String, String>>,
    boot_time: Mutex<Duration>,
}

impl Inside {
    /// The guest whose console, oracle log and agent socket are in this folder, not booted yet.
    pub(crate) fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            agent: Mutex::new(None),
            device_names: Mutex::default(),
            boot_time: Mutex::default(),
        }
    }

    /// Notes under which name the guest's kernel knows a disk.
    pub(crate) fn add_device(&self, id: &str, name: String) {
        lock(&self.device_names).insert(id.to_owned(), name);
    }

    /// The folder that holds everything of this machine; files put there go with it.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// How long the last boot took, from the start of QEMU to the agent's first answer.
    pub fn boot_time(&self) -> Duration {
        *lock(&self.boot_time)
    }

    /// The device file of a disk inside the guest, such as `/dev/vda`.
    #[track_caller]
    pub fn device_file(&self, id: &str) -> String {
        let names = lock(&self.device_names);
        let name = names.get(id).unwrap_or_else(|| panic!("the machine has no disk `{id}`"));
        format!("/dev/{name}")
    }

    /// What the guest has written to its serial console since its first start.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.folder.join("console.log")).unwrap_or_default())
            .into_owned()
    }

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

    /// Starts a program that ends the machine, maybe before its agent can answer: nothing else can be asked
    /// until it was started again.
    #[track_caller]
    pub fn spawn_last(&self, command: &[&str]) {
        self.with_agent(|agent| agent.start_last(command));
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

    /// Waits for the agent of a guest that was started at `started`; `ended` says what became of a
    /// QEMU that is gone.
    #[track_caller]
    pub(crate) fn come_up(&self, started: Instant, ended: impl Fn() -> Option<String>) {
        let socket = self.folder.join("fixture-qga.sock");
        let deadline = started + BOOT_TIMEOUT;
        loop {
            let part = deadline.min(Instant::now() + Duration::from_secs(5));
            let agent = GuestAgent::connect(&socket, part);
            if agent.is_some() {
                *lock(&self.agent) = agent;
                break;
            }
            let ended = ended();
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "the guest has no agent after {:?}; {}; console:\n{}",
                started.elapsed(),
                ended.unwrap_or_default(),
                self.console_tail()
            );
            thread::sleep(Duration::from_millis(20));
        }
        *lock(&self.boot_time) = started.elapsed();
    }

    /// Forgets the agent of a guest that is gone or is about to boot again.
    pub(crate) fn went_down(&self) {
        *lock(&self.agent) = None;
    }

    /// Best effort: a guest that hangs or is frozen must still be ended.
    pub(crate) fn unmount(&self) {
        if let Some(agent) = lock(&self.agent).as_mut() {
            let script = "cd /; umount /mnt/* 2>/dev/null; sync";
            let _ = agent.run(&["sh", "-c", script], Instant::now() + UNMOUNT_TIMEOUT);
        }
    }

    fn console_tail(&self) -> String {
        let console = self.console();
        let mut start = console.len().saturating_sub(CONSOLE_TAIL_LEN);
        while !console.is_char_boundary(start) {
            start += 1;
        }
        console[start..].to_owned()
    }
}

/// A panic in one thread of a test says nothing about the state behind the lock.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
