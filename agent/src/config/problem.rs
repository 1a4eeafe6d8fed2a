//! What is wrong in a configuration, where, and what may be meant.

use std::fmt;
use std::ops::Range;

/// What is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The line, from 1; 0 where none can be told.
    line: usize,
    /// The character in it, from 1.
    column: usize,
    message: String,
    suggestion: Option<String>,
}

impl Problem {
    /// A problem at a place in a text.
    pub fn at(place: Range<usize>, text: &str, message: String) -> Self {
        let before = text.get(..place.start).unwrap_or(text);
        let start = before.rfind('\n').map_or(0, |end| end + 1);
        let line = before.matches('\n').count() + 1;
        let column = before[start..].chars().count() + 1;
        Self { line, column, message, suggestion: None }
    }

    /// With the name among `known` that is near to `word`, if there is one.
    pub fn suggesting<'a>(mut self, word: &str, known: impl IntoIterator<Item = &'a str>) -> Self {
        self.suggestion = nearest(word, known).map(str::to_owned);
        self
    }

    /// What the parser says.
    pub fn of(error: &toml::de::Error, text: &str) -> Self {
        let message = error.message().trim_end().replace('\n', "; ");
        let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
        // serde's words for a key or value that is none of those it expects.
        let is_unknown =
            message.starts_with("unknown field") || message.starts_with("unknown variant");
        let suggestion = match quoted.split_first() {
            Some((word, known)) if is_unknown => nearest(word, known.iter().copied()),
            _ => None,
        };
        let suggestion = suggestion.map(str::to_owned);
        let problem = Self::at(error.span().unwrap_or_default(), text, message);
        Self { suggestion, ..problem }
    }

    /// What may be meant.
    pub fn hint(&self) -> Option<String> {
        self.suggestion.as_ref().map(|word| format!("did you mean `{word}`?"))
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.line, self.column, self.message)
    }
}

/// The word that is few slips of the finger away.
fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let slips_max = (word.chars().count() / 3).clamp(1, 3);
    let near = known.into_iter().map(|known| (strsim::osa_distance(word, known), known));
    near.filter(|(slips, _)| *slips <= slips_max).min().map(|(_, known)| known)
}
