//! Reading numbers and strings from a slice.

use super::{ProtocolError, STRING_LEN_MAX};

/// A position in a message; the only code that slices bytes from the peer.
pub(super) struct Cursor<'a> {
    rest: &'a [u8],
    message: &'static str,
}

impl<'a> Cursor<'a> {
    /// Starts at the first byte of `bytes`; `message` names them in errors.
    pub(super) fn new(message: &'static str, bytes: &'a [u8]) -> Self {
        Self { rest: bytes, message }
    }

    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8], ProtocolError> {
        let (part, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(ProtocolError::Truncated { message: self.message })?;
        self.rest = rest;
        Ok(part)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ProtocolError> {
        let part = self.take(N)?;
        part.try_into().map_err(|_| ProtocolError::Truncated { message: self.message })
    }

    pub(super) fn u16(&mut self) -> Result<u16, ProtocolError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, ProtocolError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, ProtocolError> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string preceded by its length in 32 bits.
    pub(super) fn string(&mut self) -> Result<&'a str, ProtocolError> {
        let len = usize_from(self.u32()?);
        self.text(len)
    }

    /// A string of `len` bytes.
    pub(super) fn text(&mut self, len: usize) -> Result<&'a str, ProtocolError> {
        let message = self.message;
        if len > STRING_LEN_MAX {
            return Err(ProtocolError::StringTooLong { message });
        }
        let bytes = self.take(len)?;
        std::str::from_utf8(bytes).map_err(|_| ProtocolError::NotUtf8 { message })
    }

    /// Whatever is left.
    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// The message must end here.
    pub(super) fn finish(self) -> Result<(), ProtocolError> {
        match self.rest {
            [] => Ok(()),
            _ => Err(ProtocolError::TrailingBytes { message: self.message }),
        }
    }

    pub(super) fn expect(&mut self, magic: u32) -> Result<(), ProtocolError> {
        let found = self.u32()?;
        if found == magic { Ok(()) } else { Err(self.bad_magic(u64::from(found))) }
    }

    pub(super) fn expect_u64(&mut self, magic: u64) -> Result<(), ProtocolError> {
        let found = self.u64()?;
        if found == magic { Ok(()) } else { Err(self.bad_magic(found)) }
    }

    fn bad_magic(&self, found: u64) -> ProtocolError {
        ProtocolError::BadMagic { message: self.message, found }
    }
}

/// A length of 32 bits as an index. On a 16-bit machine it saturates, and the bounds check fails.
pub(super) fn usize_from(length: u32) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}

/// A length that was already bounded, as 32 bits.
pub(super) fn u32_from(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}
