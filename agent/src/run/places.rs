//! Where a job's backups go: the first of its repositories that answers.

use std::time::Duration;

use super::child::Launcher;

/// How long a repository may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(180);

/// The repositories of a job, and which of them is used.
#[derive(Debug)]
pub struct Places {
    names: Vec<String>,
    current: usize,
    /// Those that did not answer, and what they said instead.
    away: Vec<(String, String)>,
    /// Those that did.
    there: Vec<String>,
}

impl Places {
    /// Nothing is known of them yet. There is at least one.
    pub fn new(names: Vec<String>) -> Self {
        Self { names, current: 0, away: Vec::new(), there: Vec::new() }
    }

    /// The first one from the current one on that answers.
    ///
    /// # Errors
    /// What the last one said where none does; the next time begins with the first again.
    pub async fn settle(&mut self, launcher: &Launcher) -> Result<String, String> {
        loop {
            if self.answers(launcher).await {
                return Ok(self.names[self.current].clone());
            }
            if !self.has_next() {
                self.current = 0;
                return Err(self.away.last().map(|(_, why)| why.clone()).unwrap_or_default());
            }
            self.advance();
        }
    }

    /// Whether there is another one to fall over to.
    pub fn has_next(&self) -> bool {
        self.current + 1 < self.names.len()
    }

    /// Falls over to the next one.
    pub fn advance(&mut self) {
        self.current += 1;
        let (from, to) = (&self.names[self.current - 1], &self.names[self.current]);
        tracing::warn!("repository `{from}` does not answer: backups go to `{to}`");
    }

    /// Whether the current one answers.
    pub async fn answers(&mut self, launcher: &Launcher) -> bool {
        let name = self.names[self.current].clone();
        let answer = launcher.run(Some(&name), &["repository", "answers"], ANSWER_TIMEOUT).await;
        self.there.retain(|there| *there != name);
        self.away.retain(|(away, _)| *away != name);
        match answer.is_done() {
            true => self.there.push(name),
            false => self.away.push((name, answer.reason())),
        }
        answer.is_done()
    }

    /// Those that do not answer, and why.
    pub fn away(&self) -> &[(String, String)] {
        &self.away
    }

    /// The one that is used, where it answers.
    pub fn used(&self) -> Option<&str> {
        let name = self.names.get(self.current)?;
        self.there.contains(name).then_some(name)
    }
}
