//! Commands of this program as processes of their own: one that dies harms no other, and each is what an
//! administrator would type.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::sync::watch;

use crate::bound;
use crate::error::INTERRUPTED;
use crate::names::printable;

/// How long a command may take to clean up once it is asked to end: a guest may have to be brought back.
const GRACE: Duration = Duration::from_secs(900);
/// How long it may take to end after that.
const LAST_GRACE: Duration = Duration::from_secs(10);
/// Longest line that is kept, in bytes.
const LINE_LEN_MAX: usize = 1 << 20;
/// Lines of standard output that are kept.
const LINES_MAX: usize = 100_000;
/// How much of the end of standard error is kept, in bytes.
const ERRORS_LEN_MAX: usize = 16 << 10;
/// Warnings of a command that are kept.
const WARNINGS_MAX: usize = 20;
/// How long output may stay open after its process has ended, as by a guard.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// What every command is given.
#[derive(Debug, Clone)]
pub struct Launcher {
    /// The configuration, where another than the usual one was named.
    pub config: Option<PathBuf>,
    /// A password file that was named for all.
    pub password_file: Option<PathBuf>,
    /// libvirt.
    pub connect: String,
    /// The state folder.
    pub state_dir: PathBuf,
    /// The folder of sockets and locks.
    pub run_dir: PathBuf,
    /// How nice its processes are.
    pub nice: u8,
    /// Whether they read and write only when nobody else does.
    pub idle_io: bool,
    /// Whether somebody has asked to stop.
    pub interrupts: watch::Receiver<Asked>,
}

/// That the program shall stop.
#[derive(Debug, Clone, Copy, Default)]
pub struct Asked {
    /// How often that was asked for.
    pub times: u32,
    /// Whether it was the host that asked, as when it shuts down, and not a person.
    pub by_host: bool,
}

/// How a command ended.
#[derive(Debug, Default)]
pub struct Answer {
    /// Its exit code; `None` where a signal ended it, or it did not start.
    pub code: Option<u8>,
    /// The objects it printed.
    pub lines: Vec<Value>,
    /// What it said last, on standard error.
    pub errors: String,
    /// Whether it was asked to end: by us, because it took too long, or because somebody asked us.
    pub was_stopped: Option<Stopped>,
}

/// Why a command was asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// It took too long.
    TooLong(Duration),
    /// Somebody asked the run to stop.
    Asked,
}

impl Answer {
    /// Whether all is done.
    pub fn is_done(&self) -> bool {
        self.code == Some(0)
    }

    /// Whether it ended because somebody asked the run to stop.
    pub fn is_aborted(&self) -> bool {
        self.was_stopped == Some(Stopped::Asked)
            || (self.was_stopped.is_none() && self.code == Some(INTERRUPTED))
    }

    /// What it logged that a person should look at, whether or not it failed.
    pub fn warnings(&self) -> Vec<String> {
        let logged = self.errors.lines().filter_map(|line| {
            let line = line.trim_start();
            line.strip_prefix("WARN ").or_else(|| line.strip_prefix("ERROR "))
        });
        logged.map(|line| printable(line.trim())).take(WARNINGS_MAX).collect()
    }

    /// Whether it was ended because it took too long.
    pub fn is_too_slow(&self) -> bool {
        matches!(self.was_stopped, Some(Stopped::TooLong(_)))
    }

    /// Why it failed, in a few lines.
    pub fn reason(&self) -> String {
        let told = self.errors.trim();
        let start = told.find("error: ").unwrap_or(0);
        let told = printable_lines(told[start..].trim());
        let told = told.strip_prefix("error: ").unwrap_or(&told);
        match (self.was_stopped, self.code) {
            (Some(Stopped::TooLong(limit)), _) => {
                format!("it took longer than {}", crate::units::human_duration(limit))
            }
            (_, None) if told.is_empty() => "it was killed".to_owned(),
            (_, None) => format!("it was killed: {told}"),
            (_, Some(code)) if told.is_empty() => format!("exit code {code}"),
            _ => told.to_owned(),
        }
    }
}

