//! Where a store is: what a person writes, taken apart without asking anybody.

use std::{fmt, path::PathBuf, str::FromStr};

use url::Url;

/// The schemes that [`Address`] knows, for a person who mistyped one.
const SCHEMES: &str = "sftp:, s3:, rest:";

/// Where a repository is. Displays as restic writes it, without secrets.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Address {
    /// A folder of a mounted file system.
    Folder(PathBuf),
    /// A folder of another machine, reached through `ssh`.
    Sftp(SftpAddress),
    /// A part of a bucket of an S3 server.
    S3(S3Address),
    /// A repository of a REST server; ends in `/`.
    Rest(Url),
}

/// A folder of another machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SftpAddress {
    /// Who to be there; `ssh` decides where none is given.
    pub user: Option<String>,
    /// The machine, or what the user's configuration of `ssh` calls it.
    pub host: String,
    /// The port; `ssh` decides where none is given.
    pub port: Option<u16>,
    /// The folder; without a leading `/` one in the home folder there.
    pub path: String,
}

/// A part of a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Address {
    /// The server, without a path.
    pub endpoint: Url,
    /// The bucket.
    pub bucket: String,
    /// What the keys of all objects begin with, without `/` at either end; may be empty.
    pub prefix: String,
}

/// Why a text is no [`Address`]. Holds no password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    /// Begins like an address of a kind that is not known.
    #[error("`{scheme}:` is no kind of location; there are a folder, {SCHEMES}")]
    UnknownScheme {
        /// What it begins with.
        scheme: String,
    },
    /// Locations are shown in lists of processes, logs and errors.
    #[error("a location must not hold a password")]
    Password,
    /// A part is missing or makes no sense.
    #[error("`{location}` is no location: {problem}")]
    Malformed {
        /// As it was given, without anything that may be a password.
        location: String,
        /// What is wrong.
        problem: &'static str,
    },
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let malformed =
            |problem| AddressError::Malformed { location: without_password(text), problem };
        let Some((scheme, rest)) = scheme_of(text) else {
            return match text.is_empty() {
                true => Err(malformed("it is empty")),
                false => Ok(Self::Folder(PathBuf::from(text))),
            };
        };
        match scheme.to_ascii_lowercase().as_str() {
            "local" => Ok(Self::Folder(PathBuf::from(rest))),
            "sftp" => sftp(rest).map(Self::Sftp),
            "rest" => rest_server(rest).map(Self::Rest),
            "s3" => match rest.strip_prefix("//") {
                Some(rest) => s3(&format!("https://{rest}")),
                None if rest.starts_with("http://") || rest.starts_with("https://") => s3(rest),
                None => s3(&format!("https://{rest}")),
            }
            .map(Self::S3),
            "s3+http" | "s3+https" => s3(&format!("{}:{rest}", &scheme[3..])).map(Self::S3),
            _ => return Err(AddressError::UnknownScheme { scheme: scheme.to_owned() }),
        }
        .map_err(|problem| match problem {
            Problem::Password => AddressError::Password,
            Problem::Malformed(problem) => malformed(problem),
        })
    }
}

enum Problem {
    Password,
    Malformed(&'static str),
}

impl From<&'static str> for Problem {
    fn from(problem: &'static str) -> Self {
        Self::Malformed(problem)
    }
}

/// What stands before the first colon, unless that is in a path: `./a:b` is a folder.
fn scheme_of(text: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = text.split_once(':')?;
    let letters = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
    let is_scheme =
        scheme.starts_with(|c: char| c.is_ascii_alphabetic()) && scheme.chars().all(letters);
    is_scheme.then_some((scheme, rest))
}

