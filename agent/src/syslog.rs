//! The system's log, for processes that nobody looks at.

use std::os::unix::net::UnixDatagram;

/// Says something that a person must act on. The run that has started this process may be gone, and its terminal
/// with it: who looks for the cause of a guest that stands still looks into the system's log (RFC 3164,
/// facility daemon, severity error).
pub fn tell(what: &str) {
    let line = format!("<27>kvmsnap[{}]: {what}", std::process::id());
    // Without a log there is nobody left to tell.
    let _ = UnixDatagram::unbound().and_then(|log| log.send_to(line.as_bytes(), "/dev/log"));
}
