//! Leaving processors to the guest: while it works, this whole process keeps to half of them.
//!
//! To let others go first there ([`super::priority`]) is not enough. That counts only among the threads of one control
//! group, and a thread inside the kernel keeps its processor, which QEMU's main thread waits for.

use std::fs;
use std::sync::Mutex;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// What was found before anything was changed, and whether this process keeps to half of it now.
static STATE: Mutex<Option<(CpuSet, bool)>> = Mutex::new(None);

/// Keeps all threads to half of the processors, or lets them use all again. Without the right to, or
/// with only one processor, nothing changes.
pub fn give_way(to_guest: bool) {
    let mut state = STATE.lock().expect("no panic while locked");
    // Nothing of the system's answers can fail here but for hosts with more processors than a set has.
    let all = match *state {
        Some((_, given)) if given == to_guest => return,
        Some((all, _)) => all,
        None if !to_guest => return,
        None => match sched_getaffinity(Pid::from_raw(0)) {
            Ok(all) => all,
            Err(_) => return,
        },
    };
    *state = Some((all, to_guest));
    let allowed = if to_guest { half(&all) } else { all };
    // Threads that begin later take over what their maker has.
    for thread in fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        if let Some(id) = thread.file_name().to_str().and_then(|name| name.parse().ok()) {
            // It may have ended.
            let _ = sched_setaffinity(Pid::from_raw(id), &allowed);
        }
    }
    tracing::debug!(to_guest, "processors given way");
}

/// The later half: the first processors serve more interrupts. One stays one.
fn half(all: &CpuSet) -> CpuSet {
    let is_set = |number: &usize| all.is_set(*number).unwrap_or(false);
    let numbers: Vec<usize> = (0..CpuSet::count()).filter(is_set).collect();
    let mut half = CpuSet::new();
    for number in &numbers[numbers.len() / 2..] {
        half.set(*number).expect("it is within the bounds of a set");
    }
    half
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    fn set(numbers: &[usize]) -> CpuSet {
        let mut set = CpuSet::new();
        numbers.iter().for_each(|&number| set.set(number).unwrap());
        set
    }

    #[test]
    fn p2_half_of_the_processors_are_left_but_never_none_taken() {
        assert_eq!(half(&set(&[0, 1])), set(&[1]));
        assert_eq!(half(&set(&[2, 3, 5, 9, 12])), set(&[5, 9, 12]));
        assert_eq!(half(&set(&[7])), set(&[7]));
    }

    #[test]
    fn p2_all_threads_keep_to_half_and_get_all_back() {
        let mine = || sched_getaffinity(Pid::from_raw(0)).unwrap();
        let (ask, asked) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        thread::spawn(move || asked.iter().for_each(|()| tell.send(mine()).unwrap()));
        let others = || {
            ask.send(()).unwrap();
            told.recv_timeout(Duration::from_secs(10)).unwrap()
        };
        let all = others();
        give_way(true);
        assert_eq!([mine(), others()], [half(&all); 2]);
        give_way(true);
        assert_eq!([mine(), others()], [half(&all); 2], "half of half is not taken");
        give_way(false);
        assert_eq!([mine(), others()], [all; 2]);
    }
}