fn printable_lines(text: &str) -> String {
    text.lines().map(printable).collect::<Vec<_>>().join("\n")
}

impl Launcher {
    /// Runs a command of this program to its end, at most for `limit`. `repository` is a name or location.
    pub async fn run(
        &self,
        repository: Option<&str>,
        arguments: &[impl AsRef<str>],
        limit: Duration,
    ) -> Answer {
        match self.try_run(repository, arguments, limit).await {
            Ok(answer) => answer,
            Err(error) => {
                Answer { errors: format!("error: cannot start it: {error}"), ..Answer::default() }
            }
        }
    }

    /// Whether somebody has asked to stop.
    pub fn is_asked_to_stop(&self) -> bool {
        self.interrupts.borrow().times > 0
    }

    /// Whether it was the host that asked, so that nobody knows.
    pub fn is_asked_by_host(&self) -> bool {
        self.interrupts.borrow().by_host
    }

    /// Waits; `false` when somebody asks to stop.
    pub async fn sleep(&self, pause: Duration) -> bool {
        let mut interrupts = self.interrupts.clone();
        tokio::select! {
            () = tokio::time::sleep(pause) => true,
            Ok(_) = interrupts.wait_for(|asked| asked.times > 0) => false,
        }
    }

    async fn try_run(
        &self,
        repository: Option<&str>,
        arguments: &[impl AsRef<str>],
        limit: Duration,
    ) -> io::Result<Answer> {
        // One that was asked to stop starts nothing more.
        if self.is_asked_to_stop() {
            return Ok(Answer { was_stopped: Some(Stopped::Asked), ..Answer::default() });
        }
        let mut child = self.command(repository, arguments).spawn()?;
        let stdout = child.stdout.take().expect("it is piped");
        let stderr = child.stderr.take().expect("it is piped");
        let stdout = tokio::spawn(collect_lines(stdout));
        let stderr = tokio::spawn(collect_end(stderr));
        let (status, was_stopped) = self.until_it_ends(&mut child, limit).await?;
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        // What it has started, such as a guard, may keep its output open.
        let lines = tokio::time::timeout(DRAIN_TIMEOUT, stdout).await;
        let errors = tokio::time::timeout(DRAIN_TIMEOUT, stderr).await;
        let lines = lines.ok().and_then(Result::ok).unwrap_or_default();
        let errors = errors.ok().and_then(Result::ok).unwrap_or_default();
        Ok(Answer { code, lines, errors, was_stopped })
    }

    fn command(&self, repository: Option<&str>, arguments: &[impl AsRef<str>]) -> Command {
        let mut command = bound::this_program();
        command.arg("--nice").arg(self.nice.to_string()).arg("--");
        // By its process: each program between would be `self`.
        let program = format!("/proc/{}/exe", std::process::id());
        if self.idle_io {
            command.args(["ionice", "-t", "-c", "3", &program]);
        } else {
            command.arg(&program);
        }
        let mut named = |option: &str, value: Option<OsString>| {
            if let Some(value) = value {
                command.arg(option).arg(value);
            }
        };
        named("--config", self.config.clone().map(Into::into));
        named("--password-file", self.password_file.clone().map(Into::into));
        named("--connect", Some(self.connect.clone().into()));
        named("--state-dir", Some(self.state_dir.clone().into()));
        named("--run-dir", Some(self.run_dir.clone().into()));
        named("--repository", repository.map(Into::into));
        command.args(["--json", "--progress", "never"]);
        command.args(arguments.iter().map(AsRef::as_ref));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Waits for its end. It is asked to end when it takes too long, and whenever somebody asks us.
    async fn until_it_ends(
        &self,
        child: &mut Child,
        limit: Duration,
    ) -> io::Result<(ExitStatus, Option<Stopped>)> {
        let mut interrupts = self.interrupts.clone();
        let mut was_stopped = None;
        let mut patience = limit;
        let mut strongest = false;
        loop {
            let asked = tokio::select! {
                status = child.wait() => return Ok((status?, was_stopped)),
                Ok(()) = interrupts.changed() => Some(Stopped::Asked),
                () = tokio::time::sleep(patience) => None,
            };
            let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) else { continue };
            match (asked, was_stopped) {
                (Some(asked), _) => {
                    was_stopped = Some(asked);
                    patience = GRACE;
                    ask_to_end(pid);
                }
                (None, None) => {
                    was_stopped = Some(Stopped::TooLong(limit));
                    patience = GRACE;
                    ask_to_end(pid);
                }
                // Whatever it has left, its guard ends.
                (None, Some(_)) if strongest => child.start_kill()?,
                (None, Some(_)) => {
                    strongest = true;
                    patience = LAST_GRACE;
                    ask_to_end(pid);
                }
            }
        }
    }
}

