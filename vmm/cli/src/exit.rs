//! Exit codes, and failures that end the program.

use std::fmt::Display;

/// The time that --timeout gave has passed.
pub(crate) const TIMED_OUT: u8 = 124;
/// Harrier or the guest failed, not the command.
pub(crate) const HARRIER_FAILED: u8 = 125;

/// The code of a run that a signal ended.
pub(crate) fn signal_code(signal: i32) -> u8 {
    u8::try_from(signal).unwrap_or(0).saturating_add(128)
}

/// One line for people and the exit code that goes with it.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: u8,
    pub(crate) message: String,
}

impl Failure {
    /// A failure of Harrier's.
    pub(crate) fn new(message: impl Display) -> Self {
        Failure { code: HARRIER_FAILED, message: message.to_string() }
    }
}

/// The host has no further descriptor for one of this process's own streams.
pub(crate) fn no_stream(err: std::io::Error) -> Failure {
    Failure::new(format!("the process's own streams cannot be used ({err}): raise the limit of open files"))
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(err: E) -> Self {
        Failure::new(err)
    }
}
