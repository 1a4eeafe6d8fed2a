//! Disks become those of another machine of their flavour: their file systems are made equal to a tree.

use std::path::PathBuf;

use crate::appliance::look::Layout;
use crate::appliance::{Appliance, ApplianceError, Drive, Options};
use crate::fit::{self, BootLoaderWants, Misfit, Mount, Plan, Table};
use crate::flavour::Flavour;
use crate::initramfs;
use crate::rsync::{Change, Compare, Item, Pass, Tree, TreeError, table_options};

/// File systems that may hold a machine's files.
pub(crate) const KINDS: [&str; 6] = ["ext2", "ext3", "ext4", "xfs", "btrfs", "vfat"];
/// How many changed files an error names.
const NAMED_MAX: usize = 10;
/// What `grub-install` writes: on disks that have it already, the tree's is another's.
const BOOT_LOADER_FILES: [&str; 6] = [
    "/boot/grub/i386-pc/",
    "/boot/grub/x86_64-efi/",
    "/boot/grub/fonts/",
    "/boot/grub/locale/",
    "/boot/grub2/i386-pc/",
    "/boot/efi/EFI/BOOT/",
];
/// Where a boot loader's package has its files.
const BOOT_LOADER_PACKAGE: [&str; 3] = ["usr/lib/grub/", "usr/sbin/grub", "usr/lib/shim/"];
/// rsync(1), "EXIT VALUES".
const PARTIAL: i32 = 23;
const VANISHED: i32 = 24;

/// What is wanted.
#[derive(Debug)]
pub struct Request {
    /// Overlays on a template's disks, in their order. They are written to.
    pub drives: Vec<PathBuf>,
    /// The files of the machine.
    pub tree: Tree,
    /// How files are compared; by content where the user leaves it open, unless these disks were made from
    /// this tree before.
    pub compare: Option<Compare>,
    /// What stays as the template has it.
    pub excludes: Vec<String>,
    /// Which machine these disks were brought up to date as before. Its boot loader is theirs already, and is
    /// installed again only when the tree has another.
    pub made_as: Option<String>,
    /// Whether that was from this tree.
    pub is_same_tree: bool,
    /// How the appliance runs.
    pub appliance: Options,
}

