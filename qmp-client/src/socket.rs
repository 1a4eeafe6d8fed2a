//! Connecting to a Unix socket, and finding out whether the other side took the connection.

use std::{fs, io, path::Path, time::Duration};

use tokio::{
    net::UnixStream,
    time::{Instant, sleep},
};

/// How often a full queue of waiting connections is tried again.
const RETRY: Duration = Duration::from_millis(20);

/// The moment after `timeout`; one beyond the clock's range is as good as none.
pub(crate) fn deadline(timeout: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(timeout).unwrap_or(now + Duration::from_secs(1 << 30))
}

/// Connects before `until`. `Ok(None)`: the queue of connections that nobody takes was full all the
/// time. QEMU serves one client for each socket and lets only one or two others wait.
pub(crate) async fn connect(socket: &Path, until: Instant) -> io::Result<Option<UnixStream>> {
    loop {
        match UnixStream::connect(socket).await {
            Ok(stream) => return Ok(Some(stream)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
        if Instant::now() + RETRY >= until {
            return Ok(None);
        }
        sleep(RETRY).await;
    }
}

/// Whether a connection to the socket of `stream` waits that nobody has accepted: the server is busy
/// with another client, or hangs. `None` if the kernel does not say.
///
/// Linux shows such a connection in `/proc/net/unix` (proc_pid_net(5)) under the path of the listener,
/// in state 02 (connecting) and without inode. It is in our own network name space.
pub(crate) fn waits_for_accept(stream: &UnixStream) -> Option<bool> {
    let address = stream.peer_addr().ok()?;
    let path = address.as_pathname()?.to_str()?;
    let table = fs::read("/proc/net/unix").ok()?;
    let table = String::from_utf8_lossy(&table);
    Some(table.lines().any(|line| is_waiting(line, path)))
}

/// One line is `Num RefCount Protocol Flags Type St Inode Path`.
fn is_waiting(line: &str, path: &str) -> bool {
    let mut fields = line.split_whitespace().skip(5);
    let waiting = fields.next() == Some("02") && fields.next() == Some("0");
    waiting && line.strip_suffix(path).is_some_and(|before| before.ends_with(' '))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiting_connection_is_told_from_an_accepted_one() {
        let waiting = "0000000033789625: 00000003 00000000 00000000 0001 02     0 /run/a b/q.sock";
        let accepted = "000000007bae726d: 00000003 00000000 00000000 0001 03 13598 /run/a b/q.sock";
        assert!(is_waiting(waiting, "/run/a b/q.sock"));
        assert!(!is_waiting(waiting, "b/q.sock/"));
        assert!(!is_waiting(waiting, "/q.sock"));
        assert!(!is_waiting(accepted, "/run/a b/q.sock"));
        assert!(!is_waiting("Num RefCount Protocol Flags Type St Inode Path", "Path"));
    }

    #[tokio::test]
    async fn the_kernel_says_whether_somebody_took_us() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let until = Instant::now() + Duration::from_secs(5);
        let stream = connect(&path, until).await.unwrap().unwrap();
        assert_eq!(waits_for_accept(&stream), Some(true));
        let _taken = listener.accept().await.unwrap();
        assert_eq!(waits_for_accept(&stream), Some(false));
    }
}
