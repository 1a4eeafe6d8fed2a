//! What the tests of `kvmsnap image` share: stores, and a `qemu-img` that is watched or hangs.

pub mod small_machine;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::Host;
use crate::overlays::{convert, files_in};

/// A folder with a `qemu-img` of its own, to be put before the system's.
#[derive(Debug)]
pub struct Tools {
    folder: PathBuf,
}

impl Tools {
    /// One that notes its arguments and then does what it should.
    pub fn watched(host: &Host) -> Self {
        Self::new(host, "exec \"$real\" \"$@\"")
    }

    /// One that never ends when it is asked for a copy.
    pub fn hanging(host: &Host) -> Self {
        Self::new(host, "[ \"$1\" != convert ] || exec sleep 1000\nexec \"$real\" \"$@\"")
    }

    /// One that copies only once it is let.
    pub fn waiting(host: &Host) -> Self {
        let wait = "[ \"$1\" != convert ] || until [ -e \"$0.go\" ]; do sleep 0.05; done";
        Self::new(host, &format!("{wait}\nexec \"$real\" \"$@\""))
    }

    /// Lets it.
    pub fn go(&self) {
        fs::write(self.folder.join("qemu-img.go"), "").expect("the folder is writable");
    }

    /// Whether it was asked for a copy.
    pub fn was_asked(&self) -> bool {
        self.calls().iter().any(|call| call.starts_with("convert"))
    }

    /// One that lies: it says that it copied, and has not.
    pub fn lying(host: &Host) -> Self {
        let lie = "if [ \"$1\" = convert ]; then shift $(($# - 1)); exec \"$real\" create -q -f qcow2 \
                   \"$1\" 1M; fi\nexec \"$real\" \"$@\"";
        Self::new(host, lie)
    }

    fn new(host: &Host, script: &str) -> Self {
        let folder = host.new_folder();
        let path = std::env::var("PATH").expect("there is a path");
        // It may write no files: links are none.
        let script = format!(
            "#!/bin/sh\nPATH='{path}'\nreal=$(command -v qemu-img)\n\
             ln -s \"$*\" '{0}/call-'$$\nln -sfn $$ '{0}/pid'\n{script}\n",
            folder.display()
        );
        let tool = folder.join("qemu-img");
        fs::write(&tool, script).expect("the folder is writable");
        fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).expect("it is ours");
        Self { folder }
    }

    /// Has a command use it.
    pub fn used_by(&self, mut command: Command) -> Command {
        let path = std::env::var("PATH").expect("there is a path");
        command.env("PATH", format!("{}:{path}", self.folder.display()));
        command
    }

    /// What it was asked for, call by call.
    pub fn calls(&self) -> Vec<String> {
        let links = files_in(&self.folder, "call-").into_iter();
        let arguments = |link| fs::read_link(link).expect("a link").to_string_lossy().into_owned();
        links.map(arguments).collect()
    }

    /// The process that hangs.
    pub fn hangs(&self) -> Option<u32> {
        let pid = fs::read_link(self.folder.join("pid")).ok()?.to_str()?.parse().ok()?;
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        line.starts_with(b"sleep").then_some(pid)
    }
}

/// All names in a store, also hidden ones; none where it is not there.
pub fn names(store: &Path) -> Vec<String> {
    let entries = fs::read_dir(store).into_iter().flatten().flatten();
    let mut names: Vec<_> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// What a disk of an image holds, by QEMU's own tool.
///
/// # Panics
/// When that fails.
#[track_caller]
pub fn content(host: &Host, image: &Path, disk: &str) -> Vec<u8> {
    let raw = convert(&image.join(format!("{disk}.qcow2")), "qcow2", host.folder());
    fs::read(raw).expect("a copy")
}

/// The one JSON line that a command printed.
///
/// # Panics
/// When it is none.
#[track_caller]
pub fn line(stdout: &str) -> Value {
    serde_json::from_str(stdout).unwrap_or_else(|error| panic!("{error}: {stdout}"))
}
