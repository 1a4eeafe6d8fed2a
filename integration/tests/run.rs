//! What a timer starts: `kvmsnap run`, with guests of its own and a clock that the test sets.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use integration::faults::{Contents, assert_says, signal, wait_until};
use integration::libvirt::{SIZE, Scene, wait_with};
use integration::restored::text;
use integration::{Host, Outcome, Running, assert_guest_is_free, finish, spawn};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vm_fixtures::libvirt::Libvirt;
use vm_fixtures::{Disk, Guest, MIB};

/// Longest time for what takes a moment.
const WAIT: Duration = Duration::from_secs(120);
/// When the stories begin, in the future: snapshots are as old as they look.
const MORNING: &str = "2040-03-01T03:05:00Z";

/// A machine with one disk that holds 4 MiB of data.
fn machine() -> Option<(Guest, Contents)> {
    let guest = Guest::without_os().disk(Disk::new("vda", 16 * MIB)).boot()?;
    let mut contents = Contents::new(&["vda"], 16 * MIB);
    contents.write(&guest, "vda", 1 << 20, 4 << 20, 1);
    Some((guest, contents))
}

/// A host whose configuration is a nightly job, with the repository `main` and machines by their sockets.
struct Unattended {
    host: Host,
    text: String,
}

impl Unattended {
    fn new(machines: &[(&str, &Path)], job: &str) -> Self {
        Self::on(Host::new(), machines, job)
    }

    fn on(host: Host, machines: &[(&str, &Path)], job: &str) -> Self {
        let named = machines.iter().map(|(name, _)| format!("{name:?}")).collect::<Vec<_>>();
        let sockets = machines
            .iter()
            .map(|(name, socket)| format!("[domain.{name}]\nqmp = {socket:?}\n"))
            .collect::<String>();
        let text = format!(
            "[repository.main]\nlocation = {:?}\npassword-file = {:?}\n{sockets}\
             [run]\nidle-io = false\n[alerts.log]\nenabled = false\n\
             [job.nightly]\nschedule = \"03:00\"\ntimezone = \"UTC\"\nretry-pause = \"1s\"\n\
             domains = [{}]\n{job}\n",
            host.repository(),
            host.password_file(),
            named.join(", "),
        );
        let unattended = Self { host, text };
        unattended.configure("");
        unattended
    }

    /// Adds to the configuration.
    fn configure(&self, more: &str) {
        fs::write(self.host.config(), format!("{}{more}", self.text)).expect("a configuration");
    }

    fn command(&self, at: &str, more: &[&str]) -> Command {
        run_command(&self.host, at, more)
    }

    fn run_at(&self, at: &str, more: &[&str]) -> Outcome {
        finish(spawn(self.command(at, more)))
    }

    /// Runs, which must succeed, and returns its steps.
    #[track_caller]
    fn steps(&self, at: &str) -> Vec<Value> {
        let outcome = self.run_at(at, &[]);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        lines(&outcome)
    }

    /// The names of the steps' work, and what came of them.
    #[track_caller]
    fn done(&self, at: &str) -> Vec<(String, String)> {
        self.steps(at).iter().map(|step| (word(step, "work"), word(step, "outcome"))).collect()
    }
}

fn run_command(host: &Host, at: &str, more: &[&str]) -> Command {
    let mut command = host.command(["run", "--json", "--at", at]);
    // What is configured decides.
    command.env_remove("KVMSNAP_REPOSITORY").env_remove("KVMSNAP_PASSWORD_FILE").args(more);
    command
}

fn lines(outcome: &Outcome) -> Vec<Value> {
    let lines = outcome.stdout.lines();
    lines.map(|line| serde_json::from_str(line).expect("a JSON object")).collect()
}

fn word(line: &Value, field: &str) -> String {
    text(line, field).to_owned()
}

/// The packs of a host's repository.
fn packs(host: &Host) -> BTreeSet<PathBuf> {
    let folders = fs::read_dir(host.repository().join("data")).expect("packs").flatten();
    let packs = folders.flat_map(|folder| fs::read_dir(folder.path()).expect("a folder").flatten());
    packs.map(|pack| pack.path()).collect()
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|(work, outcome)| ((*work).to_owned(), (*outcome).to_owned())).collect()
}

