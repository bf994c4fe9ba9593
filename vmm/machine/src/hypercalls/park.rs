//! Wakes processors that wait in a PARK with a time: sends them the interrupt that they asked for.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use event_manager::{EventOps, Events, MutEventSubscriber};
use harrier_engine::{EngineError, Msi};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use crate::event_loop::Subscriber;

/// Address of a message to the APIC with this id (Intel SDM volume 3, 12.11.1): physical destination.
const MSI_ADDRESS: u64 = 0xfee0_0000;
/// Later than this nobody waits for anything.
const LONGEST: Duration = Duration::from_secs(1 << 32);

/// Who is to be woken, when and with which vector.
struct Wakes {
    /// By APIC id; one each.
    due: BTreeMap<u32, (Instant, u8)>,
    timer: TimerFd,
    /// When the timer fires.
    armed: Option<Instant>,
    /// Since when guest time stands still, and with it every wait.
    stopped_at: Option<Instant>,
}

impl Wakes {
    /// Now, or when guest time stopped.
    fn now(&self) -> Instant {
        self.stopped_at.unwrap_or_else(Instant::now)
    }

    fn earliest(&self) -> Option<Instant> {
        self.due.values().map(|(at, _)| *at).min()
    }

    /// Notes whom to wake after the time; all ones is never.
    fn insert(&mut self, apic_id: u32, vector: u8, timeout_ns: u64) {
        let timeout = Duration::from_nanos(timeout_ns).min(LONGEST);
        match self.now().checked_add(timeout) {
            Some(at) if timeout_ns != u64::MAX => self.due.insert(apic_id, (at, vector)),
            _ => self.due.remove(&apic_id),
        };
        self.arm();
    }

    /// Sets the timer to the earliest time, if it is not.
    fn arm(&mut self) {
        let earliest = self.earliest();
        if earliest != self.armed {
            self.set(earliest);
        }
    }

    /// Sets the timer, or switches it off; either takes an expiry off its descriptor.
    fn set(&mut self, earliest: Option<Instant>) {
        self.armed = earliest;
        let set = match earliest {
            // No time at all would switch the timer off.
            Some(at) => {
                let left = at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
                self.timer.reset(left, None)
            }
            None => self.timer.clear(),
        };
        if let Err(err) = set {
            log::warn!("the timer for parked processors cannot be set: {err}");
        }
    }
}

/// Delivers a message to a local APIC.
type Send = dyn Fn(Msi) -> Result<(), EngineError> + std::marker::Send + Sync;

/// The timer; clones share it.
#[derive(Clone)]
pub(crate) struct ParkTimer {
    send: Arc<Send>,
    fd: RawFd,
    wakes: Arc<Mutex<Wakes>>,
}

