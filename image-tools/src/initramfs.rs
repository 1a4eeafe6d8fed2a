//! Whether the kernels of a tree find their root on a virtual machine's disks, and another initramfs where not.
//!
//! It is looked into and made in the appliance, by the programs of the tree's own system. The tree's stays
//! beside it, and is in its place while files are compared, so that it is not taken for one that changed.

use crate::appliance::look::Layout;
use crate::appliance::{Appliance, ApplianceError};
use crate::fit::Plan;
use crate::update::{Report, printable};

/// Puts those of the tree back in their places where an update has made others; their paths.
pub(crate) async fn put_aside(appliance: &mut Appliance) -> Result<Vec<String>, ApplianceError> {
    let paths = appliance.step("look for kernels", &["initramfs-aside"]).await?;
    Ok(paths.lines().map(printable).collect())
}

/// Makes anew those that do not find the disks, and those that an update has made for what changed since.
/// `is_own`: what the disks have was made for the tree's machine.
pub(crate) async fn fit(
    appliance: &mut Appliance,
    layout: &Layout,
    plan: &Plan,
    is_own: bool,
    report: &mut Report,
) -> Result<(), ApplianceError> {
    let root = plan.mounts.iter().find(|mount| mount.path == "/");
    let (kind, device) = root.map_or(("", ""), |root| (&root.kind, &root.device));
    let below = if layout.is_volume(device) { "lvm" } else { "plain" };
    let whose = if is_own { "same" } else { "other" };
    let words = ["initramfs", whose, kind, below];
    let told = appliance.step("have its kernels find these disks", &words).await?;
    if told.is_empty() && !is_own {
        let why = "boot/ has none that belongs to a kernel in lib/modules";
        report.skipped.push(("initramfs".to_owned(), why.to_owned()));
    }
    for line in told.lines() {
        tell(line, report);
    }
    Ok(())
}

/// Adds what became of one to the report: `VERSION WORD [DETAIL…]`, with tabs between.
fn tell(line: &str, report: &mut Report) {
    let mut fields = line.split('\t').map(|field| printable(field.trim()));
    let mut next = || fields.next().unwrap_or_default();
    let (name, word) = (format!("initramfs of {}", next()), next());
    match &*word {
        "fits" => report.boot.push(format!("{name}: the tree's, it finds virtual disks")),
        "kept" => report.boot.push(format!("{name}: the one made before, the tree's is the same")),
        "made" => {
            let (lacked, tool, still) = (next(), next(), next());
            let what = format!("{name}: made anew by {tool}, the tree's had no {lacked}");
            report.boot.push(what);
            if !still.is_empty() {
                let why = format!("also the new one has no {still}: it may not find its disks");
                report.skipped.push((name, why));
            }
        }
        "unknown" => report.skipped.push((name, next())),
        _ => {
            let why = format!("it may not find its disks: it has no {}", next());
            report.skipped.push((name, why));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_became_of_each_is_told() {
        let mut report = Report::default();
        for line in [
            "6.1\tmade\tvirtio_blk lvm \tmkinitramfs\tlvm ",
            "5.10\tunfit\tahci ; the tree has no \x1btool",
            "4.19\tfits\t",
            "odd",
        ] {
            tell(line, &mut report);
        }
        assert_eq!(
            report.boot,
            [
                "initramfs of 6.1: made anew by mkinitramfs, the tree's had no virtio_blk lvm",
                "initramfs of 4.19: the tree's, it finds virtual disks",
            ]
        );
        let skipped: Vec<_> = report.skipped.iter().map(|(what, _)| &**what).collect();
        assert_eq!(skipped, ["initramfs of 6.1", "initramfs of 5.10", "initramfs of odd"]);
        assert!(report.skipped[1].1.ends_with("no ahci ; the tree has no ?tool"), "{report:?}");
    }
}
