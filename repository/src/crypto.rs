//! Sealing: AES-256-CTR with Poly1305-AES, as restic's `doc/design.rst` defines it.

use aes256ctr_poly1305aes::{
    Aes256CtrPoly1305Aes, Key, Nonce, Tag,
    aead::{AeadInPlace, generic_array::GenericArray},
};

use crate::Defect;

/// Bytes before the ciphertext.
pub(crate) const NONCE_LEN: usize = 16;
/// Bytes that sealing adds: nonce in front, tag behind.
pub(crate) const OVERHEAD: usize = NONCE_LEN + 16;

/// A key that opens and seals. Wiped when dropped.
#[derive(Debug, Clone)]
pub(crate) struct MasterKey(Aes256CtrPoly1305Aes);

impl MasterKey {
    /// From `encrypt || mac.k || mac.r`.
    pub(crate) fn new(bytes: &[u8; 64]) -> Self {
        Self(Aes256CtrPoly1305Aes::new(Key::from_slice(bytes)))
    }

    /// Seals in place: `place` is room for the nonce, the plain bytes, room for the tag.
    pub(crate) fn seal_in_place(&self, place: &mut [u8]) {
        let (nonce, rest) = place.split_at_mut(NONCE_LEN);
        let (text, tag) = rest.split_at_mut(rest.len() - (OVERHEAD - NONCE_LEN));
        rand::fill(nonce);
        let made = self.0.encrypt_in_place_detached(Nonce::from_slice(nonce), b"", text);
        tag.copy_from_slice(&made.expect("blobs are far shorter than the cipher's limit"));
    }

    /// Seals a copy of `plain`.
    pub(crate) fn seal(&self, plain: &[u8]) -> Vec<u8> {
        let mut sealed = vec![0; plain.len() + OVERHEAD];
        sealed[NONCE_LEN..NONCE_LEN + plain.len()].copy_from_slice(plain);
        self.seal_in_place(&mut sealed);
        sealed
    }

    /// Authenticates, then decrypts in place; returns the plain part of `sealed`.
    pub(crate) fn open_in_place<'a>(&self, sealed: &'a mut [u8]) -> Result<&'a mut [u8], Defect> {
        let len = sealed.len();
        let text_len = len.checked_sub(OVERHEAD).ok_or(Defect::Truncated { len: len as u64 })?;
        let (nonce, rest) = sealed.split_at_mut(NONCE_LEN);
        let (text, tag) = rest.split_at_mut(text_len);
        let tag: &Tag = GenericArray::from_slice(tag);
        let opened = self.0.decrypt_in_place_detached(Nonce::from_slice(nonce), b"", text, tag);
        opened.map_err(|_| Defect::Authentication)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s16_any_flipped_bit_is_refused_before_decryption() {
        let key = MasterKey::new(&[7; 64]);
        let sealed = key.seal(b"what was written");
        assert_eq!(key.open_in_place(&mut sealed.clone()).unwrap(), b"what was written");
        for bit in 0..sealed.len() * 8 {
            let mut flipped = sealed.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(key.open_in_place(&mut flipped).is_err(), "bit {bit}");
        }
        assert!(key.open_in_place(&mut sealed[..31].to_vec()).is_err());
    }
}
