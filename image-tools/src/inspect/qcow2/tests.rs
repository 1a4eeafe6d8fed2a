#![expect(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::needless_pass_by_value,
    reason = "the bytes are the tests' own"
)]

use proptest::prelude::*;

use super::*;

const CLUSTER: u64 = 1 << 16;
const FILE_LEN: u64 = 5 * CLUSTER;

/// An empty image of 1 GiB, as `qemu-img create` makes it: header, refcount table and block, L1 table.
#[derive(Clone)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn new() -> Self {
        let mut header = Vec::new();
        header.extend(MAGIC);
        header.extend(3_u32.to_be_bytes());
        header.extend(0_u64.to_be_bytes()); // name of the backing file
        header.extend(0_u32.to_be_bytes());
        header.extend(16_u32.to_be_bytes());
        header.extend((1_u64 << 30).to_be_bytes());
        header.extend(0_u32.to_be_bytes());
        header.extend(2_u32.to_be_bytes()); // L1 table
        header.extend((3 * CLUSTER).to_be_bytes());
        header.extend(CLUSTER.to_be_bytes()); // refcount table
        header.extend(1_u32.to_be_bytes());
        header.extend(0_u32.to_be_bytes()); // snapshots
        header.extend(0_u64.to_be_bytes());
        header.extend([0; 24]); // features
        header.extend(4_u32.to_be_bytes());
        header.extend(104_u32.to_be_bytes());
        header.extend([0; 8]); // the end of the extensions
        header.resize(4096, 0);
        Self(header)
    }

    fn with(mut self, at: usize, bytes: &[u8]) -> Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn u32(self, at: usize, value: u32) -> Self {
        self.with(at, &value.to_be_bytes())
    }

    fn u64(self, at: usize, value: u64) -> Self {
        self.with(at, &value.to_be_bytes())
    }

    fn extension(self, kind: u32, content: &[u8]) -> Self {
        let len = u32::try_from(content.len()).unwrap();
        self.u32(104, kind).u32(108, len).with(112, content)
    }

    fn named(self, name: &str, format: &str) -> Self {
        let len = u32::try_from(name.len()).unwrap();
        self.extension(BACKING_FORMAT, format.as_bytes())
            .u64(8, 1024)
            .u32(16, len)
            .with(1024, name.as_bytes())
    }

    fn parse(&self) -> Result<Header, InspectError> {
        parse(&self.0, FILE_LEN)
    }
}

fn refusal(bytes: Bytes) -> InspectError {
    bytes.parse().expect_err("it was accepted")
}

#[test]
fn a_plain_header_is_read() {
    let header = Bytes::new().parse().unwrap();
    let plain = Header {
        version: 3,
        size: 1 << 30,
        cluster_len: CLUSTER,
        is_dirty: false,
        is_encrypted: false,
        backing: None,
        snapshots: 0,
        bitmaps: 0,
    };
    assert_eq!(header, plain);
    let old = Bytes::new().u32(4, 2).parse().unwrap();
    assert_eq!(old, Header { version: 2, ..plain });
    let dirty = Bytes::new().u64(72, DIRTY).parse().unwrap();
    assert!(dirty.is_dirty);
    let zstd = Bytes::new().u64(72, COMPRESSION).u32(100, 112).with(104, &[1]);
    assert!(zstd.parse().is_ok());
}

#[test]
fn s02_what_an_image_names_is_told_or_refused() {
    assert_eq!(refusal(Bytes::new().u64(72, EXTERNAL_DATA)), InspectError::ExternalData);
    let named = Bytes::new().extension(EXTERNAL_DATA_NAME, b"/etc/passwd");
    assert_eq!(refusal(named), InspectError::ExternalData);
    for name in ["/etc/passwd", "json:{\"driver\":\"nbd\"}", "nbd://host/export", "../base"] {
        let header = Bytes::new().named(name, "raw").parse().unwrap();
        let backing = Backing { name: name.to_owned(), format: Some("raw".to_owned()) };
        assert_eq!(header.backing, Some(backing));
    }
    let escape = Bytes::new().named("a\u{1b}[2J", "raw");
    assert_eq!(refusal(escape), InspectError::Name { what: "backing file" });
    let long = Bytes::new().named("/base", "raw").u32(16, 1024);
    assert_eq!(refusal(long), InspectError::Name { what: "backing file" });
    let in_header = Bytes::new().named("/base", "raw").u64(8, 8);
    assert!(matches!(refusal(in_header), InspectError::Name { .. } | InspectError::Truncated));
    let beyond = Bytes::new().named("/base", "raw").u64(8, CLUSTER);
    assert_eq!(refusal(beyond), InspectError::Name { what: "backing file" });
    let encrypted = Bytes::new().u32(32, 2).parse().unwrap();
    assert!(encrypted.is_encrypted);
}

