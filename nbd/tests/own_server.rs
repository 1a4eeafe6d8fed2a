//! Our server, read by our client and judged by the tools of others.

mod common;

use std::{io, sync::Arc};

use common::{MIB, have, options, run, uri};
use nbd::{Client, Command, Errno, Extent, NbdError, Server, ServerOptions, Source};
use tempfile::TempDir;
use tokio::net::UnixListener;

/// A disk whose odd MiBs are holes and whose even ones hold a pattern made from their offsets;
/// reads across `bad` fail.
struct Striped {
    size: u64,
    bad: Option<u64>,
}

impl Striped {
    fn byte(offset: u64) -> u8 {
        let hole = (offset / MIB) % 2 == 1;
        if hole { 0 } else { (((offset / 8 * 0x9e37_79b9) >> 13) | 1).to_le_bytes()[0] }
    }

    fn content(&self) -> Vec<u8> {
        (0..self.size).map(Self::byte).collect()
    }
}

impl Source for Striped {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset + u64::try_from(buf.len()).unwrap();
        if self.bad.is_some_and(|bad| (offset..end).contains(&bad)) {
            return Err(io::Error::other("bad sector"));
        }
        for (at, byte) in (offset..).zip(buf) {
            *byte = Self::byte(at);
        }
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64) -> io::Result<Vec<Extent>> {
        let (mut at, mut extents) = (offset, Vec::new());
        while at < offset + len {
            let next = (at / MIB + 1) * MIB;
            let flags = if (at / MIB) % 2 == 1 { 3 } else { 0 };
            extents.push(Extent { length: next.min(self.size) - at, flags });
            at = next;
        }
        Ok(extents)
    }
}

