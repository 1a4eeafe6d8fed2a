//! Where a repository is, how it is reached, and its store with every effect counted.

use std::fmt;
use std::fs;
use std::io;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use repository::{
    Access, Address, AddressError, Backend, BackendError, Begun, FileId, FileKind, Pace,
};

use crate::effect;
use crate::units::{human_duration, parse_duration};

/// The longest secret that is read from a file, in bytes.
const SECRET_LEN_MAX: u64 = 64 << 10;
/// How long a server may be silent: less than a loaded one needs, and more than a writer waits, is no use.
const SERVER_TIMEOUT_MIN: Duration = Duration::from_secs(2);
const SERVER_TIMEOUT_MAX: Duration = Duration::from_secs(90);

/// What reaching a place needs besides its location: as it is configured, or given by the environment.
/// Secrets are named by files, so that this may be shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Route {
    /// The region of S3.
    pub region: Option<String>,
    /// The name of a key of S3.
    pub access_key: Option<String>,
    /// Where that key's secret is.
    pub secret_key_file: Option<PathBuf>,
    /// Who to be at a REST server.
    pub user: Option<String>,
    /// Where the password for a REST server is; not that of the repository.
    pub server_password_file: Option<PathBuf>,
    /// Certificates to trust instead of those that the system trusts.
    pub ca_file: Option<PathBuf>,
    /// The program that reaches another machine, with its first arguments, instead of `ssh`.
    pub ssh: Option<Vec<String>>,
    /// Bytes a second that may be sent.
    pub limit_upload: Option<u64>,
    /// Bytes a second that may be received.
    pub limit_download: Option<u64>,
    /// How long a server may be silent.
    pub server_timeout: Option<Duration>,
}

/// Why a location cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LocationError {
    /// It makes no sense.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// A file that reaching it needs cannot be read.
    #[error("cannot read {what} from {}", .path.display())]
    File {
        /// What should be in it.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The store cannot be used.
    #[error("cannot use the repository {location}")]
    Store {
        /// Where it is.
        location: String,
        /// Why.
        source: BackendError,
    },
}

impl LocationError {
    /// There is nothing where the repository should be, or it is away.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Store { source, .. } if source.is_not_found() || source.is_away())
    }

    /// What the user can do next.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Address(AddressError::Password) => Some(
                "put it into a file: server-password-file in the configuration, or \
                 KVMSNAP_REST_PASSWORD_FILE",
            ),
            Self::Address(AddressError::UnknownScheme { .. }) => {
                Some("write ./NAME for a folder with a colon in its name")
            }
            Self::Address(_) => Some(
                "write /srv/backup, sftp:user@host:/srv/backup, s3://host/bucket/prefix or \
                 rest:https://host/path/",
            ),
            Self::Store { source, .. } if source.is_not_found() => {
                Some("`kvmsnap repository init` makes one")
            }
            Self::Store { source, .. } => store_hint(source),
            _ => None,
        }
    }
}

/// What the user can do about a store that fails.
pub fn store_hint(error: &BackendError) -> Option<&'static str> {
    match error {
        BackendError::NoCredentials { .. } => Some(
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or access-key and secret-key-file \
             in the configuration",
        ),
        BackendError::Io { operation: "remove", .. } if error.is_read_only() => Some(
            "a store that only takes new files keeps what it has: forget and prune where it is kept",
        ),
        error if error.is_not_found() => Some(
            "is the repository mounted and all there? A copy may lack folders that were empty: make them anew",
        ),
        error if error.is_away() => Some("what was backed up is safe: try again once it is there"),
        _ => None,
    }
}

impl Route {
    /// With what the environment says, which goes before what is configured.
    #[must_use]
    pub fn or_environment(self) -> Self {
        let text = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let path = |name: &str| text(name).map(PathBuf::from);
        let words = |name: &str| {
            text(name).map(|words| words.split_whitespace().map(str::to_owned).collect())
        };
        Self {
            region: text("AWS_REGION").or_else(|| text("AWS_DEFAULT_REGION")).or(self.region),
            user: text("KVMSNAP_REST_USER").or(self.user),
            server_password_file: path("KVMSNAP_REST_PASSWORD_FILE").or(self.server_password_file),
            ca_file: path("KVMSNAP_CA_FILE").or(self.ca_file),
            ssh: words("KVMSNAP_SSH").or(self.ssh),
            ..self
        }
    }

    fn access(&self) -> Result<Access, LocationError> {
        let text = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let limit = |bytes: Option<u64>| bytes.and_then(NonZeroU64::new);
        let mut access = Access::default();
        access.pace = Arc::new(Pace::new(limit(self.limit_upload), limit(self.limit_download)));
        access.region.clone_from(&self.region);
        access.silence_max = self.server_timeout;
        access.ssh = self.ssh.clone().unwrap_or_default();
        if let Some(path) = &self.ca_file {
            let read = fs::read(path).map_err(|source| failed("certificates", path, source))?;
            access.ca_certificates = Some(read);
        }
        let password = match (&self.server_password_file, text("KVMSNAP_REST_PASSWORD")) {
            (_, Some(password)) => password,
            (Some(path), None) => secret("the password of the server", path)?,
            (None, None) => String::new(),
        };
        let access = access.with_login(self.user.as_deref(), &password);
        let in_environment = text("AWS_ACCESS_KEY_ID").zip(text("AWS_SECRET_ACCESS_KEY"));
        Ok(match (in_environment, &self.access_key, &self.secret_key_file) {
            (Some((name, secret)), ..) => {
                access.with_s3_key(&name, &secret, text("AWS_SESSION_TOKEN").as_deref())
            }
            (None, Some(name), Some(path)) => {
                access.with_s3_key(name, &secret("the secret key", path)?, None)
            }
            _ => access,
        })
    }
}

