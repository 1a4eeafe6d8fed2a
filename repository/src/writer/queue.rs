//! A queue between threads that is bounded by weight and by time.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex, MutexGuard},
    time::{Duration, Instant},
};

/// Items with weights; the sum of weights is bounded, but one item always fits.
#[derive(Debug)]
pub(super) struct Queue<T> {
    state: Mutex<State<T>>,
    room: Condvar,
    items: Condvar,
    weight_max: usize,
}

#[derive(Debug)]
struct State<T> {
    items: VecDeque<(T, usize)>,
    weight: usize,
    closed: bool,
}

/// Why an item was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    Closed,
    Full,
}

impl<T> Queue<T> {
    pub(super) fn new(weight_max: usize) -> Self {
        let state = State { items: VecDeque::new(), weight: 0, closed: false };
        let (room, items) = (Condvar::new(), Condvar::new());
        Self { state: Mutex::new(state), room, items, weight_max }
    }

    /// Waits up to `patience` for room.
    pub(super) fn push(&self, item: T, weight: usize, patience: Duration) -> Result<(), Refused> {
        let deadline = Instant::now() + patience;
        let mut state = self.state();
        loop {
            if state.closed {
                return Err(Refused::Closed);
            }
            if state.weight == 0 || state.weight + weight <= self.weight_max {
                state.weight += weight;
                state.items.push_back((item, weight));
                self.items.notify_one();
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Refused::Full);
            }
            state = self.room.wait_timeout(state, left).expect("no panic while locked").0;
        }
    }

    /// Waits for an item; `None` once the queue is closed and empty.
    pub(super) fn pop(&self) -> Option<T> {
        let mut state = self.state();
        loop {
            if let Some((item, weight)) = state.items.pop_front() {
                state.weight -= weight;
                self.room.notify_all();
                return Some(item);
            }
            if state.closed {
                return None;
            }
            state = self.items.wait(state).expect("no panic while locked");
        }
    }

    /// Takes nothing more; what is in it can still be taken out.
    pub(super) fn close(&self) {
        self.state().closed = true;
        self.room.notify_all();
        self.items.notify_all();
    }

    /// Closes it and throws away what is in it.
    pub(super) fn abandon(&self) {
        let mut state = self.state();
        let thrown_away = std::mem::take(&mut state.items);
        (state.weight, state.closed) = (0, true);
        drop(state);
        drop(thrown_away);
        self.room.notify_all();
        self.items.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().expect("no panic while locked")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(20);

    #[test]
    fn weight_is_bounded_but_one_item_always_fits() {
        let queue = Queue::new(10);
        assert_eq!(queue.push('a', 25, SOON), Ok(()));
        assert_eq!(queue.push('b', 1, SOON), Err(Refused::Full));
        assert_eq!(queue.pop(), Some('a'));
        assert_eq!(queue.push('b', 6, SOON), Ok(()));
        assert_eq!(queue.push('c', 4, SOON), Ok(()));
        queue.close();
        assert_eq!(queue.push('d', 0, SOON), Err(Refused::Closed));
        assert_eq!((queue.pop(), queue.pop(), queue.pop()), (Some('b'), Some('c'), None));
    }

    #[test]
    fn abandoned_items_are_gone_and_waiters_wake_up() {
        let queue = Queue::new(1);
        queue.push('a', 1, SOON).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| queue.push('b', 1, Duration::from_secs(60)));
            std::thread::sleep(SOON);
            queue.abandon();
            assert_eq!(waiting.join().unwrap(), Err(Refused::Closed));
        });
        assert_eq!(queue.pop(), None);
    }
}
