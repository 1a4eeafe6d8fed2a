//! Folders and files as restic describes them: tree blobs of JSON.

use std::{fmt::Write, io};

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{BlobId, RepositoryError};

/// The bit of Go's `os.FileMode` that says "folder".
const MODE_DIR: u32 = 1 << 31;

/// One folder.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    /// What is in it, in byte order of the names.
    #[serde(deserialize_with = "null_is_default")]
    pub nodes: Vec<Node>,
}

/// One file or folder. A content list takes 32 bytes a chunk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its name in the folder.
    #[serde(serialize_with = "quote", deserialize_with = "unquote")]
    pub name: String,
    /// `file`, `dir`, `symlink`, …
    #[serde(rename = "type")]
    pub kind: NodeKind,
    /// Go's `os.FileMode`: the nine permission bits, and bit 31 for a folder.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub mode: u32,
    /// Time of the last change of the content.
    #[serde(default = "epoch", deserialize_with = "lenient_time")]
    pub mtime: Timestamp,
    /// Time of the last access.
    #[serde(default = "epoch", deserialize_with = "lenient_time")]
    pub atime: Timestamp,
    /// Time of the last change of the attributes.
    #[serde(default = "epoch", deserialize_with = "lenient_time")]
    pub ctime: Timestamp,
    /// Owner.
    #[serde(default)]
    pub uid: u32,
    /// Group.
    #[serde(default)]
    pub gid: u32,
    /// Owner's name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// Group's name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub group: String,
    /// Length of the content in bytes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub size: u64,
    /// Number of hard links.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub links: u64,
    /// The blobs of a file, in order; `None` for anything else.
    #[serde(default)]
    pub content: Option<Vec<BlobId>>,
    /// The tree of a folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subtree: Option<BlobId>,
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeKind {
    /// A regular file.
    File,
    /// A folder.
    Dir,
    /// A symbolic link; never written by kvmsnap.
    Symlink,
    /// A device, socket or the like; never written by kvmsnap.
    #[serde(other)]
    Other,
}

impl Node {
    /// A file of `size` bytes, readable by its owner only.
    pub fn file(name: &str, size: u64, content: Vec<BlobId>, mtime: Timestamp) -> Self {
        let (content, links) = (Some(content), 1);
        Self { size, content, links, ..Self::bare(name, NodeKind::File, 0o600, mtime) }
    }

    /// A folder, readable by its owner only.
    pub fn dir(name: &str, subtree: BlobId, mtime: Timestamp) -> Self {
        let mode = MODE_DIR | 0o700;
        Self { subtree: Some(subtree), ..Self::bare(name, NodeKind::Dir, mode, mtime) }
    }

    /// The blobs of a file, in order; none for anything else.
    pub fn content(&self) -> &[BlobId] {
        self.content.as_deref().unwrap_or_default()
    }

    fn bare(name: &str, kind: NodeKind, mode: u32, mtime: Timestamp) -> Self {
        Self {
            name: name.to_owned(),
            kind,
            mode,
            mtime,
            atime: mtime,
            ctime: mtime,
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            user: String::new(),
            group: String::new(),
            size: 0,
            links: 0,
            content: None,
            subtree: None,
        }
    }
}

impl Tree {
    /// A folder of these nodes, sorted as restic wants them.
    pub fn new(mut nodes: Vec<Node>) -> Self {
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        Self { nodes }
    }

    /// The node of this name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// Writes the content of the tree blob, always the same bytes.
    pub(crate) fn write_json(&self, mut to: impl io::Write) -> io::Result<()> {
        serde_json::to_writer(&mut to, self)?;
        to.write_all(b"\n")
    }

    pub(crate) fn from_json(id: &BlobId, json: &[u8]) -> Result<Self, RepositoryError> {
        serde_json::from_slice(json)
            .map_err(|source| RepositoryError::InvalidTree { id: *id, source: source.into() })
    }
}

fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Go writes `null` for an empty list.
fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

fn epoch() -> Timestamp {
    Timestamp::UNIX_EPOCH
}

