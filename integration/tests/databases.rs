//! Real MariaDB and PostgreSQL servers around a point in time: what is on the disks then, and that no server
//! stays locked, whatever becomes of the run.
//!
//! The machine has no operating system: its agent, when it is told to freeze, puts the server's files on the disk
//! as they lie there at that instant.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use integration::faults::{assert_goes_on, assert_says, signal, wait_until, watchdog_of};
use integration::scripted_agent::ScriptedAgent;
use integration::servers::{Kind, Server, password_file};
use integration::{Host, Outcome, assert_guest_is_free, finish, spawn};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vm_fixtures::{Disk, Guest, MIB};

/// Neither in an argument list nor in any output.
const PASSWORD: &str = "canary-4711-salt";
/// What a lock may last, and what a busy machine may add to it.
const LOCK_MAX: Duration = Duration::from_secs(10);
const SLACK: Duration = Duration::from_secs(7);
/// Long enough for whatever a test waits for on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
const DISK_LEN: u64 = 192 * MIB;

type Deed = Box<dyn Fn() + Send>;

/// A machine whose disk gets a server's files in the moment of the freeze, and a host.
struct Scene {
    guest: Arc<Guest>,
    host: Host,
    agent: ScriptedAgent,
    /// What happens while the server is locked and the guest frozen.
    deed: Arc<Mutex<Option<Deed>>>,
}

impl Scene {
    fn new() -> Option<Self> {
        let guest = Arc::new(Guest::without_os().disk(Disk::new("vda", DISK_LEN)).boot()?);
        let host = Host::new();
        let deed: Arc<Mutex<Option<Deed>>> = Arc::default();
        let to_do = Arc::clone(&deed);
        let agent = ScriptedAgent::start(&host.folder().join("agent.sock"), move |command, _| {
            if command == "guest-fsfreeze-freeze"
                && let Some(deed) = &*to_do.lock().expect("no panic while locked")
            {
                deed();
            }
            Some(Ok(json!(1)))
        });
        Some(Self { guest, host, agent, deed })
    }

    fn meanwhile(&self, deed: impl Fn() + Send + 'static) {
        *self.deed.lock().expect("no panic while locked") = Some(Box::new(deed));
    }

    /// Has the server's files put on the disk in the moment of the freeze.
    fn put_on_disk(&self, server: &Arc<Server>) {
        let (guest, server) = (Arc::clone(&self.guest), Arc::clone(server));
        let archive = self.host.folder().join("data.tar");
        self.meanwhile(move || {
            server.pack(&archive);
            let len = fs::metadata(&archive).expect("it was just packed").len();
            assert!(len < DISK_LEN, "{len}");
            guest.qemu_io("vda", &format!("write -s {} 0 {len}", archive.display()));
        });
    }

    /// Configures the server with an account of this password.
    fn configure(&self, kind: &str, port: u16, password: &str, more: &str) {
        let file = password_file(self.host.folder(), password);
        let text = format!(
            "[[domain.web.database]]\nkind = \"{kind}\"\nhost = \"127.0.0.1\"\nport = {port}\n\
             user = \"kvmsnap\"\npassword-file = {file:?}\n{more}\n"
        );
        fs::write(self.host.config(), text).expect("a configuration");
    }

    fn command(&self) -> Command {
        let mut command = self.host.command(["-vv", "backup", "--json", "--name", "web", "--qmp"]);
        command.arg(self.guest.qmp()).arg("--qga").arg(self.agent.socket());
        command
    }

    fn backup(&self) -> Outcome {
        finish(spawn(self.command()))
    }

    fn made(&self) -> Value {
        let outcome = self.backup();
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        assert!(!outcome.stderr.contains(PASSWORD) && !outcome.stdout.contains(PASSWORD));
        serde_json::from_str(&outcome.stdout).expect("one JSON object")
    }

    /// A server on what the snapshot has on its disk.
    fn restored(&self, kind: Kind) -> Server {
        let folder = self.host.restore("latest:web");
        Server::on_data_of(kind, &folder.join("vda.raw"))
    }

