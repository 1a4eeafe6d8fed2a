//! Names for numbers that peers send, and for every way in which a message can be wrong.

use std::fmt;

/// What exactly a peer did that the protocol does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// A message is shorter than its fields.
    #[error("{message} is too short for its fields")]
    Truncated {
        /// Which message.
        message: &'static str,
    },
    /// A message has bytes after its last field.
    #[error("{message} has bytes after its last field")]
    TrailingBytes {
        /// Which message.
        message: &'static str,
    },
    /// A message does not start with its magic number.
    #[error("{message} starts with 0x{found:x}")]
    BadMagic {
        /// Which message.
        message: &'static str,
        /// What was there instead.
        found: u64,
    },
    /// A string is longer than 4096 bytes.
    #[error("a string in {message} is longer than 4096 bytes")]
    StringTooLong {
        /// Which message.
        message: &'static str,
    },
    /// A string is not UTF-8.
    #[error("a string in {message} is not UTF-8")]
    NotUtf8 {
        /// Which message.
        message: &'static str,
    },
    /// A length is larger than anything sensible.
    #[error("{message} claims {length} bytes, at most {limit} are allowed")]
    TooLong {
        /// Which message.
        message: &'static str,
        /// The length it claims.
        length: u64,
        /// The most we accept.
        limit: u64,
    },
    /// A length does not fit the kind of message.
    #[error("{message} has a wrong length of {length} bytes")]
    WrongLength {
        /// Which message.
        message: &'static str,
        /// The length it claims.
        length: u64,
    },
    /// The server does not speak fixed newstyle (handshake flags in `flags`).
    #[error("the server does not offer fixed newstyle negotiation (flags 0x{flags:x})")]
    NotFixedNewstyle {
        /// Handshake flags of the server.
        flags: u16,
    },
    /// An option reply answers another option than the one that was sent.
    #[error("reply to option {found}, but option {sent} was sent")]
    OtherOption {
        /// What was sent.
        sent: u32,
        /// What was answered.
        found: u32,
    },
    /// An option reply of a type that does not belong there.
    #[error("unexpected reply type 0x{kind:x} to option {option}")]
    UnexpectedOptionReply {
        /// The option.
        option: u32,
        /// The reply type.
        kind: u32,
    },
    /// The server acknowledged `NBD_OPT_GO` without `NBD_INFO_EXPORT`.
    #[error("the server opened the export without telling its size")]
    NoExportInfo,
    /// Block sizes that proto.md forbids.
    #[error("impossible block sizes: minimum {minimum}, preferred {preferred}, maximum {maximum}")]
    BadBlockSizes {
        /// Minimum block size in bytes.
        minimum: u32,
        /// Preferred block size in bytes.
        preferred: u32,
        /// Maximum payload in bytes.
        maximum: u32,
    },
    /// Two metadata contexts with one id, or one context in two chunks of one reply.
    #[error("metadata context {id} twice")]
    DuplicateContext {
        /// The id.
        id: u32,
    },
    /// A block status chunk for a context that was not negotiated.
    #[error("metadata context {id} was not negotiated")]
    UnknownContext {
        /// The id.
        id: u32,
    },
    /// A block status reply without one of the negotiated contexts.
    #[error("the reply lacks metadata context {id}")]
    MissingContext {
        /// The id.
        id: u32,
    },
    /// An extent of length 0, or lengths whose sum overflows.
    #[error("a block status extent has an impossible length")]
    BadExtent,
    /// Connections to one export disagree on its size, flags or contexts.
    #[error("two connections to the export disagree on its size or metadata contexts")]
    ExportsDiffer,
    /// A reply to a request that is not open.
    #[error("reply with cookie 0x{cookie:x}, which no open request has")]
    UnknownCookie {
        /// The cookie.
        cookie: u64,
    },
    /// An extended reply with an offset other than the request's.
    #[error("reply with offset {found} to a request at offset {sent}")]
    OtherOffset {
        /// What was sent.
        sent: u64,
        /// What was answered.
        found: u64,
    },
    /// A reply style that was not negotiated, or a simple success to a structured read.
    #[error("reply of a style that was not negotiated")]
    WrongReplyStyle,
    /// A chunk of a type that does not belong to the command.
    #[error("chunk type {kind} does not answer {command}")]
    UnexpectedChunk {
        /// The chunk type.
        kind: u16,
        /// The command that is open.
        command: Command,
    },
    /// `NBD_REPLY_TYPE_NONE` without `NBD_REPLY_FLAG_DONE`.
    #[error("an empty chunk that is not the last")]
    NoneNotDone,
    /// More chunks than the reply can need.
    #[error("more than {limit} error chunks in one reply")]
    TooManyChunks {
        /// The most we accept.
        limit: u32,
    },
    /// A content chunk outside the request.
    #[error("chunk of {length} bytes at offset {offset} is outside the request")]
    OutsideRequest {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// A content chunk that overlaps an earlier one.
    #[error("chunk of {length} bytes at offset {offset} overlaps an earlier one")]
    Overlap {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// A reply that ends without an error and without all bytes.
    #[error("the reply ended without the bytes at offset {offset}")]
    Gap {
        /// First byte that is missing.
        offset: u64,
    },
    /// An error reply whose error is 0.
    #[error("an error chunk without an error")]
    NoError,
    /// More replies to one option than any server needs.
    #[error("more than {limit} replies to one option")]
    TooManyReplies {
        /// The most we accept.
        limit: u32,
    },
}

/// A request type (proto.md, "Request types").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Command {
    /// `NBD_CMD_READ`
    Read,
    /// `NBD_CMD_WRITE`
    Write,
    /// `NBD_CMD_DISC`
    Disconnect,
    /// `NBD_CMD_FLUSH`
    Flush,
    /// `NBD_CMD_TRIM`
    Trim,
    /// `NBD_CMD_CACHE`
    Cache,
    /// `NBD_CMD_WRITE_ZEROES`
    WriteZeroes,
    /// `NBD_CMD_BLOCK_STATUS`
    BlockStatus,
    /// Any other number.
    Unknown(u16),
}

