//! R15: guest agents that hang, lie, babble or go away, and what kvmsnap's death means for a guest that
//! is frozen.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use integration::faults::{
    STILL_MAX, assert_goes_on, assert_says, children, signal, wait_until, watchdog_of,
};
use integration::{Host, Outcome, assert_guest_is_free, finish, spawn};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vm_fixtures::{Disk, FileSystem, Guest, MIB};

/// Held by tests that measure how long a guest stood still, and by the one that needs the whole machine.
static MACHINE: Mutex<()> = Mutex::new(());
/// The watchdog's deadline, and what a busy machine may add to it.
const DEADLINE: Duration = Duration::from_secs(10);
const SLACK: Duration = Duration::from_secs(5);
/// Long enough for whatever a test waits for on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
const FREEZE: &str = "guest-fsfreeze-freeze";
const THAW: &str = "guest-fsfreeze-thaw";

// ---- a scripted agent ---------------------------------------------------------------------------

/// What a scripted agent does with a command.
#[derive(Debug, Clone)]
enum Answer {
    /// The number of file systems, at once.
    Good,
    /// The same, after a while.
    Late(Duration),
    /// Nothing.
    Silence,
    /// These bytes.
    Raw(Vec<u8>),
    /// These bytes, and the end of the connection.
    RawThenEnd(Vec<u8>),
}

/// A script: what comes of synchronisation, freeze, and thaw, the latter from the first attempt on.
#[derive(Debug, Clone)]
struct Script {
    name: &'static str,
    sync: Answer,
    freeze: Answer,
    thaws: Vec<Answer>,
    /// Whether the backup ends up consistent all the same.
    consistent: bool,
}

/// A guest agent on a socket. Its threads end with the test's process.
struct ScriptedAgent {
    socket: PathBuf,
    heard: Arc<Mutex<Vec<(String, Instant)>>>,
}

impl ScriptedAgent {
    fn start(socket: &Path, script: &Script) -> Self {
        let listener = UnixListener::bind(socket).expect("a new socket");
        let heard: Arc<Mutex<Vec<(String, Instant)>>> = Arc::default();
        let (log, script) = (Arc::clone(&heard), script.clone());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, script) = (Arc::clone(&log), script.clone());
                thread::spawn(move || converse(stream, &script, &log));
            }
        });
        Self { socket: socket.to_owned(), heard }
    }

    fn heard(&self, command: &str) -> Vec<Instant> {
        let heard = self.heard.lock().expect("no panic while locked");
        heard.iter().filter(|(name, _)| name == command).map(|(_, at)| *at).collect()
    }

    /// Every freeze is followed by a thaw within the deadline, also after the run's own end, and the
    /// watchdog goes on until one of so many attempts is answered.
    fn assert_thawed(&self, case: &str, thaws: usize) {
        for freeze in self.heard(FREEZE) {
            let all = || self.heard(THAW).len() >= thaws;
            wait_until(PATIENCE, &format!("{case}: {thaws} attempts to thaw"), all);
            let thaw = || self.heard(THAW).into_iter().find(|thaw| *thaw > freeze);
            wait_until(PATIENCE, &format!("{case}: asked to thaw"), || thaw().is_some());
            let thaw = thaw().expect("it was just heard");
            assert!(thaw - freeze < DEADLINE + SLACK, "{case}: thawed after {:?}", thaw - freeze);
        }
    }
}

fn converse(mut stream: UnixStream, script: &Script, heard: &Mutex<Vec<(String, Instant)>>) {
    let reader = BufReader::new(stream.try_clone().expect("descriptors are free"));
    for line in reader.split(b'\n').map_while(Result::ok) {
        let start = line.iter().position(|byte| *byte == b'{').unwrap_or(line.len());
        let Ok(request) = serde_json::from_slice::<Value>(&line[start..]) else { continue };
        let command = request["execute"].as_str().unwrap_or_default().to_owned();
        let thaws = {
            let mut heard = heard.lock().expect("no panic while locked");
            heard.push((command.clone(), Instant::now()));
            heard.iter().filter(|(name, _)| name == THAW).count()
        };
        let (answer, good) = match command.as_str() {
            FREEZE => (&script.freeze, b"{\"return\": 1}\n".to_vec()),
            THAW => {
                let last = script.thaws.len() - 1;
                (&script.thaws[(thaws - 1).min(last)], b"{\"return\": 1}\n".to_vec())
            }
            _ => {
                let mut sync = b"\xff".to_vec();
                sync.extend(format!("{}\n", json!({"return": request["arguments"]["id"]})).bytes());
                (&script.sync, sync)
            }
        };
        let sent = match answer {
            Answer::Good => stream.write_all(&good),
            Answer::Late(after) => {
                thread::sleep(*after);
                stream.write_all(&good)
            }
            Answer::Silence => Ok(()),
            Answer::Raw(bytes) => stream.write_all(bytes),
            Answer::RawThenEnd(bytes) => {
                // The client may have gone already.
                let _ = stream.write_all(bytes);
                return;
            }
        };
        if sent.is_err() {
            return;
        }
    }
}