    fn assert_all_is_over(&self) {
        assert_goes_on(&self.guest);
        assert_guest_is_free(&self.guest, &["vda"]);
        self.host.assert_nothing_left();
    }
}

/// A server with an account that has these rights.
fn mariadb(rights: &str) -> Arc<Server> {
    let server = Server::start(Kind::MariaDb);
    server.say(&format!("CREATE USER kvmsnap@'127.0.0.1' IDENTIFIED BY '{PASSWORD}'"));
    server.say(&format!("GRANT {rights} ON *.* TO kvmsnap@'127.0.0.1'"));
    Arc::new(server)
}

/// The server takes writes again before the limit.
fn assert_takes_writes(case: &str, server: &Server, since: Instant, limit: Duration) {
    let before = server.rows().1;
    wait_until(limit + SLACK, &format!("{case}: writes again"), || server.rows().1 > before);
    assert!(since.elapsed() < limit + SLACK, "{case}: after {:?}", since.elapsed());
}

#[test]
fn p2_a_mariadb_starts_without_recovery_where_the_level_says_application() {
    let Some(scene) = Scene::new() else { return };
    let server = mariadb("RELOAD, SUPER");
    let _writer = server.write_rows();
    scene.put_on_disk(&server);
    scene.configure("mariadb", server.port(), PASSWORD, "required = true\ntimeout = \"30s\"");

    // What it does by itself in that moment is not ours to choose; what the level says of it is.
    let reached = (0..15).any(|_| {
        let made = scene.made();
        let is_clean = made["applications"][0]["state"] == "clean";
        let level = if is_clean { "application" } else { "filesystem" };
        assert_eq!(made["consistency"], level, "{made}");
        is_clean
    });

    assert!(reached, "each time it wrote by itself in the moment of the point in time");
    assert_takes_writes("afterwards", &server, Instant::now(), Duration::ZERO);
    let restored = scene.restored(Kind::MariaDb);
    let (count, max) = restored.rows();
    assert!(count == max && count > 0, "{count} rows up to {max}");
    assert!(server.rows().1 > max);
    let log = restored.log();
    for recovers in ["Starting crash recovery", "Aria engine: starting recovery"] {
        assert!(!log.contains(recovers), "{log}");
    }
    scene.assert_all_is_over();
}

#[test]
fn nobody_is_held_while_servers_write_out_what_came_while_hooks_ran() {
    let Some(scene) = Scene::new() else { return };
    let server = mariadb("RELOAD, SUPER");
    let (said, socket) = (server.folder().join("said"), server.folder().join("socket"));
    server.say(&format!("SET GLOBAL general_log_file = {said:?}, general_log = ON"));
    // Two of them, told apart by their sessions.
    let file = password_file(scene.host.folder(), PASSWORD);
    let port = server.port();
    let more = format!(
        "required = true\ntimeout = \"30s\"\n[[domain.web.database]]\nkind = \"mariadb\"\n\
         host = \"127.0.0.1\"\nport = {port}\nuser = \"kvmsnap\"\npassword-file = {file:?}\n\
         required = true\ntimeout = \"30s\"\n[[domain.web.hook]]\nat = \"freeze\"\nrequired = true\n\
         command = [\"mariadb\", \"--no-defaults\", \"-uroot\", \"--socket\", {socket:?}, \"-e\", \
         \"CREATE DATABASE late\"]"
    );
    scene.configure("mariadb", port, PASSWORD, &more);

    scene.made();

    let said = fs::read_to_string(said).expect("a log");
    let said: Vec<(&str, &str)> = said
        .lines()
        .filter_map(|line| line.split_once(" Query\t"))
        .map(|(begin, what)| (begin.split_whitespace().last().unwrap_or_default(), what))
        .collect();
    let place = |from: usize, wanted: &str| {
        let at = said[from..].iter().position(|(_, what)| what.contains(wanted));
        from + at.unwrap_or_else(|| panic!("nobody said {wanted}: {said:?}"))
    };
    let hook = place(0, "CREATE DATABASE late");
    let lock = place(hook, "WITH READ LOCK");
    let another = place(lock + 1, "WITH READ LOCK");
    let writes = |(_, what): &&(&str, &str)| what.contains("checkpoint");
    let between: HashSet<&str> = said[hook..lock].iter().filter(writes).map(|it| it.0).collect();
    assert_eq!(between.len(), 2, "each writes out before the first lock: {said:?}");
    let mut held = said[lock..another].iter().filter(writes);
    assert!(held.all(|it| it.0 == said[lock].0), "it waits for another: {said:?}");
    scene.assert_all_is_over();
}

