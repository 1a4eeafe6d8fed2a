//! How the point in time of a machine is taken: the one place where that is chosen.

use crate::hypervisor::{Disk, Machine, Tracking};
use crate::manifest::Method;

/// What a user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wanted {
    /// Whatever harms the guest least and reads least: what is chosen and why is shown.
    Auto,
    /// The guest writes to overlays while its images are read; then it goes back to them.
    Overlay,
    /// Old blocks are saved before the guest writes over them; dirty bitmaps tell what changed.
    Bitmap,
    /// Old blocks are saved before the guest writes over them; all disks are read whole, and no dirty bitmap
    /// begins or ends.
    Pull,
    /// The images as they lie there: only of domains that are shut off.
    Offline,
    /// The guest stands still until it was read: needs no room, and stops a service for minutes or hours.
    Suspend,
    /// The domain is shut down, read and started again.
    Stop,
    /// LVM makes snapshots of the logical volumes that the disks are on.
    Lvm,
}

/// How changes are tracked from one backup to the next, where dirty bitmaps cannot or shall not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum TrackBy {
    /// An overlay stays between two backups: what it holds is what changed. Until `purge`.
    Overlay,
}

/// What a machine can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Able {
    /// Whether it did not run when its backup began.
    pub is_off: bool,
    /// Why QEMU has no way of its own to a point in time; `None` where it has one.
    pub no_job: Option<String>,
    /// Whether the guest writes to overlays already.
    pub is_held: bool,
    /// Whether overlays track its changes, or are to.
    pub tracks: bool,
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
    /// QEMU cannot save old blocks.
    #[error("old blocks cannot be saved: {reason}")]
    NoJob {
        /// Why not.
        reason: String,
    },
    /// There is nothing to put an overlay above.
    #[error("--method overlay is not possible: the domain does not run")]
    Off,
    /// The guest writes to overlays already.
    #[error("the images of the guest hold still already, and it writes to overlays")]
    Held,
    /// No disk keeps dirty bitmaps.
    #[error("--method bitmap is not possible: {reason}")]
    NoBitmaps {
        /// Why not.
        reason: String,
    },
    /// The domain runs.
    #[error("--method offline is for domains that are shut off, and this one runs")]
    Runs,
    /// Nobody manages this QEMU.
    #[error("--method {method} is for domains of libvirt: {reason}")]
    Unmanaged {
        /// The method.
        method: &'static str,
        /// Why not.
        reason: &'static str,
    },
}

impl MethodError {
    /// What the user can do next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Runs => "shut it down first, or `--method auto` backs it up while it runs",
            Self::Held => "`kvmsnap purge` ends that",
            _ => "`--method auto` takes what is possible",
        }
    }
}

impl Wanted {
    /// Whether a guest's service is away while it is backed up.
    pub fn is_disturbing(self) -> bool {
        matches!(self, Self::Suspend | Self::Stop)
    }

    /// Makes sure that it can be had of a QEMU that nobody manages.
    ///
    /// # Errors
    /// [`MethodError::Unmanaged`].
    pub fn check_unmanaged(self) -> Result<(), MethodError> {
        let unmanaged = |method, reason| Err(MethodError::Unmanaged { method, reason });
        match self {
            Self::Stop => unmanaged("stop", "nobody could start this QEMU again"),
            Self::Offline => unmanaged("offline", "a QEMU that answers has its images in use"),
            _ => Ok(()),
        }
    }
}

impl Chosen {
    /// Leaves the dirty bitmaps of a machine alone where this method needs none: those that there are go on
    /// counting for later backups.
    pub fn leave_bitmaps(&self, machine: &mut Machine) {
        let reason = match self.method {
            Method::Pull => "read whole, as asked for with --method pull",
            Method::Overlay => "the overlay method reads everything",
            _ => return,
        };
        let keeps = |disk: &&mut Disk| matches!(disk.tracking, Tracking::Bitmaps(_));
        for disk in machine.disks.iter_mut().filter(keeps) {
            disk.tracking = Tracking::Unsupported(reason.to_owned());
        }
    }

    /// How one disk is read: of a machine with dirty bitmaps some disks may keep none.
    pub fn of_disk(&self, tracked: bool) -> Method {
        match (self.method, tracked) {
            (Method::Bitmap, false) => Method::Pull,
            (method, _) => method,
        }
    }
}

impl Able {
    /// What a machine can do, as it was found, and why QEMU has no way of its own. Overlays there are none.
    pub fn of(machine: &Machine, no_job: Option<String>) -> Self {
        let reasons = machine.disks.iter().map(|disk| match &disk.tracking {
            Tracking::Bitmaps(_) | Tracking::Overlay(_) => None,
            Tracking::Unsupported(reason) => Some(format!("{}: {reason}", disk.target)),
        });
        let reasons: Option<Vec<String>> = reasons.collect();
        let untracked = reasons.filter(|all| !all.is_empty()).map(|all| all.join("; "));
        let is_off = machine.shut_off.is_some();
        Self { is_off, no_job, is_held: false, tracks: false, untracked }
    }
}

