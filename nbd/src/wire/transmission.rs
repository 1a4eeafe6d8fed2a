//! Messages of the transmission phase (proto.md, "Transmission"; extended headers in the branch
//! `extension-ext-header`).

use super::{
    Command, Errno, Extent, ProtocolError,
    cursor::{Cursor, u32_from},
    printable,
};

const REQUEST_MAGIC: u32 = 0x2560_9513;
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Request flag `NBD_CMD_FLAG_DF`: the answer to a read is one chunk.
pub const CMD_FLAG_DF: u16 = 1 << 2;
/// Request flag `NBD_CMD_FLAG_REQ_ONE`: one extent for each context.
pub const CMD_FLAG_REQ_ONE: u16 = 1 << 3;
/// Request flag `NBD_CMD_FLAG_PAYLOAD_LEN`: an extended request is followed by a payload.
pub const CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// Reply flag `NBD_REPLY_FLAG_DONE`: the last chunk of a reply.
pub const REPLY_FLAG_DONE: u16 = 1;

/// Chunk type `NBD_REPLY_TYPE_NONE`
pub const CHUNK_NONE: u16 = 0;
/// Chunk type `NBD_REPLY_TYPE_OFFSET_DATA`
pub const CHUNK_DATA: u16 = 1;
/// Chunk type `NBD_REPLY_TYPE_OFFSET_HOLE`
pub const CHUNK_HOLE: u16 = 2;
/// Chunk type `NBD_REPLY_TYPE_BLOCK_STATUS`
pub const CHUNK_BLOCK_STATUS: u16 = 5;
/// Chunk type `NBD_REPLY_TYPE_BLOCK_STATUS_EXT`
pub const CHUNK_BLOCK_STATUS_EXT: u16 = 6;
/// Chunk type `NBD_REPLY_TYPE_ERROR`
pub const CHUNK_ERROR: u16 = (1 << 15) + 1;
/// Chunk type `NBD_REPLY_TYPE_ERROR_OFFSET`
pub const CHUNK_ERROR_OFFSET: u16 = (1 << 15) + 2;
/// Bit of all chunk types that stand for an error.
const CHUNK_ERROR_BIT: u16 = 1 << 15;

/// Most extents in one block status chunk (proto.md: "SHOULD NOT send more than 2^20").
pub const EXTENTS_MAX: u64 = 1 << 20;
/// Longest error chunk: number, lengths, a string of 4096 bytes, an offset; and room for fields
/// that may be added.
const ERROR_CHUNK_LEN_MAX: u64 = 8192;

/// Longest header of a request or reply.
pub const HEADER_LEN_MAX: usize = 32;

/// Whether `NBD_OPT_EXTENDED_HEADERS` was negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Headers {
    /// Requests of 28 bytes with lengths of 32 bits.
    Compact,
    /// Requests and replies of 32 bytes with lengths of 64 bits.
    Extended,
}

impl Headers {
    /// Bytes of a request's header.
    pub fn request_len(self) -> usize {
        match self {
            Self::Compact => 28,
            Self::Extended => 32,
        }
    }
}

/// How a server answers, as negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyStyle {
    /// One simple reply to each request.
    Simple,
    /// Chunks for reads and block status; anything else may get a simple reply.
    Structured,
    /// Chunks with extended headers for everything.
    Extended,
}

impl ReplyStyle {
    /// The request headers that go with it.
    pub fn headers(self) -> Headers {
        match self {
            Self::Simple | Self::Structured => Headers::Compact,
            Self::Extended => Headers::Extended,
        }
    }
}

/// A request without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// `CMD_FLAG_…`
    pub flags: u16,
    /// What to do.
    pub command: Command,
    /// Returned with each reply.
    pub cookie: u64,
    /// First byte, from the start of the export.
    pub offset: u64,
    /// Bytes of effect, or of payload. With compact headers more than `u32::MAX` saturates:
    /// callers have split the request before.
    pub length: u64,
}