/// Times of foreign files are shown only; an odd one must not make a folder unreadable.
fn lenient_time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Timestamp, D::Error> {
    let text = String::deserialize(deserializer)?;
    Ok(text.parse().unwrap_or(Timestamp::UNIX_EPOCH))
}

/// Names are quoted as Go's `strconv.Quote` does, so that any bytes fit into JSON.
fn quote<S: Serializer>(name: &str, serializer: S) -> Result<S::Ok, S::Error> {
    let mut quoted = String::with_capacity(name.len());
    for character in name.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            '\0'..=' ' | '\x7f' if character != ' ' => {
                write!(quoted, "\\x{:02x}", u32::from(character)).expect("strings take all");
            }
            _ => quoted.push(character),
        }
    }
    serializer.serialize_str(&quoted)
}

/// Undoes [`quote`]; bytes that are no UTF-8 become replacement characters, for they are only shown.
fn unquote<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let quoted = String::deserialize(deserializer)?;
    if !quoted.contains('\\') {
        return Ok(quoted);
    }
    unquoted(&quoted).ok_or_else(|| serde::de::Error::custom("a name is badly quoted"))
}

fn unquoted(quoted: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(quoted.len());
    let mut rest = quoted.chars();
    while let Some(character) = rest.next() {
        if character != '\\' {
            bytes.extend(character.encode_utf8(&mut [0; 4]).bytes());
            continue;
        }
        let number = |digits: usize, radix: u32, rest: &mut std::str::Chars<'_>| {
            let (head, tail) = rest.as_str().split_at_checked(digits)?;
            *rest = tail.chars();
            u32::from_str_radix(head, radix).ok()
        };
        let unicode = |code: u32| char::from_u32(code).map(String::from);
        match rest.next()? {
            'a' => bytes.push(7),
            'b' => bytes.push(8),
            'f' => bytes.push(12),
            'n' => bytes.push(b'\n'),
            'r' => bytes.push(b'\r'),
            't' => bytes.push(b'\t'),
            'v' => bytes.push(11),
            'x' => bytes.push(u8::try_from(number(2, 16, &mut rest)?).ok()?),
            'u' => bytes.extend(unicode(number(4, 16, &mut rest)?)?.bytes()),
            'U' => bytes.extend(unicode(number(8, 16, &mut rest)?)?.bytes()),
            same @ ('"' | '\'' | '\\') => bytes.extend(same.encode_utf8(&mut [0; 4]).bytes()),
            _ => return None,
        }
    }
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn json(tree: &Tree) -> Vec<u8> {
        let mut json = Vec::new();
        tree.write_json(&mut json).unwrap();
        json
    }

    fn tree(name: &str) -> Tree {
        let content = vec![BlobId([1; 32]), BlobId([2; 32])];
        let time = Timestamp::from_second(1_700_000_000).unwrap();
        let dir = Node::dir("d", BlobId([3; 32]), time);
        Tree::new(vec![dir, Node::file(name, 5, content, time)])
    }

    proptest! {
        #[test]
        fn trees_survive_the_round_trip(name in "\\PC{1,20}|[\\x00-\\x7f]{1,20}") {
            let tree = tree(&name);
            let json = json(&tree);
            prop_assert_eq!(Tree::from_json(&BlobId([0; 32]), &json).unwrap(), tree);
        }

        #[test]
        fn s16_odd_names_never_panic(name in "(\\\\|x|u|U|[0-9a-f]|\\PC){0,12}") {
            let _ = unquoted(&name);
        }
    }

    #[test]
    fn a_million_ids_are_parsed_fast() {
        let ids: Vec<_> = (0..1_000_000_u32).map(|n| BlobId::of(&n.to_le_bytes())).collect();
        let node = Node::file("vda.raw", 1 << 40, ids, Timestamp::UNIX_EPOCH);
        let json = json(&Tree::new(vec![node]));
        assert!(json.len() > 66_000_000);
        let start = std::time::Instant::now();
        let tree = Tree::from_json(&BlobId([0; 32]), &json).unwrap();
        assert_eq!(tree.nodes[0].content().len(), 1_000_000);
        // Far above what it takes, so that a busy machine does not fail it.
        assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
    }
}
