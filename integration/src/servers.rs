//! Real database servers on loopback, each with a folder of its own, as a user without rights.

use std::fs::{self, File, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use vm_fixtures::Port;

/// How long a server may take to come up or go down on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(120);

/// What kind of server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// MariaDB.
    MariaDb,
    /// PostgreSQL.
    PostgreSql,
}

/// A server that runs; it ends with this.
#[derive(Debug)]
pub struct Server {
    kind: Kind,
    folder: TempDir,
    port: Port,
    process: Child,
}

impl Server {
    /// Makes one and starts it, if it is installed.
    pub fn start(kind: Kind) -> Self {
        let folder = folder();
        let data = folder.path().join("data");
        let mut make = match kind {
            Kind::MariaDb => {
                let mut make = Command::new("mariadb-install-db");
                make.args(["--no-defaults", "--auth-root-authentication-method=normal"]);
                make.args(["--skip-test-db", "--innodb-log-file-size=8M"]);
                make.arg(format!("--datadir={}", data.display()));
                if is_root() {
                    make.arg("--user=nobody");
                }
                make
            }
            Kind::PostgreSql => {
                let mut make = without_rights(postgres("initdb"));
                make.args(["--no-sync", "--auth=trust", "-U", "postgres", "-D"]).arg(&data);
                make
            }
        };
        // Two that are made at once get into each other's way in one.
        succeed(make.env("TMPDIR", folder.path()));
        Self::run(kind, folder)
    }

    /// Starts one on the data that another one left in a folder with the given files.
    pub fn on_data_of(kind: Kind, archive: &Path) -> Self {
        let folder = folder();
        let mut unpack = without_rights("tar".into());
        let archive = File::open(archive).expect("an archive");
        let unpacked = unpack.arg("-x").arg("-C").arg(folder.path()).stdin(archive).status();
        assert!(unpacked.is_ok_and(|status| status.success()), "it cannot be unpacked");
        for left in ["data/postmaster.pid", "socket"] {
            // As the server of another machine: that one does not run here.
            let _ = fs::remove_file(folder.path().join(left));
        }
        Self::run(kind, folder)
    }

