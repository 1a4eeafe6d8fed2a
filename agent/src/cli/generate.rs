//! `kvmsnap completions` and `kvmsnap man`: made from the same definitions as `--help`.

use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Cli;
use crate::error::CommandError;

/// Print a completion script
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Write the man pages into a folder
#[derive(Debug, Args)]
pub struct ManArgs {
    /// The folder, which must exist
    folder: PathBuf,
}

/// Prints the completion script.
///
/// # Errors
/// None so far.
pub fn completions(args: &CompletionsArgs) -> Result<(), CommandError> {
    clap_complete::generate(args.shell, &mut Cli::command(), "kvmsnap", &mut std::io::stdout());
    Ok(())
}

/// Writes one page for the program and one for each command.
///
/// # Errors
/// When a page cannot be written.
pub fn man(args: &ManArgs) -> Result<(), CommandError> {
    Ok(clap_mangen::generate_to(Cli::command(), &args.folder)?)
}
