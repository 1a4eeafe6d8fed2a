//! A part of a bucket of an S3 server.

use std::{collections::HashSet, num::NonZeroU64, sync::Arc, time::Duration};

use rusty_s3::{
    Bucket, Credentials, S3Action as _, UrlStyle,
    actions::{ListObjectsV2, ListObjectsV2Response},
};
use ureq::http::Method;

use super::{
    Access, Backend, BackendError, Begun, FileKind, FileRef, S3Address,
    http::{Call, Client},
    retry::Patience,
};
use crate::FileId;

/// How long a signed request may be used: as far as clocks may differ, and little more.
const SIGNED_FOR: Duration = Duration::from_secs(15 * 60);
/// How long one page of a list may be; there are at most 1000 files on it.
const PAGE_LEN_MAX: u64 = 8 << 20;
/// How many pages a list may have: as many as 20 million files need.
const PAGES_MAX: usize = 20_000;

/// A part of a bucket.
#[derive(Debug)]
pub struct S3Bucket {
    client: Client,
    bucket: Bucket,
    /// What the keys of all objects begin with; empty, or ends in `/`.
    prefix: String,
    /// As a person may see it.
    shown: String,
    patience: Patience,
    access: Arc<Access>,
}

impl S3Bucket {
    /// The repository at an address. Nobody is asked yet.
    ///
    /// # Errors
    /// [`BackendError::Protocol`] when the address makes no sense, [`BackendError::Io`] when the
    /// certificates to trust cannot be used, [`BackendError::NoCredentials`].
    pub fn new(address: &S3Address, access: &Arc<Access>) -> Result<Self, BackendError> {
        let shown = address.to_string();
        if access.s3.is_none() {
            return Err(BackendError::NoCredentials { location: shown });
        }
        // Amazon finds a bucket by the host's name; everybody else by the path.
        let host = address.endpoint.host_str().unwrap_or_default();
        let style = match host.ends_with(".amazonaws.com") && !address.bucket.contains('.') {
            true => UrlStyle::VirtualHost,
            false => UrlStyle::Path,
        };
        let region = access.region.clone().unwrap_or_else(|| "us-east-1".to_owned());
        let bucket = Bucket::new(address.endpoint.clone(), style, address.bucket.clone(), region)
            .map_err(|_| BackendError::Protocol {
            file: shown.clone(),
            problem: "a bucket cannot be called so",
        })?;
        let prefix = match address.prefix.as_str() {
            "" => String::new(),
            prefix => format!("{prefix}/"),
        };
        let client = Client::new(access)?;
        Ok(Self {
            client,
            bucket,
            prefix,
            shown,
            patience: Patience::new(access.silence_max()),
            access: Arc::clone(access),
        })
    }

    /// Makes the bucket, unless it is there.
    ///
    /// # Errors
    /// What the server says.
    pub fn create(address: &S3Address, access: &Arc<Access>) -> Result<Self, BackendError> {
        let store = Self::new(address, access)?;
        let credentials = store.credentials();
        let head = store.bucket.head_bucket(Some(credentials)).sign(SIGNED_FOR);
        match store
            .patience
            .retry(|| store.call(Method::HEAD, head.as_str(), None, "look at", &store.shown, &[]))
        {
            Err(error) if error.is_not_found() => {}
            other => return other.map(|_| store),
        }
        let action = store.bucket.create_bucket(credentials);
        let (url, body) = (action.sign(SIGNED_FOR), action.body());
        let content = Some(body.as_bytes());
        store.patience.retry(|| {
            store.call(Method::PUT, url.as_str(), content, "create", &store.shown, &[])
        })?;
        Ok(store)
    }

    fn credentials(&self) -> &Credentials {
        &self.access.s3.as_ref().expect("looked for in `new`").0
    }

    fn key(&self, kind: FileKind, id: &FileId) -> String {
        format!("{}{}", self.prefix, FileRef { kind, id: *id })
    }

    fn file(&self, kind: FileKind, id: &FileId) -> String {
        format!("{}/{}", self.shown, FileRef { kind, id: *id })
    }

    /// A request whose answer is not read; returns the length that it tells.
    fn call(
        &self,
        method: Method,
        url: &str,
        content: Option<&[u8]>,
        operation: &'static str,
        file: &str,
        headers: &[(&str, &str)],
    ) -> Result<Option<u64>, BackendError> {
        let call = Call { method, url, headers, content, operation, file, answer_len_max: 0 };
        Ok(self.client.ask(&call, &[200, 204])?.content_len())
    }

