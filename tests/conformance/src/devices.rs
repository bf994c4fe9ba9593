//! The devices of machines that need next to none.

use harrier_engine::{Flow, Io};

/// Devices that are not there, but for one that hears what is written to ports and says how to go on.
pub(crate) struct PortWrites<F>(pub(crate) F);

impl PortWrites<fn(u16, &[u8]) -> Flow> {
    /// Nothing at all.
    pub(crate) fn unheard() -> Self {
        PortWrites(|_, _| Flow::Continue)
    }
}

impl<F: FnMut(u16, &[u8]) -> Flow> Io for PortWrites<F> {
    fn pio_read(&mut self, _port: u16, data: &mut [u8]) -> Flow {
        data.fill(0xff);
        Flow::Continue
    }
    fn pio_write(&mut self, port: u16, data: &[u8]) -> Flow {
        self.0(port, data)
    }
    fn mmio_read(&mut self, _gpa: u64, data: &mut [u8]) -> Flow {
        data.fill(0xff);
        Flow::Continue
    }
    fn mmio_write(&mut self, _gpa: u64, _data: &[u8]) -> Flow {
        Flow::Continue
    }
    fn eoi(&mut self, _vector: u8) -> Flow {
        Flow::Continue
    }
}
