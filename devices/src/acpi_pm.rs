//! Power control of a hardware-reduced ACPI machine: sleep control, sleep status and reset registers.
//!
//! ACPI specification 6.5, sections 4.8.3.7 (sleep registers) and 4.8.3.6 (reset register). The machine's FADT
//! names the three ports and its `\_S5` object holds [`S5_SLEEP_TYPE`].

use std::sync::Arc;

use harrier_engine::Flow;

use crate::bus::BusDevice;
use crate::power::{PowerEvent, PowerSink};

/// First port.
pub const PORT: u16 = 0x600;
/// Ports that the device takes.
pub const SIZE: u64 = 3;
/// Offset of the sleep control register, 8 bits.
pub const OFFSET_SLEEP_CONTROL: u64 = 0;
/// Offset of the sleep status register, 8 bits.
pub const OFFSET_SLEEP_STATUS: u64 = 1;
/// Offset of the reset register, 8 bits.
pub const OFFSET_RESET: u64 = 2;
/// The value that resets when written to the reset register.
pub const RESET_VALUE: u8 = 1;
/// The sleep type that means off.
pub const S5_SLEEP_TYPE: u8 = 5;

const SLEEP_ENABLE: u8 = 1 << 5;

/// The power registers.
pub struct AcpiPm {
    power: Arc<dyn PowerSink>,
}

impl AcpiPm {
    /// Registers that ask `power` for what the guest writes.
    pub fn new(power: Arc<dyn PowerSink>) -> Self {
        AcpiPm { power }
    }
}

crate::stateless!(AcpiPm, "acpi-pm");

impl BusDevice for AcpiPm {
    fn read(&mut self, _offset: u64, data: &mut [u8]) -> Flow {
        // Sleep enable is write-only, and the machine never wakes: wake status stays clear.
        data.fill(0);
        Flow::Continue
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Flow {
        let Some(&value) = data.first() else { return Flow::Continue };
        let event = match offset {
            OFFSET_SLEEP_CONTROL if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == S5_SLEEP_TYPE => {
                PowerEvent::PowerOff
            }
            OFFSET_RESET if value == RESET_VALUE => PowerEvent::Reset,
            _ => return Flow::Continue,
        };
        self.power.request(event);
        Flow::Leave
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::tests::Requests;

    #[test]
    fn s5_with_sleep_enable_powers_off_and_nothing_else_does() {
        let power = Arc::new(Requests::default());
        let mut device = AcpiPm::new(power.clone());
        for value in 0..=0xffu8 {
            let off = value & 0x3c == 0x34;
            let flow = device.write(OFFSET_SLEEP_CONTROL, &[value]);
            assert_eq!(flow, if off { Flow::Leave } else { Flow::Continue }, "{value:#x}");
            assert_eq!(power.take(), if off { vec![PowerEvent::PowerOff] } else { vec![] });
            assert_eq!(device.write(OFFSET_SLEEP_STATUS, &[value]), Flow::Continue);
        }
    }

    #[test]
    fn the_reset_value_resets() {
        let power = Arc::new(Requests::default());
        let mut device = AcpiPm::new(power.clone());
        assert_eq!(device.write(OFFSET_RESET, &[0]), Flow::Continue);
        assert_eq!(device.write(OFFSET_RESET, &[RESET_VALUE]), Flow::Leave);
        assert_eq!(power.take(), [PowerEvent::Reset]);
    }
}
