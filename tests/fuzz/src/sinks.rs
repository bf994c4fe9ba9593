//! Ends for what devices send out.

use harrier_devices::{InterruptLine, MsiSink, PowerEvent, PowerSink};
use harrier_engine::{GsiRoute, Msi};

/// Swallows interrupts, messages and power events.
pub struct Nowhere;

impl InterruptLine for Nowhere {
    fn set_level(&self, _high: bool) {}
}

impl MsiSink for Nowhere {
    fn send_msi(&self, msi: Msi) {
        assert_eq!(msi.address >> 20, 0xfee);
    }

    fn set_gsi_routes(&self, routes: &[GsiRoute]) {
        assert!(routes.len() <= 24);
    }
}

impl PowerSink for Nowhere {
    fn request(&self, _event: PowerEvent) {}
}
