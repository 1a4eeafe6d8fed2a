//! The client's side of the handshake.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use super::{ExportInfo, Options};
use crate::{
    error::{Activity, NbdError},
    wire::{
        self, BlockSizes, Info, OptionReplyHeader, ProtocolError, Refusal, ReplyStyle, printable,
    },
};

/// Most replies to one option that we read; contexts and infos are a handful.
const REPLIES_MAX: u32 = 1024;

/// What was agreed on for one connection.
#[derive(Debug)]
pub(super) struct Negotiated {
    pub(super) info: ExportInfo,
    /// Ids (of this connection only) and names of the granted contexts.
    pub(super) contexts: Vec<(u32, String)>,
}

impl Negotiated {
    pub(super) fn context_names(&self) -> Vec<String> {
        self.contexts.iter().map(|(_, name)| name.clone()).collect()
    }

    /// Whether requests may go to either connection.
    pub(super) fn same_export(&self, other: &Self) -> bool {
        self.info == other.info && self.context_names() == other.context_names()
    }
}

/// Goes from a fresh connection to the transmission phase. The caller sets the deadline.
pub(super) async fn negotiate(
    stream: UnixStream,
    options: &Options,
) -> Result<(UnixStream, Negotiated), NbdError> {
    let mut haggle = Haggle { stream };
    haggle.greet().await?;
    let style = haggle.reply_style().await?;
    let contexts = match style {
        ReplyStyle::Simple => Vec::new(),
        _ if options.contexts.is_empty() => Vec::new(),
        _ => haggle.contexts(options).await?,
    };
    let info = haggle.go(options, style).await?;
    Ok((haggle.stream, Negotiated { info, contexts }))
}

struct Haggle {
    stream: UnixStream,
}

/// How an option ended.
enum Outcome {
    Acknowledged,
    Refused { reason: Refusal, message: String },
}

impl Haggle {
    async fn greet(&mut self) -> Result<(), NbdError> {
        let flags = wire::decode_greeting(&self.read_array().await?).map_err(broken)?;
        let ours = flags & (wire::FIXED_NEWSTYLE | wire::NO_ZEROES);
        self.write(&u32::from(ours).to_be_bytes()).await
    }

    /// The best style the server offers.
    async fn reply_style(&mut self) -> Result<ReplyStyle, NbdError> {
        let offers = [
            (wire::OPT_EXTENDED_HEADERS, ReplyStyle::Extended),
            (wire::OPT_STRUCTURED_REPLY, ReplyStyle::Structured),
        ];
        for (option, style) in offers {
            if let Outcome::Acknowledged = self.option(option, &[], |_, _| Ok(false)).await? {
                return Ok(style);
            }
        }
        Ok(ReplyStyle::Simple)
    }

    /// Asks for all contexts at once. A refusal means none: a wrong export name shows up again in
    /// `NBD_OPT_GO`, with a better message.
    async fn contexts(&mut self, options: &Options) -> Result<Vec<(u32, String)>, NbdError> {
        let query = wire::encode_meta_query(&options.export, &options.contexts);
        let mut granted: Vec<(u32, String)> = Vec::new();
        let outcome = self.option(wire::OPT_SET_META_CONTEXT, &query, |kind, data| {
            if kind != wire::REP_META_CONTEXT {
                return Ok(false);
            }
            let (id, name) = wire::decode_meta_context(data)?;
            if granted.iter().any(|(known, _)| *known == id) {
                return Err(ProtocolError::DuplicateContext { id });
            }
            granted.push((id, name.to_owned()));
            Ok(true)
        });
        if let Outcome::Refused { reason, message } = outcome.await? {
            tracing::debug!(%reason, message, "the server grants no metadata contexts");
            granted.clear();
        }
        let asked = |name: &str| options.contexts.iter().position(|wanted| wanted == name);
        granted.sort_by_key(|(_, name)| asked(name).unwrap_or(usize::MAX));
        Ok(granted)
    }

    async fn go(&mut self, options: &Options, style: ReplyStyle) -> Result<ExportInfo, NbdError> {
        let data = wire::encode_go(&options.export, &[wire::INFO_BLOCK_SIZE]);
        let (mut export, mut block_sizes) = (None, BlockSizes::default());
        let outcome = self.option(wire::OPT_GO, &data, |kind, data| {
            if kind != wire::REP_INFO {
                return Ok(false);
            }
            match wire::decode_info(data)? {
                Info::Export { size, flags } => export = Some((size, flags)),
                Info::BlockSize(sizes) => block_sizes = sizes,
                Info::Other(_) => {}
            }
            Ok(true)
        });
        match (outcome.await?, export) {
            (Outcome::Acknowledged, Some((size, flags))) => {
                Ok(ExportInfo { size, flags, block_sizes, style })
            }
            (Outcome::Acknowledged, None) => Err(broken(ProtocolError::NoExportInfo)),
            (Outcome::Refused { reason, message }, _) => {
                // Only politeness: the refusal is what matters.
                let _ = self.write(&wire::encode_option(wire::OPT_ABORT, &[])).await;
                Err(NbdError::Refused { export: options.export.clone(), reason, message })
            }
        }
    }

    /// Sends an option and reads replies up to the acknowledgement or refusal. `each` gets the
    /// others, and tells whether it knows that type of reply.
    async fn option(
        &mut self,
        option: u32,
        data: &[u8],
        mut each: impl FnMut(u32, &[u8]) -> Result<bool, ProtocolError>,
    ) -> Result<Outcome, NbdError> {
        self.write(&wire::encode_option(option, data)).await?;
        for _ in 0..REPLIES_MAX {
            let header = OptionReplyHeader::decode(&self.read_array().await?).map_err(broken)?;
            if header.option != option {
                let found = header.option;
                return Err(broken(ProtocolError::OtherOption { sent: option, found }));
            }
            let mut data = vec![0; wire::data_len(header.length)];
            self.stream.read_exact(&mut data).await.map_err(socket)?;
            if let Some(reason) = header.refusal() {
                return Ok(Outcome::Refused { reason, message: printable(&data) });
            }
            match (header.kind, data.is_empty()) {
                (wire::REP_ACK, true) => return Ok(Outcome::Acknowledged),
                (wire::REP_ACK, false) => {
                    let message = "NBD_REP_ACK";
                    return Err(broken(ProtocolError::TrailingBytes { message }));
                }
                (kind, _) if each(kind, &data).map_err(broken)? => {}
                (kind, _) => {
                    return Err(broken(ProtocolError::UnexpectedOptionReply { option, kind }));
                }
            }
        }
        Err(broken(ProtocolError::TooManyReplies { limit: REPLIES_MAX }))
    }

    async fn read_array<const N: usize>(&mut self) -> Result<[u8; N], NbdError> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).await.map_err(socket)?;
        Ok(bytes)
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), NbdError> {
        self.stream.write_all(bytes).await.map_err(socket)
    }
}

fn socket(source: std::io::Error) -> NbdError {
    NbdError::socket(Activity::Handshake, source)
}

fn broken(source: ProtocolError) -> NbdError {
    NbdError::protocol(Activity::Handshake, source)
}
