//! Commands on the host and scripts in the guest around a point in time, and what becomes of them when they fail,
//! hang, or the run dies.

use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use integration::faults::{assert_goes_on, assert_says, signal, wait_until};
use integration::scripted_agent::{Answer, ScriptedAgent};
use integration::{Host, assert_guest_is_free, finish, spawn};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vm_fixtures::{Disk, Guest, MIB};

/// The watchdog's deadline, and what a busy machine may add to it.
const DEADLINE: Duration = Duration::from_secs(30);

/// A machine, a host with hooks that write down that they ran, and an agent that does so too.
struct Scene {
    guest: Guest,
    host: Host,
    agent: ScriptedAgent,
    log: PathBuf,
    /// The run that is killed or stopped once the guest is frozen.
    victim: Arc<Mutex<Option<(u32, Signal)>>>,
}

impl Scene {
    fn new() -> Option<Self> {
        let guest = Guest::without_os().disk(Disk::new("vda", MIB)).boot()?;
        let host = Host::new();
        let log = host.folder().join("log");
        let hook = host.folder().join("hook.sh");
        let script = format!(
            "#!/bin/sh\necho \"$KVMSNAP_AT $KVMSNAP_DOMAIN $KVMSNAP_RESULT\" >> {}\n\
             env >> {}\n[ \"$1\" != fail ] || {{ echo first; echo \"$1 loudly\"; exit 7; }} >&2\n\
             [ \"$1\" != hang ] || sleep 4321\n",
            log.display(),
            host.folder().join("environment").display()
        );
        fs::write(&hook, script).expect("a script");
        fs::set_permissions(&hook, Permissions::from_mode(0o700)).expect("a file of ours");
        let victim: Arc<Mutex<Option<(u32, Signal)>>> = Arc::default();
        let (seen, hit) = (log.clone(), Arc::clone(&victim));
        let agent = ScriptedAgent::start(&host.folder().join("agent.sock"), move |command, _| {
            note(&seen, command);
            match command {
                "guest-fsfreeze-freeze" => {
                    if let Some((pid, what)) = *hit.lock().expect("no panic while locked") {
                        signal(pid, what);
                    }
                    Some(Ok(json!(1)))
                }
                "guest-fsfreeze-thaw" => Some(Ok(json!(1))),
                "guest-exec" => Some(Ok(json!({"pid": 4}))),
                "guest-exec-status" => Some(Ok(json!({"exited": true, "exitcode": 0}))),
                _ => Some(Ok(json!({}))),
            }
        });
        Some(Self { guest, host, agent, log, victim })
    }

    /// Configures hooks: when, what is said to it, and more.
    fn configure(&self, hooks: &[(&str, &str, &str)]) {
        let program = self.host.folder().join("hook.sh");
        let mut text = String::new();
        for (at, argument, more) in hooks {
            text.push_str(&format!(
                "[[domain.web.hook]]\nat = \"{at}\"\ncommand = [{program:?}, {argument:?}]\n{more}\n"
            ));
        }
        fs::write(self.host.config(), text).expect("a configuration");
    }

    fn backup(&self, more: &[&str]) -> Command {
        let mut command = self.host.command(["backup", "--json", "--name", "web", "--qmp"]);
        command.arg(self.guest.qmp()).arg("--qga").arg(self.agent.socket()).args(more);
        command
    }

    fn told(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        text.lines().map(|line| line.trim_end().to_owned()).collect()
    }

    fn assert_all_is_over(&self) {
        assert_goes_on(&self.guest);
        assert_guest_is_free(&self.guest, &["vda"]);
        self.host.assert_nothing_left();
    }
}

fn note(log: &Path, line: &str) {
    let file = OpenOptions::new().create(true).append(true).open(log);
    writeln!(file.expect("a log"), "{line}").expect("room for a line");
}

const ALL: [(&str, &str, &str); 4] =
    [("before", "", ""), ("freeze", "", ""), ("thaw", "", ""), ("after", "", "")];

#[test]
fn hooks_run_around_the_point_in_time_and_hear_what_came_of_it() {
    let Some(scene) = Scene::new() else { return };
    scene.configure(&ALL);

    let outcome = finish(spawn(scene.backup(&[])));

    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let made: Value = serde_json::from_str(&outcome.stdout).expect("one JSON object");
    assert_eq!(made["consistency"], "application", "{made}");
    assert_eq!(made["applications"][0]["state"], "clean", "{made}");
    let wanted = [
        "before web",
        "freeze web",
        "guest-fsfreeze-freeze",
        "guest-fsfreeze-thaw",
        "thaw web",
        "after web success",
    ];
    assert_eq!(scene.told(), wanted);
    let environment = fs::read_to_string(scene.host.folder().join("environment")).unwrap();
    let snapshot = format!("KVMSNAP_SNAPSHOT={}", made["id"].as_str().expect("an id"));
    for line in [&snapshot, "KVMSNAP_CONSISTENCY=application"] {
        assert!(environment.lines().any(|known| known == line), "{line}: {environment}");
    }
    assert!(!environment.contains("correct horse"), "{environment}");
    scene.assert_all_is_over();
}

