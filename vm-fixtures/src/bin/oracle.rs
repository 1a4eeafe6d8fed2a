//! The oracle as a program, on the host and inside the guest.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use vm_fixtures::oracle::{FileTarget, Load, Log, Region, Target, judge};
use vm_fixtures::{PacedLoad, check_files, write_files};

const USAGE: &str = "\
usage: oracle write --disk N=PATH[:FROM:TO]… --log FILE|- [--stream N] [--seed N] [--first-seq N]
                    [--count N] [--seconds N] [--rate N] [--depth N] [--blocks-max N] [--mix]
       oracle judge --disk N=IMAGE… --log FILE
       oracle sync PATH…
       oracle files write DIR FROM TO [--slow-ms N]
       oracle files check DIR
       oracle latency DEVICE RATE UNTIL
FROM and TO of a disk are bytes; those of files are numbers. An image is raw.
`latency` writes over DEVICE until the file UNTIL appears, RATE operations a second.";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match args.split_first() {
        Some((&"write", rest)) => write(rest),
        Some((&"judge", rest)) => judge_images(rest),
        Some((&"sync", paths)) => sync(paths),
        Some((&"files", rest)) => files(rest),
        Some((&"latency", rest)) => latency(rest),
        _ => Err(usage("no such command")),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            // Nobody is left to tell when standard error is closed.
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::from(2)
        }
    }
}

fn usage(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{what}\n{USAGE}"))
}

fn number(text: &str) -> io::Result<u64> {
    text.parse().map_err(|_| usage(&format!("`{text}` is no number")))
}

fn small_number(text: &str) -> io::Result<u32> {
    text.parse().map_err(|_| usage(&format!("`{text}` is no small number")))
}

/// A disk's number, its path, and the range that belongs to the oracle.
type NamedDisk<'a> = (u64, &'a str, Option<(u64, u64)>);

/// `N=PATH` or `N=PATH:FROM:TO`.
fn disk(text: &str) -> io::Result<NamedDisk<'_>> {
    let (index, place) = text.split_once('=').ok_or_else(|| usage("a disk is N=PATH"))?;
    let mut parts = place.split(':');
    let path = parts.next().unwrap_or_default();
    let range = match (parts.next(), parts.next(), parts.next()) {
        (None, None, None) => None,
        (Some(from), Some(to), None) => Some((number(from)?, number(to)?)),
        _ => return Err(usage("a disk's range is FROM:TO")),
    };
    Ok((number(index)?, path, range))
}

fn write(args: &[&str]) -> io::Result<ExitCode> {
    let mut load = Load::default();
    let mut disks = Vec::new();
    let mut log = None;
    let mut args = args.iter().copied();
    while let Some(option) = args.next() {
        let mut value = || args.next().ok_or_else(|| usage(&format!("`{option}` needs a value")));
        match option {
            "--disk" => disks.push(disk(value()?)?),
            "--log" => log = Some(value()?),
            "--stream" => load.stream = number(value()?)?,
            "--seed" => load.seed = number(value()?)?,
            "--first-seq" => load.first_seq = number(value()?)?,
            "--count" => load.count = Some(number(value()?)?),
            "--seconds" => load.duration = Some(Duration::from_secs(number(value()?)?)),
            "--rate" => load.rate = Some(small_number(value()?)?.max(1)),
            "--depth" => load.depth = small_number(value()?)?,
            "--blocks-max" => load.blocks_max = number(value()?)?,
            "--mix" => load.mix = true,
            _ => return Err(usage(&format!("no such option `{option}`"))),
        }
    }
    let mut targets = Vec::new();
    let mut regions = Vec::new();
    for (at, (index, path, range)) in (0..).zip(disks) {
        if index != at {
            return Err(usage("disks are numbered 0, 1, …"));
        }
        let target = FileTarget::open(Path::new(path))?;
        let (from, to) = range.unwrap_or((0, target.len));
        if from % 4096 != 0 || to % 4096 != 0 || from >= to || to > target.len {
            return Err(usage(&format!("{path} has no whole blocks from {from} to {to}")));
        }
        regions.push(Region { disk: index, from, to });
        targets.push(target);
    }
    if targets.is_empty() {
        return Err(usage("no disk was named"));
    }
    let targets: Vec<&dyn Target> = targets.iter().map(|target| target as _).collect();
    match log.ok_or_else(|| usage("no log was named"))? {
        "-" => load.run(&regions, &targets, &mut io::stdout())?,
        path => {
            let mut log = OpenOptions::new().create(true).append(true).open(path)?;
            load.run(&regions, &targets, &mut log)?
        }
    };
    Ok(ExitCode::SUCCESS)
}

fn judge_images(args: &[&str]) -> io::Result<ExitCode> {
    let mut images = Vec::new();
    let mut log = None;
    for pair in args.chunks(2) {
        match pair {
            ["--disk", value] => images.push(disk(value)?),
            ["--log", value] => log = Some(Log::read(Path::new(value))?),
            _ => return Err(usage("judge takes disks and a log")),
        }
    }
    let images: Vec<_> = images.iter().map(|(index, path, _)| (*index, Path::new(*path))).collect();
    let verdict = judge(&images, &log.ok_or_else(|| usage("no log was named"))?)?;
    writeln!(io::stdout(), "{verdict}")?;
    Ok(if verdict.is_consistent() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn sync(paths: &[&str]) -> io::Result<ExitCode> {
    for path in paths {
        FileTarget::open(Path::new(path))?.sync()?;
    }
    Ok(ExitCode::SUCCESS)
}

fn latency(args: &[&str]) -> io::Result<ExitCode> {
    let [device, rate, until] = args else { return Err(usage("a load has three arguments")) };
    let (device, until) = (PathBuf::from(device), PathBuf::from(until));
    PacedLoad { device, rate: small_number(rate)?, until }.run(&mut io::stdout())?;
    Ok(ExitCode::SUCCESS)
}

fn files(args: &[&str]) -> io::Result<ExitCode> {
    match args {
        ["write", folder, from, to] => {
            write_files(Path::new(folder), small_number(from)?..small_number(to)?, Duration::ZERO)?;
            Ok(ExitCode::SUCCESS)
        }
        ["write", folder, from, to, "--slow-ms", pause] => {
            let pause = Duration::from_millis(number(pause)?);
            write_files(Path::new(folder), small_number(from)?..small_number(to)?, pause)?;
            Ok(ExitCode::SUCCESS)
        }
        ["check", folder] => {
            let report = check_files(Path::new(folder))?;
            writeln!(io::stdout(), "{report}")?;
            Ok(if report.damaged.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        _ => Err(usage("files are written or checked")),
    }
}
