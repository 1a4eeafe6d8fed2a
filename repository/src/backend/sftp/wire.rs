//! SFTP's packets, version 3 (draft-ietf-secsh-filexfer-02) with OpenSSH's extensions (its `PROTOCOL`
//! file, section 4). No I/O.

/// The version that is spoken; OpenSSH knows no other.
pub(super) const VERSION: u32 = 3;
/// A packet from a server is at most this long; OpenSSH's own bound.
pub(super) const PACKET_LEN_MAX: usize = 256 << 10;
/// So much may be read or written by one request with any server.
pub(super) const DATA_LEN: usize = 32 << 10;

/// Replaces a file by another one at once.
pub(super) const POSIX_RENAME: &str = "posix-rename@openssh.com";
/// Makes a file durable.
pub(super) const FSYNC: &str = "fsync@openssh.com";

/// Tells how much room is left.
pub(super) const STATVFS: &str = "statvfs@openssh.com";

/// Numbers of statuses (section 7).
pub(super) mod status {
    pub(in super::super) const OK: u32 = 0;
    pub(in super::super) const EOF: u32 = 1;
    pub(in super::super) const NO_SUCH_FILE: u32 = 2;
    pub(in super::super) const PERMISSION_DENIED: u32 = 3;
    /// All that OpenSSH says of a full disk, a quota, or a file that exists.
    pub(in super::super) const FAILURE: u32 = 4;
    pub(in super::super) const NO_CONNECTION: u32 = 6;
    pub(in super::super) const CONNECTION_LOST: u32 = 7;
}

/// How a file is opened (section 6.3).
pub(super) mod open {
    pub(in super::super) const READ: u32 = 0x01;
    /// Write, create, and fail where there is one.
    pub(in super::super) const WRITE_NEW: u32 = 0x02 | 0x08 | 0x20;
}

const INIT: u8 = 1;
const VERSION_ANSWER: u8 = 2;
const OPEN: u8 = 3;
const CLOSE: u8 = 4;
const READ: u8 = 5;
const WRITE: u8 = 6;
const FSTAT: u8 = 8;
const OPENDIR: u8 = 11;
const READDIR: u8 = 12;
const REMOVE: u8 = 13;
const MKDIR: u8 = 14;
const STAT: u8 = 17;
const RENAME: u8 = 18;
const STATUS: u8 = 101;
const HANDLE: u8 = 102;
const DATA: u8 = 103;
const NAME: u8 = 104;
const ATTRS: u8 = 105;
const EXTENDED: u8 = 200;
const EXTENDED_REPLY: u8 = 201;

const ATTR_SIZE: u32 = 0x1;
const ATTR_UIDGID: u32 = 0x2;
const ATTR_PERMISSIONS: u32 = 0x4;
const ATTR_ACMODTIME: u32 = 0x8;
const ATTR_EXTENDED: u32 = 0x8000_0000;
const MODE_KIND: u32 = 0o170_000;
const MODE_FOLDER: u32 = 0o040_000;

