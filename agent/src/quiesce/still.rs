//! The watchdog's side of applications: it holds their locks and tells them, so that neither the death of a run
//! nor its hanging keeps them.

use super::application::{About, Applications, Report, State};
use super::database::Locked;
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
    /// told, and at last the servers are locked. May be dropped at any point; then [`Self::release`] follows.
    ///
    /// Returns false where one that is required failed: then the rest is not tried.
    pub async fn hold(&mut self) -> bool {
        let mut sessions = Vec::new();
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
        for (place, session) in sessions {
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