impl Request {
    /// Appends the request to `out`.
    pub fn encode(&self, headers: Headers, out: &mut Vec<u8>) {
        out.extend(match headers {
            Headers::Compact => REQUEST_MAGIC.to_be_bytes(),
            Headers::Extended => EXTENDED_REQUEST_MAGIC.to_be_bytes(),
        });
        out.extend(self.flags.to_be_bytes());
        out.extend(self.command.code().to_be_bytes());
        out.extend(self.cookie.to_be_bytes());
        out.extend(self.offset.to_be_bytes());
        match headers {
            Headers::Compact => {
                out.extend(u32::try_from(self.length).unwrap_or(u32::MAX).to_be_bytes());
            }
            Headers::Extended => out.extend(self.length.to_be_bytes()),
        }
    }

    /// Reads a request of [`Headers::request_len`] bytes.
    pub fn decode(headers: Headers, bytes: &[u8]) -> Result<Self, ProtocolError> {
        let mut cursor = Cursor::new("a request", bytes);
        cursor.expect(match headers {
            Headers::Compact => REQUEST_MAGIC,
            Headers::Extended => EXTENDED_REQUEST_MAGIC,
        })?;
        let flags = cursor.u16()?;
        let command = Command::from_code(cursor.u16()?);
        let (cookie, offset) = (cursor.u64()?, cursor.u64()?);
        let length = match headers {
            Headers::Compact => u64::from(cursor.u32()?),
            Headers::Extended => cursor.u64()?,
        };
        cursor.finish()?;
        Ok(Self { flags, command, cookie, offset, length })
    }

    /// Bytes of payload that follow the header.
    pub fn payload_len(&self, headers: Headers) -> u64 {
        let has_payload = match headers {
            Headers::Compact => self.command == Command::Write,
            Headers::Extended => self.flags & CMD_FLAG_PAYLOAD_LEN != 0,
        };
        if has_payload { self.length } else { 0 }
    }
}

/// The start of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A whole reply; data follow only if it answers a read without an error.
    Simple {
        /// The request's.
        cookie: u64,
        /// `None` is success.
        error: Option<Errno>,
    },
    /// One of several chunks of a reply.
    Chunk(ChunkHeader),
}

/// The start of a structured or extended chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    /// `REPLY_FLAG_…`
    pub flags: u16,
    /// `CHUNK_…`
    pub kind: u16,
    /// The request's.
    pub cookie: u64,
    /// The request's, in extended headers only.
    pub offset: Option<u64>,
    /// Bytes of payload that follow.
    pub length: u64,
}

impl ReplyHeader {
    /// Bytes of the header that starts with this magic, if the negotiated style allows it.
    pub fn len(style: ReplyStyle, magic: [u8; 4]) -> Result<usize, ProtocolError> {
        match (u32::from_be_bytes(magic), style) {
            (SIMPLE_REPLY_MAGIC, ReplyStyle::Simple | ReplyStyle::Structured) => Ok(16),
            (STRUCTURED_REPLY_MAGIC, ReplyStyle::Structured) => Ok(20),
            (EXTENDED_REPLY_MAGIC, ReplyStyle::Extended) => Ok(32),
            (SIMPLE_REPLY_MAGIC | STRUCTURED_REPLY_MAGIC | EXTENDED_REPLY_MAGIC, _) => {
                Err(ProtocolError::WrongReplyStyle)
            }
            (found, _) => {
                Err(ProtocolError::BadMagic { message: "a reply", found: u64::from(found) })
            }
        }
    }

    /// Reads a header of exactly the bytes that [`len`](Self::len) asked for.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let mut cursor = Cursor::new("a reply", bytes);
        let magic = cursor.u32()?;
        let header = match magic {
            SIMPLE_REPLY_MAGIC => {
                let (error, cookie) = (cursor.u32()?, cursor.u64()?);
                Self::Simple { cookie, error: (error != 0).then(|| Errno::from_code(error)) }
            }
            STRUCTURED_REPLY_MAGIC | EXTENDED_REPLY_MAGIC => {
                let (flags, kind, cookie) = (cursor.u16()?, cursor.u16()?, cursor.u64()?);
                let (offset, length) = if magic == EXTENDED_REPLY_MAGIC {
                    (Some(cursor.u64()?), cursor.u64()?)
                } else {
                    (None, u64::from(cursor.u32()?))
                };
                Self::Chunk(ChunkHeader { flags, kind, cookie, offset, length })
            }
            found => {
                let found = u64::from(found);
                return Err(ProtocolError::BadMagic { message: "a reply", found });
            }
        };
        cursor.finish()?;
        Ok(header)
    }

    /// Appends a simple reply to `out`.
    pub fn encode_simple(cookie: u64, error: Option<Errno>, out: &mut Vec<u8>) {
        out.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
        out.extend(error.map_or(0, Errno::code).to_be_bytes());
        out.extend(cookie.to_be_bytes());
    }
}