#[test]
fn hooks_run_with_every_method_that_reads_a_guest_that_runs() {
    for method in ["pull", "suspend", "overlay"] {
        let Some(scene) = Scene::new() else { return };
        scene.configure(&ALL);

        let outcome = finish(spawn(scene.backup(&["--method", method])));

        assert_eq!(outcome.code, Some(0), "{method}: {outcome:?}");
        let made: Value = serde_json::from_str(&outcome.stdout).expect("one JSON object");
        assert_eq!(made["consistency"], "application", "{method}: {made}");
        let mut told = scene.told();
        told.retain(|line| line.contains("web"));
        assert_eq!(told, ["before web", "freeze web", "thaw web", "after web success"], "{method}");
        scene.assert_all_is_over();
    }
}

#[test]
fn images_that_hold_still_for_others_have_the_same_hooks() {
    let Some(scene) = Scene::new() else { return };
    scene.configure(&ALL);
    let mut create = scene.host.command(["create", "--name", "web", "--qmp"]);
    create.arg(scene.guest.qmp()).arg("--qga").arg(scene.agent.socket());

    let outcome = finish(spawn(create));

    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.stdout.contains("application-consistent"), "{outcome:?}");
    let mut told = scene.told();
    told.retain(|line| line.contains("web"));
    assert_eq!(told, ["before web", "freeze web", "thaw web", "after web success"]);
    let mut purge = scene.host.command(["purge", "--qmp"]);
    purge.arg(scene.guest.qmp());
    let outcome = finish(spawn(purge));
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    scene.assert_all_is_over();
}

#[test]
fn a_hook_that_fails_is_a_warning_or_the_end_as_configured() {
    let Some(scene) = Scene::new() else { return };
    let after = [("thaw", "", ""), ("after", "", "")];
    scene.configure(&[&[("before", "fail", ""), ("freeze", "fail", "")], &after[..]].concat());

    let outcome = finish(spawn(scene.backup(&[])));

    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let made: Value = serde_json::from_str(&outcome.stdout).expect("one JSON object");
    assert_eq!(made["consistency"], "filesystem", "{made}");
    let warnings = made["warnings"].to_string();
    assert!(warnings.contains("at before: it ended with 7: fail loudly"), "{warnings}");
    assert!(warnings.contains("not application-consistent: hook"), "{warnings}");
    fs::remove_file(&scene.log).unwrap();

    // Nothing is frozen for a backup that is none.
    let required = "required = true";
    scene.configure(&[&[("freeze", "fail", required)], &after[..]].concat());
    let outcome = finish(spawn(scene.backup(&[])));
    assert_says(&outcome, 1, "it ended with 7: fail loudly");
    let mut told = scene.told();
    // Whoever gives a guest back makes sure that it is not frozen.
    told.retain(|line| line != "guest-fsfreeze-thaw");
    assert_eq!(told, ["freeze web", "thaw web", "after web failure"]);
    fs::remove_file(&scene.log).unwrap();

    scene.configure(&[&[("before", "fail", required)], &after[..]].concat());
    let outcome = finish(spawn(scene.backup(&[])));
    assert_says(&outcome, 1, "at before: it ended with 7");
    assert_eq!(scene.told(), ["before web", "after web failure"]);
    assert_eq!(scene.host.list().len(), 1);
    scene.assert_all_is_over();
}

#[test]
fn a_hook_that_hangs_ends_at_its_deadline_with_all_that_it_started() {
    let Some(scene) = Scene::new() else { return };
    scene.configure(&[("freeze", "hang", "timeout = \"1s\""), ("thaw", "", "")]);

    let outcome = finish(spawn(scene.backup(&[])));

    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.stdout.contains("it did not end within 1 s"), "{outcome:?}");
    let sleepers = || {
        let all = fs::read_dir("/proc").expect("proc").flatten();
        let line = |path: PathBuf| fs::read(path.join("cmdline")).unwrap_or_default();
        all.map(|entry| line(entry.path()))
            .filter(|line| line.starts_with(b"sleep\x004321"))
            .count()
    };
    wait_until(DEADLINE, "what the hook started ends", || sleepers() == 0);
    scene.assert_all_is_over();
}

