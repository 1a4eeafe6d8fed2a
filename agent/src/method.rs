//! How the point in time of a machine is taken: the one place where that is chosen.

use crate::hypervisor::{Machine, Tracking};
use crate::manifest::Method;

/// What a user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Wanted {
    /// Whatever harms the guest least and reads least: what is chosen and why is shown.
    Auto,
    /// Old blocks are saved before the guest writes over them; dirty bitmaps tell what changed.
    Bitmap,
    /// The guest stands still until it was read: needs no room, and stops a service for minutes or hours.
    Suspend,
}

/// What a machine can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Able {
    /// Whether it does not run.
    pub is_off: bool,
    /// Why none of its disks keeps dirty bitmaps; `None` where one does.
    pub untracked: Option<String>,
}

/// How a point in time will be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// The method.
    pub method: Method,
    /// Why this one, in words for the user.
    pub reason: String,
}

/// Why a method that was asked for cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MethodError {
    /// No disk keeps dirty bitmaps.
    #[error("--method bitmap is not possible: {reason}")]
    NoBitmaps {
        /// Why not.
        reason: String,
    },
}

impl Able {
    /// What a machine can do, as it was found.
    pub fn of(machine: &Machine) -> Self {
        let reasons = machine.disks.iter().map(|disk| match &disk.tracking {
            Tracking::Bitmaps(_) => None,
            Tracking::Unsupported(reason) => Some(format!("{}: {reason}", disk.target)),
        });
        let reasons: Option<Vec<String>> = reasons.collect();
        let untracked = reasons.filter(|all| !all.is_empty()).map(|all| all.join("; "));
        Self { is_off: machine.shut_off.is_some(), untracked }
    }
}

/// Chooses how the point in time of a machine is taken.
///
/// # Errors
/// [`MethodError`] where what is asked for is not possible.
pub fn choose(wanted: Wanted, able: &Able) -> Result<Chosen, MethodError> {
    let chosen = |method, reason: &str| Ok(Chosen { method, reason: reason.to_owned() });
    match (wanted, &able.untracked) {
        (Wanted::Bitmap, Some(reason)) => Err(MethodError::NoBitmaps { reason: reason.clone() }),
        _ if able.is_off => chosen(Method::Offline, "it is shut off: its images lie still"),
        (Wanted::Suspend, _) => chosen(Method::Suspend, "asked for with --method"),
        (Wanted::Bitmap, None) => chosen(Method::Bitmap, "asked for with --method"),
        (Wanted::Auto, None) => {
            chosen(Method::Bitmap, "it runs, and dirty bitmaps tell what changes")
        }
        (Wanted::Auto, Some(_)) => {
            chosen(Method::Pull, "it runs, and none of its disks keeps dirty bitmaps")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn able() -> Able {
        Able { is_off: false, untracked: None }
    }

    fn method(wanted: Wanted, able: &Able) -> Option<Method> {
        choose(wanted, able).ok().map(|chosen| chosen.method)
    }

    #[test]
    fn auto_takes_what_the_machine_can_do() {
        let untracked = Able { untracked: Some("vda: raw".into()), ..able() };
        assert_eq!(method(Wanted::Auto, &able()), Some(Method::Bitmap));
        assert_eq!(method(Wanted::Auto, &untracked), Some(Method::Pull));
        assert_eq!(method(Wanted::Auto, &Able { is_off: true, ..able() }), Some(Method::Offline));
    }

    #[test]
    fn a_method_that_is_not_possible_is_refused_and_never_replaced() {
        let untracked = Able { untracked: Some("vda: raw".into()), ..able() };
        assert_eq!(method(Wanted::Bitmap, &able()), Some(Method::Bitmap));
        assert_eq!(method(Wanted::Bitmap, &untracked), None);
        assert_eq!(method(Wanted::Suspend, &untracked), Some(Method::Suspend));
    }
}
