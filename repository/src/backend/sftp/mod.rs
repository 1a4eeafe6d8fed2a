//! A folder of another machine, through `ssh` and SFTP. The user's own configuration of `ssh`, with its
//! keys and known hosts, holds.

mod session;
mod wire;

use std::{
    fmt, io,
    num::NonZeroU64,
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant, SystemTime},
};

use self::{
    session::{Session, SftpError},
    wire::{POSIX_RENAME, Request, status},
};
use super::{
    Access, Backend, BackendError, Begun, FileKind, FileRef, SftpAddress, retry::Patience,
};
use crate::FileId;

/// Connections at once: a server may take few from one machine.
const SESSIONS_MAX: usize = 4;
/// How long to wait for one that others use.
const SESSION_TIMEOUT: Duration = Duration::from_secs(10 * 60);
/// Temporary files younger than this may belong to a writer.
const TEMPORARY_AGE_MIN: Duration = Duration::from_secs(24 * 60 * 60);

/// A repository in a folder of another machine. Files are 0600, folders 0700.
pub struct SftpFolder {
    address: SftpAddress,
    access: Arc<Access>,
    pool: Mutex<Pool>,
    returned: Condvar,
    patience: Patience,
}

#[derive(Default)]
struct Pool {
    idle: Vec<Session>,
    in_use: usize,
}

impl SftpFolder {
    /// The folder at an address. Nobody is asked yet.
    pub fn new(address: &SftpAddress, access: &Arc<Access>) -> Self {
        let (address, access) = (address.clone(), Arc::clone(access));
        Self {
            address,
            patience: Patience::new(access.silence_max()),
            access,
            pool: Mutex::default(),
            returned: Condvar::new(),
        }
    }

    /// Makes the folder with its parents and subfolders; what exists is left as it is.
    ///
    /// # Errors
    /// What `ssh` or the server says.
    pub fn create(address: &SftpAddress, access: &Arc<Access>) -> Result<Self, BackendError> {
        let store = Self::new(address, access);
        for kind in FileKind::ALL.into_iter().filter(|&kind| kind != FileKind::Config) {
            let path = store.path(kind.folder());
            store.run("create", &path, |session| make_folders(session, &path))?;
        }
        Ok(store)
    }

    fn path(&self, inside: impl fmt::Display) -> String {
        match self.address.path.as_str() {
            "/" => format!("/{inside}"),
            path => format!("{path}/{inside}"),
        }
    }

    fn shown(&self, path: &str) -> String {
        SftpAddress { path: path.to_owned(), ..self.address.clone() }.to_string()
    }

    /// Does something in a connection, a second time where the first is cut.
    fn run<T>(
        &self,
        operation: &'static str,
        path: &str,
        work: impl Fn(&mut Session) -> Result<T, SftpError>,
    ) -> Result<T, BackendError> {
        self.patience.retry(|| self.run_once(operation, path, &work))
    }

    fn run_once<T>(
        &self,
        operation: &'static str,
        path: &str,
        work: impl FnOnce(&mut Session) -> Result<T, SftpError>,
    ) -> Result<T, BackendError> {
        let failed = |source: io::Error| BackendError::Io {
            operation,
            file: self.shown(path),
            source: Arc::new(source),
        };
        let mut session = self.take().map_err(failed)?;
        session.begin();
        let outcome = work(&mut session);
        let usable = !matches!(outcome, Err(SftpError::Connection(_)));
        self.give_back(Some(session).filter(|_| usable));
        outcome.map_err(|error| match error {
            SftpError::Status(status::NO_SUCH_FILE) => {
                BackendError::NotFound { file: self.shown(path) }
            }
            error => failed(error.into_io()),
        })
    }

    /// A connection that nobody else uses.
    fn take(&self) -> io::Result<Session> {
        let deadline = Instant::now() + SESSION_TIMEOUT;
        let mut pool = self.pool.lock().expect("no panic while locked");
        while pool.in_use >= SESSIONS_MAX {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            pool = self.returned.wait_timeout(pool, left).expect("no panic while locked").0;
        }
        pool.in_use += 1;
        if let Some(session) = pool.idle.pop() {
            return Ok(session);
        }
        drop(pool);
        Session::connect(&self.address, &self.access).inspect_err(|_| self.give_back(None))
    }

    fn give_back(&self, session: Option<Session>) {
        let mut pool = self.pool.lock().expect("no panic while locked");
        pool.in_use -= 1;
        pool.idle.extend(session);
        drop(pool);
        self.returned.notify_one();
    }

    /// The folders that hold files of `kind`.
    fn folders(&self, kind: FileKind) -> Vec<String> {
        match kind {
            FileKind::Config => vec![self.address.path.clone()],
            FileKind::Pack => {
                (0..=u8::MAX).map(|byte| self.path(format_args!("data/{byte:02x}"))).collect()
            }
            _ => vec![self.path(kind.folder())],
        }
    }