#[test]
fn a_job_runs_when_it_is_due_and_what_was_missed_is_caught_up_once() {
    let Some((guest, mut contents)) = machine() else { return };
    let there = Unattended::new(&[("web", &guest.qmp())], "");
    let first = there.steps(MORNING);
    let (backup, verify) = (&first[0], &first[1]);
    assert_eq!((&backup["work"], &backup["domain"]), (&json!("backup"), &json!("web")));
    assert_eq!((&backup["outcome"], &backup["attempts"]), (&json!("done"), &json!(1)));
    assert_eq!((&verify["work"], &verify["outcome"]), (&json!("verify"), &json!("done")));
    assert_eq!(first.len(), 2, "{first:?}");

    assert_eq!(there.done("2040-03-01T03:10:00Z"), [], "it is done");
    assert_eq!(there.done("2040-03-02T02:59:00Z"), [], "it is not due yet");
    contents.scribble(&guest, 1);
    let again = there.steps("2040-03-05T14:00:00Z");
    assert_eq!(again[0]["figures"]["incremental"], true, "{again:?}");
    assert_eq!(there.done("2040-03-05T14:05:00Z"), [], "five missed nights are one run");

    let listed = there.host.list();
    assert_eq!(listed.len(), 2);
    assert_eq!(again[0]["snapshot"], listed[1]["id"]);
    there.host.assert_holds(&listed[1], &contents);
    there.host.assert_nothing_left();
    // Losing what is known of earlier runs costs one more run.
    fs::remove_file(there.host.state().join("jobs.json")).expect("it was kept");
    assert_eq!(there.done("2040-03-05T14:10:00Z").len(), 2);
    assert_eq!(there.done("2040-03-05T14:15:00Z"), []);
}

#[test]
fn a_dry_run_says_what_is_due_and_why_and_changes_nothing() {
    let nobody = Path::new("/run/no-such.qmp");
    let there = Unattended::new(&[("web", nobody), ("db", nobody)], "order = [\"web\"]");
    let due = &lines(&there.run_at(MORNING, &["--dry-run"]))[0];
    assert_eq!((&due["job"], &due["due"]), (&json!("nightly"), &json!(true)));
    assert_eq!(due["reason"], "due since 2040-03-01T03:00:00Z");
    assert_eq!(due["domains"], json!(["web", "db"]), "in their order");
    assert_eq!(due["next"], "2040-03-02T03:00:00Z");
    assert!(!there.host.state().join("jobs.json").exists());
    let plain = there.host.ok(["run", "--dry-run", "--at", MORNING]);
    assert!(plain.contains("nightly") && plain.contains("web, db"), "{plain}");
    assert_says(&there.run_at(MORNING, &["wekly"]), 2, "there is nightly");
    fs::write(there.host.config(), "").expect("a configuration");
    assert_says(&there.run_at(MORNING, &[]), 2, "kvmsnap config example");
}

