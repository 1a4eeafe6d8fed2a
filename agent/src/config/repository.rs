//! `[repository.main]`: where backups go, and where the password comes from.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use repository::Address;
use serde::Deserialize;

use super::Size;
use crate::location::{Route, parse_server_timeout};

/// Longest password that is read, in bytes.
const PASSWORD_LEN_MAX: u64 = 64 << 10;
/// How long a password command may take: it may ask another host.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);
const COMMAND_POLL: Duration = Duration::from_millis(10);
/// Where systemd puts the credentials of a unit (systemd.exec(5)).
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";

/// A repository.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "Written")]
pub struct Repository {
    /// Where it is.
    pub location: String,
    /// How that is reached.
    pub route: Route,
    password: Option<Source>,
}

/// As it is written.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Written {
    location: String,
    password_file: Option<PathBuf>,
    password_command: Option<Vec<String>>,
    password_credential: Option<String>,
    region: Option<String>,
    access_key: Option<String>,
    secret_key_file: Option<PathBuf>,
    user: Option<String>,
    server_password_file: Option<PathBuf>,
    ca_file: Option<PathBuf>,
    ssh: Option<Vec<String>>,
    limit_upload: Option<Size>,
    limit_download: Option<Size>,
    server_timeout: Option<String>,
}

impl Written {
    fn route(&self) -> Result<Route, String> {
        let Self { region, access_key, secret_key_file, user, server_password_file, .. } = self;
        let server_timeout = self.server_timeout.as_deref().map(parse_server_timeout);
        Ok(Route {
            region: region.clone(),
            access_key: access_key.clone(),
            secret_key_file: secret_key_file.clone(),
            user: user.clone(),
            server_password_file: server_password_file.clone(),
            ca_file: self.ca_file.clone(),
            ssh: self.ssh.clone(),
            limit_upload: self.limit_upload.map(Size::bytes),
            limit_download: self.limit_download.map(Size::bytes),
            server_timeout: server_timeout
                .transpose()
                .map_err(|why| format!("server-timeout: {why}"))?,
        })
    }
}

#[derive(Debug, Clone)]
enum Source {
    File(PathBuf),
    Command(String, Vec<String>),
    Credential(String),
}

/// Why there is no password.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PasswordError {
    /// The file cannot be read.
    #[error("cannot read the password from {}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nothing is in it.
    #[error("the password file {} is empty", .path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The command that prints it cannot be run.
    #[error("cannot run `{program}` for the password")]
    Run {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// The command failed, or printed nothing.
    #[error("`{program}` printed no password ({how})")]
    NoAnswer {
        /// The program.
        program: String,
        /// How it ended.
        how: String,
    },
    /// The process was not given the credential.
    #[error("there is no credential `{name}`")]
    NoCredential {
        /// Its name.
        name: String,
    },
}

impl TryFrom<Written> for Repository {
    type Error = String;
    fn try_from(written: Written) -> Result<Self, String> {
        let route = written.route()?;
        let Written { location, password_file, password_command, password_credential, .. } =
            written;
        location.parse::<Address>().map_err(|error| error.to_string())?;
        if route.access_key.is_some() != route.secret_key_file.is_some() {
            return Err("access-key and secret-key-file belong together".to_owned());
        }
        let command = match password_command.as_deref() {
            Some([]) => return Err("password-command is empty".to_owned()),
            Some([program, arguments @ ..]) => {
                Some(Source::Command(program.clone(), arguments.to_vec()))
            }
            None => None,
        };
        let credential = match password_credential {
            Some(name) if name.is_empty() || name.contains('/') || name.starts_with('.') => {
                return Err(format!("`{name}` is no name of a credential"));
            }
            name => name.map(Source::Credential),
        };
        let mut sources =
            [password_file.map(Source::File), command, credential].into_iter().flatten();
        let password = sources.next();
        match sources.next() {
            Some(_) => {
                Err("give one of password-file, password-command and password-credential"
                    .to_owned())
            }
            None => Ok(Self { location, route, password }),
        }
    }
}

impl Repository {
    /// Where its password comes from, in words.
    pub fn password_source(&self) -> Option<String> {
        self.password.as_ref().map(|source| match source {
            Source::File(path) => format!("from {}", path.display()),
            Source::Command(program, _) => format!("from `{program}`"),
            Source::Credential(name) => format!("from systemd's credential {name}"),
        })
    }

    /// Its password; `None` where none is configured.
    ///
    /// # Errors
    /// [`PasswordError`].
    pub fn password(&self) -> Result<Option<Vec<u8>>, PasswordError> {
        self.password.as_ref().map(Source::read).transpose()
    }
}

impl Repository {
    /// Whether its password can be read, where that is in a file: what is a command's or systemd's is there when
    /// it is needed.
    ///
    /// # Errors
    /// [`PasswordError`].
    pub fn check_password_file(&self) -> Result<(), PasswordError> {
        match &self.password {
            Some(Source::File(path)) => read_file(path).map(drop),
            _ => Ok(()),
        }
    }
}

impl Source {
    fn read(&self) -> Result<Vec<u8>, PasswordError> {
        match self {
            Self::File(path) => read_file(path),
            Self::Command(program, arguments) => run(program, arguments),
            Self::Credential(name) => {
                let folder = std::env::var_os(CREDENTIALS);
                let folder =
                    folder.ok_or_else(|| PasswordError::NoCredential { name: name.clone() })?;
                read_file(&Path::new(&folder).join(name))
            }
        }
    }
}

