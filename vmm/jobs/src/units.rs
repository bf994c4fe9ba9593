//! Sizes and times as people type them.

use std::time::Duration;

use thiserror::Error;

/// A value that cannot be understood; the text names the remedy.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum UnitError {
    #[error("'{0}' is not a size: write a number with K, M or G, like 512M")]
    /// No size.
    Size(String),
    #[error("'{0}' is not a time: write a number with ms, s, m or h, like 30s")]
    /// No time.
    Time(String),
    #[error("a time of '{0}' leaves no time to run: give more")]
    /// A time of zero.
    ZeroTime(String),
}

fn split(text: &str) -> (&str, &str) {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').len();
    text.split_at(digits)
}

/// Bytes: `512M`, `1G`, `1.5g`, `65536`, `64MiB`.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    let error = || UnitError::Size(text.to_owned());
    let (number, unit) = split(text.trim());
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(error()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(error);
    }
    let value: f64 = number.parse().map_err(|_| error())?;
    let bytes = value * (1u64 << shift) as f64;
    // A float that is a whole number of bytes and fits; others are refused rather than rounded.
    if shift > 0 && bytes.fract() == 0.0 && (0.0..9e15).contains(&bytes) {
        Ok(bytes as u64)
    } else {
        Err(error())
    }
}

/// A time span: `30s`, `1.5m`, `500ms`, `2h`; a number alone is seconds.
pub fn parse_time(text: &str) -> Result<Duration, UnitError> {
    let error = || UnitError::Time(text.to_owned());
    let (number, unit) = split(text.trim());
    let value: f64 = number.parse().map_err(|_| error())?;
    let seconds = match unit.to_ascii_lowercase().as_str() {
        "ms" => value / 1000.0,
        "" | "s" => value,
        "m" | "min" => value * 60.0,
        "h" => value * 3600.0,
        "d" => value * 86400.0,
        _ => return Err(error()),
    };
    let time = Duration::try_from_secs_f64(seconds).map_err(|_| error())?;
    if time.is_zero() { Err(UnitError::ZeroTime(text.to_owned())) } else { Ok(time) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_exactly_or_refused() {
        let good = [
            ("512M", 512 << 20),
            ("1G", 1 << 30),
            ("1.5g", 3 << 29),
            ("64KiB", 1 << 16),
            ("4096", 4096),
            ("0", 0),
        ];
        for (text, bytes) in good {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in
            ["", "M", "-1M", "1X", "512 M B", "1.00000001K", "99999999999999999999G", "1e9", "0x10", "."]
        {
            assert_eq!(parse_size(bad), Err(UnitError::Size(bad.to_owned())), "{bad}");
        }
    }

    #[test]
    fn times_are_read_or_refused() {
        let good = [("30s", 30_000), ("1.5m", 90_000), ("500ms", 500), ("2", 2_000), ("1h", 3_600_000)];
        for (text, ms) in good {
            assert_eq!(parse_time(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for bad in ["", "s", "-1s", "1w", "nan", "inf", "99999999999999999999999h"] {
            assert_eq!(parse_time(bad), Err(UnitError::Time(bad.to_owned())), "{bad}");
        }
        assert_eq!(parse_time("0s"), Err(UnitError::ZeroTime("0s".to_owned())));
    }
}