#[test]
fn one_broken_domain_is_tried_again_and_keeps_nobody_from_the_others() {
    let Some((guest, _)) = machine() else { return };
    let nobody = Path::new("/run/no-such.qmp");
    let there = Unattended::new(
        &[("broken", nobody), ("web", &guest.qmp())],
        "retries = 1\nverify = false\nparallel = 2",
    );
    let told = there.host.folder().join("told");
    let script = there.host.folder().join("tell");
    fs::write(&script, format!("#!/bin/sh\ncat >> {}\n", told.display())).expect("a script");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("a file of ours");
    let figures = there.host.folder().join("kvmsnap.prom");
    let alerts = format!(
        "[alerts]\ndigest = \"10:00\"\n[[alerts.command]]\nrun = [{script:?}]\n\
         [metrics]\nfile = {figures:?}\n"
    );
    there.configure(&alerts);

    let outcome = there.run_at(MORNING, &[]);

    assert_eq!(outcome.code, Some(3), "{outcome:?}");
    let steps = lines(&outcome);
    let of = |domain: &str| steps.iter().find(|step| step["domain"] == domain).expect("a step");
    assert_eq!((&of("web")["outcome"], &of("web")["attempts"]), (&json!("done"), &json!(1)));
    let broken = of("broken");
    assert_eq!((&broken["outcome"], &broken["attempts"]), (&json!("failed"), &json!(2)));
    assert!(text(broken, "text").contains("no-such.qmp"), "{broken}");
    let told_of = || -> Vec<(String, String)> {
        let lines = fs::read_to_string(&told).unwrap_or_default();
        let events = lines.lines().map(|line| serde_json::from_str(line).expect("an object"));
        let named = events.filter(|event: &Value| event["domain"].is_string());
        named.map(|event| (word(&event, "kind"), word(&event, "domain"))).collect()
    };
    let digests = || {
        let told = fs::read_to_string(&told).unwrap_or_default();
        told.lines().filter(|line| line.contains("\"digest\"")).count()
    };
    let status = there.host.ok(["status", "--json", "broken", "web"]);
    let status: Vec<Value> =
        status.lines().map(|line| serde_json::from_str(line).expect("an object")).collect();
    assert_eq!(status.iter().map(|line| text(line, "state")).collect::<Vec<_>>(), ["unmanaged"; 2]);
    assert!(status[0]["last"].is_null() && status[1]["last"].is_object(), "{status:?}");
    assert!(status.iter().all(|line| line["due"].is_string()), "{status:?}");
    assert_eq!(digests(), 0);
    assert_eq!(told_of(), pairs(&[("failure", "broken")]));

    // It is well again the next night, and people are told so.
    let mended = there.text.replace("/run/no-such.qmp", &guest.qmp().to_string_lossy());
    let mended = mended.replace("retries = 1", "retries = 9");
    fs::write(there.host.config(), format!("{mended}{alerts}")).expect("a configuration");
    let outcome = there.run_at("2040-03-02T03:05:00Z", &[]);
    // Two names of one monitor: whoever comes second waits for its turn, or tries again.
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(told_of(), pairs(&[("failure", "broken"), ("recovery", "broken")]));
    let history = there.host.ok(["history", "--json", "--failed"]);
    assert_eq!(history.lines().count(), 1, "{history}");
    let metrics = fs::read_to_string(figures).expect("figures");
    for name in ["domain_last_success_timestamp_seconds", "backup_stored_bytes", "repository_bytes"]
    {
        assert!(metrics.contains(&format!("\nkvmsnap_{name}{{")), "{name}: {metrics}");
    }
    // Ten o'clock has passed since the first run, and only once.
    assert_eq!(digests(), 1);
    there.run_at("2040-03-02T03:06:00Z", &[]);
    assert_eq!(digests(), 1);
    let table = there.host.ok(["history", "--steps"]);
    assert!(table.contains("backup of broken") && table.contains("failed"), "{table}");
}

#[test]
fn r14_a_repository_that_is_away_costs_no_guest_anything_and_the_next_run_is_incremental() {
    let Some((guest, mut contents)) = machine() else { return };
    let there = Unattended::new(&[("web", &guest.qmp())], "retries = 1\nverify = false");
    there.steps(MORNING);
    contents.scribble(&guest, 1);
    let (repository, aside) = (there.host.repository(), there.host.folder().join("aside"));
    fs::rename(repository, &aside).expect("it is ours");

    let outcome = there.run_at("2040-03-02T03:05:00Z", &[]);

    assert_eq!(outcome.code, Some(3), "{outcome:?}");
    let failed = lines(&outcome);
    assert_eq!(failed[0]["outcome"], "failed", "{failed:?}");
    assert!(failed.iter().any(|step| step["work"] == "repository"), "{failed:?}");
    assert_guest_is_free(&guest, &["vda"]);
    fs::rename(&aside, repository).expect("it is ours");
    let back = there.steps("2040-03-03T03:05:00Z");
    assert_eq!(back[0]["figures"]["incremental"], true, "{back:?}");
    there.host.assert_holds(there.host.list().last().expect("a snapshot"), &contents);
    there.host.assert_nothing_left();
}

#[test]
fn r14_where_one_repository_is_away_backups_go_to_the_next() {
    let Some((guest, contents)) = machine() else { return };
    let there = Unattended::new(
        &[("web", &guest.qmp())],
        "repository = [\"gone\", \"main\"]\nretries = 0\nverify = false",
    );
    there.configure(
        "[repository.gone]\nlocation = \"/no/such/folder\"\npassword-file = \"/dev/null\"\n",
    );
    let outcome = there.run_at(MORNING, &[]);
    assert_eq!(outcome.code, Some(0), "the backup is made: {outcome:?}");
    let steps = lines(&outcome);
    let backup = steps.iter().find(|step| step["work"] == "backup").expect("a backup");
    assert_eq!((&backup["outcome"], &backup["repository"]), (&json!("done"), &json!("main")));
    let away = steps.iter().find(|step| step["work"] == "repository").expect("it is told");
    assert_eq!((&away["outcome"], &away["repository"]), (&json!("warning"), &json!("gone")));
    there.host.assert_holds(&there.host.list()[0], &contents);
}

