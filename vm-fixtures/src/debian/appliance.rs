//! libguestfs with the fixture's kernel: its appliance is built once and kept.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;

use sha2::{Digest as _, Sha256};

use super::cached;
use crate::recipe::{cache_folder, hex, unpack_kernel};
use crate::tools::{available, find, run};

/// Programs and packages that libguestfs needs here.
const PROGRAMS: [(&str, &str); 3] =
    [("guestfish", "guestfish"), ("supermin", "supermin"), ("depmod", "kmod")];
/// What the appliance is made of; where distributions have it.
const PARTS: [&str; 2] =
    ["/usr/lib/x86_64-linux-gnu/guestfs/supermin.d", "/usr/lib/guestfs/supermin.d"];
const VERSION: &str = "1";

/// The environment in which libguestfs works here, the appliance built first where it is missing.
///
/// It is fixed: libguestfs looks at nothing but its folder, so several tests use it at a time.
/// `KVMSNAP_ACCEL=kvm` has it use KVM; without, its processor is emulated.
///
/// `None`, said aloud, where libguestfs is not installed.
///
/// # Panics
///
/// When the appliance cannot be built; when something is missing and `KVMSNAP_REQUIRE_QEMU=1`.
#[track_caller]
pub fn appliance_environment() -> Option<Vec<(&'static str, OsString)>> {
    if !PROGRAMS.iter().all(|(program, package)| available(program, package)) {
        return None;
    }
    let cache = cache_folder();
    let folder = cache.join(format!("appliance-{}", key()));
    cached(&cache, "appliance", &folder, |scratch| build(&cache, scratch));
    let mut environment = vec![
        ("LIBGUESTFS_BACKEND", OsString::from("direct")),
        ("LIBGUESTFS_PATH", folder.into_os_string()),
    ];
    if env::var_os("KVMSNAP_ACCEL").is_none_or(|accel| accel != "kvm") {
        environment.push(("LIBGUESTFS_BACKEND_SETTINGS", OsString::from("force_tcg")));
    }
    Some(environment)
}

/// The appliance is made of the host's own files: another libguestfs makes another one.
fn key() -> String {
    let packages =
        ["-W", "-f", "${Package} ${Version}\n", "libguestfs*", "lvm2", "xfsprogs", "rsync"];
    let mut digest = Sha256::new();
    digest.update(VERSION);
    digest.update(run("dpkg-query", &packages));
    hex(&digest.finalize()[..12])
}

fn build(cache: &Path, folder: &Path) {
    let packages = tempfile::Builder::new().prefix("building-").tempdir_in(cache);
    let packages = packages.expect("the cache is writable");
    let (kernel, modules) = unpack_kernel(packages.path());
    let version = modules.file_name().expect("it is named by its version").to_owned();
    let base = modules.ancestors().nth(3).expect("it is BASE/lib/modules/VERSION");
    run("depmod", &["-b".as_ref(), base.as_os_str(), version.as_os_str()]);
    // supermin takes the owner and mode of this folder from the host, which has none without a kernel.
    fs::create_dir_all("/lib/modules").expect("whole machines are made by root");
    // As `libguestfs-make-fixed-appliance` does, but that one also starts it.
    let parts = PARTS.into_iter().find(|parts| Path::new(parts).is_dir());
    let output = Command::new(find("supermin").expect("it was looked for"))
        .args(["--build", "--copy-kernel", "-f", "ext2", "--host-cpu", "x86_64", "-o"])
        .arg(folder.join("new"))
        .arg(parts.expect("libguestfs is installed"))
        .env("SUPERMIN_KERNEL", kernel)
        .env("SUPERMIN_MODULES", modules)
        .output();
    let output = output.expect("it was looked for");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for file in ["kernel", "initrd", "root"] {
        fs::rename(folder.join("new").join(file), folder.join(file)).expect("supermin made it");
    }
    fs::remove_dir(folder.join("new")).expect("nothing else was made");
    // By this file libguestfs knows it.
    fs::write(folder.join("README.fixed"), "").expect("the cache is writable");
}
