//! Names of blobs and files: SHA-256 digests, written as 64 lower-case hexadecimal digits.

use std::{cmp::Ordering, fmt, str::FromStr};

use const_hex::Buffer;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::{Digest, Sha256};

/// The text is not 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an id has 64 hexadecimal digits")]
pub struct ParseIdError;

fn decode(text: &[u8]) -> Result<[u8; 32], ParseIdError> {
    // A prefix `0x`, which would be accepted, leaves 62 digits.
    match text.len() {
        64 => const_hex::decode_to_array(text).map_err(|_| ParseIdError),
        _ => Err(ParseIdError),
    }
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash)]
        pub struct $name(pub [u8; 32]);

        impl Ord for $name {
            /// The order of the bytes.
            fn cmp(&self, other: &Self) -> Ordering {
                // Their heads differ nearly always, and comparing these is no call: an index is sorted, and searched
                // for each chunk of a disk.
                let head = |id: &Self| u64::from_be_bytes(*id.0.first_chunk().expect("32 bytes"));
                head(self).cmp(&head(other)).then_with(|| self.0.cmp(&other.0))
            }
        }

        impl PartialOrd for $name {
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                Some(self.cmp(other))
            }
        }

        impl $name {
            /// SHA-256 of `bytes`.
            pub fn of(bytes: &[u8]) -> Self {
                Self(Sha256::digest(bytes).into())
            }

            /// All 64 hexadecimal digits.
            pub fn to_hex(&self) -> String {
                self.to_string()
            }

            /// The first eight hexadecimal digits, as restic prints them.
            pub fn short(&self) -> String {
                const_hex::encode(&self.0[..4])
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(Buffer::<32>::new().format(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                decode(text.as_bytes()).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(Buffer::<32>::new().format(&self.0))
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Visitor;
                impl de::Visitor<'_> for Visitor {
                    type Value = $name;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str("64 hexadecimal digits")
                    }

                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_str(Visitor)
            }
        }
    };
}

id! {
    /// Names a blob: SHA-256 of its plain content.
    BlobId
}
id! {
    /// Names a file of the repository: SHA-256 of what is stored in it.
    FileId
}

impl FileId {
    /// Stands for the one file without an id, `config`.
    pub const CONFIG: Self = Self([0; 32]);

    /// In which of so many parts a pack is, from 0, where data is read in parts. A name is a digest: parts are
    /// even.
    pub fn part(&self, of: u32) -> u32 {
        let [a, b, c, d, ..] = self.0;
        u32::from_be_bytes([a, b, c, d]) % of.max(1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ids_have_the_order_of_their_bytes(a: [u8; 32], b: [u8; 32], same in 0_usize..=32) {
            let mut b = b;
            b[..same].copy_from_slice(&a[..same]);
            prop_assert_eq!(BlobId(a).cmp(&BlobId(b)), a.cmp(&b));
        }

        #[test]
        fn ids_survive_text_and_json(bytes: [u8; 32]) {
            let id = BlobId(bytes);
            let digits = bytes.iter().map(|byte| format!("{byte:02x}"));
            prop_assert_eq!(id.to_string(), digits.collect::<String>());
            prop_assert_eq!(id.to_string().to_uppercase().parse(), Ok(id));
            prop_assert_eq!(id.to_string().parse(), Ok(id));
            let json = serde_json::to_string(&id).unwrap();
            prop_assert_eq!(serde_json::from_str::<BlobId>(&json).unwrap(), id);
        }

        #[test]
        fn other_text_is_no_id(text in "\\PC{0,70}") {
            let good = text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
            prop_assert_eq!(text.parse::<FileId>().is_ok(), good);
        }

        #[test]
        fn s16_a_prefix_is_no_digit(digits in "[0-9a-f]{62}") {
            prop_assert_eq!(format!("0x{digits}").parse::<FileId>(), Err(ParseIdError));
            prop_assert_eq!(format!("0x{digits}00").parse::<FileId>(), Err(ParseIdError));
        }
    }
}