    fn get(
        &self,
        url: impl Fn() -> String,
        (operation, file): (&'static str, &str),
        headers: &[(&str, &str)],
        answer_len_max: u64,
        wanted: u16,
    ) -> Result<Vec<u8>, BackendError> {
        self.patience.retry(|| {
            let (url, content) = (&*url(), None);
            let method = Method::GET;
            let call = Call { method, url, headers, content, operation, file, answer_len_max };
            self.client.ask(&call, &[wanted])?.content(&call)
        })
    }

    /// The length of a file.
    fn len(&self, kind: FileKind, id: &FileId) -> Result<Option<u64>, BackendError> {
        let (key, file) = (self.key(kind, id), self.file(kind, id));
        let url = self.bucket.head_object(Some(self.credentials()), &key).sign(SIGNED_FOR);
        match self
            .patience
            .retry(|| self.call(Method::HEAD, url.as_str(), None, "look at", &file, &[]))
        {
            Ok(len) => Ok(Some(len.unwrap_or(0))),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn page(
        &self,
        folder: &str,
        prefix: &str,
        token: Option<&str>,
    ) -> Result<ListObjectsV2Response, BackendError> {
        let url = || {
            let mut action = self.bucket.list_objects_v2(Some(self.credentials()));
            action.with_prefix(prefix);
            if let Some(token) = token {
                action.with_continuation_token(token);
            }
            action.sign(SIGNED_FOR).into()
        };
        let xml = self.get(url, ("list", folder), &[], PAGE_LEN_MAX, 200)?;
        let text = String::from_utf8_lossy(&xml);
        ListObjectsV2::parse_response(&text).map_err(|_| BackendError::Protocol {
            file: folder.to_owned(),
            problem: "no list of objects",
        })
    }

    fn write_object(
        &self,
        kind: FileKind,
        id: &FileId,
        content: &[u8],
        headers: &[(&str, &str)],
    ) -> Result<(), BackendError> {
        let (key, file) = (self.key(kind, id), self.file(kind, id));
        self.patience.retry(|| {
            let url = self.bucket.put_object(Some(self.credentials()), &key).sign(SIGNED_FOR);
            let call = Call {
                method: Method::PUT,
                url: url.as_str(),
                headers,
                content: Some(content),
                operation: "write",
                file: &file,
                answer_len_max: 0,
            };
            let answer = self.client.send(&call)?;
            match answer.status() {
                200 => Ok(()),
                409 | 412 => Err(BackendError::Exists { file: file.clone() }),
                _ => Err(answer.refusal(&call)),
            }
        })
    }
}

impl Backend for S3Bucket {
    fn list(&self, kind: FileKind) -> Result<Vec<(FileId, u64)>, BackendError> {
        if kind == FileKind::Config {
            let len = self.len(kind, &FileId::CONFIG)?;
            return Ok(len.map(|len| (FileId::CONFIG, len)).into_iter().collect());
        }
        let folder = format!("{}/{}", self.shown, kind.folder());
        let prefix = format!("{}{}/", self.prefix, kind.folder());
        let mut files = Vec::new();
        let (mut token, mut seen): (Option<String>, _) = (None, HashSet::new());
        for _ in 0..PAGES_MAX {
            let page = self.page(&folder, &prefix, token.as_deref())?;
            let named = page.contents.into_iter().filter_map(|object| {
                let name = object.key.strip_prefix(&prefix)?;
                let name = if kind == FileKind::Pack { name.split_once('/')?.1 } else { name };
                let id = name.parse().ok()?;
                // One that lies elsewhere would be looked for in vain.
                (object.key == self.key(kind, &id)).then_some((id, object.size.unwrap_or(0)))
            });
            files.extend(named);
            match page.next_continuation_token {
                None => return Ok(files),
                Some(next) if seen.insert(next.clone()) => token = Some(next),
                Some(_) => break,
            }
        }
        Err(BackendError::Protocol { file: folder, problem: "a list without an end" })
    }

    fn read(&self, kind: FileKind, id: &FileId) -> Result<Vec<u8>, BackendError> {
        let (key, file) = (self.key(kind, id), self.file(kind, id));
        let url = || self.bucket.get_object(Some(self.credentials()), &key).sign(SIGNED_FOR).into();
        self.get(url, ("read", &file), &[], kind.len_max(), 200)
    }

    fn read_range(
        &self,
        kind: FileKind,
        id: &FileId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), BackendError> {
        let Some(range) = super::Range::of(offset, buffer) else { return Ok(()) };
        let (key, file) = (self.key(kind, id), self.file(kind, id));
        let url = || self.bucket.get_object(Some(self.credentials()), &key).sign(SIGNED_FOR).into();
        let headers = [("Range", range.header.as_str())];
        let content = self.get(url, ("read", &file), &headers, range.len, 206);
        range.fill(buffer, &file, content)
    }

    fn write(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<(), BackendError> {
        if kind != FileKind::Config {
            return self.write_object(kind, id, content, &[]);
        }
        // Of two programs that make a repository at once one must lose. Servers that do not know the
        // condition ignore it, so it is looked for, too.
        if self.len(kind, id)?.is_some() {
            return Err(BackendError::Exists { file: self.file(kind, id) });
        }
        self.write_object(kind, id, content, &[("If-None-Match", "*")])
    }

    fn begin(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<Begun, BackendError> {
        self.write(kind, id, content).map(|()| Begun::done())
    }

    fn settle(&self, _: Vec<Begun>) -> Result<(), BackendError> {
        Ok(())
    }

    fn remove(&self, kind: FileKind, id: &FileId) -> Result<(), BackendError> {
        let (key, file) = (self.key(kind, id), self.file(kind, id));
        // S3 does not tell whether there was one.
        if self.len(kind, id)?.is_none() {
            return Err(BackendError::NotFound { file });
        }
        let url = self.bucket.delete_object(Some(self.credentials()), &key).sign(SIGNED_FOR);
        self.patience.retry_removal(|| {
            self.call(Method::DELETE, url.as_str(), None, "remove", &file, &[]).map(drop)
        })
    }

    fn location(&self) -> String {
        self.shown.clone()
    }

    fn upload_limit(&self) -> Option<NonZeroU64> {
        self.access.pace.upload_limit()
    }
}