fn scripts() -> Vec<Script> {
    let good = |name| Script {
        name,
        sync: Answer::Good,
        freeze: Answer::Good,
        thaws: vec![Answer::Good],
        consistent: true,
    };
    let bad_freeze = |name, freeze| Script { freeze, consistent: false, ..good(name) };
    let raw = |text: &str| Answer::Raw(text.as_bytes().to_vec());
    let refusal =
        "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no \\u001b[2J\\n way\"}}\n";
    let deep = format!("{{\"return\": {}1{}}}\n", "[".repeat(100_000), "]".repeat(100_000));
    vec![
        good("well behaved"),
        Script { freeze: Answer::Late(Duration::from_secs(2)), ..good("slow to freeze") },
        Script { thaws: vec![Answer::Late(Duration::from_secs(2))], ..good("slow to thaw") },
        Script { sync: Answer::Silence, consistent: false, ..good("silent from the start") },
        Script { sync: raw("\u{fffd}\0\n{]\n"), consistent: false, ..good("garbage at once") },
        Script {
            sync: Answer::RawThenEnd(Vec::new()),
            consistent: false,
            ..good("hangs up at once")
        },
        bad_freeze("hangs in the freeze", Answer::Silence),
        bad_freeze("freezes after the deadline", Answer::Late(DEADLINE + SLACK)),
        bad_freeze("refuses to freeze", raw(refusal)),
        bad_freeze("half an answer", raw("{\"return\": 1")),
        bad_freeze("half an answer and gone", Answer::RawThenEnd(b"{\"retu".to_vec())),
        bad_freeze("endless answer", Answer::Raw(vec![b'x'; 64 << 20])),
        bad_freeze("deep answer", Answer::Raw(deep.into_bytes())),
        // The second attempt finds the guest still frozen: it was, at the point in time.
        Script { thaws: vec![Answer::Silence, Answer::Good], ..good("hangs in the first thaw") },
        Script {
            thaws: vec![Answer::RawThenEnd(b"\xff\xfe{\n".to_vec()), Answer::Good],
            ..good("garbage to the first thaw")
        },
        Script {
            thaws: vec![Answer::Silence, Answer::Silence, Answer::Silence, Answer::Good],
            consistent: false,
            ..good("hangs in each thaw beyond the deadline")
        },
        Script {
            thaws: vec![raw("{\"return\": 0}\n")],
            consistent: false,
            ..good("had thawed by itself")
        },
    ]
}

/// Backs up with the agent at a socket.
fn backup(host: &Host, guest: &Guest, agent: &Path, more: &[&str]) -> Command {
    let mut command = host.command(["backup", "--json", "--qmp"]);
    command.arg(guest.qmp()).arg("--qga").arg(agent).args(more);
    command
}

fn snapshot(case: &str, outcome: &Outcome) -> Value {
    assert_eq!(outcome.code, Some(0), "{case}: {outcome:?}");
    serde_json::from_str(&outcome.stdout).expect("one JSON object")
}

#[test]
fn r15_whatever_the_agent_does_the_backup_goes_on_and_the_guest_is_let_go() {
    let _alone = MACHINE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if !vm_fixtures::qemu_available() {
        return;
    }
    thread::scope(|scope| {
        for script in scripts() {
            scope.spawn(move || survives(&script));
        }
    });
}

