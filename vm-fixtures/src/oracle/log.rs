//! The log of a load: what was issued and what was done, in order.
//!
//! Text, one event a line, so that a live one can be read at any moment:
//! `oracle 1 STREAM` and `region DISK FROM TO` at each start, `i SEQ DISK w|z|d OFFSET LEN` before
//! an operation, `d SEQ` once it is done. Numbers are decimal.

use std::collections::HashSet;
use std::io;
use std::path::Path;

use super::load::Region;

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// Writes blocks.
    Write,
    /// Makes blocks zero.
    Zero,
    /// Discards blocks: afterwards they hold zeros or what they held before.
    Discard,
}

impl Kind {
    fn letter(self) -> &'static str {
        match self {
            Self::Write => "w",
            Self::Zero => "z",
            Self::Discard => "d",
        }
    }
}

/// One operation of a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation {
    /// Its place in the sequence, from 1.
    pub seq: u64,
    /// The disk's number.
    pub disk: u64,
    /// What it does.
    pub kind: Kind,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub len: u64,
}

/// One line of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The operation may take effect from here on.
    Issued(Operation),
    /// The operation with this sequence number has taken effect.
    Done(u64),
}

/// A log that was read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Log {
    /// The stream of its blocks.
    pub stream: u64,
    /// The regions that belong to the oracle; zero before the first operation.
    pub regions: Vec<Region>,
    /// What happened, in order.
    pub events: Vec<Event>,
}

impl Log {
    /// Reads a log file; a last line that is still being written does not count.
    pub fn read(path: &Path) -> io::Result<Self> {
        Self::parse(&String::from_utf8_lossy(&std::fs::read(path)?))
    }

    /// Reads the text of a log.
    pub fn parse(text: &str) -> io::Result<Self> {
        let mut log = Self::default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let mut lines = whole.lines().peekable();
        while let Some(line) = lines.next() {
            // A writer that was killed leaves half a line; the next one starts with an empty one.
            let cut = lines.peek().is_some_and(|next| next.is_empty());
            if !line.is_empty() && log.add_line(line).is_none() && !cut {
                let message = format!("no line of the oracle's log: `{line}`");
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
        }
        Ok(log)
    }

    fn add_line(&mut self, line: &str) -> Option<()> {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |word: &str| word.parse::<u64>().ok();
        match words[..] {
            ["oracle", "1", stream] => self.stream = number(stream)?,
            ["region", disk, from, to] => {
                let region = Region { disk: number(disk)?, from: number(from)?, to: number(to)? };
                if !self.regions.contains(&region) {
                    self.regions.push(region);
                }
            }
            ["i", seq, disk, kind, offset, len] => self.events.push(Event::Issued(Operation {
                seq: number(seq)?,
                disk: number(disk)?,
                kind: [Kind::Write, Kind::Zero, Kind::Discard]
                    .into_iter()
                    .find(|k| k.letter() == kind)?,
                offset: number(offset)?,
                len: number(len)?,
            })),
            ["d", seq] => self.events.push(Event::Done(number(seq)?)),
            _ => return None,
        }
        Some(())
    }

    /// The highest sequence number that was issued, 0 before the first.
    pub fn issued(&self) -> u64 {
        issued(&self.events)
    }

    /// The highest sequence number up to which everything is done, 0 before the first.
    pub fn acked(&self) -> u64 {
        acked(&self.events)
    }

    /// What comes first in the text of a log.
    pub(super) fn header(stream: u64, regions: &[Region]) -> String {
        let region = |r: &Region| format!("region {} {} {}\n", r.disk, r.from, r.to);
        let regions: String = regions.iter().map(region).collect();
        format!("\noracle 1 {stream}\n{regions}")
    }
}

impl Event {
    /// Its line, with the line's end.
    pub(super) fn line(&self) -> String {
        match self {
            Self::Done(seq) => format!("d {seq}\n"),
            Self::Issued(Operation { seq, disk, kind, offset, len }) => {
                format!("i {seq} {disk} {} {offset} {len}\n", kind.letter())
            }
        }
    }
}

pub(super) fn issued(events: &[Event]) -> u64 {
    let seq = |event: &Event| match event {
        Event::Issued(operation) => Some(operation.seq),
        Event::Done(_) => None,
    };
    events.iter().filter_map(seq).max().unwrap_or(0)
}

pub(super) fn acked(events: &[Event]) -> u64 {
    let mut done = HashSet::new();
    let mut acked = 0;
    for event in events {
        if let Event::Done(seq) = event {
            done.insert(*seq);
        }
        while done.remove(&(acked + 1)) {
            acked += 1;
        }
    }
    acked
}

#[cfg(test)]
mod tests {
    use super::{Event, Kind, Log, Operation};
    use crate::oracle::Region;

    #[test]
    fn a_log_is_read_as_it_was_written() {
        let regions = [Region { disk: 0, from: 0, to: 1 << 20 }];
        let operation = Operation { seq: 1, disk: 0, kind: Kind::Zero, offset: 4096, len: 8192 };
        let events = vec![Event::Issued(operation), Event::Done(1)];
        let mut text = Log::header(9, &regions);
        text.extend(events.iter().map(Event::line));
        let log = Log::parse(&text).unwrap();
        assert_eq!(log, Log { stream: 9, regions: regions.to_vec(), events });
        assert_eq!((log.acked(), log.issued()), (1, 1));
    }

    #[test]
    fn what_a_killed_writer_left_is_skipped_and_nonsense_is_not() {
        let log = Log::parse(
            "\noracle 1 9\ni 1 0 w 0 4096\nd 1\ni 2 0 w\n\noracle 1 9\ni 2 0 w 0 4096\nd",
        );
        let log = log.unwrap();
        assert_eq!((log.acked(), log.issued()), (1, 2));
        assert!(Log::parse("\noracle 1 9\ni 2 0 w\nd 2\n").is_err());
    }

    #[test]
    fn what_is_done_out_of_order_counts_once_the_gap_is_closed() {
        let issue = |seq| format!("i {seq} 0 w 0 4096\n");
        let text = ["\noracle 1 9\n", &issue(1), &issue(2), &issue(3), "d 3\nd 1\n"].concat();
        assert_eq!(Log::parse(&text).unwrap().acked(), 1);
        assert_eq!(Log::parse(&(text + "d 2\n")).unwrap().acked(), 3);
    }
}
