//! The client against servers of others: QEMU and nbdkit.

mod common;

use std::time::Duration;

use common::{MIB, Process, have, options, run};
use nbd::{Command, Errno, Extent, NbdError, Options};
use tempfile::TempDir;

const BASE: &str = "base:allocation";
const DIRTY: &str = "qemu:dirty-bitmap:b0";

/// A qcow2 of 16 MiB: 0x11 in the first 4 MiB; then a bitmap, and since then 0x22 at 1 MiB, zeros
/// at 2 MiB, a discarded 3rd MiB, 0x33 at 8 MiB.
fn image_with_bitmap(folder: &TempDir) -> String {
    let image = folder.path().join("disk.qcow2").to_str().unwrap().to_owned();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "16M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 0x11 0 4M", &image]);
    run("qemu-img", &["bitmap", "--add", "-f", "qcow2", &image, "b0"]);
    let write =
        ["write -P 0x22 1M 64k", "write -z 2M 64k", "discard 3M 64k", "write -P 0x33 8M 64k"];
    let args: Vec<_> = write.iter().flat_map(|command| ["-c", command]).collect();
    run("qemu-io", &[&["-f", "qcow2"], args.as_slice(), &[&image]].concat());
    image
}

/// Walks the whole export; for each context its runs, neighbours with equal flags joined.
async fn map(client: &nbd::Client) -> Vec<Vec<Extent>> {
    let mut all = vec![Vec::<Extent>::new(); client.contexts().len()];
    for (context, joined) in all.iter_mut().enumerate() {
        let mut offset = 0;
        while offset < client.size() {
            let lists = client.block_status(offset, client.size() - offset).await.unwrap();
            for extent in &lists[context] {
                offset += extent.length;
                match joined.last_mut() {
                    Some(last) if last.flags == extent.flags => last.length += extent.length,
                    _ => joined.push(*extent),
                }
            }
        }
        assert_eq!(offset, client.size());
    }
    all
}

fn starts(extents: &[Extent]) -> Vec<(u64, u64, u64)> {
    let mut at = 0;
    let mut start = |extent: &Extent| {
        let start = at;
        at += extent.length;
        (start, extent.length, extent.flags)
    };
    extents.iter().map(&mut start).collect()
}

