//! What devices need of interrupts: a line to raise, and for the interrupt controller a place to send messages.

use harrier_engine::{GsiRoute, Msi};

/// Takes message-signalled interrupts to the processors.
pub trait MsiSink: Send + Sync {
    /// Delivers `msi`. Never blocks, and never calls back into the device that sends.
    fn send_msi(&self, msi: Msi);
    /// Replaces the table that says which message each interrupt-controller pin sends.
    fn set_gsi_routes(&self, routes: &[GsiRoute]);
}

/// One input of an interrupt controller; devices hold it and may use it from any thread.
pub trait InterruptLine: Send + Sync {
    /// Drives the line. Driving it to the level that it has already is harmless.
    fn set_level(&self, high: bool);

    /// One edge: high, then low.
    fn pulse(&self) {
        self.set_level(true);
        self.set_level(false);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Remembers its level and how often it rose.
    #[derive(Default)]
    pub(crate) struct RecordedLine(Mutex<(bool, usize)>);

    impl RecordedLine {
        pub(crate) fn is_high(&self) -> bool {
            self.0.lock().unwrap().0
        }

        pub(crate) fn rises(&self) -> usize {
            self.0.lock().unwrap().1
        }
    }

    impl InterruptLine for RecordedLine {
        fn set_level(&self, high: bool) {
            let mut state = self.0.lock().unwrap();
            state.1 += usize::from(high && !state.0);
            state.0 = high;
        }
    }
}
