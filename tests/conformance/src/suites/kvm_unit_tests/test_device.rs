//! The device that QEMU calls pc-testdev, for runs of this suite only: a port that keeps what is written, ports
//! that drive interrupt lines, a page to flush, and memory that is a device's.

use std::sync::Arc;

use harrier_devices::{BusDevice, InterruptLine};
use harrier_engine::Flow;
use harrier_machine::{BuildError, MachineBuilder};

/// A register of four bytes.
const REGISTER_PORT: u16 = 0xe0;
const REGISTER_BYTES: usize = 4;
/// A write names a page whose translation the monitor shall forget; a software processor has none of its own.
const FLUSH_PORT: u16 = 0xe4;
/// A port for each of the first interrupt lines.
const LINES_PORT: u16 = 0x2000;
const LINES: u32 = 24;
/// Memory that answers as a device.
const MEMORY_GPA: u64 = 0xff00_0000;
const MEMORY_BYTES: usize = 0x1_0000;

/// Puts all of it into a machine.
pub(super) fn add(builder: &mut MachineBuilder) -> Result<(), BuildError> {
    builder.add_test_ports(REGISTER_PORT, REGISTER_BYTES as u64, Bytes::new(REGISTER_BYTES))?;
    builder.add_test_ports(FLUSH_PORT, 4, Bytes::new(4))?;
    let lines = (0..LINES).map(|gsi| builder.interrupt_line(gsi)).collect();
    builder.add_test_ports(LINES_PORT, u64::from(LINES), Lines(lines))?;
    builder.add_test_memory(MEMORY_GPA, MEMORY_BYTES as u64, Bytes::new(MEMORY_BYTES))
}

/// Keeps what is written to it.
struct Bytes(Vec<u8>);

impl Bytes {
    fn new(len: usize) -> Bytes {
        Bytes(vec![0; len])
    }
}

impl BusDevice for Bytes {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Flow {
        let stored = self.0.iter().skip(usize::try_from(offset).unwrap_or(usize::MAX));
        for (to, from) in data.iter_mut().zip(stored) {
            *to = *from;
        }
        Flow::Continue
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Flow {
        let stored = self.0.iter_mut().skip(usize::try_from(offset).unwrap_or(usize::MAX));
        for (to, from) in stored.zip(data) {
            *to = *from;
        }
        Flow::Continue
    }
}

/// A write to the port of a line raises it if the byte is not zero, and lowers it if it is.
struct Lines(Vec<Arc<dyn InterruptLine>>);

impl BusDevice for Lines {
    fn read(&mut self, _offset: u64, data: &mut [u8]) -> Flow {
        data.fill(0xff);
        Flow::Continue
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Flow {
        let line = usize::try_from(offset).ok().and_then(|offset| self.0.get(offset));
        if let (Some(line), Some(level)) = (line, data.first()) {
            line.set_level(*level != 0);
        }
        Flow::Continue
    }
}
