//! Numbered files that carry their own checksum: what a file system must hold after a restore.
//!
//! Each is written under a temporary name, synchronised and renamed, so at any instant those under their
//! final names are whole, and after a freeze without gaps: the file system itself says which instant
//! it shows.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::ops::Range;
use std::path::Path;
use std::thread;
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use crate::inside::Inside;

const DIGEST_LEN: usize = 32;
const CONTENT_LEN_MAX: u32 = 96 << 10;

/// What [`check_files`] found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FilesReport {
    /// The numbers of the files that are whole, in order.
    pub whole: Vec<u32>,
    /// The names of the files that are not.
    pub damaged: Vec<String>,
}

impl FilesReport {
    /// Asserts that the files from `first` on are there without damage and without a gap, at least
    /// `done_before` of them and at most `begun_after`; returns how many.
    ///
    /// # Panics
    ///
    /// When they are not.
    #[track_caller]
    pub fn assert_instant_between(&self, first: u32, done_before: u32, begun_after: u32) -> u32 {
        assert!(self.damaged.is_empty(), "{self}");
        let count = u32::try_from(self.whole.len()).expect("files have small numbers");
        assert!((first..first + count).eq(self.whole.iter().copied()), "a gap: {self}");
        assert!(
            (done_before..=begun_after).contains(&count),
            "{done_before}–{begun_after}: {self}"
        );
        count
    }
}

impl fmt::Display for FilesReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for number in &self.whole {
            writeln!(f, "whole {number}")?;
        }
        for name in &self.damaged {
            writeln!(f, "damaged {name}")?;
        }
        Ok(())
    }
}

/// Writes the files with these numbers, one after the other, each durable before the next.
///
/// # Errors
///
/// Whatever the file system says.
pub fn write_files(folder: &Path, numbers: Range<u32>, pause: Duration) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    for number in numbers {
        let temporary = folder.join("next");
        let mut file = File::create(&temporary)?;
        file.write_all(&content(number))?;
        file.sync_all()?;
        fs::rename(&temporary, folder.join(format!("{number:06}")))?;
        File::open(folder)?.sync_all()?;
        thread::sleep(pause);
    }
    Ok(())
}

/// Reads all files of [`write_files`] and compares each with what its name promises.
///
/// # Errors
///
/// When the folder cannot be read; a file that cannot is damaged.
pub fn check_files(folder: &Path) -> io::Result<FilesReport> {
    let mut report = FilesReport::default();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == "next" {
            continue;
        }
        let number = name.parse::<u32>().ok();
        match number.filter(|n| fs::read(entry.path()).is_ok_and(|bytes| bytes == content(*n))) {
            Some(number) => report.whole.push(number),
            None => report.damaged.push(name),
        }
    }
    report.whole.sort_unstable();
    report.damaged.sort();
    Ok(report)
}

/// A digest, and up to 96 KiB that follow from the number.
fn content(number: u32) -> Vec<u8> {
    let len = number.wrapping_mul(2_654_435_761) % CONTENT_LEN_MAX;
    let line = format!("file {number:06} of the oracle, ");
    let text: Vec<u8> = line.bytes().cycle().take(len.try_into().expect("it is short")).collect();
    let mut content = Sha256::digest(&text).to_vec();
    debug_assert_eq!(content.len(), DIGEST_LEN, "SHA-256");
    content.extend(text);
    content
}

impl Inside {
    /// Writes numbered files into a folder of the guest, each durable before the next.
    #[track_caller]
    pub fn write_files(&self, folder: &str, numbers: Range<u32>) {
        let Range { start, end } = numbers;
        self.sh(&format!("oracle files write {folder} {start} {end}"));
    }

    /// Checks the numbered files in a folder of the guest.
    #[track_caller]
    pub fn check_files(&self, folder: &str) -> FilesReport {
        let output = self.exec(&["oracle", "files", "check", folder]);
        assert!(output.code < 2, "the files of {folder} cannot be checked: {output:?}");
        let mut report = FilesReport::default();
        for line in output.stdout.lines() {
            match line.split_once(' ') {
                Some(("whole", number)) => report.whole.push(number.parse().expect("a number")),
                Some((_, name)) => report.damaged.push(name.to_owned()),
                None => {}
            }
        }
        report
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use super::{check_files, write_files};

    #[test]
    fn files_are_whole_until_one_is_damaged_or_missing() {
        let folder = tempfile::tempdir().unwrap();
        write_files(folder.path(), 1..20, Duration::ZERO).unwrap();
        let report = check_files(folder.path()).unwrap();
        assert_eq!(report.assert_instant_between(1, 19, 19), 19);
        fs::remove_file(folder.path().join("000005")).unwrap();
        let gap = check_files(folder.path()).unwrap();
        assert!(std::panic::catch_unwind(|| gap.assert_instant_between(1, 0, 19)).is_err());
        let file = folder.path().join("000007");
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, bytes).unwrap();
        assert_eq!(check_files(folder.path()).unwrap().damaged, ["000007"]);
    }
}
