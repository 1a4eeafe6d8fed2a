//! A fixture machine for programs that are not tests: one line of JSON each way.
//!
//! ```text
//! fixture-guest [--no-os] [--image ID=QCOW2]… [--ext4 ID=MIB]…
//! ```
//!
//! Once the machine is up it writes `{"pid": …, "qmp": …, "qga": …}`, the sockets for the program under
//! test. Each request is an array, each answer the value it asked for:
//!
//! | request | answer |
//! |---|---|
//! | `["qmp", COMMAND, ARGUMENTS]` | what QEMU returns |
//! | `["agent", COMMAND, ARGUMENTS]` | what the fixture's own guest agent returns |
//! | `["qemu-io", DISK, COMMAND]` | what it printed |
//! | `["spawn", PROGRAM, …]` | a process id in the guest |
//! | `["wait", PID]` | its standard output, once it has succeeded |
//!
//! What fails ends the machine, with a message. So does the end of the requests.

use std::io::{self, BufRead as _, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vm_fixtures::{Disk, FileSystem, Format, Guest, MIB};

/// How long a program in the guest may run once its end is waited for.
const WAIT_TIMEOUT: Duration = Duration::from_secs(240);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is left to tell when standard error is closed.
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what.to_owned())
}

fn run() -> io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (flags, args): (Vec<_>, Vec<_>) =
        args.iter().map(String::as_str).partition(|&word| word == "--no-os");
    let mut plan = if flags.is_empty() { Guest::builder() } else { Guest::without_os() };
    let mut args = args.into_iter();
    while let Some(option) = args.next() {
        let (id, what) = args.next().and_then(|value| value.split_once('=')).ok_or_else(|| {
            invalid("usage: fixture-guest [--no-os] [--image ID=QCOW2]… [--ext4 ID=MIB]…")
        })?;
        plan = plan.disk(match option {
            "--image" => Disk::existing(id, Path::new(what), Format::Qcow2),
            "--ext4" => {
                let mib: u64 = what.parse().map_err(|_| invalid("a size is in MiB"))?;
                Disk::new(id, mib * MIB).mounted(FileSystem::Ext4)
            }
            _ => return Err(invalid(&format!("no such option `{option}`"))),
        });
    }
    let guest = plan.boot().ok_or_else(|| invalid("QEMU is missing"))?;
    let agent = guest.has_agent().then(|| guest.qga());
    answer(&json!({"pid": guest.pid(), "qmp": guest.qmp(), "qga": agent}))?;
    for request in io::stdin().lock().lines() {
        let request: Vec<Value> = serde_json::from_str(&request?)?;
        answer(&perform(&guest, &request)?)?;
    }
    Ok(())
}

fn answer(value: &Value) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{value}")?;
    out.flush()
}

fn perform(guest: &Guest, request: &[Value]) -> io::Result<Value> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    match request {
        [kind, command, arguments] if kind == "qmp" => {
            Ok(guest.qmp_command(&text(command), arguments))
        }
        [kind, command, arguments] if kind == "agent" => {
            Ok(guest.agent_command(&text(command), arguments))
        }
        [kind, disk, command] if kind == "qemu-io" => {
            Ok(json!(guest.qemu_io(&text(disk), &text(command))))
        }
        [kind, command @ ..] if kind == "spawn" && !command.is_empty() => {
            let command: Vec<String> = command.iter().map(text).collect();
            let command: Vec<&str> = command.iter().map(String::as_str).collect();
            Ok(json!(guest.spawn(&command)))
        }
        [kind, pid] if kind == "wait" => wait(guest, pid.as_i64().unwrap_or_default()),
        _ => Err(invalid(&format!("no such request: {}", json!(request)))),
    }
}

fn wait(guest: &Guest, pid: i64) -> io::Result<Value> {
    let deadline = Instant::now() + WAIT_TIMEOUT;
    loop {
        match guest.poll(pid) {
            Some(output) if output.success() => return Ok(json!(output.stdout)),
            Some(output) => return Err(invalid(&format!("in the guest: {output:?}"))),
            None if Instant::now() > deadline => {
                return Err(invalid("a program in the guest does not end"));
            }
            None => thread::sleep(Duration::from_millis(10)),
        }
    }
}
