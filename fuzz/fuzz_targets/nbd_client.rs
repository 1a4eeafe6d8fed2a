//! The client against a server that sends arbitrary bytes after an honest handshake.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use nbd::{
    Client, Options,
    wire::{self, Info},
};
use tokio::{io::AsyncWriteExt, net::UnixStream};

fn handshake(extended: bool) -> Vec<u8> {
    let reply = wire::encode_option_reply;
    let refused = wire::Refusal::Unsupported.code();
    let mut out = wire::encode_greeting(wire::FIXED_NEWSTYLE | wire::NO_ZEROES);
    let kind = if extended { wire::REP_ACK } else { refused };
    out.extend(reply(wire::OPT_EXTENDED_HEADERS, kind, &[]));
    if !extended {
        out.extend(reply(wire::OPT_STRUCTURED_REPLY, wire::REP_ACK, &[]));
    }
    let context = wire::encode_meta_context(1, "base:allocation");
    out.extend(reply(wire::OPT_SET_META_CONTEXT, wire::REP_META_CONTEXT, &context));
    out.extend(reply(wire::OPT_SET_META_CONTEXT, wire::REP_ACK, &[]));
    let export = Info::Export { size: 1 << 20, flags: 0 };
    out.extend(reply(wire::OPT_GO, wire::REP_INFO, &wire::encode_info(export)));
    out.extend(reply(wire::OPT_GO, wire::REP_ACK, &[]));
    out
}

fuzz_target!(|input: (bool, &[u8])| {
    let (extended, bytes) = input;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&handshake(extended)).await.unwrap();
        let options = Options {
            contexts: vec!["base:allocation".to_owned()],
            timeout: Duration::from_secs(5),
            ..Options::default()
        };
        let client = Client::from_stream(ours, options).await.unwrap();
        let server = async {
            tokio::task::yield_now().await; // lets the requests leave first
            let _ = theirs.write_all(bytes).await;
            drop(theirs);
        };
        let _ = tokio::join!(client.read(0, 4096), client.block_status(0, 4096), server);
    });
});
