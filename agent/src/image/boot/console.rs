//! The serial console of a machine on trial: kept in a file, up to a limit, and watched for a login prompt.
//! What a guest writes is neither trusted to end nor shown as it is.

use std::fs::File;
use std::io::{self, Write};

use crate::names::printable;

/// The most that is kept: a guest may write without end.
const LOG_LEN_MAX: u64 = 4 << 20;
/// How much of the end is remembered.
const TAIL_LEN: usize = 16 << 10;
/// How many lines are shown of a machine that is not up, and how much of each.
const LINES_MAX: usize = 12;
const LINE_LEN_MAX: usize = 200;

/// What a serial console has said.
#[derive(Debug)]
pub(super) struct Console {
    log: File,
    room: u64,
    tail: Vec<u8>,
}

impl Console {
    /// A console that is kept in an empty file.
    pub(super) fn new(log: File) -> Self {
        Self { log, room: LOG_LEN_MAX, tail: Vec::new() }
    }

    /// Takes what it says next, and returns whether it asks for a login now.
    pub(super) fn take(&mut self, bytes: &[u8]) -> io::Result<bool> {
        let kept = bytes.len().min(usize::try_from(self.room).unwrap_or(usize::MAX));
        self.log.write_all(&bytes[..kept])?;
        self.room -= kept as u64;
        self.tail.extend_from_slice(bytes);
        let surplus = self.tail.len().saturating_sub(TAIL_LEN);
        self.tail.drain(..surplus);
        Ok(self.lines().iter().rev().take(2).any(|line| asks_for_login(line)))
    }

    /// Its last lines, as they may be shown.
    pub(super) fn last_lines(&self) -> Vec<String> {
        let mut lines = self.lines();
        lines.drain(..lines.len().saturating_sub(LINES_MAX));
        lines
            .iter()
            .map(|line| printable(&line.chars().take(LINE_LEN_MAX).collect::<String>()))
            .collect()
    }

    /// Its last lines without those that are empty and without what moves a cursor.
    fn lines(&self) -> Vec<String> {
        let text = String::from_utf8_lossy(&self.tail);
        let lines = text.split(['\n', '\r']).map(without_sequences);
        lines.filter(|line| !line.trim().is_empty()).collect()
    }
}

/// Whether a line is what `getty` prints: the name of the host and `login:`. The kernel may have written
/// behind it.
fn asks_for_login(line: &str) -> bool {
    let Some((before, after)) = line.split_once("login:") else { return false };
    let before = before.trim();
    let is_free = after.trim().is_empty() || after.trim_start().starts_with('[');
    is_free && !before.contains(char::is_whitespace) && before != "Last"
}

/// A line without terminal sequences: ESC, `[`, parameters, a letter (ECMA-48).
fn without_sequences(line: &str) -> String {
    let mut clean = String::new();
    let mut rest = line.chars().peekable();
    while let Some(c) = rest.next() {
        if c != '\u{1b}' {
            clean.push(c);
        } else if rest.next_if_eq(&'[').is_some() {
            while rest.next_if(|c| matches!(c, ' '..='?')).is_some() {}
            rest.next();
        } else {
            rest.next();
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console() -> Console {
        Console::new(tempfile::tempfile().unwrap())
    }

    #[test]
    fn a_login_prompt_is_seen_wherever_its_bytes_are_cut() {
        let text =
            b"\x1b[0;32m  OK  \x1b[0m Started Getty.\r\n\r\nDebian 12 web ttyS0\r\n\r\nweb login: ";
        for cut in 0..text.len() {
            let mut console = console();
            assert!(!console.take(&text[..cut]).unwrap() || cut > text.len() - 3, "{cut}");
            assert!(console.take(&text[cut..]).unwrap(), "{cut}");
        }
    }

    #[test]
    fn what_only_looks_like_a_prompt_is_none() {
        for line in
            ["Last login: Fri Nov 20", "starting login: now", "User Login Management", "login"]
        {
            assert!(!asks_for_login(line), "{line}");
        }
        for line in ["login: ", "web login:", "web login: [    9.1] usb 1-1: new device"] {
            assert!(asks_for_login(line), "{line}");
        }
    }

    #[test]
    fn s17_a_console_without_end_fills_no_disk_and_moves_no_cursor() {
        let mut console = console();
        let log = console.log.try_clone().unwrap();
        for _ in 0..100 {
            console.take(&[b'x'; 64 << 10]).unwrap();
        }
        console.take(b"\nkernel \x07panic\x1b[2J\x1b]0;title\n").unwrap();

        assert_eq!(log.metadata().unwrap().len(), LOG_LEN_MAX);
        let lines = console.last_lines();
        assert_eq!(lines[0].len(), LINE_LEN_MAX);
        assert_eq!(lines[1], "kernel \\u{7}panic0;title");
    }
}