impl ParkTimer {
    /// A timer that wakes by `send`. Guest time stands still until [`ParkTimer::start`].
    pub(crate) fn new(
        send: impl Fn(Msi) -> Result<(), EngineError> + std::marker::Send + Sync + 'static,
    ) -> io::Result<Self> {
        let timer = TimerFd::new().map_err(io::Error::from)?;
        let fd = timer.as_raw_fd();
        Ok(ParkTimer {
            send: Arc::new(send),
            fd,
            wakes: Arc::new(Mutex::new(Wakes {
                due: BTreeMap::new(),
                timer,
                armed: None,
                stopped_at: Some(Instant::now()),
            })),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Wakes> {
        self.wakes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends `vector` to the processor with this APIC id after the time. Replaces what it asked for before; all ones
    /// takes that back.
    pub(crate) fn wake_after(&self, apic_id: u32, vector: u8, timeout_ns: u64) {
        let mut wakes = self.lock();
        if timeout_ns == 0 {
            wakes.due.remove(&apic_id);
            return self.wake(apic_id, vector);
        }
        wakes.insert(apic_id, vector, timeout_ns);
    }

    /// Takes up what [`ParkTimer::save`] said. Nothing is sent before the event loop runs, not even what is due: the
    /// processors are not in their state yet.
    pub(crate) fn restore(&self, parked: Vec<(u32, u64, u8)>) {
        let mut wakes = self.lock();
        for (apic_id, left_ns, vector) in parked {
            wakes.insert(apic_id, vector, left_ns.min(u64::MAX - 1));
        }
    }

    /// Who waits, for how many nanoseconds more, and with which vector.
    pub(crate) fn save(&self) -> Vec<(u32, u64, u8)> {
        let wakes = self.lock();
        let now = wakes.now();
        let left = |at: &Instant| u64::try_from(at.saturating_duration_since(now).as_nanos());
        wakes.due.iter().map(|(id, (at, vector))| (*id, left(at).unwrap_or(u64::MAX - 1), *vector)).collect()
    }

    /// Guest time stands still from here on.
    pub(crate) fn stop(&self) {
        self.lock().stopped_at = Some(Instant::now());
    }

    /// Guest time goes on: what is waited for comes later by as long as it stood.
    pub(crate) fn start(&self) {
        let mut wakes = self.lock();
        let Some(stopped_at) = wakes.stopped_at.take() else { return };
        let stood = stopped_at.elapsed();
        for (at, _) in wakes.due.values_mut() {
            *at = at.checked_add(stood).unwrap_or(*at);
        }
        wakes.arm();
    }

    /// What the event loop watches.
    pub(crate) fn subscriber(&self) -> Subscriber {
        Box::new(self.clone())
    }

    fn wake(&self, apic_id: u32, vector: u8) {
        let msi = Msi { address: MSI_ADDRESS | u64::from(apic_id & 0xff) << 12, data: vector.into() };
        if let Err(err) = (self.send)(msi) {
            log::warn!("a parked processor's wake-up {msi:x?} is lost: {err}");
        }
    }

    /// Sends what is due.
    fn send_due(&self) {
        let mut wakes = self.lock();
        if wakes.stopped_at.is_some() {
            // The start sets the timer anew.
            return wakes.set(None);
        }
        let now = Instant::now();
        wakes.due.retain(|apic_id, (at, vector)| {
            if *at > now {
                return true;
            }
            self.wake(*apic_id, *vector);
            false
        });
        let earliest = wakes.earliest();
        wakes.set(earliest);
    }
}

impl AsRawFd for ParkTimer {
    fn as_raw_fd(&self) -> RawFd {
        self.fd
    }
}

impl MutEventSubscriber for ParkTimer {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.send_due();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(err) = ops.add(Events::new(self, EventSet::IN)) {
            log::error!("the timer for parked processors cannot be watched: {err}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wake_up_that_was_due_in_a_snapshot_is_sent_when_the_machine_runs_and_not_before() {
        let sent = Arc::new(Mutex::new(Vec::new()));
        let timer = || {
            let sent = Arc::clone(&sent);
            ParkTimer::new(move |msi| {
                sent.lock().unwrap().push(msi);
                Ok(())
            })
        };
        let before = timer().unwrap();
        before.start();
        before.wake_after(0, 0x51, 1);
        std::thread::sleep(Duration::from_millis(1));
        let saved = before.save();
        assert_eq!(saved, [(0, 0, 0x51)]);

        let timer = timer().unwrap();
        timer.restore(saved);
        assert!(sent.lock().unwrap().is_empty(), "the processors' state would overwrite it");
        timer.send_due();
        assert!(sent.lock().unwrap().is_empty(), "guest time stands still");
        timer.start();
        timer.send_due();
        assert_eq!(*sent.lock().unwrap(), [Msi { address: MSI_ADDRESS, data: 0x51 }]);
        assert!(timer.save().is_empty());
    }

    #[test]
    fn a_wait_is_as_long_after_a_pause_as_it_was_before() {
        let timer = ParkTimer::new(|_| Ok(())).unwrap();
        timer.start();
        timer.wake_after(0, 0x51, 1_000_000_000);
        timer.stop();
        let before = timer.save();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(timer.save(), before, "it stands still");
        let at = |timer: &ParkTimer| timer.lock().due[&0].0;
        let due = at(&timer);
        timer.start();
        let later = at(&timer);
        assert!(later - due >= Duration::from_millis(20));
        assert_eq!(timer.lock().armed, Some(later));
    }
}
