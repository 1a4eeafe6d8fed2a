//! A machine that comes back is defined: what the plan says is done, and undone where libvirt refuses.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use virt::connect::Connect;
use virt_sys as sys;

use super::host::Host;
use super::plan::{Copy, Place, Plan};
use super::{RestoreError, files};
use crate::effect;
use crate::hypervisor::HypervisorError;
use crate::hypervisor::libvirt::connection::Libvirt;
use crate::hypervisor::libvirt::{self, xml};

/// The description as it was meant for this host, where libvirt did not take it.
const PLANNED: &str = "planned.xml";

/// Why a machine cannot be defined.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DefineError {
    /// The backup is one of a QEMU that libvirt does not manage.
    #[error("the backup holds no description of the machine")]
    NoDescription,
    /// The stored description is no XML.
    #[error("the description in the backup cannot be read")]
    Description(#[source] xmltree::ParseError),
    /// A domain has the name.
    #[error("a domain `{name}` is here already")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// A domain has the uuid.
    #[error("the domain `{by}` has the uuid {uuid}")]
    UuidTaken {
        /// The uuid.
        uuid: String,
        /// The domain.
        by: String,
    },
    /// A domain has the MAC address.
    #[error("the domain `{by}` has the MAC address {mac}")]
    MacTaken {
        /// The address.
        mac: String,
        /// The domain.
        by: String,
    },
    /// The host has no QEMU for such a machine, or no KVM.
    #[error("this host cannot run `{kind}` machines of the architecture {arch}")]
    CannotRun {
        /// `kvm`, `qemu`.
        kind: String,
        /// The architecture.
        arch: String,
    },
    /// Neither the machine type nor another one of its family is known.
    #[error("QEMU on this host knows neither the machine type {machine} nor one like it")]
    NoMachine {
        /// The machine type.
        machine: String,
        /// The architecture.
        arch: String,
    },
    /// A TPM's state is where that of the machine would go.
    #[error("{} exists already: it is the state of another TPM", .state.display())]
    TpmTaken {
        /// Its folder.
        state: PathBuf,
    },
    /// The machine would not start.
    #[error("the machine could not be started here: {}", .obstacles.join("; "))]
    CannotStart {
        /// What keeps it from starting.
        obstacles: Vec<String>,
    },
    /// QEMU would not reach the disks.
    #[error("QEMU's user {user} may not search {}", .folder.display())]
    Barred {
        /// The user.
        user: String,
        /// The first folder that is closed.
        folder: PathBuf,
    },
    /// There is no such pool.
    #[error("libvirt has no storage pool `{pool}`")]
    NoPool {
        /// What was asked for.
        pool: String,
    },
    /// The pool keeps no files.
    #[error(
        "the storage pool `{pool}` is of the type {kind}: only pools of the type dir take images"
    )]
    PoolKind {
        /// The pool.
        pool: String,
        /// Its type.
        kind: String,
    },
    /// The pool does not run.
    #[error("the storage pool `{pool}` is not active")]
    PoolInactive {
        /// The pool.
        pool: String,
    },
    /// A file could not be written.
    #[error(transparent)]
    Write(#[from] RestoreError),
    /// libvirt failed before anything was done.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// Something failed after the disks were restored.
    #[error("the machine is not defined; its disks are restored, its description is {}", .planned.display())]
    Undone {
        /// The description as it was to be defined.
        planned: PathBuf,
        /// What failed.
        source: Box<DefineError>,
    },
    /// The domain is defined and does not start.
    #[error("the domain `{name}` is restored and defined, but does not start")]
    NotStarted {
        /// Its name.
        name: String,
        /// Why.
        source: Box<HypervisorError>,
    },
}