#[test]
fn a_mariadb_account_that_may_only_lock_makes_no_application_of_it() {
    let Some(scene) = Scene::new() else { return };
    let server = mariadb("RELOAD");
    let _writer = server.write_rows();
    scene.put_on_disk(&server);
    scene.configure("mariadb", server.port(), PASSWORD, "required = true\ntimeout = \"30s\"");

    let made = scene.made();

    assert_eq!(made["consistency"], "filesystem", "{made}");
    assert_eq!(made["applications"][0]["state"], "flushed", "{made}");
    assert_eq!(made["warnings"], json!([]), "{made}");
    let restored = scene.restored(Kind::MariaDb);
    let (count, max) = restored.rows();
    assert!(count == max && count > 0, "{count} rows up to {max}");
    assert!(restored.log().contains("Starting crash recovery"), "{}", restored.log());
    scene.assert_all_is_over();
}

#[test]
fn a_server_is_let_go_once_its_guest_is_paused_to_be_read() {
    let Some(scene) = Scene::new() else { return };
    let server = mariadb("RELOAD");
    let _writer = server.write_rows();
    // The disk takes longer to read than a lock may last.
    scene.guest.qemu_io("vda", "write -P 7 0 24M");
    scene.configure("mariadb", server.port(), PASSWORD, "timeout = \"4s\"\nrequired = true");
    let mut command = scene.command();
    command.args(["--method", "suspend", "--limit-read", "3MiB"]);
    let running = spawn(command);
    wait_until(PATIENCE, "paused", || scene.guest.status() == "paused");

    assert_takes_writes(
        "while the guest is paused",
        &server,
        Instant::now(),
        Duration::from_secs(1),
    );

    assert_eq!(scene.guest.status(), "paused");
    let outcome = finish(running);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let made: Value = serde_json::from_str(&outcome.stdout).expect("one JSON object");
    assert_eq!(made["applications"][0]["state"], "flushed", "{made}");
    scene.assert_all_is_over();
}

