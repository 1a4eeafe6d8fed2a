//! Index files: JSON that says which blobs are in which packs.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use crate::{BlobId, BlobKind, FileId, pack::PackedBlob};

/// An index file to write.
#[derive(Debug, Serialize)]
pub(crate) struct IndexFile<'a> {
    pub(crate) packs: &'a [PackEntry],
}

/// A pack and all its blobs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PackEntry {
    pub(crate) id: FileId,
    pub(crate) blobs: Vec<BlobEntry>,
}

/// A blob as an index file writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BlobEntry(pub(crate) PackedBlob);

/// The JSON of one blob.
#[derive(Serialize, Deserialize)]
struct BlobJson {
    id: BlobId,
    #[serde(rename = "type")]
    kind: BlobKind,
    offset: u32,
    length: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    uncompressed_length: u32,
}

fn is_zero(value: &u32) -> bool {
    *value == 0
}

impl Serialize for BlobEntry {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let PackedBlob { id, kind, offset, len: length, uncompressed_len } = self.0;
        let uncompressed_length = uncompressed_len.unwrap_or(0);
        BlobJson { id, kind, offset, length, uncompressed_length }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for BlobEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let BlobJson { id, kind, offset, length: len, uncompressed_length } =
            BlobJson::deserialize(deserializer)?;
        let uncompressed_len = Some(uncompressed_length).filter(|&len| len != 0);
        let blob = PackedBlob { id, kind, offset, len, uncompressed_len };
        blob.checked().map(Self).map_err(serde::de::Error::custom)
    }
}

/// Hands each pack of an index file to `take` as it is parsed, with whether it is marked for
/// deletion.
pub(crate) fn read_packs(
    json: &[u8],
    take: impl FnMut(PackEntry, bool),
) -> Result<(), serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    deserializer.deserialize_any(FileVisitor { take })?;
    deserializer.end()
}

struct FileVisitor<F> {
    take: F,
}

impl<'de, F: FnMut(PackEntry, bool)> Visitor<'de> for FileVisitor<F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an index file")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some(field) = map.next_key::<String>()? {
            let take = &mut self.take;
            match field.as_str() {
                "packs" => map.next_value_seed(Packs { take, marked: false })?,
                "packs_to_delete" => map.next_value_seed(Packs { take, marked: true })?,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }
}

struct Packs<'a, F> {
    take: &'a mut F,
    marked: bool,
}

impl<'de, F: FnMut(PackEntry, bool)> serde::de::DeserializeSeed<'de> for Packs<'_, F> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, F: FnMut(PackEntry, bool)> Visitor<'de> for Packs<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of packs")
    }

    /// `null`: Go's way to write an empty list.
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut packs: A) -> Result<(), A::Error> {
        while let Some(pack) = packs.next_element()? {
            (self.take)(pack, self.marked);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, option, prelude::*};

    use super::*;

    fn pack() -> impl Strategy<Value = PackEntry> {
        let blob = (any::<[u8; 32]>(), any::<bool>(), 0_u32..1 << 30, 32_u32..1 << 20)
            .prop_flat_map(|parts| (Just(parts), option::of(1_u32..1 << 20)))
            .prop_map(|((id, tree, offset, len), uncompressed_len)| {
                let kind = if tree { BlobKind::Tree } else { BlobKind::Data };
                BlobEntry(PackedBlob { id: BlobId(id), kind, offset, len, uncompressed_len })
            });
        (any::<[u8; 32]>(), vec(blob, 0..5))
            .prop_map(|(id, blobs)| PackEntry { id: FileId(id), blobs })
    }

    fn read(json: &[u8]) -> Result<Vec<(PackEntry, bool)>, serde_json::Error> {
        let mut packs = Vec::new();
        read_packs(json, |pack, marked| packs.push((pack, marked))).map(|()| packs)
    }

    proptest! {
        #[test]
        fn index_files_survive_the_round_trip(packs in vec(pack(), 0..5)) {
            let json = serde_json::to_vec(&IndexFile { packs: &packs }).unwrap();
            let expected: Vec<_> = packs.into_iter().map(|pack| (pack, false)).collect();
            prop_assert_eq!(read(&json).unwrap(), expected);
        }

        #[test]
        fn s16_damaged_index_files_never_panic(pack in pack(), at: usize, byte: u8) {
            let mut json = serde_json::to_vec(&IndexFile { packs: &[pack] }).unwrap();
            let at = at % json.len();
            json[at] = byte;
            let _ = read(&json);
        }
    }

    #[test]
    fn packs_of_rustic_that_will_go_are_told_apart() {
        let id = "a".repeat(64);
        let json = format!(
            r#"{{"supersedes":["{id}"],"packs":null,"packs_to_delete":[{{"id":"{id}","time":
            "2026-01-01T00:00:00Z","size":5,"blobs":[{{"id":"{id}","type":"tree","offset":0,"length":40}}]}}]}}"#
        );
        let packs = read(json.as_bytes()).unwrap();
        assert!(packs.len() == 1 && packs[0].1);
        assert_eq!(packs[0].0.blobs[0].0.uncompressed_len, None);
    }

    #[test]
    fn s16_lengths_that_overflow_or_exceed_the_format_are_refused() {
        let id = "a".repeat(64);
        let blob = |kind: &str, offset: u64, length: u64, plain: u64| {
            format!(
                r#"{{"packs":[{{"id":"{id}","blobs":[{{"id":"{id}","type":"{kind}","offset":{offset},
                "length":{length},"uncompressed_length":{plain}}}]}}]}}"#
            )
        };
        assert!(read(blob("data", 0, 100, 100).as_bytes()).is_ok());
        for (offset, length, plain) in [
            (u64::from(u32::MAX), 100, 0),
            (0, 31, 0),
            (0, u64::MAX, 0),
            (u64::MAX, 100, 0),
            (0, 100, u64::from(u32::MAX)),
            (0, 100, (64 << 20) + 1),
            (0, u64::from(u32::MAX), 100),
        ] {
            assert!(read(blob("data", offset, length, plain).as_bytes()).is_err());
        }
    }
}