#[test]
fn s03_bombs_are_refused_by_their_header() {
    let too_large = |bytes: Bytes, name: &str| match refusal(bytes) {
        InspectError::TooLarge { field, .. } => assert_eq!(field, name),
        error => panic!("{error}"),
    };
    too_large(Bytes::new().u64(24, SIZE_MAX + 1), "size");
    too_large(Bytes::new().u64(24, u64::MAX), "size");
    too_large(Bytes::new().u32(36, u32::MAX), "L1 table");
    too_large(Bytes::new().u32(56, u32::MAX), "refcount table");
    too_large(Bytes::new().u32(60, u32::MAX), "number of snapshots");
    too_large(Bytes::new().u32(96, 7), "refcount order");
    let bitmaps = |count: u32, len: u64, offset: u64| {
        let content =
            [&count.to_be_bytes()[..], &[0; 4], &len.to_be_bytes(), &offset.to_be_bytes()];
        Bytes::new().extension(BITMAPS, &content.concat())
    };
    too_large(bitmaps(u32::MAX, 64, CLUSTER), "number of dirty bitmaps");
    too_large(bitmaps(1, u64::MAX, CLUSTER), "directory of dirty bitmaps");
    assert_eq!(bitmaps(1, 64, CLUSTER).parse().unwrap().bitmaps, 1);
    let small = Bytes::new().u64(24, (1 << 30) + 1);
    assert!(matches!(refusal(small), InspectError::L1TooSmall { entries: 2, .. }));
    for bits in [0, 8, 22, u32::MAX] {
        assert_eq!(refusal(Bytes::new().u32(20, bits)), InspectError::ClusterBits { bits });
    }
    // As many as fit, each without content.
    let mut many = Bytes::new();
    many.0[104..]
        .chunks_exact_mut(8)
        .for_each(|part| part.copy_from_slice(&[1, 1, 1, 1, 0, 0, 0, 0]));
    assert_eq!(refusal(many), InspectError::TooManyExtensions { max: EXTENSIONS_MAX });
}

#[test]
fn s03_tables_lie_in_the_file_behind_the_header() {
    let outside = |bytes: Bytes, name: &str| match refusal(bytes) {
        InspectError::Outside { table, .. } => assert_eq!(table, name),
        error => panic!("{error}"),
    };
    for offset in [0, 8, CLUSTER + 8, FILE_LEN, u64::MAX - 7, !(CLUSTER - 1)] {
        outside(Bytes::new().u64(40, offset), "L1 table");
        outside(Bytes::new().u64(48, offset), "refcount table");
        outside(Bytes::new().u32(60, 1).u64(64, offset), "snapshot table");
    }
    assert_eq!(refusal(Bytes::new().u32(56, 0)), InspectError::NoRefcounts);
    assert_eq!(Bytes::new().u32(60, 1).u64(64, CLUSTER).parse().unwrap().snapshots, 1);
}

#[test]
fn what_is_not_known_or_not_whole_is_refused() {
    assert_eq!(refusal(Bytes::new().with(0, b"VMDK")), InspectError::NotQcow2);
    for version in [0, 1, 4, u32::MAX] {
        assert_eq!(refusal(Bytes::new().u32(4, version)), InspectError::Version { version });
    }
    assert_eq!(refusal(Bytes::new().u64(72, CORRUPT)), InspectError::Corrupt);
    let unknown = refusal(Bytes::new().u64(72, 1 << 63 | DIRTY | SUBCLUSTERS));
    assert_eq!(unknown, InspectError::UnknownFeatures { bits: 1 << 63 });
    for len in [0, 72, 100, 105, 65_544, u32::MAX] {
        let refused = refusal(Bytes::new().u32(100, len));
        assert_eq!(refused, InspectError::HeaderLen { len: len.into() });
    }
    for (bit, len, kind) in [(0, 112, 1), (COMPRESSION, 112, 2), (COMPRESSION, 104, 0)] {
        let bytes = Bytes::new().u64(72, bit).u32(100, len).with(104, &[kind]);
        assert_eq!(refusal(bytes), InspectError::Compression { kind });
    }
    for len in [0, 3, 71, 103, 107, 115] {
        let bytes = Bytes::new().extension(FEATURE_NAMES, b"x");
        let cut = parse(&bytes.0[..len], FILE_LEN);
        assert!(matches!(cut, Err(InspectError::Truncated)) || len < 4, "{len}: {cut:?}");
    }
}

proptest! {
    /// Whatever the bytes are, the parser ends, and what it lets through is within all bounds.
    #[test]
    fn s03_no_bytes_get_past_the_bounds(
        changes in prop::collection::vec((0_usize..300, any::<u8>()), 0..24),
        cut in 0_usize..4096,
        file_len in prop_oneof![Just(FILE_LEN), any::<u64>()],
    ) {
        let mut bytes = Bytes::new().named("base", "qcow2").0;
        changes.into_iter().for_each(|(at, byte)| bytes[at] = byte);
        for bytes in [&bytes[..], &bytes[..cut]] {
            if let Ok(header) = parse(bytes, file_len) {
                prop_assert!(header.size <= SIZE_MAX && header.snapshots <= SNAPSHOTS_MAX);
                prop_assert!(header.bitmaps <= BITMAPS_MAX && header.cluster_len <= 2 << 20);
                let name = header.backing.map(|backing| backing.name).unwrap_or_default();
                prop_assert!(name.len() <= 1023 && !name.contains(char::is_control));
            }
        }
    }

    #[test]
    fn s03_noise_is_no_image(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        prop_assume!(!bytes.starts_with(&MAGIC));
        prop_assert!(parse(&bytes, bytes.len() as u64).is_err());
    }
}
