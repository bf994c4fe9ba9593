//! Times and sizes for people.

/// A span, in its two largest units: `3h 20m`.
pub(super) fn span(ms: u64) -> String {
    let seconds = ms / 1000;
    let units = [(86400, "d"), (3600, "h"), (60, "m"), (1, "s")];
    let Some(first) = units.iter().position(|(size, _)| seconds >= *size) else { return format!("{ms}ms") };
    let mut left = seconds;
    let mut words = Vec::new();
    for (size, name) in units.iter().skip(first).take(2) {
        if left / size > 0 {
            words.push(format!("{}{name}", left / size));
        }
        left %= size;
    }
    words.join(" ")
}

/// Bytes with a unit: `512M`.
pub(super) fn size(bytes: u64) -> String {
    let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
    for (shift, name) in units {
        if bytes >= 1 << shift {
            let whole = bytes >> shift;
            let rest = bytes & ((1 << shift) - 1);
            return match (rest * 10) >> shift {
                0 => format!("{whole}{name}"),
                tenth => format!("{whole}.{tenth}{name}"),
            };
        }
    }
    bytes.to_string()
}

/// Milliseconds since the Unix epoch, now.
pub(super) fn now_ms() -> u64 {
    use harrier_jobs::store::{Clock, SystemClock};
    SystemClock.now_ms()
}

/// A point in time, in UTC: `2026-11-26T11:05:07Z`.
pub(super) fn time(ms: u64) -> String {
    // Its last year; a number from elsewhere may be anything.
    let ms = ms.min(253_402_300_799_000);
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_millis(ms);
    humantime::format_rfc3339_seconds(time).to_string()
}

/// A command as one would type it, roughly.
pub(super) fn command(words: &[String]) -> String {
    let plain = |word: &String| {
        !word.is_empty() && word.chars().all(|c| c.is_alphanumeric() || "-_./=:,+@%".contains(c))
    };
    let quoted: Vec<String> = words
        .iter()
        .map(|word| if plain(word) { word.clone() } else { format!("'{}'", word.replace('\'', "'\\''")) })
        .collect();
    quoted.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_sizes_and_times_read_well() {
        assert_eq!(
            [0, 999, 61_000, 3_600_000, 90_061_000].map(span),
            ["0ms", "999ms", "1m 1s", "1h", "1d 1h"]
        );
        assert_eq!([512, 1536, 1 << 29, 3 << 29].map(size), ["512", "1.5K", "512M", "1.5G"]);
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(951_826_154_000), "2000-02-29T12:09:14Z");
        assert_eq!(time(1_795_690_000_000), "2026-11-26T10:46:40Z");
        assert_eq!(command(&["sh".into(), "-c".into(), "echo 'a'".into()]), r"sh -c 'echo '\''a'\'''");
    }
}