/// Starts a run whose backup reads slowly, and waits until it reads.
#[track_caller]
fn run_slowly(there: &Unattended, guest: &Guest) -> Running {
    let slow = there.text.replace("qmp =", "limit-read = \"64KiB\"\nqmp =");
    fs::write(there.host.config(), slow).expect("a configuration");
    let running = spawn(there.command(MORNING, &[]));
    wait_until(WAIT, "its backup reads", || {
        guest.qmp_command("query-block-exports", &json!({})) != json!([])
    });
    running
}

#[test]
fn r16_of_two_runs_the_second_ends_at_once_and_abort_ends_the_first_cleanly() {
    let Some((guest, _)) = machine() else { return };
    let there = Unattended::new(&[("web", &guest.qmp())], "");
    assert!(there.host.ok(["run", "--abort"]).contains("no run is active"));
    let running = run_slowly(&there, &guest);
    let pid = running.pid();
    let second = there.run_at(MORNING, &[]);
    assert_eq!(second.code, Some(0), "{second:?}");
    assert_eq!(lines(&second), [json!({"active": pid.to_string()})]);
    assert!(second.took < Duration::from_secs(30), "{second:?}");
    let look = there.run_at("2040-03-02T03:10:00Z", &["--only-look"]);
    assert_eq!(look.code, Some(0), "{look:?}");
    assert!(look.stderr.contains("job nightly takes longer than its interval"), "{look:?}");

    assert!(there.host.ok(["run", "--abort"]).contains("the run has ended"));

    let first = finish(running);
    assert_eq!(first.code, Some(130), "{first:?}");
    assert_eq!(lines(&first)[0]["outcome"], "aborted");
    assert_guest_is_free(&guest, &["vda"]);
    there.host.assert_nothing_left();
    there.configure("");
    assert_eq!(there.done("2040-03-02T03:05:00Z").len(), 2, "the next night it runs");
}

#[test]
fn p2_a_run_that_is_killed_takes_its_backups_with_it_and_leaves_the_guest_clean() {
    let Some((guest, mut contents)) = machine() else { return };
    let there = Unattended::new(&[("web", &guest.qmp())], "verify = false");
    there.steps(MORNING);
    contents.scribble(&guest, 1);
    let slow = there.text.replace("qmp =", "limit-read = \"64KiB\"\nqmp =");
    fs::write(there.host.config(), slow).expect("a configuration");
    let running = spawn(there.command("2040-03-02T03:05:00Z", &[]));
    wait_until(WAIT, "its backup reads", || {
        guest.qmp_command("query-block-exports", &json!({})) != json!([])
    });
    signal(running.pid(), Signal::SIGKILL);
    finish(running);
    wait_until(WAIT, "its backup has cleaned up", || there.host.undo_records() == 0);
    assert_guest_is_free(&guest, &["vda"]);
    let events = there.host.folder().join("events");
    let script = there.host.folder().join("tell");
    fs::write(&script, format!("#!/bin/sh\ncat >> {}\n", events.display())).expect("a script");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("a file of ours");
    there.configure(&format!("[[alerts.command]]\nrun = [{script:?}]\n"));
    // It is caught up once, and people are told.
    let next = there.steps("2040-03-02T03:10:00Z");
    assert_eq!(next[0]["figures"]["incremental"], true, "{next:?}");
    let told = fs::read_to_string(&events).expect("somebody is told");
    assert!(told.contains("did not come to its end"), "{told}");
    assert_eq!(there.done("2040-03-02T03:15:00Z"), []);
    there.host.assert_holds(there.host.list().last().expect("a snapshot"), &contents);
    there.host.assert_nothing_left();
}

#[test]
fn nothing_runs_while_jobs_are_paused() {
    let Some((guest, _)) = machine() else { return };
    let there = Unattended::new(&[("web", &guest.qmp())], "verify = false");
    there.run_at(MORNING, &["--pause", "2h"]);
    let paused = there.steps("2040-03-01T05:04:00Z");
    assert_eq!(paused, [json!({"paused": true, "until": "2040-03-01T05:05:00Z"})]);
    assert_eq!(there.done("2040-03-01T05:06:00Z").len(), 1, "the pause is over");
    there.run_at("2040-03-02T00:00:00Z", &["--pause"]);
    assert_eq!(there.steps("2040-03-09T03:05:00Z")[0]["paused"], true);
    assert_eq!(lines(&there.run_at(MORNING, &["--resume"])), [json!({"paused": false})]);
    assert_eq!(there.done("2040-03-09T03:05:00Z").len(), 1);
}

