//! R12: the client against a server that follows a script: cut, slow, short, reordered, forged.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use nbd::{
    Activity, Client, Command, Errno, Extent, NbdError, Options, ProtocolError,
    wire::{
        self, BlockSizes, CHUNK_BLOCK_STATUS, CHUNK_BLOCK_STATUS_EXT, CHUNK_DATA, CHUNK_ERROR,
        CHUNK_ERROR_OFFSET, CHUNK_HOLE, CHUNK_NONE, ChunkHeader, Headers, Info, ReplyHeader,
        ReplyStyle, Request,
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

/// Flags, type and payload of a chunk.
type Chunk = (u16, u16, Vec<u8>);

const SIZE: u64 = 1 << 20;
const DONE: u16 = wire::REPLY_FLAG_DONE;
/// Requests below read so many bytes here.
const AT: u64 = 4096;
const LEN: u32 = 1024;

fn options(timeout_ms: u64) -> Options {
    Options {
        contexts: vec!["base:allocation".to_owned(), "x:y".to_owned()],
        timeout: Duration::from_millis(timeout_ms),
        ..Options::default()
    }
}

/// What the server says up to the transmission phase; contexts have ids 7 and 9.
fn handshake(style: ReplyStyle) -> Vec<u8> {
    handshake_with(style, wire::FLAG_HAS_FLAGS | wire::FLAG_SEND_TRIM)
}

fn handshake_with(style: ReplyStyle, flags: u16) -> Vec<u8> {
    let unsupported = wire::Refusal::Unsupported.code();
    let reply = |option, kind, data: &[u8]| wire::encode_option_reply(option, kind, data);
    let mut out = wire::encode_greeting(wire::FIXED_NEWSTYLE | wire::NO_ZEROES);
    let extended = if style == ReplyStyle::Extended { wire::REP_ACK } else { unsupported };
    out.extend(reply(wire::OPT_EXTENDED_HEADERS, extended, &[]));
    if style != ReplyStyle::Extended {
        let structured = if style == ReplyStyle::Simple { unsupported } else { wire::REP_ACK };
        out.extend(reply(wire::OPT_STRUCTURED_REPLY, structured, &[]));
    }
    if style != ReplyStyle::Simple {
        for (id, name) in [(9, "x:y"), (7, "base:allocation")] {
            let context = wire::encode_meta_context(id, name);
            out.extend(reply(wire::OPT_SET_META_CONTEXT, wire::REP_META_CONTEXT, &context));
        }
        out.extend(reply(wire::OPT_SET_META_CONTEXT, wire::REP_ACK, &[]));
    }
    let infos = [Info::Export { size: SIZE, flags }, Info::BlockSize(BlockSizes::default())];
    for info in infos {
        out.extend(reply(wire::OPT_GO, wire::REP_INFO, &wire::encode_info(info)));
    }
    out.extend(reply(wire::OPT_GO, wire::REP_ACK, &[]));
    out
}

/// The far end of a connection after the handshake.
struct Peer {
    stream: UnixStream,
    style: ReplyStyle,
}

impl Peer {
    async fn request(&mut self) -> Request {
        let headers = self.style.headers();
        let mut bytes = vec![0; headers.request_len()];
        self.stream.read_exact(&mut bytes).await.unwrap();
        Request::decode(headers, &bytes).unwrap()
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// A chunk of the negotiated style, for a request at [`AT`].
    fn chunk(&self, cookie: u64, flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
        let offset = (self.style == ReplyStyle::Extended).then_some(AT);
        let length = payload.len() as u64;
        let mut out = Vec::new();
        ChunkHeader { flags, kind, cookie, offset, length }.encode(&mut out);
        out.extend(payload);
        out
    }
}

/// Client and far end, connected. The handshake is not judged: the client's words are skipped.
async fn connect(style: ReplyStyle, timeout_ms: u64) -> (Client, Peer) {
    connect_after(&handshake(style), style, timeout_ms).await
}

async fn connect_after(script: &[u8], style: ReplyStyle, timeout_ms: u64) -> (Client, Peer) {
    connect_over(UnixStream::pair().unwrap(), script, style, timeout_ms).await
}

async fn connect_over(
    (ours, mut theirs): (UnixStream, UnixStream),
    script: &[u8],
    style: ReplyStyle,
    timeout_ms: u64,
) -> (Client, Peer) {
    theirs.write_all(script).await.unwrap();
    let client = Client::from_stream(ours, options(timeout_ms)).await.unwrap();
    let mut skipped = vec![0; 4096];
    let len = theirs.read(&mut skipped).await.unwrap();
    let go = wire::encode_option(wire::OPT_GO, &wire::encode_go("", &[wire::INFO_BLOCK_SIZE]));
    assert!(skipped[..len].ends_with(&go));
    (client, Peer { stream: theirs, style })
}

fn data(offset: u64, len: usize, byte: u8) -> Vec<u8> {
    let mut payload = offset.to_be_bytes().to_vec();
    payload.resize(8 + len, byte);
    payload
}

/// Reads [`LEN`] bytes at [`AT`] from a peer that answers with these chunks.
async fn read_answered_with(style: ReplyStyle, chunks: &[Chunk]) -> Result<bytes::Bytes, NbdError> {
    let (client, mut peer) = connect(style, 5000).await;
    let answer = async {
        let request = peer.request().await;
        assert_eq!((request.command, request.offset), (Command::Read, AT));
        for (flags, kind, payload) in chunks {
            let bytes = peer.chunk(request.cookie, *flags, *kind, payload);
            peer.send(&bytes).await;
        }
        peer
    };
    let (result, _peer) = tokio::join!(client.read(AT, LEN), answer);
    result
}

fn breach(result: Result<bytes::Bytes, NbdError>) -> ProtocolError {
    match result {
        Err(NbdError::Protocol { source, .. }) => source,
        other => panic!("expected a breach of the protocol, got {other:?}"),
    }
}

const STYLES: [ReplyStyle; 2] = [ReplyStyle::Structured, ReplyStyle::Extended];

#[tokio::test]
async fn r12_chunks_in_any_order_make_one_read() {
    for style in STYLES {
        let hole = wire::encode_hole(AT + 512, 256);
        let chunks = [
            (0, CHUNK_DATA, data(AT + 768, 256, 4)),
            (0, CHUNK_DATA, data(AT, 256, 1)),
            (0, CHUNK_HOLE, hole),
            (DONE, CHUNK_DATA, data(AT + 256, 256, 2)),
        ];
        let bytes = read_answered_with(style, &chunks).await.unwrap();
        for (part, byte) in bytes.chunks(256).zip([1, 2, 0, 4]) {
            assert!(part.iter().all(|found| *found == byte), "{style:?}");
        }
        assert_eq!(bytes.len(), 1024);
    }
}

#[tokio::test]
async fn r12_wrong_chunks_are_named_exactly() {
    use ProtocolError as E;
    let overlap = E::Overlap { offset: AT + 100, length: 100 };
    let outside = |offset, length| E::OutsideRequest { offset, length };
    let whole = data(AT, 1024, 1);
    let cases: Vec<(Vec<Chunk>, E)> = vec![
        (vec![(0, CHUNK_DATA, data(AT, 200, 1)), (0, CHUNK_DATA, data(AT + 100, 100, 1))], overlap),
        (
            vec![(0, CHUNK_DATA, whole.clone()), (0, CHUNK_HOLE, wire::encode_hole(AT, 1))],
            E::Overlap { offset: AT, length: 1 },
        ),
        (vec![(DONE, CHUNK_DATA, data(AT, 1023, 1))], E::Gap { offset: AT + 1023 }),
        (vec![(DONE, CHUNK_DATA, data(AT + 1, 1023, 1))], E::Gap { offset: AT }),
        (vec![(DONE, CHUNK_NONE, vec![])], E::Gap { offset: AT }),
        (vec![(0, CHUNK_DATA, data(AT, 1025, 1))], outside(AT, 1025)),
        (vec![(0, CHUNK_DATA, data(AT - 1, 1, 1))], outside(AT - 1, 1)),
        (vec![(0, CHUNK_DATA, data(u64::MAX, 2, 1))], outside(u64::MAX, 2)),
        (vec![(0, CHUNK_HOLE, wire::encode_hole(AT, u32::MAX))], outside(AT, u32::MAX.into())),
        (vec![(0, CHUNK_HOLE, wire::encode_hole(AT, 0))], outside(AT, 0)),
        (
            vec![(0, CHUNK_DATA, data(AT, 0, 1))],
            E::WrongLength { message: "a data chunk", length: 8 },
        ),
        (
            vec![(0, CHUNK_HOLE, vec![0; 13])],
            E::WrongLength { message: "a hole chunk", length: 13 },
        ),
        (
            vec![(DONE, CHUNK_NONE, vec![0])],
            E::WrongLength { message: "an empty chunk", length: 1 },
        ),
        (vec![(0, CHUNK_NONE, vec![])], E::NoneNotDone),
        (
            vec![(0, CHUNK_BLOCK_STATUS, vec![0; 12])],
            E::UnexpectedChunk { kind: CHUNK_BLOCK_STATUS, command: Command::Read },
        ),
        (vec![(0, 77, vec![])], E::UnexpectedChunk { kind: 77, command: Command::Read }),
        (
            vec![(DONE, CHUNK_ERROR, vec![0, 0, 0, 5, 0, 9])],
            E::Truncated { message: "an error chunk" },
        ),
        (vec![(DONE, CHUNK_ERROR, vec![0; 6])], E::NoError),
        (
            vec![(DONE, CHUNK_ERROR, vec![1; 8193])],
            E::TooLong { message: "an error chunk", length: 8193, limit: 8192 },
        ),
    ];
    for style in STYLES {
        for (chunks, expected) in &cases {
            assert_eq!(breach(read_answered_with(style, chunks).await), *expected, "{style:?}");
        }
    }
}

#[tokio::test]
async fn r12_errors_leave_the_connection_usable() {
    for style in STYLES {
        let (client, mut peer) = connect(style, 5000).await;
        let answer = async {
            let request = peer.request().await;
            let mut payload = wire::RemoteError::encode(Errno::EIO, "bad\x1b[31m sector");
            payload.extend((AT + 512).to_be_bytes());
            let bytes = [
                peer.chunk(request.cookie, 0, CHUNK_DATA, &data(AT, 1024, 1)),
                peer.chunk(request.cookie, 0, CHUNK_ERROR_OFFSET, &payload),
                peer.chunk(request.cookie, DONE, CHUNK_NONE, &[]),
            ];
            peer.send(&bytes.concat()).await;
            let request = peer.request().await;
            let unknown = wire::RemoteError::encode(Errno::Unknown(1234), "");
            let bytes = peer.chunk(request.cookie, DONE, 0x8123, &unknown);
            peer.send(&bytes).await;
            let request = peer.request().await;
            let bytes = peer.chunk(request.cookie, DONE, CHUNK_DATA, &data(AT, 1024, 6));
            peer.send(&bytes).await;
        };
        let reads = async {
            let error = client.read(AT, LEN).await.unwrap_err();
            let NbdError::Remote { at, errno, offset, length, message, .. } = error else {
                panic!("{error}")
            };
            assert_eq!((at, errno, offset, length), (Some(AT + 512), Errno::EIO, AT, 1024));
            assert_eq!(message, "bad\u{fffd}[31m sector");
            let error = client.read(AT, LEN).await.unwrap_err();
            assert!(matches!(error, NbdError::Remote { errno: Errno::Unknown(1234), .. }));
            assert!(client.read(AT, LEN).await.unwrap().iter().all(|byte| *byte == 6));
        };
        tokio::join!(reads, answer);
    }
}

#[tokio::test]
async fn r12_forged_cookies_offsets_and_styles_end_the_connection() {
    let (client, mut peer) = connect(ReplyStyle::Extended, 5000).await;
    let answer = async {
        let request = peer.request().await;
        let forged = peer.chunk(request.cookie ^ 0xf000, DONE, CHUNK_DATA, &data(AT, 1024, 1));
        peer.send(&forged).await;
        request.cookie ^ 0xf000
    };
    let (result, cookie) = tokio::join!(client.read(AT, LEN), answer);
    assert_eq!(breach(result), ProtocolError::UnknownCookie { cookie });
    // And stays ended, for every clone.
    assert_eq!(breach(client.clone().read(0, 1).await), ProtocolError::UnknownCookie { cookie });

    let (client, mut peer) = connect(ReplyStyle::Extended, 5000).await;
    let answer = async {
        peer.request().await;
        let bytes = peer.chunk(1, DONE, CHUNK_DATA, &data(0, 1024, 1));
        peer.send(&bytes).await; // names AT, but the request was at 0
    };
    let (result, ()) = tokio::join!(client.read(0, LEN), answer);
    assert_eq!(breach(result), ProtocolError::OtherOffset { sent: 0, found: AT });

    let mut simple = Vec::new();
    ReplyHeader::encode_simple(1, None, &mut simple);
    for style in STYLES {
        let (client, mut peer) = connect(style, 5000).await;
        let answer = async {
            peer.request().await;
            peer.send(&simple).await;
        };
        let (result, ()) = tokio::join!(client.read(AT, LEN), answer);
        assert_eq!(breach(result), ProtocolError::WrongReplyStyle);
    }

    let (client, mut peer) = connect(ReplyStyle::Structured, 5000).await;
    let (result, ()) = tokio::join!(client.read(AT, LEN), peer.send(b"HTTP/1.1 200 OK"));
    assert!(matches!(breach(result), ProtocolError::BadMagic { found: 0x4854_5450, .. }));
}

/// One chunk is asked for where that is offered; a server for which it is too long may cut it.
#[tokio::test]
async fn reads_too_long_for_one_chunk_are_repeated_in_several() {
    let style = ReplyStyle::Structured;
    let script = handshake_with(style, wire::FLAG_HAS_FLAGS | wire::FLAG_SEND_DF);
    let (client, mut peer) = connect_after(&script, style, 5000).await;
    let answer = async {
        let request = peer.request().await;
        assert_eq!(request.flags, wire::CMD_FLAG_DF);
        let too_long = wire::RemoteError::encode(Errno::EOVERFLOW, "");
        let bytes = peer.chunk(request.cookie, DONE, CHUNK_ERROR, &too_long);
        peer.send(&bytes).await;
        let request = peer.request().await;
        assert_eq!(request.flags, 0);
        let first = peer.chunk(request.cookie, 0, CHUNK_DATA, &data(AT, 1000, 1));
        let second = peer.chunk(request.cookie, DONE, CHUNK_DATA, &data(AT + 1000, 24, 1));
        peer.send(&[first, second].concat()).await;
    };
    let (result, ()) = tokio::join!(client.read(AT, LEN), answer);
    assert!(result.unwrap().iter().all(|byte| *byte == 1));
}

#[tokio::test]
async fn simple_replies_work_without_block_status() {
    let (client, mut peer) = connect(ReplyStyle::Simple, 5000).await;
    assert!(client.contexts().is_empty());
    let answer = async {
        let (first, second) = (peer.request().await, peer.request().await);
        let mut bytes = Vec::new();
        ReplyHeader::encode_simple(second.cookie, Some(Errno::EINVAL), &mut bytes);
        ReplyHeader::encode_simple(first.cookie, None, &mut bytes);
        bytes.resize(bytes.len() + 1024, 3);
        peer.send(&bytes).await;
    };
    let (first, second, ()) = tokio::join!(client.read(AT, LEN), client.read(0, LEN), answer);
    assert!(first.unwrap().iter().all(|byte| *byte == 3));
    assert!(matches!(second, Err(NbdError::Remote { errno: Errno::EINVAL, offset: 0, .. })));
    let status = client.block_status(0, 1).await;
    assert!(matches!(status, Err(NbdError::Unsupported { command: Command::BlockStatus })));
}

#[tokio::test]
async fn r12_block_status_needs_each_context_once() {
    use ProtocolError as E;
    let list = [Extent { length: 512, flags: 1 }, Extent { length: 4096, flags: 0 }];
    let zero = [Extent { length: 0, flags: 0 }];
    for style in STYLES {
        let headers = style.headers();
        let kind = match headers {
            Headers::Compact => CHUNK_BLOCK_STATUS,
            Headers::Extended => CHUNK_BLOCK_STATUS_EXT,
        };
        let status = |id, list: &[Extent]| wire::encode_block_status(headers, id, list);
        let missing = Err(E::MissingContext { id: 7 });
        let cases = [
            (vec![status(9, &list[1..]), status(7, &list)], Ok(())),
            (vec![status(9, &list)], missing),
            (vec![status(9, &list), status(9, &list)], Err(E::DuplicateContext { id: 9 })),
            (vec![status(9, &list), status(8, &list)], Err(E::UnknownContext { id: 8 })),
            (vec![status(9, &list), status(7, &zero)], Err(E::BadExtent)),
        ];
        for (payloads, expected) in cases {
            let (client, mut peer) = connect(style, 5000).await;
            assert_eq!(client.contexts(), ["base:allocation", "x:y"]);
            let answer = async {
                let request = peer.request().await;
                assert_eq!((request.offset, request.length), (AT, 1024));
                for payload in &payloads {
                    let bytes = peer.chunk(request.cookie, 0, kind, payload);
                    peer.send(&bytes).await;
                }
                let bytes = peer.chunk(request.cookie, DONE, CHUNK_NONE, &[]);
                let _ = peer.stream.write_all(&bytes).await; // the client may be gone
                peer
            };
            let (result, _peer) = tokio::join!(client.block_status(AT, 1024), answer);
            match (result, expected) {
                (Ok(lists), Ok(())) => {
                    let extent = |length, flags| Extent { length, flags };
                    // In the order of `contexts`, and cut to what was asked.
                    assert_eq!(lists[0], [extent(512, 1), extent(512, 0)]);
                    assert_eq!(lists[1], [extent(1024, 0)]);
                }
                (Err(NbdError::Protocol { source, .. }), Err(breach)) => assert_eq!(source, breach),
                (result, expected) => panic!("{result:?} instead of {expected:?}"),
            }
        }
    }
}

/// A whole conversation, cut after each of its bytes: always `Closed`, at once, with the request.
#[tokio::test]
async fn r12_cut_at_every_byte() {
    for style in STYLES {
        let script = handshake(style);
        let (_, peer) = connect(style, 5000).await;
        let reply = [
            peer.chunk(1, 0, CHUNK_HOLE, &wire::encode_hole(AT + 1000, 24)),
            peer.chunk(1, DONE, CHUNK_DATA, &data(AT, 1000, 1)),
        ]
        .concat();
        for cut in 0..script.len() {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(&script[..cut]).await.unwrap();
            theirs.shutdown().await.unwrap();
            let error = Client::from_stream(ours, options(5000)).await.unwrap_err();
            let during = Activity::Handshake;
            assert!(matches!(&error, NbdError::Closed { during: d } if *d == during), "{error}");
        }
        for cut in 0..reply.len() {
            let (client, mut peer) = connect(style, 5000).await;
            let answer = async {
                peer.request().await;
                peer.send(&reply[..cut]).await;
                drop(peer);
            };
            let (result, ()) = tokio::join!(client.read(AT, LEN), answer);
            let text = result.unwrap_err().to_string();
            let expected =
                "the server closed the connection during read of 1024 bytes at offset 4096";
            assert_eq!(text, expected, "cut at {cut}");
        }
    }
}

/// The same conversation, stopped after each of some bytes without closing: the deadline ends it.
#[tokio::test]
async fn r12_stall_ends_at_the_deadline() {
    let style = ReplyStyle::Structured;
    let mut stalls = tokio::task::JoinSet::new();
    let script = Arc::new(handshake(style));
    for cut in (0..script.len()).step_by(7) {
        let script = script.clone();
        stalls.spawn(async move {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(&script[..cut]).await.unwrap();
            let begin = Instant::now();
            let error = Client::from_stream(ours, options(1000)).await.unwrap_err();
            assert!(matches!(error, NbdError::Timeout { what: Activity::Handshake, .. }));
            begin.elapsed()
        });
    }
    for cut in [0, 3, 4, 19, 20, 27, 28, 500] {
        stalls.spawn(async move {
            let (client, mut peer) = connect(style, 1000).await;
            let begin = Instant::now();
            let answer = async {
                peer.request().await;
                let reply = peer.chunk(1, DONE, CHUNK_DATA, &data(AT, 1024, 1));
                peer.send(&reply[..cut]).await;
            };
            let (result, ()) = tokio::join!(client.read(AT, LEN), answer);
            let error = result.unwrap_err();
            let NbdError::Timeout { what: Activity::Request(request), waited } = error else {
                panic!("{error}")
            };
            assert_eq!((request.offset, request.length), (AT, 1024));
            assert!(waited >= Duration::from_millis(1000));
            begin.elapsed()
        });
    }
    while let Some(elapsed) = stalls.join_next().await {
        assert!(elapsed.unwrap() < Duration::from_secs(20));
    }
}

/// Bytes for other requests do not keep a forgotten one alive; its own bytes do.
#[tokio::test]
async fn r12_progress_is_counted_for_each_request() {
    let (client, mut peer) = connect(ReplyStyle::Structured, 1500).await;
    let answer = async {
        let request = peer.request().await;
        let reply = peer.chunk(request.cookie, DONE, CHUNK_DATA, &data(AT, 1024, 1));
        for part in reply.chunks(200) {
            tokio::time::sleep(Duration::from_millis(300)).await; // 6 × 300 ms in all
            peer.send(part).await;
        }
    };
    let (result, ()) = tokio::join!(client.read(AT, LEN), answer);
    assert_eq!(result.unwrap().len(), 1024);

    let other = client.clone();
    let forgotten = tokio::spawn(async move { other.read(0, 512).await });
    peer.request().await;
    let begin = Instant::now();
    let error = loop {
        let answer = async {
            let mut request = vec![0; 28];
            if peer.stream.read_exact(&mut request).await.is_ok() {
                let request = Request::decode(Headers::Compact, &request).unwrap();
                let reply = peer.chunk(request.cookie, DONE, CHUNK_DATA, &data(AT, 1024, 1));
                let _ = peer.stream.write_all(&reply).await;
            }
        };
        let (result, ()) = tokio::join!(client.read(AT, LEN), answer);
        if let Err(error) = result {
            break error;
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "the forgotten request never ends");
    };
    let stalled = |error: &NbdError| matches!(error, NbdError::Timeout { what: Activity::Request(r), .. } if r.length == 512);
    assert!(stalled(&error), "{error}");
    assert!(stalled(&forgotten.await.unwrap().unwrap_err()));
}

/// Futures dropped at any time leave the stream in step, even with a peer that reads slowly.
#[tokio::test]
async fn dropped_futures_do_not_desynchronise() {
    let (client, mut peer) = connect(ReplyStyle::Structured, 5000).await;
    let server = tokio::spawn(async move {
        let mut header = vec![0; 28];
        while peer.stream.read_exact(&mut header).await.is_ok() {
            let Request { command, cookie, offset, length, .. } =
                Request::decode(Headers::Compact, &header).unwrap();
            if command == Command::Disconnect {
                return;
            }
            let byte = offset.to_be_bytes()[6];
            let payload = data(offset, usize::try_from(length).unwrap(), byte);
            let half = payload.len() / 2;
            let bytes = peer.chunk(cookie, DONE, CHUNK_DATA, &payload);
            peer.send(&bytes[..half]).await;
            tokio::time::sleep(Duration::from_micros(300)).await;
            peer.send(&bytes[half..]).await;
        }
    });
    for i in 0..300_u64 {
        let doomed = client.read(i * 256, 1000);
        let _ = tokio::time::timeout(Duration::from_micros(i * 3), doomed).await;
        if i % 10 == 0 {
            let data = client.read(i * 256, 1000).await.unwrap();
            assert!(data.iter().all(|byte| *byte == (i * 256).to_be_bytes()[6]));
        }
    }
    client.disconnect().await.unwrap();
    server.await.unwrap();
}

#[tokio::test]
async fn r12_deadlines_hold_where_another_holder_of_the_socket_made_it_blocking() {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let another = ours.try_clone().unwrap();
    let far = theirs.try_clone().unwrap();
    let ends = [ours, theirs].map(|end| {
        end.set_nonblocking(true).unwrap();
        UnixStream::from_std(end).unwrap()
    });
    let style = ReplyStyle::Structured;
    let (client, mut peer) = connect_over(ends.into(), &handshake(style), style, 500).await;

    another.set_nonblocking(false).unwrap();
    // Should the client wait in the kernel after all, that ends it.
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(20));
        far.shutdown(std::net::Shutdown::Both)
    });

    // Read to the last byte: whether there is more only another call can tell.
    let len = 1 << 16;
    let answer = async {
        let request = peer.request().await;
        let bytes = peer.chunk(request.cookie, DONE, CHUNK_DATA, &data(AT, len as usize, 5));
        peer.send(&bytes).await;
    };
    let (read, ()) = tokio::join!(client.read(AT, len), answer);
    assert_eq!(read.unwrap(), vec![5; len as usize]);
    let error = client.read(AT, len).await.unwrap_err();
    assert!(matches!(error, NbdError::Timeout { .. }), "{error}");
}
