//! Writes the whole Debian machines into a folder, to try things by hand:
//!
//! ```text
//! fixture-debian FOLDER
//! ```
//!
//! For each machine `FOLDER/NAME/disk.qcow2` and `FOLDER/NAME/tree`. On standard output: the environment in
//! which libguestfs works here, for `env`.

use std::fs;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use vm_fixtures::debian::{Debian, Machine, appliance_environment};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is left to tell when standard error is closed.
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, "something is missing");
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "usage: fixture-debian FOLDER"));
    };
    let debian = Debian::get().ok_or_else(missing)?;
    for machine in Machine::ALL {
        let to = folder.join(machine.hostname());
        fs::create_dir_all(&to)?;
        fs::copy(debian.disk(machine), to.join("disk.qcow2"))?;
        debian.copy_tree(machine, &to.join("tree"));
    }
    let mut out = io::stdout().lock();
    for (name, value) in appliance_environment().ok_or_else(missing)? {
        writeln!(out, "{name}={}", value.to_string_lossy())?;
    }
    Ok(())
}
