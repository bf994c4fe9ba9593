//! How a device ends or interrupts the run of the whole machine.

/// What a device asks of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PowerEvent {
    /// The guest switched itself off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset (keyboard controller or ACPI reset register).
    Reset,
    /// The guest's kernel reported its own crash through pvpanic.
    GuestPanic {
        /// The guest goes on to load its crash kernel, so the machine may keep running.
        crash_loaded: bool,
    },
    /// A bare-metal guest ended with this code through the debug-exit port.
    DebugExit(u32),
}

/// Hears of [`PowerEvent`]s. A device that ends the run calls it and then answers
/// [`harrier_engine::Flow::Leave`].
pub trait PowerSink: Send + Sync {
    /// Takes note of `event`; never blocks and never calls back into the device. The first event that ends a
    /// run is the one that counts.
    fn request(&self, event: PowerEvent);
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Remembers what was requested.
    #[derive(Default)]
    pub(crate) struct Requests(Mutex<Vec<PowerEvent>>);

    impl Requests {
        pub(crate) fn take(&self) -> Vec<PowerEvent> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl PowerSink for Requests {
        fn request(&self, event: PowerEvent) {
            self.0.lock().unwrap().push(event);
        }
    }
}