/// `//[user@]host[:port]/folder`, or `[user@]host:folder` as `scp` has it.
fn sftp(rest: &str) -> Result<SftpAddress, Problem> {
    let (authority, path, port) = match rest.strip_prefix("//") {
        Some(rest) => {
            let (authority, path) = rest.split_once('/').ok_or("the folder is missing")?;
            let (authority, port) = split_port(authority)?;
            (authority, format!("/{}", path.trim_start_matches('/')), port)
        }
        None => {
            // The colon after the host, not one in the brackets of an IPv6 address.
            let host_end = rest.find(']').unwrap_or(0);
            let colon = rest[host_end..].find(':').ok_or("the folder is missing")? + host_end;
            // A password may hold any character, so what follows tells.
            if rest[colon..].contains('@') && !rest[..colon].contains('@') {
                return Err(Problem::Password);
            }
            (&rest[..colon], rest[colon + 1..].to_owned(), None)
        }
    };
    let (user, host) = match authority.rsplit_once('@') {
        Some((user, _)) if user.contains(':') => return Err(Problem::Password),
        Some((user, host)) => (Some(user.to_owned()), host),
        None => (None, authority),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let is_option = |text: &str| text.is_empty() || text.starts_with('-');
    if is_option(host) || user.as_deref().is_some_and(is_option) {
        return Err("the host is missing".into());
    }
    if path.is_empty() || path.bytes().any(|byte| byte == 0) {
        return Err("the folder is missing".into());
    }
    let path = match path.trim_end_matches('/') {
        "" => "/".to_owned(),
        path => path.to_owned(),
    };
    Ok(SftpAddress { user, host: host.to_owned(), port, path })
}

fn split_port(authority: &str) -> Result<(&str, Option<u16>), Problem> {
    // A colon before the `@` is that of a password, one in brackets that of an IPv6 address.
    let host_start = authority.rfind('@').map_or(0, |at| at + 1);
    let host_start = authority.rfind(']').map_or(host_start, |bracket| bracket.max(host_start));
    match authority[host_start..].rfind(':') {
        None => Ok((authority, None)),
        Some(colon) => {
            let (host, port) = authority.split_at(host_start + colon);
            let port = port[1..].parse().map_err(|_| "the port is no number")?;
            Ok((host, Some(port)))
        }
    }
}

fn rest_server(rest: &str) -> Result<Url, Problem> {
    if !rest.starts_with("http://") && !rest.starts_with("https://") {
        return Err("`rest:` is followed by http:// or https://".into());
    }
    let mut url = web(rest)?;
    if !url.path().ends_with('/') {
        let path = format!("{}/", url.path());
        url.set_path(&path);
    }
    Ok(url)
}

fn s3(url: &str) -> Result<S3Address, Problem> {
    // A parser of addresses would resolve them.
    if url.contains('%') || url.split('/').any(|part| part == "." || part == "..") {
        return Err("`%` and dots alone do not belong into it".into());
    }
    let mut endpoint = web(url)?;
    if !endpoint.username().is_empty() {
        return Err("a key's name does not belong into it".into());
    }
    let path = endpoint.path().trim_matches('/').to_owned();
    endpoint.set_path("");
    let (bucket, prefix) = path.split_once('/').unwrap_or((&path, ""));
    if bucket.is_empty() {
        return Err("the bucket is missing".into());
    }
    // Signing and restic would each have their own idea of such keys.
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    let odd = path.split('/').any(str::is_empty);
    if !path.chars().all(plain) || odd {
        return Err("bucket and prefix take letters, digits and `-_./`".into());
    }
    Ok(S3Address { endpoint, bucket: bucket.to_owned(), prefix: prefix.to_owned() })
}

fn web(url: &str) -> Result<Url, Problem> {
    // Hosts of other scripts are written in ASCII (`xn--…`): we carry no tables for them.
    let (_, rest) = url.split_once(':').unwrap_or_default();
    let authority = rest.trim_start_matches(['/', '\\']).split(['/', '\\', '?', '#']).next();
    let host = authority.and_then(|authority| authority.rsplit('@').next()).unwrap_or_default();
    if !host.is_ascii() || host.contains('%') {
        return Err("the host is missing or makes no sense".into());
    }
    let url = Url::parse(url).map_err(|_| "the host is missing or makes no sense")?;
    if url.password().is_some() {
        return Err(Problem::Password);
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err("`?` and `#` do not belong into it".into());
    }
    Ok(url)
}

/// What stands between the last colon before an `@`, and that `@`, may be a password.
fn without_password(text: &str) -> String {
    let Some(at) = text.rfind('@') else { return text.to_owned() };
    let start = text.find("//").map_or_else(|| text.find(':'), |slashes| Some(slashes + 1));
    let start = start.map_or(0, |start| start + 1);
    match text.get(start..at).and_then(|part| part.find(':')) {
        Some(colon) => format!("{}:***{}", &text[..start + colon], &text[at..]),
        None => text.to_owned(),
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => path.display().fmt(f),
            Self::Sftp(address) => address.fmt(f),
            Self::S3(address) => address.fmt(f),
            Self::Rest(url) => write!(f, "rest:{url}"),
        }
    }
}

