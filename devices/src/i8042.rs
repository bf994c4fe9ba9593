//! As much of the PC keyboard controller as is needed to reset the machine, and no keyboard.
//!
//! Sits at ports 0x60 to 0x64. The status register always reads "output full, input empty": a driver that
//! tries to drain the output gives up after a few bytes and finds no controller (Linux within a millisecond,
//! where an empty status would cost it half a second for each command without answer), and code that waits
//! for the input to be empty before it writes the reset command goes on at once.

use std::sync::Arc;

use harrier_engine::Flow;

use crate::bus::BusDevice;
use crate::power::{PowerEvent, PowerSink};

/// First port.
pub const PORT: u16 = 0x60;
/// Ports that the device takes; those between data and command belong to nobody here.
pub const SIZE: u64 = 5;

const OFFSET_COMMAND: u64 = 4;
const STATUS_NO_CONTROLLER: u8 = 0xfd;
const COMMAND_PULSE_RESET: u8 = 0xfe;

/// The keyboard controller.
pub struct I8042 {
    power: Arc<dyn PowerSink>,
}

impl I8042 {
    /// A controller that asks `power` for the reset.
    pub fn new(power: Arc<dyn PowerSink>) -> Self {
        I8042 { power }
    }
}

crate::stateless!(I8042, "i8042");

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Flow {
        data.fill(0xff);
        if offset == OFFSET_COMMAND
            && let Some(first) = data.first_mut()
        {
            *first = STATUS_NO_CONTROLLER;
        }
        Flow::Continue
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Flow {
        if offset == OFFSET_COMMAND && data.first() == Some(&COMMAND_PULSE_RESET) {
            self.power.request(PowerEvent::Reset);
            return Flow::Leave;
        }
        Flow::Continue
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::tests::Requests;

    #[test]
    fn only_the_reset_command_at_the_command_port_resets() {
        let power = Arc::new(Requests::default());
        let mut device = I8042::new(power.clone());
        for command in 0..=0xffu8 {
            assert_eq!(device.write(0, &[command]), Flow::Continue);
            let expected = if command == 0xfe { Flow::Leave } else { Flow::Continue };
            assert_eq!(device.write(4, &[command]), expected);
        }
        assert_eq!(power.take(), [PowerEvent::Reset]);
    }

    #[test]
    fn a_driver_that_drains_the_output_gives_up_and_one_that_waits_for_input_does_not_wait() {
        let mut device = I8042::new(Arc::new(Requests::default()));
        for _ in 0..100 {
            let mut status = [0];
            let _ = device.read(4, &mut status);
            assert_eq!(status[0] & 0b11, 0b01);
            let _ = device.read(0, &mut status);
            assert_eq!(status, [0xff]);
        }
    }
}