/// Reads a password file. As restic reads it: white space around the password does not count.
///
/// # Errors
/// [`PasswordError`].
pub fn read_file(path: &Path) -> Result<Vec<u8>, PasswordError> {
    let failed = |source| PasswordError::File { path: path.to_owned(), source };
    let file = fs::File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.permissions().mode();
    let mut text = Vec::new();
    file.take(PASSWORD_LEN_MAX).read_to_end(&mut text).map_err(failed)?;
    // A pipe of a shell has the mode of its user's umask.
    if mode & 0o004 != 0 && path.is_file() {
        tracing::warn!("everybody on this host can read the password file {}", path.display());
    }
    match text.trim_ascii() {
        [] => Err(PasswordError::Empty { path: path.to_owned() }),
        password => Ok(password.to_vec()),
    }
}

/// What a command prints.
fn run(program: &str, arguments: &[String]) -> Result<Vec<u8>, PasswordError> {
    let failed = |source| PasswordError::Run { program: program.to_owned(), source };
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(failed)?;
    let pipe = child.stdout.take().expect("it was asked for");
    let reading = std::thread::spawn(move || {
        let mut text = Vec::new();
        pipe.take(PASSWORD_LEN_MAX).read_to_end(&mut text).map(|_| text)
    });
    let start = Instant::now();
    let status = loop {
        match child.try_wait().map_err(failed)? {
            Some(status) => break status,
            None if start.elapsed() < COMMAND_TIMEOUT => std::thread::sleep(COMMAND_POLL),
            None => {
                // It may have ended just now.
                let _ = child.kill();
                let _ = child.wait();
                let how = format!("not within {} s", COMMAND_TIMEOUT.as_secs());
                return Err(PasswordError::NoAnswer { program: program.to_owned(), how });
            }
        }
    };
    let no_answer = |how: String| PasswordError::NoAnswer { program: program.to_owned(), how };
    if !status.success() {
        return Err(no_answer(status.to_string()));
    }
    let text = reading.join().map_err(|_| no_answer("its output was lost".to_owned()))?;
    match text.map_err(failed)?.trim_ascii() {
        [] => Err(no_answer("nothing at all".to_owned())),
        password => Ok(password.to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository(more: &str) -> Result<Repository, String> {
        let text = format!("location = \"/srv\"\n{more}");
        toml::from_str(&text).map_err(|error| error.message().to_owned())
    }

    #[test]
    fn s09_a_password_comes_from_a_file_or_a_command() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("password");
        fs::write(&file, " secret\n").unwrap();
        let of_file = repository(&format!("password-file = {file:?}")).unwrap();
        assert_eq!(of_file.password().unwrap().as_deref(), Some(&b"secret"[..]));
        let of_command = repository("password-command = [\"echo\", \"secret\"]").unwrap();
        assert_eq!(of_command.password().unwrap().as_deref(), Some(&b"secret"[..]));
        assert_eq!(repository("").unwrap().password().unwrap(), None);
    }

    #[test]
    fn a_password_that_cannot_be_had_says_why() {
        let why = |more: &str| repository(more).unwrap().password().unwrap_err();
        assert!(matches!(why("password-command = [\"false\"]"), PasswordError::NoAnswer { .. }));
        assert!(matches!(why("password-command = [\"true\"]"), PasswordError::NoAnswer { .. }));
        assert!(matches!(why("password-command = [\"/no/such\"]"), PasswordError::Run { .. }));
        assert!(matches!(why("password-file = \"/no/such\""), PasswordError::File { .. }));
        assert!(matches!(why("password-file = \"/dev/null\""), PasswordError::Empty { .. }));
    }

    #[test]
    fn a_location_is_checked_before_it_is_needed() {
        let written = |text: &str| toml::from_str::<Repository>(text).map_err(|e| e.to_string());
        let refused = written("location = \"sfpt://host/srv\"").unwrap_err();
        assert!(refused.contains("`sfpt:` is no kind of location"), "{refused}");
        let refused = written("location = \"rest:https://me:canary@host/\"").unwrap_err();
        assert!(refused.contains("must not hold a password"), "{refused}");
        let limited = written("location = \"s3://host/b\"\nlimit-upload = \"2MiB\"").unwrap();
        assert_eq!(limited.route.limit_upload, Some(2 << 20));
        for (text, expected) in [("45s", Ok(Some(Duration::from_secs(45)))), ("1s", Err(()))] {
            let written = written(&format!("location = \"/srv\"\nserver-timeout = {text:?}"));
            let timeout = written.map(|it| it.route.server_timeout);
            assert_eq!(timeout.map_err(drop), expected, "{text}");
        }
        assert!(written("location = \"s3://host/b\"\naccess-key = \"a\"").is_err());
    }

    #[test]
    fn one_source_of_the_password_is_enough() {
        let two = "password-file = \"/a\"\npassword-credential = \"a\"";
        assert!(repository(two).unwrap_err().contains("give one of"));
        for bad in ["password-command = []", "password-credential = \"../a\""] {
            assert!(repository(bad).is_err(), "{bad}");
        }
    }
}
