//! A conversation with `guestfish`: a line in, an answer up to a mark out.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use super::{ApplianceError, STEP_TIMEOUT};
use crate::rsync::quote_for_shell;

/// `guestfish` reads lines of up to 8 KiB where no terminal is behind them.
const LINE_LEN_MAX: usize = 8000;
/// Bytes of one answer; libguestfs allows 4 MiB.
const ANSWER_LEN_MAX: usize = 16 << 20;
/// Bytes of complaints that are kept.
const SAID_LEN_MAX: usize = 4096;

/// How long libguestfs may take to make its socket, and how often is looked.
const SOCKETS_TIMEOUT: Duration = Duration::from_secs(10);
const SOCKETS_POLL: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub(super) struct Session {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    said: Arc<Mutex<Vec<u8>>>,
    mark: String,
}

impl Session {
    /// Starts it; the appliance's own disk has its room in `folder`.
    pub(super) fn start(emulate: bool, folder: &Path) -> Result<Self, ApplianceError> {
        // Where this process is killed, so is `guestfish`, and libguestfs then ends its QEMU.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "guestfish"]);
        command.env("LIBGUESTFS_BACKEND", "direct").env("LC_ALL", "C.UTF-8");
        command.env("LIBGUESTFS_TMPDIR", folder);
        if emulate {
            command.env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg");
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.kill_on_drop(true).spawn().map_err(ApplianceError::Run)?;
        let piped = "all three are pipes";
        let stdin = child.stdin.take().expect(piped);
        let stdout = BufReader::new(child.stdout.take().expect(piped));
        let said = Arc::new(Mutex::new(Vec::new()));
        tokio::spawn(keep_end(child.stderr.take().expect(piped), Arc::clone(&said)));
        // It only tells answers from one another: who is in the appliance sees it.
        let mark = format!("kvmsnap-{}", Uuid::new_v4().simple());
        Ok(Self { child, stdin, stdout, said, mark })
    }

    /// Says one line, without waiting for what comes of it.
    pub(super) async fn say(&mut self, doing: &str, words: &[&str]) -> Result<(), ApplianceError> {
        let (command, rest) = words.split_first().expect("a command has a name");
        let mut line = (*command).to_owned();
        for word in rest {
            line.push(' ');
            line.push_str(&quote_for_guestfish(word));
        }
        line.push('\n');
        if line.len() > LINE_LEN_MAX {
            return Err(ApplianceError::TooLong(line.len()));
        }
        let written = timeout(STEP_TIMEOUT, self.stdin.write_all(line.as_bytes())).await;
        match written {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(self.ended(doing).await),
            Err(_) => Err(ApplianceError::Slow { doing: doing.to_owned(), limit: STEP_TIMEOUT }),
        }
    }

    /// The folder that libguestfs makes for its socket when it starts: for root it is in /tmp, whatever one says,
    /// and stays there where `guestfish` is killed. `None` where it does not show.
    pub(super) async fn sockets(&self) -> Option<PathBuf> {
        let process = Path::new("/proc").join(self.child.id()?.to_string());
        let until = Instant::now() + SOCKETS_TIMEOUT;
        while Instant::now() < until {
            if let Some(folder) = sockets_of(&process) {
                return Some(folder);
            }
            sleep(SOCKETS_POLL).await;
        }
        None
    }

    /// Waits until all that was said has been done.
    pub(super) async fn settle(
        &mut self,
        doing: &str,
        limit: Duration,
    ) -> Result<(), ApplianceError> {
        let mark = self.mark.clone();
        self.say(doing, &["echo", &mark, "0"]).await?;
        self.answer(doing, limit).await.map(drop)
    }

    /// Runs one step of the script in the appliance; what it printed.
    pub(super) async fn step(
        &mut self,
        doing: &str,
        words: &[&str],
        limit: Duration,
    ) -> Result<String, ApplianceError> {
        let quoted: Vec<_> = words.iter().map(|word| quote_for_shell(word)).collect();
        let command = format!(
            "LC_ALL=C /tmp/kvmsnap-step {} 2>/tmp/said; code=$?; [ $code = 0 ] || tail -c {SAID_LEN_MAX} /tmp/said; echo; echo {} $code",
            quoted.join(" "),
            self.mark,
        );
        // `guestfish` makes a list of words of it and its daemon joins them: quotes would be lost.
        let command = STANDARD.encode(command);
        let command = format!("sh -c \"$(echo {command} | base64 -d)\"");
        self.say(doing, &["debug", "sh", &command]).await?;
        self.answer(doing, limit).await
    }

    /// Ends it in an orderly way.
    pub(super) async fn end(mut self) -> Result<(), ApplianceError> {
        let doing = "shut down";
        self.say(doing, &["shutdown"]).await?;
        self.say(doing, &["exit"]).await?;
        match timeout(STEP_TIMEOUT, self.child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(_) => Err(self.ended(doing).await),
            Err(_) => Err(ApplianceError::Slow { doing: doing.to_owned(), limit: STEP_TIMEOUT }),
        }
    }

    async fn answer(&mut self, doing: &str, limit: Duration) -> Result<String, ApplianceError> {
        let read = timeout(limit, read_answer(&mut self.stdout, &self.mark)).await;
        match read {
            Ok(Ok(Some((said, 0)))) => Ok(said),
            Ok(Ok(Some((said, code)))) => {
                Err(ApplianceError::Step { doing: doing.to_owned(), code, said })
            }
            Ok(Ok(None)) => Err(self.ended(doing).await),
            Ok(Err(error)) => Err(ApplianceError::Nonsense(Box::new(error))),
            Err(_) => Err(ApplianceError::Slow { doing: doing.to_owned(), limit }),
        }
    }

    async fn ended(&mut self, doing: &str) -> ApplianceError {
        // It ends by itself after an error; its complaint comes before that.
        let _ = timeout(Duration::from_secs(10), self.child.wait()).await;
        tokio::task::yield_now().await;
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let said = String::from_utf8_lossy(&said).into_owned();
        ApplianceError::Ended { doing: doing.to_owned(), said }
    }
}

/// The folder of the socket of libguestfs that a process has open.
fn sockets_of(process: &Path) -> Option<PathBuf> {
    let files = fs::read_dir(process.join("fd")).ok()?.flatten();
    let links = files.filter_map(|file| fs::read_link(file.path()).ok());
    let inodes: Vec<String> = links
        .filter_map(|link| {
            let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
            Some(inode.to_owned())
        })
        .collect();
    // proc_net_unix(5): the inode is the seventh field, the path the last.
    let table = fs::read_to_string(process.join("net/unix")).ok()?;
    table.lines().find_map(|line| {
        let (fields, path) = line.split_once(" /")?;
        let inode = fields.split_ascii_whitespace().nth(6)?;
        let folder = Path::new("/").join(path).parent()?.to_owned();
        let is_theirs = folder.file_name()?.to_str()?.starts_with("libguestfs");
        (is_theirs && inodes.iter().any(|known| known == inode)).then_some(folder)
    })
}

/// Reads up to the line with the mark: what came before it, and the code in it. `None` at the end.
async fn read_answer(
    from: &mut BufReader<ChildStdout>,
    mark: &str,
) -> io::Result<Option<(String, i32)>> {
    let mut answer = String::new();
    loop {
        let mut line = Vec::new();
        let room = (ANSWER_LEN_MAX - answer.len().min(ANSWER_LEN_MAX)) as u64;
        (&mut *from).take(room).read_until(b'\n', &mut line).await?;
        if line.is_empty() {
            return match room {
                0 => Err(io::Error::new(io::ErrorKind::InvalidData, "an answer without an end")),
                _ => Ok(None),
            };
        }
        let line = String::from_utf8_lossy(&line);
        if let Some(code) = line.strip_prefix(mark) {
            // The line feed before the mark is ours.
            answer.truncate(answer.strip_suffix('\n').map_or(answer.len(), str::len));
            let code = code.trim().parse();
            return code.map(|code| Some((answer, code))).map_err(io::Error::other);
        }
        answer.push_str(&line);
    }
}

async fn keep_end(mut from: ChildStderr, said: Arc<Mutex<Vec<u8>>>) {
    let mut buffer = [0; 1024];
    while let Ok(len @ 1..) = from.read(&mut buffer).await {
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        said.extend_from_slice(&buffer[..len]);
        let excess = said.len().saturating_sub(SAID_LEN_MAX);
        said.drain(..excess);
    }
}

/// As `guestfish` reads what is between double quotes: guestfish(1), "Quoting".
fn quote_for_guestfish(word: &str) -> String {
    let mut quoted = String::from("\"");
    for byte in word.bytes() {
        match byte {
            b'"' | b'\\' => {
                quoted.push('\\');
                quoted.push(char::from(byte));
            }
            b' '..=b'~' => quoted.push(char::from(byte)),
            _ => quoted.push_str(&format!("\\x{byte:02x}")),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s15_a_name_means_nothing_to_a_shell_or_to_guestfish() {
        assert_eq!(quote_for_shell("a'; rm -rf /"), r"'a'\''; rm -rf /'");
        assert_eq!(quote_for_guestfish("a \"b\\\n\u{e9}"), r#""a \"b\\\x0a\xc3\xa9""#);
    }
}