/// How long a server may be silent, as people write it.
///
/// # Errors
/// What is wrong with it, in words.
pub fn parse_server_timeout(text: &str) -> Result<Duration, String> {
    let (least, most) = (SERVER_TIMEOUT_MIN, SERVER_TIMEOUT_MAX);
    let timeout = parse_duration(text)?;
    let is_useful = (least..=most).contains(&timeout);
    is_useful
        .then_some(timeout)
        .ok_or_else(|| format!("use {} to {}", human_duration(least), human_duration(most)))
}

fn failed(what: &'static str, path: &Path, source: io::Error) -> LocationError {
    LocationError::File { what, path: path.to_owned(), source }
}

/// Reads a secret; white space around it does not count.
fn secret(what: &'static str, path: &Path) -> Result<String, LocationError> {
    use std::io::Read as _;
    let mut text = String::new();
    let read =
        fs::File::open(path).and_then(|file| file.take(SECRET_LEN_MAX).read_to_string(&mut text));
    read.map_err(|source| failed(what, path, source))?;
    Ok(text.trim().to_owned())
}

/// Opens the store at a location.
///
/// # Errors
/// [`LocationError`], as far as that shows without asking for a file.
pub fn open(location: &str, route: &Route) -> Result<Arc<dyn Backend>, LocationError> {
    with(location, route, Address::open)
}

/// Makes the store at a location: folders, or the bucket.
///
/// # Errors
/// [`LocationError`].
pub fn create(location: &str, route: &Route) -> Result<Arc<dyn Backend>, LocationError> {
    with(location, route, Address::create)
}

fn with(
    location: &str,
    route: &Route,
    make: impl FnOnce(&Address, &Arc<Access>) -> Result<Box<dyn Backend>, BackendError>,
) -> Result<Arc<dyn Backend>, LocationError> {
    let address: Address = location.parse()?;
    let access = Arc::new(route.access()?);
    let made = make(&address, &access);
    let store =
        made.map_err(|source| LocationError::Store { location: address.to_string(), source })?;
    Ok(Arc::new(Counted(store)))
}

/// A store that announces what it changes.
struct Counted(Box<dyn Backend>);

impl Counted {
    fn about_to(&self, operation: &'static str, kind: FileKind) -> Result<(), BackendError> {
        self.announce(operation, &format!("repository: {operation} {}", kind_name(kind)))
    }

    fn announce(&self, operation: &'static str, effect: &str) -> Result<(), BackendError> {
        effect::about_to(effect).map_err(|source: io::Error| BackendError::Io {
            operation,
            file: self.0.location(),
            source: Arc::new(source),
        })
    }
}

fn kind_name(kind: FileKind) -> &'static str {
    match kind {
        FileKind::Config => "config",
        FileKind::Key => "key",
        FileKind::Snapshot => "snapshot",
        FileKind::Index => "index",
        FileKind::Pack => "pack",
        FileKind::Lock => "lock",
    }
}

impl fmt::Debug for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Backend for Counted {
    fn list(&self, kind: FileKind) -> Result<Vec<(FileId, u64)>, BackendError> {
        self.0.list(kind)
    }

    fn read(&self, kind: FileKind, id: &FileId) -> Result<Vec<u8>, BackendError> {
        self.0.read(kind, id)
    }

    fn read_range(
        &self,
        kind: FileKind,
        id: &FileId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), BackendError> {
        self.0.read_range(kind, id, offset, buffer)
    }

    fn write(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<(), BackendError> {
        self.about_to("write", kind)?;
        self.0.write(kind, id, content)
    }

    fn begin(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<Begun, BackendError> {
        self.about_to("write", kind)?;
        self.0.begin(kind, id, content)
    }

    fn settle(&self, files: Vec<Begun>) -> Result<(), BackendError> {
        if !files.is_empty() {
            self.announce("write", "repository: settle packs")?;
        }
        self.0.settle(files)
    }

    fn remove(&self, kind: FileKind, id: &FileId) -> Result<(), BackendError> {
        self.about_to("remove", kind)?;
        self.0.remove(kind, id)
    }

    fn lists_at_once(&self) -> bool {
        self.0.lists_at_once()
    }

    fn location(&self) -> String {
        self.0.location()
    }

    fn sweep(&self) -> Result<usize, BackendError> {
        self.0.sweep()
    }

    fn upload_limit(&self) -> Option<NonZeroU64> {
        self.0.upload_limit()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p1_packs_are_made_durable_together() {
        let scratch = tempfile::tempdir().unwrap();
        let store = create(scratch.path().to_str().unwrap(), &Route::default()).unwrap();
        let contents: [&[u8]; 2] = [b"a pack", b"another"];
        let begin = |content| store.begin(FileKind::Pack, &FileId::of(content), content);
        let begun = contents.map(|content| begin(content).unwrap());

        assert_eq!(store.list(FileKind::Pack).unwrap(), [], "they were settled one by one");

        store.settle(begun.into()).unwrap();
        assert_eq!(store.list(FileKind::Pack).unwrap().len(), 2);
    }
}
