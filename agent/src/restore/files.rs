//! The machine's files besides its disks, written beside these.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use repository::Tree;

use super::{Restore, RestoreError};
use crate::catalog::{Backup, Catalog, CatalogError};
use crate::effect;
use crate::hypervisor::Role;
use crate::manifest::FileManifest;
use crate::names::DomainName;

/// The content of a file of the machine.
///
/// # Errors
/// [`CatalogError`].
pub fn content(
    catalog: &Catalog,
    backup: &Backup,
    folder: &Tree,
    file: &FileManifest,
) -> Result<Vec<u8>, CatalogError> {
    let incomplete = || CatalogError::Incomplete { snapshot: backup.id, path: file.name.clone() };
    catalog.content(folder.node(&file.name).ok_or_else(incomplete)?)
}

/// Writes a file that is not there; one that is there with the same content will do.
///
/// # Errors
/// [`RestoreError::Exists`], [`RestoreError::Write`].
pub fn write_new(path: &Path, content: &[u8]) -> Result<(), RestoreError> {
    let write = |source| RestoreError::Write { path: path.to_owned(), source };
    effect::about_to("restore: machine file").map_err(write)?;
    let mut options = OpenOptions::new();
    match options.write(true).create_new(true).mode(0o600).open(path) {
        Ok(mut file) => file.write_all(content).and_then(|()| file.sync_all()).map_err(write),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            match fs::read(path).map_err(write)? == content {
                true => Ok(()),
                false => Err(RestoreError::Exists { path: path.to_owned() }),
            }
        }
        Err(source) => Err(write(source)),
    }
}

impl Restore<'_> {
    /// The files of the machine that go beside its disks. Their names are checked: whoever can write to
    /// a repository must not choose where files go.
    fn machine_files(&self) -> impl Iterator<Item = &FileManifest> {
        let files = self.backup.manifest.files.iter().filter(|_| self.place.prefix.is_empty());
        files.filter(|file| file.name.parse::<DomainName>().is_ok())
    }

    /// Refuses files that are there and are others.
    pub(super) fn check_machine_files(&self) -> Result<(), RestoreError> {
        for file in self.machine_files() {
            let path = self.place.file(&file.name);
            match fs::symlink_metadata(&path) {
                Ok(metadata) if metadata.is_file() && metadata.len() == file.size => {}
                Ok(_) => return Err(RestoreError::Exists { path }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(RestoreError::Write { path, source }),
            }
        }
        Ok(())
    }

    /// Writes the files of the machine.
    pub(super) fn write_machine_files(&self, folder: &Tree) -> Result<(), RestoreError> {
        for file in self.machine_files() {
            let path = self.place.file(&file.name);
            let content = content(self.catalog, self.backup, folder, file)?;
            if path.exists() {
                write_new(&path, &content)?;
                continue;
            }
            let write = |source| RestoreError::Write { path: path.clone(), source };
            // Under a temporary name that is swept like the manifest's.
            let temporary = self.place.file(&format!("{}.json", file.name));
            let partial = self.begin("restore: machine file", &temporary)?;
            let mut target = partial.file();
            target.set_len(0).and_then(|()| target.write_all(&content)).map_err(write)?;
            partial.publish(&path)?;
        }
        Ok(())
    }
}

/// The name of the file that holds the machine's description.
pub fn description(files: &[FileManifest]) -> Option<&FileManifest> {
    files.iter().find(|file| file.role == Role::Domain)
}