impl DefineError {
    /// What the user can do next.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::NoDescription => "without --define its disks can be restored",
            Self::NameTaken { .. } => {
                "--name gives it another one, --in-place restores into the one that is here"
            }
            Self::UuidTaken { .. } | Self::MacTaken { .. } => {
                "without --keep-identity it gets a new uuid and new MAC addresses"
            }
            Self::CannotRun { kind, .. } if kind == "kvm" => {
                "is /dev/kvm there? Without --define the disks and domain.xml can be restored and adapted"
            }
            Self::NoMachine { .. } => {
                "without --define the disks and domain.xml can be restored and adapted"
            }
            Self::CannotStart { .. } => "mend that, or leave out --start",
            Self::Barred { folder, .. } => {
                return Some(format!(
                    "`chmod o+x {}`, or restore below /var/lib/libvirt/images",
                    folder.display()
                ));
            }
            Self::NoPool { .. } => "`virsh pool-list --all` shows what there is",
            Self::PoolInactive { pool } => {
                return Some(format!("`virsh pool-start {pool}` starts it"));
            }
            Self::Undone { planned, .. } => {
                return Some(format!("once that is mended: `virsh define {}`", planned.display()));
            }
            Self::Write(error) => return error.hint().map(str::to_owned),
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

/// Refuses a folder that QEMU's user cannot reach, and files that would be written over.
///
/// # Errors
/// [`DefineError::Barred`], [`RestoreError::Exists`].
pub fn check(
    plan: &Plan,
    host: &Host,
    place: &Place,
    is_left: impl Fn(&Copy) -> bool,
) -> Result<(), DefineError> {
    let folder = std::path::absolute(&place.folder).unwrap_or_else(|_| place.folder.clone());
    if let Some(user) = host.qemu_user
        && let Some(folder) = user.barred_from(&folder)
    {
        return Err(DefineError::Barred { user: user.name(), folder });
    }
    // A kernel may be there from the restore of another disk; the memory of a firmware is written to.
    match plan
        .copies
        .iter()
        .filter(|copy| copy.to.extension().is_some_and(|e| e == "fd") && copy.to.exists())
        .find(|copy| !is_left(copy))
    {
        Some(copy) => Err(RestoreError::Exists { path: copy.to.clone() }.into()),
        None => Ok(()),
    }
}

/// The folder of a storage pool.
///
/// # Errors
/// [`DefineError::NoPool`], [`DefineError::PoolKind`], [`DefineError::PoolInactive`], libvirt's.
pub async fn pool_folder(libvirt: &Libvirt, pool: &str) -> Result<PathBuf, DefineError> {
    let name = pool.to_owned();
    let look = move |connection: &Connect| {
        let known = connection.list_all_storage_pools(0)?;
        for known in known {
            if known.name()? == name {
                return Ok(Some((known.is_active()?, known.xml_desc(0)?)));
            }
        }
        Ok(None)
    };
    let found = libvirt.ask("describe the storage pool", look).await?;
    let pool = pool.to_owned();
    let Some((is_active, description)) = found else { return Err(DefineError::NoPool { pool }) };
    let description = xml::parse(&description).map_err(HypervisorError::Xml)?;
    let kind = description.attributes.get("type").cloned().unwrap_or_default();
    if kind != "dir" {
        return Err(DefineError::PoolKind { pool, kind });
    }
    if !is_active {
        return Err(DefineError::PoolInactive { pool });
    }
    let target = description.get_child("target").and_then(|target| xml::text(target, "path"));
    Ok(PathBuf::from(target.unwrap_or_default()))
}

/// Lets libvirt see what is new in a storage pool.
///
/// # Errors
/// libvirt's.
pub async fn refresh_pool(libvirt: &Libvirt, pool: &str) -> Result<(), HypervisorError> {
    let pool = pool.to_owned();
    let refresh = move |connection: &Connect| {
        connection.lookup_storage_pool_by_name(&pool)?.refresh(0).map(drop)
    };
    change(libvirt, "look at the storage pool again", refresh).await
}

/// What was made, to be undone where the next step fails.
#[derive(Debug, Default)]
struct Made {
    networks: Vec<String>,
    tpm: Option<PathBuf>,
}

/// Defines the machine, whose disks are there. `contents` are those of the plan's copies, `networks`
/// the descriptions of networks by name.
///
/// # Errors
/// [`DefineError::Undone`]; then nothing of it is left in libvirt.
pub async fn define(
    libvirt: &Libvirt,
    plan: &Plan,
    place: &Place,
    contents: Vec<(PathBuf, Vec<u8>)>,
    networks: &BTreeMap<String, String>,
) -> Result<(), DefineError> {
    let mut made = Made::default();
    let Err(source) = try_define(libvirt, plan, contents, networks, &mut made).await else {
        return Ok(());
    };
    undo(libvirt, made).await;
    let planned = place.file(PLANNED);
    files::write_new(&planned, xml::write(&plan.domain).as_bytes())?;
    Err(DefineError::Undone { planned, source: Box::new(source) })
}

async fn try_define(
    libvirt: &Libvirt,
    plan: &Plan,
    contents: Vec<(PathBuf, Vec<u8>)>,
    networks: &BTreeMap<String, String>,
    made: &mut Made,
) -> Result<(), DefineError> {
    if let Some(state) = &plan.tpm {
        make_folder(state, 0o711)?;
        made.tpm = Some(state.clone());
    }
    for (path, content) in contents {
        if let Some(folder) = path.parent().filter(|folder| !folder.exists()) {
            make_folder(folder, 0o700)?;
        }
        files::write_new(&path, &content)?;
    }
    for name in &plan.networks {
        let description = networks.get(name).cloned().unwrap_or_default();
        made.networks.push(name.clone());
        let start = move |connection: &Connect| {
            let network = connection.define_network_xml(&description)?;
            if !network.is_active()? {
                network.create()?;
            }
            Ok(())
        };
        change(libvirt, &format!("define and start the network `{name}`"), start).await?;
    }
    // While disks were restored somebody may have defined it: a definition is not written over either.
    let known = libvirt::domains(libvirt).await?;
    if let Some(here) = known.iter().find(|here| here.uuid == plan.uuid) {
        return Err(DefineError::UuidTaken { uuid: plan.uuid.clone(), by: here.name.clone() });
    }
    let description = xml::write(&plan.domain);
    let define = move |connection: &Connect| {
        connection.define_domain_xml_flags(&description, sys::VIR_DOMAIN_DEFINE_VALIDATE).map(drop)
    };
    Ok(change(libvirt, "define the domain", define).await?)
}

/// Starts the machine.
///
/// # Errors
/// [`DefineError::NotStarted`].
pub async fn start(libvirt: &Libvirt, plan: &Plan) -> Result<(), DefineError> {
    let domain = libvirt.domain(&plan.uuid);
    let start = |domain: &virt::domain::Domain| match domain.is_active()? {
        true => Ok(()),
        false => domain.create(),
    };
    let started = domain.change("start the domain", start).await;
    started.map_err(|source| {
        let source = Box::new(source);
        DefineError::NotStarted { name: plan.name.clone(), source }
    })
}

/// Removes what was made. What cannot be removed is told.
async fn undo(libvirt: &Libvirt, made: Made) {
    for name in made.networks {
        let wanted = name.clone();
        let remove = move |connection: &Connect| {
            let networks = connection.list_all_networks(0)?;
            for network in networks {
                if network.name()? == wanted {
                    if network.is_active()? {
                        network.destroy()?;
                    }
                    network.undefine()?;
                }
            }
            Ok(())
        };
        if let Err(error) = change(libvirt, "undefine the network", remove).await {
            tracing::error!(%error, "the network `{name}` stays");
        }
    }
    if let Some(state) = made.tpm
        && let Err(error) = fs::remove_dir_all(&state)
    {
        tracing::error!(%error, "{} stays", state.display());
    }
}

fn make_folder(folder: &Path, mode: u32) -> Result<(), RestoreError> {
    let write = |source| RestoreError::Write { path: folder.to_owned(), source };
    effect::about_to("restore: folder").map_err(write)?;
    fs::DirBuilder::new().mode(mode).create(folder).map_err(write)
}

/// Changes something by a call that may be made twice.
async fn change<T: Send + 'static>(
    libvirt: &Libvirt,
    step: &str,
    work: impl Fn(&Connect) -> Result<T, virt::error::Error> + Clone + Send + 'static,
) -> Result<T, HypervisorError> {
    effect::about_to(&format!("libvirt: {step}"))
        .map_err(|source| HypervisorError::Host { step: step.to_owned(), source })?;
    libvirt.ask(step, work).await
}
