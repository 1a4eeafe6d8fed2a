//! Servers on loopback that keep repositories: SFTP, S3 and REST, each a program that others use.

use std::ffi::OsString;
use std::fs::{self, File};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::port::Port;
use crate::process::Process;
use crate::recipe::cache_folder;
use crate::tools::{available, find, run};

/// How long a server may take to listen.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// The S3 server and what it is made of; a new version makes a new folder in the cache.
const MOTO: [&str; 3] = ["moto[s3]==5.2.5", "flask==3.1.3", "flask-cors==6.0.5"];

/// A server that keeps a repository. Dropping it ends it, and what it kept is gone.
#[derive(Debug)]
pub struct Server {
    process: Process,
    program: Vec<OsString>,
    folder: TempDir,
    port: Port,
    location: String,
    restic_location: String,
    environment: Vec<(&'static str, String)>,
    restic_arguments: Vec<String>,
}

/// What a REST server allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    /// Everything.
    Free,
    /// New files, but no removal but that of locks.
    AppendOnly,
}

/// The password of the REST server's user `keeper`.
pub const REST_PASSWORD: &str = "sesame-of-the-rest-server";
/// The secret of the S3 server's key.
pub const S3_SECRET: &str = "secret-of-the-s3-server";

impl Server {
    /// OpenSSH's server with a key of its own; `None` where it is missing, as [`available`] tells.
    ///
    /// # Panics
    /// When it does not start.
    pub fn sftp() -> Option<Self> {
        if !available("sshd", "openssh-server") || !available("ssh", "openssh-client") {
            return None;
        }
        let folder = TempDir::new().expect("a folder for the server");
        let at = |name: &str| folder.path().join(name).display().to_string();
        for key in ["host_key", "key"] {
            run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", &at(key)]);
        }
        fs::copy(at("key.pub"), at("authorized_keys")).expect("the folder is ours");
        let held = Port::take();
        let port = held.number();
        let sftp_server = ["/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server"];
        let sftp_server = sftp_server.into_iter().find(|path| Path::new(path).is_file());
        let sftp_server = sftp_server.expect("OpenSSH's server comes with one for SFTP");
        let config = format!(
            "ListenAddress 127.0.0.1\nPort {port}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\n\
             StrictModes no\nUsePAM no\nPasswordAuthentication no\nMaxStartups 100\n\
             Subsystem sftp {sftp_server}\n",
            at("host_key"),
            at("authorized_keys"),
        );
        fs::write(at("sshd_config"), config).expect("the folder is ours");
        let host_key = fs::read_to_string(at("host_key.pub")).expect("it was made");
        fs::write(at("known_hosts"), format!("[127.0.0.1]:{port} {host_key}")).expect("ours");
        let client = format!(
            "Host kept\n  HostName 127.0.0.1\n  Port {port}\n  IdentityFile {}\n  IdentitiesOnly yes\n  \
             UserKnownHostsFile {}\n  GlobalKnownHostsFile /dev/null\n",
            at("key"),
            at("known_hosts"),
        );
        fs::write(at("ssh_config"), client).expect("the folder is ours");
        // Run by root, it wants the folder that its service would make.
        if nix::unistd::geteuid().is_root() {
            fs::create_dir_all("/run/sshd").expect("root may make folders");
        }
        let sshd = find("sshd").expect("looked for above");
        let program = words([sshd.to_str().expect("text"), "-D", "-e", "-f", &at("sshd_config")]);
        let location = format!("sftp:kept:{}", at("repository"));
        let ssh = format!("ssh -F {}", at("ssh_config"));
        let restic_arguments = vec!["-o".to_owned(), format!("sftp.command={ssh} kept -s sftp")];
        let environment = vec![("KVMSNAP_SSH", ssh)];
        Some(Self::start(folder, held, program, &location, environment, restic_arguments))
    }