#[test]
fn r15_no_server_stays_locked_whoever_dies_or_hangs_meanwhile() {
    let Some(scene) = Scene::new() else { return };
    let server = mariadb("RELOAD");
    let _writer = server.write_rows();
    scene.configure("mariadb", server.port(), PASSWORD, "");
    // Who, what becomes of it, and how long the lock may last then.
    let at_once = Duration::from_secs(2);
    let cases = [
        ("the run is killed", false, Signal::SIGKILL, at_once),
        ("the run hangs", false, Signal::SIGSTOP, LOCK_MAX),
        ("the watchdog is killed", true, Signal::SIGKILL, at_once),
        ("the watchdog hangs", true, Signal::SIGSTOP, LOCK_MAX + Duration::from_secs(1)),
    ];
    for (case, is_watchdog, what, limit) in cases {
        let hit: Arc<Mutex<Option<(u32, u32, Instant)>>> = Arc::default();
        let run: Arc<Mutex<Option<u32>>> = Arc::default();
        let (to_hit, pid, watched) = (Arc::clone(&hit), Arc::clone(&run), Arc::clone(&server));
        scene.meanwhile(move || {
            let (rows, start) = (watched.rows(), Instant::now());
            while start.elapsed() < Duration::from_millis(300) {
                assert_eq!(watched.rows(), rows, "somebody wrote to a locked server");
            }
            let pid = pid.lock().expect("no panic while locked").expect("it was started");
            let watchdog = watchdog_of(pid);
            let victim = if is_watchdog { watchdog } else { pid };
            signal(victim, what);
            *to_hit.lock().expect("no panic while locked") =
                Some((victim, watchdog, Instant::now()));
        });
        let mut held = run.lock().expect("no panic while locked");
        let running = spawn(scene.command());
        *held = Some(running.pid());
        drop(held);
        let is_hit = || hit.lock().expect("no panic while locked").is_some();
        wait_until(PATIENCE, &format!("{case}: frozen"), is_hit);
        let (victim, watchdog, since) =
            hit.lock().expect("no panic while locked").expect("it was just hit");

        assert_takes_writes(case, &server, since, limit);

        if what == Signal::SIGSTOP {
            signal(victim, Signal::SIGCONT);
        }
        let outcome = finish(running);
        if what == Signal::SIGSTOP || is_watchdog {
            assert_eq!(outcome.code, Some(0), "{case}: {outcome:?}");
            assert!(outcome.stdout.contains("not application-consistent"), "{case}: {outcome:?}");
        }
        let is_gone = || !PathBuf::from(format!("/proc/{watchdog}")).exists();
        wait_until(PATIENCE, &format!("{case}: its watchdog ends"), is_gone);
        scene.deed.lock().expect("no panic while locked").take();
        let made = scene.made();
        assert_eq!(made["applications"][0]["state"], "flushed", "{case}: {made}");
        scene.assert_all_is_over();
    }
}

#[test]
fn a_server_that_does_not_hold_still_is_a_warning_or_the_end_as_configured() {
    let Some(scene) = Scene::new() else { return };
    let server = mariadb("RELOAD");
    server.say("CREATE DATABASE d; CREATE TABLE d.t (n INT)");
    let postgres = Server::start(Kind::PostgreSql);
    postgres.say(&format!("CREATE USER kvmsnap PASSWORD '{PASSWORD}'"));
    // A statement that runs keeps the lock waiting.
    let mut busy = server.client("LOCK TABLES d.t WRITE; SELECT SLEEP(600)").spawn().unwrap();
    wait_until(PATIENCE, "the table is locked", || {
        server.say("SHOW OPEN TABLES FROM d WHERE In_use > 0").contains('t')
    });
    let cases = [
        ("lock refused", "mariadb", server.port(), PASSWORD, "Lock wait timeout exceeded"),
        ("wrong password", "mariadb", server.port(), "canary-wrong", "Access denied"),
        ("down", "mariadb", 1, PASSWORD, "Connection refused"),
        ("another server", "mariadb", postgres.port(), PASSWORD, "did not answer within"),
        ("no rights", "postgresql", postgres.port(), PASSWORD, "pg_checkpoint"),
        ("down", "postgresql", 1, PASSWORD, "Connection refused"),
    ];
    for (case, kind, port, password, why) in cases {
        scene.configure(kind, port, password, "timeout = \"3s\"");
        let made = scene.made();
        assert_eq!(made["consistency"], "filesystem", "{case}: {made}");
        assert_eq!(made["applications"][0]["state"], "failed", "{case}: {made}");
        let warnings = made["warnings"].to_string();
        assert!(warnings.contains("not application-consistent"), "{case}: {made}");
        assert!(warnings.contains(why) && !warnings.contains("canary"), "{case}: {made}");

        scene.configure(kind, port, password, "timeout = \"3s\"\nrequired = true");
        let outcome = scene.backup();
        assert_says(&outcome, 1, why);
        assert!(!outcome.stderr.contains("canary"), "{case}: {outcome:?}");
        scene.assert_all_is_over();
    }
    // Who waited behind our lock goes on; who kept us waiting was not disturbed.
    assert!(busy.try_wait().expect("a child of ours").is_none());
    let _ = busy.kill();
    let _ = busy.wait();
    server.say("INSERT INTO d.t VALUES (1)");
}

