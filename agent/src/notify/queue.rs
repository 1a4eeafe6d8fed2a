//! What each channel has to be told yet: a mail server that is away for an hour keeps nothing from anybody.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::Event;

/// So many events wait for one channel; then the oldest go.
const WAITING_MAX: usize = 200;
/// How long a channel that failed is left alone the first time; twice as long each time.
const PAUSE: SignedDuration = SignedDuration::from_mins(5);
/// How often that gets longer: up to more than five hours.
const DOUBLINGS_MAX: u32 = 6;
/// What could not be told for so long is not news any more.
const AGE_MAX: SignedDuration = SignedDuration::from_hours(48);

/// What waits, by the name of the channel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Queue(BTreeMap<String, Waiting>);

/// What waits for a channel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Waiting {
    /// The events, and since when each of them waits.
    events: Vec<(Timestamp, Event)>,
    /// How often it failed since it was last told something.
    failures: u32,
    /// When it failed last.
    failed: Option<Timestamp>,
}

impl Queue {
    /// Adds to what waits for a channel.
    pub fn push(&mut self, channel: &str, events: impl IntoIterator<Item = Event>, now: Timestamp) {
        let waiting = &mut self.0.entry(channel.to_owned()).or_default().events;
        waiting.extend(events.into_iter().map(|event| (now, event)));
        let excess = waiting.len().saturating_sub(WAITING_MAX);
        waiting.drain(..excess);
    }

    /// What a channel is to be told now: nothing soon after it failed, for one that fails after it has told
    /// somebody would tell the same over and over.
    pub fn due(&self, channel: &str, now: Timestamp) -> Vec<Event> {
        let Some(waiting) = self.0.get(channel) else { return Vec::new() };
        let doublings = waiting.failures.saturating_sub(1).min(DOUBLINGS_MAX);
        let pause = PAUSE * (1 << doublings);
        // A clock that was set back says nothing.
        let is_left_alone = waiting.failed.is_some_and(|failed| {
            let since = now.duration_since(failed);
            !since.is_negative() && since < pause
        });
        match is_left_alone {
            true => Vec::new(),
            false => waiting.events.iter().map(|(_, event)| event.clone()).collect(),
        }
    }

    /// A channel has been told, or refuses what it was told.
    pub fn clear(&mut self, channel: &str) {
        self.0.remove(channel);
    }

    /// A channel could not be told. Says how many events were waiting for too long and are given up.
    pub fn failed(&mut self, channel: &str, now: Timestamp) -> usize {
        let Some(waiting) = self.0.get_mut(channel) else { return 0 };
        waiting.failures = waiting.failures.saturating_add(1);
        waiting.failed = Some(now);
        let count = waiting.events.len();
        waiting.events.retain(|(since, _)| now.duration_since(*since) < AGE_MAX);
        count - waiting.events.len()
    }

    /// Forgets the channels that there are not any more.
    pub fn keep(&mut self, is_there: impl Fn(&str) -> bool) {
        self.0.retain(|channel, waiting| {
            is_there(channel) && (waiting.failures > 0 || !waiting.events.is_empty())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Kind, tests::event};
    use super::*;

    fn at(minute: i64) -> Timestamp {
        Timestamp::from_second(minute * 60).unwrap()
    }

    #[test]
    fn a_channel_that_fails_is_tried_less_and_less_and_not_for_ever() {
        let mut queue = Queue::default();
        queue.push("mail", [event(Kind::Failure, "web")], at(0));
        let (mut tries, mut given_up) = (Vec::new(), 0);
        for minute in (0..4 * 24 * 60).step_by(5) {
            if !queue.due("mail", at(minute)).is_empty() {
                tries.push(minute);
                given_up += queue.failed("mail", at(minute));
            }
        }
        assert_eq!(tries[..6], [0, 5, 15, 35, 75, 155]);
        assert!(tries.len() < 20 && given_up == 1, "{tries:?}");
        // What is new then does not begin at five minutes again.
        queue.push("mail", [event(Kind::Failure, "db")], at(4 * 24 * 60));
        queue.keep(|_| true);
        assert_eq!(queue.due("mail", at(4 * 24 * 60)).len(), 1);
        queue.failed("mail", at(4 * 24 * 60));
        assert!(queue.due("mail", at(4 * 24 * 60 + 300)).is_empty());
        // The clock was wrong when it failed.
        assert_eq!(queue.due("mail", at(0)).len(), 1);
    }
}
