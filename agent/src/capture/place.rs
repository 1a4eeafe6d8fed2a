//! Where an image lies, and how QEMU is told.

use std::fmt;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// Where an image lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A file or block device of this host.
    Local(PathBuf),
    /// The export of an NBD server.
    Nbd(NbdExport),
}

/// An export of an NBD server that talks without TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdExport {
    /// The server.
    pub server: NbdServer,
    /// The name of the export; empty for the only one.
    pub name: String,
}

/// How an NBD server is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NbdServer {
    /// Its socket on this host.
    Unix(PathBuf),
    /// Its host and port.
    Tcp(String, String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(path) => write!(f, "{}", path.display()),
            Self::Nbd(NbdExport { server: NbdServer::Unix(socket), name }) => {
                write!(f, "nbd+unix:///{name}?socket={}", socket.display())
            }
            Self::Nbd(NbdExport { server: NbdServer::Tcp(host, port), name }) => {
                write!(f, "nbd://{host}:{port}/{name}")
            }
        }
    }
}

impl Place {
    /// It as a node of QEMU's block layer.
    pub(super) fn node(&self) -> Value {
        match self {
            Self::Local(path) => {
                let driver = if is_device(path) { "host_device" } else { "file" };
                json!({"driver": driver, "filename": path})
            }
            Self::Nbd(NbdExport { server, name }) => {
                let server = match server {
                    NbdServer::Unix(socket) => json!({"type": "unix", "path": socket}),
                    NbdServer::Tcp(host, port) => {
                        json!({"type": "inet", "host": host, "port": port})
                    }
                };
                json!({"driver": "nbd", "server": server, "export": name})
            }
        }
    }
}

/// Whether a path leads to a block device.
pub fn is_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}

/// The folder beside an image, for what is made there; that of a block device is in the host's memory.
pub fn beside(image: &Path) -> Option<&Path> {
    image.parent().filter(|_| image.is_absolute() && !is_device(image))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_is_named_as_it_is_opened() {
        let nbd = |server| Place::Nbd(NbdExport { server, name: "disk".into() });
        let unix = nbd(NbdServer::Unix("/run/s".into()));
        let tcp = nbd(NbdServer::Tcp("::1".into(), "10809".into()));
        assert_eq!(unix.to_string(), "nbd+unix:///disk?socket=/run/s");
        let server = json!({"type": "unix", "path": "/run/s"});
        assert_eq!(unix.node(), json!({"driver": "nbd", "server": server, "export": "disk"}));
        let server = json!({"type": "inet", "host": "::1", "port": "10809"});
        assert_eq!(tcp.node(), json!({"driver": "nbd", "server": server, "export": "disk"}));
    }
}