    /// Stores a file under another name and then gives it its own.
    fn write_once(&self, kind: FileKind, path: &str, content: &[u8]) -> Result<(), BackendError> {
        let temporary = format!("{path}-tmp-{}-{:016x}", std::process::id(), rand::random::<u64>());
        let placed = self.run_once("write", path, |session| {
            write_temporary(session, &self.access, &temporary, path, content, &self.path("keys"))?;
            let placed = place(session, kind, &temporary, path);
            if placed.is_err() {
                // What stays is swept later.
                let _ = session.call(&Request::Remove { path: &temporary });
            }
            placed
        })?;
        match placed {
            true => Ok(()),
            false => Err(BackendError::Exists { file: self.shown(path) }),
        }
    }
}

fn write_temporary(
    session: &mut Session,
    access: &Access,
    temporary: &str,
    path: &str,
    content: &[u8],
    keys: &str,
) -> Result<(), SftpError> {
    let write = |session: &mut Session| session.write_new(temporary, content, &access.pace);
    let folder = path.rsplit_once('/').map_or(".", |(folder, _)| folder);
    let written = match write(session) {
        // `keys` is always there: without it the repository's file system is not mounted, and
        // folders made now would hide under it.
        Err(SftpError::Status(status::NO_SUCH_FILE)) => {
            session.stat(keys)?;
            make_folders(session, folder)?;
            write(session)
        }
        other => other,
    };
    if let Err(SftpError::Status(status)) = written {
        // The server does not say why; and what was written so far still takes up its room.
        let is_full = status == status::FAILURE && session.is_full(folder, content.len())?;
        let _ = session.call(&Request::Remove { path: temporary });
        if is_full {
            return Err(SftpError::Full);
        }
    }
    written
}

/// Gives a file its name; returns whether it was free, which only `config` asks for.
fn place(
    session: &mut Session,
    kind: FileKind,
    temporary: &str,
    path: &str,
) -> Result<bool, SftpError> {
    let (from, to) = (temporary, path);
    if kind != FileKind::Config && session.offers(POSIX_RENAME) {
        return session.call(&Request::Replace { from, to }).map(|()| true);
    }
    // This one fails where there is a file: two programs must not both believe they made it.
    match session.call(&Request::Rename { from, to }) {
        Err(SftpError::Status(_)) if session.stat(path).is_ok() => {}
        other => return other.map(|()| true),
    }
    if kind == FileKind::Config {
        let _ = session.call(&Request::Remove { path: temporary });
        return Ok(false);
    }
    // A file of this name has this content, unless it is damaged.
    session.call(&Request::Remove { path })?;
    session.call(&Request::Rename { from, to })?;
    Ok(true)
}

/// Makes a folder and those it lies in.
fn make_folders(session: &mut Session, path: &str) -> Result<(), SftpError> {
    match session.call(&Request::MakeFolder { path }) {
        Err(SftpError::Status(status::NO_SUCH_FILE)) => {
            let (parent, _) =
                path.rsplit_once('/').ok_or(SftpError::Status(status::NO_SUCH_FILE))?;
            make_folders(session, parent)?;
            session.call(&Request::MakeFolder { path })
        }
        // The protocol has no word for one that is there.
        Err(refused @ SftpError::Status(_)) => match session.stat(path) {
            Ok(attributes) if attributes.is_folder => Ok(()),
            _ => Err(refused),
        },
        other => other,
    }
}

impl Backend for SftpFolder {
    fn list(&self, kind: FileKind) -> Result<Vec<(FileId, u64)>, BackendError> {
        if kind == FileKind::Config {
            let path = self.path("config");
            return match self.run("list", &path, |session| session.stat(&path)) {
                Ok(attributes) => Ok(vec![(FileId::CONFIG, attributes.size.unwrap_or(0))]),
                Err(error) if error.is_not_found() => Ok(Vec::new()),
                Err(error) => Err(error),
            };
        }
        let folders = self.folders(kind);
        let about = self.path(kind.folder());
        let entries = self.run("list", &about, |session| {
            // `locks` alone may be missing: copies of a repository lack it where nobody had a lock.
            if kind != FileKind::Lock {
                session.stat(&about)?;
            }
            session.list(&folders)
        })?;
        let named = entries.into_iter().filter_map(|(folder, entry)| {
            let id: FileId = entry.name.parse().ok()?;
            // One that lies elsewhere would be looked for in vain.
            let in_place = kind != FileKind::Pack || usize::from(id.0[0]) == folder;
            let size = entry.attributes.size.unwrap_or(0);
            (in_place && !entry.attributes.is_folder).then_some((id, size))
        });
        Ok(named.collect())
    }

    fn read(&self, kind: FileKind, id: &FileId) -> Result<Vec<u8>, BackendError> {
        let path = self.path(FileRef { kind, id: *id });
        let len_max = kind.len_max();
        let read =
            self.run("read", &path, |session| session.read_all(&path, len_max, &self.access.pace));
        read?.map_err(|len| BackendError::TooLarge { file: self.shown(&path), len, len_max })
    }

