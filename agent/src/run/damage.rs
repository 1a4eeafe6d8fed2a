//! That a run knows of damage in a repository, as a file: who proves by hand that all data is sound takes it
//! away, whether or not a run is active. Where it is lost, damage is found again when its part's turn comes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::durable;
use crate::names::RunId;

/// Name of the folder in the state folder.
const FOLDER: &str = "damage";

/// The file of a repository.
#[derive(Debug)]
pub struct Mark {
    path: PathBuf,
}

/// What it held when all data began to be read: damage that was found since is not meant.
#[derive(Debug, PartialEq, Eq)]
pub struct Seen(Vec<u8>);

impl Mark {
    /// That of a repository, by its id.
    pub fn of(state_dir: &Path, repository_id: &str) -> Self {
        Self { path: state_dir.join(FOLDER).join(format!("{repository_id}.json")) }
    }

    /// Damage was found just now.
    ///
    /// # Errors
    /// When it cannot be written: then nobody can take it away.
    pub fn set(&self) -> io::Result<()> {
        fs::create_dir_all(self.path.parent().expect("it lies in a folder"))?;
        // One that is like no other.
        durable::write_json(&self.path, &RunId::random())
    }

    /// Whether somebody has taken it away. One that cannot be looked at is there.
    pub fn is_gone(&self) -> bool {
        matches!(self.path.try_exists(), Ok(false))
    }

    /// What it holds, where there is one.
    pub fn look(&self) -> Option<Seen> {
        fs::read(&self.path).ok().map(Seen)
    }

    /// Takes it away, unless damage was found since.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn take_away(&self, seen: &Seen) -> io::Result<()> {
        match self.look() {
            Some(now) if now == *seen => fs::remove_file(&self.path),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p4_a_proof_clears_no_damage_that_was_found_while_it_was_made() {
        let scratch = tempfile::tempdir().unwrap();
        let mark = Mark::of(scratch.path(), "r");
        assert!(mark.is_gone() && mark.look().is_none());
        mark.set().unwrap();
        let seen = mark.look().unwrap();
        mark.set().unwrap();
        mark.take_away(&seen).unwrap();
        assert!(!mark.is_gone());
        mark.take_away(&mark.look().unwrap()).unwrap();
        assert!(mark.is_gone());
        mark.take_away(&seen).unwrap();
    }
}
