//! Time as records carry it.

use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970 by the host's wall clock.
#[must_use]
pub fn unix_ms() -> u64 {
    unix_ns() / 1_000_000
}

/// Nanoseconds since 1970 by the host's wall clock; good until 2554.
pub(crate) fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
