//! QEMU's tools, run within limits: on memory, processor time, what they write, open files and time.
//!
//! They inherit no variables, gain no rights, and end with the thread that started them. Images are named to
//! them with the whole graph spelled out (`json:…`), so that no name is taken for an option, a protocol or
//! a format, and nothing that an image names is opened.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

/// The most that is kept of a tool's output; more is an error.
const OUTPUT_LEN_MAX: usize = 16 << 20;
/// The most that is kept of its words; the rest is read and forgotten.
const WORDS_LEN_MAX: usize = 16 << 10;
/// The most of them that is told.
const TOLD_CHARS_MAX: usize = 1000;
/// Where programs are when nobody says it.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Bytes a second that every host reads, compresses and writes.
const RATE_MIN: u64 = 4 << 20;

/// Why a tool did not do its work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ToolError {
    /// It cannot be started.
    #[error("cannot run `{tool}`")]
    Start {
        /// The tool.
        tool: String,
        /// Why.
        source: io::Error,
    },
    /// It failed.
    #[error("`{tool}` could not {step}: {words}")]
    Failed {
        /// The tool.
        tool: String,
        /// What it was to do, to be read after "could not".
        step: String,
        /// What it said.
        words: String,
    },
    /// It was ended by a signal, as by one of its limits.
    #[error("`{tool}` was ended by signal {signal} when asked to {step}")]
    Killed {
        /// The tool.
        tool: String,
        /// What it was to do.
        step: String,
        /// The signal.
        signal: i32,
    },
    /// It took too long.
    #[error("`{tool}` did not {step} within {} s", .waited.as_secs())]
    TooLong {
        /// The tool.
        tool: String,
        /// What it was to do, to be read after "did not".
        step: String,
        /// How long was waited.
        waited: Duration,
    },
    /// It says more than it should.
    #[error("`{tool}` said more than {max} bytes when asked to {step}")]
    TooMuch {
        /// The tool.
        tool: String,
        /// What it was to do.
        step: String,
        /// What is read.
        max: usize,
    },
}

impl ToolError {
    /// Whether one of its limits ended it.
    pub fn is_limit(&self) -> bool {
        match self {
            Self::Killed { .. } | Self::TooLong { .. } | Self::TooMuch { .. } => true,
            Self::Failed { words, .. } => words.contains("File too large"),
            Self::Start { .. } => false,
        }
    }
}

/// What a tool may use at most; less where this process may use less.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of address space.
    pub memory: u64,
    /// Processor time, of all its threads.
    pub cpu: Duration,
    /// Bytes of a file that it writes; 0 where it writes none.
    pub file_len: u64,
    /// Open files.
    pub files: u64,
    /// Time.
    pub time: Duration,
}

impl Limits {
    /// For a look at headers and tables.
    pub const LOOK: Self = Self {
        memory: 1 << 30,
        cpu: Duration::from_secs(60),
        file_len: 0,
        files: 64,
        time: Duration::from_secs(120),
    };

    /// For reading a disk of so many bytes once.
    pub fn reading(size: u64) -> Self {
        let time = Duration::from_secs(600 + size / RATE_MIN);
        // Several threads work at once.
        Self { memory: 2 << 30, cpu: time * 4, file_len: 0, files: 256, time }
    }

    /// For reading so many bytes once, and writing a file of so many at most.
    pub fn writing(data: u64, file_len: u64) -> Self {
        Self { file_len, ..Self::reading(data) }
    }
}

/// What a tool said.
#[derive(Debug)]
pub struct Output {
    /// Its exit code.
    pub code: i32,
    /// Its standard output; empty where that was progress.
    pub stdout: Vec<u8>,
    /// What it wrote to its standard error, without its name.
    pub words: String,
}

/// A node of QEMU's block layer as its tools take the name of an image.
pub fn named(graph: &Value) -> OsString {
    format!("json:{graph}").into()
}