    fn run(kind: Kind, folder: TempDir) -> Self {
        let (held, data) = (Port::take(), folder.path().join("data"));
        let port = held.number();
        let mut command = match kind {
            Kind::MariaDb => {
                let mut command = without_rights("mariadbd".into());
                command.args(["--no-defaults", "--bind-address=127.0.0.1", "--skip-name-resolve"]);
                command.args(["--innodb-buffer-pool-size=16M", "--innodb-log-file-size=8M"]);
                command.args(["--key-buffer-size=1M", "--performance-schema=off"]);
                command.arg(format!("--port={port}")).arg("--datadir").arg(&data);
                command.arg("--socket").arg(folder.path().join("socket"));
                command
            }
            Kind::PostgreSql => {
                let mut command = without_rights(postgres("postgres"));
                command.arg("-D").arg(&data).arg("-k").arg(folder.path());
                command.args(["-c", "listen_addresses=127.0.0.1", "-c", "log_checkpoints=on"]);
                command.args(["-c", "shared_buffers=4MB", "-p", &port.to_string()]);
                command
            }
        };
        let log = File::create(folder.path().join("log")).expect("a log");
        command.env("TMPDIR", folder.path());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let process = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let mut server = Self { kind, folder, port: held, process };
        let start = Instant::now();
        while !server.is_up() {
            let ended = server.process.try_wait().expect("a child of ours");
            assert!(ended.is_none() && start.elapsed() < TIMEOUT, "{}", server.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        server
    }

    fn is_up(&self) -> bool {
        self.client("SELECT 1").output().expect("a client").status.success()
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// Where its data is, in a folder `data`.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What it has written about itself.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// A client that says something as the server's owner, not started.
    pub fn client(&self, statements: &str) -> Command {
        let mut command = match self.kind {
            Kind::MariaDb => {
                let mut command = Command::new("mariadb");
                command.args(["--no-defaults", "-N", "-B", "-uroot", "--socket"]);
                command.arg(self.folder.path().join("socket")).args(["-e", statements]);
                command
            }
            Kind::PostgreSql => {
                let mut command = Command::new("psql");
                command.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-U", "postgres"]);
                command.arg("-h").arg(self.folder.path()).args(["-p", &self.port().to_string()]);
                command.args(["-d", "postgres", "-c", statements]);
                command
            }
        };
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Says something to it, which must succeed, and returns the answer.
    pub fn say(&self, statements: &str) -> String {
        let output = succeed(&mut self.client(statements));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Makes a table for numbered rows with so many of them.
    pub fn make_rows(&self, count: u64) {
        let statements = match self.kind {
            Kind::MariaDb => format!(
                "CREATE DATABASE d; CREATE TABLE d.t (n INT PRIMARY KEY, s CHAR(100));
                 INSERT INTO d.t SELECT seq, 'x' FROM seq_1_to_{count}"
            ),
            Kind::PostgreSql => format!(
                "CREATE TABLE t (n INT PRIMARY KEY, s TEXT);
                 INSERT INTO t SELECT n, 'x' FROM generate_series(1, {count}) AS n"
            ),
        };
        self.say(&statements);
    }

    /// Somebody who writes one row after the other to a MariaDB until that ends.
    pub fn write_rows(&self) -> Writer {
        self.say("CREATE DATABASE d; CREATE TABLE d.t (n INT PRIMARY KEY, s CHAR(100))");
        let procedure = "CREATE PROCEDURE d.w() BEGIN DECLARE i INT DEFAULT 0; LOOP SET i = i + 1; \
                         INSERT INTO d.t VALUES (i, REPEAT('x', 100)); END LOOP; END";
        succeed(self.client(procedure).arg("--delimiter=//"));
        let writer = Writer(self.client("CALL d.w()").spawn().expect("a client"));
        let start = Instant::now();
        while self.rows().0 == 0 {
            assert!(start.elapsed() < TIMEOUT, "nobody writes");
        }
        writer
    }

    /// How many rows were written, and the highest number.
    pub fn rows(&self) -> (u64, u64) {
        let table = if self.kind == Kind::MariaDb { "d.t" } else { "t" };
        let answer = self.say(&format!("SELECT count(*), coalesce(max(n), 0) FROM {table}"));
        let (count, max) = answer.split_once(['\t', '|']).expect("two numbers");
        (count.parse().expect("a number"), max.parse().expect("a number"))
    }

    /// Packs its data as it lies on the disk at this instant.
    pub fn pack(&self, archive: &Path) {
        let mut pack = Command::new("tar");
        pack.arg("-cf").arg(archive).arg("-C").arg(self.folder.path()).arg("data");
        // A file that grows while it is read is packed as it was; who writes meanwhile is the test's business.
        let output =
            pack.args(["--warning=no-file-changed", "--sparse"]).output().expect("tar runs");
        assert!(output.status.code().is_some_and(|code| code < 2), "{output:?}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // PostgreSQL's children end with it only when it is asked to end; at once, by this.
        let pid = i32::try_from(self.process.id()).expect("process ids are small");
        let asked = match self.kind {
            Kind::MariaDb => Signal::SIGKILL,
            Kind::PostgreSql => Signal::SIGQUIT,
        };
        // It may have ended by itself.
        let _ = kill(Pid::from_raw(pid), asked);
        let _ = self.process.wait();
    }
}

/// Somebody who writes rows.
#[derive(Debug)]
pub struct Writer(Child);

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A file with a password, for its owner alone.
pub fn password_file(folder: &Path, password: &str) -> PathBuf {
    let path = folder.join("database.password");
    let mut file = File::create(&path).expect("a new file");
    file.write_all(password.as_bytes()).expect("room for a password");
    fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("a file of ours");
    path
}

fn folder() -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::set_permissions(folder.path(), Permissions::from_mode(0o777)).expect("a folder of ours");
    folder
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Neither server runs as root, or outlives a test that is killed.
fn without_rights(program: PathBuf) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]);
    if is_root() {
        command.args(["--reuid=nobody", "--regid=nogroup", "--clear-groups"]);
    }
    command.arg("--").arg(program);
    command
}

/// Debian keeps the server's programs of each version apart.
fn postgres(program: &str) -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").expect("postgresql is installed").flatten();
    let newest = versions.map(|version| version.path()).max().expect("a version");
    newest.join("bin").join(program)
}

fn succeed(command: &mut Command) -> Output {
    let output = command.stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {output:?}");
    output
}