    fn read_range(
        &self,
        kind: FileKind,
        id: &FileId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), BackendError> {
        let path = self.path(FileRef { kind, id: *id });
        let mut truncated = false;
        let end = offset.saturating_add(buffer.len() as u64);
        self.patience.retry(|| {
            self.run_once("read", &path, |session| {
                match session.read_range(&path, offset, buffer, &self.access.pace) {
                    Err(SftpError::Truncated) => {
                        truncated = true;
                        Ok(())
                    }
                    other => other,
                }
            })
        })?;
        match truncated {
            true => Err(BackendError::Truncated { file: self.shown(&path), end }),
            false => Ok(()),
        }
    }

    fn write(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<(), BackendError> {
        let name = match kind {
            FileKind::Config => "config".to_owned(),
            _ => FileRef { kind, id: *id }.to_string(),
        };
        let path = self.path(name);
        self.patience.retry(|| self.write_once(kind, &path, content))
    }

    fn begin(&self, kind: FileKind, id: &FileId, content: &[u8]) -> Result<Begun, BackendError> {
        self.write(kind, id, content).map(|()| Begun::done())
    }

    fn settle(&self, _: Vec<Begun>) -> Result<(), BackendError> {
        Ok(())
    }

    fn remove(&self, kind: FileKind, id: &FileId) -> Result<(), BackendError> {
        let path = self.path(FileRef { kind, id: *id });
        self.patience.retry_removal(|| {
            self.run_once("remove", &path, |session| session.call(&Request::Remove { path: &path }))
        })
    }

    fn location(&self) -> String {
        self.address.to_string()
    }

    fn upload_limit(&self) -> Option<NonZeroU64> {
        self.access.pace.upload_limit()
    }

    fn sweep(&self) -> Result<usize, BackendError> {
        let folders: Vec<String> =
            FileKind::ALL.into_iter().flat_map(|kind| self.folders(kind)).collect();
        let root = self.address.path.as_str();
        let entries = self.run("list", root, |session| session.list(&folders))?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut swept = 0;
        for (folder, entry) in entries {
            let changed =
                entry.attributes.changed.map(|seconds| Duration::from_secs(seconds.into()));
            let old =
                changed.is_some_and(|changed| now.saturating_sub(changed) > TEMPORARY_AGE_MIN);
            if !old || !is_temporary(&entry.name) {
                continue;
            }
            let path = format!("{}/{}", folders[folder].trim_end_matches('/'), entry.name);
            match self
                .run_once("remove", &path, |session| session.call(&Request::Remove { path: &path }))
            {
                Err(error) if error.is_not_found() => {}
                other => {
                    other?;
                    swept += 1;
                }
            }
        }
        Ok(swept)
    }
}

/// Whether a name is one that [`SftpFolder::write_once`] gives.
fn is_temporary(name: &str) -> bool {
    let Some((file, rest)) = name.split_once("-tmp-") else { return false };
    let Some((pid, random)) = rest.split_once('-') else { return false };
    (file == "config" || file.parse::<FileId>().is_ok())
        && pid.parse::<u32>().is_ok()
        && random.len() == 16
        && random.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl fmt::Debug for SftpFolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SftpFolder").field("at", &self.location()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server on a file system of its own with room for a megabyte, which a name space of its own gives.
    #[test]
    fn r10_a_full_server_says_so() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().display();
        let servers = ["/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server"];
        let server = servers.into_iter().find(|server| std::path::Path::new(server).exists());
        let space = |run: &str| {
            let script = format!("mount -t tmpfs -o size=1m none {path} && exec {run}");
            ["unshare", "-Urm", "sh", "-c", &script].map(str::to_owned).to_vec()
        };
        let check = space("true");
        let checked = std::process::Command::new(&check[0]).args(&check[1..]).output();
        let may = checked.is_ok_and(|output| output.status.success());
        let Some(server) = server.filter(|_| may) else {
            let reason = b"SKIPPED: no sftp-server, or no name spaces\n";
            io::Write::write_all(&mut io::stderr(), reason).unwrap();
            return;
        };
        let access = Access { ssh: space(server), ..Access::default() };
        let address: SftpAddress = match format!("sftp:host:{path}/r").parse().unwrap() {
            crate::Address::Sftp(address) => address,
            other => panic!("{other:?}"),
        };
        let store = SftpFolder::create(&address, &Arc::new(access)).unwrap();
        let write = |len: usize| {
            let content = vec![7; len];
            let id = FileId::of(&content);
            store.write(FileKind::Pack, &id, &content).map(|()| id)
        };
        let first = write(700 << 10).unwrap();

        let refused = write(600 << 10).unwrap_err();

        assert!(refused.is_full(), "{refused:?}");
        let (packs, of_one) = (store.list(FileKind::Pack).unwrap(), [(first, 700 << 10)]);
        assert_eq!(packs, of_one);
        store.remove(FileKind::Pack, &first).unwrap();
        write(600 << 10).expect("what was begun took up no room");
    }

    #[test]
    fn only_our_own_temporary_files_are_swept() {
        let id = FileId::of(b"a pack");
        assert!(is_temporary(&format!("{id}-tmp-12-0123456789abcdef")));
        assert!(is_temporary("config-tmp-1-0123456789abcdef"));
        for name in [id.to_string(), "notes-tmp-1-0123456789abcdef".into(), format!("{id}-tmp-1")] {
            assert!(!is_temporary(&name), "{name}");
        }
    }
}
