//! Guest time as one thing: the engine's clock, the page that carries it to the guest, and the waits that it measures
//! stop together and go on together.

use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use harrier_devices::doorbell::Events;
use harrier_engine::{EngineError, Vcpu, Vm};
use harrier_hypercall_abi::port::event;

use crate::hypercalls::{GuestClock, ParkTimer};

/// What of a machine follows guest time.
pub(crate) struct GuestTime {
    vm: Arc<dyn Vm>,
    /// Of a machine with a doorbell.
    doorbell: OnceLock<DoorbellTime>,
}

/// Guest time as hypercalls show it. Whoever still has a handle of a machine that is gone keeps none of its memory.
pub(crate) struct DoorbellTime {
    pub(crate) clock: Weak<GuestClock>,
    pub(crate) park: ParkTimer,
    /// By which the guest is told that its wall clock is wrong.
    pub(crate) events: Events,
    /// Whose TSC the clock page is tied to.
    pub(crate) boot_processor: Weak<Mutex<Box<dyn Vcpu>>>,
}

impl GuestTime {
    pub(crate) fn new(vm: Arc<dyn Vm>) -> Self {
        GuestTime { vm, doorbell: OnceLock::new() }
    }

    /// Adds what hypercalls show, once.
    pub(crate) fn add_doorbell(&self, doorbell: DoorbellTime) {
        let _ = self.doorbell.set(doorbell);
    }

    /// Guest time stands still from here on. No vCPU runs.
    pub(crate) fn stop(&self) {
        if let Err(err) = self.try_stop() {
            log::warn!("machine: guest time cannot be stopped: {err}");
        }
    }

    /// Guest time goes on where [`GuestTime::stop`] stopped it. No vCPU runs yet.
    pub(crate) fn start(&self) {
        if let Err(err) = self.try_start() {
            log::warn!("machine: guest time does not go on where it was: {err}");
        }
    }

    fn try_stop(&self) -> Result<(), EngineError> {
        let Some(doorbell) = self.doorbell.get() else { return self.vm.stop_time() };
        // Waits stop first and go on last: none ends before its time.
        doorbell.park.stop();
        self.vm.stop_time()?;
        doorbell.with_clock(|clock, tsc| clock.stop(tsc)).map(drop)
    }

    fn try_start(&self) -> Result<(), EngineError> {
        let Some(doorbell) = self.doorbell.get() else { return self.vm.start_time() };
        let started = self.vm.clock_ns().and_then(|stood_at_ns| self.vm.start_time().map(|()| stood_at_ns));
        // Whatever the engine answers, nobody waits for ever.
        doorbell.park.start();
        let stood_at_ns = started?;
        if doorbell.with_clock(|clock, tsc| clock.tie(tsc, stood_at_ns))?.unwrap_or(false) {
            doorbell.events.raise(event::CLOCK);
        }
        Ok(())
    }
}

impl DoorbellTime {
    /// Calls `act` with the guest's clock and its TSC, if the machine is there.
    fn with_clock<T>(
        &self,
        act: impl FnOnce(&GuestClock, u64) -> Result<T, EngineError>,
    ) -> Result<Option<T>, EngineError> {
        let (Some(clock), Some(vcpu)) = (self.clock.upgrade(), self.boot_processor.upgrade()) else {
            return Ok(None);
        };
        let tsc = vcpu.lock().unwrap_or_else(PoisonError::into_inner).tsc()?;
        act(&clock, tsc).map(Some)
    }
}