#[test]
fn a_lock_ends_at_its_deadline_also_when_the_guest_takes_its_time_to_freeze() {
    let Some(scene) = Scene::new() else { return };
    let server = mariadb("RELOAD");
    let _writer = server.write_rows();
    scene.configure("mariadb", server.port(), PASSWORD, "timeout = \"2s\"");
    let seen = Arc::clone(&server);
    let since: Arc<Mutex<Option<Instant>>> = Arc::default();
    let start = Arc::clone(&since);
    scene.meanwhile(move || {
        *start.lock().expect("no panic while locked") = Some(Instant::now());
        assert_takes_writes("a slow freeze", &seen, Instant::now(), Duration::from_secs(2));
    });

    let made = scene.made();

    assert!(since.lock().expect("no panic while locked").is_some());
    assert_eq!(made["consistency"], "filesystem", "{made}");
    assert!(made["warnings"].to_string().contains("let go after 2 s, before"), "{made}");
    scene.configure("mariadb", server.port(), PASSWORD, "timeout = \"2s\"\nrequired = true");
    assert_says(&scene.backup(), 1, "before the point in time");
    scene.assert_all_is_over();
}

#[test]
fn a_postgresql_loses_nothing_that_was_committed() {
    let Some(scene) = Scene::new() else { return };
    let server = Arc::new(Server::start(Kind::PostgreSql));
    server.say(&format!("CREATE USER kvmsnap PASSWORD '{PASSWORD}'"));
    server.say("GRANT pg_checkpoint TO kvmsnap");
    // Nobody writes in the moment that stands for an instant: nothing holds this server still.
    server.make_rows(5000);
    scene.put_on_disk(&server);
    scene.configure("postgresql", server.port(), PASSWORD, "required = true");

    let made = scene.made();

    assert_eq!(made["consistency"], "filesystem", "{made}");
    assert_eq!(made["applications"][0]["state"], "flushed", "{made}");
    let restored = scene.restored(Kind::PostgreSql);
    assert_eq!(restored.rows(), (5000, 5000));
    // It always recovers; with a checkpoint just before there is next to nothing to replay.
    let log = restored.log();
    assert!(log.contains("automatic recovery in progress"), "{log}");
    assert!(log.contains("redo done") || log.contains("redo is not required"), "{log}");
    scene.assert_all_is_over();
}

#[test]
fn s09_the_password_of_a_database_appears_nowhere() {
    let Some(scene) = Scene::new() else { return };
    let server = mariadb("RELOAD");
    scene.configure("mariadb", server.port(), PASSWORD, "");
    let state = scene.host.state();
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let found = Arc::clone(&seen);
    scene.meanwhile(move || {
        let mut looked = Vec::new();
        for process in fs::read_dir("/proc").expect("proc").flatten().map(|entry| entry.path()) {
            let is_ours =
                fs::read_link(process.join("exe")).is_ok_and(|exe| exe.ends_with("kvmsnap"));
            for file in ["cmdline", "environ"].iter().filter(|_| is_ours) {
                looked.extend(fs::read(process.join(file)));
            }
        }
        for record in fs::read_dir(state.join("journal")).expect("a journal").flatten() {
            looked.extend(fs::read(record.path()));
        }
        assert!(looked.len() > 4, "run, guard and watchdog were to be looked at");
        let text = looked.iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        found.lock().expect("no panic while locked").extend(text);
    });

    let made = scene.made();

    let seen = seen.lock().expect("no panic while locked");
    assert!(!seen.is_empty() && seen.iter().all(|text| !text.contains(PASSWORD)));
    assert!(!made.to_string().contains(PASSWORD));
    let id = made["id"].as_str().expect("an id");
    let manifest = scene.host.restic(&["dump", id, "/web.manifest.json"]);
    assert!(!String::from_utf8_lossy(&manifest).contains(PASSWORD));
    scene.assert_all_is_over();
}