fn survives(script: &Script) {
    let case = script.name;
    // Two disks, so that there is a pause beside the freeze.
    let plan = Guest::without_os().disk(Disk::new("vda", MIB)).disk(Disk::new("vdb", MIB));
    let guest = plan.boot().expect("QEMU is there");
    let host = Host::new();
    let agent = ScriptedAgent::start(&host.folder().join("agent.sock"), script);

    let outcome = finish(spawn(backup(&host, &guest, &agent.socket, &[])));

    let made = snapshot(case, &outcome);
    assert!(outcome.took < 3 * (DEADLINE + SLACK), "{case}: {outcome:?}");
    assert_goes_on(&guest);
    host.assert_all_clean(&guest, &["vda", "vdb"]);
    agent.assert_thawed(case, script.thaws.len());
    let warnings = made["warnings"].as_array().map_or(0, Vec::len);
    if script.consistent {
        assert_eq!((&made["consistency"], warnings), (&json!("filesystem"), 0), "{case}: {made}");
        return;
    }
    assert_eq!((&made["consistency"], warnings), (&json!("crash"), 1), "{case}: {made}");
    assert!(!outcome.stdout.contains('\u{1b}') && !outcome.stderr.contains('\u{1b}'), "{case}");

    // A new agent of the same kind: the first one has used up its script.
    let agent = ScriptedAgent::start(&host.folder().join("agent-2.sock"), script);
    let more = ["--quiesce", "require"];
    let outcome = finish(spawn(backup(&host, &guest, &agent.socket, &more)));
    assert_says(&outcome, 1, "could not be frozen");
    assert!(!outcome.stderr.contains('\u{1b}'), "{case}: {outcome:?}");
    assert_goes_on(&guest);
    assert_guest_is_free(&guest, &["vda", "vdb"]);
    host.assert_nothing_left();
    agent.assert_thawed(case, script.thaws.len());
    assert_eq!(host.list().len(), 1, "{case}");
}

#[test]
fn r15_r30_an_agent_socket_without_an_agent_is_a_warning() {
    let Some(guest) = Guest::without_os().disk(Disk::new("vda", MIB)).boot() else { return };
    let host = Host::new();
    let nobody = host.folder().join("nobody.sock");
    // Listens, and never accepts.
    let deaf = host.folder().join("deaf.sock");
    let _listener = UnixListener::bind(&deaf).expect("a new socket");
    for agent in [&nobody, &deaf] {
        let case = agent.display().to_string();
        let outcome = finish(spawn(backup(&host, &guest, agent, &[])));
        assert_eq!(snapshot(&case, &outcome)["consistency"], "crash", "{outcome:?}");
        let outcome = finish(spawn(backup(&host, &guest, agent, &["--quiesce", "require"])));
        assert_says(&outcome, 1, "could not be frozen");
        let outcome = finish(spawn(backup(&host, &guest, agent, &["--quiesce", "no"])));
        assert_eq!(snapshot(&case, &outcome)["warnings"], json!([]), "{outcome:?}");
        host.assert_all_clean(&guest, &["vda"]);
    }
}

// ---- a real guest -------------------------------------------------------------------------------

/// Stands between kvmsnap and a guest's agent, and acts once the guest has said that it is frozen,
/// before kvmsnap hears of it.
struct Eavesdropper {
    socket: PathBuf,
}

impl Eavesdropper {
    fn start(socket: &Path, agent: &Path, on_frozen: impl Fn() + Send + Sync + 'static) -> Self {
        let listener = UnixListener::bind(socket).expect("a new socket");
        let (agent, on_frozen) = (agent.to_owned(), Arc::new(on_frozen));
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let server = UnixStream::connect(&agent).expect("QEMU listens");
                let freezing = Arc::new(AtomicU32::new(0));
                let clone = |stream: &UnixStream| stream.try_clone().expect("descriptors are free");
                let (from, to, seen) = (clone(&client), clone(&server), Arc::clone(&freezing));
                thread::spawn(move || {
                    forward(from, to, |bytes| {
                        let text = String::from_utf8_lossy(bytes);
                        seen.fetch_add(u32::from(text.contains(FREEZE)), Ordering::SeqCst);
                    });
                });
                let on_frozen = Arc::clone(&on_frozen);
                thread::spawn(move || {
                    forward(server, client, |_| {
                        if freezing.swap(0, Ordering::SeqCst) > 0 {
                            on_frozen();
                        }
                    });
                });
            }
        });
        Self { socket: socket.to_owned() }
    }
}

/// Passes bytes on until one side ends, then ends the other.
fn forward(mut from: UnixStream, mut to: UnixStream, look: impl Fn(&[u8])) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        look(&buffer[..len]);
        if to.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    // Either may be gone already.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// Writes to the guest's file system again and again; tells the longest pause between two writes.
struct Beat<'a> {
    guest: &'a Guest,
    pid: i64,
}