/// Why disks were not brought up to date. What was written to them is worth nothing then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UpdateError {
    /// The appliance.
    #[error(transparent)]
    Appliance(#[from] ApplianceError),
    /// The tree.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The machines are not of one flavour.
    #[error("the tree does not fit the template: {}", list(.0))]
    Misfit(Vec<Misfit>),
    /// The tree did not hold still.
    #[error("the tree changed while it was copied: {}", .0.join(", "))]
    TreeChanged(Vec<String>),
    /// The tree has more than the template's file systems can hold.
    #[error("the tree's files do not fit into the template's file systems")]
    Full(#[source] ApplianceError),
    /// The template's machine has no table of file systems.
    #[error("none of the template's file systems has an etc/fstab (encrypted ones are not opened)")]
    NoSystem,
    /// Its table names another disk.
    #[error("the template's etc/fstab has its root at {0}, which is none of its file systems")]
    RootElsewhere(String),
}

fn list(misfits: &[Misfit]) -> String {
    misfits.iter().map(Misfit::to_string).collect::<Vec<_>>().join("; ")
}

/// What happens meanwhile.
#[derive(Debug)]
pub enum Event<'a> {
    /// What is done from here on, in words.
    Stage(&'static str),
    /// A file that differs.
    Item(&'a Item),
    /// Bytes that were exchanged so far with where the tree is.
    Sent(u64),
}

/// What was done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// How many files were not there.
    pub added: u64,
    /// How many had another content, target or device number.
    pub changed: u64,
    /// How many had other owners, modes, times or attributes only.
    pub metadata: u64,
    /// How many are not in the tree.
    pub deleted: u64,
    /// Bytes of the files that were added or changed.
    pub file_bytes: u64,
    /// UUIDs, labels and such that were set, in words.
    pub identities: Vec<String>,
    /// What was left as it is, and why.
    pub skipped: Vec<(String, String)>,
    /// What was done so that it starts, in words.
    pub boot: Vec<String>,
    /// What the tree's machine calls itself.
    pub hostname: Option<String>,
}

impl Report {
    fn count(&mut self, item: &Item) {
        let counter = match item.change {
            Change::Added => &mut self.added,
            Change::Content => &mut self.changed,
            Change::Metadata => &mut self.metadata,
            Change::Deleted => &mut self.deleted,
        };
        *counter += 1;
        if matches!(item.change, Change::Added | Change::Content) {
            self.file_bytes += item.len;
        }
    }
}

/// What an appliance found on a machine's disks.
#[derive(Debug)]
pub struct System {
    pub(crate) layout: Layout,
    pub(crate) table: Table,
    /// The fingerprint of it.
    pub flavour: Flavour,
}

/// Makes the file systems whole, and finds the machine's own table of them.
///
/// # Errors
/// [`UpdateError`].
pub async fn look(appliance: &mut Appliance) -> Result<System, UpdateError> {
    let layout = appliance.layout().await?;
    let holders: Vec<_> = layout
        .holders()
        .filter(|(_, kind)| KINDS.contains(kind))
        .map(|(device, kind)| (device.name.clone(), kind.to_owned()))
        .collect();
    let mut tables = Vec::new();
    for (device, kind) in &holders {
        appliance.check(device, kind).await?;
        if let Some(text) = appliance.table(device, kind).await? {
            tables.push((device, Table::new(&text)));
        }
    }
    // A backup of some system's etc may lie about; the machine's own says where it is itself.
    let is_own = |(device, table): &(&String, Table)| {
        table.mounts(&layout).iter().any(|(name, at)| at == "/" && name == *device)
    };
    let own = tables.iter().position(is_own).ok_or_else(|| {
        let wanted = tables.iter().flat_map(|(_, table)| &table.entries);
        let root = wanted.clone().find(|entry| entry.path == "/");
        root.map_or(UpdateError::NoSystem, |entry| {
            UpdateError::RootElsewhere(printable(&entry.spec))
        })
    })?;
    let (_, table) = tables.swap_remove(own);
    let flavour = layout.flavour(&table.mounts(&layout));
    Ok(System { layout, table, flavour })
}

/// Starts an appliance with a machine's disks and tells their flavour. The disks may be written to.
///
/// # Errors
/// [`UpdateError`].
pub async fn flavour(drives: &[PathBuf], options: &Options) -> Result<Flavour, UpdateError> {
    let mut appliance = Appliance::start(&as_drives(drives), options).await?;
    let flavour = look(&mut appliance).await?.flavour;
    appliance.end().await?;
    Ok(flavour)
}

pub(crate) fn as_drives(drives: &[PathBuf]) -> Vec<Drive> {
    drives.iter().map(|path| Drive { path: path.clone() }).collect()
}

/// Brings disks up to date. Calls `on` meanwhile.
///
/// # Errors
/// [`UpdateError`].
pub async fn update(
    request: &Request,
    mut on: impl FnMut(Event<'_>),
) -> Result<(Report, Flavour), UpdateError> {
    request.tree.probe()?;
    on(Event::Stage("starting the appliance"));
    let mut appliance = Appliance::start(&as_drives(&request.drives), &request.appliance).await?;
    on(Event::Stage("looking at the template's file systems"));
    let system = look(&mut appliance).await?;
    on(Event::Stage("looking at the tree"));
    let (plan, relabels, hostname) = fit_tree(&mut appliance, &system, &request.tree).await?;

    let mut report = Report { hostname, ..Report::default() };
    for (entry, why) in &plan.skipped {
        report.skipped.push((entry.clone(), (*why).to_owned()));
    }
    let exact_times = prepare(&mut appliance, &plan, &mut report).await?;

    let is_own = request.made_as.is_some() && request.made_as == report.hostname;
    let how = Copying { request, is_own, exact_times, plan: &plan };
    let installs = copy_files(&mut appliance, &how, &mut report, &mut on).await?;

    on(Event::Stage("having it start from these disks"));
    appliance.step("make the folders that a system needs", &["places"]).await?;
    if relabels {
        appliance.step("have SELinux label the files", &["relabel"]).await?;
        report.boot.push("SELinux labels all files when it first starts".to_owned());
    }
    if installs {
        install_boot_loader(&mut appliance, &system, &plan, &mut report).await?;
    }
    on(Event::Stage("having its kernels find these disks"));
    initramfs::fit(&mut appliance, &system.layout, &plan, is_own, &mut report).await?;
    appliance.end().await?;
    Ok((report, system.flavour))
}

/// What decides how files are copied.
struct Copying<'a> {
    request: &'a Request,
    /// Whether the disks were made for the tree's machine.
    is_own: bool,
    /// Whether their file systems keep parts of a second.
    exact_times: bool,
    plan: &'a Plan,
}

/// Makes the mounted files equal to the tree's, and makes sure that they are. Whether the boot loader has to be
/// installed.
async fn copy_files(
    appliance: &mut Appliance,
    &Copying { request, is_own, exact_times, plan }: &Copying<'_>,
    report: &mut Report,
    on: &mut impl FnMut(Event<'_>),
) -> Result<bool, UpdateError> {
    initramfs::put_aside(appliance).await?;
    on(Event::Stage("copying files"));
    let mut excludes = request.excludes.clone();
    if is_own {
        excludes.extend(BOOT_LOADER_FILES.map(str::to_owned));
    }
    let by_default = if is_own && request.is_same_tree { Compare::Time } else { Compare::Content };
    let compare = request.compare.unwrap_or(by_default);
    let mut pass = Pass { compare, exact_times, dry_run: false, excludes };
    let mut installs = !is_own;
    run(appliance, &request.tree, &pass, |event| {
        if let Event::Item(item) = &event {
            let is_its = BOOT_LOADER_PACKAGE.iter().any(|prefix| item.path.starts_with(prefix));
            installs |= is_its && !item.is_folder;
            report.count(item);
        }
        on(event);
    })
    .await?;
    on(Event::Stage("comparing"));
    (pass.dry_run, pass.compare) = (true, Compare::Time);
    let mut differing = Vec::new();
    run(appliance, &request.tree, &pass, |event| {
        // vfat keeps neither owners nor exact times: there everything always differs.
        let is_plain = |item: &Item| {
            let path = format!("/{}", item.path);
            let is_below = |mount: &Mount| {
                path.strip_prefix(&mount.path).is_some_and(|rest| rest.starts_with('/'))
            };
            plan.mounts.iter().any(|mount| mount.is_plain && is_below(mount))
        };
        if let Event::Item(item) = event
            && !is_plain(item)
        {
            differing.push(item.path.clone());
        }
    })
    .await?;
    if differing.is_empty() {
        return Ok(installs);
    }
    differing.truncate(NAMED_MAX);
    Err(UpdateError::TreeChanged(differing))
}

/// Joins the tree's machine with the template's. Also whether SELinux is to label all files anew, and what
/// the machine calls itself.
async fn fit_tree(
    appliance: &mut Appliance,
    system: &System,
    tree: &Tree,
) -> Result<(Plan, bool, Option<String>), UpdateError> {
    let options = table_options();
    let source = tree.open(&options).await?;
    appliance.fetch_tree_files(source, &options).await?;
    let table = Table::new(&appliance.tree_file("etc/fstab").await?);
    let mut config = appliance.tree_file("boot/grub/grub.cfg").await?;
    if config.is_empty() {
        config = appliance.tree_file("boot/grub2/grub.cfg").await?;
    }
    let wants = BootLoaderWants::parse(&config);
    let selinux = appliance.tree_file("etc/selinux/config").await?;
    let is_on = |line: &str| {
        let value = line.trim().strip_prefix("SELINUX=").map(str::trim);
        value.is_some_and(|value| value == "enforcing" || value == "permissive")
    };
    let plan = fit::plan(&system.table, &system.layout, &table, &wants);
    let hostname = appliance.tree_file("etc/hostname").await?;
    let hostname = Some(printable(hostname.trim())).filter(|name| !name.is_empty());
    Ok((plan.map_err(UpdateError::Misfit)?, selinux.lines().any(is_on), hostname))
}

/// Gives the file systems the names that the tree's machine knows them by, and mounts them. Whether all of them
/// keep parts of a second.
async fn prepare(
    appliance: &mut Appliance,
    plan: &Plan,
    report: &mut Report,
) -> Result<bool, UpdateError> {
    for identity in &plan.identities {
        let values = [
            ("partuuid", &identity.partuuid),
            ("uuid", &identity.uuid),
            ("label", &identity.label),
        ];
        for (what, value) in values {
            if let Some(value) = value {
                appliance.identify(&identity.device, &identity.kind, what, value).await?;
                report.identities.push(format!("{what} of {} is {value}", identity.device));
            }
        }
    }
    let mut exact_times = true;
    for mount in &plan.mounts {
        exact_times &= appliance.mount(mount).await?;
    }
    Ok(exact_times)
}

/// One run of rsync.
pub(crate) async fn run(
    appliance: &mut Appliance,
    tree: &Tree,
    pass: &Pass,
    on: impl FnMut(Event<'_>),
) -> Result<(), UpdateError> {
    let options = pass.options();
    let source = tree.open(&options).await?;
    let on = std::cell::RefCell::new(on);
    let item = |item: Item| on.borrow_mut()(Event::Item(&item));
    let sent = |bytes| on.borrow_mut()(Event::Sent(bytes));
    match appliance.pull(source, &options, item, sent).await {
        Err(ApplianceError::Step { code: VANISHED, said, .. }) => {
            let vanished = said.lines().filter(|line| line.contains("vanished"));
            Err(UpdateError::TreeChanged(vanished.take(NAMED_MAX).map(str::to_owned).collect()))
        }
        Err(error) => match &error {
            ApplianceError::Step { said, .. } if said.contains("No space left on device") => {
                Err(UpdateError::Full(error))
            }
            ApplianceError::Step { code: PARTIAL, said, .. }
                if said.contains("update discarded") =>
            {
                let changed = said.lines().filter(|line| line.contains("update discarded"));
                Err(UpdateError::TreeChanged(changed.take(NAMED_MAX).map(str::to_owned).collect()))
            }
            _ => Err(error.into()),
        },
        Ok(()) => Ok(()),
    }
}

/// Has the machine's own boot loader start from these disks.
async fn install_boot_loader(
    appliance: &mut Appliance,
    system: &System,
    plan: &Plan,
    report: &mut Report,
) -> Result<(), UpdateError> {
    let layout = &system.layout;
    let disk = layout.disks.first().map_or("", |disk| &disk.name);
    let esp = plan.mounts.iter().find(|mount| layout.is_efi_system(&mount.device));
    let mut modes = Vec::new();
    if layout.starts_by_bios() {
        modes.push(("bios", ""));
    }
    if let Some(esp) = esp {
        modes.push(("uefi", esp.path.as_str()));
    }
    if modes.is_empty() {
        let why = "the disks have room for none that is known: no EFI system partition is mounted";
        report.skipped.push(("boot loader".to_owned(), why.to_owned()));
    }
    for (mode, esp) in modes {
        let words = ["boot-loader", mode, disk, esp];
        let done = appliance.step("install the boot loader", &words).await?;
        match done.trim() {
            "absent" => {
                let why = "the tree has no GRUB for it: the template's boot loader stays";
                report.skipped.push((format!("boot loader for {mode}"), why.to_owned()));
            }
            done => report.boot.push(format!("boot loader for {mode}: {}", printable(done))),
        }
    }
    Ok(())
}

/// For a terminal: it came out of the appliance.
pub(crate) fn printable(text: &str) -> String {
    text.replace(|c: char| c.is_control(), "?")
}
