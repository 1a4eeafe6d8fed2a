//! Checked names: what a guest, QEMU or a user calls a thing, before it may reach a path, a command
//! or a terminal.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name of a domain or disk in bytes; leaves room for suffixes within a file name's 255.
const NAME_LEN_MAX: usize = 200;

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// Nothing was given.
    #[error("the name is empty")]
    Empty,
    /// Longer than a file name can carry.
    #[error("the name has {len} bytes, at most {NAME_LEN_MAX} are allowed")]
    TooLong {
        /// Length in bytes.
        len: usize,
    },
    /// `.` and `..` mean folders.
    #[error("`{name}` names a folder")]
    Folder {
        /// What was given.
        name: String,
    },
    /// A leading dash reads like an option to whoever uses the restored files.
    #[error("{name:?} begins with a dash")]
    Dash {
        /// What was given.
        name: String,
    },
    /// A slash, a control character or another character that a file name must not carry.
    #[error("{name:?} holds the character {character:?}, which is not allowed in a name")]
    Character {
        /// What was given.
        name: String,
        /// The first character that is not allowed.
        character: char,
    },
}

fn check(name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    if name.len() > NAME_LEN_MAX {
        return Err(NameError::TooLong { len: name.len() });
    }
    if name == "." || name == ".." {
        return Err(NameError::Folder { name: name.to_owned() });
    }
    if name.starts_with('-') {
        return Err(NameError::Dash { name: name.to_owned() });
    }
    match name.chars().find(|c| matches!(c, '/' | '\\' | '\u{200e}'..='\u{202e}') || c.is_control())
    {
        Some(character) => Err(NameError::Character { name: name.to_owned(), character }),
        None => Ok(()),
    }
}

/// A text that somebody else wrote, as it may be shown on a terminal: without control characters and changes
/// of writing direction.
pub fn printable(text: &str) -> String {
    let is_bad = |c: char| {
        let turns = matches!(c, '\u{200e}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        c.is_control() || turns
    };
    let show = |c: char| match is_bad(c) {
        true => c.escape_default().to_string(),
        false => c.to_string(),
    };
    text.chars().map(show).collect()
}

macro_rules! checked_name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(name: &str) -> Result<Self, NameError> {
                check(name).map(|()| Self(name.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(name: String) -> Result<Self, NameError> {
                check(&name).map(|()| Self(name))
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

checked_name! {
    /// The name under which a machine is backed up; also the folder of its snapshots.
    DomainName
}
checked_name! {
    /// A disk by the target (libvirt) or device id (bare QEMU) that its owner knows it by.
    DiskName
}

/// A name for one run, random, so that nothing of two runs is ever confused: 16 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RunId(String);

impl RunId {
    /// Draws a new name.
    pub fn random() -> Self {
        Self(format!("{:016x}", rand::random::<u64>()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RunId {
    type Err = NameError;
    fn from_str(name: &str) -> Result<Self, NameError> {
        check(name).map(|()| Self(name.to_owned()))
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The names that kvmsnap's dirty bitmaps carry in a guest's images.
///
/// `kvmsnap-<repository>-<run>`: the first part tells whose chain it belongs to, so that several
/// repositories can be used in turn; the second is new for each backup, so that an image which was
/// replaced by an older copy of itself never looks unchanged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapNames {
    prefix: String,
}

impl BitmapNames {
    /// The names of one repository, from its id.
    pub fn of_repository(repository_id: &str) -> Self {
        let short = repository_id.get(..8).unwrap_or(repository_id);
        Self { prefix: format!("kvmsnap-{short}-") }
    }

    /// The bitmap that begins with the given run.
    pub fn begun_by(&self, run: &RunId) -> String {
        format!("{}{run}", self.prefix)
    }

    /// Whether a bitmap was made for this repository.
    pub fn owns(&self, bitmap: &str) -> bool {
        bitmap.strip_prefix(&self.prefix).is_some_and(|run| run.len() == 16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s15_names_that_are_paths_options_or_terminal_escapes_are_refused() {
        for bad in ["", ".", "..", "../etc", "a/b", "-rf", "a\nb", "a\u{1b}[2J", "a\u{202e}b"] {
            assert!(bad.parse::<DomainName>().is_err(), "{bad:?} was accepted");
        }
        assert!("x".repeat(201).parse::<DomainName>().is_err());
        for good in ["vm", "web 01", "ünï", "db.example.org", "_a-b"] {
            assert_eq!(good.parse::<DomainName>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn s15_what_is_printed_moves_no_cursor() {
        assert_eq!(printable("a\u{1b}[2Jb\n\u{9b}\u{202e}c"), "a\\u{1b}[2Jb\\n\\u{9b}\\u{202e}c");
        assert_eq!(printable("ünï 🙂"), "ünï 🙂");
    }

    #[test]
    fn bitmaps_of_other_repositories_are_not_ours() {
        let ours = BitmapNames::of_repository("0123456789abcdef");
        let name = ours.begun_by(&RunId::random());
        assert!(ours.owns(&name));
        assert!(!BitmapNames::of_repository("ffff456789abcdef").owns(&name));
        assert!(!ours.owns("kvmsnap-01234567-"));
        assert!(!ours.owns("backup-1"));
    }
}