#[test]
fn a_run_that_dies_or_hangs_while_frozen_leaves_no_hook_untold() {
    for what in [Signal::SIGKILL, Signal::SIGSTOP] {
        let Some(scene) = Scene::new() else { return };
        scene.configure(&ALL);
        let mut victim = scene.victim.lock().expect("no panic while locked");
        let start = Instant::now();
        let running = spawn(scene.backup(&[]));
        let pid = running.pid();
        *victim = Some((pid, what));
        drop(victim);

        let is_told = || scene.told().contains(&"thaw web".to_owned());
        wait_until(2 * DEADLINE, &format!("{what}: the hook at thaw runs"), is_told);

        assert!(start.elapsed() < DEADLINE, "{what}: {:?}", start.elapsed());
        let told = scene.told();
        let thaw = told.iter().position(|line| line == "guest-fsfreeze-thaw");
        assert!(thaw < told.iter().position(|line| line == "thaw web"), "{told:?}");
        if what == Signal::SIGSTOP {
            signal(pid, Signal::SIGCONT);
            let outcome = finish(running);
            let made: Value = serde_json::from_str(&outcome.stdout).expect("one JSON object");
            assert_eq!(made["consistency"], "crash", "{made}");
        } else {
            drop(running);
            scene.victim.lock().expect("no panic while locked").take();
            assert_eq!(finish(spawn(scene.backup(&[]))).code, Some(0));
        }
        scene.assert_all_is_over();
    }
}

#[test]
fn r15_whatever_the_agent_says_of_a_script_in_the_guest_the_backup_goes_on() {
    let Some(guest) = Guest::without_os().disk(Disk::new("vda", MIB)).boot() else { return };
    let host = Host::new();
    let hook = "at = \"freeze\"\nwhere = \"guest\"\ncommand = [\"/bin/settle\", \"$(reboot)\"]";
    let config = |required| {
        let text = format!("[[domain.web.hook]]\n{hook}\ntimeout = \"2s\"\nrequired = {required}");
        fs::write(host.config(), text).expect("a configuration");
    };
    let exec = |value: Value| Some(Ok(value));
    let cases: Vec<(&str, Answer, Answer, &str)> = vec![
        ("good", exec(json!({"pid": 4})), exec(json!({"exited": true, "exitcode": 0})), ""),
        ("hangs", None, None, "did not end within 2 s"),
        ("never ends", exec(json!({"pid": 4})), exec(json!({"exited": false})), "within 2 s"),
        ("refuses", Some(Err("disabled \u{1b}[2J".to_owned())), None, "disabled"),
        ("no process", exec(json!({"pid": "four"})), None, "makes no sense"),
        ("nothing", exec(Value::Null), None, "makes no sense"),
        (
            "fails",
            exec(json!({"pid": 4})),
            exec(json!({"exited": true, "exitcode": 3, "err-data": "bm8gG1szMW0K"})),
            "it ended with 3",
        ),
        (
            "babbles",
            exec(json!({"pid": 4})),
            exec(json!({"exited": true, "exitcode": 0, "out-data": "A".repeat(2 << 20)})),
            "longer than",
        ),
    ];
    for (index, (case, started, status, why)) in cases.into_iter().enumerate() {
        let heard: Arc<Mutex<Vec<Value>>> = Arc::default();
        let log = Arc::clone(&heard);
        let socket = host.folder().join(format!("agent-{index}.sock"));
        let agent = ScriptedAgent::start(&socket, move |command, arguments| match command {
            "guest-exec" => {
                log.lock().expect("no panic while locked").push(arguments.clone());
                started.clone()
            }
            "guest-exec-status" => status.clone(),
            _ => Some(Ok(json!(1))),
        });
        let backup = || {
            let mut command = host.command(["backup", "--json", "--name", "web", "--qmp"]);
            command.arg(guest.qmp()).arg("--qga").arg(agent.socket());
            finish(spawn(command))
        };
        config(false);
        let outcome = backup();
        assert_eq!(outcome.code, Some(0), "{case}: {outcome:?}");
        let made: Value = serde_json::from_str(&outcome.stdout).expect("one JSON object");
        assert!(!outcome.stdout.contains('\u{1b}') && !outcome.stderr.contains('\u{1b}'), "{case}");
        let heard = heard.lock().expect("no panic while locked")[0].clone();
        assert_eq!((&heard["path"], &heard["arg"]), (&json!("/bin/settle"), &json!(["$(reboot)"])));
        assert!(heard["env"].to_string().contains("KVMSNAP_DOMAIN=web"), "{heard}");
        let consistency = if why.is_empty() { "application" } else { "filesystem" };
        assert_eq!(made["consistency"], consistency, "{case}: {made}");
        assert!(made["warnings"].to_string().contains(why), "{case}: {made}");
        if !why.is_empty() {
            config(true);
            assert_says(&backup(), 1, why);
        }
        assert_goes_on(&guest);
        assert_guest_is_free(&guest, &["vda"]);
        host.assert_nothing_left();
    }
}