#[test]
fn snapshots_are_thinned_out_by_the_rules_of_the_job() {
    let Some((guest, mut contents)) = machine() else { return };
    let there = Unattended::new(&[("web", &guest.qmp())], "keep = { last = 2 }\nverify = false");
    // Another host's backups in the same repository are none of its business.
    there.host.backup(&guest, &["--name", "theirs"]);
    for day in 1..=4 {
        contents.scribble(&guest, day);
        let done = there.done(&format!("2040-03-0{day}T03:05:00Z"));
        assert_eq!(done, pairs(&[("backup", "done"), ("forget", "done")]));
    }
    let left = there.host.list();
    let names: Vec<&str> = left.iter().map(|line| text(line, "domain")).collect();
    assert_eq!(names, ["theirs", "web", "web"]);
    there.host.assert_holds(&left[2], &contents);
}

#[test]
fn p4_what_is_proved_to_be_sound_by_hand_is_well_at_once() {
    let Some((guest, _)) = machine() else { return };
    let job = "verify = { schedule = \"every 15 min\", read-all-in = \"30min\" }";
    let there = Unattended::new(&[("web", &guest.qmp())], job);
    assert_eq!(there.done(MORNING), pairs(&[("backup", "done"), ("verify", "done")]));
    let len = |pack: &PathBuf| fs::metadata(pack).expect("a file").len();
    let pack = packs(&there.host).into_iter().max_by_key(len).expect("a pack");
    let content = fs::read(&pack).expect("a pack");
    let mut damaged = content.clone();
    damaged[content.len() / 2] ^= 1;
    fs::write(&pack, &damaged).expect("a damaged pack");
    // One of two parts has it.
    let mut turns =
        ["03:20", "03:35", "03:50"].map(|at| format!("2040-03-01T{at}:00Z")).into_iter();
    let found = turns.by_ref().find(|at| there.run_at(at, &[]).code != Some(0));
    assert!(found.is_some() && turns.len() > 0, "{found:?}");
    assert_says(&there.host.run(["verify", "--read-data"]), 1, "1 problem");
    fs::write(&pack, &content).expect("it is mended");

    there.host.ok(["verify", "--read-data"]);

    // The other part, whose turn it is, and nothing else.
    let next = turns.next().expect("one is left");
    assert_eq!(there.done(&next), pairs(&[("verify", "done")]));
}

#[test]
fn p4_what_a_first_backup_left_is_no_alarm_and_snapshots_that_vanished_are() {
    let Some((guest, _)) = machine() else { return };
    let there =
        Unattended::new(&[("web", &guest.qmp())], "verify = false\nretries = 0\nprune = \"04:00\"");
    let made = there.host.backup(&guest, &[]);
    let folder = there.host.repository();
    let snapshot = folder.join("snapshots").join(text(&made, "id"));
    fs::remove_file(snapshot).expect("as if it had not come so far");
    let before = packs(&there.host);
    drop(guest);
    assert_ne!(there.run_at(MORNING, &[]).code, Some(0), "its machine is away");

    let first = there.steps("2040-03-01T04:05:00Z");

    assert_eq!((&first[0]["work"], &first[0]["outcome"]), (&json!("prune"), &json!("done")));
    assert!(text(&first[0], "text").contains("no snapshot yet"), "{first:?}");
    let state = there.host.state().join("jobs.json");
    let known = fs::read_to_string(&state).expect("it was kept");
    let seen = known.replace("\"had_snapshots\": false", "\"had_snapshots\": true");
    assert_ne!(known, seen);
    fs::write(&state, seen).expect("it had some");

    let second = lines(&there.run_at("2040-03-02T04:05:00Z", &[]));

    let prune = second.iter().find(|step| step["work"] == "prune").expect("it was tried");
    assert_eq!(prune["outcome"], "failed", "{prune:?}");
    assert!(text(prune, "text").contains("but not one snapshot: nothing was removed"), "{prune:?}");
    assert_eq!(packs(&there.host), before);
}