/// What a client asks.
#[derive(Debug, Clone, Copy)]
pub(super) enum Request<'a> {
    Open { path: &'a str, how: u32 },
    Close { handle: &'a [u8] },
    Read { handle: &'a [u8], offset: u64, len: u32 },
    Write { handle: &'a [u8], offset: u64, data: &'a [u8] },
    LenOf { handle: &'a [u8] },
    Stat { path: &'a str },
    OpenFolder { path: &'a str },
    ReadFolder { handle: &'a [u8] },
    Remove { path: &'a str },
    MakeFolder { path: &'a str },
    Rename { from: &'a str, to: &'a str },
    Replace { from: &'a str, to: &'a str },
    Sync { handle: &'a [u8] },
    Room { path: &'a str },
}

/// What a server answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    Status(u32),
    Handle(Vec<u8>),
    Data(Vec<u8>),
    Names(Vec<Entry>),
    Attributes(Attributes),
    Room(Room),
}

/// What a file system has left for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) bytes: u64,
    /// It counts files, and can take no more of them.
    pub(super) no_files: bool,
}

/// A name in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Names that are no UTF-8 are none of ours.
    pub(super) name: String,
    pub(super) attributes: Attributes,
}

/// What is known of a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) size: Option<u64>,
    /// Seconds since 1970.
    pub(super) changed: Option<u32>,
    pub(super) is_folder: bool,
}

/// A packet that makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a packet that is not understood")]
pub(super) struct Malformed;

/// The first packet, whole.
pub(super) fn hello() -> Vec<u8> {
    let mut packet = vec![0, 0, 0, 5, INIT];
    packet.extend(VERSION.to_be_bytes());
    packet
}

/// The names of the extensions that a server offers, out of its first packet.
pub(super) fn read_hello(packet: &[u8]) -> Result<Vec<String>, Malformed> {
    let mut cursor = Cursor { bytes: packet };
    if cursor.u8()? != VERSION_ANSWER || cursor.u32()? != VERSION {
        return Err(Malformed);
    }
    let mut extensions = Vec::new();
    while !cursor.bytes.is_empty() {
        extensions.push(String::from_utf8_lossy(cursor.string()?).into_owned());
        cursor.string()?;
    }
    Ok(extensions)
}

/// Appends a request with its length.
pub(super) fn write(packet: &mut Vec<u8>, id: u32, request: &Request<'_>) {
    let start = packet.len();
    packet.extend([0; 4]);
    let kind = match request {
        Request::Open { .. } => OPEN,
        Request::Close { .. } => CLOSE,
        Request::Read { .. } => READ,
        Request::Write { .. } => WRITE,
        Request::LenOf { .. } => FSTAT,
        Request::Stat { .. } => STAT,
        Request::OpenFolder { .. } => OPENDIR,
        Request::ReadFolder { .. } => READDIR,
        Request::Remove { .. } => REMOVE,
        Request::MakeFolder { .. } => MKDIR,
        Request::Rename { .. } => RENAME,
        Request::Replace { .. } | Request::Sync { .. } | Request::Room { .. } => EXTENDED,
    };
    packet.push(kind);
    packet.extend(id.to_be_bytes());
    match *request {
        Request::Open { path, how } => {
            string(packet, path.as_bytes());
            packet.extend(how.to_be_bytes());
            permissions(packet, 0o600);
        }
        Request::MakeFolder { path } => {
            string(packet, path.as_bytes());
            permissions(packet, 0o700);
        }
        Request::Close { handle } | Request::LenOf { handle } | Request::ReadFolder { handle } => {
            string(packet, handle);
        }
        Request::Read { handle, offset, len } => {
            string(packet, handle);
            packet.extend(offset.to_be_bytes());
            packet.extend(len.to_be_bytes());
        }
        Request::Write { handle, offset, data } => {
            string(packet, handle);
            packet.extend(offset.to_be_bytes());
            string(packet, data);
        }
        Request::OpenFolder { path } | Request::Remove { path } | Request::Stat { path } => {
            string(packet, path.as_bytes());
        }
        Request::Rename { from, to } => {
            string(packet, from.as_bytes());
            string(packet, to.as_bytes());
        }
        Request::Replace { from, to } => {
            string(packet, POSIX_RENAME.as_bytes());
            string(packet, from.as_bytes());
            string(packet, to.as_bytes());
        }
        Request::Sync { handle } => {
            string(packet, FSYNC.as_bytes());
            string(packet, handle);
        }
        Request::Room { path } => {
            string(packet, STATVFS.as_bytes());
            string(packet, path.as_bytes());
        }
    }
    let len = len_of(packet.len() - start - 4);
    packet[start..start + 4].copy_from_slice(&len.to_be_bytes());
}

fn string(packet: &mut Vec<u8>, bytes: &[u8]) {
    packet.extend(len_of(bytes.len()).to_be_bytes());
    packet.extend(bytes);
}

fn permissions(packet: &mut Vec<u8>, mode: u32) {
    packet.extend(ATTR_PERMISSIONS.to_be_bytes());
    packet.extend(mode.to_be_bytes());
}

fn len_of(len: usize) -> u32 {
    u32::try_from(len).expect("paths and parts of files are short")
}

/// Reads an answer, without its length; returns the number of its request, too.
pub(super) fn read(packet: &[u8]) -> Result<(u32, Answer), Malformed> {
    let mut cursor = Cursor { bytes: packet };
    let kind = cursor.u8()?;
    let id = cursor.u32()?;
    let answer = match kind {
        STATUS => Answer::Status(cursor.u32()?),
        HANDLE => Answer::Handle(cursor.string()?.to_vec()),
        DATA => Answer::Data(cursor.string()?.to_vec()),
        NAME => {
            let count = cursor.u32()?;
            let mut names = Vec::new();
            for _ in 0..count {
                let name = cursor.string()?;
                cursor.string()?;
                let attributes = cursor.attributes()?;
                if let Ok(name) = std::str::from_utf8(name) {
                    names.push(Entry { name: name.to_owned(), attributes });
                }
            }
            Answer::Names(names)
        }
        // The only request that is answered so.
        EXTENDED_REPLY => Answer::Room(cursor.room()?),
        ATTRS => Answer::Attributes(cursor.attributes()?),
        _ => return Err(Malformed),
    };
    Ok((id, answer))
}

struct Cursor<'a> {
    bytes: &'a [u8],
}

impl<'a> Cursor<'a> {
    /// The only code that slices bytes of a server.
    fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.bytes.split_at_checked(len).ok_or(Malformed)?;
        self.bytes = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        self.take(N)?.try_into().map_err(|_| Malformed)
    }

    fn u8(&mut self) -> Result<u8, Malformed> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    fn string(&mut self) -> Result<&'a [u8], Malformed> {
        let len = self.u32()?;
        self.take(usize::try_from(len).map_err(|_| Malformed)?)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }

    /// Block size, fragment size, blocks, free ones, those for us; files, free ones, those for us; …
    fn room(&mut self) -> Result<Room, Malformed> {
        let mut fields = [0; 8];
        for field in &mut fields {
            *field = self.u64()?;
        }
        let [_, fragment_len, _, _, fragments, files, _, files_left] = fields;
        let bytes = fragment_len.saturating_mul(fragments);
        Ok(Room { bytes, no_files: files > 0 && files_left == 0 })
    }

    fn attributes(&mut self) -> Result<Attributes, Malformed> {
        let mut attributes = Attributes::default();
        let flags = self.u32()?;
        if flags & ATTR_SIZE != 0 {
            attributes.size = Some(self.u64()?);
        }
        if flags & ATTR_UIDGID != 0 {
            self.take(8)?;
        }
        if flags & ATTR_PERMISSIONS != 0 {
            attributes.is_folder = self.u32()? & MODE_KIND == MODE_FOLDER;
        }
        if flags & ATTR_ACMODTIME != 0 {
            self.take(4)?;
            attributes.changed = Some(self.u32()?);
        }
        if flags & ATTR_EXTENDED != 0 {
            for _ in 0..self.u32()? {
                self.string()?;
                self.string()?;
            }
        }
        Ok(attributes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_list_of_names_is_read() {
        let mut packet = vec![NAME, 0, 0, 0, 7, 0, 0, 0, 2];
        for (name, mode) in [("a", 0o100_600_u32), ("data", 0o040_700)] {
            string(&mut packet, name.as_bytes());
            string(&mut packet, b"shown to a person");
            packet.extend((ATTR_SIZE | ATTR_PERMISSIONS | ATTR_ACMODTIME).to_be_bytes());
            packet.extend(42_u64.to_be_bytes());
            packet.extend(mode.to_be_bytes());
            packet.extend([0, 0, 0, 1, 0, 0, 0, 2]);
        }
        let attributes = Attributes { size: Some(42), changed: Some(2), is_folder: false };
        let file = Entry { name: "a".to_owned(), attributes };
        let folder = Attributes { is_folder: true, ..attributes };
        let folder = Entry { name: "data".to_owned(), attributes: folder };
        assert_eq!(read(&packet), Ok((7, Answer::Names(vec![file, folder]))));
    }

    #[test]
    fn a_request_has_its_length_in_front() {
        let mut packet = Vec::new();
        write(&mut packet, 3, &Request::Write { handle: b"h", offset: 5, data: b"data" });
        let expected =
            [0, 0, 0, 26, WRITE, 0, 0, 0, 3, 0, 0, 0, 1, b'h', 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 4];
        assert_eq!(packet, [expected.as_slice(), b"data"].concat());
    }

    proptest! {
        #[test]
        fn s16_any_bytes_are_an_answer_or_an_error(
            kind in 100_u8..107,
            rest in prop::collection::vec(any::<u8>(), 0..80),
        ) {
            let packet = [&[kind], rest.as_slice()].concat();
            let _ = (read(&packet), read_hello(&packet));
        }
    }
}
