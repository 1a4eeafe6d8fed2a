//! How many bytes a second may go to a store and come from it.

use std::{
    num::NonZeroU64,
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

/// What is sent or received between two looks at the clock.
pub(super) const PART_LEN: usize = 64 << 10;

/// Limits on what goes to a store and comes from it, for all threads together.
#[derive(Debug, Default)]
pub struct Pace {
    upload: Option<Bucket>,
    download: Option<Bucket>,
}

impl Pace {
    /// Limits in bytes a second; `None` has no limit.
    pub fn new(upload: Option<NonZeroU64>, download: Option<NonZeroU64>) -> Self {
        Self { upload: upload.map(Bucket::new), download: download.map(Bucket::new) }
    }

    /// The limit of what goes to the store, in bytes a second.
    pub(super) fn upload_limit(&self) -> Option<NonZeroU64> {
        self.upload.as_ref().map(|bucket| bucket.rate)
    }

    /// Waits until `len` bytes may be sent.
    pub(super) fn before_sending(&self, len: usize) {
        if let Some(bucket) = &self.upload {
            bucket.take(len);
        }
    }

    /// Waits for as long as `len` bytes that were received should have taken.
    pub(super) fn after_receiving(&self, len: usize) {
        if let Some(bucket) = &self.download {
            bucket.take(len);
        }
    }
}

/// A bucket of tokens, one for each byte: who takes more than there are waits until they have come.
#[derive(Debug)]
struct Bucket {
    rate: NonZeroU64,
    /// Until when what has been taken so far lasts.
    spent_until: Mutex<Instant>,
}

impl Bucket {
    fn new(rate: NonZeroU64) -> Self {
        Self { rate, spent_until: Mutex::new(Instant::now()) }
    }

    fn take(&self, len: usize) {
        thread::sleep(self.claim(len, Instant::now()));
    }

    /// Takes tokens; returns how long to wait for them. Those of at most a second ago have not expired.
    fn claim(&self, len: usize, now: Instant) -> Duration {
        let takes = Duration::from_secs_f64(len as f64 / self.rate.get() as f64);
        let mut spent_until = self.spent_until.lock().expect("no panic while locked");
        let oldest = now.checked_sub(Duration::from_secs(1)).unwrap_or(now);
        *spent_until = (*spent_until).max(oldest) + takes;
        spent_until.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_takers_together_keep_the_limit() {
        let bucket = Bucket::new(NonZeroU64::new(1000).unwrap());
        let start = *bucket.spent_until.lock().unwrap() + Duration::from_secs(10);
        // What was not used in the last second may be used at once, what is older may not.
        assert_eq!(bucket.claim(1000, start), Duration::ZERO);
        assert_eq!(bucket.claim(500, start), Duration::from_millis(500));
        assert_eq!(bucket.claim(2000, start), Duration::from_millis(2500));
        let later = start + Duration::from_secs(2);
        assert_eq!(bucket.claim(100, later), Duration::from_millis(600));
    }
}
