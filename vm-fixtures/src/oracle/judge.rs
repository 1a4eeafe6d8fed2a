//! Which instant do these images show, and what on them belongs to no instant at all?
//!
//! For every block and every content the log says at which positions that content is right. A position
//! that is right for all blocks of all disks is an instant the images may show. Where there is none,
//! the position that explains most blocks is taken, and the others are named as defects.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::block::{BLOCK_LEN, BlockId, Content, inspect};
use super::load::{Region, blocks_of};
use super::log::{Event, Kind, Log, Operation, acked, issued};
use crate::disk::Format;
use crate::tools::run;

const BLOCK: u64 = BLOCK_LEN as u64;
const READ_LEN: usize = 256 * BLOCK_LEN;
/// Defects of one kind that a failure prints.
const PRINTED_MAX: usize = 8;

/// A block that is not what it should be at the judged instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Defect {
    /// The disk's number.
    pub disk: u64,
    /// Where, in bytes.
    pub offset: u64,
    /// What is there.
    pub shown: Content,
}

/// What the images show.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verdict {
    /// All operations up to here had been done at the latest instant that fits best.
    pub acked: u64,
    /// No operation after this one had been issued at that instant.
    pub issued: u64,
    /// Blocks of which only a part was written.
    pub torn: Vec<Defect>,
    /// Blocks that hold what was there before the instant.
    pub stale: Vec<Defect>,
    /// Blocks that hold what came only after the instant.
    pub future: Vec<Defect>,
    /// Whole blocks that belong elsewhere, or were never written here.
    pub misplaced: Vec<Defect>,
    /// Zeros where the instant has data.
    pub lost: Vec<Defect>,
    /// What no load ever wrote.
    pub alien: Vec<Defect>,
    /// Positions in the log that explain every block, as runs.
    positions: Vec<RangeInclusive<usize>>,
    events: Vec<Event>,
}

impl Verdict {
    /// Whether there is an instant that explains every block of every disk.
    pub fn is_consistent(&self) -> bool {
        !self.positions.is_empty()
    }

    /// The latest instant, as the last operation that was done in it.
    ///
    /// # Panics
    ///
    /// When no instant explains the images.
    #[track_caller]
    pub fn instant(&self) -> u64 {
        assert!(self.is_consistent(), "{self}");
        self.acked
    }

    /// Asserts that the images show one instant after operation `acked` was done and before any after
    /// `issued` was: what [`Log::acked`] said before, and [`Log::issued`] after the point in time.
    ///
    /// # Panics
    ///
    /// When they show no instant, or another one.
    #[track_caller]
    pub fn assert_instant_between(&self, acked: u64, issued: u64) {
        assert!(self.is_consistent(), "{self}");
        let of_earlier = |event: &Event| matches!(event, Event::Done(seq) if *seq <= acked);
        let of_later = |event: &Event| matches!(event, Event::Issued(op) if op.seq > issued);
        let from = self.events.iter().rposition(of_earlier).map_or(0, |at| at + 1);
        let to = self.events.iter().position(of_later).unwrap_or(self.events.len());
        let fits = |run: &RangeInclusive<usize>| *run.start() <= to && *run.end() >= from;
        assert!(
            self.positions.iter().any(fits),
            "the instant is not between {acked} done and {issued} issued, the latest is {self}"
        );
    }

