//! A share of something, as a user gives it: `10%`.

use std::str::FromStr;

/// A share, from nothing to all.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    percent: f64,
}

/// Why a text is no share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShareError {
    /// No number, with or without a percent sign.
    #[error("use a share like 10%")]
    NoNumber,
    /// Less than nothing, or more than all.
    #[error("use a share from 0% to 100%")]
    OutOfRange,
}

impl Share {
    /// Whether it is nothing at all.
    pub fn is_nothing(self) -> bool {
        self.percent == 0.0
    }

    /// It in percent: above zero, unless it is nothing, and at most 100.
    pub fn percent(self) -> f64 {
        self.percent
    }

    /// So many of `count`, rounded up.
    pub fn of(self, count: u64) -> u64 {
        ((count as f64 * self.percent / 100.0).ceil() as u64).min(count)
    }
}

impl FromStr for Share {
    type Err = ShareError;
    fn from_str(text: &str) -> Result<Self, ShareError> {
        let number = text.strip_suffix('%').unwrap_or(text);
        let percent: f64 = number.trim().parse().map_err(|_| ShareError::NoNumber)?;
        match (0.0..=100.0).contains(&percent) {
            // Minus zero is nothing too.
            true => Ok(Self { percent: percent.abs() }),
            false => Err(ShareError::OutOfRange),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_percents_and_nothing_else() {
        let of_1000 = |text: &str| text.parse::<Share>().map(|share| share.of(1000));
        for (text, part) in
            [("100%", 1000), ("0.1%", 1), ("0.01%", 1), ("33.33%", 334), ("10", 100), ("0%", 0)]
        {
            assert_eq!(of_1000(text), Ok(part), "{text}");
        }
        assert!("0".parse::<Share>().is_ok_and(Share::is_nothing));
        for text in ["", "%", "all", "1%%", "0,1%", "1/10"] {
            assert_eq!(of_1000(text), Err(ShareError::NoNumber), "{text}");
        }
        for text in ["-1%", "100.1%", "inf", "NaN", "1e9"] {
            assert_eq!(of_1000(text), Err(ShareError::OutOfRange), "{text}");
        }
    }
}