impl fmt::Display for SftpAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { user, host, port, path } = self;
        let user = user.as_ref().map(|user| format!("{user}@")).unwrap_or_default();
        let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
        match port {
            // Two slashes: with one, restic looks in the home folder.
            Some(port) => write!(f, "sftp://{user}{host}:{port}/{path}"),
            None => write!(f, "sftp:{user}{host}:{path}"),
        }
    }
}

impl fmt::Display for S3Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { endpoint, bucket, prefix } = self;
        write!(f, "s3:{endpoint}{bucket}")?;
        if prefix.is_empty() { Ok(()) } else { write!(f, "/{prefix}") }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shown(text: &str) -> String {
        text.parse::<Address>().unwrap().to_string()
    }

    #[test]
    fn p7_locations_are_written_as_restic_understands_them() {
        for (text, restic) in [
            ("/srv/backup", "/srv/backup"),
            ("backup", "backup"),
            ("./odd:name", "./odd:name"),
            ("local:/srv/backup", "/srv/backup"),
            ("sftp:me@host:/srv/backup", "sftp:me@host:/srv/backup"),
            ("sftp:host:backup/", "sftp:host:backup"),
            ("sftp://me@host/srv/backup", "sftp:me@host:/srv/backup"),
            ("sftp://me@host:2222/srv/backup", "sftp://me@host:2222//srv/backup"),
            ("sftp://me@host:2222//srv/backup", "sftp://me@host:2222//srv/backup"),
            ("sftp://[::1]:22/srv", "sftp://[::1]:22//srv"),
            ("sftp:[::1]:/srv", "sftp:[::1]:/srv"),
            ("s3://host/bucket", "s3:https://host/bucket"),
            ("s3://host:9000/bucket/a/b/", "s3:https://host:9000/bucket/a/b"),
            ("s3+http://host/bucket/a", "s3:http://host/bucket/a"),
            ("s3:http://127.0.0.1:9000/bucket/a", "s3:http://127.0.0.1:9000/bucket/a"),
            ("s3:s3.amazonaws.com/bucket", "s3:https://s3.amazonaws.com/bucket"),
            ("rest:http://host:8000", "rest:http://host:8000/"),
            ("rest:https://me@host/a/b", "rest:https://me@host/a/b/"),
        ] {
            assert_eq!(shown(text), restic, "{text}");
            assert_eq!(shown(&shown(text)), restic, "{text} once more");
        }
    }

    #[test]
    fn a_mistyped_location_is_told_apart_from_a_folder() {
        for text in ["sfpt://host/srv", "http://host/", "S4:host/bucket", "https:host"] {
            let refused = text.parse::<Address>();
            assert!(matches!(refused, Err(AddressError::UnknownScheme { .. })), "{refused:?}");
        }
        for text in [
            "",
            "sftp:host",
            "sftp://host",
            "sftp:-oProxyCommand=x:/srv",
            "sftp://-x@host/srv",
            "sftp://host:port/srv",
            "sftp:host:",
            "s3:host",
            "s3://host/",
            "s3://host/a?b",
            "s3://host/a/../b",
            "s3://host/a//b",
            "s3://host/%2e",
            "rest:host/a",
            "rest:http://",
        ] {
            let refused = text.parse::<Address>();
            assert!(matches!(refused, Err(AddressError::Malformed { .. })), "{text}: {refused:?}");
        }
    }

    #[test]
    fn s09_a_password_in_a_location_is_refused_and_never_shown() {
        for text in [
            "rest:https://me:canary@host/",
            "s3:https://me:canary@host/bucket",
            "sftp://me:canary@host/srv",
            "sftp:me:canary@host:/srv",
            "sftp://me:canary@host:22/srv",
        ] {
            assert_eq!(text.parse::<Address>(), Err(AddressError::Password), "{text}");
        }
        for text in ["rest:ftp://me:canary@host/", "sftp://me:canary@host:x/srv"] {
            let refused = text.parse::<Address>().unwrap_err().to_string();
            assert!(!refused.contains("canary"), "{refused}");
        }
    }

    #[test]
    fn a_host_of_another_script_is_refused() {
        for text in ["s3:A\u{113c5}", "rest:https://A%C3%BC/", "rest:https:///Bü:80/a"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_an_address_or_an_error(
            text in "(sftp|s3|rest|local|x)?:?(//)?(\\PC|[@:/\\[\\]a]){0,20}",
        ) {
            let _ = text.parse::<Address>();
        }
    }
}
