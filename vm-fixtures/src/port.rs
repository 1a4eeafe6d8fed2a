//! Ports for servers that tests start.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::net::sockopt::set_socket_reuseaddr;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, getsockname, socket_with};

/// A port on 127.0.0.1 that nobody else is given before this is dropped.
///
/// A server that sets `SO_REUSEADDR`, as servers do, can still listen there, and again after it was ended:
/// what holds the port is bound with that option and does not listen (`man 7 socket`).
#[derive(Debug)]
pub struct Port {
    _held: OwnedFd,
    address: SocketAddr,
}

impl Port {
    /// Takes one.
    ///
    /// # Panics
    /// When loopback has none left.
    pub fn take() -> Self {
        let kind = (AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC);
        let held = socket_with(kind.0, kind.1, kind.2, None).expect("descriptors are free");
        set_socket_reuseaddr(&held, true).expect("any socket has this option");
        bind(&held, &SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).expect("loopback has ports");
        let address = getsockname(&held).expect("it is bound");
        Self { address: address.try_into().expect("it is one of IPv4"), _held: held }
    }

    /// Its address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its number.
    pub fn number(&self) -> u16 {
        self.address.port()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_server_listens_at_a_port_that_nobody_else_is_given() {
        let port = Port::take();
        for _ in 0..2 {
            let server = TcpListener::bind(port.address()).unwrap();
            TcpStream::connect(port.address()).unwrap();
            drop(server);
        }
        assert!(TcpStream::connect(port.address()).is_err(), "what holds it takes no connection");
        let others: Vec<_> = (0..200).map(|_| Port::take()).collect();
        let numbers: HashSet<_> = others.iter().chain([&port]).map(Port::number).collect();
        assert_eq!(numbers.len(), 201);
    }
}
