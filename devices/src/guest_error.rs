//! Reports of what a guest causes: a log line, but never so many that a hostile guest could make them hurt.

/// Counts what one device complains about and thins the lines out: the 1st, 2nd, 4th, 8th… is logged.
#[derive(Debug, Default)]
pub(crate) struct GuestErrors {
    seen: u64,
}

impl GuestErrors {
    /// Logs `message` if it is this one's turn.
    pub(crate) fn report(&mut self, device: &str, message: std::fmt::Arguments<'_>) {
        self.seen = self.seen.saturating_add(1);
        if self.seen.is_power_of_two() {
            log::warn!("{device}: guest: {message} (complaint {})", self.seen);
        }
    }
}
