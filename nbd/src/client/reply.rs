//! Putting the chunks of one reply together. No I/O: the reader asks where bytes go.

use bytes::BytesMut;

use super::to_usize;
use crate::{
    error::{NbdError, RequestInfo},
    wire::{Coverage, Errno, Extent, Headers, ProtocolError, RemoteError, decode_block_status},
};

/// Most error chunks in one reply: enough for one in each sector of a large read.
const ERRORS_MAX: u32 = 1 << 16;

/// What a request was answered with.
#[derive(Debug)]
pub(super) enum Answer {
    Done,
    Data(BytesMut),
    Status(Vec<Vec<Extent>>),
}

/// A reply as far as it has arrived.
#[derive(Debug)]
pub(super) struct Reply {
    body: Body,
    /// The first error chunk; one makes the whole reply fail.
    error: Option<RemoteError>,
    errors: u32,
}

#[derive(Debug)]
enum Body {
    Plain,
    Read {
        coverage: Coverage,
        /// Filled up to the end of the furthest chunk; what other chunks have not covered is zero.
        buffer: BytesMut,
    },
    Status {
        /// Ids in the order of the answer, each with its list once it has arrived.
        contexts: Vec<(u32, Option<Vec<Extent>>)>,
    },
}

impl Reply {
    fn new(body: Body) -> Self {
        Self { body, error: None, errors: 0 }
    }

    /// No data are expected.
    pub(super) fn plain() -> Self {
        Self::new(Body::Plain)
    }

    /// Data are expected into `buffer`, which is empty and has room for exactly the request.
    pub(super) fn read(request: RequestInfo, buffer: BytesMut) -> Self {
        let coverage = Coverage::new(request.offset, request.length);
        Self::new(Body::Read { coverage, buffer })
    }

    /// One list for each context is expected.
    pub(super) fn block_status(ids: &[u32]) -> Self {
        let contexts = ids.iter().map(|id| (*id, None)).collect();
        Self::new(Body::Status { contexts })
    }

    /// Makes room for data at `offset` of the export.
    pub(super) fn place(&mut self, offset: u64, length: u64) -> Result<Place<'_>, ProtocolError> {
        let Body::Read { coverage, buffer } = &mut self.body else {
            return Err(ProtocolError::OutsideRequest { offset, length });
        };
        let start = to_usize(coverage.insert(offset, length)?);
        let length = to_usize(length);
        if start < buffer.len() {
            // Fills a gap: no overlap, so it ends before the furthest chunk starts.
            return Ok(Place::Within(&mut buffer[start..start + length]));
        }
        buffer.resize(start, 0);
        Ok(Place::Append(buffer, length))
    }

    /// Zeros at `offset` of the export.
    pub(super) fn hole(&mut self, offset: u64, length: u64) -> Result<(), ProtocolError> {
        if let Place::Append(buffer, length) = self.place(offset, length)? {
            buffer.resize(buffer.len() + length, 0);
        }
        Ok(())
    }

    /// A block status chunk.
    pub(super) fn status(&mut self, headers: Headers, payload: &[u8]) -> Result<(), ProtocolError> {
        let (id, extents) = decode_block_status(headers, payload)?;
        let Body::Status { contexts } = &mut self.body else {
            return Err(ProtocolError::UnknownContext { id });
        };
        let slot = contexts.iter_mut().find(|(known, _)| *known == id);
        match slot {
            None => Err(ProtocolError::UnknownContext { id }),
            Some((_, Some(_))) => Err(ProtocolError::DuplicateContext { id }),
            Some((_, empty)) => {
                *empty = Some(extents);
                Ok(())
            }
        }
    }

    /// An error chunk.
    pub(super) fn error(&mut self, error: RemoteError) -> Result<(), ProtocolError> {
        self.errors += 1;
        if self.errors > ERRORS_MAX {
            return Err(ProtocolError::TooManyChunks { limit: ERRORS_MAX });
        }
        self.error.get_or_insert(error);
        Ok(())
    }

    /// A simple reply with an error.
    pub(super) fn simple_error(&mut self, errno: Errno) {
        self.error.get_or_insert(RemoteError { errno, at: None, message: String::new() });
    }

    /// The last chunk has arrived: the outer error breaks the connection, the inner one does not.
    pub(super) fn finish(
        self,
        request: RequestInfo,
    ) -> Result<Result<Answer, NbdError>, ProtocolError> {
        if let Some(RemoteError { errno, at, message }) = self.error {
            let RequestInfo { command, offset, length } = request;
            return Ok(Err(NbdError::Remote { command, offset, length, errno, at, message }));
        }
        Ok(Ok(match self.body {
            Body::Plain => Answer::Done,
            Body::Read { coverage, buffer } => {
                coverage.complete()?;
                Answer::Data(buffer)
            }
            Body::Status { contexts } => {
                let list =
                    |(id, list): (u32, Option<_>)| list.ok_or(ProtocolError::MissingContext { id });
                Answer::Status(contexts.into_iter().map(list).collect::<Result<_, _>>()?)
            }
        }))
    }
}

/// Where the data of a chunk go.
pub(super) enum Place<'a> {
    /// So many bytes at the end of the buffer, which has room for them.
    Append(&'a mut BytesMut, usize),
    /// Between chunks that came before.
    Within(&'a mut [u8]),
}
