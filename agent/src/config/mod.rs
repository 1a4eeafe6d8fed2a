//! The configuration, `/etc/kvmsnap/kvmsnap.toml`: read once into checked types. A key that is not known or
//! a value that is not possible is an error with its place and, where one is near, what may be meant.

mod domain;
pub mod example;
mod job;
mod problem;
mod repository;
mod value;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

use crate::metrics::Metrics;
use crate::names::DomainName;
use crate::notify::Alerts;

pub use domain::{Domain, TrackHow};
pub use job::{Copy, Job, Prune, Run, VerifyPlan};
pub use problem::Problem;
pub use repository::{PasswordError, Repository, read_file as read_password};
pub use value::{Length, Name, Pattern, Size, Window};

/// Where the configuration is unless another file is named.
pub const PATH: &str = "/etc/kvmsnap/kvmsnap.toml";
/// The repository that is meant where several are configured and none is named.
const MAIN: &str = "main";

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What is written in it makes no sense.
    #[error("{}:{problem}", .path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What and where.
        problem: Box<Problem>,
    },
}

/// All that can be configured.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Config {
    /// Repositories by the names that `--repository` takes.
    pub repository: BTreeMap<Name, Repository>,
    /// Settings of domains by name or pattern.
    pub domain: BTreeMap<Pattern, Domain>,
    /// Who is told of what.
    pub alerts: Alerts,
    /// Where figures for Prometheus go.
    pub metrics: Option<Metrics>,
    /// What is done when.
    pub job: BTreeMap<Name, Job>,
    /// How `kvmsnap run` treats the host.
    pub run: Run,
    /// What is wrong with who is told. Nobody loses backups for that, so it is no error.
    #[serde(skip)]
    pub alerts_problem: Option<Problem>,
}

impl Config {
    /// Reads a file. `None` is the usual one, which need not be there.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let file = path.unwrap_or(Path::new(PATH));
        let text = match fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if path.is_none() && error.kind() == io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(source) => return Err(ConfigError::Read { path: file.to_owned(), source }),
        };
        Self::parse(&text).map_err(|problem| ConfigError::Invalid {
            path: file.to_owned(),
            problem: Box::new(problem),
        })
    }

    /// Reads a text.
    ///
    /// # Errors
    /// The first [`Problem`].
    pub fn parse(text: &str) -> Result<Self, Problem> {
        let mut config = toml::from_str::<Self>(text).or_else(|error| {
            let problem = Problem::of(&error, text);
            let Ok(rest) = toml::from_str::<Self>(&without_alerts(text)) else {
                return Err(problem);
            };
            Ok(Self { alerts_problem: Some(problem), ..rest })
        })?;
        config.check(text)?;
        if let Err((place, message)) = config.alerts.check() {
            config.alerts_problem = Some(Problem::at(place_of(place, text), text, message));
        }
        Ok(config)
    }

    /// What is wrong with who is told, for commands that are about that.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`].
    pub fn check_alerts(&self, path: Option<&Path>) -> Result<(), ConfigError> {
        let Some(problem) = self.alerts_problem.clone() else { return Ok(()) };
        let path = path.unwrap_or(Path::new(PATH)).to_owned();
        Err(ConfigError::Invalid { path, problem: Box::new(problem) })
    }

    /// What the types cannot say.
    fn check(&self, text: &str) -> Result<(), Problem> {
        for (name, job) in &self.job {
            if self.repositories_of(job).is_empty() {
                let place = place_of(&format!("[job.{name}]"), text);
                let message = match self.repository.len() {
                    0 => format!("job `{name}` has no repository: configure one"),
                    _ => format!("job `{name}` has no repository: name one, or call one `{MAIN}`"),
                };
                return Err(Problem::at(place, text, message));
            }
            let place = job.repository.as_ref().map(Spanned::span).unwrap_or_default();
            let named = job.repositories().into_iter().map(|wanted| (wanted, place.clone()));
            let copies = job.copy.iter().map(|copy| (copy.to.get_ref().as_str(), copy.to.span()));
            for (wanted, place) in named.chain(copies) {
                if !self.repository.contains_key(wanted) {
                    let message = format!("job `{name}` names an unknown repository `{wanted}`");
                    let known = self.repository.keys().map(Name::as_str);
                    return Err(Problem::at(place, text, message).suggesting(wanted, known));
                }
            }
            let used = self.repositories_of(job);
            let is_all = |copy: &&Copy| used.iter().all(|used| used == copy.to.get_ref());
            if let Some(copy) = job.copy.iter().find(is_all) {
                let message = format!("job `{name}` copies into the repository of its backups");
                return Err(Problem::at(copy.to.span(), text, message));
            }
        }
        for (pattern, domain) in &self.domain {
            let name = pattern.as_str();
            if (domain.qmp.is_some() || domain.qga.is_some()) && name.parse::<DomainName>().is_err()
                || domain.qmp.is_some() && name.contains(['*', '?', '['])
            {
                let message = format!("[domain.\"{name}\"]: one socket is of one machine: name it");
                return Err(Problem::at(0..0, text, message));
            }
        }
        Ok(())
    }

    /// The QEMUs that no libvirt manages, by the names they are backed up under.
    pub fn unmanaged(&self) -> impl Iterator<Item = (&str, &Domain)> {
        let named = self.domain.iter().filter(|(_, domain)| domain.qmp.is_some());
        named.map(|(pattern, domain)| (pattern.as_str(), domain))
    }

    /// The repository that a name means: a configured one, else none of them.
    pub fn repository(&self, name: &str) -> Option<&Repository> {
        self.repository.get(name)
    }

    /// The repository that is meant where none is named: the only one, or the one called `main`.
    pub fn usual_repository(&self) -> Option<(&Name, &Repository)> {
        match self.repository.len() {
            1 => self.repository.iter().next(),
            _ => self.repository.get_key_value(MAIN),
        }
    }

    /// The repositories that a job uses, by name, the first that can be reached.
    pub fn repositories_of(&self, job: &Job) -> Vec<String> {
        let named: Vec<String> = job.repositories().into_iter().map(str::to_owned).collect();
        let usual = self.usual_repository().map(|(name, _)| name.to_string());
        if named.is_empty() { usual.into_iter().collect() } else { named }
    }

    /// The settings of a domain: for each the most exact pattern that has it wins.
    pub fn domain(&self, name: &str) -> Domain {
        let mut of_it: Vec<_> =
            self.domain.iter().filter(|(pattern, _)| pattern.matches(name)).collect();
        of_it.sort_by_key(|(pattern, _)| pattern.vagueness(name));
        of_it.into_iter().fold(Domain::default(), |exact, (_, vague)| exact.or(vague))
    }
}

