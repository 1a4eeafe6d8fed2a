//! A load inside a guest: it writes while the host backs up, and the host follows its log live.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::load::Load;
use super::log::Log;
use crate::guest_agent::Output;
use crate::inside::Inside;

const LOG_PORT: &str = "/dev/virtio-ports/org.kvmsnap.oracle.0";
/// How long the writer may take to start or to end what it has in flight.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(180);

/// A load that runs in a guest.
#[derive(Debug)]
#[must_use = "it runs until it is stopped"]
pub struct RunningLoad<'a> {
    guest: &'a Inside,
    pid: i64,
    /// The agent tells how a program ended only once.
    ended: Option<Output>,
}

impl Inside {
    /// Starts a load in the guest on whole disks, and waits for its first operation. The disks are
    /// numbered in this order; nothing else may be on them. It goes on after what the log of this
    /// machine holds already, which must have had the same disks.
    #[track_caller]
    pub fn start_load(&self, load: &Load, disks: &[&str]) -> RunningLoad<'_> {
        let before = self.oracle_log();
        let mut command = vec!["oracle".to_owned(), "write".to_owned()];
        let mut option = |name: &str, value: String| command.extend([name.to_owned(), value]);
        for (index, id) in disks.iter().enumerate() {
            option("--disk", format!("{index}={}", self.device_file(id)));
        }
        let load = load.clone().after(&before);
        option("--log", LOG_PORT.to_owned());
        option("--stream", load.stream.to_string());
        option("--seed", load.seed.to_string());
        option("--first-seq", load.first_seq.to_string());
        option("--depth", load.depth.to_string());
        option("--blocks-max", load.blocks_max.to_string());
        for (name, value) in [
            ("--count", load.count),
            ("--seconds", load.duration.map(|duration| duration.as_secs())),
            ("--rate", load.rate.map(u64::from)),
        ] {
            value.into_iter().for_each(|value| option(name, value.to_string()));
        }
        if load.mix {
            command.push("--mix".to_owned());
        }
        let pid = self.spawn(&command.iter().map(String::as_str).collect::<Vec<_>>());
        let mut running = RunningLoad { guest: self, pid, ended: None };
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        while self.oracle_log().acked() <= before.acked() {
            if let Some(output) = self.poll(pid) {
                assert!(output.success(), "the load ended at once: {output:?}");
                running.ended = Some(output);
                break;
            }
            assert!(Instant::now() < deadline, "the load has done nothing yet");
            std::thread::sleep(Duration::from_millis(20));
        }
        running
    }

    /// What the loads in this guest have done so far, also after the guest has died.
    ///
    /// Before a point in time take [`Log::acked`], afterwards [`Log::issued`]: the instant must lie
    /// between the two.
    #[track_caller]
    pub fn oracle_log(&self) -> Log {
        let path = self.oracle_log_path();
        Log::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// Where the host keeps that log.
    pub fn oracle_log_path(&self) -> PathBuf {
        self.folder().join("oracle.log")
    }
}

impl RunningLoad<'_> {
    /// Waits for the end of a load that has one.
    #[track_caller]
    pub fn wait(self, timeout: Duration) -> Log {
        let guest = self.guest;
        let output = self.end(timeout);
        assert!(output.success(), "the load failed: {output:?}");
        guest.oracle_log()
    }

    /// Ends the load and returns its log; what was in flight has been done by then, but may not be
    /// logged as done.
    #[track_caller]
    pub fn stop(self) -> Log {
        if self.ended.is_none() {
            self.guest.exec(&["kill", &self.pid.to_string()]);
        }
        let guest = self.guest;
        let output = self.end(SETTLE_TIMEOUT);
        let terminated = output.code == 128 + 15;
        assert!(terminated || output.success(), "the load failed: {output:?}");
        guest.oracle_log()
    }

    #[track_caller]
    fn end(self, timeout: Duration) -> Output {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(output) = self.ended.clone().or_else(|| self.guest.poll(self.pid)) {
                return output;
            }
            assert!(Instant::now() < deadline, "the load still runs after {timeout:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
