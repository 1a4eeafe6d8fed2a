//! A blocking client of QEMU's guest agent: runs programs in the guest and moves files.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::monitor::Lines;

/// `guest-file-read` refuses more than 48 MiB; the guest's agent holds a part in memory thrice.
const FILE_PART_LEN: usize = 512 << 10;
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);
const SYNC_TIMEOUT: Duration = Duration::from_millis(500);

/// What a program in the guest left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Output {
    /// The exit code; 128 + the signal's number where a signal ended it, as a shell says it.
    pub code: i64,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// Whether the exit code is 0.
    pub fn success(&self) -> bool {
        self.code == 0
    }
}

fn exec_arguments(command: &[&str]) -> Result<Value, String> {
    let (program, args) = command.split_first().ok_or("no program was named")?;
    Ok(json!({"path": program, "arg": args, "capture-output": true}))
}

/// One connection to an agent.
#[derive(Debug)]
pub(crate) struct GuestAgent {
    lines: Lines,
}

impl GuestAgent {
    /// Connects and synchronises; asks again until the agent is up or the deadline has passed.
    pub(crate) fn connect(socket: &Path, deadline: Instant) -> Option<Self> {
        let mut agent = Self { lines: Lines::connect(socket)? };
        while Instant::now() < deadline {
            let id = rand::random::<u32>();
            let request = json!({"execute": "guest-sync-delimited", "arguments": {"id": id}});
            // 0xFF makes the agent drop what it may have read before.
            agent.lines.send_bytes(b"\xFF").ok()?;
            agent.lines.send(&request).ok()?;
            let until = deadline.min(Instant::now() + SYNC_TIMEOUT);
            while let Some(reply) = agent.lines.next(until) {
                if reply["return"] == json!(id) {
                    return Some(agent);
                }
            }
        }
        None
    }

    /// Runs one command; the agent's own words when it refuses or is silent.
    pub(crate) fn execute(&mut self, command: &str, args: &Value) -> Result<Value, String> {
        let request = json!({"execute": command, "arguments": args});
        let gone = || format!("the guest's agent has no answer to `{command}`");
        self.lines.send(&request).map_err(|_| gone())?;
        let mut reply = self.lines.next(Instant::now() + REPLY_TIMEOUT).ok_or_else(gone)?;
        match reply.get("error") {
            Some(error) => Err(error["desc"].as_str().unwrap_or_default().to_owned()),
            None => Ok(reply["return"].take()),
        }
    }

    /// Starts a program and returns its process id in the guest.
    pub(crate) fn start(&mut self, command: &[&str]) -> Result<i64, String> {
        let started = self.execute("guest-exec", &exec_arguments(command)?)?;
        started["pid"].as_i64().ok_or_else(|| format!("no process id in {started}"))
    }

    /// Starts a program that ends the guest, maybe before the agent can answer: nothing else can be asked
    /// afterwards.
    pub(crate) fn start_last(&mut self, command: &[&str]) -> Result<(), String> {
        let request = json!({"execute": "guest-exec", "arguments": exec_arguments(command)?});
        self.lines.send(&request).map_err(|error| error.to_string())
    }

    /// What became of a program; `None` while it runs.
    pub(crate) fn poll(&mut self, pid: i64) -> Result<Option<Output>, String> {
        let status = self.execute("guest-exec-status", &json!({"pid": pid}))?;
        if status["exited"] != json!(true) {
            return Ok(None);
        }
        let text = |key: &str| {
            let bytes = BASE64.decode(status[key].as_str().unwrap_or_default()).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let signal = status["signal"].as_i64().map(|signal| 128 + signal);
        let code = status["exitcode"].as_i64().or(signal).unwrap_or(-1);
        Ok(Some(Output { code, stdout: text("out-data"), stderr: text("err-data") }))
    }

    /// Runs a program to its end.
    pub(crate) fn run(&mut self, command: &[&str], deadline: Instant) -> Result<Output, String> {
        let pid = self.start(command)?;
        loop {
            if let Some(output) = self.poll(pid)? {
                return Ok(output);
            }
            if Instant::now() > deadline {
                return Err(format!("`{}` still runs at its deadline", command.join(" ")));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn read_file(&mut self, path: &str) -> Result<Vec<u8>, String> {
        let handle = self.execute("guest-file-open", &json!({"path": path, "mode": "r"}))?;
        let mut content = Vec::new();
        loop {
            let args = json!({"handle": handle, "count": FILE_PART_LEN});
            let part = self.execute("guest-file-read", &args)?;
            let bytes = BASE64.decode(part["buf-b64"].as_str().unwrap_or_default());
            content.extend(bytes.map_err(|error| format!("{path}: {error}"))?);
            if part["eof"] == json!(true) {
                break;
            }
        }
        self.execute("guest-file-close", &json!({"handle": handle}))?;
        Ok(content)
    }

    pub(crate) fn write_file(&mut self, path: &str, content: &[u8]) -> Result<(), String> {
        let handle = self.execute("guest-file-open", &json!({"path": path, "mode": "w"}))?;
        for part in content.chunks(FILE_PART_LEN) {
            let mut written = 0;
            while written < part.len() {
                let args = json!({"handle": handle, "buf-b64": BASE64.encode(&part[written..])});
                let reply = self.execute("guest-file-write", &args)?;
                let count = reply["count"].as_u64().and_then(|count| usize::try_from(count).ok());
                written += count.filter(|count| *count > 0).ok_or("the guest wrote nothing")?;
            }
        }
        self.execute("guest-file-flush", &json!({"handle": handle}))?;
        self.execute("guest-file-close", &json!({"handle": handle}))?;
        Ok(())
    }
}
