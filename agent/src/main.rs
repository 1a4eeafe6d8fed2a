//! The program `kvmsnap`: what to back up, when, how, and what the user sees.
#![expect(
    unreachable_pub,
    reason = "a program has no outside: `pub` says what sibling modules use"
)]

mod backup;
mod bound;
mod capture;
mod catalog;
mod cli;
mod config;
mod durable;
mod effect;
mod error;
mod guard;
mod hypervisor;
mod image;
mod inherit;
mod journal;
mod last_known;
mod location;
mod lock;
mod manifest;
mod method;
mod metrics;
mod names;
mod notify;
mod overlay;
mod plan;
mod progress;
mod quiesce;
mod read;
mod recover;
mod replicate;
mod restore;
mod retention;
mod run;
mod schedule;
mod share;
mod stop;
mod store;
mod syslog;
mod units;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Open files that a backup needs at least, for all it does at once.
const FILES_MIN: u64 = 64;
/// Bytes of address space that it needs at least; most of them are never touched.
const ADDRESS_SPACE_MIN: u64 = 512 << 20;
/// Bytes of memory that it needs at least: a process that runs out of them in the middle of a run may
/// not even be able to say so.
const DATA_MIN: u64 = 256 << 20;
/// Ctrl-C ends the program within a second.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    start_log(cli.log_filter());
    if let Err(error) = check_limits() {
        return fail(&error);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.into()),
    };
    let outcome = runtime.block_on(async {
        // Writing past a file size limit becomes an error instead of the end of the process.
        let _past_limit = signal(SignalKind::from_raw(nix::libc::SIGXFSZ));
        cli.run().await
    });
    // Threads that still read or store have nothing left to do but to let go of their locks.
    runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
    match outcome {
        Ok(()) => ExitCode::from(error::DONE),
        Err(error) if error.is_closed_pipe() => ExitCode::from(error::DONE),
        Err(error) => fail(&error),
    }
}

/// Allows as many open files as this process may have, and refuses limits below which not even the
/// runtime starts. A process that runs out of memory later ends, and the next run mends what it left.
fn check_limits() -> Result<(), error::CommandError> {
    // A system that does not tell has no limit.
    if let Ok((limit, limit_max)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // What cannot be raised may do all the same.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, limit.max(limit_max), limit_max);
        if limit_max < FILES_MIN {
            let (limit, needed) = (limit_max, FILES_MIN);
            return Err(error::CommandError::TooFewFiles { limit, needed });
        }
    }
    let memory = [(Resource::RLIMIT_AS, ADDRESS_SPACE_MIN), (Resource::RLIMIT_DATA, DATA_MIN)];
    for (resource, needed) in memory {
        match getrlimit(resource) {
            Ok((limit, _)) if limit < needed => {
                return Err(error::CommandError::TooLittleMemory { limit, needed });
            }
            _ => {}
        }
    }
    Ok(())
}

fn fail(error: &error::CommandError) -> ExitCode {
    // With standard error gone there is nobody to tell; the exit code still says it.
    let _ = std::io::stderr().write_all(error::describe(error).as_bytes());
    ExitCode::from(error.code())
}

fn start_log(filter: &str) {
    let filter = EnvFilter::try_from_env("KVMSNAP_LOG").unwrap_or_else(|_| EnvFilter::new(filter));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .with_target(false)
        .init();
}
