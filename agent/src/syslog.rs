//! The system's log, for processes that nobody looks at. journald listens at the same socket.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

/// How serious it is (RFC 3164, section 4.1.1).
#[derive(Debug, Clone, Copy)]
pub enum Severity {
    /// A person must act.
    Error = 3,
    /// A person should look.
    Warning = 4,
    /// Worth knowing.
    Notice = 5,
    /// For the record.
    Informational = 6,
}

const SOCKET: &str = "/dev/log";
/// RFC 3164, section 4.1.1: system daemons.
const FACILITY: u8 = 3;
/// Bytes of a line at most; a datagram that is too long would not be taken at all.
const LINE_MAX: usize = 8000;

/// Says something that a person must act on. The run that has started this process may be gone, and its terminal
/// with it: who looks for the cause of a guest that stands still looks into the system's log.
pub fn tell(what: &str) {
    // Without a log there is nobody left to tell.
    let _ = write(Severity::Error, what);
}

/// Writes one line.
///
/// # Errors
/// Where there is no log, or it does not take it.
pub fn write(severity: Severity, what: &str) -> io::Result<()> {
    write_to(Path::new(SOCKET), severity, what)
}

fn write_to(socket: &Path, severity: Severity, what: &str) -> io::Result<()> {
    let priority = FACILITY * 8 + severity as u8;
    let line = format!("<{priority}>kvmsnap[{}]: {what}", std::process::id());
    let line = &line.as_bytes()[..line.len().min(LINE_MAX)];
    UnixDatagram::unbound()?.send_to(line, socket).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_its_level_and_is_cut_where_no_log_would_take_it() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("log");
        let log = UnixDatagram::bind(&socket).unwrap();
        write_to(&socket, Severity::Warning, &"ü".repeat(100_000)).unwrap();
        let mut line = vec![0; 2 * LINE_MAX];
        let len = log.recv(&mut line).unwrap();
        // Facility daemon, severity warning.
        assert!(line.starts_with(b"<28>kvmsnap["));
        assert_eq!(len, LINE_MAX);
    }
}