impl ChunkHeader {
    /// Appends the header to `out`; extended if it has an offset.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend(match self.offset {
            None => STRUCTURED_REPLY_MAGIC.to_be_bytes(),
            Some(_) => EXTENDED_REPLY_MAGIC.to_be_bytes(),
        });
        out.extend(self.flags.to_be_bytes());
        out.extend(self.kind.to_be_bytes());
        out.extend(self.cookie.to_be_bytes());
        match self.offset {
            None => out.extend(u32::try_from(self.length).unwrap_or(u32::MAX).to_be_bytes()),
            Some(offset) => {
                out.extend(offset.to_be_bytes());
                out.extend(self.length.to_be_bytes());
            }
        }
    }

    /// Whether this is the last chunk of its reply.
    pub fn is_last(&self) -> bool {
        self.flags & REPLY_FLAG_DONE != 0
    }

    /// Says what the payload is, after checking that its length fits the type and that the type
    /// fits the command. Done before a single byte of the payload is read.
    pub fn content(&self, command: Command) -> Result<Content, ProtocolError> {
        let length = self.length;
        let wrong = |message| Err(ProtocolError::WrongLength { message, length });
        match (self.kind, command) {
            (CHUNK_NONE, _) if length != 0 => wrong("an empty chunk"),
            (CHUNK_NONE, _) if !self.is_last() => Err(ProtocolError::NoneNotDone),
            (CHUNK_NONE, _) => Ok(Content::None),
            (CHUNK_DATA, Command::Read) => match length.checked_sub(DATA_PREFIX_LEN) {
                None | Some(0) => wrong("a data chunk"),
                Some(data) => Ok(Content::Data { length: data }),
            },
            (CHUNK_HOLE, Command::Read) if length != 12 => wrong("a hole chunk"),
            (CHUNK_HOLE, Command::Read) => Ok(Content::Hole),
            (CHUNK_BLOCK_STATUS, Command::BlockStatus) if self.offset.is_none() => {
                check_status(length, 4, 8)?;
                Ok(Content::BlockStatus)
            }
            (CHUNK_BLOCK_STATUS_EXT, Command::BlockStatus) if self.offset.is_some() => {
                check_status(length, 8, 16)?;
                Ok(Content::BlockStatus)
            }
            (kind, _) if kind & CHUNK_ERROR_BIT != 0 => {
                let message = "an error chunk";
                let limit = ERROR_CHUNK_LEN_MAX;
                if length > limit {
                    return Err(ProtocolError::TooLong { message, length, limit });
                }
                if length < 6 { wrong(message) } else { Ok(Content::Error) }
            }
            (kind, command) => Err(ProtocolError::UnexpectedChunk { kind, command }),
        }
    }
}

/// What the payload of a chunk is; its length has been checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// No payload.
    None,
    /// An offset of 8 bytes, then so many bytes of data.
    Data {
        /// Bytes after the offset, at least 1.
        length: u64,
    },
    /// See [`decode_hole`].
    Hole,
    /// See [`decode_block_status`].
    BlockStatus,
    /// See [`RemoteError::decode`].
    Error,
}

/// Bytes of the offset in front of the data of a data chunk.
pub const DATA_PREFIX_LEN: u64 = 8;

fn check_status(length: u64, prefix: u64, each: u64) -> Result<(), ProtocolError> {
    let message = "a block status chunk";
    let limit = EXTENTS_MAX.saturating_mul(each).saturating_add(prefix);
    if length > limit {
        return Err(ProtocolError::TooLong { message, length, limit });
    }
    match length.checked_sub(prefix) {
        Some(extents) if extents != 0 && extents.is_multiple_of(each) => Ok(()),
        _ => Err(ProtocolError::WrongLength { message, length }),
    }
}

/// An error chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteError {
    /// What went wrong.
    pub errno: Errno,
    /// Where, if the server told.
    pub at: Option<u64>,
    /// In the server's words, made printable.
    pub message: String,
}