#[tokio::test]
async fn allocation_and_dirty_bitmap_of_qemu_nbd_in_one_request() {
    if !have(&["qemu-nbd", "qemu-img", "qemu-io"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let image = image_with_bitmap(&folder);
    let socket = folder.path().join("q.sock");
    let sock = socket.to_str().unwrap().to_owned();
    let args = ["-r", "-t", "-e", "8", "-x", "d", "-f", "qcow2", "-B", "b0", "-k", &sock, &image];
    let server = Process::start("qemu-nbd", &args, socket);
    // Asked for in another order than the server has them, and one that it does not have.
    let client = server.client(options("d", &[DIRTY, "qemu:dirty-bitmap:none", BASE])).await;
    assert_eq!(client.size(), 16 * MIB);
    assert_eq!(client.contexts(), [DIRTY, BASE]);
    assert!(client.info().is_read_only() && !client.info().can_trim());

    let lists = map(&client).await;

    let k64 = 65536;
    let dirty: Vec<_> = starts(&lists[0])
        .into_iter()
        .filter(|extent| extent.2 & nbd::wire::STATE_DIRTY != 0)
        .collect();
    let at = |start: u64| (start * MIB, k64, 1);
    assert_eq!(dirty, [at(1), at(2), at(3), at(8)]);
    let zero = nbd::wire::STATE_ZERO;
    let data: Vec<_> =
        starts(&lists[1]).into_iter().filter(|extent| extent.2 & zero == 0).collect();
    let first_zero = 2 * MIB + k64;
    assert_eq!(data[0], (0, 2 * MIB, 0));
    assert_eq!(data[1], (first_zero, MIB - k64, 0));
    assert_eq!(data[3], (8 * MIB, k64, 0));
    client.disconnect().await.unwrap();
}

#[tokio::test]
async fn reads_of_qemu_storage_daemon_are_the_disk_however_they_are_cut() {
    if !have(&["qemu-storage-daemon", "qemu-img", "qemu-io"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let image = image_with_bitmap(&folder);
    let raw = folder.path().join("disk.raw");
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &image, raw.to_str().unwrap()]);
    let expected = std::fs::read(&raw).unwrap();
    let socket = folder.path().join("q.sock");
    let file = format!("driver=file,node-name=f,filename={image}");
    let listen = format!("addr.type=unix,addr.path={},max-connections=8", socket.display());
    let args = [
        "--blockdev",
        &file,
        "--blockdev",
        "driver=qcow2,node-name=n,file=f",
        "--nbd-server",
        &listen,
        "--export",
        "type=nbd,id=e,node-name=n,name=d,writable=on",
    ];
    let server = Process::start("qemu-storage-daemon", &args, socket);
    let client = server.client(options("d", &[BASE])).await;
    let mut reads = tokio::task::JoinSet::new();
    // Lengths that are not aligned to anything, across data, zeros and holes, all at once.
    for (offset, len) in [(0, 16 << 20), (1_000_001, 1_500_003), (8 << 20, 65537), (16777215, 1)] {
        let client = client.clone();
        reads.spawn(async move { (offset, client.read(offset, len).await.unwrap()) });
    }
    while let Some(read) = reads.join_next().await {
        let (offset, data) = read.unwrap();
        let offset = usize::try_from(offset).unwrap();
        assert!(data == expected[offset..offset + data.len()], "read at {offset} differs");
    }
    assert!(client.read(0, 0).await.unwrap().is_empty());

    assert!(client.info().can_trim());
    client.trim(MIB, 64 << 10).await.unwrap();
    client.flush().await.unwrap();
    let outside = client.read(16 * MIB, 1).await.unwrap_err();
    assert!(matches!(outside, NbdError::OutOfRange { size, .. } if size == 16 * MIB), "{outside}");
    client.disconnect().await.unwrap();
    let after = client.read(0, 1).await.unwrap_err();
    assert!(matches!(after, NbdError::Closed { .. }), "{after}");
}

#[tokio::test]
async fn an_export_that_does_not_exist_is_refused_in_the_servers_words() {
    if !have(&["qemu-nbd"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let (image, socket) = (folder.path().join("d.raw"), folder.path().join("q.sock"));
    std::fs::File::create(&image).unwrap().set_len(MIB).unwrap();
    let sock = socket.to_str().unwrap().to_owned();
    let args = ["-t", "-e", "4", "-x", "d", "-f", "raw", "-k", &sock, image.to_str().unwrap()];
    let server = Process::start("qemu-nbd", &args, socket);
    let error = nbd::Client::connect(&server.socket, options("x", &[BASE])).await.unwrap_err();
    let NbdError::Refused { export, reason, message } = error else { panic!("{error}") };
    assert_eq!((export.as_str(), reason), ("x", nbd::wire::Refusal::UnknownExport));
    assert!(message.contains("not present"), "{message}");
    let error = nbd::Client::connect(&folder.path().join("none"), options("", &[])).await;
    assert!(matches!(error, Err(NbdError::Io { .. })));
}

#[tokio::test]
async fn several_connections_of_nbdkit_share_the_reads() {
    if !have(&["nbdkit"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let server = Process::nbdkit(&folder, &["pattern", "64M"]);
    let client = server.client(Options { connections: 4, ..options("", &[]) }).await;
    assert!(client.info().can_multi_conn());
    let mut reads = tokio::task::JoinSet::new();
    for i in 0..256_u64 {
        let client = client.clone();
        reads.spawn(async move { (i, client.read(i * 262_144, 262_144).await.unwrap()) });
    }
    while let Some(read) = reads.join_next().await {
        let (i, data) = read.unwrap();
        // The pattern plugin: each 8 bytes are their own offset.
        for (j, word) in (0_u64..).zip(data.as_chunks::<8>().0) {
            assert_eq!(u64::from_be_bytes(*word), i * 262_144 + j * 8);
        }
    }
}

#[tokio::test]
async fn reads_longer_than_the_server_allows_are_split_and_aligned() {
    if !have(&["nbdkit"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let policy = ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=65536"];
    let args = ["--filter=blocksize-policy", "pattern", "8M", "blocksize-error-policy=error"];
    let server = Process::nbdkit(&folder, &[&args[..], &policy[..]].concat());
    let client = server.client(options("", &[])).await;
    assert_eq!(client.info().block_sizes.maximum, 65536);
    let data = client.read(8 * 1001, 8 * 500_000).await.unwrap();
    assert_eq!(data.len(), 8 * 500_000);
    for (i, word) in (1001_u64..).zip(data.as_chunks::<8>().0) {
        assert_eq!(u64::from_be_bytes(*word), i * 8);
    }
}

/// R11: an error of the source is reported with the exact range, and the connection lives on.
#[tokio::test]
async fn r11_eio_names_command_and_range() {
    if !have(&["nbdkit"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let fail = folder.path().join("fail");
    let trigger = format!("error-file={}", fail.display());
    let server = Process::nbdkit(
        &folder,
        &["--filter=error", "memory", "16M", "error-pread=EIO", "error-pread-rate=100%", &trigger],
    );
    let client = server.client(options("", &[])).await;
    std::fs::File::create(&fail).unwrap();
    let error = client.read(5 * MIB, 1 << 20).await.unwrap_err();
    let NbdError::Remote { command, offset, length, errno, .. } = error else { panic!("{error}") };
    assert_eq!((command, offset, length), (Command::Read, 5 * MIB, MIB));
    assert_eq!(errno, Errno::EIO);
    std::fs::remove_file(&fail).unwrap();
    assert!(client.read(5 * MIB, 1 << 20).await.unwrap().iter().all(|byte| *byte == 0));
}

/// R11: one bad range in the middle of many requests in flight fails only itself.
#[tokio::test]
async fn r11_blkdebug_error_hits_one_of_many_reads() {
    if !have(&["qemu-storage-daemon"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let (image, socket) = (folder.path().join("d.raw"), folder.path().join("q.sock"));
    std::fs::write(&image, vec![7; 16 << 20]).unwrap();
    let file = format!("driver=file,node-name=f,filename={}", image.display());
    // Sector 8192 is the byte at 4 MiB.
    let debug = r#"{"driver":"blkdebug","node-name":"b","image":"f","inject-error":
        [{"event":"none","iotype":"read","errno":5,"sector":8192,"once":false}]}"#;
    let listen = format!("addr.type=unix,addr.path={}", socket.display());
    let export = "type=nbd,id=e,node-name=b,name=d";
    let args =
        ["--blockdev", &file, "--blockdev", debug, "--nbd-server", &listen, "--export", export];
    let server = Process::start("qemu-storage-daemon", &args, socket);
    let client = server.client(options("d", &[])).await;
    let mut reads = tokio::task::JoinSet::new();
    for i in 0..16 {
        let client = client.clone();
        reads.spawn(async move { (i, client.read(i * MIB, 1 << 20).await) });
    }
    while let Some(read) = reads.join_next().await {
        match read.unwrap() {
            (4, Err(NbdError::Remote { offset, length, errno: Errno::EIO, .. })) => {
                assert_eq!((offset, length), (4 * MIB, MIB));
            }
            (4, other) => panic!("the bad range gave {other:?}"),
            (_, other) => assert!(other.unwrap().iter().all(|byte| *byte == 7)),
        }
    }
}

/// R12: a server slower than the deadline.
#[tokio::test]
async fn r12_a_delayed_reply_ends_at_the_deadline() {
    if !have(&["nbdkit"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let server = Process::nbdkit(&folder, &["--filter=delay", "memory", "1M", "delay-read=30"]);
    let timeout = Duration::from_millis(500);
    let client = server.client(Options { timeout, ..options("", &[]) }).await;
    let begin = std::time::Instant::now();
    let error = client.read(0, 4096).await.unwrap_err();
    assert!(matches!(error, NbdError::Timeout { waited, .. } if waited >= timeout), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(20));
    assert!(matches!(client.read(0, 4096).await, Err(NbdError::Timeout { .. })));
}

/// R12: a server that is killed names the request that was open.
#[tokio::test]
async fn r12_a_killed_server_is_reported_with_the_open_request() {
    if !have(&["nbdkit"]) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let mut server = Process::nbdkit(&folder, &["--filter=delay", "memory", "1M", "delay-read=30"]);
    let client = server.client(options("", &[])).await;
    let reader = client.clone();
    let read = tokio::spawn(async move { reader.read(4096, 512).await });
    tokio::time::sleep(Duration::from_millis(200)).await;
    server.kill();
    let error = read.await.unwrap().unwrap_err();
    assert!(matches!(error, NbdError::Closed { .. }), "{error}");
    assert!(error.to_string().ends_with("read of 512 bytes at offset 4096"), "{error}");
}