/// The same text without the tables of `[alerts]`; what is left stays in its lines.
fn without_alerts(text: &str) -> String {
    let mut is_alerts = false;
    let rest = text.lines().map(|line| {
        if line.starts_with('[') {
            let name = line.trim_start_matches('[');
            is_alerts = name.starts_with("alerts]") || name.starts_with("alerts.");
        }
        if is_alerts { "" } else { line }
    });
    rest.collect::<Vec<_>>().join("\n")
}

/// Where something is written, as far as that can be told.
fn place_of(what: &str, text: &str) -> Range<usize> {
    text.find(what).map(|at| at..at + what.len()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(text: &str) -> String {
        let problem = Config::parse(text).expect_err(text);
        format!("{problem} / {}", problem.hint().unwrap_or_default())
    }

    #[test]
    fn an_unknown_key_is_told_with_its_place_and_the_one_that_is_near() {
        let told = problem("[repository.main]\nlocation = \"/srv\"\npasword-file = \"/p\"\n");
        assert!(told.starts_with("3:1: unknown field `pasword-file`"), "{told}");
        assert!(told.ends_with("/ did you mean `password-file`?"), "{told}");

        let told = problem("[domian.web]\nquiesce = \"no\"\n");
        assert!(told.starts_with("1:2: unknown field `domian`"), "{told}");
        assert!(told.ends_with("did you mean `domain`?"), "{told}");

        let told = problem(
            "[repository.offsite]\nlocation = \"/srv\"\n[job.a]\nschedule = \"03:00\"\n\
             repository = [\"ofsite\"]\n",
        );
        assert!(told.starts_with("5:14: job `a` names an unknown repository `ofsite`"), "{told}");
        assert!(told.ends_with("did you mean `offsite`?"), "{told}");

        let told = problem(
            "[repository.offsite]\nlocation = \"/srv\"\n[job.a]\nschedule = \"03:00\"\n\
             copy = [{ to = \"offside\" }]\n",
        );
        assert!(told.starts_with("5:16: job `a` names an unknown repository `offside`"), "{told}");

        let told = problem(
            "[repository.main]\nlocation = \"/srv\"\n[job.a]\nschedule = \"03:00\"\n\
             copy = [{ to = \"main\" }]\n",
        );
        assert!(told.starts_with("5:16: job `a` copies into the repository of its"), "{told}");

        let told = problem("[job.a]\nschedule = \"03:00\"\nkeep = { daily = 0 }\n");
        assert!(told.starts_with("3:8: none of these rules keeps anything"), "{told}");

        let told = problem("[job.a]\nschedule = \"03:00\"\nverify = {read-al-in = \"3d\"}\n");
        assert!(told.starts_with("3:11: unknown field `read-al-in`"), "{told}");
        assert!(told.ends_with("did you mean `read-all-in`?"), "{told}");

        let told = problem("\n[domain.web]\nquiesce = \"requires\"\n");
        assert!(told.starts_with("3:11: unknown variant `requires`"), "{told}");
        assert!(told.ends_with("did you mean `require`?"), "{told}");
    }

    #[test]
    fn values_that_are_not_possible_are_told_with_their_place() {
        for (text, place) in [
            ("[repository.a]\nlocation = 5\n", "2:12: "),
            ("[repository.a]\n", "1:1: missing field `location`"),
            ("[domain.a]\nlimit-read = \"fast\"\n", "2:14: use a number with KiB"),
            ("[domain.a]\ndisks = [\"../x\"]\n", "2:9: "),
            ("[domain.\"[\"]\n", "1:9: "),
            ("[domain.a\n", "1:10: "),
            ("[job.a]\nschedule = \"soon\"\n", "2:12: `soon` is no schedule"),
            ("[job.a]\nschedule = \"03:00\"\nparallel = 0\n", "3:12: use a number from 1 to 64"),
            ("[job.a]\nschedule = \"03:00\"\ntimezone = \"Mars\"\n", "3:12: "),
            ("[job.a]\nschedule = \"03:00\"\nverify = true\n", "3:10: invalid value"),
            ("[job.a]\nschedule = \"03:00\"\nverify = {read-all-in = 3}\n", "3:25: "),
            ("[domain.\"*\"]\nqmp = \"/run/a\"\n", "1:1: "),
            ("\n[job.a]\nschedule = \"03:00\"\n", "2:1: job `a` has no repository: configure one"),
            (
                "[job.a]\nschedule = \"03:00\"\n[repository.b]\nlocation = \"/b\"\n\
                 [repository.c]\nlocation = \"/c\"\n",
                "1:1: job `a` has no repository: name one, or call one `main`",
            ),
            ("[job.a]\nschedule = \"03:00\"\nwindow = \"2min\"\n", "3:10: a window is 10 min or"),
            ("[repository.\"a/b\"]\nlocation = \"/x\"\n", "1:13: "),
        ] {
            let told = problem(text);
            assert!(told.starts_with(place), "{text}: {told}");
        }
    }

    #[test]
    fn alerts_that_make_no_sense_are_told_with_their_place_and_cost_no_backup() {
        let sound = "[repository.main]\nlocation = \"/srv\"\n[job.a]\nschedule = \"03:00\"\n\
                     repository = \"main\"\n";
        for (alerts, place) in [
            ("[alerts]\nremind-hours = 0\n", "7:1: `remind-hours` is 1 or more"),
            ("[[alerts.webhook]]\ntoken-file = \"/t\"\n", "6:1: it needs `url` or `url-file`"),
            ("[alerts.mail]\nto = [\"nobody\"]\n", "7:"),
            ("[[alerts.webhook]]\nurll = \"x\"\n[alerts.log]\nenabled = true\n", "7:1: unknown"),
        ] {
            let config = Config::parse(&format!("{sound}{alerts}[run]\nnice = 3\n")).unwrap();
            assert!(config.job.len() == 1 && config.run.nice.get() == 3);
            let told = config.check_alerts(None).expect_err(alerts).to_string();
            assert!(told.contains(&format!("kvmsnap.toml:{place}")), "{alerts}: {told}");
        }
        assert!(Config::parse(sound).unwrap().check_alerts(None).is_ok());
    }

    #[test]
    fn the_most_exact_pattern_wins_for_each_setting() {
        let config = Config::parse(
            "[domain.\"*\"]\nlimit-read = \"1MiB\"\nquiesce = \"no\"\nmethod = \"pull\"\n\
             [domain.\"web-*\"]\nlimit-read = \"2MiB\"\nquiesce = \"auto\"\n\
             [domain.web-1]\nlimit-read = \"3MiB\"\n",
        )
        .unwrap();
        let limit = |name: &str| config.domain(name).limit_read.map(Size::bytes);
        assert_eq!(limit("web-1"), Some(3 << 20));
        assert_eq!(limit("web-2"), Some(2 << 20));
        assert_eq!(limit("db"), Some(1 << 20));
        let web = config.domain("web-1");
        assert_eq!(web.quiesce, Some(crate::quiesce::Mode::Auto));
        assert_eq!(web.method, Some(crate::method::Wanted::Pull));
    }

    #[test]
    fn the_usual_repository_is_the_only_one_or_main() {
        let config = |names: &[&str]| {
            let entries = names.iter().map(|n| format!("[repository.{n}]\nlocation = \"/{n}\"\n"));
            Config::parse(&entries.collect::<String>()).unwrap()
        };
        let usual =
            |config: Config| config.usual_repository().map(|(_, usual)| usual.location.clone());
        assert_eq!(usual(config(&[])), None);
        assert_eq!(usual(config(&["b"])).as_deref(), Some("/b"));
        assert_eq!(usual(config(&["a", "b"])), None);
        assert_eq!(usual(config(&["a", "main"])).as_deref(), Some("/main"));
    }
}
