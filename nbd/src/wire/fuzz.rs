//! One entry for fuzzing: every decoder over the same bytes.

use super::*;

/// Feeds `bytes` to every decoder; the property is that it returns.
///
/// `kind` is the type of a chunk, `command` the request it would answer.
#[doc(hidden)]
pub fn fuzz_all(bytes: &[u8], kind: u16, command: Command) {
    if let Some(bytes) = bytes.first_chunk() {
        let _ = decode_greeting(bytes);
    }
    if let Some(bytes) = bytes.first_chunk() {
        let _ = OptionHeader::decode(bytes);
    }
    if let Some(bytes) = bytes.first_chunk() {
        let _ = OptionReplyHeader::decode(bytes).map(|header| header.refusal());
    }
    let _ = decode_go(bytes);
    let _ = decode_meta_query(bytes);
    let _ = decode_meta_context(bytes);
    let _ = decode_info(bytes);
    let _ = printable(bytes);
    for headers in [Headers::Compact, Headers::Extended] {
        let request = bytes.get(..headers.request_len()).unwrap_or(bytes);
        let _ = Request::decode(headers, request).map(|request| request.payload_len(headers));
        let _ = decode_block_status(headers, bytes);
    }
    let _ = RemoteError::decode(kind, bytes);
    if let Ok((offset, length)) = decode_hole(bytes) {
        let _ = Coverage::new(offset / 2, length).insert(offset, length);
    }
    for style in [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended] {
        let Some(len) = bytes.first_chunk().and_then(|magic| ReplyHeader::len(style, *magic).ok())
        else {
            continue;
        };
        let Some((header, payload)) = bytes.split_at_checked(len) else { continue };
        if let Ok(ReplyHeader::Chunk(chunk)) = ReplyHeader::decode(header)
            && let Ok(Content::Error) = chunk.content(command)
        {
            let _ = RemoteError::decode(chunk.kind, payload);
        }
    }
}