/// Chooses how the point in time of a machine is taken.
///
/// # Errors
/// [`MethodError`] where what is asked for is not possible.
pub fn choose(wanted: Wanted, able: &Able) -> Result<Chosen, MethodError> {
    let chosen = |method, reason: &str| Ok(Chosen { method, reason: reason.to_owned() });
    match (wanted, &able.untracked, &able.no_job) {
        (Wanted::Overlay, ..) if able.is_off => Err(MethodError::Off),
        (Wanted::Overlay, ..) if able.is_held => Err(MethodError::Held),
        (Wanted::Overlay | Wanted::Auto, ..) if able.tracks && !able.is_off && !able.is_held => {
            chosen(Method::Overlay, "overlays track what changes")
        }
        (Wanted::Overlay, ..) => chosen(Method::Overlay, "asked for with --method"),
        (Wanted::Bitmap, Some(reason), _) => Err(MethodError::NoBitmaps { reason: reason.clone() }),
        _ if able.is_off => chosen(Method::Offline, "it is shut off: its images lie still"),
        (Wanted::Offline, ..) => Err(MethodError::Runs),
        (Wanted::Lvm, ..) => chosen(Method::Lvm, "asked for with --method"),
        (Wanted::Stop, ..) => chosen(Method::Stop, "asked for with --method"),
        // Its images are read through QEMU's own exports too.
        (Wanted::Pull | Wanted::Bitmap | Wanted::Suspend, _, Some(reason)) => {
            Err(MethodError::NoJob { reason: reason.clone() })
        }
        (Wanted::Suspend, _, None) => chosen(Method::Suspend, "asked for with --method"),
        (Wanted::Pull, _, None) => chosen(Method::Pull, "asked for with --method"),
        (Wanted::Bitmap, None, None) => chosen(Method::Bitmap, "asked for with --method"),
        (Wanted::Auto, _, Some(_)) if able.is_held => Err(MethodError::Held),
        (Wanted::Auto, _, Some(reason)) => chosen(Method::Overlay, reason),
        (Wanted::Auto, None, None) => {
            chosen(Method::Bitmap, "it runs, and dirty bitmaps tell what changes")
        }
        (Wanted::Auto, Some(_), None) => {
            chosen(Method::Pull, "it runs, and none of its disks keeps dirty bitmaps")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn able() -> Able {
        Able { is_off: false, no_job: None, is_held: false, tracks: false, untracked: None }
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
        assert_eq!(method(Wanted::Auto, &Able { tracks: true, ..able() }), Some(Method::Overlay));
        let off = Able { tracks: true, is_off: true, ..able() };
        assert_eq!(method(Wanted::Auto, &off), Some(Method::Offline));
        let old = Able { no_job: Some("this QEMU offers no backup jobs".into()), ..untracked };
        let chosen = choose(Wanted::Auto, &old).unwrap();
        assert_eq!(chosen.method, Method::Overlay);
        assert_eq!(chosen.reason, "this QEMU offers no backup jobs");
    }

    #[test]
    fn a_method_that_is_not_possible_is_refused_and_never_replaced() {
        let untracked = Able { untracked: Some("vda: raw".into()), ..able() };
        assert_eq!(method(Wanted::Bitmap, &able()), Some(Method::Bitmap));
        assert_eq!(method(Wanted::Bitmap, &untracked), None);
        assert_eq!(method(Wanted::Suspend, &untracked), Some(Method::Suspend));
        let old = Able { no_job: Some("this QEMU offers no backup jobs".into()), ..able() };
        assert_eq!(method(Wanted::Suspend, &old), None);
        assert_eq!(method(Wanted::Pull, &able()), Some(Method::Pull));
        assert_eq!(method(Wanted::Offline, &able()), None);
        assert!(Wanted::Offline.check_unmanaged().is_err());
        let off = Able { is_off: true, ..able() };
        let stop = [able(), off].map(|able| method(Wanted::Stop, &able));
        assert_eq!(stop, [Method::Stop, Method::Offline].map(Some));
        let old = Able { no_job: Some("old".into()), ..able() };
        assert_eq!(method(Wanted::Bitmap, &old), None);
        assert_eq!(method(Wanted::Overlay, &able()), Some(Method::Overlay));
        assert_eq!(method(Wanted::Overlay, &Able { is_off: true, ..able() }), None);
        let held = Able { is_held: true, ..able() };
        assert_eq!(method(Wanted::Overlay, &held), None, "they would go above those of a user");
        assert_eq!(method(Wanted::Auto, &Able { is_held: true, ..old }), None);
    }

    #[test]
    fn each_disk_has_its_own_method() {
        let chosen = choose(Wanted::Auto, &able()).unwrap();
        assert_eq!([true, false].map(|it| chosen.of_disk(it)), [Method::Bitmap, Method::Pull]);
        let off = choose(Wanted::Auto, &Able { is_off: true, ..able() }).unwrap();
        assert_eq!(off.of_disk(false), Method::Offline);
    }
}
