//! What a machine is besides its disks: its description, the networks and pools that this names, its
//! firmware's memory, its TPM, and the kernel it boots directly.

use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use virt::connect::Connect;
use virt::domain::Domain;
use virt_sys as sys;

use super::connection::DomainHandle;
use super::xml;
use crate::hypervisor::{HypervisorError, MachineFile, Role};
use crate::store::blocking;

/// Where libvirt keeps the state of emulated TPMs, in a folder for each domain's uuid.
const TPM_STATES: &str = "/var/lib/libvirt/swtpm";
/// The longest file that is taken along: firmware memory has up to 64 MiB, kernels and initrds more.
const FILE_LEN_MAX: u64 = 512 << 20;
/// How long the guest may stand still for its firmware's memory and its TPM to be read.
const FIRMWARE_TIMEOUT: Duration = Duration::from_secs(2);
/// Most files that a TPM's state may have.
const TPM_FILES_MAX: usize = 32;

/// The files of a machine besides its disks that its guest does not change. What cannot be read is left
/// out, with a warning.
///
/// # Errors
/// libvirt's, for the domain itself.
pub async fn of_machine(
    handle: &DomainHandle,
    domain: &xml::Domain,
    secrets: bool,
) -> Result<Vec<MachineFile>, HypervisorError> {
    let uuid = handle.address().uuid;
    let describe = move |connection: &Connect| {
        let domain = connection.lookup_domain_by_uuid_string(&uuid)?;
        descriptions(connection, &domain, secrets)
    };
    let mut files = handle.libvirt().ask("describe the machine", describe).await?;
    let (kernel, failed) = kernel(domain).await;
    for what in failed {
        tracing::warn!("{what}");
    }
    files.extend(kernel);
    Ok(files)
}

/// The descriptions of the domain, and of the networks and pools that it names. With `secrets` also
/// what libvirt otherwise leaves out, such as the passwords of its consoles.
///
/// # Errors
/// libvirt's, for the domain itself; a network or pool that is not there is left out.
fn descriptions(
    connection: &Connect,
    domain: &Domain,
    secrets: bool,
) -> Result<Vec<MachineFile>, virt::error::Error> {
    let secure = if secrets { sys::VIR_DOMAIN_XML_SECURE } else { 0 };
    let text = |name: String, role, text: String| MachineFile {
        name,
        role,
        source: None,
        content: text.into_bytes(),
    };
    let inactive = domain.xml_desc(secure | sys::VIR_DOMAIN_XML_INACTIVE)?;
    let named = xml::parse(&inactive).map(|domain| xml::read_named(&domain)).unwrap_or_default();
    let mut files = vec![text("domain.xml".into(), Role::Domain, inactive)];
    if domain.is_active()? {
        files.push(text("domain-live.xml".into(), Role::LiveDomain, domain.xml_desc(secure)?));
    }
    for network in &named.networks {
        let found = connection.lookup_network_by_name(network);
        if let Ok(description) = found.and_then(|network| network.xml_desc(0)) {
            files.push(text(file_name("network", network), Role::Network, description));
        }
    }
    let mut pools = named.pools;
    for image in &named.images {
        let folder = image.parent().map(Path::to_string_lossy).unwrap_or_default();
        let pool = connection.lookup_storage_pool_by_target_path(&folder);
        pools.extend(pool.and_then(|pool| pool.name()));
    }
    pools.sort();
    pools.dedup();
    for pool in &pools {
        let found = connection.lookup_storage_pool_by_name(pool);
        if let Ok(description) = found.and_then(|pool| pool.xml_desc(0)) {
            files.push(text(file_name("pool", pool), Role::Pool, description));
        }
    }
    Ok(files)
}

/// The file of a network or pool; a name that cannot be part of one is replaced by what it hashes to.
fn file_name(kind: &str, name: &str) -> String {
    match name.parse::<crate::names::DomainName>() {
        Ok(name) => format!("{kind}-{name}.xml"),
        Err(_) => format!("{kind}-{}.xml", repository::BlobId::of(name.as_bytes())),
    }
}