#[test]
fn nothing_is_begun_where_it_cannot_be_remembered() {
    let nobody = Path::new("/run/no-such.qmp");
    let there = Unattended::new(&[("web", nobody)], "retries = 0");
    // Something that can be neither read nor replaced.
    let state = there.host.state().join("jobs.json");
    fs::create_dir_all(state.join("mine")).expect("a folder");

    let refused = there.run_at(MORNING, &[]);

    assert_says(&refused, 1, &format!("cannot keep the state of jobs in {}", state.display()));
    assert!(refused.stderr.contains("jobs may run once more than due"), "{refused:?}");
    assert_eq!(lines(&refused), [] as [Value; 0], "it would be done again and again");
    assert!(state.join("mine").is_dir());
    // Mended, or damaged so that it can be replaced, it goes on.
    fs::remove_dir_all(&state).expect("a folder");
    fs::write(&state, "{\"jobs\": 3").expect("half a file");
    let tried = lines(&there.run_at("2040-03-01T03:10:00Z", &[]));
    assert_eq!((&tried[0]["work"], &tried[0]["outcome"]), (&json!("backup"), &json!("failed")));
    assert_eq!(there.done("2040-03-01T03:15:00Z"), [], "it was tried, and that is known");
}

#[test]
fn config_check_says_in_words_what_will_happen_and_when() {
    let nobody = Path::new("/run/no-such.qmp");
    let there = Unattended::new(
        &[("web", nobody), ("db", nobody)],
        "keep = { daily = 14 }\nverify = { read-all-in = \"30d\" }\nwindow = \"2h\"",
    );
    let told = there.host.ok(["config", "check"]);
    for words in [
        "kvmsnap.toml makes sense",
        "Repository main: ",
        "Job nightly: 03:00.",
        "Next: ",
        " 03:00 UTC",
        "at most 2 h after its time",
        "Backs up db, web, one after the other.",
        "Into the repository main.",
        "stay: daily 14.",
        "all data is read in 30 d",
        "Alarm when the last good backup of web is older than 2 d.",
    ] {
        assert!(told.contains(words), "{words}: {told}");
    }
    let example = there.host.ok(["config", "example"]);
    fs::write(there.host.config(), &example).expect("a configuration");
    assert!(there.host.ok(["config", "check"]).contains("No job is configured"));
    fs::write(there.host.config(), "[repository.main]\nlocaton = \"/srv\"\n")
        .expect("a configuration");
    assert_says(
        &there.host.run(["config", "check"]),
        2,
        "kvmsnap.toml:2:1: unknown field `locaton`",
    );
    assert_says(&there.host.run(["config", "check"]), 2, "did you mean `location`?");
    // A location with a slash needs no configuration: so backups come back where that is broken.
    there.host.ok(["list"]);
}

/// Random enough to kill at, and the same each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

#[test]
fn p3_p6_three_hosts_share_a_repository_that_is_pruned_and_copied_and_all_are_killed_at_random() {
    let job = "keep = { last = 2 }\nverify = false\nretries = 4";
    let mut hosts = Vec::new();
    let (first, replica) = (Host::new(), Host::without_repository());
    fs::write(replica.password_file(), "another horse\n").expect("a file of ours");
    replica.ok(["repository", "init"]);
    let copy = || {
        let mut command = first.command(["copy", "--to"]);
        command.arg(replica.repository());
        command.arg("--to-password-file").arg(replica.password_file());
        command
    };
    // What each snapshot must hold, by its domain and its point in time.
    let mut recorded: BTreeMap<(String, String), Contents> = BTreeMap::new();
    for (index, name) in ["web", "db", "mail"].into_iter().enumerate() {
        let Some((guest, contents)) = machine() else { return };
        let host = first.neighbour();
        let there = Unattended::on(host, &[(name, &guest.qmp())], job);
        hosts.push((there, guest, contents, index + 1));
    }
    let mut dice = Dice(20_261_121);
    for day in 1..=3 {
        let at = format!("2040-03-0{day}T03:05:00Z");
        let mut running = Vec::new();
        for (there, guest, contents, turn) in &mut hosts {
            contents.scribble(guest, *turn);
            *turn += 3;
            running.push(spawn(there.command(&at, &[])));
        }
        running.push(spawn(first.command(["prune", "--wait", "5", "--max-unused", "0%"])));
        running.push(spawn(copy()));
        // Up to three of the five are killed, as by a power cut.
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(dice.below(800)));
            let victim = usize::try_from(dice.below(5)).expect("it is small");
            signal(running[victim].pid(), Signal::SIGKILL);
        }
        running.into_iter().for_each(|it| drop(finish(it)));
        for (there, guest, ..) in &hosts {
            wait_until(WAIT, "what was killed is undone", || there.host.undo_records() == 0);
            assert_guest_is_free(guest, &["vda"]);
        }
        note(&mut recorded, &first, &hosts);
    }

    for (there, guest, contents, turn) in &mut hosts {
        contents.scribble(guest, *turn);
        let steps = there.steps("2040-03-09T03:05:00Z");
        assert_eq!(steps[0]["outcome"], "done", "{steps:?}");
    }
    note(&mut recorded, &first, &hosts);
    for domain in ["web", "db", "mail"] {
        let made = recorded.keys().filter(|(of, _)| of == domain).count();
        let left = first.list().iter().filter(|line| line["domain"] == domain).count();
        assert_eq!(left, made.min(2), "by the rules of {domain}");
    }
    first.ok(["prune", "--max-unused", "0%"]);
    let copied = finish(spawn(copy()));
    assert_eq!(copied.code, Some(0), "{copied:?}");
    for host in [&first, &replica] {
        host.assert_restic_is_content();
        let listed = host.list();
        assert!(listed.len() >= 3, "the last of each: {listed:?}");
        listed.iter().for_each(|line| host.assert_holds(line, &recorded[&moment(line)]));
    }
}

