//! Sending a scratch to its disk while it fills.
//!
//! Linux leaves alone what was written to a file for half a minute, and then writes all of it at once. Whoever
//! writes to the file just then waits, which is the thread of QEMU that serves the guest.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use rustix::fs::{Advice, fadvise};

/// How often.
const EVERY: Duration = Duration::from_secs(2);

/// Sends what files hold to their disks again and again, on a thread of its own, until this is dropped.
#[derive(Debug)]
pub struct WriteBack {
    _ends_with_us: mpsc::Sender<()>,
}

impl WriteBack {
    /// Begins.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub fn begin(files: Vec<Arc<File>>) -> io::Result<Self> {
        let (ends_with_us, until) = mpsc::channel();
        thread::Builder::new().name("write back".to_owned()).spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = until.recv_timeout(EVERY) {
                for file in &files {
                    // A hint: what is not written is begun to be, and what is written gives its memory back.
                    let _ = fadvise(file, 0, None, Advice::DontNeed);
                }
            }
        })?;
        Ok(Self { _ends_with_us: ends_with_us })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::Command;
    use std::time::Instant;

    use super::*;

    #[test]
    fn p2_what_is_written_to_a_scratch_is_on_its_way_to_the_disk_within_seconds() {
        if Command::new("fincore").arg("--version").output().is_err() {
            // Past the test harness, which swallows what `eprintln!` says.
            io::stderr().write_all(b"SKIPPED: no fincore\n").unwrap();
            return;
        }
        // Where programs are built there is a disk, unlike in some `/tmp`.
        let program = std::env::current_exe().unwrap();
        let mut file = tempfile::NamedTempFile::new_in(program.parent().unwrap()).unwrap();
        file.write_all(&vec![7; 4 << 20]).unwrap();
        let path = file.path().to_owned();
        // Pages give their memory back only once they are on the disk.
        let in_memory = || {
            let told = Command::new("fincore").args(["-b", "-n", "-o", "RES"]).arg(&path).output();
            let told = String::from_utf8(told.unwrap().stdout).unwrap();
            told.trim().parse::<u64>().unwrap()
        };
        assert_eq!(in_memory(), 4 << 20);
        let _write_back = WriteBack::begin(vec![Arc::new(file.reopen().unwrap())]).unwrap();
        let start = Instant::now();
        while in_memory() > 0 {
            assert!(start.elapsed() < 10 * EVERY, "{} bytes wait in memory", in_memory());
            thread::sleep(Duration::from_millis(100));
        }
    }
}
