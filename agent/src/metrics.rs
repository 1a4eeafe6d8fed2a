//! Figures for Prometheus, as a text file that its node exporter collects.
//!
//! The format: <https://prometheus.io/docs/instrumenting/exposition_formats/>. Names and labels are only
//! ever added.

use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::durable;

/// Where the figures go: the section `[metrics]` of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Metrics {
    /// The file, in the folder that the node exporter collects from; its name must end in `.prom`.
    pub file: PathBuf,
}

/// Why the figures cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the metrics to {}", .path.display())]
pub struct MetricsError {
    path: PathBuf,
    source: io::Error,
}

/// What is known of a domain's backups by one job.
#[derive(Debug, Clone, Default)]
pub struct DomainFigures {
    /// The job.
    pub job: String,
    /// The domain.
    pub domain: String,
    /// The point in time of its last good backup.
    pub last_success: Option<Timestamp>,
    /// When a backup of it was last tried.
    pub last_attempt: Option<Timestamp>,
    /// Whether that failed.
    pub failed: bool,
    /// Whether its last good backup is too old, or its snapshots too few.
    pub stale: bool,
    /// How many snapshots there are.
    pub snapshots: u64,
    /// What the last good backup was like.
    pub last: Option<BackupFigures>,
}

/// What a good backup was like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BackupFigures {
    /// Milliseconds from the first command to the last chunk.
    pub duration_ms: u64,
    /// Milliseconds for which the file systems were frozen.
    pub freeze_ms: Option<u64>,
    /// Bytes that had changed.
    pub bytes_changed: u64,
    /// Bytes that were read.
    pub bytes_read: u64,
    /// Bytes that were added to the repository.
    pub bytes_stored: u64,
    /// The most bytes that the scratch took.
    pub scratch_peak: Option<u64>,
    /// Whether it read only what had changed.
    pub incremental: bool,
    /// How many warnings it gave.
    pub warnings: u64,
}

/// What is known of a job.
#[derive(Debug, Clone, Default)]
pub struct JobFigures {
    /// The job.
    pub job: String,
    /// When it last ended well.
    pub last_success: Option<Timestamp>,
    /// How many milliseconds its last run took.
    pub duration_ms: Option<u64>,
    /// How many things its last run failed at.
    pub failures: u64,
}

/// What is known of a repository.
#[derive(Debug, Clone, Default)]
pub struct RepositoryFigures {
    /// Its name.
    pub repository: String,
    /// Bytes that its files take.
    pub bytes: u64,
}

/// All figures of a host.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// Of domains.
    pub domains: Vec<DomainFigures>,
    /// Of jobs.
    pub jobs: Vec<JobFigures>,
    /// Of repositories.
    pub repositories: Vec<RepositoryFigures>,
}

impl Metrics {
    /// Writes them all at once: whoever reads the file sees the old figures or the new.
    ///
    /// # Errors
    /// [`MetricsError`]; then the old file is still there.
    pub fn write(&self, figures: &Figures) -> Result<(), MetricsError> {
        // The collector takes any file whose name ends in `.prom`, which a partial one's does not.
        durable::write(&self.file, figures.to_text().as_bytes(), 0o644)
            .map_err(|source| MetricsError { path: self.file.clone(), source })
    }
}

