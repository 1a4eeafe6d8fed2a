//! A paced load that measures how long each of its operations takes, for the benchmarks.

use std::fs::{self, OpenOptions};
use std::io::{self, Seek as _, SeekFrom, Write};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::fcntl::OFlag;

use crate::inside::Inside;

/// Bytes of one operation.
const BLOCK_LEN: usize = 4096;
/// Operations under way at once, each with its share of the rate.
const WORKERS: u32 = 4;
/// The file that ends a load in a guest.
const ENOUGH: &str = "/tmp/enough";
/// How long such a load may take to begin or to end.
const END_TIMEOUT: Duration = Duration::from_secs(180);

/// Random reads and writes of 4 KiB on a whole device, past the page cache.
///
/// Each operation is due at its own moment. One that is late because the one before it took long is
/// measured from its own issue, and the pace is kept from there on.
#[derive(Debug, Clone)]
pub struct PacedLoad {
    /// The device; what is on it is lost.
    pub device: PathBuf,
    /// Operations a second, reads and writes in equal parts.
    pub rate: u32,
    /// It ends when this file appears.
    pub until: PathBuf,
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    issued: Duration,
    latency: Duration,
}

impl PacedLoad {
    /// Runs to its end, then writes one line with the start in microseconds since 1970 by this
    /// machine's clock, and one line for each operation: microseconds from the start to its issue, and
    /// from there to its end.
    ///
    /// # Errors
    ///
    /// The first error of the device, or of the output.
    pub fn run(&self, out: &mut impl Write) -> io::Result<()> {
        let started = Instant::now();
        let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let clock = clock.map_err(io::Error::other)?;
        let samples = thread::scope(|scope| {
            let workers: Vec<_> = (0..WORKERS)
                .map(|worker| scope.spawn(move || self.work(worker, started)))
                .collect();
            let outcomes =
                workers.into_iter().map(|worker| worker.join().expect("it cannot panic"));
            outcomes.collect::<Vec<_>>().into_iter().collect::<io::Result<Vec<_>>>()
        })?;
        let mut samples = samples.concat();
        samples.sort_unstable_by_key(|sample| sample.issued);
        let mut text = format!("{}\n", clock.as_micros());
        for Sample { issued, latency } in samples {
            text.push_str(&format!("{} {}\n", issued.as_micros(), latency.as_micros()));
        }
        out.write_all(text.as_bytes())
    }

    fn work(&self, worker: u32, started: Instant) -> io::Result<Vec<Sample>> {
        let mut options = OpenOptions::new();
        let direct = OFlag::O_DIRECT.bits();
        let mut device = options.read(true).write(true).custom_flags(direct).open(&self.device)?;
        let blocks = device.seek(SeekFrom::End(0))? / BLOCK_LEN as u64;
        if blocks == 0 {
            return Err(io::Error::other(format!("{} is empty", self.device.display())));
        }
        // O_DIRECT wants aligned memory.
        let mut memory = vec![0; 2 * BLOCK_LEN];
        let start = memory.as_ptr().align_offset(BLOCK_LEN);
        let block = &mut memory[start..start + BLOCK_LEN];
        let interval = Duration::from_secs(1) * WORKERS / self.rate.max(1);
        let mut due = started + interval * worker / WORKERS;
        let mut samples = Vec::new();
        while !is_there(&self.until) {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let offset = rand::random_range(0..blocks) * BLOCK_LEN as u64;
            let writes = rand::random::<bool>();
            if writes {
                rand::fill(&mut *block);
            }
            let issue = Instant::now();
            match writes {
                true => device.write_all_at(block, offset)?,
                false => device.read_exact_at(block, offset)?,
            }
            samples.push(Sample { issued: issue - started, latency: issue.elapsed() });
            due = (due + interval).max(issue);
        }
        Ok(samples)
    }
}

fn is_there(path: &Path) -> bool {
    fs::exists(path).unwrap_or(false)
}

/// A paced load that runs in a guest.
#[derive(Debug)]
#[must_use = "it runs until it is stopped"]
pub struct RunningPaced<'a> {
    guest: &'a Inside,
    pid: i64,
}

impl Inside {
    /// Starts `rate` reads and writes a second on a whole disk that nothing else is on, and waits for the
    /// first of them.
    #[track_caller]
    pub fn start_paced(&self, disk: &str, rate: u32) -> RunningPaced<'_> {
        let (device, rate) = (self.device_file(disk), rate.to_string());
        // What the kernel counts of it (Linux, Documentation/block/stat.rst).
        let counts = || self.sh(&format!("cat /sys/block/{}/stat", &device["/dev/".len()..]));
        let before = counts();
        let pid = self.spawn(&["oracle", "latency", &device, &rate, ENOUGH]);
        let deadline = Instant::now() + END_TIMEOUT;
        while counts() == before {
            assert!(Instant::now() < deadline, "the load has done nothing in {END_TIMEOUT:?}");
        }
        RunningPaced { guest: self, pid }
    }
}

impl RunningPaced<'_> {
    /// Ends it and returns the longest that any of its operations took, as the guest saw it.
    #[track_caller]
    pub fn longest(self) -> Duration {
        self.guest.write_file(ENOUGH, b"");
        let deadline = Instant::now() + END_TIMEOUT;
        let output = loop {
            if let Some(output) = self.guest.poll(self.pid) {
                break output;
            }
            assert!(Instant::now() < deadline, "the load still runs after {END_TIMEOUT:?}");
            thread::sleep(Duration::from_millis(20));
        };
        assert!(output.success(), "the load failed: {output:?}");
        let latency = |line: &str| line.split_once(' ')?.1.parse().ok();
        let longest = output.stdout.lines().skip(1).filter_map(latency).max();
        Duration::from_micros(longest.expect("it did something"))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn each_operation_is_told_and_the_pace_is_kept() {
        // Beside the program: the folder for temporary files may be a tmpfs without O_DIRECT.
        let program = std::env::current_exe().unwrap();
        let folder = tempfile::tempdir_in(program.parent().unwrap()).unwrap();
        let device = folder.path().join("device");
        File::create(&device).unwrap().set_len(1 << 20).unwrap();
        let until = folder.path().join("until");
        let load = PacedLoad { device, rate: 200, until: until.clone() };
        let mut out = Vec::new();
        let start = Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(500));
                File::create(&until).unwrap();
            });
            load.run(&mut out).unwrap();
        });
        let took = start.elapsed();
        let text = String::from_utf8(out).unwrap();
        let operations = text.lines().count() - 1;
        // Each worker begins with one.
        let most = 200.0 * took.as_secs_f64() + f64::from(WORKERS);
        assert!(operations > 0 && operations as f64 <= most, "{operations} operations in {took:?}");
        assert!(text.lines().skip(1).all(|line| line.split(' ').count() == 2), "{text}");
    }
}
