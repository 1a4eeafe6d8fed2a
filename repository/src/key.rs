//! Key files: the master key, sealed with a password.

use base64::{Engine, prelude::BASE64_STANDARD};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{Defect, RepositoryError, crypto::MasterKey, host};

/// How expensive it is to try a password: scrypt with `N = 2^log_n`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kdf {
    /// Logarithm of the cost in time and memory.
    pub log_n: u8,
    /// Block size; memory is `128 · r · N` bytes.
    pub r: u32,
    /// How often, one after another.
    pub p: u32,
}

impl Kdf {
    /// Costs nothing and protects nothing: for tests only.
    pub const WEAK_FOR_TESTS: Self = Self { log_n: 4, r: 1, p: 1 };

    fn derive(self, password: &[u8], salt: &[u8]) -> Result<MasterKey, RepositoryError> {
        let Self { log_n, r, p } = self;
        let refused = || RepositoryError::UnusableKdf { n: 1 << log_n.min(63), r, p };
        let blocks = 1_u64.checked_shl(log_n.into()).and_then(|n| n.checked_mul(r.into()));
        let memory_fits = blocks.is_some_and(|blocks| blocks <= 1 << 23);
        let time_fits = blocks.is_some_and(|b| b.saturating_mul(p.into()) <= 1 << 30);
        // The bound of scrypt itself, which keeps p blocks of r beside the table.
        if !memory_fits || !time_fits || log_n == 0 || u64::from(r) * u64::from(p) >= 1 << 23 {
            return Err(refused());
        }
        let params = scrypt::Params::new(log_n, r, p).map_err(|_| refused())?;
        let mut key = [0; 64];
        scrypt::scrypt(password, salt, &params, &mut key).map_err(|_| refused())?;
        Ok(MasterKey::new(&key))
    }
}

impl Default for Kdf {
    /// N = 32768, r = 8, p = 1: 32 MiB and about 0.1 s.
    fn default() -> Self {
        Self { log_n: 15, r: 8, p: 1 }
    }
}

/// A key file as it is stored, in plain JSON.
#[derive(Debug, Serialize, Deserialize)]
struct KeyFile {
    created: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    hostname: String,
    kdf: String,
    #[serde(rename = "N")]
    n: u64,
    r: u32,
    p: u32,
    salt: String,
    data: String,
}

/// The master key as it is sealed in `data`.
#[derive(Serialize, Deserialize)]
struct SealedKey {
    mac: MacKey,
    encrypt: String,
}

#[derive(Serialize, Deserialize)]
struct MacKey {
    k: String,
    r: String,
}

/// A random master key, and the content of a key file that holds it for `password`.
pub(crate) fn create(password: &[u8], kdf: Kdf) -> Result<(MasterKey, Vec<u8>), RepositoryError> {
    let (mut key, mut salt) = ([0; 64], [0; 64]);
    rand::fill(&mut key);
    rand::fill(&mut salt);
    let (encrypt, mac) = key.split_at(32);
    let (k, r) = mac.split_at(16);
    let [encrypt, k, r] = [encrypt, k, r].map(|part| BASE64_STANDARD.encode(part));
    let sealed = serde_json::to_vec(&SealedKey { mac: MacKey { k, r }, encrypt });
    let sealed = sealed.expect("strings are valid JSON");
    let file = KeyFile {
        created: Timestamp::now().to_string(),
        username: host::username(),
        hostname: host::hostname(),
        kdf: "scrypt".to_owned(),
        n: 1 << kdf.log_n,
        r: kdf.r,
        p: kdf.p,
        salt: BASE64_STANDARD.encode(salt),
        data: BASE64_STANDARD.encode(kdf.derive(password, &salt)?.seal(&sealed)),
    };
    Ok((MasterKey::new(&key), serde_json::to_vec(&file).expect("strings are valid JSON")))
}

/// What came of trying a password on a key file.
pub(crate) enum Unlock {
    Opened(MasterKey),
    WrongPassword,
    Damaged(Defect),
}

/// Tries `password` on the content of a key file.
pub(crate) fn unlock(file: &[u8], password: &[u8]) -> Result<Unlock, RepositoryError> {
    let file: KeyFile = match serde_json::from_slice(file) {
        Ok(file) => file,
        Err(source) => return Ok(Unlock::Damaged(source.into())),
    };
    if file.kdf != "scrypt" {
        return Ok(Unlock::Damaged(Defect::OutOfRange { field: "kdf" }));
    }
    let (Ok(salt), Ok(mut data)) =
        (BASE64_STANDARD.decode(&file.salt), BASE64_STANDARD.decode(&file.data))
    else {
        return Ok(Unlock::Damaged(Defect::OutOfRange { field: "salt or data" }));
    };
    let (n, r, p) = (file.n, file.r, file.p);
    if !n.is_power_of_two() {
        return Err(RepositoryError::UnusableKdf { n, r, p });
    }
    let kdf = Kdf { log_n: u8::try_from(n.ilog2()).unwrap_or(u8::MAX), r, p };
    let user_key = kdf.derive(password, &salt)?;
    let Ok(opened) = user_key.open_in_place(&mut data) else { return Ok(Unlock::WrongPassword) };
    let key: SealedKey = match serde_json::from_slice(opened) {
        Ok(key) => key,
        Err(source) => return Ok(Unlock::Damaged(source.into())),
    };
    let parts = [key.encrypt, key.mac.k, key.mac.r].map(|part| BASE64_STANDARD.decode(part));
    let [Ok(encrypt), Ok(k), Ok(r)] = parts else {
        return Ok(Unlock::Damaged(Defect::OutOfRange { field: "key" }));
    };
    match [encrypt, k, r].concat().try_into() {
        Ok(bytes) => Ok(Unlock::Opened(MasterKey::new(&bytes))),
        Err(_) => Ok(Unlock::Damaged(Defect::OutOfRange { field: "key" })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s16_absurd_kdf_parameters_are_refused_without_running_them() {
        for (log_n, r, p) in
            [(63, 8, 1), (30, 8, 1), (15, u32::MAX, 1), (15, 8, u32::MAX), (0, 8, 1)]
        {
            let derived = Kdf { log_n, r, p }.derive(b"x", b"salt");
            assert!(matches!(derived, Err(RepositoryError::UnusableKdf { .. })));
        }
    }

    #[test]
    fn a_key_file_opens_with_its_password_only() {
        let (_, file) = create(b"right", Kdf::WEAK_FOR_TESTS).unwrap();
        assert!(matches!(unlock(&file, b"right"), Ok(Unlock::Opened(_))));
        assert!(matches!(unlock(&file, b"wrong"), Ok(Unlock::WrongPassword)));
        assert!(matches!(unlock(&file[1..], b"right"), Ok(Unlock::Damaged(_))));
    }
}
