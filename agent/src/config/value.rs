//! Values with a check of their own.

use std::borrow::Borrow;
use std::cmp::Reverse;
use std::fmt;
use std::time::Duration;

use serde::Deserialize;

use crate::units::{human_duration, parse_bytes, parse_duration};

/// The shortest window of a job.
const WINDOW_MIN: Duration = Duration::from_secs(600);

/// A number of bytes above zero: `"20MiB"`, or a plain number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "NumberOrText")]
pub struct Size(u64);

#[derive(Deserialize)]
#[serde(untagged, expecting = "use a number with KiB, MiB or GiB")]
enum NumberOrText {
    Number(u64),
    Text(String),
}

impl Size {
    /// So many bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl TryFrom<NumberOrText> for Size {
    type Error = String;
    fn try_from(value: NumberOrText) -> Result<Self, String> {
        match value {
            NumberOrText::Number(bytes) => parse_bytes(&bytes.to_string()),
            NumberOrText::Text(text) => parse_bytes(&text),
        }
        .map(Self)
    }
}

/// A time that passes: `"26h"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Length(Duration);

impl Length {
    /// So long.
    pub const fn new(length: Duration) -> Self {
        Self(length)
    }

    /// As the standard library has it.
    pub fn get(self) -> Duration {
        self.0
    }
}

impl TryFrom<String> for Length {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        parse_duration(&text).map(Self)
    }
}

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&human_duration(self.0))
    }
}

/// How long after its time a job may begin: longer than the time between two starts of the timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Window(Length);

impl Window {
    /// So long.
    pub fn get(self) -> Duration {
        self.0.get()
    }
}

impl TryFrom<String> for Window {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let length = Length::try_from(text)?;
        match length.get() < WINDOW_MIN {
            true => Err("a window is 10 min or more: a run begins every few minutes".to_owned()),
            false => Ok(Self(length)),
        }
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a repository or job is called: a word that is no path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Name(String);

impl TryFrom<String> for Name {
    type Error = String;
    fn try_from(name: String) -> Result<Self, String> {
        let is_bad = |c: char| c == '/' || c.is_whitespace() || c.is_control();
        match name.is_empty() || name.starts_with(['-', '.']) || name.contains(is_bad) {
            true => Err(format!("{name:?} is no name: use letters, digits and dashes")),
            false => Ok(Self(name)),
        }
    }
}

impl Name {
    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of a domain or a pattern of names: `*`, `?`, `[a-c]`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Pattern(glob::Pattern);

impl Pattern {
    /// All names.
    pub fn all() -> Self {
        Self(glob::Pattern::new("*").expect("it is one"))
    }

    /// Whether it means this domain. A name may look like a pattern.
    pub fn matches(&self, name: &str) -> bool {
        self.0.as_str() == name || self.0.matches(name)
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    /// Whether it may mean several.
    pub fn is_open(&self) -> bool {
        self.as_str().contains(['*', '?', '['])
    }

    /// How little it says of a domain that it means: the name itself says most, then the pattern with the
    /// most characters that stand for themselves.
    pub fn vagueness(&self, name: &str) -> impl Ord + use<> {
        let plain = self.as_str().chars().filter(|c| !matches!(c, '*' | '?' | '[' | ']')).count();
        (self.as_str() != name, Reverse(plain), self.as_str().to_owned())
    }
}

impl TryFrom<String> for Pattern {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        glob::Pattern::new(&text)
            .map(Self)
            .map_err(|error| format!("`{text}` is no pattern of names: {}", error.msg))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
