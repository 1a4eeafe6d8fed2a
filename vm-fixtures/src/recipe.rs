//! Builds the guest: kernel and modules from Debian's packages, static busybox, the guest agent and
//! the oracle, all in one initramfs.
//!
//! What takes time is built once and kept in `$XDG_CACHE_HOME/kvmsnap-fixtures/<key>`, where the
//! key is the digest of everything that decides the outcome. The oracle changes with every build of
//! this crate, so it is appended as a second archive when a guest starts.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::SystemTime;
use std::{collections::BTreeMap, env};

use sha2::{Digest as _, Sha256};

use crate::cpio::Archive;
use crate::tools::{find, run, run_unchecked, shared_libraries};

const INIT: &str = include_str!("../guest/init");
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
const AGENT_PACKAGE: &str = "qemu-guest-agent";
/// The drivers of the guest. What they need is looked up; what the kernel has built in is skipped.
const MODULES: [&str; 7] =
    ["virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "virtio_console", "ext4", "xfs"];
/// Those of a guest that plays the host, which loads them itself.
const MAPPER_MODULES: [&str; 2] = ["dm_snapshot", "dm_thin_pool"];
/// Raise this when the outcome changes for a reason that no other part of the key shows.
const RECIPE_VERSION: &str = "1";

/// A kernel and the first, cached part of its initramfs.
#[derive(Debug)]
pub(crate) struct System {
    pub(crate) kernel: PathBuf,
    base: PathBuf,
}

impl System {
    /// The cached system, built first where it is missing. Several processes may ask at once.
    #[track_caller]
    pub(crate) fn get() -> Self {
        let cache = cache_folder();
        let folder = cache.join(key());
        if !folder.is_dir() {
            build(&cache, &folder);
        }
        Self { kernel: folder.join("kernel"), base: folder.join("base.cpio") }
    }

    /// Writes the whole initramfs: the cached part, then the oracle.
    #[track_caller]
    pub(crate) fn write_initramfs(&self, to: &Path) {
        let mut bytes = fs::read(&self.base).expect("the cached system is complete");
        bytes.extend_from_slice(oracle_archive());
        fs::write(to, bytes).unwrap_or_else(|error| panic!("{}: {error}", to.display()));
    }
}

pub(crate) fn cache_folder() -> PathBuf {
    let cache = match env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        Some(cache) => PathBuf::from(cache),
        None => env::home_dir().expect("the user has a home folder").join(".cache"),
    };
    let folder = cache.join("kvmsnap-fixtures");
    fs::create_dir_all(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    folder
}

/// The digest of the recipe and of the system it takes libraries from.
fn key() -> String {
    let mut digest = Sha256::new();
    let release = fs::read("/etc/os-release").unwrap_or_default();
    let modules = [&MODULES[..], &MAPPER_MODULES].concat().join(" ");
    for part in [RECIPE_VERSION, INIT, KERNEL_PACKAGE, AGENT_PACKAGE, &modules] {
        digest.update(part);
        digest.update([0]);
    }
    digest.update(release);
    hex(&digest.finalize()[..12])
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn build(cache: &Path, folder: &Path) {
    let lock = File::create(cache.join("lock")).expect("the cache is writable");
    // A build takes seconds; who waits here finds it done. The lock dies with its process.
    lock.lock().expect("the cache is on a file system with locks");
    if folder.is_dir() {
        return;
    }
    let scratch = tempfile::Builder::new().prefix("building-").tempdir_in(cache);
    let scratch = scratch.expect("the cache is writable");
    let packages = scratch.path().join("packages");
    fs::create_dir(&packages).expect("the folder is new");
    let (kernel, _) = unpack_kernel(&packages);
    download(&packages, &[AGENT_PACKAGE]);

    let result = scratch.path().join("result");
    fs::create_dir(&result).expect("the folder is new");
    fs::copy(kernel, result.join("kernel")).expect("the kernel is readable");
    fs::write(result.join("base.cpio"), base_archive(&packages)).expect("the cache is writable");
    fs::rename(&result, folder).expect("nobody else builds under the lock");
}

/// Downloads and unpacks the kernel into a folder: its file, and the folder of its modules.
#[track_caller]
pub(crate) fn unpack_kernel(folder: &Path) -> (PathBuf, PathBuf) {
    let wanted = kernel_packages();
    download(folder, &wanted.iter().map(String::as_str).collect::<Vec<_>>());
    let modules = ["usr/lib/modules", "lib/modules"].map(|modules| folder.join(modules));
    let modules = modules.iter().find(|folder| folder.is_dir()).expect("a kernel has modules");
    let modules = only_file(modules, "");
    // From Debian 14 on it lies beside its modules.
    let kernel = match folder.join("boot") {
        boot if boot.is_dir() => only_file(&boot, "vmlinuz-"),
        _ => modules.join("vmlinuz"),
    };
    (kernel, modules)
}

/// `linux-image-cloud-amd64` is empty and depends on the kernel of the day, which is in packages of its
/// own from Debian 14 on.
fn kernel_packages() -> Vec<String> {
    let hint = "apt knows no kernel: `apt-get update` fetches its lists";
    let image = depends(KERNEL_PACKAGE, &["linux-image-"]).pop().expect(hint);
    let parts = depends(&image, &["linux-binary-", "linux-modules-"]);
    [vec![image], parts].concat()
}

/// The packages of these names that one depends on.
fn depends(package: &str, names: &[&str]) -> Vec<String> {
    let listing = run("apt-cache", &["depends", "--important", package]);
    let lines = listing.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    let wanted = |package: &&str| names.iter().any(|name| package.starts_with(name));
    lines.filter(wanted).map(str::to_owned).collect()
}

/// Downloads packages and unpacks them into one folder; nothing is installed.
fn download(folder: &Path, packages: &[&str]) {
    let script = r#"cd "$0" && exec apt-get -q -y download "$@""#;
    let mut args = vec!["-c", script, folder.to_str().expect("the cache's path is text")];
    args.extend(packages);
    let (success, stdout, stderr) = run_unchecked("sh", &args);
    let hint = "`apt-get update` may help when a package has been replaced";
    assert!(success, "cannot download {packages:?} ({hint}):\n{stdout}{stderr}");
    for entry in fs::read_dir(folder).expect("the folder is ours") {
        let package = entry.expect("the folder is ours").path();
        if package.extension().is_some_and(|extension| extension == "deb") {
            run("dpkg-deb", &["-x".as_ref(), package.as_os_str(), folder.as_os_str()]);
        }
    }
}

fn base_archive(packages: &Path) -> Vec<u8> {
    let mut archive = Archive::default();
    for folder in ["dev", "proc", "sys", "run", "tmp", "mnt", "etc", "sbin", "var/run"] {
        archive.directory(folder);
    }
    archive.file("init", INIT.as_bytes());
    let busybox = find("busybox").expect("package busybox-static is installed");
    add_file(&mut archive, "bin/busybox", &busybox);
    archive.symlink("bin/sh", "busybox");
    add_program(&mut archive, "sbin/qemu-ga", &packages.join("usr/sbin/qemu-ga"));
    add_modules(&mut archive, packages);
    archive.finish()
}

fn add_file(archive: &mut Archive, as_path: &str, from: &Path) {
    let bytes = fs::read(from).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
    archive.file(as_path, &bytes);
}

fn add_program(archive: &mut Archive, as_path: &str, program: &Path) {
    add_file(archive, as_path, program);
    for library in shared_libraries(program) {
        add_file(archive, library.to_str().expect("libraries have plain names"), &library);
    }
}

/// Adds the modules, and the lists in which each comes after those it needs: `order`, and then
/// `device-mapper`.
fn add_modules(archive: &mut Archive, packages: &Path) {
    let mut files = BTreeMap::new();
    let folder = ["usr/lib/modules", "lib/modules"].map(|modules| packages.join(modules));
    collect_modules(folder.iter().find(|folder| folder.is_dir()).expect("a kernel"), &mut files);
    let (mut order, mut listed) = (Vec::new(), 0);
    for (list, modules) in [("order", &MODULES[..]), ("device-mapper", &MAPPER_MODULES)] {
        for module in modules {
            add_module(archive, module, &files, &mut order);
        }
        let lines: String = order[listed..].iter().map(|module| format!("{module}.ko\n")).collect();
        archive.file(&format!("lib/modules/{list}"), lines.as_bytes());
        listed = order.len();
    }
}

fn collect_modules(folder: &Path, files: &mut BTreeMap<String, PathBuf>) {
    for entry in
        fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
    {
        let path = entry.expect("the folder is ours").path();
        if path.is_dir() && !path.is_symlink() {
            collect_modules(&path, files);
        } else if let Some(name) = path.file_name().and_then(|name| name.to_str())
            && let Some((module, "ko" | "ko.xz" | "ko.zst" | "ko.gz")) = name.split_once('.')
        {
            files.insert(module.replace('-', "_"), path);
        }
    }
}

fn add_module(
    archive: &mut Archive,
    module: &str,
    files: &BTreeMap<String, PathBuf>,
    order: &mut Vec<String>,
) {
    let Some(path) = files.get(module).filter(|_| !order.iter().any(|known| known == module))
    else {
        return;
    };
    let bytes = read_module(path);
    // The module itself says what it needs, in the section that `depmod` reads too.
    let marker = b"\0depends=";
    let start = bytes.windows(marker.len()).position(|window| window == marker);
    let needed = &bytes[start.map_or(bytes.len(), |start| start + marker.len())..];
    let needed = needed.split(|byte| *byte == 0).next().unwrap_or_default();
    for needed in String::from_utf8_lossy(needed).split(',').filter(|name| !name.is_empty()) {
        add_module(archive, &needed.replace('-', "_"), files, order);
    }
    archive.file(&format!("lib/modules/{module}.ko"), &bytes);
    order.push(module.to_owned());
}

/// Newer kernels compress their modules; busybox loads plain ones only.
fn read_module(path: &Path) -> Vec<u8> {
    let unpacker = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())),
    };
    let output = Command::new(unpacker).arg("-dc").arg(path).output();
    let output = output.unwrap_or_else(|error| panic!("cannot start `{unpacker}`: {error}"));
    assert!(output.status.success(), "`{unpacker}` cannot unpack {}", path.display());
    output.stdout
}

