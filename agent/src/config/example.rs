//! The commented example, from which the man page is made too.

use std::fmt::Write as _;

/// The example: each key that there is, commented out.
pub const EXAMPLE: &str = include_str!("example.toml");

/// A line of the example.
enum Line<'a> {
    Blank,
    /// A heading, in capitals.
    Heading(&'a str),
    Text(&'a str),
    /// Something to be copied as it is.
    Code(&'a str),
}

fn lines() -> impl Iterator<Item = Line<'static>> {
    EXAMPLE.lines().map(|line| {
        let text = line.strip_prefix("# ").or_else(|| (line == "#").then_some(""));
        match (text, line.strip_prefix('#')) {
            (Some(""), _) | (None, None) => Line::Blank,
            (Some(text), _) if text.starts_with("    ") => Line::Code(text.trim_start()),
            (Some(text), _) if text.chars().all(|c| c.is_ascii_uppercase() || c == ' ') => {
                Line::Heading(text)
            }
            (Some(text), _) => Line::Text(text),
            (None, Some(key)) => Line::Code(key),
        }
    })
}

/// The man page, in the language of man(7).
pub fn man_page() -> String {
    let mut page = String::from(
        ".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n.TH kvmsnap.toml 5\n.SH NAME\n\
         kvmsnap.toml \\- the configuration of kvmsnap\n.SH DESCRIPTION\n",
    );
    let mut in_code = false;
    for line in lines() {
        if in_code != matches!(line, Line::Code(_)) {
            in_code = !in_code;
            page += if in_code { ".PP\n.nf\n.RS 4\n" } else { ".RE\n.fi\n.PP\n" };
        }
        // Writing to a string does not fail.
        let _ = match line {
            Line::Blank => writeln!(page, ".PP"),
            Line::Heading(heading) => writeln!(page, ".SH {heading}"),
            Line::Text(text) | Line::Code(text) => writeln!(page, "{}", escape(text)),
        };
    }
    if in_code {
        page += ".RE\n.fi\n";
    }
    page += ".SH FILES\n/etc/kvmsnap/kvmsnap.toml\n.SH SEE ALSO\nkvmsnap(1), kvmsnap\\-run(1), \
             kvmsnap\\-config(1)\n";
    page
}

/// So that no character is taken for a command.
fn escape(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\*(Aq");
    if text.starts_with('.') { format!("\\&{text}") } else { text }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::{Config, Problem};
    use super::*;

    /// The example with all keys in force.
    fn in_force() -> String {
        let keys = EXAMPLE.lines().filter(|line| !line.starts_with("# ") && *line != "#");
        let keys = keys.map(|line| format!("{}\n", line.strip_prefix('#').unwrap_or(line)));
        keys.collect()
    }

    fn parse(text: &str) -> Result<Config, Problem> {
        let config = Config::parse(text)?;
        config.alerts_problem.clone().map_or(Ok(config), Err)
    }

    /// What may stand in a section, by what the parser says of a key that cannot.
    fn keys_of(section: &str) -> Vec<String> {
        let text = in_force();
        let header = format!("[{section}]\n");
        let at = text.find(&header).unwrap_or_else(|| panic!("{section} is not in the example"));
        let end = at + header.len();
        let wrong = format!("{}no-such-key = 1\n{}", &text[..end], &text[end..]);
        let problem = parse(&wrong).expect_err("no section has it").to_string();
        assert!(problem.contains("unknown field `no-such-key`"), "{section}: {problem}");
        problem.split('`').skip(3).step_by(2).map(str::to_owned).collect()
    }

    #[test]
    fn the_example_is_a_configuration_with_all_keys_in_force_and_with_none() {
        let config = parse(&in_force()).unwrap();
        assert!(config.job.len() == 1 && config.repository.len() == 3 && config.metrics.is_some());
        assert!(parse(EXAMPLE).unwrap().job.is_empty());
    }

    #[test]
    fn the_example_shows_each_key_that_there_is() {
        for section in [
            "repository.main",
            "domain.\"web-*\"",
            "[domain.\"web-*\".database]",
            "[domain.\"web-*\".hook]",
            "job.nightly",
            "run",
            "alerts",
            "alerts.log",
            "alerts.mail",
            "alerts.ping",
            "[alerts.webhook]",
            "[alerts.command]",
            "metrics",
        ] {
            let keys = keys_of(section);
            assert!(!keys.is_empty(), "{section}");
            for key in keys {
                let shown = |line: &str| {
                    line.starts_with(&format!("#{key} = "))
                        || line.contains(&format!("[{section}.{key}"))
                };
                let nested = [format!("#[{section}.{key}"), format!("#[[{section}.{key}")];
                let is_shown = EXAMPLE.lines().any(|line| {
                    shown(line) || nested.iter().any(|nested| line.starts_with(nested.as_str()))
                });
                assert!(is_shown, "[{section}] {key} is not in the example");
            }
        }
        let tables = |text: &str| -> BTreeSet<String> {
            let problem = parse(text).expect_err("it is unknown").to_string();
            problem.split('`').skip(3).step_by(2).map(str::to_owned).collect()
        };
        for table in tables("no-such-table = 1\n") {
            let has = |line: &str| line.starts_with(&format!("#[{table}"));
            assert!(EXAMPLE.lines().any(has), "[{table}] is not in the example");
        }
    }

    #[test]
    fn the_short_file_in_the_text_does_its_work() {
        let short = EXAMPLE.lines().filter_map(|line| line.strip_prefix("#     "));
        let short: String = short.map(|line| format!("{line}\n")).collect();
        let config = parse(&short).unwrap();
        assert!(config.job["nightly"].keep.is_some(), "{short}");
        assert_eq!(config.repositories_of(&config.job["nightly"]), ["main"]);
    }

    #[test]
    fn the_man_page_has_all_of_the_example_and_no_command_by_chance() {
        let page = man_page();
        for word in [".SH JOBS", "read\\-all\\-in", "kvmsnap config check", ".SH FILES"] {
            assert!(page.contains(word), "{word}");
        }
        let commands = page.lines().filter(|line| line.starts_with('.'));
        for command in commands {
            let name = command.split(' ').next().unwrap_or_default();
            let known = [".ie", ".el", ".TH", ".SH", ".PP", ".nf", ".fi", ".RS", ".RE"];
            assert!(known.contains(&name), "{command}");
        }
    }
}