const BEAT: &str = r#"
max=0; read last _ < /proc/uptime; last=${last%.*}${last#*.}
while [ ! -e /tmp/stop ]; do
    echo "$last" > /mnt/vda/beat
    read now _ < /proc/uptime; now=${now%.*}${now#*.}
    [ $((now - last)) -gt $max ] && max=$((now - last))
    last=$now
done
echo $max
"#;

impl<'a> Beat<'a> {
    fn start(guest: &'a Guest) -> Self {
        // Not by the writer itself, which may come to it only after it was told to stop.
        guest.sh("rm -f /tmp/stop");
        Self { guest, pid: guest.spawn(&["sh", "-c", BEAT]) }
    }

    /// Ends it; the longest pause.
    fn longest(self) -> Duration {
        self.guest.sh("touch /tmp/stop");
        let mut ended = None;
        wait_until(PATIENCE, "the guest's writer ends: it is not frozen", || {
            ended = self.guest.poll(self.pid);
            ended.is_some()
        });
        let ended = ended.expect("it was just seen");
        let hundredths: u64 = ended.stdout.trim().parse().expect("a number of hundredths");
        Duration::from_millis(hundredths * 10)
    }
}

/// Runs a backup and has `act` called with kvmsnap's process id once the guest is frozen. Returns how
/// it ended, and the longest pause of the guest's writes.
fn act_while_frozen(
    host: &Host,
    guest: &Guest,
    name: &str,
    act: impl Fn(u32) + Send + Sync + 'static,
) -> (Outcome, Duration) {
    let pid = Arc::new(AtomicU32::new(0));
    let seen = Arc::clone(&pid);
    let proxy = Eavesdropper::start(&host.folder().join(name), &guest.qga(), move || {
        wait_until(PATIENCE, "the run has a process id", || seen.load(Ordering::SeqCst) != 0);
        act(seen.load(Ordering::SeqCst));
    });
    let beat = Beat::start(guest);
    let running = spawn(backup(host, guest, &proxy.socket, &[]));
    pid.store(running.pid(), Ordering::SeqCst);
    let outcome = finish(running);
    (outcome, beat.longest())
}

#[test]
fn r15_a_frozen_guest_is_let_go_whoever_dies_or_hangs() {
    let _alone = MACHINE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let plan = Guest::builder()
        .disk(Disk::new("vda", 64 * MIB).mounted(FileSystem::Ext4))
        .disk(Disk::new("vdb", 16 * MIB));
    let Some(guest) = plan.boot() else { return };
    let host = Host::new();
    let disks = ["vda", "vdb"];
    let works = |what: &str| {
        assert_goes_on(&guest);
        let next = host.backup(&guest, &[]);
        assert_eq!(next["consistency"], "filesystem", "{what}: {next}");
        assert_eq!(next["warnings"], json!([]), "{what}: {next}");
        host.assert_all_clean(&guest, &disks);
        next
    };
    works("at first");

    let (outcome, still) = act_while_frozen(&host, &guest, "watched.sock", |_| {});
    assert_eq!(snapshot("undisturbed", &outcome)["consistency"], "filesystem", "{outcome:?}");
    assert!(still < STILL_MAX, "undisturbed: {still:?}");

    let kill = |pid| signal(pid, Signal::SIGKILL);
    let (outcome, still) = act_while_frozen(&host, &guest, "killed.sock", kill);
    assert_eq!(outcome.code, None, "{outcome:?}");
    assert!(still < STILL_MAX, "kvmsnap was killed: frozen for {still:?}");
    assert_eq!(works("after SIGKILL")["kind"], "incremental");

    // The points between freeze and thaw at which kvmsnap does something, from the first on.
    let effects = host.effects(host.backup_command(&guest, &[]));
    let first = effects.iter().position(|effect| effect == "watchdog: start").expect("a watchdog");
    for n in first + 2..first + 5 {
        let beat = Beat::start(&guest);
        let mut command = host.backup_command(&guest, &[]);
        command.env("KVMSNAP_CRASH_AT", n.to_string());
        assert_eq!(finish(spawn(command)).code, None, "killed at {}", effects[n - 1]);
        let still = beat.longest();
        assert!(still < STILL_MAX, "killed at {}: frozen for {still:?}", effects[n - 1]);
        assert_eq!(works(&effects[n - 1])["kind"], "incremental");
    }

    // Watchdog and guard die too: nobody is left to thaw but the next run.
    let both = |pid| {
        // The run first stands still: neither sees the other die, and none ends by itself.
        signal(pid, Signal::SIGSTOP);
        let helpers = children(pid);
        assert_eq!(helpers.len(), 2);
        helpers.into_iter().for_each(|helper| signal(helper, Signal::SIGKILL));
        signal(pid, Signal::SIGKILL);
    };
    let proxy = both_killed(&host, &guest, both);
    assert_eq!(proxy.code, None, "{proxy:?}");
    let frozen = guest.spawn(&["sh", "-c", "echo held > /mnt/vda/held"]);
    assert_eq!(works("after both were killed")["kind"], "incremental");
    wait_until(STILL_MAX, "the guest is thawed", || guest.poll(frozen).is_some());

    // Only the watchdog dies: kvmsnap thaws, and pauses nothing that nobody watches.
    let watchdog = |pid| signal(watchdog_of(pid), Signal::SIGKILL);
    let (outcome, still) = act_while_frozen(&host, &guest, "unwatched.sock", watchdog);
    assert_says(&outcome, 1, "the watchdog process ended");
    assert!(!outcome.stderr.contains("hint: "), "{outcome:?}");
    host.assert_nothing_left();
    assert_guest_is_free(&guest, &disks);
    assert!(still < STILL_MAX, "the watchdog was killed: frozen for {still:?}");
    works("after the watchdog was killed");

    // kvmsnap stands still: the watchdog thaws by its deadline, and the run says so when it goes on.
    let stop = |pid| {
        signal(pid, Signal::SIGSTOP);
        thread::spawn(move || {
            thread::sleep(DEADLINE + SLACK);
            signal(pid, Signal::SIGCONT);
        });
    };
    let (outcome, still) = act_while_frozen(&host, &guest, "stopped.sock", stop);
    let made = snapshot("stopped", &outcome);
    assert_eq!(made["consistency"], "crash", "{made}");
    assert!(still < DEADLINE + SLACK / 2, "kvmsnap was stopped: frozen for {still:?}");
    assert!(still > DEADLINE / 2, "it was not stopped while frozen: {still:?}");
    works("after SIGSTOP");
}

/// A run that is killed with its watchdog while the guest is frozen.
fn both_killed(host: &Host, guest: &Guest, act: impl Fn(u32) + Send + Sync + 'static) -> Outcome {
    let pid = Arc::new(AtomicU32::new(0));
    let seen = Arc::clone(&pid);
    let proxy = Eavesdropper::start(&host.folder().join("both.sock"), &guest.qga(), move || {
        wait_until(PATIENCE, "the run has a process id", || seen.load(Ordering::SeqCst) != 0);
        act(seen.load(Ordering::SeqCst));
    });
    let running = spawn(backup(host, guest, &proxy.socket, &[]));
    pid.store(running.pid(), Ordering::SeqCst);
    finish(running)
}

#[test]
fn r15_a_stopped_agent_costs_consistency_and_nothing_else() {
    let _alone = MACHINE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let plan = Guest::builder().disk(Disk::new("vda", 64 * MIB).mounted(FileSystem::Ext4));
    let Some(guest) = plan.boot() else { return };
    let host = Host::new();
    host.backup(&guest, &[]);
    let agent = guest.sh("grep -la org.qemu.guest_agent.0 /proc/[0-9]*/cmdline | cut -d/ -f3");
    let agents: Vec<&str> = agent.split_whitespace().collect();
    let to_agents = |name: &str| {
        let script = format!("for p in {}; do kill -{name} $p; done; true", agents.join(" "));
        guest.sh(&script);
    };

    to_agents("STOP");
    let beat = Beat::start(&guest);
    let outcome = host.try_backup(&guest, &[]);
    assert_eq!(snapshot("stopped", &outcome)["consistency"], "crash", "{outcome:?}");
    assert!(outcome.took < DEADLINE + SLACK, "{outcome:?}");
    assert_says(&host.try_backup(&guest, &["--quiesce", "require"]), 1, "could not be frozen");
    let still = beat.longest();
    assert!(still < STILL_MAX, "frozen for {still:?}");
    host.assert_all_clean(&guest, &["vda"]);

    to_agents("CONT");
    let next = host.backup(&guest, &["--quiesce", "require"]);
    assert_eq!(next["consistency"], "filesystem", "{next}");
    assert_eq!(next["kind"], "incremental", "{next}");
    host.assert_all_clean(&guest, &["vda"]);
}
