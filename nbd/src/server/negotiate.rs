//! The server's side of the handshake.

use std::io;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use super::{Shared, breach};
use crate::wire::{
    self, BlockSizes, Info, OPTION_HEADER_LEN, OptionHeader, ProtocolError, Refusal, ReplyStyle,
    encode_option_reply,
};

const BASE_ALLOCATION: &str = "base:allocation";
/// Id of the only context; any number will do.
pub(super) const BASE_ALLOCATION_ID: u32 = 1;
/// Most options of one client: more is a client that never gets to the point.
const OPTIONS_MAX: usize = 256;

/// What was agreed on with one client.
#[derive(Debug, Clone, Copy)]
pub(super) struct Agreed {
    pub(super) style: ReplyStyle,
    /// Whether `base:allocation` was selected.
    pub(super) block_status: bool,
}

/// Haggles until the client opens the export (`Some`) or leaves (`None`).
pub(super) async fn negotiate(
    stream: &mut UnixStream,
    shared: &Shared,
) -> io::Result<Option<Agreed>> {
    let ours = wire::FIXED_NEWSTYLE | wire::NO_ZEROES;
    stream.write_all(&wire::encode_greeting(ours)).await?;
    let flags = stream.read_u32().await?;
    if flags & !u32::from(ours) != 0 {
        return Err(breach(format!("client flags 0x{flags:x}")));
    }
    let zeroes = flags & u32::from(wire::NO_ZEROES) == 0;
    let mut agreed = Agreed { style: ReplyStyle::Simple, block_status: false };
    for _ in 0..OPTIONS_MAX {
        let mut header = [0; OPTION_HEADER_LEN];
        stream.read_exact(&mut header).await?;
        let header = OptionHeader::decode(&header).map_err(breach)?;
        let mut data = vec![0; wire::data_len(header.length)];
        stream.read_exact(&mut data).await?;
        match header.option {
            wire::OPT_EXPORT_NAME => {
                let known = std::str::from_utf8(&data).is_ok_and(|name| shared.is_export(name));
                if !known || agreed.style == ReplyStyle::Extended {
                    return Err(breach("unknown export")); // this option has no other answer
                }
                stream.write_all(&export_name_reply(shared, agreed.style, zeroes)).await?;
                return Ok(Some(agreed));
            }
            wire::OPT_ABORT => {
                stream.write_all(&acknowledge(wire::OPT_ABORT)).await?;
                return Ok(None);
            }
            option => {
                let reply = answer(option, &data, shared, &mut agreed);
                let opened = option == wire::OPT_GO && reply.is_ok();
                let reply = reply.unwrap_or_else(|reason| {
                    encode_option_reply(option, reason.code(), reason.to_string().as_bytes())
                });
                stream.write_all(&reply).await?;
                if opened {
                    return Ok(Some(agreed));
                }
            }
        }
    }
    Err(breach("too many options"))
}

/// All replies to one option.
fn answer(
    option: u32,
    data: &[u8],
    shared: &Shared,
    agreed: &mut Agreed,
) -> Result<Vec<u8>, Refusal> {
    let mut out = Vec::new();
    let mut reply = |kind, data: &[u8]| out.extend(encode_option_reply(option, kind, data));
    match option {
        wire::OPT_STRUCTURED_REPLY | wire::OPT_EXTENDED_HEADERS | wire::OPT_LIST
            if !data.is_empty() =>
        {
            return Err(Refusal::Invalid);
        }
        wire::OPT_STRUCTURED_REPLY if agreed.style == ReplyStyle::Extended => {
            return Err(Refusal::ExtendedHeadersRequired);
        }
        wire::OPT_STRUCTURED_REPLY => agreed.style = ReplyStyle::Structured,
        wire::OPT_EXTENDED_HEADERS => agreed.style = ReplyStyle::Extended,
        wire::OPT_LIST => {
            let options = &shared.options;
            reply(wire::REP_SERVER, &wire::encode_server(&options.export, &options.description));
        }
        wire::OPT_INFO | wire::OPT_GO => {
            let (name, _) = wire::decode_go(data).map_err(invalid)?;
            if !shared.is_export(name) {
                return Err(Refusal::UnknownExport);
            }
            let export = Info::Export { size: shared.source.size(), flags: flags(agreed.style) };
            reply(wire::REP_INFO, &wire::encode_info(export));
            let sizes = Info::BlockSize(BlockSizes::default());
            reply(wire::REP_INFO, &wire::encode_info(sizes));
        }
        wire::OPT_SET_META_CONTEXT | wire::OPT_LIST_META_CONTEXT => {
            let listing = option == wire::OPT_LIST_META_CONTEXT;
            if !listing {
                agreed.block_status = false; // also if this attempt fails
            }
            let (name, queries) = wire::decode_meta_query(data).map_err(invalid)?;
            if agreed.style == ReplyStyle::Simple {
                return Err(Refusal::Invalid);
            }
            if !shared.is_export(name) {
                return Err(Refusal::UnknownExport);
            }
            let all = listing && (queries.is_empty() || queries.contains(&"base:"));
            if all || queries.contains(&BASE_ALLOCATION) {
                let id = if listing { 0 } else { BASE_ALLOCATION_ID };
                reply(wire::REP_META_CONTEXT, &wire::encode_meta_context(id, BASE_ALLOCATION));
                agreed.block_status |= !listing;
            }
        }
        _ => return Err(Refusal::Unsupported),
    }
    out.extend(acknowledge(option));
    Ok(out)
}

fn acknowledge(option: u32) -> Vec<u8> {
    encode_option_reply(option, wire::REP_ACK, &[])
}

fn invalid(_: ProtocolError) -> Refusal {
    Refusal::Invalid
}

/// The only answer that `NBD_OPT_EXPORT_NAME` has.
fn export_name_reply(shared: &Shared, style: ReplyStyle, zeroes: bool) -> Vec<u8> {
    let mut out = shared.source.size().to_be_bytes().to_vec();
    out.extend(flags(style).to_be_bytes());
    if zeroes {
        out.extend([0; 124]);
    }
    out
}

fn flags(style: ReplyStyle) -> u16 {
    let always = wire::FLAG_HAS_FLAGS | wire::FLAG_READ_ONLY | wire::FLAG_CAN_MULTI_CONN;
    match style {
        ReplyStyle::Simple => always,
        ReplyStyle::Structured | ReplyStyle::Extended => always | wire::FLAG_SEND_DF,
    }
}

impl Shared {
    fn is_export(&self, name: &str) -> bool {
        name.is_empty() || name == self.options.export
    }
}