impl Figures {
    fn to_text(&self) -> String {
        let mut text = Text::default();
        let of_domain = |figure: fn(&DomainFigures) -> Option<f64>| {
            let labels = |of: &DomainFigures| labels(&[("job", &of.job), ("domain", &of.domain)]);
            self.domains.iter().filter_map(move |of| Some((labels(of), figure(of)?)))
        };
        text.gauge(
            "domain_last_success_timestamp_seconds",
            "Point in time of the last good backup",
            of_domain(|of| of.last_success.map(seconds)),
        );
        text.gauge(
            "domain_last_attempt_timestamp_seconds",
            "When a backup was last tried",
            of_domain(|of| of.last_attempt.map(seconds)),
        );
        text.gauge("domain_failed", "Whether that failed", of_domain(|of| Some(flag(of.failed))));
        text.gauge(
            "domain_stale",
            "Whether the last good backup is too old, or there are too few",
            of_domain(|of| Some(flag(of.stale))),
        );
        text.gauge(
            "domain_snapshots",
            "Snapshots in the repository",
            of_domain(|of| Some(of.snapshots as f64)),
        );
        let backup: [(&str, &str, Figure); 8] = [
            ("duration_seconds", "How long it took", |of| Some(of.duration_ms as f64 / 1000.0)),
            ("freeze_seconds", "How long file systems were frozen", |of| {
                of.freeze_ms.map(|ms| ms as f64 / 1000.0)
            }),
            ("changed_bytes", "What had changed", |of| Some(of.bytes_changed as f64)),
            ("read_bytes", "What was read", |of| Some(of.bytes_read as f64)),
            ("stored_bytes", "What was added", |of| Some(of.bytes_stored as f64)),
            ("scratch_peak_bytes", "What the scratch took at most", |of| {
                of.scratch_peak.map(|bytes| bytes as f64)
            }),
            ("incremental", "Whether only what had changed was read", |of| {
                Some(flag(of.incremental))
            }),
            ("warnings", "How many warnings it gave", |of| Some(of.warnings as f64)),
        ];
        for (name, help, figure) in backup {
            let samples = self.domains.iter().filter_map(|of| {
                let labels = labels(&[("job", &of.job), ("domain", &of.domain)]);
                Some((labels, figure(of.last.as_ref()?)?))
            });
            text.gauge(&format!("backup_{name}"), &format!("Last good backup: {help}"), samples);
        }
        let of_job = |figure: fn(&JobFigures) -> Option<f64>| {
            self.jobs.iter().filter_map(move |of| Some((labels(&[("job", &of.job)]), figure(of)?)))
        };
        text.gauge(
            "job_last_success_timestamp_seconds",
            "When the job last ended well",
            of_job(|of| of.last_success.map(seconds)),
        );
        text.gauge(
            "job_duration_seconds",
            "How long its last run took",
            of_job(|of| of.duration_ms.map(|ms| ms as f64 / 1000.0)),
        );
        text.gauge(
            "job_failures",
            "What its last run failed at",
            of_job(|of| Some(of.failures as f64)),
        );
        text.gauge(
            "repository_bytes",
            "What the repository's files take",
            self.repositories
                .iter()
                .map(|of| (labels(&[("repository", &of.repository)]), of.bytes as f64)),
        );
        text.0
    }
}

/// One figure of a backup, where it is known.
type Figure = fn(&BackupFigures) -> Option<f64>;

#[derive(Default)]
struct Text(String);

impl Text {
    fn gauge(&mut self, name: &str, help: &str, samples: impl Iterator<Item = (String, f64)>) {
        let mut samples = samples.peekable();
        if samples.peek().is_none() {
            return;
        }
        let _ = write!(self.0, "# HELP kvmsnap_{name} {help}\n# TYPE kvmsnap_{name} gauge\n");
        for (labels, value) in samples {
            let _ = writeln!(self.0, "kvmsnap_{name}{{{labels}}} {value}");
        }
    }
}

fn labels(pairs: &[(&str, &str)]) -> String {
    let escaped =
        |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let pairs: Vec<String> =
        pairs.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
    pairs.join(",")
}

fn flag(is_so: bool) -> f64 {
    f64::from(u8::from(is_so))
}

fn seconds(time: Timestamp) -> f64 {
    time.as_millisecond() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn figures() -> Figures {
        let last = BackupFigures { duration_ms: 1500, incremental: true, ..Default::default() };
        let web = DomainFigures {
            job: "nightly".to_owned(),
            domain: "we\"b".to_owned(),
            last_success: Some(Timestamp::from_second(1_700_000_000).unwrap()),
            last: Some(last),
            ..Default::default()
        };
        Figures { domains: vec![web], ..Default::default() }
    }

    #[test]
    fn figures_are_named_explained_and_labelled() {
        let text = figures().to_text();
        for line in [
            "# TYPE kvmsnap_domain_last_success_timestamp_seconds gauge",
            r#"kvmsnap_domain_last_success_timestamp_seconds{job="nightly",domain="we\"b"} 1700000000"#,
            r#"kvmsnap_backup_duration_seconds{job="nightly",domain="we\"b"} 1.5"#,
            r#"kvmsnap_backup_incremental{job="nightly",domain="we\"b"} 1"#,
        ] {
            assert!(text.lines().any(|is| is == line), "{line}\n{text}");
        }
        // What is not known is not zero.
        assert!(!text.contains("freeze") && !text.contains("repository_bytes"), "{text}");
    }

    #[test]
    fn the_file_appears_whole_and_can_be_read_by_the_collector() {
        let folder = tempfile::tempdir().unwrap();
        let metrics = Metrics { file: folder.path().join("kvmsnap.prom") };
        metrics.write(&Figures::default()).unwrap();
        metrics.write(&figures()).unwrap();
        let mode = metrics.file.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o644);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