    /// `moto` with an empty bucket for each name that a test makes up; `None` where Python is missing.
    ///
    /// # Panics
    /// When it cannot be fetched or does not start.
    pub fn s3() -> Option<Self> {
        if !available("/usr/bin/python3", "python3") {
            return None;
        }
        let moto = moto().join("bin/moto_server");
        let port = Port::take();
        let number = port.number().to_string();
        let program = words([moto.to_str().expect("text"), "-H", "127.0.0.1", "-p", &number]);
        let environment = vec![
            ("AWS_ACCESS_KEY_ID", "key-of-the-s3-server".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", S3_SECRET.to_owned()),
        ];
        let folder = TempDir::new().expect("a folder for the server");
        let location = format!("s3:http://{}/bucket/a/prefix", port.address());
        Some(Self::start(folder, port, program, &location, environment, Vec::new()))
    }

    /// `rclone serve restic`; `None` where it is missing.
    ///
    /// # Panics
    /// When it does not start.
    pub fn rest(what: Rest) -> Option<Self> {
        if !available("rclone", "rclone") {
            return None;
        }
        let folder = TempDir::new().expect("a folder for the server");
        let port = Port::take();
        let address = port.address();
        let rclone = find("rclone").expect("looked for above");
        let [shown, kept] = [address.to_string(), folder.path().display().to_string()];
        let mut program = words([
            rclone.to_str().expect("text"),
            "serve",
            "restic",
            "--config",
            "",
            "--addr",
            &shown,
            "--user",
            "keeper",
            "--pass",
            REST_PASSWORD,
            &kept,
        ]);
        if what == Rest::AppendOnly {
            program.push("--append-only".into());
        }
        let environment = vec![("KVMSNAP_REST_PASSWORD", REST_PASSWORD.to_owned())];
        let location = format!("rest:http://keeper@{address}/a/repository/");
        let mut server = Self::start(folder, port, program, &location, environment, Vec::new());
        server.restic_location =
            format!("rest:http://keeper:{REST_PASSWORD}@{address}/a/repository/");
        Some(server)
    }

    fn start(
        folder: TempDir,
        port: Port,
        program: Vec<OsString>,
        location: &str,
        environment: Vec<(&'static str, String)>,
        restic_arguments: Vec<String>,
    ) -> Self {
        let process = start(folder.path(), &program);
        let location = location.to_owned();
        let restic_location = location.clone();
        let mut server = Self {
            process,
            program,
            folder,
            port,
            location,
            restic_location,
            environment,
            restic_arguments,
        };
        server.wait_until_it_listens();
        server
    }

    /// Where the repository is, as kvmsnap has it.
    pub fn location(&self) -> &str {
        &self.location
    }

    /// Where the repository is, as restic has it; may hold a password.
    pub fn restic_location(&self) -> &str {
        &self.restic_location
    }

    /// The variables that a client needs, kvmsnap's and restic's.
    pub fn environment(&self) -> &[(&'static str, String)] {
        &self.environment
    }

    /// What else restic needs.
    pub fn restic_arguments(&self) -> &[String] {
        &self.restic_arguments
    }

    /// The folder of the server's files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Has it stand still: connections are made, and nothing is answered.
    pub fn stop(&mut self) {
        self.signal_all(Signal::SIGSTOP);
    }

    /// Lets it go on.
    pub fn resume(&mut self) {
        self.signal_all(Signal::SIGCONT);
    }

    /// OpenSSH's server has processes for each connection, the youngest of which serves files.
    fn signal_all(&mut self, signal: Signal) {
        self.process.signal(signal);
        let mut parents = vec![self.process.id()];
        while let Some(parent) = parents.pop() {
            for child in children(parent) {
                // It may have ended by itself.
                let _ = kill(Pid::from_raw(child.cast_signed()), signal);
                parents.push(child);
            }
        }
    }

    /// Ends it. What it keeps on disk stays.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again at the same address.
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart(&mut self) {
        self.process.kill();
        self.process = start(self.folder.path(), &self.program);
        self.wait_until_it_listens();
    }

    fn wait_until_it_listens(&mut self) {
        let deadline = Instant::now() + START_TIMEOUT;
        while TcpStream::connect(self.port.address()).is_err() {
            let log = || fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            assert!(self.process.ended().is_none(), "{:?} ended: {}", self.program, log());
            assert!(Instant::now() < deadline, "{:?} does not listen: {}", self.program, log());
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // What stands still would not notice that its server is gone.
        self.resume();
    }
}

fn children(parent: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"));
    let text = text.unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn start(folder: &Path, program: &[OsString]) -> Process {
    let log = File::options().create(true).append(true).open(folder.join("log"));
    let log = log.expect("the folder is ours");
    let also = log.try_clone().expect("a descriptor");
    Process::start_program(program, Stdio::from(log), Stdio::from(also))
}

fn words<const N: usize>(words: [&str; N]) -> Vec<OsString> {
    words.map(OsString::from).into()
}

/// The folder of Python's packages for the S3 server, fetched once for each machine.
fn moto() -> PathBuf {
    let cache = cache_folder();
    let folder = cache.join(MOTO.join("-").replace(['[', ']', '='], ""));
    let lock = File::create(cache.join("moto.lock")).expect("the cache is writable");
    lock.lock().expect("the cache is on a file system with locks");
    // Programs in it name it, so it is made at its place; the mark tells that it is whole.
    if !folder.join("whole").exists() {
        let _ = fs::remove_dir_all(&folder);
        run("/usr/bin/python3", &["-m", "venv", folder.to_str().expect("text")]);
        let pip = folder.join("bin/pip");
        let args = [&["install", "--quiet", "--disable-pip-version-check"], &MOTO[..]].concat();
        run(pip.to_str().expect("text"), &args);
        File::create(folder.join("whole")).expect("the cache is writable");
    }
    folder
}
