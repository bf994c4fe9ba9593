//! A port with which a bare-metal test guest ends the run and hands back a number.

use std::sync::Arc;

use harrier_engine::Flow;

use crate::bus::BusDevice;
use crate::power::{PowerEvent, PowerSink};

/// The port that test guests use unless told otherwise.
pub const DEFAULT_PORT: u16 = 0xf4;
/// Ports that the device takes.
pub const SIZE: u64 = 4;

/// The exit port: a write of `v` ends the run with [`PowerEvent::DebugExit`]`(v)`.
pub struct DebugExit {
    power: Arc<dyn PowerSink>,
}

impl DebugExit {
    /// A port that reports to `power`.
    pub fn new(power: Arc<dyn PowerSink>) -> Self {
        DebugExit { power }
    }
}

crate::stateless!(DebugExit, "debug-exit");

impl BusDevice for DebugExit {
    fn read(&mut self, _offset: u64, data: &mut [u8]) -> Flow {
        data.fill(0);
        Flow::Continue
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Flow {
        let mut code = [0; 4];
        for (to, from) in code.iter_mut().zip(data) {
            *to = *from;
        }
        self.power.request(PowerEvent::DebugExit(u32::from_le_bytes(code)));
        Flow::Leave
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::tests::Requests;

    #[test]
    fn a_write_of_any_width_ends_the_run_with_its_value() {
        let power = Arc::new(Requests::default());
        let mut device = DebugExit::new(power.clone());
        assert_eq!(device.write(0, &[7]), Flow::Leave);
        assert_eq!(device.write(0, &0x1234_5678u32.to_le_bytes()), Flow::Leave);
        assert_eq!(power.take(), [PowerEvent::DebugExit(7), PowerEvent::DebugExit(0x1234_5678)]);
    }
}
