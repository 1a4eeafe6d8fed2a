//! `kvmsnap completions` and `kvmsnap man`: made from the same definitions as `--help`.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Cli;
use crate::config::example::man_page;
use crate::error::CommandError;

/// Print a completion script
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap completions bash > /usr/share/bash-completion/completions/kvmsnap
  kvmsnap completions zsh > /usr/share/zsh/site-functions/_kvmsnap")]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Write the man pages into a folder
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvmsnap man /usr/share/man/man1")]
pub struct ManArgs {
    /// The folder, which must exist
    folder: PathBuf,
}

/// Prints the completion script.
///
/// # Errors
/// When nobody reads it.
pub fn completions(args: &CompletionsArgs) -> Result<(), CommandError> {
    // It panics where it cannot write; memory always can.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "kvmsnap", &mut script);
    Ok(std::io::stdout().write_all(&script)?)
}

/// Writes one page for the program, one for each command and one for the configuration.
///
/// # Errors
/// When a page cannot be written.
pub fn man(args: &ManArgs) -> Result<(), CommandError> {
    clap_mangen::generate_to(Cli::command(), &args.folder)?;
    Ok(fs::write(args.folder.join("kvmsnap.toml.5"), man_page())?)
}