impl Command {
    /// The number on the wire.
    pub fn code(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Unknown(code) => code,
        }
    }

    /// The command of a number on the wire.
    pub fn from_code(code: u16) -> Self {
        match code {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            code => Self::Unknown(code),
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Disconnect => "disconnect",
            Self::Flush => "flush",
            Self::Trim => "trim",
            Self::Cache => "cache",
            Self::WriteZeroes => "write-zeroes",
            Self::BlockStatus => "block-status",
            Self::Unknown(code) => return write!(f, "command {code}"),
        })
    }
}

/// An error number of a reply (proto.md, "Error values").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the names are those of errno")]
pub enum Errno {
    EPERM,
    EIO,
    ENOMEM,
    EINVAL,
    ENOSPC,
    EOVERFLOW,
    ENOTSUP,
    ESHUTDOWN,
    /// A number that proto.md does not define; to be treated like `EINVAL`.
    Unknown(u32),
}

impl Errno {
    /// The number on the wire.
    pub fn code(self) -> u32 {
        match self {
            Self::EPERM => 1,
            Self::EIO => 5,
            Self::ENOMEM => 12,
            Self::EINVAL => 22,
            Self::ENOSPC => 28,
            Self::EOVERFLOW => 75,
            Self::ENOTSUP => 95,
            Self::ESHUTDOWN => 108,
            Self::Unknown(code) => code,
        }
    }

    /// The error of a number on the wire.
    pub fn from_code(code: u32) -> Self {
        match code {
            1 => Self::EPERM,
            5 => Self::EIO,
            12 => Self::ENOMEM,
            22 => Self::EINVAL,
            28 => Self::ENOSPC,
            75 => Self::EOVERFLOW,
            95 => Self::ENOTSUP,
            108 => Self::ESHUTDOWN,
            code => Self::Unknown(code),
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(code) => write!(f, "error {code}"),
            named => write!(f, "{named:?}"),
        }
    }
}

/// Why a server refuses an option (proto.md, "Option reply types", `NBD_REP_ERR_…`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Refusal {
    /// `NBD_REP_ERR_UNSUP`: the server does not know the option.
    Unsupported,
    /// `NBD_REP_ERR_POLICY`
    Policy,
    /// `NBD_REP_ERR_INVALID`
    Invalid,
    /// `NBD_REP_ERR_PLATFORM`
    Platform,
    /// `NBD_REP_ERR_TLS_REQD`
    TlsRequired,
    /// `NBD_REP_ERR_UNKNOWN`: there is no such export.
    UnknownExport,
    /// `NBD_REP_ERR_SHUTDOWN`
    ShuttingDown,
    /// `NBD_REP_ERR_BLOCK_SIZE_REQD`
    BlockSizeRequired,
    /// `NBD_REP_ERR_TOO_BIG`
    TooBig,
    /// `NBD_REP_ERR_EXT_HEADER_REQD`
    ExtendedHeadersRequired,
    /// Any other error reply.
    Other(u32),
}

impl Refusal {
    /// Bit that marks a reply type as an error.
    pub(super) const ERROR_BIT: u32 = 1 << 31;

    /// The reply type on the wire.
    pub fn code(self) -> u32 {
        let low = match self {
            Self::Unsupported => 1,
            Self::Policy => 2,
            Self::Invalid => 3,
            Self::Platform => 4,
            Self::TlsRequired => 5,
            Self::UnknownExport => 6,
            Self::ShuttingDown => 7,
            Self::BlockSizeRequired => 8,
            Self::TooBig => 9,
            Self::ExtendedHeadersRequired => 10,
            Self::Other(kind) => kind,
        };
        low | Self::ERROR_BIT
    }

    /// The refusal of a reply type, or `None` if the type is not an error.
    pub fn from_code(kind: u32) -> Option<Self> {
        if kind & Self::ERROR_BIT == 0 {
            return None;
        }
        Some(match kind & !Self::ERROR_BIT {
            1 => Self::Unsupported,
            2 => Self::Policy,
            3 => Self::Invalid,
            4 => Self::Platform,
            5 => Self::TlsRequired,
            6 => Self::UnknownExport,
            7 => Self::ShuttingDown,
            8 => Self::BlockSizeRequired,
            9 => Self::TooBig,
            10 => Self::ExtendedHeadersRequired,
            _ => Self::Other(kind),
        })
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unsupported => "option not supported",
            Self::Policy => "forbidden by policy",
            Self::Invalid => "request invalid",
            Self::Platform => "not supported on its platform",
            Self::TlsRequired => "TLS required",
            Self::UnknownExport => "no such export",
            Self::ShuttingDown => "shutting down",
            Self::BlockSizeRequired => "block sizes required",
            Self::TooBig => "request too big",
            Self::ExtendedHeadersRequired => "extended headers required",
            Self::Other(kind) => return write!(f, "reply 0x{kind:x}"),
        })
    }
}