/// The files of a machine that its guest may change while it runs: its firmware's memory and its TPM.
/// Read them while the guest is frozen. Also returns what could not be read, in words: storage that hangs
/// keeps the guest for two seconds, no longer.
pub async fn firmware(domain: &xml::Domain, uuid: &str) -> (Vec<MachineFile>, Vec<String>) {
    let nvram = domain.nvram.clone();
    let tpm = domain.has_tpm.then(|| Path::new(TPM_STATES).join(uuid));
    let wanted: Vec<PathBuf> = nvram.iter().chain(&tpm).cloned().collect();
    let read = blocking(move || {
        let nvram = nvram.map(|path| (path, "nvram".to_owned(), Role::Nvram));
        let tpm = tpm.iter().flat_map(|state| tpm_files(state));
        Ok::<_, Infallible>(read_all(nvram.into_iter().chain(tpm)))
    });
    match tokio::time::timeout(FIRMWARE_TIMEOUT, read).await {
        Ok(Ok(read)) => read,
        Err(_) => {
            let silent = |path: &PathBuf| left_out(path, &io::ErrorKind::TimedOut.into());
            (Vec::new(), wanted.iter().map(silent).collect())
        }
    }
}

/// The kernel and initrd that a domain boots directly. Also returns what could not be read, in words.
async fn kernel(domain: &xml::Domain) -> (Vec<MachineFile>, Vec<String>) {
    let kernel = domain.kernel.clone().map(|path| (path, "kernel".to_owned(), Role::Kernel));
    let initrd = domain.initrd.clone().map(|path| (path, "initrd".to_owned(), Role::Initrd));
    let read = blocking(move || Ok::<_, Infallible>(read_all(kernel.into_iter().chain(initrd))));
    let Ok(read) = read.await;
    read
}

/// The files below the folder of a TPM's state, one folder deep: `tpm2/tpm2-00.permall`.
fn tpm_files(state: &Path) -> Vec<(PathBuf, String, Role)> {
    let entries = |folder: &Path| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        paths.sort();
        paths
    };
    let mut files = Vec::new();
    for folder in entries(state) {
        for path in entries(&folder).into_iter().filter(|path| path.is_file()) {
            let part =
                |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let name = format!("tpm-{}-{}", part(&folder), part(&path));
            // Locks and sockets are of this host, and what swtpm has not given its name is half written.
            let unfinished = part(&path).starts_with("TMP");
            if !unfinished && !name.ends_with(".lock") && files.len() < TPM_FILES_MAX {
                files.push((path, name, Role::Tpm));
            }
        }
    }
    files
}

fn read_all(
    files: impl Iterator<Item = (PathBuf, String, Role)>,
) -> (Vec<MachineFile>, Vec<String>) {
    let (mut read, mut failed) = (Vec::new(), Vec::new());
    for (path, name, role) in files {
        match read_bounded(&path) {
            Ok(content) => {
                let source = Some(path.to_string_lossy().into_owned());
                read.push(MachineFile { name, role, source, content });
            }
            Err(error) => failed.push(left_out(&path, &error)),
        }
    }
    (read, failed)
}

fn left_out(path: &Path, error: &io::Error) -> String {
    format!("{} is not in the backup: {error}", path.display())
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    File::open(path)?.take(FILE_LEN_MAX + 1).read_to_end(&mut content)?;
    match content.len() as u64 > FILE_LEN_MAX {
        true => Err(io::ErrorKind::FileTooLarge.into()),
        false => Ok(content),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tpm_state_has_no_locks_and_nothing_half_written() {
        let state = tempfile::tempdir().unwrap();
        let folder = state.path().join("tpm2");
        fs::create_dir(&folder).unwrap();
        for file in [".lock", "TMP2-00.permall", "tpm2-00.permall"] {
            fs::write(folder.join(file), file).unwrap();
        }

        let files = tpm_files(state.path());

        let wanted = (folder.join("tpm2-00.permall"), "tpm-tpm2-tpm2-00.permall".into(), Role::Tpm);
        assert_eq!(files, [wanted]);
    }

    #[tokio::test]
    async fn p2_storage_of_the_firmware_that_hangs_does_not_keep_the_guest() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("nvram");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let domain = xml::Domain { nvram: Some(pipe.clone()), ..xml::Domain::default() };

        // Whoever opens it waits for somebody who writes to it.
        let (read, unread) = firmware(&domain, "").await;

        assert!(read.is_empty());
        assert_eq!(unread, [format!("{} is not in the backup: timed out", pipe.display())]);
        // Nobody waits any more.
        File::options().read(true).write(true).open(&pipe).unwrap();
    }
}
