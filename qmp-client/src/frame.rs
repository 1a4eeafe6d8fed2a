//! Where one JSON object ends and the next begins, in a stream of bytes we do not trust.
//!
//! QEMU ends each object with CR LF, but prints it over many lines under `-qmp-pretty`; so objects are
//! told apart by their brackets. What is inside is judged by the JSON parser.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::as_conversions)]

use std::sync::Arc;

/// Deepest nesting accepted; one less than what `serde_json` refuses.
const DEPTH_MAX: usize = 127;
/// Capacity kept between messages; a rare long reply gives its memory back.
const CAPACITY_KEPT: usize = 1 << 20;

/// What is wrong with bytes that should have been a message.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Malformation {
    /// A message must be an object, this byte cannot begin one.
    #[error("byte {byte:#04x} where an object should begin")]
    NotAnObject {
        /// The byte found.
        byte: u8,
    },
    /// Brackets nested deeper than any honest message.
    #[error("nested deeper than {limit} levels")]
    TooDeep {
        /// The deepest nesting accepted.
        limit: usize,
    },
    /// The parser refused it.
    #[error("not JSON")]
    NotJson {
        /// Where and why.
        source: Arc<serde_json::Error>,
    },
    /// A JSON object, but neither `return` nor `error` is in it.
    #[error("an object that is no reply")]
    NotAReply,
}

impl From<serde_json::Error> for Malformation {
    fn from(source: serde_json::Error) -> Self {
        Self::NotJson { source: Arc::new(source) }
    }
}

/// Why no further object can be cut out of the stream.
#[derive(Debug, Clone)]
pub(crate) enum FrameError {
    TooLong { limit: usize },
    Malformed(Malformation),
}

/// Cuts a stream into objects. Holds at most `limit` bytes plus one `push`.
#[derive(Debug)]
pub(crate) struct Framer {
    buffer: Vec<u8>,
    /// Begin of the object that is being scanned, or of the blanks before it.
    start: usize,
    /// First byte not yet looked at.
    scanned: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
    limit: usize,
}

impl Framer {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            buffer: Vec::new(),
            start: 0,
            scanned: 0,
            depth: 0,
            in_string: false,
            escaped: false,
            limit,
        }
    }

    /// Appends what was read.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.scanned = self.scanned.saturating_sub(self.start);
        self.start = 0;
        if self.buffer.is_empty() && self.buffer.capacity() > CAPACITY_KEPT {
            self.buffer = Vec::new();
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole object, `None` if it has not arrived yet. After an error the stream is of no use.
    pub(crate) fn next(&mut self) -> Result<Option<&[u8]>, FrameError> {
        while let Some(&byte) = self.buffer.get(self.scanned) {
            self.scanned = self.scanned.saturating_add(1);
            let ends = self.step(byte).map_err(FrameError::Malformed)?;
            if self.scanned.saturating_sub(self.start) > self.limit {
                return Err(FrameError::TooLong { limit: self.limit });
            }
            if ends {
                let start = std::mem::replace(&mut self.start, self.scanned);
                return Ok(self.buffer.get(start..self.scanned));
            }
        }
        Ok(None)
    }

    /// Takes one byte into account; whether it ends an object.
    fn step(&mut self, byte: u8) -> Result<bool, Malformation> {
        if self.in_string {
            match (self.escaped, byte) {
                (true, _) => self.escaped = false,
                (false, b'\\') => self.escaped = true,
                (false, b'"') => self.in_string = false,
                (false, _) => {}
            }
            return Ok(false);
        }
        if self.depth == 0 {
            match byte {
                b'{' => {}
                b' ' | b'\t' | b'\r' | b'\n' => {
                    self.start = self.scanned;
                    return Ok(false);
                }
                _ => return Err(Malformation::NotAnObject { byte }),
            }
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => {
                self.depth = self.depth.saturating_add(1);
                if self.depth > DEPTH_MAX {
                    return Err(Malformation::TooDeep { limit: DEPTH_MAX });
                }
            }
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                return Ok(self.depth == 0);
            }
            _ => {}
        }
        Ok(false)
    }
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "tests index what they made")]
mod tests {
    use super::*;

    fn frames(framer: &mut Framer) -> Vec<String> {
        let mut found = Vec::new();
        while let Some(frame) = framer.next().unwrap() {
            found.push(String::from_utf8(frame.to_vec()).unwrap());
        }
        found
    }

    const STREAM: &str =
        "{\"a\": \"}\\\"{\\\\\"}\r\n {\n  \"b\": [\n    {}\n  ]\n}\r\n{\"c\":1}{\"d\":2}";

    #[test]
    fn objects_are_cut_wherever_the_reads_end() {
        let mut whole = Framer::new(100);
        whole.push(STREAM.as_bytes());
        let expected = frames(&mut whole);
        assert_eq!(expected.len(), 4);
        assert_eq!(expected[1], "{\n  \"b\": [\n    {}\n  ]\n}");
        for cut in 0..=STREAM.len() {
            let mut framer = Framer::new(100);
            framer.push(&STREAM.as_bytes()[..cut]);
            let mut found = frames(&mut framer);
            framer.push(&STREAM.as_bytes()[cut..]);
            found.extend(frames(&mut framer));
            assert_eq!(found, expected, "cut at {cut}");
        }
    }

    #[test]
    fn a_frame_may_be_as_long_as_the_limit_and_no_longer() {
        let mut framer = Framer::new(7);
        framer.push(b"{\"a\":1}\r\n{\"a\":1}");
        assert_eq!(frames(&mut framer).len(), 2);
        framer.push(b"{\"a\":11}");
        assert!(matches!(framer.next(), Err(FrameError::TooLong { limit: 7 })));
    }

    #[test]
    fn an_endless_string_is_refused_before_it_ends() {
        let mut framer = Framer::new(10);
        framer.push(b"{\"aaaaaaaaaaaaa");
        assert!(matches!(framer.next(), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn blanks_do_not_pile_up() {
        let mut framer = Framer::new(10);
        for _ in 0..100 {
            framer.push(b"\r\n \t\r\n \t");
            assert!(framer.next().unwrap().is_none());
        }
        assert!(framer.buffer.len() <= 8);
    }

    #[test]
    fn nesting_is_limited_to_what_the_parser_takes() {
        let nested = |depth: usize| {
            format!("{{\"a\":{}{}}}", "[".repeat(depth - 1), "]".repeat(depth - 1)).into_bytes()
        };
        let mut framer = Framer::new(10_000);
        framer.push(&nested(DEPTH_MAX));
        let frame = framer.next().unwrap().unwrap();
        serde_json::from_slice::<serde_json::Value>(frame).unwrap();
        framer.push(&nested(DEPTH_MAX + 1));
        assert!(matches!(
            framer.next(),
            Err(FrameError::Malformed(Malformation::TooDeep { limit: DEPTH_MAX }))
        ));
    }

    #[test]
    fn anything_but_an_object_is_refused_at_once() {
        let mut framer = Framer::new(100);
        framer.push(b"SSH-2.0");
        assert!(matches!(
            framer.next(),
            Err(FrameError::Malformed(Malformation::NotAnObject { byte: b'S' }))
        ));
    }
}
