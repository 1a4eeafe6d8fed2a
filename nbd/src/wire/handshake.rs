//! Messages of the handshake phase (proto.md, "Fixed newstyle negotiation" to "Option reply types").

use super::{
    ProtocolError, Refusal,
    cursor::{Cursor, u32_from, usize_from},
};

const MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Handshake flag `NBD_FLAG_FIXED_NEWSTYLE`, also the client's.
pub const FIXED_NEWSTYLE: u16 = 1;
/// Handshake flag `NBD_FLAG_NO_ZEROES`, also the client's.
pub const NO_ZEROES: u16 = 2;

/// `NBD_OPT_EXPORT_NAME`
pub const OPT_EXPORT_NAME: u32 = 1;
/// `NBD_OPT_ABORT`
pub const OPT_ABORT: u32 = 2;
/// `NBD_OPT_LIST`
pub const OPT_LIST: u32 = 3;
/// `NBD_OPT_INFO`
pub const OPT_INFO: u32 = 6;
/// `NBD_OPT_GO`
pub const OPT_GO: u32 = 7;
/// `NBD_OPT_STRUCTURED_REPLY`
pub const OPT_STRUCTURED_REPLY: u32 = 8;
/// `NBD_OPT_LIST_META_CONTEXT`
pub const OPT_LIST_META_CONTEXT: u32 = 9;
/// `NBD_OPT_SET_META_CONTEXT`
pub const OPT_SET_META_CONTEXT: u32 = 10;
/// `NBD_OPT_EXTENDED_HEADERS`
pub const OPT_EXTENDED_HEADERS: u32 = 11;

/// `NBD_REP_ACK`
pub const REP_ACK: u32 = 1;
/// `NBD_REP_SERVER`
pub const REP_SERVER: u32 = 2;
/// `NBD_REP_INFO`
pub const REP_INFO: u32 = 3;
/// `NBD_REP_META_CONTEXT`
pub const REP_META_CONTEXT: u32 = 4;

/// `NBD_INFO_EXPORT`
pub const INFO_EXPORT: u16 = 0;
/// `NBD_INFO_BLOCK_SIZE`
pub const INFO_BLOCK_SIZE: u16 = 3;

/// Transmission flag `NBD_FLAG_HAS_FLAGS`
pub const FLAG_HAS_FLAGS: u16 = 1;
/// Transmission flag `NBD_FLAG_READ_ONLY`
pub const FLAG_READ_ONLY: u16 = 1 << 1;
/// Transmission flag `NBD_FLAG_SEND_FLUSH`
pub const FLAG_SEND_FLUSH: u16 = 1 << 2;
/// Transmission flag `NBD_FLAG_SEND_TRIM`
pub const FLAG_SEND_TRIM: u16 = 1 << 5;
/// Transmission flag `NBD_FLAG_SEND_DF`
pub const FLAG_SEND_DF: u16 = 1 << 7;
/// Transmission flag `NBD_FLAG_CAN_MULTI_CONN`
pub const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;

/// Longest data of an option or of its reply that we accept. The longest sensible one is a metadata
/// query with many names; QEMU accepts 32 MiB, which nobody needs.
pub const OPTION_LEN_MAX: u32 = 64 * 1024;

/// Bytes of the server's greeting.
pub const GREETING_LEN: usize = 18;
/// Bytes before the data of an option.
pub const OPTION_HEADER_LEN: usize = 16;
/// Bytes before the data of an option reply.
pub const OPTION_REPLY_HEADER_LEN: usize = 20;

/// The server's greeting with its handshake flags.
pub fn encode_greeting(flags: u16) -> Vec<u8> {
    let mut out = Vec::with_capacity(GREETING_LEN);
    out.extend(MAGIC.to_be_bytes());
    out.extend(OPTION_MAGIC.to_be_bytes());
    out.extend(flags.to_be_bytes());
    out
}

/// Handshake flags of the server's greeting. Errors unless it speaks fixed newstyle.
pub fn decode_greeting(bytes: &[u8; GREETING_LEN]) -> Result<u16, ProtocolError> {
    let mut cursor = Cursor::new("the greeting", bytes);
    cursor.expect_u64(MAGIC)?;
    cursor.expect_u64(OPTION_MAGIC)?;
    let flags = cursor.u16()?;
    if flags & FIXED_NEWSTYLE == 0 {
        return Err(ProtocolError::NotFixedNewstyle { flags });
    }
    Ok(flags)
}

