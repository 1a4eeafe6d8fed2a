//! Standing back for the guest: while it works, the threads of this process run where nobody else would.
//!
//! A thread with the policy `SCHED_IDLE` gives its processor up at once to whoever wakes there, and counts as none
//! where the kernel looks for an idle one (sched(7)). Threads of the usual policy that are kept to half of
//! the processors were seen to share one of these with the guest's for tens of milliseconds, while another idled.

use std::fs;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use nix::libc;

/// Who gets less than a fifth of the time that it is ready to run in…
const WAIT_MAX: u32 = 4;
/// …competes again for so long.
const COMPETE: Duration = Duration::from_secs(10);

/// The threads of this process, which stand back or compete. Dropped, they compete.
#[derive(Debug)]
pub struct Priority {
    /// Whether they may, and can compete again.
    is_allowed: bool,
    /// Since when, in processor time, they stand back.
    since: Option<Usage>,
    /// They got too little, and compete until then.
    competes_until: Option<Instant>,
}

/// What the threads of this process have had of the processors up to now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Usage {
    ran: Duration,
    /// While they were ready to run.
    waited: Duration,
}

impl Priority {
    /// They compete. Where somebody chose another policy for this process, where it could not be left again, or
    /// nobody can tell what the threads get, they always will.
    pub fn new() -> Self {
        let is_allowed = usage().is_some() && can_return();
        Self { is_allowed, since: None, competes_until: None }
    }

    /// Has the threads stand back while the guest works. To be called every second or so.
    pub fn set(&mut self, guest_works: bool) {
        if !self.is_allowed {
            return;
        }
        let now = usage();
        if let (Some(since), Some(now)) = (self.since, now)
            && starves(since, now)
        {
            tracing::debug!("the processors are taken: not standing back for a while");
            self.competes_until = Some(Instant::now() + COMPETE);
        }
        let competes = self.competes_until.is_some_and(|until| Instant::now() < until);
        let stands_back = guest_works && !competes;
        if stands_back || self.since.is_some() {
            // Each time: threads have begun since.
            set_all(if stands_back { libc::SCHED_IDLE } else { libc::SCHED_OTHER });
        }
        self.since = now.filter(|_| stands_back);
    }
}

impl Drop for Priority {
    fn drop(&mut self) {
        if self.since.is_some() {
            set_all(libc::SCHED_OTHER);
        }
    }
}

fn starves(since: Usage, now: Usage) -> bool {
    now.waited.saturating_sub(since.waited) > now.ran.saturating_sub(since.ran) * WAIT_MAX
}

/// `None` where the kernel does not count (`Documentation/scheduler/sched-stats.rst`).
fn usage() -> Option<Usage> {
    let mut usage = Usage::default();
    for thread in threads() {
        // One that has ended has no more.
        let Ok(counts) = fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")) else {
            continue;
        };
        let mut counts = counts.split_whitespace().map_while(|count| count.parse().ok());
        usage.ran += Duration::from_nanos(counts.next()?);
        usage.waited += Duration::from_nanos(counts.next()?);
    }
    (usage != Usage::default()).then_some(usage)
}

/// Whether threads of the usual policy may be given it again: a thread tries.
fn can_return() -> bool {
    let attempt =
        || is_usual() && set(0, libc::SCHED_IDLE).is_ok() && set(0, libc::SCHED_OTHER).is_ok();
    thread::spawn(attempt).join().unwrap_or(false)
}

fn is_usual() -> bool {
    // Field 41 of proc(5) is the policy; what follows the name, which may have any character, begins with field 3.
    let stat = fs::read_to_string("/proc/thread-self/stat").unwrap_or_default();
    let policy = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(41 - 3));
    policy == Some("0")
}

fn set_all(policy: libc::c_int) {
    for thread in threads() {
        // It may have ended.
        let _ = set(thread, policy);
    }
}

fn threads() -> impl Iterator<Item = libc::pid_t> {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    tasks.filter_map(|task| task.file_name().to_str()?.parse().ok())
}

/// Sets the policy of a thread, 0 for the calling one. What it begins meanwhile has the same, programs for good.
#[expect(unsafe_code, reason = "a C function that neither `nix` nor `rustix` has")]
fn set(thread: libc::pid_t, policy: libc::c_int) -> io::Result<()> {
    let none = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameter outlives the call, which only reads it.
    match unsafe { libc::sched_setscheduler(thread, policy, &raw const none) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::sync::{Mutex, mpsc};

    use super::*;

    /// All threads of this process are changed at once.
    static ALONE: Mutex<()> = Mutex::new(());

    fn after(ran: u64, waited: u64) -> Usage {
        Usage { ran: Duration::from_millis(ran), waited: Duration::from_millis(waited) }
    }

    #[test]
    fn who_gets_less_than_a_fifth_of_its_time_starves() {
        let since = after(100, 100);
        assert!(!starves(since, since), "it had nothing to do");
        assert!(!starves(since, after(200, 500)));
        assert!(starves(since, after(200, 501)));
    }

    #[test]
    fn p2_all_threads_stand_back_while_the_guest_works_and_compete_afterwards() {
        let _alone = ALONE.lock().unwrap();
        let mut priority = Priority::new();
        if !priority.is_allowed {
            // Past the test harness, which swallows what `eprintln!` says.
            io::stderr().write_all(b"SKIPPED: the policy of threads cannot be changed\n").unwrap();
            return;
        }
        let (ask, asked) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        thread::spawn(move || asked.iter().for_each(|()| tell.send(is_usual()).unwrap()));
        let others_are_usual = || {
            ask.send(()).unwrap();
            told.recv_timeout(Duration::from_secs(10)).unwrap()
        };
        assert!(is_usual() && others_are_usual());
        priority.set(true);
        assert!(!is_usual() && !others_are_usual());
        priority.set(false);
        assert!(is_usual() && others_are_usual());
        priority.set(true);
        drop(priority);
        assert!(is_usual() && others_are_usual());
    }

    #[test]
    fn who_starved_competes_for_a_while() {
        let _alone = ALONE.lock().unwrap();
        let mut priority = Priority::new();
        priority.since = Some(Usage::default());
        priority.competes_until = Some(Instant::now() + COMPETE);
        priority.set(true);
        assert!(priority.since.is_none());
        priority.competes_until = Some(Instant::now());
        priority.set(true);
        assert_eq!(priority.since.is_some(), priority.is_allowed);
    }
}
