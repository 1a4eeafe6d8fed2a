//! Which bytes of a read request have been answered.

use std::collections::BTreeMap;

use super::ProtocolError;

/// The parts of one read request that its chunks have covered, in whatever order they came.
///
/// Neighbours are merged, so an in-order reply needs one entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coverage {
    start: u64,
    end: u64,
    /// Start and end of each covered run; disjoint, not adjacent.
    runs: BTreeMap<u64, u64>,
}

impl Coverage {
    /// Nothing of `length` bytes at `offset` is covered yet.
    pub fn new(offset: u64, length: u64) -> Self {
        Self { start: offset, end: offset.saturating_add(length), runs: BTreeMap::new() }
    }

    /// Marks a chunk as arrived, and returns where it starts within the request.
    ///
    /// Errors if it is empty, not within the request, or overlaps an earlier one.
    pub fn insert(&mut self, offset: u64, length: u64) -> Result<u64, ProtocolError> {
        let outside = ProtocolError::OutsideRequest { offset, length };
        let Some(end) = offset.checked_add(length) else { return Err(outside) };
        let Some(within) = offset.checked_sub(self.start) else { return Err(outside) };
        if end > self.end || length == 0 {
            return Err(outside);
        }
        // Of all runs that start before this chunk ends, only the last can reach into it.
        let mut run = (offset, end);
        if let Some((&before, &before_end)) = self.runs.range(..end).next_back() {
            if before_end > offset {
                return Err(ProtocolError::Overlap { offset, length });
            }
            if before_end == offset {
                self.runs.remove(&before);
                run.0 = before;
            }
        }
        if let Some(after_end) = self.runs.remove(&end) {
            run.1 = after_end;
        }
        self.runs.insert(run.0, run.1);
        Ok(within)
    }

    /// Errors with the first byte that is missing.
    pub fn complete(&self) -> Result<(), ProtocolError> {
        let first = self.runs.get(&self.start).copied().unwrap_or(self.start);
        if first >= self.end { Ok(()) } else { Err(ProtocolError::Gap { offset: first }) }
    }
}