/// An option with its data, as the client sends it.
pub fn encode_option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(OPTION_HEADER_LEN.saturating_add(data.len()));
    out.extend(OPTION_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(u32_from(data.len()).to_be_bytes());
    out.extend(data);
    out
}

/// The start of an option: what it is, and how many bytes of data follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// `OPT_…`
    pub option: u32,
    /// Bytes of data that follow; at most [`OPTION_LEN_MAX`].
    pub length: u32,
}

impl OptionHeader {
    /// Reads the header of an option.
    pub fn decode(bytes: &[u8; OPTION_HEADER_LEN]) -> Result<Self, ProtocolError> {
        let mut cursor = Cursor::new("an option", bytes);
        cursor.expect_u64(OPTION_MAGIC)?;
        let header = Self { option: cursor.u32()?, length: cursor.u32()? };
        check_length("an option", header.length)?;
        Ok(header)
    }
}

/// A reply to an option, as the server sends it.
pub fn encode_option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(OPTION_REPLY_HEADER_LEN.saturating_add(data.len()));
    out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(u32_from(data.len()).to_be_bytes());
    out.extend(data);
    out
}

/// The start of an option reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that is answered.
    pub option: u32,
    /// `REP_…`, or an error (see [`Refusal::from_code`]).
    pub kind: u32,
    /// Bytes of data that follow; at most [`OPTION_LEN_MAX`].
    pub length: u32,
}

impl OptionReplyHeader {
    /// Reads the header of an option reply.
    pub fn decode(bytes: &[u8; OPTION_REPLY_HEADER_LEN]) -> Result<Self, ProtocolError> {
        let mut cursor = Cursor::new("an option reply", bytes);
        cursor.expect_u64(OPTION_REPLY_MAGIC)?;
        let header = Self { option: cursor.u32()?, kind: cursor.u32()?, length: cursor.u32()? };
        check_length("an option reply", header.length)?;
        Ok(header)
    }

    /// The refusal this reply stands for, if it is one.
    pub fn refusal(&self) -> Option<Refusal> {
        Refusal::from_code(self.kind)
    }
}

fn check_length(message: &'static str, length: u32) -> Result<(), ProtocolError> {
    if length <= OPTION_LEN_MAX {
        return Ok(());
    }
    let (length, limit) = (u64::from(length), u64::from(OPTION_LEN_MAX));
    Err(ProtocolError::TooLong { message, length, limit })
}

/// Data of `NBD_OPT_GO` and `NBD_OPT_INFO`.
pub fn encode_go(export: &str, infos: &[u16]) -> Vec<u8> {
    let mut out = Vec::new();
    put_string(&mut out, export);
    out.extend(u16::try_from(infos.len()).unwrap_or(u16::MAX).to_be_bytes());
    infos.iter().for_each(|info| out.extend(info.to_be_bytes()));
    out
}

/// Name of the export and requested infos in the data of `NBD_OPT_GO` and `NBD_OPT_INFO`.
pub fn decode_go(data: &[u8]) -> Result<(&str, Vec<u16>), ProtocolError> {
    let mut cursor = Cursor::new("NBD_OPT_GO", data);
    let export = cursor.string()?;
    let count = cursor.u16()?;
    let infos = (0..count).map(|_| cursor.u16()).collect::<Result<_, _>>()?;
    cursor.finish()?;
    Ok((export, infos))
}

/// Data of `NBD_OPT_SET_META_CONTEXT` and `NBD_OPT_LIST_META_CONTEXT`.
pub fn encode_meta_query(export: &str, queries: &[String]) -> Vec<u8> {
    let mut out = Vec::new();
    put_string(&mut out, export);
    out.extend(u32_from(queries.len()).to_be_bytes());
    queries.iter().for_each(|query| put_string(&mut out, query));
    out
}

/// Name of the export and queries in the data of the two metadata options.
pub fn decode_meta_query(data: &[u8]) -> Result<(&str, Vec<&str>), ProtocolError> {
    let mut cursor = Cursor::new("a metadata query", data);
    let export = cursor.string()?;
    let count = cursor.u32()?;
    // No capacity is reserved: the count is the peer's, and each query takes four bytes at least.
    let queries = (0..count).map(|_| cursor.string()).collect::<Result<_, _>>()?;
    cursor.finish()?;
    Ok((export, queries))
}