    fn list(&mut self, kind: Fault) -> &mut Vec<Defect> {
        match kind {
            Fault::Torn => &mut self.torn,
            Fault::Stale => &mut self.stale,
            Fault::Future => &mut self.future,
            Fault::Misplaced => &mut self.misplaced,
            Fault::Lost => &mut self.lost,
            Fault::Alien => &mut self.alien,
        }
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = if self.is_consistent() { "instant" } else { "no instant; nearest" };
        write!(f, "{kind}: {} done, {} issued", self.acked, self.issued)?;
        let lists = [
            ("torn", &self.torn),
            ("stale", &self.stale),
            ("future", &self.future),
            ("misplaced", &self.misplaced),
            ("lost", &self.lost),
            ("alien", &self.alien),
        ];
        for (name, defects) in lists.into_iter().filter(|(_, defects)| !defects.is_empty()) {
            write!(f, "\n{name}: {}", defects.len())?;
            for defect in defects.iter().take(PRINTED_MAX) {
                let Defect { disk, offset, shown } = defect;
                write!(f, "\n  disk {disk} at {offset}: {shown:?}")?;
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
enum Fault {
    Torn,
    Stale,
    Future,
    Misplaced,
    Lost,
    Alien,
}

/// One operation on one block, with the positions between which it took effect.
struct Step {
    seq: u64,
    kind: Kind,
    issued: usize,
    done: usize,
}

/// Judges raw images, each with its disk's number in the load, against one log.
///
/// Costs what the regions of the log hold, not what the images are long: holes are not read.
///
/// # Errors
///
/// When an image cannot be read.
pub fn judge(images: &[(u64, &Path)], log: &Log) -> io::Result<Verdict> {
    let mut contents = BTreeMap::new();
    for (disk, path) in images {
        for region in log.regions.iter().filter(|region| region.disk == *disk) {
            read_region(&File::open(path)?, *region, &mut contents)?;
        }
    }
    let mut histories: HashMap<(u64, u64), Vec<Step>> = histories(&log.events);
    histories.retain(|(disk, _), _| images.iter().any(|(judged, _)| judged == disk));
    for at in histories.keys() {
        contents.entry(*at).or_insert(Content::Zero);
    }

    let last = log.events.len();
    let mut hopeless = Vec::new();
    let mut right = Vec::new();
    let mut changes = vec![0_i64; last + 2];
    for (&(disk, offset), &shown) in &contents {
        let steps = histories.get(&(disk, offset)).map_or(&[][..], Vec::as_slice);
        let defect = Defect { disk, offset, shown };
        match right_at(defect, steps, log.stream, last) {
            Err(fault) => hopeless.push((fault, defect)),
            Ok(runs) => {
                for run in &runs {
                    changes[*run.start()] += 1;
                    changes[*run.end() + 1] -= 1;
                }
                right.push((defect, runs));
            }
        }
    }
    Ok(conclude(log, &changes, &right, &hopeless))
}

/// Judges one image of any format, which is first copied to a raw file beside it.
///
/// # Errors
///
/// When the copy cannot be read.
#[track_caller]
pub fn judge_image(image: &Path, format: Format, log: &Log) -> io::Result<Verdict> {
    let folder = tempfile::tempdir()?;
    let raw = folder.path().join("raw");
    let args = ["convert", "-f", format.driver(), "-O", "raw"].map(AsRef::as_ref);
    run("qemu-img", &[&args[..], &[image.as_os_str(), raw.as_os_str()]].concat());
    judge(&[(0, &raw)], log)
}

fn conclude(
    log: &Log,
    changes: &[i64],
    right: &[(Defect, Vec<RangeInclusive<usize>>)],
    hopeless: &[(Fault, Defect)],
) -> Verdict {
    let mut explained = 0;
    let mut best = (0, 0);
    let mut positions: Vec<RangeInclusive<usize>> = Vec::new();
    let all = i64::try_from(right.len()).expect("an image has fewer blocks");
    for (at, change) in changes.iter().enumerate().take(log.events.len() + 1) {
        explained += change;
        if explained >= best.0 {
            best = (explained, at);
        }
        if explained == all && hopeless.is_empty() {
            match positions.last_mut() {
                Some(run) if run.end() + 1 == at => *run = *run.start()..=at,
                _ => positions.push(at..=at),
            }
        }
    }
    let happened = &log.events[..best.1];
    let (acked, issued) = (acked(happened), issued(happened));
    let events = log.events.clone();
    let mut verdict = Verdict { acked, issued, positions, events, ..Verdict::default() };
    for (fault, defect) in hopeless {
        verdict.list(*fault).push(*defect);
    }
    for (defect, runs) in right {
        if runs.iter().any(|run| run.contains(&best.1)) {
            continue;
        }
        let fault = match defect.shown {
            Content::Zero => Fault::Lost,
            _ if runs.iter().all(|run| *run.start() > best.1) => Fault::Future,
            _ => Fault::Stale,
        };
        verdict.list(fault).push(*defect);
    }
    verdict
}

/// What happened to each block, in order.
fn histories(events: &[Event]) -> HashMap<(u64, u64), Vec<Step>> {
    let done: HashMap<u64, usize> = events
        .iter()
        .enumerate()
        .filter_map(|(at, event)| match event {
            Event::Done(seq) => Some((*seq, at + 1)),
            Event::Issued(_) => None,
        })
        .collect();
    let mut histories: HashMap<_, Vec<Step>> = HashMap::new();
    for (at, event) in events.iter().enumerate() {
        let Event::Issued(operation) = event else { continue };
        let Operation { seq, kind, disk, .. } = *operation;
        // What was in flight when the writer died may be there or not for ever after.
        let done = done.get(&seq).copied().unwrap_or(usize::MAX);
        for offset in blocks_of(operation) {
            let step = Step { seq, kind, issued: at + 1, done };
            histories.entry((disk, offset)).or_default().push(step);
        }
    }
    histories
}

/// At which positions this content is right, as runs that do not touch; or why it never is.
fn right_at(
    block: Defect,
    steps: &[Step],
    stream: u64,
    last: usize,
) -> Result<Vec<RangeInclusive<usize>>, Fault> {
    // Until the first later operation is done that cannot leave this content there.
    let until = |later: &[Step], ends: fn(Kind) -> bool| {
        let done = later.iter().filter(|step| ends(step.kind)).map(|step| step.done).min();
        done.map_or(last, |done| last.min(done.saturating_sub(1)))
    };
    match block.shown {
        Content::Torn => Err(Fault::Torn),
        Content::Alien => Err(Fault::Alien),
        Content::Block(id) => {
            let BlockId { stream: of, disk, offset, seq } = id;
            if of != stream {
                return Err(Fault::Alien);
            }
            let wrote = |step: &Step| step.seq == seq && step.kind == Kind::Write;
            let at = steps.iter().position(wrote).ok_or(Fault::Misplaced)?;
            if (disk, offset) != (block.disk, block.offset) {
                return Err(Fault::Misplaced);
            }
            let end = until(&steps[at + 1..], |kind| kind != Kind::Discard);
            Ok(vec![steps[at].issued..=end])
        }
        Content::Zero => {
            let mut runs = vec![0..=until(steps, |kind| kind == Kind::Write)];
            for (at, step) in steps.iter().enumerate().filter(|(_, s)| s.kind != Kind::Write) {
                let end = until(&steps[at + 1..], |kind| kind == Kind::Write);
                match runs.last_mut() {
                    Some(run) if *run.end() + 1 >= step.issued => {
                        *run = *run.start()..=end.max(*run.end());
                    }
                    _ => runs.push(step.issued..=end),
                }
            }
            Ok(runs)
        }
    }
}

/// Reads the blocks of a region that are not in holes.
fn read_region(
    image: &File,
    region: Region,
    contents: &mut BTreeMap<(u64, u64), Content>,
) -> io::Result<()> {
    let signed = |number: u64| i64::try_from(number).map_err(io::Error::other);
    let mut at = region.from;
    let mut buffer = vec![0; READ_LEN];
    while at < region.to {
        let data = match lseek(image, signed(at)?, Whence::SeekData) {
            Ok(data) => u64::try_from(data).map_err(io::Error::other)?,
            Err(Errno::ENXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = lseek(image, signed(data)?, Whence::SeekHole)?;
        let hole = u64::try_from(hole).map_err(io::Error::other)?.min(region.to);
        at = at.max(data / BLOCK * BLOCK);
        while at < hole {
            let left = (hole - at).next_multiple_of(BLOCK).min(region.to - at);
            let left = usize::try_from(left).unwrap_or(READ_LEN);
            let want = &mut buffer[..READ_LEN.min(left)];
            image.read_exact_at(want, at)?;
            for (index, block) in (0_u64..).zip(want.chunks_exact(BLOCK_LEN)) {
                let content = inspect(block);
                if content != Content::Zero {
                    contents.insert((region.disk, at + index * BLOCK), content);
                }
            }
            at += u64::try_from(want.len()).expect("a buffer is short");
        }
        at = at.max(hole);
    }
    Ok(())
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
