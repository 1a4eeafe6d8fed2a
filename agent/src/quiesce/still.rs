//! The watchdog's side of applications: it holds their locks and tells them, so that neither the death of a run
//! nor its hanging keeps them.

use std::collections::BTreeMap;

use tokio::task::JoinSet;

use super::application::{About, Applications, Report, State};
use super::database::{DatabaseError, Locked, Session};
use super::guest_agent::AgentAddress;
use super::hook::At;

/// Applications that hold still, or are on their way there.
#[derive(Debug)]
pub struct Still {
    applications: Applications,
    about: About,
    agent: Option<AgentAddress>,
    reports: Vec<Report>,
    /// The locked databases, with the place of each report.
    locked: Vec<(usize, Locked)>,
    /// Whether hooks are still to be told that it is over.
    is_untold: bool,
    failures: Vec<String>,
}

impl Still {
    /// Applications that were told nothing yet.
    pub fn new(applications: Applications, about: About, agent: Option<AgentAddress>) -> Self {
        Self {
            applications,
            about,
            agent,
            reports: Vec::new(),
            locked: Vec::new(),
            is_untold: false,
            failures: Vec::new(),
        }
    }

    /// Has them hold still: first the servers write out what they hold, while everybody goes on, then hooks are
    /// told, servers write out once more, and at last they are locked. May be dropped at any point; then
    /// [`Self::release`] follows.
    ///
    /// Returns false where one that is required failed: then the rest is not tried.
    pub async fn hold(&mut self) -> bool {
        let mut sessions = BTreeMap::new();
        for database in &self.applications.databases {
            let connected = database.connect().await;
            let state = match &connected {
                Ok(_) => State::Clean,
                Err(error) => State::failed(error),
            };
            self.reports.push(Report { name: database.name(), required: database.required, state });
            sessions.extend(connected.ok().map(|session| (self.reports.len() - 1, session)));
        }
        if self.is_over() {
            return false;
        }
        self.is_untold = true;
        let environment = self.about.environment(At::Freeze);
        for hook in self.applications.at(At::Freeze) {
            let state = match hook.run(&environment, self.agent.as_ref()).await {
                Ok(()) => State::Clean,
                Err(error) => State::failed(&error),
            };
            self.reports.push(Report { name: hook.name(), required: hook.required, state });
        }
        if self.is_over() {
            return false;
        }
        for (place, session) in self.flush_again(sessions).await {
            if self.is_over() {
                return false;
            }
            match session.lock().await {
                Ok(locked) => self.locked.push((place, locked)),
                Err(error) => self.reports[place].state = State::failed(&error),
            }
        }
        !self.is_over()
    }

    /// Hooks and other servers may have taken minutes since the first time, and what is written out under a lock no
    /// timeout of ours can end: the server does not listen meanwhile. All at once and before the first lock, so
    /// that nobody is held while another server writes. Returns those that did, in their order.
    async fn flush_again(
        &mut self,
        sessions: BTreeMap<usize, Session>,
    ) -> BTreeMap<usize, Session> {
        let (mut at_work, mut flushed) = (JoinSet::new(), BTreeMap::new());
        for (place, session) in sessions {
            // Until it has said otherwise.
            self.reports[place].state = State::failed(&DatabaseError::Gone);
            at_work.spawn(async move { (place, session.flush_again().await) });
        }
        while let Some(ended) = at_work.join_next().await {
            let Ok((place, outcome)) = ended else { continue };
            self.reports[place].state = match outcome {
                Ok(session) => {
                    flushed.insert(place, session);
                    State::Clean
                }
                Err(error) => State::failed(&error),
            };
        }
        flushed
    }

    fn is_over(&self) -> bool {
        self.reports.iter().any(|report| report.required && report.has_failed())
    }

    /// Asks those that said that they start without recovery once more, now that their guest is frozen.
    pub async fn confirm(&mut self) {
        for (_, locked) in &mut self.locked {
            locked.confirm().await;
        }
    }

    /// Lets the servers go: how they held still up to here is in the reports from now on.
    pub async fn release(&mut self) {
        for (place, locked) in self.locked.drain(..) {
            self.reports[place].state = locked.release().await;
        }
    }

    /// Lets servers go that cannot be asked, right after the point in time.
    pub fn abandon(&mut self) {
        for (place, locked) in self.locked.drain(..) {
            self.reports[place].state = locked.abandon();
        }
    }

    /// Tells the hooks that it is over, once.
    pub async fn tell(&mut self) {
        if std::mem::take(&mut self.is_untold) {
            self.failures = self.applications.thaw(&self.about, self.agent.as_ref()).await;
        }
    }

    /// What came of each, and which hooks could not be told that it is over.
    pub fn outcome(&self) -> (Vec<Report>, Vec<String>) {
        (self.reports.clone(), self.failures.clone())
    }
}
