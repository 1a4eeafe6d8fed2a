//! Lengths and times as a user gives them: `100MiB`, `26h`.

use std::time::Duration;

use jiff::{Span, SpanRelativeTo};

/// Bytes with an optional binary suffix: `1048576`, `512KiB`, `100MiB`, `2G`.
///
/// # Errors
/// What to write instead.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: u64 = match unit.trim().to_ascii_lowercase().trim_end_matches("ib") {
        "" | "b" => 1,
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        _ => return Err("use a number with KiB, MiB or GiB".into()),
    };
    let number: u64 = number.parse().map_err(|_| "use a number with KiB, MiB or GiB")?;
    match number.checked_mul(factor) {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => Err("it must be above zero and fit 64 bits".into()),
    }
}

/// A time that passes: `30s`, `10 min`, `26h`, `1h 30m`, `7d`, `2 weeks`. A day has 24 hours.
///
/// # Errors
/// What to write instead.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let usage = || "use a time like 30s, 10min, 26h or 7d".to_owned();
    let span: Span = text.trim().parse().map_err(|_| usage())?;
    let length = span.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(|_| usage())?;
    match Duration::try_from(length) {
        Ok(length) if !length.is_zero() => Ok(length),
        _ => Err("it must be above zero".to_owned()),
    }
}

/// A time that passes, as people read it: `26 h`, `7 d`, `90 min`. Rounded to seconds.
pub fn human_duration(length: Duration) -> String {
    let seconds = length.as_secs();
    match seconds {
        0 => "0 s".to_owned(),
        s if s >= 2 * 86_400 && s % 86_400 == 0 => format!("{} d", s / 86_400),
        s if s >= 2 * 3600 && s % 3600 == 0 => format!("{} h", s / 3600),
        s if s >= 48 * 3600 => format!("{} d {} h", s / 86_400, s % 86_400 / 3600),
        s if s >= 2 * 3600 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        s if s % 60 == 0 => format!("{} min", s / 60),
        s if s > 120 => format!("{} min {} s", s / 60, s % 60),
        s => format!("{s} s"),
    }
}

/// A time as a user writes it, for serde's `with`; handed on in milliseconds.
pub mod duration {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    /// Reads it.
    ///
    /// # Errors
    /// As [`super::parse_duration`].
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(from)?;
        super::parse_duration(&text).map_err(serde::de::Error::custom)
    }

    /// Writes it so that [`deserialize`] reads it.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(length: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{}ms", length.as_millis()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_with_binary_suffixes() {
        for (text, bytes) in
            [("7", 7), ("512KiB", 512 << 10), ("100MiB", 100 << 20), ("2G", 2 << 30)]
        {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "0", "fast", "-1", "1e9", "99999999999999999999", "99999999999GiB"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_are_read_in_the_units_people_write() {
        for (text, seconds) in [
            ("30s", 30),
            ("10 min", 600),
            ("26h", 26 * 3600),
            ("1h 30m", 5400),
            ("7d", 7 * 86_400),
            ("2 weeks", 14 * 86_400),
            ("P1D", 86_400),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "0s", "-5m", "soon", "10", "1 year", "2 months", "9999999999999d"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_are_shown_as_they_would_be_written() {
        for (seconds, text) in [
            (0, "0 s"),
            (59, "59 s"),
            (90 * 60, "90 min"),
            (26 * 3600, "26 h"),
            (7 * 86_400, "7 d"),
            (50 * 3600 + 60, "2 d 2 h"),
            (3 * 3600 + 60, "3 h 1 min"),
            (125, "2 min 5 s"),
        ] {
            assert_eq!(human_duration(Duration::from_secs(seconds)), text);
        }
    }
}
