//! Random operations on one or more disks, each logged before it is issued and once it is done.

use std::collections::HashSet;
use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use super::block::{BLOCK_LEN, BlockId, encode, noise};
use super::log::{Event, Kind, Log, Operation};
use super::target::Target;

/// Bytes of a block, as offsets are counted.
const BLOCK: u64 = BLOCK_LEN as u64;

/// A part of a disk that belongs to the oracle; zero before the first operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// The disk's number in the load.
    pub disk: u64,
    /// Its first byte.
    pub from: u64,
    /// The byte after its last.
    pub to: u64,
}

/// What a load does.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Load {
    /// Marks its blocks; parts of one load on the same disks share it.
    pub stream: u64,
    /// Decides which operations come.
    pub seed: u64,
    /// The number of its first operation: 1, or one more than the log of an earlier part has issued.
    pub first_seq: u64,
    /// How many operations, without end where there is none.
    pub count: Option<u64>,
    /// How long, without end where there is none.
    pub duration: Option<Duration>,
    /// Operations a second at most.
    pub rate: Option<u32>,
    /// Operations in flight at most.
    pub depth: u32,
    /// Blocks an operation covers at most.
    pub blocks_max: u64,
    /// Zeros and discards between the writes.
    pub mix: bool,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            stream: 1,
            seed: 1,
            first_seq: 1,
            count: None,
            duration: None,
            rate: None,
            depth: 1,
            blocks_max: 4,
            mix: false,
        }
    }
}

struct State<'a> {
    log: &'a mut (dyn Write + Send),
    random: u64,
    next_seq: u64,
    next_at: Instant,
    /// Blocks in flight: two operations on one block at once would have no order.
    busy: HashSet<(u64, u64)>,
    failed: bool,
}

impl Load {
    /// The same with another number of operations.
    #[must_use]
    pub fn count(self, count: u64) -> Self {
        Self { count: Some(count), ..self }
    }

    /// The same with zeros and discards.
    #[must_use]
    pub fn mixed(self) -> Self {
        Self { mix: true, ..self }
    }

    /// The same with an upper limit of operations a second.
    #[must_use]
    pub fn rate(self, rate: u32) -> Self {
        Self { rate: Some(rate), ..self }
    }

    /// The same with more operations in flight.
    #[must_use]
    pub fn depth(self, depth: u32) -> Self {
        Self { depth, ..self }
    }

    /// The same after what this log has issued, with other operations.
    #[must_use]
    pub fn after(self, log: &Log) -> Self {
        let first_seq = log.issued() + 1;
        Self { first_seq, seed: self.seed.wrapping_add(first_seq), ..self }
    }

    /// Runs to its end and returns the number of its last operation. `regions` name their target by
    /// its place in `targets`.
    ///
    /// # Errors
    ///
    /// The first error of a target or of the log.
    pub fn run(
        &self,
        regions: &[Region],
        targets: &[&dyn Target],
        log: &mut (dyn Write + Send),
    ) -> io::Result<u64> {
        log.write_all(Log::header(self.stream, regions).as_bytes())?;
        let started = Instant::now();
        let state = Mutex::new(State {
            log,
            random: self.seed,
            next_seq: self.first_seq,
            next_at: started,
            busy: HashSet::new(),
            failed: false,
        });
        thread::scope(|scope| {
            let work = || {
                let outcome = self.work(regions, targets, &state, started);
                lock(&state).failed |= outcome.is_err();
                outcome
            };
            let workers: Vec<_> = (0..self.depth.max(1)).map(|_| scope.spawn(work)).collect();
            let outcomes =
                workers.into_iter().map(|worker| worker.join().expect("it cannot panic"));
            outcomes.collect::<Vec<_>>().into_iter().collect::<io::Result<()>>()
        })?;
        Ok(lock(&state).next_seq - 1)
    }

    fn work(
        &self,
        regions: &[Region],
        targets: &[&dyn Target],
        state: &Mutex<State<'_>>,
        started: Instant,
    ) -> io::Result<()> {
        loop {
            let (operation, unmap, at) = {
                let mut state = lock(state);
                let over = self.count.is_some_and(|n| state.next_seq >= self.first_seq + n);
                if over
                    || state.failed
                    || self.duration.is_some_and(|limit| started.elapsed() >= limit)
                {
                    return Ok(());
                }
                let at = state.next_at;
                if let Some(rate) = self.rate {
                    state.next_at = at.max(Instant::now()) + Duration::from_secs(1) / rate;
                }
                let operation = self.choose(regions, &mut state);
                state.busy.extend(blocks_of(&operation).map(|block| (operation.disk, block)));
                (operation, noise(&mut state.random) & 1 == 1, at)
            };
            thread::sleep(at.saturating_duration_since(Instant::now()));
            let issued = Event::Issued(operation).line();
            lock(state).log.write_all(issued.as_bytes())?;
            let index = usize::try_from(operation.disk).expect("disks are few");
            self.perform(targets[index], &operation, unmap)?;
            let mut state = lock(state);
            state.log.write_all(Event::Done(operation.seq).line().as_bytes())?;
            for block in blocks_of(&operation) {
                state.busy.remove(&(operation.disk, block));
            }
        }
    }

    fn choose(&self, regions: &[Region], state: &mut State<'_>) -> Operation {
        loop {
            let mut random = || noise(&mut state.random);
            let region = pick(regions, random());
            let kind = match random() % 10 {
                0 | 1 if self.mix => Kind::Zero,
                2 if self.mix => Kind::Discard,
                _ => Kind::Write,
            };
            let blocks = (region.to - region.from) / BLOCK;
            let first = random() % blocks;
            let wanted = 1 + random() % self.blocks_max.max(1);
            let len = wanted.min(blocks - first) * BLOCK;
            let offset = region.from + first * BLOCK;
            let seq = state.next_seq;
            let operation = Operation { seq, disk: region.disk, kind, offset, len };
            let free = |block| !state.busy.contains(&(operation.disk, block));
            if blocks_of(&operation).all(free) {
                state.next_seq += 1;
                return operation;
            }
        }
    }

    fn perform(&self, target: &dyn Target, operation: &Operation, unmap: bool) -> io::Result<()> {
        let Operation { seq, disk, kind, offset, len } = *operation;
        match kind {
            Kind::Zero => target.zero(offset, len, unmap),
            Kind::Discard => target.discard(offset, len),
            Kind::Write => {
                let stream = self.stream;
                let block = |offset| encode(BlockId { stream, disk, offset, seq });
                let bytes: Vec<u8> = blocks_of(operation).flat_map(block).collect();
                target.write(offset, &bytes)
            }
        }
    }
}

/// The offsets of the blocks that an operation covers.
pub(super) fn blocks_of(operation: &Operation) -> impl Iterator<Item = u64> + use<> {
    let start = operation.offset;
    (0..operation.len / BLOCK).map(move |index| start + index * BLOCK)
}

fn pick(regions: &[Region], random: u64) -> Region {
    let count = u64::try_from(regions.len()).expect("regions are few");
    regions[usize::try_from(random % count).expect("regions are few")]
}

fn lock<'a, 'b>(state: &'a Mutex<State<'b>>) -> MutexGuard<'a, State<'b>> {
    state.lock().expect("no worker panics with the lock")
}
