//! One connection to an SFTP server: an `ssh` of its own, spoken to through a socket with deadlines.

use std::{
    collections::HashMap,
    io::{self, ErrorKind, Read, Write},
    os::{
        fd::OwnedFd,
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::{
    SftpAddress,
    wire::{self, Answer, Attributes, DATA_LEN, Entry, Request, open, status},
};
use crate::backend::{Access, Pace};

/// How long reaching the machine and the first answer may take; `ssh` itself is told half of it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// How long one operation on one file may take, however slowly it goes on.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(60 * 60);
/// A file system with less room than this is full: folders and their likes need some too.
const ROOM_MIN: u64 = 64 << 10;
/// Requests that wait for their answers: 2 MiB of data.
const WINDOW: usize = 64;
/// Folders that are listed at once.
const FOLDERS_AT_ONCE: usize = 32;
/// Names in one folder that are believed.
const NAMES_MAX: usize = 20_000_000;
/// How long to wait for what `ssh` has to say when it failed.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_millis(500);
const LAST_WORDS_LEN_MAX: u64 = 4 << 10;

/// Why a server did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum SftpError {
    #[error("the server answered {}", name_of(*.0))]
    Status(u32),
    #[error("no room is left there")]
    Full,
    #[error("the server ends the file early")]
    Truncated,
    /// The connection is of no more use.
    #[error(transparent)]
    Connection(io::Error),
}

impl SftpError {
    /// As an error of the system, so that it is told apart like one.
    pub(super) fn into_io(self) -> io::Error {
        match self {
            Self::Status(status::PERMISSION_DENIED) => {
                io::Error::new(ErrorKind::PermissionDenied, self.to_string())
            }
            Self::Status(status::NO_CONNECTION | status::CONNECTION_LOST) => {
                io::Error::new(ErrorKind::ConnectionReset, self.to_string())
            }
            Self::Full => io::Error::new(ErrorKind::StorageFull, self.to_string()),
            Self::Status(_) => io::Error::other(self.to_string()),
            Self::Truncated => ErrorKind::UnexpectedEof.into(),
            Self::Connection(source) => source,
        }
    }
}

impl From<io::Error> for SftpError {
    fn from(source: io::Error) -> Self {
        // That is what a timeout of a socket is called.
        Self::Connection(match source.kind() {
            ErrorKind::WouldBlock => silent(),
            _ => source,
        })
    }
}

impl From<wire::Malformed> for SftpError {
    fn from(malformed: wire::Malformed) -> Self {
        Self::Connection(io::Error::new(ErrorKind::InvalidData, malformed))
    }
}

fn silent() -> io::Error {
    io::Error::new(ErrorKind::TimedOut, "no answer in time")
}

fn name_of(status: u32) -> String {
    match status {
        status::EOF => "\"end of file\"".to_owned(),
        status::NO_SUCH_FILE => "\"no such file\"".to_owned(),
        status::PERMISSION_DENIED => "\"permission denied\"".to_owned(),
        status::FAILURE => "\"failure\"".to_owned(),
        other => format!("with status {other}"),
    }
}

/// A connection in which one operation runs at a time.
#[derive(Debug)]
pub(super) struct Session {
    ssh: Child,
    stream: UnixStream,
    next_id: u32,
    extensions: Vec<String>,
    /// When the operation under way must be done.
    deadline: Instant,
}

impl Session {
    /// Starts `ssh`, which asks nobody anything.
    pub(super) fn connect(address: &SftpAddress, access: &Access) -> io::Result<Self> {
        let (program, arguments) = match access.ssh.split_first() {
            Some((program, arguments)) => (program.as_str(), arguments),
            None => ("ssh", [].as_slice()),
        };
        let mut command = Command::new(program);
        command.args(arguments).args(["-o", "BatchMode=yes"]);
        // Who gives up a silent server sooner does not wait long for a new connection to it.
        let connect_timeout = CONNECT_TIMEOUT.min(access.silence_max() * 2);
        command.arg("-o").arg(format!("ConnectTimeout={}", connect_timeout.as_secs() / 2));
        // A connection that is cut without a word is noticed also where nothing is asked.
        command.args(["-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"]);
        if let Some(port) = address.port {
            command.args(["-p", &port.to_string()]);
        }
        if let Some(user) = &address.user {
            command.args(["-l", user]);
        }
        command.args(["-s", "--", &address.host, "sftp"]);
        let (stream, theirs) = UnixStream::pair()?;
        let (last_words, stderr) = UnixStream::pair()?;
        command.stdin(Stdio::from(OwnedFd::from(theirs.try_clone()?)));
        command.stdout(Stdio::from(OwnedFd::from(theirs)));
        command.stderr(Stdio::from(OwnedFd::from(stderr)));
        // Ctrl-C is for us; what was begun must be cleaned up through this connection.
        command.process_group(0);
        let ssh = command.spawn()?;
        // With it our copies of its ends go.
        drop(command);
        stream.set_write_timeout(Some(access.silence_max()))?;
        let deadline = Instant::now() + connect_timeout;
        let mut session = Self { ssh, stream, next_id: 0, extensions: Vec::new(), deadline };
        match session.greet(connect_timeout) {
            Ok(()) => {
                session.stream.set_read_timeout(Some(access.silence_max()))?;
                Ok(session)
            }
            Err(error) => {
                drop(session);
                Err(explained(error.into_io(), last_words))
            }
        }
    }

    fn greet(&mut self, timeout: Duration) -> Result<(), SftpError> {
        self.stream.set_read_timeout(Some(timeout))?;
        self.stream.write_all(&wire::hello())?;
        let packet = self.packet()?;
        self.extensions = wire::read_hello(&packet)?;
        Ok(())
    }

    /// To be called when another operation begins.
    pub(super) fn begin(&mut self) {
        self.deadline = Instant::now() + OPERATION_TIMEOUT;
    }

    pub(super) fn offers(&self, extension: &str) -> bool {
        self.extensions.iter().any(|offered| offered == extension)
    }

    /// Asks for something whose answer is whether it was done.
    pub(super) fn call(&mut self, request: &Request<'_>) -> Result<(), SftpError> {
        match self.ask(request)? {
            Answer::Status(status::OK) => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) fn stat(&mut self, path: &str) -> Result<Attributes, SftpError> {
        match self.ask(&Request::Stat { path })? {
            Answer::Attributes(attributes) => Ok(attributes),
            other => Err(unexpected(&other)),
        }
    }

    /// Whether there is no room for so many bytes on the file system of a folder; false where nobody tells.
    pub(super) fn is_full(&mut self, folder: &str, len: usize) -> Result<bool, SftpError> {
        if !self.offers(wire::STATVFS) {
            return Ok(false);
        }
        match self.ask(&Request::Room { path: folder })? {
            Answer::Room(room) => Ok(room.no_files || room.bytes < (len as u64).max(ROOM_MIN)),
            _ => Ok(false),
        }
    }

    /// Writes a new file and makes it durable, where the server can.
    pub(super) fn write_new(
        &mut self,
        path: &str,
        content: &[u8],
        pace: &Pace,
    ) -> Result<(), SftpError> {
        let handle = self.open(path, open::WRITE_NEW)?;
        let mut waiting = HashMap::new();
        let mut failure = Ok(());
        for (number, data) in content.chunks(DATA_LEN).enumerate() {
            pace.before_sending(data.len());
            let offset = (number * DATA_LEN) as u64;
            let id = self.send(&Request::Write { handle: &handle, offset, data })?;
            waiting.insert(id, ());
            if waiting.len() >= WINDOW {
                failure = failure.and(self.take_done(&mut waiting)?);
            }
            if failure.is_err() {
                break;
            }
        }
        while !waiting.is_empty() {
            failure = failure.and(self.take_done(&mut waiting)?);
        }
        if failure.is_ok() && self.offers(wire::FSYNC) {
            failure = done(self.ask(&Request::Sync { handle: &handle })?);
        }
        let closed = done(self.ask(&Request::Close { handle: &handle })?);
        failure.and(closed)
    }

    /// The answer of one of those that wait; an error in it leaves the connection of use.
    fn take_done(
        &mut self,
        waiting: &mut HashMap<u32, ()>,
    ) -> Result<Result<(), SftpError>, SftpError> {
        let (id, answer) = self.answer()?;
        waiting.remove(&id).ok_or(wire::Malformed)?;
        Ok(done(answer))
    }

    /// The whole of a file, `None` when it is longer than allowed.
    pub(super) fn read_all(
        &mut self,
        path: &str,
        len_max: u64,
        pace: &Pace,
    ) -> Result<Result<Vec<u8>, u64>, SftpError> {
        let handle = self.open(path, open::READ)?;
        let content = self.read_open(&handle, len_max, pace);
        self.close_after(&handle, content)
    }

    fn read_open(
        &mut self,
        handle: &[u8],
        len_max: u64,
        pace: &Pace,
    ) -> Result<Result<Vec<u8>, u64>, SftpError> {
        let len = match self.ask(&Request::LenOf { handle })? {
            Answer::Attributes(Attributes { size: Some(size), .. }) => size,
            other => return Err(unexpected(&other)),
        };
        if len > len_max {
            return Ok(Err(len));
        }
        // Filled as it comes: a length that is a lie takes no memory.
        let mut content = Vec::new();
        while (content.len() as u64) < len {
            let part = (len - content.len() as u64).min((WINDOW * DATA_LEN) as u64);
            let start = content.len();
            content.resize(start + part as usize, 0);
            self.read_parts(handle, start as u64, &mut content[start..], pace)?;
        }
        Ok(Ok(content))
    }

    /// Fills `buffer` from a place in a file.
    pub(super) fn read_range(
        &mut self,
        path: &str,
        offset: u64,
        buffer: &mut [u8],
        pace: &Pace,
    ) -> Result<(), SftpError> {
        let handle = self.open(path, open::READ)?;
        let read = self.read_parts(&handle, offset, buffer, pace);
        self.close_after(&handle, read)
    }

    fn close_after<T>(
        &mut self,
        handle: &[u8],
        outcome: Result<T, SftpError>,
    ) -> Result<T, SftpError> {
        if matches!(outcome, Err(SftpError::Connection(_))) {
            return outcome;
        }
        self.call(&Request::Close { handle })?;
        outcome
    }

    fn read_parts(
        &mut self,
        handle: &[u8],
        offset: u64,
        buffer: &mut [u8],
        pace: &Pace,
    ) -> Result<(), SftpError> {
        let len = buffer.len();
        // Parts that are to be asked for: a server may answer with less than it was asked for.
        let mut todo: Vec<(usize, usize)> =
            (0..len).step_by(DATA_LEN).map(|at| (at, DATA_LEN.min(len - at))).rev().collect();
        let mut waiting: HashMap<u32, (usize, usize)> = HashMap::new();
        let mut failure = None;
        loop {
            while failure.is_none() && waiting.len() < WINDOW {
                let Some((at, part)) = todo.pop() else { break };
                let request =
                    Request::Read { handle, offset: offset + at as u64, len: part as u32 };
                waiting.insert(self.send(&request)?, (at, part));
            }
            if waiting.is_empty() {
                return failure.map_or(Ok(()), Err);
            }
            let (id, answer) = self.answer()?;
            let (at, part) = waiting.remove(&id).ok_or(wire::Malformed)?;
            match answer {
                Answer::Data(data) if !data.is_empty() && data.len() <= part => {
                    buffer[at..at + data.len()].copy_from_slice(&data);
                    pace.after_receiving(data.len());
                    if data.len() < part {
                        todo.push((at + data.len(), part - data.len()));
                    }
                }
                Answer::Status(status::EOF) => failure = Some(SftpError::Truncated),
                Answer::Status(status) if status != status::OK => {
                    failure = Some(SftpError::Status(status));
                }
                _ => return Err(wire::Malformed.into()),
            }
        }
    }

    /// What is in folders, those that are not there left out.
    pub(super) fn list(&mut self, folders: &[String]) -> Result<Vec<(usize, Entry)>, SftpError> {
        let mut found = Vec::new();
        for (batch, folders) in folders.chunks(FOLDERS_AT_ONCE).enumerate() {
            let first = batch * FOLDERS_AT_ONCE;
            self.list_at_once(first, folders, &mut found)?;
        }
        Ok(found)
    }

    fn list_at_once(
        &mut self,
        first: usize,
        folders: &[String],
        found: &mut Vec<(usize, Entry)>,
    ) -> Result<(), SftpError> {
        let mut asked = HashMap::new();
        for (number, path) in folders.iter().enumerate() {
            asked.insert(self.send(&Request::OpenFolder { path })?, first + number);
        }
        let (mut handles, mut failure) = (Vec::new(), None);
        while !asked.is_empty() {
            let (id, answer) = self.answer()?;
            let number = asked.remove(&id).ok_or(wire::Malformed)?;
            match answer {
                Answer::Handle(handle) => handles.push((number, handle)),
                Answer::Status(status::NO_SUCH_FILE) => {}
                other => failure = Some(unexpected(&other)),
            }
        }
        let mut unfinished: Vec<usize> = (0..handles.len()).collect();
        while !unfinished.is_empty() && failure.is_none() {
            let mut asked = HashMap::new();
            for which in unfinished.drain(..) {
                let request = Request::ReadFolder { handle: &handles[which].1 };
                asked.insert(self.send(&request)?, which);
            }
            while !asked.is_empty() {
                let (id, answer) = self.answer()?;
                let which = asked.remove(&id).ok_or(wire::Malformed)?;
                match answer {
                    Answer::Names(names) if !names.is_empty() => {
                        found.extend(names.into_iter().map(|entry| (handles[which].0, entry)));
                        unfinished.push(which);
                    }
                    Answer::Status(status::EOF) | Answer::Names(_) => {}
                    other => failure = Some(unexpected(&other)),
                }
            }
            if found.len() > NAMES_MAX {
                return Err(wire::Malformed.into());
            }
        }
        let mut asked = HashMap::new();
        for (_, handle) in &handles {
            asked.insert(self.send(&Request::Close { handle })?, ());
        }
        while !asked.is_empty() {
            // Whether closing a folder that was read worked is of no interest.
            let _ = self.take_done(&mut asked)?;
        }
        failure.map_or(Ok(()), Err)
    }

    fn open(&mut self, path: &str, how: u32) -> Result<Vec<u8>, SftpError> {
        match self.ask(&Request::Open { path, how })? {
            Answer::Handle(handle) => Ok(handle),
            other => Err(unexpected(&other)),
        }
    }

    fn ask(&mut self, request: &Request<'_>) -> Result<Answer, SftpError> {
        let asked = self.send(request)?;
        let (id, answer) = self.answer()?;
        if id == asked { Ok(answer) } else { Err(wire::Malformed.into()) }
    }

    fn send(&mut self, request: &Request<'_>) -> Result<u32, SftpError> {
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        let mut packet = Vec::new();
        wire::write(&mut packet, id, request);
        self.stream.write_all(&packet)?;
        Ok(id)
    }

    fn answer(&mut self) -> Result<(u32, Answer), SftpError> {
        if Instant::now() > self.deadline {
            return Err(silent().into());
        }
        let packet = self.packet()?;
        Ok(wire::read(&packet)?)
    }

    fn packet(&mut self) -> Result<Vec<u8>, SftpError> {
        let mut len = [0; 4];
        self.stream.read_exact(&mut len)?;
        let len = u32::from_be_bytes(len) as usize;
        if len > wire::PACKET_LEN_MAX {
            return Err(wire::Malformed.into());
        }
        let mut packet = vec![0; len];
        self.stream.read_exact(&mut packet)?;
        Ok(packet)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // It holds nothing that it would have to put in order.
        let _ = self.ssh.kill();
        let _ = self.ssh.wait();
    }
}

fn done(answer: Answer) -> Result<(), SftpError> {
    match answer {
        Answer::Status(status::OK) => Ok(()),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(answer: &Answer) -> SftpError {
    match answer {
        Answer::Status(status) if *status != status::OK => SftpError::Status(*status),
        _ => wire::Malformed.into(),
    }
}

/// With what `ssh` said before it ended, which tells more than that it did.
fn explained(error: io::Error, last_words: UnixStream) -> io::Error {
    let mut text = Vec::new();
    // Another process may hold the other end, so its closing is not waited for.
    let _ = last_words.set_read_timeout(Some(LAST_WORDS_TIMEOUT));
    let _ = last_words.take(LAST_WORDS_LEN_MAX).read_to_end(&mut text);
    let text = String::from_utf8_lossy(&text);
    let Some(line) = text.lines().map(str::trim).rfind(|line| !line.is_empty()) else {
        return error;
    };
    let line: String = line.chars().filter(|c| !c.is_control()).take(300).collect();
    let refused = ["Permission denied", "Host key verification failed", "Too many authentication"];
    let kind = match refused.iter().any(|words| text.contains(words)) {
        // Asking again would change nothing, or lock us out.
        true => ErrorKind::PermissionDenied,
        false if error.kind() == ErrorKind::TimedOut => ErrorKind::TimedOut,
        false => ErrorKind::ConnectionRefused,
    };
    io::Error::new(kind, format!("ssh says: {line}"))
}
