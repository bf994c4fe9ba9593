//! The port through which a guest kernel reports that it crashed.
//!
//! The interface is QEMU's pvpanic (docs/specs/pvpanic): a read gives the events that the device knows, a write
//! reports them. Linux finds it by the ACPI id `QEMU0001`.

use std::sync::Arc;

use harrier_engine::Flow;

use crate::bus::BusDevice;
use crate::power::{PowerEvent, PowerSink};

/// The port.
pub const PORT: u16 = 0x505;
/// Ports that the device takes.
pub const SIZE: u64 = 1;

const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;

/// The panic port.
pub struct PvPanic {
    power: Arc<dyn PowerSink>,
}

impl PvPanic {
    /// A port that reports to `power`.
    pub fn new(power: Arc<dyn PowerSink>) -> Self {
        PvPanic { power }
    }
}

crate::stateless!(PvPanic, "pvpanic");

impl BusDevice for PvPanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) -> Flow {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED | CRASH_LOADED;
        }
        Flow::Continue
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Flow {
        match data.first() {
            Some(events) if events & PANICKED != 0 => {
                self.power.request(PowerEvent::GuestPanic { crash_loaded: false });
                Flow::Leave
            }
            // The guest boots its crash kernel next, so it goes on running.
            Some(events) if events & CRASH_LOADED != 0 => {
                self.power.request(PowerEvent::GuestPanic { crash_loaded: true });
                Flow::Continue
            }
            _ => Flow::Continue,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::tests::Requests;

    #[test]
    fn the_port_offers_both_events_and_reports_what_is_written() {
        let power = Arc::new(Requests::default());
        let mut device = PvPanic::new(power.clone());
        let mut events = [0];
        let _ = device.read(0, &mut events);
        assert_eq!(events, [3]);
        assert_eq!(device.write(0, &[0xfc]), Flow::Continue);
        assert!(power.take().is_empty());
        assert_eq!(device.write(0, &[CRASH_LOADED]), Flow::Continue);
        assert_eq!(power.take(), [PowerEvent::GuestPanic { crash_loaded: true }]);
        assert_eq!(device.write(0, &[PANICKED]), Flow::Leave);
        assert_eq!(power.take(), [PowerEvent::GuestPanic { crash_loaded: false }]);
    }
}