fn moment(snapshot: &Value) -> (String, String) {
    (word(snapshot, "domain"), word(snapshot, "time"))
}

/// Notes what the guests of new snapshots hold: as long as nothing was written since.
fn note(
    recorded: &mut BTreeMap<(String, String), Contents>,
    repository: &Host,
    hosts: &[(Unattended, Guest, Contents, usize)],
) {
    for line in repository.list() {
        let socket = |there: &Unattended| {
            there.text.contains(&format!("[domain.{}]", text(&line, "domain")))
        };
        let of_it = hosts.iter().find(|(there, ..)| socket(there)).expect("it is one of them");
        recorded.entry(moment(&line)).or_insert_with(|| of_it.2.clone());
    }
}

#[test]
fn snapshots_are_copied_to_a_replica_with_rules_of_its_own() {
    let Some((guest, mut contents)) = machine() else { return };
    let there = Unattended::new(
        &[("web", &guest.qmp())],
        "keep = { last = 1 }\ncopy = [{ to = \"replica\", keep = { last = 3 } }]\nverify = false",
    );
    let replica = there.host.folder().join("replica");
    let replica_text = replica.to_str().expect("a plain path");
    there.host.ok(["repository", "init", "--repository", replica_text]);
    let password = there.host.password_file();
    there.configure(&format!(
        "[repository.replica]\nlocation = {replica:?}\npassword-file = {password:?}\n"
    ));
    for day in 1..=4 {
        contents.scribble(&guest, day);
        let done = there.done(&format!("2040-03-0{day}T03:05:00Z"));
        let works: Vec<&str> = done.iter().map(|(work, _)| work.as_str()).collect();
        assert_eq!(works, ["backup", "copy to replica", "forget", "forget"]);
        assert!(done.iter().all(|(_, outcome)| outcome == "done"), "{done:?}");
    }
    let copies = there.host.ok(["list", "--json", "--repository", replica_text]);
    assert_eq!(copies.lines().count(), 3, "{copies}");
    assert!(there.host.list().len() < 3, "there are fewer at home");
}