/// Runs a tool, and waits for its end. `progress` gets the percentage that it says it has done. Call it from
/// an async task, not from a thread that may end before.
///
/// # Errors
/// [`ToolError`], but for a tool that ends with an exit code.
pub async fn run(
    tool: &str,
    step: &str,
    arguments: &[impl AsRef<OsStr>],
    limits: &Limits,
    progress: Option<&mut dyn FnMut(f64)>,
) -> Result<Output, ToolError> {
    let failed = |source| ToolError::Start { tool: tool.to_owned(), source };
    let mut process = command(tool, limits).args(arguments).spawn().map_err(failed)?;
    let stdout = process.stdout.take().expect("it is piped");
    let stderr = process.stderr.take().expect("it is piped");
    let work = async {
        let (stdout, words) = tokio::try_join!(read(stdout, progress), read_words(stderr))?;
        Ok((process.wait().await?, stdout, words))
    };
    let (tool, step) = (tool.to_owned(), step.to_owned());
    match tokio::time::timeout(limits.time, work).await {
        // It is killed when it is dropped.
        Err(_) => Err(ToolError::TooLong { tool, step, waited: limits.time }),
        Ok(Err(source)) => Err(failed(source)),
        Ok(Ok((_, None, _))) => Err(ToolError::TooMuch { tool, step, max: OUTPUT_LEN_MAX }),
        Ok(Ok((status, Some(stdout), stderr))) => match (status.code(), status.signal()) {
            (Some(code), _) => Ok(Output { code, stdout, words: words(&tool, &stderr) }),
            (None, signal) => {
                Err(ToolError::Killed { tool, step, signal: signal.unwrap_or_default() })
            }
        },
    }
}

/// The same for a tool that must succeed.
///
/// # Errors
/// [`ToolError`].
pub async fn succeed(
    tool: &str,
    step: &str,
    arguments: &[impl AsRef<OsStr>],
    limits: &Limits,
    progress: Option<&mut dyn FnMut(f64)>,
) -> Result<Vec<u8>, ToolError> {
    let output = run(tool, step, arguments, limits, progress).await?;
    match output.code {
        0 => Ok(output.stdout),
        _ => Err(output.failed(tool, step)),
    }
}

impl Output {
    /// The error that its exit code means.
    pub fn failed(self, tool: &str, step: &str) -> ToolError {
        let Self { code, words, .. } = self;
        let words = if words.is_empty() { format!("it ended with {code}") } else { words };
        ToolError::Failed { tool: tool.to_owned(), step: step.to_owned(), words }
    }
}

/// The tool within its limits, which two others set before they become it: a limit that is set later comes
/// too late.
fn command(tool: &str, limits: &Limits) -> Command {
    let limit = |name: &str, resource, wanted: u64| {
        // Nobody may ask for more than there is.
        let allowed = getrlimit(resource).map_or(wanted, |(_, hard)| wanted.min(hard));
        format!("--{name}={allowed}")
    };
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--no-new-privs", "--", "prlimit", "--core=0"]);
    command.arg(limit("as", Resource::RLIMIT_AS, limits.memory));
    command.arg(limit("cpu", Resource::RLIMIT_CPU, limits.cpu.as_secs()));
    command.arg(limit("fsize", Resource::RLIMIT_FSIZE, limits.file_len));
    command.arg(limit("nofile", Resource::RLIMIT_NOFILE, limits.files));
    command.args(["--", tool]);
    let path = std::env::var_os("PATH").unwrap_or_else(|| PATH.into());
    command.env_clear().env("PATH", path).env("LC_ALL", "C");
    // Each arena of glibc reserves 64 MiB of address space, for each thread one.
    command.env("MALLOC_ARENA_MAX", "2");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.process_group(0).kill_on_drop(true);
    command
}

/// Reads to the end; `None` where that is too much. What is progress is not kept.
async fn read(
    mut from: impl AsyncRead + Unpin,
    mut progress: Option<&mut dyn FnMut(f64)>,
) -> io::Result<Option<Vec<u8>>> {
    let (mut kept, mut part) = (Vec::new(), vec![0; 4096]);
    loop {
        let len = from.read(&mut part).await?;
        let part = &part[..len];
        match &mut progress {
            _ if len == 0 => return Ok(Some(kept)),
            Some(progress) => percentage(part).into_iter().for_each(progress),
            None if kept.len() + len > OUTPUT_LEN_MAX => return Ok(None),
            None => kept.extend(part),
        }
    }
}

