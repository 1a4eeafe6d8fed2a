//! Processes that never outlive whoever started them.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};
use std::{io, thread};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::tools::find;

/// A started process, mostly QEMU. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    ended: Option<ExitStatus>,
}

type Request = (Command, mpsc::Sender<io::Result<Child>>);

impl Process {
    /// Starts QEMU; its messages go to `errors`, what its `qemu-io` commands print to `output`.
    pub(crate) fn start(args: &[OsString], output: File, errors: File) -> Self {
        let qemu = find("qemu-system-x86_64").expect("checked before a guest is started");
        // Its output must be in the file when the monitor's command is done: line by line.
        let mut program = vec![OsString::from("stdbuf"), "-oL".into(), qemu.into_os_string()];
        program.extend_from_slice(args);
        Self::start_program(&program, output.into(), errors.into())
    }

    /// Starts a program, given with its arguments.
    pub(crate) fn start_program(program: &[OsString], output: Stdio, errors: Stdio) -> Self {
        let mut command = Command::new(find("setpriv").expect("checked before a guest is started"));
        // A test that is killed runs no `Drop`, so the kernel ends it with us.
        command.args(["--pdeathsig", "KILL"]).args(program);
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        let child = spawn(command).unwrap_or_else(|error| panic!("{program:?}: {error}"));
        Self { child, ended: None }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended; `None` while it runs.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().expect("the child is ours");
        }
        self.ended
    }

    /// Waits for its end; `None` at the deadline.
    pub(crate) fn wait(&mut self, deadline: Instant) -> Option<ExitStatus> {
        while self.ended().is_none() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        self.ended
    }

    pub(crate) fn signal(&mut self, signal: Signal) {
        if self.ended().is_none() {
            let id = i32::try_from(self.id()).expect("Linux's process ids fit");
            // Not reaped yet, so the id is still its own, and a zombie takes signals too.
            kill(Pid::from_raw(id), signal).expect("the child is ours");
        }
    }

    /// SIGKILL, then waits until the kernel has let go of its files.
    pub(crate) fn kill(&mut self) {
        if self.ended().is_none() {
            self.child.kill().expect("the child is ours");
            self.ended = Some(self.child.wait().expect("the child is ours"));
        }
    }

    pub(crate) fn describe_end(&mut self) -> String {
        match self.ended() {
            None => "it runs".to_owned(),
            Some(status) => match status.signal() {
                Some(signal) => format!("signal {signal} ended it"),
                None => format!("it ended with {status}"),
            },
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The process that a pid file names, if it lives.
pub(crate) fn pid_in(file: &Path) -> Option<Pid> {
    let pid = fs::read_to_string(file).ok()?.trim().parse().ok()?;
    Some(Pid::from_raw(pid)).filter(|pid| is_alive(*pid))
}

/// Whether a process that is not our child runs, or still has files open: its first thread may have ended
/// before the others. What is left of it until it is reaped does neither.
pub(crate) fn is_alive(pid: Pid) -> bool {
    // `man 5 proc`: the third field is the state, the twentieth the number of threads. The second one, the name,
    // may hold anything.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields.split_whitespace());
    let Some(mut fields) = fields else { return false };
    let (state, threads) = (fields.next(), fields.nth(16));
    !matches!((state, threads), (Some("Z"), Some("0" | "1")) | (Some("X"), _))
}

/// The kernel sends the signal when the *thread* that started the child ends (`man 2 prctl`), so one
/// thread that lives as long as the process starts them all.
fn spawn(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<mpsc::Sender<Request>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, requests) = mpsc::channel::<Request>();
        let serve = move || {
            for (mut command, reply) in requests {
                // Who asked may have given up; then dropping the child is all there is to do.
                let _ = reply.send(command.spawn());
            }
        };
        thread::Builder::new().name("qemu-spawner".to_owned()).spawn(serve).expect("a thread");
        sender
    });
    let (reply, started) = mpsc::channel();
    spawner.send((command, reply)).expect("the thread never ends");
    started.recv().expect("the thread never ends")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_lives_until_it_has_ended_whether_or_not_it_was_reaped() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        assert!(is_alive(pid) && is_alive(Pid::this()));
        child.kill().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while is_alive(pid) {
            assert!(Instant::now() < deadline, "it was killed");
        }
        assert!(Path::new(&format!("/proc/{pid}")).exists(), "nobody has reaped it");
        child.wait().unwrap();
        assert!(!is_alive(pid));
    }
}
