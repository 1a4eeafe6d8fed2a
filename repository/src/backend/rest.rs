//! A repository of a REST server, in version 2 of restic's protocol (`doc/REST_backend.rst`).

use std::{fmt, num::NonZeroU64, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Deserialize;
use ureq::http::Method;
use url::Url;

use super::{
    Access, Backend, BackendError, Begun, FileKind, FileRef,
    http::{Call, Client},
    retry::Patience,
};
use crate::FileId;

/// What a list of names and sizes is called.
const LIST_V2: &str = "application/vnd.x.restic.rest.v2";
/// How long a list of files may be: some millions.
const LIST_LEN_MAX: u64 = 512 << 20;

/// A repository of a REST server.
pub struct RestServer {
    client: Client,
    /// Ends in `/`, without user or password.
    base: Url,
    /// As a person may see it.
    shown: String,
    /// Who we are, as HTTP says it.
    authorization: Option<String>,
    patience: Patience,
    access: Arc<Access>,
}

/// An entry of a list.
#[derive(Deserialize)]
struct Listed {
    name: String,
    size: u64,
}

impl RestServer {
    /// The repository at an address. Nobody is asked yet.
    ///
    /// # Errors
    /// [`BackendError::Io`] when the certificates to trust cannot be used.
    pub fn new(url: &Url, access: &Arc<Access>) -> Result<Self, BackendError> {
        let shown = format!("rest:{url}");
        let mut base = url.clone();
        let named = Some(url.username()).filter(|user| !user.is_empty());
        let authorization = named.or(access.login.user.as_deref()).map(|user| {
            let login = format!("{user}:{}", access.login.password);
            format!("Basic {}", STANDARD.encode(login))
        });
        // The user is in a header of its own.
        let _ = base.set_username("");
        let client = Client::new(access)?;
        Ok(Self {
            client,
            base,
            shown,
            authorization,
            patience: Patience::new(access.silence_max()),
            access: Arc::clone(access),
        })
    }

    /// Makes an empty place for a repository.
    ///
    /// # Errors
    /// What the server says.
    pub fn create(url: &Url, access: &Arc<Access>) -> Result<Self, BackendError> {
        let server = Self::new(url, access)?;
        let url = format!("{}?create=true", server.base);
        let content = Some([].as_slice());
        server.patience.retry(|| {
            server.call(Method::POST, &url, content, "create", &server.shown, &[]).map(drop)
        })?;
        Ok(server)
    }

    fn url(&self, kind: FileKind, id: &FileId) -> String {
        match kind {
            FileKind::Config => format!("{}config", self.base),
            // Which folder a pack is in is the server's business.
            _ => format!("{}{}/{id}", self.base, kind.folder()),
        }
    }

    fn file(&self, kind: FileKind, id: &FileId) -> String {
        format!("{}{}", self.shown, FileRef { kind, id: *id })
    }

    /// A request whose answer is not read.
    fn call(
        &self,
        method: Method,
        url: &str,
        content: Option<&[u8]>,
        operation: &'static str,
        file: &str,
        headers: &[(&str, &str)],
    ) -> Result<Option<u64>, BackendError> {
        let headers = self.with_login(headers);
        let headers = headers.as_slice();
        let call = Call { method, url, headers, content, operation, file, answer_len_max: 0 };
        Ok(self.client.ask(&call, &[200, 201, 204])?.content_len())
    }

    fn get(
        &self,
        url: &str,
        (operation, file): (&'static str, &str),
        headers: &[(&str, &str)],
        answer_len_max: u64,
        wanted: u16,
    ) -> Result<Vec<u8>, BackendError> {
        let headers = self.with_login(headers);
        let (headers, content) = (headers.as_slice(), None);
        let method = Method::GET;
        let call = Call { method, url, headers, content, operation, file, answer_len_max };
        self.patience.retry(|| self.client.ask(&call, &[wanted])?.content(&call))
    }

    /// The length of a file.
    fn len(&self, kind: FileKind, id: &FileId) -> Result<Option<u64>, BackendError> {
        let (url, file) = (self.url(kind, id), self.file(kind, id));
        let asked =
            self.patience.retry(|| self.call(Method::HEAD, &url, None, "look at", &file, &[]));
        match asked {
            Ok(len) => Ok(Some(len.unwrap_or(0))),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn with_login<'a>(&'a self, headers: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
        let login = self.authorization.iter().map(|value| ("Authorization", value.as_str()));
        headers.iter().copied().chain(login).collect()
    }
}

impl fmt::Debug for RestServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RestServer").field("at", &self.shown).finish_non_exhaustive()
    }
}

impl Backend for RestServer {
    fn list(&self, kind: FileKind) -> Result<Vec<(FileId, u64)>, BackendError> {
        if kind == FileKind::Config {
            let len = self.len(kind, &FileId::CONFIG)?;
            return Ok(len.map(|len| (FileId::CONFIG, len)).into_iter().collect());
        }
        let url = format!("{}{}/", self.base, kind.folder());
        let folder = format!("{}{}", self.shown, kind.folder());
        let about = ("list", folder.as_str());
        // "Not found" is no list of no files: some servers say it of any folder that they cannot list.
        let json = self.get(&url, about, &[("Accept", LIST_V2)], LIST_LEN_MAX, 200)?;
        let listed: Vec<Listed> =
            serde_json::from_slice(&json).map_err(|_| BackendError::Protocol {
                file: folder,
                problem: "no list of names and sizes (version 2)",
            })?;
        let named = |Listed { name, size }: Listed| Some((name.parse().ok()?, size));
        Ok(listed.into_iter().filter_map(named).collect())
    }

    fn read(&self, kind: FileKind, id: &FileId) -> Result<Vec<u8>, BackendError> {
        self.get(&self.url(kind, id), ("read", &self.file(kind, id)), &[], kind.len_max(), 200)
    }

    fn read_range(
        &self,
        kind: FileKind,
        id: &FileId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), BackendError> {
        let Some(range) = super::Range::of(offset, buffer) else { return Ok(()) };
        let file = self.file(kind, id);
        let (about, headers) = (("read", file.as_str()), [("Range", range.header.as_str())]);
        let content = self.get(&self.url(kind, id), about, &headers, range.len, 206);
        range.fill(buffer, &file, content)
    }

    fn write(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<(), BackendError> {
        let (url, file) = (self.url(kind, id), self.file(kind, id));
        if kind == FileKind::Config && self.len(kind, id)?.is_some() {
            return Err(BackendError::Exists { file });
        }
        let headers = [("Content-Type", "application/octet-stream")];
        self.patience.retry(|| {
            match self.call(Method::POST, &url, Some(content), "write", &file, &headers) {
                // Servers that only append refuse a file that is there already, so a second try of
                // what was stored after all. Its name is that of its content.
                Err(error) if error.is_read_only() && kind != FileKind::Config => {
                    match self.len(kind, id) {
                        Ok(Some(len)) if len == content.len() as u64 => Ok(()),
                        _ => Err(error),
                    }
                }
                other => other.map(drop),
            }
        })
    }

    fn begin(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<Begun, BackendError> {
        self.write(kind, id, content).map(|()| Begun::done())
    }

    fn settle(&self, _: Vec<Begun>) -> Result<(), BackendError> {
        Ok(())
    }

    fn remove(&self, kind: FileKind, id: &FileId) -> Result<(), BackendError> {
        let (url, file) = (self.url(kind, id), self.file(kind, id));
        self.patience
            .retry_removal(|| self.call(Method::DELETE, &url, None, "remove", &file, &[]).map(drop))
    }

    fn location(&self) -> String {
        self.shown.clone()
    }

    fn upload_limit(&self) -> Option<NonZeroU64> {
        self.access.pace.upload_limit()
    }
}