impl RemoteError {
    /// Reads the payload of an error chunk; unknown kinds are read like `NBD_REPLY_TYPE_ERROR`.
    pub fn decode(kind: u16, payload: &[u8]) -> Result<Self, ProtocolError> {
        let mut cursor = Cursor::new("an error chunk", payload);
        let errno = cursor.u32()?;
        let len = usize::from(cursor.u16()?);
        let message = printable(cursor.take(len)?);
        let at = match kind {
            CHUNK_ERROR_OFFSET => Some(cursor.u64()?),
            _ => None,
        };
        if errno == 0 {
            return Err(ProtocolError::NoError);
        }
        // More fields may follow; proto.md keeps that open for all error chunks.
        Ok(Self { errno: Errno::from_code(errno), at, message })
    }

    /// The payload of an error chunk without an offset.
    pub fn encode(errno: Errno, message: &str) -> Vec<u8> {
        let message = message.as_bytes();
        let message = message.get(..super::STRING_LEN_MAX).unwrap_or(message);
        let mut out = errno.code().to_be_bytes().to_vec();
        out.extend(u16::try_from(message.len()).unwrap_or(0).to_be_bytes());
        out.extend(message);
        out
    }
}

/// Offset and length in the payload of a hole chunk.
pub fn decode_hole(payload: &[u8]) -> Result<(u64, u64), ProtocolError> {
    let mut cursor = Cursor::new("a hole chunk", payload);
    let hole = (cursor.u64()?, u64::from(cursor.u32()?));
    cursor.finish()?;
    Ok(hole)
}

/// The payload of a hole chunk.
pub fn encode_hole(offset: u64, length: u32) -> Vec<u8> {
    let mut out = offset.to_be_bytes().to_vec();
    out.extend(length.to_be_bytes());
    out
}

/// Context and extents in the payload of a block status chunk.
///
/// Errors on an extent of length 0, and if the lengths add up to more than 2^64.
pub fn decode_block_status(
    headers: Headers,
    payload: &[u8],
) -> Result<(u32, Vec<Extent>), ProtocolError> {
    let mut cursor = Cursor::new("a block status chunk", payload);
    let id = cursor.u32()?;
    if headers == Headers::Extended {
        let claimed = u64::from(cursor.u32()?);
        let present = payload.len().saturating_sub(8).checked_div(16).unwrap_or(0);
        if u64::try_from(present) != Ok(claimed) {
            let (message, length) = ("a block status chunk", claimed);
            return Err(ProtocolError::WrongLength { message, length });
        }
    }
    let each = match headers {
        Headers::Compact => 8,
        Headers::Extended => 16,
    };
    let rest = cursor.rest();
    let (mut extents, mut total) = (Vec::with_capacity(rest.len().div_euclid(each)), 0_u64);
    for descriptor in rest.chunks(each) {
        let mut cursor = Cursor::new("a block status chunk", descriptor);
        let extent = match headers {
            Headers::Compact => {
                Extent { length: u64::from(cursor.u32()?), flags: u64::from(cursor.u32()?) }
            }
            Headers::Extended => Extent { length: cursor.u64()?, flags: cursor.u64()? },
        };
        total = total.checked_add(extent.length).ok_or(ProtocolError::BadExtent)?;
        if extent.length == 0 {
            return Err(ProtocolError::BadExtent);
        }
        extents.push(extent);
    }
    if extents.is_empty() {
        return Err(ProtocolError::BadExtent);
    }
    Ok((id, extents))
}

/// The payload of a block status chunk. With compact headers, lengths and flags saturate at 32
/// bits: callers have split longer extents before.
pub fn encode_block_status(headers: Headers, id: u32, extents: &[Extent]) -> Vec<u8> {
    let mut out = id.to_be_bytes().to_vec();
    if headers == Headers::Extended {
        out.extend(u32_from(extents.len()).to_be_bytes());
    }
    for extent in extents {
        match headers {
            Headers::Compact => {
                out.extend(u32::try_from(extent.length).unwrap_or(u32::MAX).to_be_bytes());
                out.extend(u32::try_from(extent.flags).unwrap_or(u32::MAX).to_be_bytes());
            }
            Headers::Extended => {
                out.extend(extent.length.to_be_bytes());
                out.extend(extent.flags.to_be_bytes());
            }
        }
    }
    out
}