fn serve(folder: &TempDir, bad: Option<u64>) -> (Server, std::path::PathBuf, Vec<u8>) {
    let socket = folder.path().join("own.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let source = Striped { size: 10 * MIB + 1234 * 512, bad };
    let content = source.content();
    let options = ServerOptions { export: "disk".to_owned(), ..ServerOptions::default() };
    (Server::start(listener, Arc::new(source), options), socket, content)
}

#[tokio::test]
async fn our_client_reads_our_server_with_extended_headers() {
    let folder = TempDir::new().unwrap();
    let (server, socket, content) = serve(&folder, None);
    let mut ours = options("disk", &["base:allocation"]);
    ours.connections = 2;
    let client = Client::connect(&socket, ours).await.unwrap();
    assert_eq!(client.info().style, nbd::wire::ReplyStyle::Extended);
    for (offset, len) in [(0, 10 << 20), (MIB - 5, 10), (MIB + 7, 1 << 20), (10 * MIB, 1234 * 512)]
    {
        let from = usize::try_from(offset).unwrap();
        let data = client.read(offset, len).await.unwrap();
        assert!(data == content[from..from + data.len()], "read at {offset} differs");
    }
    let lists = client.block_status(MIB / 2, 2 * MIB).await.unwrap();
    let extent = |length, flags| Extent { length, flags };
    assert_eq!(lists, [[extent(MIB / 2, 0), extent(MIB, 3), extent(MIB / 2, 0)]]);
    assert!(matches!(client.trim(0, 4096).await, Err(NbdError::Unsupported { .. })));
    client.disconnect().await.unwrap();
    server.stop().await;
}

#[tokio::test]
async fn the_server_reports_errors_of_its_source_and_goes_on() {
    let folder = TempDir::new().unwrap();
    let (server, socket, content) = serve(&folder, Some(4 * MIB + 17));
    let client = Client::connect(&socket, options("", &[])).await.unwrap();
    let error = client.read(4 * MIB, 4096).await.unwrap_err();
    let NbdError::Remote { command, offset, length, errno, message, .. } = error else {
        panic!("{error}")
    };
    assert_eq!((command, offset, length, errno), (Command::Read, 4 * MIB, 4096, Errno::EIO));
    assert_eq!(message, "bad sector");
    assert!(client.read(0, 4096).await.unwrap() == content[..4096]);
    drop(server);
    let gone = client.read(0, 4096).await;
    assert!(matches!(gone, Err(NbdError::Closed { .. })), "{gone:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdinfo_sees_size_flags_contexts_and_holes() {
    if !have(&["nbdinfo"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let (_server, socket, content) = serve(&folder, None);
    let address = uri("disk", &socket);
    assert_eq!(run("nbdinfo", &["--size", &address]).trim(), content.len().to_string());
    let text = run("nbdinfo", &[&address]);
    for line in ["is_read_only: true", "can_multi_conn: true", "base:allocation"] {
        assert!(text.contains(line), "`{line}` is missing in:\n{text}");
    }
    assert!(run("nbdinfo", &["--list", &uri("", &socket)]).contains("export=\"disk\""));
    let map = run("nbdinfo", &["--map", &address]);
    let lines: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 11, "{map}");
    assert_eq!(lines[0][..3], ["0", "1048576", "0"]);
    assert_eq!(lines[1][..3], ["1048576", "1048576", "3"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdcopy_and_qemu_img_convert_copy_the_disk_and_keep_holes() {
    if !have(&["nbdcopy", "qemu-img"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let (_server, socket, content) = serve(&folder, None);
    let address = uri("disk", &socket);
    let copy = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (nbdcopy, convert) = (copy("nbdcopy.raw"), copy("convert.raw"));
    run("nbdcopy", &[&address, &nbdcopy]);
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &address, &convert]);
    for file in [nbdcopy, convert] {
        assert!(std::fs::read(&file).unwrap() == content, "{file} differs");
        let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&file).unwrap());
        assert!(blocks * 512 < 7 * MIB, "{file} has {blocks} blocks: holes were filled");
    }
    let full = copy("full.raw");
    run("nbdcopy", &["--no-extents", "--request-size=4194304", &address, &full]);
    assert!(std::fs::read(&full).unwrap() == content, "structured reads with holes differ");
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_are_refused_and_do_not_disturb() {
    if !have(&["qemu-io"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let (_server, socket, content) = serve(&folder, None);
    let address = uri("disk", &socket);
    let io = std::process::Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write 0 4096", &address])
        .output()
        .unwrap();
    assert!(!io.status.success(), "a write was accepted");
    let client = Client::connect(&socket, options("disk", &[])).await.unwrap();
    assert!(client.read(0, 4096).await.unwrap() == content[..4096]);
}

/// Raw requests that our client never sends, in all three styles of replies.
#[tokio::test]
async fn raw_requests_get_the_errors_of_the_protocol() {
    use nbd::wire::{self, Headers, ReplyHeader, Request};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let folder = TempDir::new().unwrap();
    let (_server, socket, content) = serve(&folder, None);
    let mut stream = tokio::net::UnixStream::connect(&socket).await.unwrap();
    let mut greeting = [0; wire::GREETING_LEN];
    stream.read_exact(&mut greeting).await.unwrap();
    wire::decode_greeting(&greeting).unwrap();
    stream.write_all(&[0, 0, 0, 1]).await.unwrap(); // fixed newstyle, with zeroes
    // An option that nobody knows, then the oldest way to open an export.
    stream.write_all(&wire::encode_option(5, &[])).await.unwrap();
    let mut refusal = [0; wire::OPTION_REPLY_HEADER_LEN];
    stream.read_exact(&mut refusal).await.unwrap();
    let refusal = wire::OptionReplyHeader::decode(&refusal).unwrap();
    assert_eq!(refusal.refusal(), Some(wire::Refusal::Unsupported));
    let mut text = vec![0; wire::data_len(refusal.length)];
    stream.read_exact(&mut text).await.unwrap();
    stream.write_all(&wire::encode_option(wire::OPT_EXPORT_NAME, b"disk")).await.unwrap();
    let mut opened = [0; 8 + 2 + 124];
    stream.read_exact(&mut opened).await.unwrap();
    assert_eq!(u64::from_be_bytes(*opened.first_chunk().unwrap()), content.len() as u64);
    assert_eq!(opened[10..], [0; 124]);

    let cases = [
        (Command::Write, 0, 512, 0, Some(Errno::EPERM)),
        (Command::Trim, 0, 512, 0, Some(Errno::EPERM)),
        (Command::WriteZeroes, 0, 512, 0, Some(Errno::EPERM)),
        (Command::Read, u64::MAX, 512, 0, Some(Errno::EINVAL)),
        (Command::Read, 0, 512, 0x80, Some(Errno::EINVAL)),
        (Command::BlockStatus, 0, 512, 0, Some(Errno::EINVAL)),
        (Command::Unknown(99), 0, 512, 0, Some(Errno::EINVAL)),
        (Command::Flush, 0, 0, 0, None),
        (Command::Read, 0, 512, 0, None),
    ];
    for (cookie, (command, offset, length, flags, expected)) in (1..).zip(cases) {
        let request = Request { flags, command, cookie, offset, length };
        let mut bytes = Vec::new();
        request.encode(Headers::Compact, &mut bytes);
        bytes.resize(bytes.len() + request.payload_len(Headers::Compact) as usize, 0xaa);
        stream.write_all(&bytes).await.unwrap();
        let mut reply = [0; 16];
        stream.read_exact(&mut reply).await.unwrap();
        let reply = ReplyHeader::decode(&reply).unwrap();
        assert_eq!(reply, ReplyHeader::Simple { cookie, error: expected }, "{command}");
    }
    let mut data = [0; 512];
    stream.read_exact(&mut data).await.unwrap();
    assert!(data == content[..512]);
    let mut goodbye = Vec::new();
    let leave = Request { flags: 0, command: Command::Disconnect, cookie: 0, offset: 0, length: 0 };
    leave.encode(Headers::Compact, &mut goodbye);
    stream.write_all(&goodbye).await.unwrap();
    assert_eq!(stream.read(&mut data).await.unwrap(), 0);
}
