//! Asking the guest to come to rest before a snapshot, and telling it that it may go on.
//!
//! One request at a time. The guest is asked only if it has said that it listens; it answers by QUIESCE calls, from its own
//! threads, while the owner's thread waits here.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use harrier_devices::doorbell::Events;
use harrier_hypercall_abi::calls::QuiesceResult;
use harrier_hypercall_abi::port::event;
use harrier_hypercall_abi::{Status, features};

/// What came of asking a guest to come to rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quiesced {
    /// The guest was not asked: it does not listen, or it stands.
    NotAsked,
    /// It has come to rest.
    AtRest,
    /// It has not said so in time.
    TooLate,
}

#[derive(Default)]
struct State {
    /// The guest listens.
    listens: bool,
    /// The last request.
    request: u64,
    /// Until when the guest has time; none when nothing is asked of it.
    until: Option<Instant>,
    ready: bool,
}

/// The request, and who waits for its answer.
pub(crate) struct Quiesce {
    events: Events,
    state: Mutex<State>,
    changed: Condvar,
}

impl Quiesce {
    pub(crate) fn new(events: Events) -> Self {
        Quiesce { events, state: Mutex::default(), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest has said what it uses.
    pub(super) fn agreed(&self, guest_features: u64) {
        self.lock().listens = guest_features & features::QUIESCE != 0;
    }

    /// What is asked of the guest at this moment.
    pub(super) fn wanted(&self) -> QuiesceResult {
        let state = self.lock();
        let Some(until) = state.until else { return QuiesceResult::default() };
        let left = until.saturating_duration_since(Instant::now()).as_millis();
        let remaining_ms = u32::try_from(left).unwrap_or(u32::MAX);
        QuiesceResult { request: state.request, remaining_ms, reserved: 0 }
    }

    /// The guest has come to rest.
    pub(super) fn ready(&self, request: u64) -> Result<(), Status> {
        let mut state = self.lock();
        if state.until.is_none() || request != state.request {
            return Err(Status::Stale);
        }
        state.ready = true;
        self.changed.notify_all();
        Ok(())
    }

    /// Asks the guest to come to rest, and waits for it. [`Quiesce::end`] is to follow, whatever the answer.
    pub(crate) fn begin(&self, limit: Duration, has_ended: impl Fn() -> bool) -> Quiesced {
        let mut state = self.lock();
        if !state.listens {
            return Quiesced::NotAsked;
        }
        let until = Instant::now() + limit;
        state.request += 1;
        (state.until, state.ready) = (Some(until), false);
        // Under the lock, so that the guest cannot ask before there is an answer.
        self.events.raise(event::QUIESCE);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if state.ready {
                return Quiesced::AtRest;
            }
            if left.is_zero() || has_ended() {
                return Quiesced::TooLate;
            }
            let step = left.min(Duration::from_millis(20));
            state = self.changed.wait_timeout(state, step).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The guest need not be at rest any more.
    pub(crate) fn end(&self) {
        let mut state = self.lock();
        if state.until.take().is_some() {
            state.ready = false;
            self.events.clear(event::QUIESCE);
            self.events.raise(event::THAW);
        }
    }

    /// What a snapshot keeps: the last request, and whether the guest is asked to rest.
    pub(super) fn save(&self) -> (u64, bool) {
        let state = self.lock();
        (state.request, state.until.is_some())
    }

    /// Takes up what a snapshot kept; a guest that was asked to rest is told with [`Quiesce::end`] that it need not.
    pub(super) fn restore(&self, (request, is_asked): (u64, bool)) {
        let mut state = self.lock();
        state.request = request;
        state.until = is_asked.then(Instant::now);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use harrier_devices::InterruptLine;

    use super::*;

    struct Line;

    impl InterruptLine for Line {
        fn set_level(&self, _high: bool) {}
    }

    fn quiesce(features: u64) -> (Arc<Quiesce>, Events) {
        let events = Events::new(Arc::new(Line));
        let quiesce = Arc::new(Quiesce::new(events.clone()));
        quiesce.agreed(features);
        (quiesce, events)
    }

    #[test]
    fn a_guest_that_does_not_listen_is_not_asked() {
        let (quiesce, events) = quiesce(features::IDENTITY);
        assert_eq!(quiesce.begin(Duration::from_secs(60), || false), Quiesced::NotAsked);
        quiesce.end();
        assert_eq!((events.pending(), quiesce.wanted().request), (0, 0));
    }

    #[test]
    fn a_guest_that_does_not_answer_is_not_waited_for_longer_than_said() {
        let (quiesce, events) = quiesce(features::QUIESCE);
        let begin = Instant::now();
        assert_eq!(quiesce.begin(Duration::from_millis(30), || false), Quiesced::TooLate);
        assert!(begin.elapsed() >= Duration::from_millis(30));
        assert_eq!(events.pending(), event::QUIESCE);
        quiesce.end();
        assert_eq!(events.pending(), event::THAW);
        assert_eq!(quiesce.ready(1), Err(Status::Stale), "it is over");
        assert_eq!(quiesce.begin(Duration::from_secs(60), || true), Quiesced::TooLate, "nobody can answer");
    }

    #[test]
    fn the_answer_to_the_right_request_ends_the_wait() {
        let (quiesce, _) = quiesce(features::QUIESCE);
        let guest = Arc::clone(&quiesce);
        let answers = std::thread::spawn(move || {
            while guest.wanted().request == 0 {
                std::thread::yield_now();
            }
            let wanted = guest.wanted();
            (guest.ready(wanted.request + 1), guest.ready(wanted.request), wanted.remaining_ms)
        });
        assert_eq!(quiesce.begin(Duration::from_secs(60), || false), Quiesced::AtRest);
        let (wrong, right, left) = answers.join().unwrap();
        assert_eq!((wrong, right), (Err(Status::Stale), Ok(())));
        assert!((59_000..=60_000).contains(&left), "{left}");
        // A snapshot is taken here: what is made of it tells its guest to go on.
        let saved = quiesce.save();
        let (other, events) = self::quiesce(features::QUIESCE);
        other.restore(saved);
        other.end();
        assert_eq!((events.pending(), other.save()), (event::THAW, (1, false)));
    }
}
