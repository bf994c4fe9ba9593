//! A bare-metal guest on an engine, in this process, with a deadline.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use harrier_engine::Engine;
use harrier_guest_checks::{Guest, Transcript, check};

use super::report::Outcome;

/// How long a machine may take from being told to stop until it has stopped. Then the host's KVM does not give its
/// processors back, or the engine has a fault; the selftest ends all the same.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Runs the guest whose program is `program`.
pub(super) fn guest(
    engine: &Arc<dyn Engine>,
    guest: &'static Guest,
    program: &Path,
    limit: Duration,
) -> Outcome {
    let (engine, program) = (Arc::clone(engine), program.to_owned());
    within(limit.saturating_add(STOP_LIMIT), move || check(engine.as_ref(), guest, &program, limit))
}

/// Lets a thread of its own do it, so that nothing that goes wrong in there takes the rest with it.
fn within(limit: Duration, check: impl FnOnce() -> Result<Transcript, String> + Send + 'static) -> Outcome {
    let (done, ended) = channel();
    let thread = std::thread::Builder::new().name("check".to_owned()).spawn(move || {
        // Whoever waited too long is gone.
        let _ = done.send(check());
    });
    if let Err(err) = thread {
        return Outcome::failed(&format!("no thread for it ({err}): raise the limit of processes"));
    }
    match ended.recv_timeout(limit) {
        Ok(Ok(transcript)) => Outcome::passed(transcript.skipped().into_iter().map(str::to_owned).collect()),
        Ok(Err(reason)) => Outcome::failed(&reason),
        Err(RecvTimeoutError::Timeout) => Outcome {
            is_stuck: true,
            ..Outcome::failed("its machine does not stop: the engine or the host's KVM has a fault")
        },
        Err(RecvTimeoutError::Disconnected) => Outcome::failed("harrier panicked"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::Verdict;
    use super::*;

    #[test]
    fn a_check_that_never_ends_and_one_that_panics_are_failures_that_say_so() {
        let never = || {
            std::thread::sleep(Duration::from_secs(3600));
            Ok(Transcript::default())
        };
        let outcome = within(Duration::from_millis(20), never);
        assert!(outcome.is_stuck);
        assert!(matches!(&outcome.verdict, Verdict::Failed(reason) if reason.contains("does not stop")));
        let outcome = within(Duration::from_secs(60), || panic!("on purpose"));
        assert!(!outcome.is_stuck);
        assert!(matches!(&outcome.verdict, Verdict::Failed(reason) if reason == "harrier panicked"));
    }
}