/// Data of a reply `NBD_REP_META_CONTEXT`.
pub fn encode_meta_context(id: u32, name: &str) -> Vec<u8> {
    let mut out = id.to_be_bytes().to_vec();
    out.extend(name.as_bytes());
    out
}

/// Id and name in a reply `NBD_REP_META_CONTEXT`.
pub fn decode_meta_context(data: &[u8]) -> Result<(u32, &str), ProtocolError> {
    let mut cursor = Cursor::new("NBD_REP_META_CONTEXT", data);
    let id = cursor.u32()?;
    let len = data.len().saturating_sub(size_of::<u32>());
    Ok((id, cursor.text(len)?))
}

/// Data of a reply `NBD_REP_SERVER`.
pub fn encode_server(export: &str, description: &str) -> Vec<u8> {
    let mut out = Vec::new();
    put_string(&mut out, export);
    out.extend(description.as_bytes());
    out
}

/// What a reply `NBD_REP_INFO` tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Info {
    /// `NBD_INFO_EXPORT`
    Export {
        /// Size of the export in bytes.
        size: u64,
        /// Transmission flags, `FLAG_…`.
        flags: u16,
    },
    /// `NBD_INFO_BLOCK_SIZE`
    BlockSize(BlockSizes),
    /// Anything else, which clients must ignore.
    Other(u16),
}

/// Limits on requests in bytes (proto.md, "Size constraints").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this; a power of two, at most 64 KiB.
    pub minimum: u32,
    /// Requests aligned to this are efficient.
    pub preferred: u32,
    /// Most bytes of payload in one request or reply.
    pub maximum: u32,
}

impl Default for BlockSizes {
    /// What proto.md lets a client assume of a server that tells nothing.
    fn default() -> Self {
        Self { minimum: 1, preferred: 4096, maximum: 32 * 1024 * 1024 }
    }
}

/// Data of a reply `NBD_REP_INFO`.
pub fn encode_info(info: Info) -> Vec<u8> {
    let mut out = Vec::new();
    match info {
        Info::Export { size, flags } => {
            out.extend(INFO_EXPORT.to_be_bytes());
            out.extend(size.to_be_bytes());
            out.extend(flags.to_be_bytes());
        }
        Info::BlockSize(BlockSizes { minimum, preferred, maximum }) => {
            out.extend(INFO_BLOCK_SIZE.to_be_bytes());
            [minimum, preferred, maximum].iter().for_each(|size| out.extend(size.to_be_bytes()));
        }
        Info::Other(kind) => out.extend(kind.to_be_bytes()),
    }
    out
}

/// Reads the data of a reply `NBD_REP_INFO`.
pub fn decode_info(data: &[u8]) -> Result<Info, ProtocolError> {
    let mut cursor = Cursor::new("NBD_REP_INFO", data);
    let info = match cursor.u16()? {
        INFO_EXPORT => Info::Export { size: cursor.u64()?, flags: cursor.u16()? },
        INFO_BLOCK_SIZE => {
            let (minimum, preferred, maximum) = (cursor.u32()?, cursor.u32()?, cursor.u32()?);
            // Larger preferred than maximum is forbidden, but harmless: nothing relies on it.
            if !minimum.is_power_of_two() || minimum > 65536 || maximum < minimum {
                return Err(ProtocolError::BadBlockSizes { minimum, preferred, maximum });
            }
            Info::BlockSize(BlockSizes { minimum, preferred, maximum })
        }
        kind => {
            cursor.rest();
            Info::Other(kind)
        }
    };
    cursor.finish()?;
    Ok(info)
}

/// A message from a peer, safe to print: no control characters, at most 4096 bytes.
pub fn printable(bytes: &[u8]) -> String {
    let bytes = bytes.get(..super::STRING_LEN_MAX.min(bytes.len())).unwrap_or_default();
    let text = String::from_utf8_lossy(bytes);
    text.trim().chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend(u32_from(text.len()).to_be_bytes());
    out.extend(text.as_bytes());
}

/// Bytes of an option's or reply's data as an index.
pub fn data_len(length: u32) -> usize {
    usize_from(length)
}