/// As Ctrl-C does.
fn ask_to_end(pid: i32) {
    // It is our child and not waited for yet, so nobody else has its id.
    let _ = kill(Pid::from_raw(pid), Signal::SIGINT);
}

/// The objects of an output with one on each line. What is none is passed over.
async fn collect_lines(mut from: impl AsyncRead + Unpin) -> Vec<Value> {
    let (mut lines, mut line, mut buffer) = (Vec::new(), Vec::new(), vec![0; 64 << 10]);
    let mut is_too_long = false;
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        for part in buffer[..count].split_inclusive(|byte| *byte == b'\n') {
            is_too_long |= line.len() + part.len() > LINE_LEN_MAX;
            if !is_too_long {
                line.extend_from_slice(part);
            }
            if part.ends_with(b"\n") {
                let object = serde_json::from_slice(&line).ok().filter(Value::is_object);
                lines.extend(object.filter(|_| !is_too_long && lines.len() < LINES_MAX));
                line.clear();
                is_too_long = false;
            }
        }
    }
    lines
}

/// The end of an output.
async fn collect_end(mut from: impl AsyncRead + Unpin) -> String {
    let (mut end, mut buffer) = (Vec::new(), vec![0; 4 << 10]);
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        end.extend_from_slice(&buffer[..count]);
        let excess = end.len().saturating_sub(ERRORS_LEN_MAX);
        end.drain(..excess);
    }
    String::from_utf8_lossy(&end).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(code: Option<u8>, errors: &str) -> Answer {
        Answer { code, errors: errors.to_owned(), ..Answer::default() }
    }

    #[test]
    fn the_reason_is_what_the_command_said_and_moves_no_cursor() {
        let told = " WARN something\nerror: cannot use it\ncaused by: a\u{1b}[2Jb\nhint: do so\n";
        let reason = answer(Some(1), told).reason();
        assert_eq!(reason, "cannot use it\ncaused by: a\\u{1b}[2Jb\nhint: do so");
        assert_eq!(answer(Some(7), "").reason(), "exit code 7");
        assert_eq!(answer(None, "").reason(), "it was killed");
        let too_long = Some(Stopped::TooLong(Duration::from_secs(7200)));
        let slow = Answer { was_stopped: too_long, ..answer(Some(130), "error: interrupted\n") };
        assert_eq!((slow.reason().as_str(), slow.is_aborted()), ("it took longer than 2 h", false));
        assert!(answer(Some(130), "").is_aborted());
    }

    #[test]
    fn what_was_logged_as_a_warning_is_known_also_of_a_command_that_succeeds() {
        let told =
            " WARN the hook failed: \u{1b}[2Jno\n INFO fine\nERROR disk `vda` runs bare\nnoise\n";
        let warnings = answer(Some(0), told).warnings();
        assert_eq!(warnings, ["the hook failed: \\u{1b}[2Jno", "disk `vda` runs bare"]);
    }

    #[tokio::test]
    async fn output_without_end_takes_no_memory_without_end() {
        let long = "x".repeat(3 << 20);
        let text = format!("{{\"a\":1}}\nnoise\n{long}\n{{\"b\":2}}\n{{\"cut");
        let lines = collect_lines(text.as_bytes()).await;
        assert_eq!(lines, [serde_json::json!({"a": 1}), serde_json::json!({"b": 2})]);
        let end = collect_end(text.as_bytes()).await;
        assert!(end.len() <= ERRORS_LEN_MAX && end.ends_with("{\"cut"));
    }
}
