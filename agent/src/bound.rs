//! Programs that never outlive this process, however it ends: they begin as this program, which asks the
//! kernel for that before it becomes them.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};
use tokio::process::Command;

/// Name of the hidden subcommand that such a program begins as.
pub const SUBCOMMAND: &str = "bound";

/// A command that runs a program to which the user's Ctrl-C is not sent, and that is killed when the
/// command's handle is dropped and when this process ends.
pub fn command(program: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg(SUBCOMMAND).arg("--parent").arg(std::process::id().to_string());
    command.arg("--").arg(program);
    command.process_group(0).kill_on_drop(true);
    command
}

/// The same for this very program, which is asked to end and cleans up.
pub fn this_program() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg(SUBCOMMAND).arg("--parent").arg(std::process::id().to_string()).arg("--gently");
    command.process_group(0);
    command
}

/// Becomes a program that ends when its parent does. Returns only why it cannot.
pub fn become_program(
    parent: i32,
    gently: bool,
    nice: Option<i32>,
    program: &OsString,
    arguments: &[OsString],
) -> io::Error {
    let signal = if gently { Signal::SIGTERM } else { Signal::SIGKILL };
    if let Err(errno) = set_pdeathsig(signal) {
        return errno.into();
    }
    // It may have died before.
    if getppid() != Pid::from_raw(parent) {
        return io::Error::other("the run has ended");
    }
    if let Some(nice) = nice {
        // Without the right to it the program runs as it is.
        let _ = rustix::process::setpriority_process(None, nice);
    }
    std::process::Command::new(program).args(arguments).exec()
}
