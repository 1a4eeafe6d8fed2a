//! Progress on standard error, for those who watch.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// When progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum When {
    /// On a terminal.
    Auto,
    /// Always; without a terminal as plain lines.
    Always,
    /// Never.
    Never,
}

/// A bar, plain lines, or nothing.
#[derive(Debug, Clone)]
pub struct Progress {
    bar: ProgressBar,
    lines: bool,
}

impl Progress {
    /// Progress for a terminal, a log, or nobody.
    pub fn new(when: When, quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let shown = !quiet && (when == When::Always || (when == When::Auto && terminal));
        let bar = match shown && terminal {
            true => ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10)),
            false => ProgressBar::hidden(),
        };
        bar.set_style(style("{spinner} {msg}"));
        Self { bar, lines: shown && !terminal }
    }

    /// A step whose length is not known.
    pub fn phase(&self, what: &str) {
        self.bar.set_style(style("{spinner} {msg}"));
        self.bar.set_message(what.to_owned());
        self.bar.enable_steady_tick(Duration::from_millis(100));
        self.line(what);
    }

    /// The long step: `total` bytes.
    pub fn reading(&self, total: u64) {
        self.bytes("reading", total);
    }

    /// A long step of so many bytes.
    pub fn bytes(&self, what: &str, total: u64) {
        self.bar.disable_steady_tick();
        self.bar.reset();
        self.bar.set_length(total);
        self.bar.set_message(what.to_owned());
        self.bar.set_style(style(
            "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} left",
        ));
        self.line(&format!("{what} {}", human_bytes(total)));
    }

    /// A step of so many things.
    pub fn count(&self, what: &str, total: u64) {
        self.bar.disable_steady_tick();
        self.bar.reset();
        self.bar.set_length(total);
        self.bar.set_message(what.to_owned());
        self.bar.set_style(style("{msg} [{bar:30}] {pos}/{len} {eta} left"));
        self.line(&format!("{what}: {total}"));
    }

    /// So many things are done.
    pub fn reach(&self, done: u64) {
        self.bar.set_position(done);
    }

    /// So many of a growing number of things are done.
    pub fn reach_of(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
    }

    /// So many bytes more are done.
    pub fn read(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    /// Nothing more will come.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn line(&self, text: &str) {
        if self.lines {
            tracing::info!(target: "progress", "{text}");
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the template is one of ours")
}

/// Bytes as people read them.
pub fn human_bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}
