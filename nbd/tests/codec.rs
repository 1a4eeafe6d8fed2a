//! The codec with arbitrary bytes: never a panic, and what it writes it can read.

use nbd::{
    Command, Errno, Extent,
    wire::{self, Coverage, Headers, ReplyHeader, ReplyStyle, Request},
};
use proptest::{collection::vec, prelude::*};

fn headers() -> impl Strategy<Value = Headers> {
    prop_oneof![Just(Headers::Compact), Just(Headers::Extended)]
}

/// Magic numbers make it past the first check.
fn message() -> impl Strategy<Value = Vec<u8>> {
    let magic = prop_oneof![
        Just(vec![]),
        Just(0x2560_9513_u32.to_be_bytes().to_vec()),
        Just(0x21e4_1c71_u32.to_be_bytes().to_vec()),
        Just(0x6744_6698_u32.to_be_bytes().to_vec()),
        Just(0x668e_33ef_u32.to_be_bytes().to_vec()),
        Just(0x6e8a_278c_u32.to_be_bytes().to_vec()),
        Just(b"NBDMAGICIHAVEOPT".to_vec()),
        Just(b"IHAVEOPT".to_vec()),
        Just(0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec()),
        Just(vec![0, 0, 0, 1]),
    ];
    (magic, vec(any::<u8>(), 0..200)).prop_map(|(magic, rest)| [magic, rest].concat())
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in message(), kind in any::<u16>(), code in any::<u16>()) {
        wire::fuzz_all(&bytes, kind, Command::from_code(code));
    }

    #[test]
    fn requests_survive_the_wire(
        headers in headers(),
        (flags, code, cookie) in any::<(u16, u16, u64)>(),
        (offset, length) in any::<(u64, u32)>(),
    ) {
        let length = u64::from(length);
        let command = Command::from_code(code);
        prop_assert_eq!(command.code(), code);
        let request = Request { flags, command, cookie, offset, length };
        let mut bytes = Vec::new();
        request.encode(headers, &mut bytes);
        prop_assert_eq!(bytes.len(), headers.request_len());
        prop_assert_eq!(Request::decode(headers, &bytes), Ok(request));
        let other = match headers {
            Headers::Compact => Headers::Extended,
            Headers::Extended => Headers::Compact,
        };
        prop_assert!(Request::decode(other, &bytes).is_err());
    }

    #[test]
    fn simple_replies_survive_the_wire(cookie in any::<u64>(), error in any::<u32>()) {
        let error = (error != 0).then(|| Errno::from_code(error));
        let mut bytes = Vec::new();
        ReplyHeader::encode_simple(cookie, error, &mut bytes);
        let magic = *bytes.first_chunk().unwrap();
        prop_assert_eq!(ReplyHeader::len(ReplyStyle::Simple, magic), Ok(bytes.len()));
        prop_assert!(ReplyHeader::len(ReplyStyle::Extended, magic).is_err());
        prop_assert_eq!(ReplyHeader::decode(&bytes), Ok(ReplyHeader::Simple { cookie, error }));
    }

    #[test]
    fn block_status_survives_the_wire(
        headers in headers(),
        id in any::<u32>(),
        list in vec((1..u32::MAX, any::<u32>()), 1..50),
    ) {
        let extent = |(length, flags): (u32, u32)| {
            Extent { length: length.into(), flags: flags.into() }
        };
        let list: Vec<_> = list.into_iter().map(extent).collect();
        let payload = wire::encode_block_status(headers, id, &list);
        prop_assert_eq!(wire::decode_block_status(headers, &payload), Ok((id, list)));
    }

    /// Coverage against a plain array of booleans.
    #[test]
    fn coverage_agrees_with_an_array(chunks in vec((90_u64..240, 0_u64..60), 0..40)) {
        let (start, len) = (100, 100);
        let mut coverage = Coverage::new(start, len);
        let mut model = [false; 100];
        for (offset, length) in chunks {
            let inside = offset >= start && offset + length <= start + len && length > 0;
            let range = || (offset - start) as usize..(offset + length - start) as usize;
            let free = inside && model[range()].iter().all(|covered| !covered);
            let result = coverage.insert(offset, length);
            prop_assert_eq!(result.is_ok(), free, "{} + {}", offset, length);
            if free {
                model[range()].fill(true);
                prop_assert_eq!(result, Ok(offset - start));
            }
            let gap = model.iter().position(|covered| !covered).map(|gap| start + gap as u64);
            let missing = gap.map_or(Ok(()), |offset| Err(nbd::ProtocolError::Gap { offset }));
            prop_assert_eq!(coverage.complete(), missing);
        }
    }
}

#[test]
fn texts_of_a_peer_are_printable_and_bounded() {
    assert_eq!(wire::printable(b" a\x1b[2J\nb\xff "), "a\u{fffd}[2J\u{fffd}b\u{fffd}");
    assert_eq!(wire::printable(&[b'x'; 100_000]).len(), wire::STRING_LEN_MAX);
}

#[test]
fn lengths_that_a_peer_claims_are_bounded() {
    let mut header = wire::encode_option(wire::OPT_GO, &[]);
    header[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(wire::OptionHeader::decode(header.first_chunk().unwrap()).is_err());
    let mut header = wire::encode_option_reply(wire::OPT_GO, wire::REP_INFO, &[]);
    header[16..].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(wire::OptionReplyHeader::decode(header.first_chunk().unwrap()).is_err());
    // A metadata query that claims four billion queries allocates nothing and is refused.
    let mut query = wire::encode_meta_query("x", &[]);
    query.truncate(5);
    query.extend(u32::MAX.to_be_bytes());
    assert!(wire::decode_meta_query(&query).is_err());
}