#[test]
fn a_job_looks_after_the_domains_of_libvirt_that_its_patterns_mean() {
    let Some(libvirt) = Libvirt::start() else { return };
    // Names that nobody else's patterns mean.
    let own = std::process::id();
    let plan = |name: &str| {
        let disk = |name| Disk::new(name, SIZE);
        let guest = Guest::without_os().name(&format!("{name}-{own}"));
        guest.disk(disk("vda")).disk(disk("vdb")).under_libvirt()
    };
    let mut web = Scene::of(plan("web"), &["vda"], SIZE, &libvirt);
    let (db, spare) = (plan("db").define(&libvirt), plan("spare").define(&libvirt));
    web.domain.start();
    let configure = |host: &Host, more: &str| {
        let config = format!(
            "[repository.main]\nlocation = {:?}\npassword-file = {:?}\n\
             [run]\nidle-io = false\n[alerts.log]\nenabled = false\n\
             [job.nightly]\nschedule = \"03:00\"\ntimezone = \"UTC\"\nretries = 0\n\
             domains = [\"*-{own}\"]\nexclude = [\"*-spare-*\"]\norder = [\"*-web-*\"]\n\
             keep = {{ last = 1 }}\nprune = \"sunday 05:00\"\nverify = {{ read-all-in = \"2d\" }}\n\
             [domain.\"*-db-{own}\"]\nmax-age = \"1s\"\n\
             [domain.\"*-web-{own}\"]\nexclude-disks = [\"vdb\"]\n{more}",
            host.repository(),
            host.password_file(),
        );
        fs::write(host.config(), config).expect("a configuration");
    };
    configure(&web.host, "");
    let run = |host: &Host, at: &str| {
        let outcome = finish(spawn(run_command(host, at, &[])));
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        lines(&outcome)
    };
    let works = |steps: &[Value]| -> Vec<String> {
        assert!(steps.iter().all(|step| step["outcome"] == "done"), "{steps:?}");
        steps.iter().map(|step| word(step, "work")).collect()
    };

    let thursday = run(&web.host, "2040-03-01T03:05:00Z");

    assert_eq!(works(&thursday), ["backup", "backup", "forget", "verify"]);
    assert_eq!(thursday[0]["domain"], *web.domain.name(), "it is the first of them");
    assert_eq!(thursday[1]["domain"], *db.name(), "also one that is shut off");
    let listed = web.host.list();
    assert_eq!(listed[0]["disks"].as_array().map(Vec::len), Some(1), "{listed:?}");
    assert_eq!(listed[1]["disks"].as_array().map(Vec::len), Some(2), "{listed:?}");

    web.scribble();
    // Another part of the data, and the day before is dropped.
    let sunday = run(&web.host, "2040-03-04T03:05:00Z");
    assert_eq!(works(&sunday), ["backup", "backup", "forget", "verify"]);
    assert_eq!(sunday[0]["figures"]["incremental"], true, "{sunday:?}");
    assert!(text(&sunday[2], "text").contains("2 snapshots dropped, 2 stay"), "{sunday:?}");
    assert!(text(&sunday[3], "text").contains(" read"), "{sunday:?}");
    let host = &web.host;
    let bytes = || {
        let line: Value =
            serde_json::from_str(&host.ok(["repository", "size", "--json"])).expect("an object");
        line["bytes"].as_u64().expect("a count")
    };
    let before = bytes();
    assert_eq!(
        works(&run(&web.host, "2040-03-04T05:05:00Z")),
        ["forget", "prune"],
        "its own time has come"
    );
    assert!(bytes() < before, "{before} bytes stay");
    assert_eq!(works(&run(&web.host, "2040-03-04T05:10:00Z")), [""; 0]);
    let listed = host.list();
    let of_web = listed.iter().find(|line| line["domain"] == *web.domain.name());
    host.assert_holds(of_web.expect("a snapshot"), &web.contents);
    host.assert_restic_is_content();

    let names = [web.domain.name(), db.name(), spare.name()];
    let arguments = |more: &[&'static str]| [&["status"], more, &names[..]].concat();
    let told = host.ok(arguments(&["--json"]));
    let told: Vec<Value> =
        told.lines().map(|line| serde_json::from_str(line).expect("an object")).collect();
    let of = |name: &str| told.iter().find(|line| line["domain"] == name).expect("a line");
    assert!(of(names[0])["due"].is_string() && of(names[0])["stale"].is_null(), "{told:?}");
    assert!(text(of(names[1]), "stale").contains("which may be 1 s"), "{told:?}");
    assert!(of(names[2])["due"].is_null() && of(names[2])["last"].is_null(), "{told:?}");
    let table = host.ok(arguments(&[]));
    assert!(table.contains("DUE") && table.contains("STALE"), "{table}");

    configure(&web.host, "limit-read = \"64KiB\"\n");
    web.domain.qemu_io("vda", "write -P 7 0 4M");
    let running = spawn(run_command(host, "2040-03-05T03:05:00Z", &[]));
    let job = || web.domain.try_virsh("backup-dumpxml", &[]).is_ok();
    let running = wait_with(running, "a job of libvirt", job);
    assert!(host.ok(["run", "--abort"]).contains("the run has ended"));
    let aborted = finish(running);
    assert_eq!(aborted.code, Some(130), "{aborted:?}");
    assert_eq!(lines(&aborted)[0]["outcome"], "aborted", "{aborted:?}");
    web.assert_clean();
    assert_eq!(host.list().len(), 2);
}
