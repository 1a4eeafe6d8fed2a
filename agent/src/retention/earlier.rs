//! By which rules a machine's snapshots were dropped last time, kept in the state folder. Losing it costs
//! a question, no snapshot.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Machine, Policy};
use crate::durable;

/// The rules of last time, by machine.
#[derive(Debug)]
pub struct Earlier {
    path: PathBuf,
    policies: BTreeMap<Machine, Policy>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    machine: Machine,
    policy: Policy,
}

impl Earlier {
    /// What is known of a repository. Nothing where nothing can be read.
    pub fn read(state_dir: &Path, repository_id: &str) -> Self {
        let path = state_dir.join("retention").join(format!("{repository_id}.json"));
        let entries: Vec<Entry> = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).unwrap_or_else(|error| {
                tracing::warn!(%error, path = %path.display(), "the rules of last time are lost");
                Vec::new()
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "the rules of last time are lost");
                Vec::new()
            }
        };
        let policies = entries.into_iter().map(|entry| (entry.machine, entry.policy)).collect();
        Self { path, policies }
    }

    /// The rules of last time.
    pub fn of(&self, machine: &Machine) -> Option<&Policy> {
        self.policies.get(machine)
    }

    /// Remembers the rules for next time.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn remember<'a>(
        &mut self,
        machines: impl Iterator<Item = &'a Machine>,
        policy: &Policy,
    ) -> io::Result<()> {
        self.policies.extend(machines.map(|machine| (machine.clone(), policy.clone())));
        let entry = |(machine, policy): (&Machine, &Policy)| Entry {
            machine: machine.clone(),
            policy: policy.clone(),
        };
        let entries: Vec<Entry> = self.policies.iter().map(entry).collect();
        fs::create_dir_all(self.path.parent().expect("it is in a folder"))?;
        durable::write_json(&self.path, &entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_of_last_time_are_remembered_and_a_broken_file_is_none() {
        let scratch = tempfile::tempdir().unwrap();
        let machine = Machine { domain: "web".into(), uuid: "1".into() };
        let policy = Policy { daily: 3, ..Policy::default() };
        let mut earlier = Earlier::read(scratch.path(), "r");
        assert!(earlier.of(&machine).is_none());
        earlier.remember([&machine].into_iter(), &policy).unwrap();
        assert_eq!(Earlier::read(scratch.path(), "r").of(&machine), Some(&policy));
        fs::write(scratch.path().join("retention/r.json"), "{").unwrap();
        assert!(Earlier::read(scratch.path(), "r").of(&machine).is_none());
    }
}