fn only_file(folder: &Path, prefix: &str) -> PathBuf {
    let entries =
        fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths = entries.map(|entry| entry.expect("the folder is ours").path());
    let named = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))
    };
    paths.find(named).unwrap_or_else(|| panic!("no {prefix}… in {}", folder.display()))
}

/// The oracle and its libraries, as a second archive.
fn oracle_archive() -> &'static [u8] {
    static ARCHIVE: OnceLock<Vec<u8>> = OnceLock::new();
    ARCHIVE.get_or_init(|| {
        let mut archive = Archive::default();
        add_program(&mut archive, "bin/oracle", &oracle_program());
        archive.finish()
    })
}

/// Where the oracle's program is on the host; built first where it is missing or older than its source.
///
/// `KVMSNAP_ORACLE` names another one.
///
/// # Panics
///
/// When it cannot be built.
#[track_caller]
pub fn oracle_program() -> PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| {
        if let Some(named) = env::var_os("KVMSNAP_ORACLE") {
            return PathBuf::from(named);
        }
        let own = env::current_exe().expect("a running program has a path");
        // Tests are in `<target>/<profile>/deps`, programs one above.
        let mut folder = own.parent().expect("programs are in folders");
        if folder.ends_with("deps") || folder.ends_with("examples") {
            folder = folder.parent().expect("cargo's target folder has a name");
        }
        let program = folder.join("oracle");
        if !is_current(&program) {
            build_oracle(folder);
        }
        program
    });
    program.clone()
}

fn is_current(program: &Path) -> bool {
    let built = fs::metadata(program).and_then(|metadata| metadata.modified());
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    built.is_ok_and(|built| newest(&source) <= built)
}

/// When a file below this path was last written. Folders do not count: cargo does not look at them.
fn newest(path: &Path) -> SystemTime {
    let below =
        fs::read_dir(path).into_iter().flatten().flatten().map(|entry| newest(&entry.path()));
    let own = fs::metadata(path).ok().filter(fs::Metadata::is_file);
    let own = own.and_then(|metadata| metadata.modified().ok());
    below.chain(own).max().unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Cargo builds a library's programs only for its own tests, so other crates' tests ask for it here.
fn build_oracle(folder: &Path) {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "--package", "vm-fixtures", "--bin", "oracle"]);
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command.arg("--target-dir").arg(folder.parent().expect("cargo's target folder has a name"));
    if folder.ends_with("release") {
        command.arg("--release");
    }
    let status = command.status().unwrap_or_else(|error| panic!("cannot start cargo: {error}"));
    assert!(status.success(), "cannot build the oracle: {status}");
}
