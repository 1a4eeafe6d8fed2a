//! What each channel has to be told yet: a mail server that is away for an hour keeps nothing from anybody.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Event;

/// So many events wait for one channel; then the oldest go.
const WAITING_MAX: usize = 200;

/// Events that wait, by the name of the channel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Queue(BTreeMap<String, Vec<Event>>);

impl Queue {
    /// Adds to what waits for a channel.
    pub fn push(&mut self, channel: &str, events: impl IntoIterator<Item = Event>) {
        let waiting = self.0.entry(channel.to_owned()).or_default();
        waiting.extend(events);
        let excess = waiting.len().saturating_sub(WAITING_MAX);
        waiting.drain(..excess);
    }

    /// What waits for a channel.
    pub fn of(&self, channel: &str) -> &[Event] {
        self.0.get(channel).map_or(&[], Vec::as_slice)
    }

    /// A channel has been told.
    pub fn clear(&mut self, channel: &str) {
        self.0.remove(channel);
    }

    /// Forgets the channels that there are not any more.
    pub fn keep(&mut self, is_there: impl Fn(&str) -> bool) {
        self.0.retain(|channel, waiting| is_there(channel) && !waiting.is_empty());
    }
}
