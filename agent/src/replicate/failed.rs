//! The snapshots that could not be copied, kept in the state folder: what is newer goes on to be copied, and
//! by that alone they would look like those that the replica has dropped by its own rules.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::{fs, mem};

use repository::FileId;

use crate::durable;

/// Snapshots that have to be tried again, as [`repository::SnapshotFile::first_id`] calls them.
#[derive(Debug)]
pub struct Failed {
    path: PathBuf,
    ids: BTreeSet<FileId>,
}

impl Failed {
    /// Those of a copy from one repository to another, by their ids. None where nothing can be read.
    pub fn read(state_dir: &Path, source: &str, target: &str) -> Self {
        let path = state_dir.join("copies").join(format!("{source}-{target}.json"));
        let ids = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(io::Error::from),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeSet::new()),
            Err(error) => Err(error),
        };
        let ids = ids.unwrap_or_else(|error| {
            tracing::warn!(%error, path = %path.display(), "what was not copied before is not known");
            BTreeSet::new()
        });
        Self { path, ids }
    }

    /// Whether a snapshot could not be copied last time.
    pub fn has(&self, id: &FileId) -> bool {
        self.ids.contains(id)
    }

    /// Notes what came of a snapshot.
    pub fn note(&mut self, id: FileId, is_copied: bool) {
        let is_news = match is_copied {
            true => self.ids.remove(&id),
            false => self.ids.insert(id),
        };
        self.write_if(is_news);
    }

    /// Forgets those that the source has no longer.
    pub fn retain(&mut self, is_there: impl Fn(&FileId) -> bool) {
        let before = self.ids.len();
        self.ids = mem::take(&mut self.ids).into_iter().filter(is_there).collect();
        self.write_if(self.ids.len() != before);
    }

    fn write_if(&self, is_news: bool) {
        if let Some(Err(error)) = is_news.then(|| self.write()) {
            tracing::warn!(%error, path = %self.path.display(), "what is not copied is not remembered");
        }
    }

    fn write(&self) -> io::Result<()> {
        fs::create_dir_all(self.path.parent().expect("it is in a folder"))?;
        durable::write_json(&self.path, &self.ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_copied_is_known_until_it_is_copied_or_gone() {
        let scratch = tempfile::tempdir().unwrap();
        let read = || Failed::read(scratch.path(), "a", "b");
        let [one, two, three] = [1, 2, 3].map(|number| FileId([number; 32]));
        let mut failed = read();
        [one, two, three].into_iter().for_each(|id| failed.note(id, false));
        let mut failed = read();
        failed.note(one, true);
        failed.retain(|id| *id != two);
        let failed = read();
        assert_eq!([one, two, three].map(|id| failed.has(&id)), [false, false, true]);
        assert!(!Failed::read(scratch.path(), "a", "c").has(&three));
    }
}
