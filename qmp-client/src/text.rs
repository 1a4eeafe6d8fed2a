//! Text of a peer, made safe to print.

use std::fmt::{self, Write as _};

const CHARS_MAX: usize = 1024;

/// Prints text from outside on one line: control and direction characters escaped, cut when long.
pub(crate) struct Printable<'a>(pub(crate) &'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, c) in self.0.chars().enumerate() {
            if at == CHARS_MAX {
                return f.write_char('…');
            }
            if c.is_control() || turns_text(c) {
                write!(f, "{}", c.escape_default())?;
            } else {
                f.write_char(c)?;
            }
        }
        Ok(())
    }
}

/// Whether `c` reorders, splits or hides the text around it on a terminal.
fn turns_text(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_escapes_are_printed_not_obeyed() {
        let shown = Printable("a\u{1b}[2J\n\u{202e}b 'c'").to_string();
        assert_eq!(shown, "a\\u{1b}[2J\\n\\u{202e}b 'c'");
    }

    #[test]
    fn long_text_is_cut() {
        assert_eq!(Printable(&"x".repeat(5000)).to_string().chars().count(), CHARS_MAX + 1);
    }
}