async fn read_words(mut from: impl AsyncRead + Unpin) -> io::Result<Vec<u8>> {
    let (mut kept, mut part) = (Vec::new(), vec![0; 4096]);
    loop {
        match from.read(&mut part).await? {
            0 => return Ok(kept),
            len => {
                let room = WORDS_LEN_MAX - kept.len();
                kept.extend(&part[..len.min(room)]);
            }
        }
    }
}

/// The last percentage in QEMU's words: `    (12.34/100%)\r`.
fn percentage(text: &[u8]) -> Option<f64> {
    let text = std::str::from_utf8(text).ok()?;
    let (before, _) = text.rsplit_once("/100%)")?;
    before.rsplit_once('(')?.1.parse().ok()
}

/// What a tool said, without its name.
fn words(tool: &str, stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let text = text.trim();
    let text = text.strip_prefix(tool).and_then(|text| text.strip_prefix(": ")).unwrap_or(text);
    text.chars().take(TOLD_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Limits = Limits { time: Duration::from_secs(20), ..Limits::LOOK };

    async fn shell(script: &str, limits: &Limits) -> Result<Output, ToolError> {
        run("sh", "try", &["-c", script], limits, None).await
    }

    #[tokio::test]
    async fn what_a_tool_says_comes_back_and_nothing_of_us_goes_to_it() {
        let output = shell("env | sort; echo sh: oh >&2; exit 3", &SHORT).await.unwrap();
        assert_eq!((output.code, output.words.as_str()), (3, "oh"));
        let variables = String::from_utf8(output.stdout).unwrap();
        let names: Vec<_> = variables.lines().filter_map(|l| Some(l.split_once('=')?.0)).collect();
        assert_eq!(names, ["LC_ALL", "MALLOC_ARENA_MAX", "PATH", "PWD"]);
        let missing = run("no-such-tool", "try", &["x"], &SHORT, None).await.unwrap();
        assert_ne!(missing.code, 0);
    }

    #[tokio::test]
    async fn s03_a_tool_is_held_by_its_limits() {
        let said = |limits: Limits, script: &'static str| async move {
            let output = shell(script, &limits).await.unwrap();
            (output.code, String::from_utf8(output.stdout).unwrap())
        };
        let small = Limits { memory: 100 << 20, files: 16, file_len: 4096, ..SHORT };
        let limits = said(small, "ulimit -v; ulimit -n; ulimit -f; ulimit -c; ulimit -t").await;
        assert_eq!(limits, (0, "102400\n16\n8\n0\n60\n".into()));

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file").to_string_lossy().into_owned();
        let wrote = run("sh", "try", &["-c", "yes > \"$0\"", &path], &small, None).await;
        assert!(matches!(wrote, Ok(Output { code: 1.., .. })), "{wrote:?}");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 4096);

        let busy = Limits { cpu: Duration::from_secs(1), ..SHORT };
        let busy = run("sh", "try", &["-c", "while :; do :; done"], &busy, None).await;
        assert!(matches!(busy, Err(ToolError::Killed { .. })), "{busy:?}");

        let loud = run("yes", "try", &["x"], &SHORT, None).await;
        assert!(matches!(loud, Err(ToolError::TooMuch { .. })), "{loud:?}");
    }

    #[tokio::test]
    async fn a_tool_that_takes_too_long_or_is_waited_for_no_more_is_ended() {
        let hasty = Limits { time: Duration::from_millis(300), ..SHORT };
        let slow = shell("sleep 60", &hasty).await;
        assert!(matches!(slow, Err(ToolError::TooLong { .. })), "{slow:?}");

        let mut process = command("sleep", &SHORT).arg("60").spawn().unwrap();
        let pid = process.id().unwrap();
        let stat = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let is_over = || stat().is_empty() || stat().contains(") Z ");
        drop(process.stdout.take());
        drop(process);

        for _ in 0..200 {
            if is_over() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("it still runs: {}", stat());
    }

    #[test]
    fn progress_is_read_from_what_qemu_prints() {
        assert_eq!(percentage(b"    (0.00/100%)\r    (12.34/100%)\r"), Some(12.34));
        assert_eq!(percentage(b"(100.00/100%)\n"), Some(100.0));
        for bad in [&b""[..], b"(1", b"/100%)", b"(x/100%)", b"\xff(1/100%)"] {
            assert_eq!(percentage(bad), None);
        }
    }
}
