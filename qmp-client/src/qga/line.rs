//! Lines from a guest agent, all of whose bytes a hostile guest may choose.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::as_conversions)]

/// The sentinel of `guest-sync-delimited`: a byte that no UTF-8 text holds.
pub(super) const SENTINEL: u8 = 0xff;

/// What the bytes so far amount to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// A line. `marked`: it began with the sentinel, so it answers a synchronisation, not a command.
    Whole { marked: bool, bytes: Vec<u8> },
    /// A line exceeded the limit; the rest of it will be skipped.
    TooLong,
}

/// Collects a line. Holds at most `limit` bytes.
#[derive(Debug)]
pub(super) struct Collector {
    line: Vec<u8>,
    marked: bool,
    skipping: bool,
    limit: usize,
}

impl Collector {
    pub(super) fn new(limit: usize) -> Self {
        Self { line: Vec::new(), marked: false, skipping: false, limit }
    }

    /// Takes one byte into account. The sentinel discards what came before it on the line: the
    /// beginning of an answer whose end was lost.
    pub(super) fn take(&mut self, byte: u8) -> Option<Line> {
        match byte {
            SENTINEL => {
                self.reset();
                self.marked = true;
            }
            b'\n' => {
                let (skipped, marked) = (self.skipping, self.marked);
                let bytes = self.reset();
                let blank = bytes.iter().all(u8::is_ascii_whitespace);
                return (!skipped && !blank).then_some(Line::Whole { marked, bytes });
            }
            _ if self.skipping => {}
            _ if self.line.len() >= self.limit => {
                self.reset();
                self.skipping = true;
                return Some(Line::TooLong);
            }
            _ => self.line.push(byte),
        }
        None
    }

    fn reset(&mut self) -> Vec<u8> {
        (self.marked, self.skipping) = (false, false);
        std::mem::take(&mut self.line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(limit: usize, bytes: &[u8]) -> Vec<Line> {
        let mut collector = Collector::new(limit);
        bytes.iter().filter_map(|&byte| collector.take(byte)).collect()
    }

    fn whole(marked: bool, text: &str) -> Line {
        Line::Whole { marked, bytes: text.as_bytes().to_vec() }
    }

    #[test]
    fn the_sentinel_cuts_off_a_lost_answer() {
        let found = lines(99, b"{\"return\": {\"ha\xff{\"return\":1}\n\n{\"return\":2}\r\n");
        assert_eq!(found, [whole(true, "{\"return\":1}"), whole(false, "{\"return\":2}\r")]);
    }

    #[test]
    fn a_long_line_is_told_once_and_skipped() {
        let found = lines(4, b"aaaa\nbbbbb\nccccccccccccccc\xffdd\n");
        let expected = [whole(false, "aaaa"), Line::TooLong, Line::TooLong, whole(true, "dd")];
        assert_eq!(found, expected);
    }
}
