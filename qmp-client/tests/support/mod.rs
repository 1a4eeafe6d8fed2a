//! Real QEMU processes for the tests, and peers that follow a script.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::{
    env,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use qmp_client::{Options, Qga, Qmp};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{
        UnixListener,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

pub(crate) const SYSTEM: &str = "qemu-system-x86_64";
pub(crate) const STORAGE: &str = "qemu-storage-daemon";
/// A deadline that is to pass, and that what comes before is to keep on a busy machine.
pub(crate) const SOON: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) fn options() -> Options {
    Options { timeout: PATIENCE, ..Options::default() }
}

pub(crate) fn impatient() -> Options {
    Options { timeout: SOON, ..Options::default() }
}

/// A QEMU of this test, killed when dropped.
pub(crate) struct Qemu {
    child: Child,
    folder: TempDir,
}

impl Qemu {
    /// A machine without guest. `None`, said aloud, where there is no QEMU.
    pub(crate) fn machine(more: &[&str]) -> Option<Self> {
        let fixed = "-machine q35 -nodefaults -display none -qmp unix:qmp.sock,server=on,wait=off";
        Self::start(SYSTEM, fixed, more)
    }

    pub(crate) fn storage_daemon() -> Option<Self> {
        let fixed = "--chardev socket,id=c,path=qmp.sock,server=on,wait=off --monitor chardev=c";
        Self::start(STORAGE, fixed, &[])
    }

    fn start(program: &str, fixed: &str, more: &[&str]) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qmp.sock");
        let fixed = fixed.replace("qmp.sock", socket.to_str().unwrap());
        let mut command = Command::new(program);
        command.args(fixed.split(' ')).args(more).current_dir(folder.path());
        let child = match command.stdin(Stdio::null()).spawn() {
            Ok(child) => child,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return skip(program),
            Err(e) => panic!("{program}: {e}"),
        };
        let qemu = Self { child, folder };
        let begun = Instant::now();
        while !is_listening(&socket) {
            assert!(begun.elapsed() < PATIENCE, "{program} does not start");
            thread::sleep(Duration::from_millis(10));
        }
        Some(qemu)
    }

    pub(crate) fn socket(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) async fn connect(&self) -> Qmp {
        Qmp::connect(&self.socket("qmp.sock"), options()).await.unwrap()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may be dead already, as the test wanted
        let _ = self.child.wait();
    }
}

/// Whether connections to a socket are taken: between `bind` and `listen` its file is there already.
fn is_listening(socket: &Path) -> bool {
    // `unix(7)` and the kernel's `__SO_ACCEPTCON`: the fourth column has this bit in hexadecimal.
    const ACCEPTS: u32 = 1 << 16;
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    let mut lines = sockets.lines().filter(|line| line.ends_with(socket.to_str().unwrap()));
    lines.any(|line| {
        let flags = line.split_ascii_whitespace().nth(3);
        flags.is_some_and(|flags| u32::from_str_radix(flags, 16).unwrap() & ACCEPTS != 0)
    })
}

fn skip<T>(program: &str) -> Option<T> {
    let required = env::var_os("KVMSNAP_REQUIRE_QEMU").is_some_and(|value| value == "1");
    assert!(!required, "`{program}` is missing");
    let thread = thread::current();
    let test = thread.name().unwrap_or("a test");
    // Past the harness's capture: a skipped test must not look like one that passed.
    let _ = std::io::stderr().write_all(format!("SKIPPED {test}: no `{program}`\n").as_bytes());
    None
}

/// A socket that a test serves by hand.
pub(crate) struct Stage {
    _folder: TempDir,
    socket: PathBuf,
    listener: UnixListener,
}

impl Stage {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        Self { _folder: folder, socket, listener }
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) async fn accept(&self) -> Peer {
        let (stream, _) = self.listener.accept().await.unwrap();
        let (input, output) = stream.into_split();
        Peer { input: BufReader::new(input), output }
    }

    /// A client whose monitor the test plays. Offers out-of-band execution if `oob`.
    pub(crate) async fn monitor(&self, options: Options, oob: bool) -> (Qmp, Peer) {
        let serve = async {
            let mut peer = self.accept().await;
            let capabilities = if oob { json!(["oob"]) } else { json!([]) };
            let version = json!({"qemu": {"major": 99, "minor": 1, "micro": 0}, "package": ""});
            peer.say(&json!({"QMP": {"version": version, "capabilities": capabilities}})).await;
            let asked = peer.hear().await;
            assert_eq!(asked["execute"], "qmp_capabilities");
            assert_eq!(asked["arguments"] == json!({"enable": ["oob"]}), oob);
            peer.say(&json!({"return": {}, "id": asked["id"]})).await;
            peer
        };
        let (qmp, peer) = tokio::join!(Qmp::connect(&self.socket, options), serve);
        (qmp.unwrap(), peer)
    }

    /// A client whose guest agent the test plays.
    pub(crate) async fn agent(&self) -> (Qga, Peer) {
        let serve = async {
            let mut peer = self.accept().await;
            peer.answer_sync().await;
            peer
        };
        let (qga, peer) = tokio::join!(Qga::connect(&self.socket, options()), serve);
        (qga.unwrap(), peer)
    }
}

/// The scripted side of a connection.
pub(crate) struct Peer {
    input: BufReader<OwnedReadHalf>,
    output: OwnedWriteHalf,
}

impl Peer {
    pub(crate) async fn say(&mut self, message: &Value) {
        self.say_bytes(format!("{message}\r\n").as_bytes()).await;
    }

    /// The client may have left: a script goes on then.
    pub(crate) async fn say_bytes(&mut self, bytes: &[u8]) {
        let _ = self.output.write_all(bytes).await;
    }

    pub(crate) async fn hear_bytes(&mut self) -> Vec<u8> {
        self.hear_until(b'\n').await
    }

    /// What comes up to this byte; nothing of what follows.
    pub(crate) async fn hear_until(&mut self, last: u8) -> Vec<u8> {
        let mut bytes = Vec::new();
        let heard = tokio::time::timeout(PATIENCE, self.input.read_until(last, &mut bytes)).await;
        heard.expect("the client says nothing").unwrap();
        bytes
    }

    /// The next message of the client, without a sentinel before it.
    pub(crate) async fn hear(&mut self) -> Value {
        let line = self.hear_bytes().await;
        serde_json::from_slice(line.strip_prefix(b"\xff").unwrap_or(&line)).unwrap()
    }

    /// Whether the client says nothing for a while.
    pub(crate) async fn hears_nothing(&mut self) -> bool {
        tokio::time::timeout(SOON, self.input.fill_buf()).await.is_err()
    }

    pub(crate) async fn hear_sync(&mut self) -> Value {
        let line = self.hear_bytes().await;
        assert_eq!(line.first(), Some(&0xff), "a synchronisation begins with the sentinel");
        let request: Value = serde_json::from_slice(&line[1..]).unwrap();
        assert_eq!(request["execute"], "guest-sync-delimited");
        request["arguments"]["id"].clone()
    }

    pub(crate) async fn say_sync(&mut self, id: &Value) {
        self.say_bytes(b"\xff").await;
        self.say(&json!({ "return": id })).await;
    }

    pub(crate) async fn answer_sync(&mut self) {
        let id = self.hear_sync().await;
        self.say_sync(&id).await;
    }
}
