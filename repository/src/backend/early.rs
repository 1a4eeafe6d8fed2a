//! Answers that come before all was sent: a server that is full says so and hangs up, whatever else was to come.

use std::io::{Error as IoError, ErrorKind};

use ureq::{
    Error,
    unversioned::transport::{Buffers, ConnectionDetails, Connector, NextTimeout, Transport},
};

/// Puts [`Hearing`] around connections.
#[derive(Debug)]
pub(super) struct Hear;

impl<In: Transport> Connector<In> for Hear {
    type Out = Hearing<In>;

    fn connect(
        &self,
        _: &ConnectionDetails<'_>,
        chained: Option<In>,
    ) -> Result<Option<Self::Out>, Error> {
        Ok(chained.map(|inner| Hearing { inner, cut: None }))
    }
}

/// A connection of which nobody takes what is sent may still have an answer: only where there is none is it an
/// error that it was cut.
#[derive(Debug)]
pub(super) struct Hearing<In> {
    inner: In,
    cut: Option<ErrorKind>,
}

impl<In: Transport> Transport for Hearing<In> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.inner.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        if self.cut.is_some() {
            return Ok(());
        }
        match self.inner.transmit_output(amount, timeout) {
            Err(Error::Io(error)) if is_cut(&error) => {
                self.cut = Some(error.kind());
                Ok(())
            }
            sent => sent,
        }
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        match (self.inner.await_input(timeout), self.cut) {
            (Ok(true), _) => Ok(true),
            (_, Some(cut)) => Err(Error::Io(cut.into())),
            (heard, None) => heard,
        }
    }

    fn is_open(&mut self) -> bool {
        self.cut.is_none() && self.inner.is_open()
    }

    fn is_tls(&self) -> bool {
        self.inner.is_tls()
    }
}

fn is_cut(error: &IoError) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset)
}
