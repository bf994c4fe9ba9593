//! A 16550A serial port.
//!
//! Registers and interrupt priorities as in the National Semiconductor PC16550D datasheet. [`Serial`] is the chip:
//! it never blocks. What the guest prints goes to a [`ByteOutput`]; while that is full, the transmitter is
//! reported busy and a driver that heeds it waits without losing a byte. What the guest is to read comes
//! through [`Serial::enqueue`], usually from [`crate::serial_input::SerialInput`].

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use harrier_engine::Flow;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::byte_output::ByteOutput;
use crate::interrupt::InterruptLine;
use crate::state::{BadState, Stateful};

/// First port of COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// Interrupt of COM1.
pub const COM1_IRQ: u32 = 4;
/// Ports that the device takes.
pub const SIZE: u64 = 8;

const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
/// Interrupt identification when read, FIFO control when written.
const INTERRUPT_ID: u64 = 2;
const LINE_CONTROL: u64 = 3;
const MODEM_CONTROL: u64 = 4;
const LINE_STATUS: u64 = 5;
const MODEM_STATUS: u64 = 6;
const SCRATCH: u64 = 7;

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMITTER_EMPTY: u8 = 1 << 1;
const IER_LINE_STATUS: u8 = 1 << 2;
const IER_MODEM_STATUS: u8 = 1 << 3;
const IER_BITS: u8 = 0x0f;

const IIR_NONE: u8 = 0x01;
const IIR_LINE_STATUS: u8 = 0x06;
const IIR_RECEIVED: u8 = 0x04;
const IIR_RECEIVE_TIMEOUT: u8 = 0x0c;
const IIR_TRANSMITTER_EMPTY: u8 = 0x02;
const IIR_MODEM_STATUS: u8 = 0x00;
const IIR_FIFOS: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;

const LCR_DIVISOR_LATCH: u8 = 1 << 7;
const LCR_8_BITS: u8 = 0x03;

const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOPBACK: u8 = 1 << 4;
const MCR_BITS: u8 = 0x1f;

const LSR_DATA_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_HOLDING_EMPTY: u8 = 1 << 5;
const LSR_TRANSMITTER_EMPTY: u8 = 1 << 6;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RING: u8 = 1 << 6;
const MSR_CARRIER: u8 = 1 << 7;

const FIFO_SIZE: usize = 16;
/// 9600 baud at the usual 1.8432 MHz.
const DEFAULT_DIVISOR: u16 = 12;

/// The chip.
pub struct Serial {
    line: Arc<dyn InterruptLine>,
    output: ByteOutput,
    /// Told when the receiver is empty after bytes were refused.
    input_room: EventFd,
    input_refused: bool,

    interrupt_enable: u8,
    line_control: u8,
    modem_control: u8,
    /// Upper half: the inputs; lower half: which of them changed since the last read.
    modem_status: u8,
    scratch: u8,
    divisor: u16,
    fifos: bool,
    receive_trigger: usize,
    receiver: VecDeque<u8>,
    overrun: bool,
    /// The transmitter-empty interrupt is due: the condition arose and IIR has not shown it yet.
    empty_due: bool,
    /// A byte was refused or the transmitter found full; it is reported busy until told otherwise.
    transmitter_full: bool,
}

impl Serial {
    /// A port that interrupts on `line` and prints to `output`.
    ///
    /// # Errors
    /// The host has no event descriptor to give.
    pub fn new(line: Arc<dyn InterruptLine>, output: ByteOutput) -> io::Result<Self> {
        Ok(Serial {
            line,
            output,
            input_room: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            input_refused: false,
            interrupt_enable: 0,
            line_control: LCR_8_BITS,
            modem_control: 0,
            modem_status: MSR_CTS | MSR_DSR | MSR_CARRIER,
            scratch: 0,
            divisor: DEFAULT_DIVISOR,
            fifos: false,
            receive_trigger: 1,
            receiver: VecDeque::with_capacity(FIFO_SIZE),
            overrun: false,
            empty_due: false,
            transmitter_full: false,
        })
    }

    /// Gives bytes to the guest; answers how many were taken. After fewer than all, [`Serial::input_room`] is
    /// signalled once the guest has read what it had.
    pub fn enqueue(&mut self, bytes: &[u8]) -> usize {
        let room = if self.modem_control & MCR_LOOPBACK != 0 {
            0
        } else {
            self.receive_capacity().saturating_sub(self.receiver.len())
        };
        let taken = bytes.len().min(room);
        self.receiver.extend(bytes.iter().take(taken));
        self.input_refused |= taken < bytes.len();
        self.update_line();
        taken
    }

    /// Signalled when [`Serial::enqueue`] will take bytes again after it has refused some.
    pub fn input_room(&self) -> &EventFd {
        &self.input_room
    }

    /// The [`ByteOutput`] has room again after it was full.
    pub fn output_has_room(&mut self) {
        if std::mem::take(&mut self.transmitter_full) {
            self.empty_due = true;
            self.update_line();
        }
    }

    fn receive_capacity(&self) -> usize {
        if self.fifos { FIFO_SIZE } else { 1 }
    }

    /// The interrupt of the highest priority, in IIR's code.
    fn pending(&self) -> u8 {
        let enabled = |bit| self.interrupt_enable & bit != 0;
        if enabled(IER_LINE_STATUS) && self.overrun {
            IIR_LINE_STATUS
        } else if enabled(IER_RECEIVED) && !self.receiver.is_empty() {
            // Fewer bytes than the trigger level interrupt after four silent character times: at once here.
            if !self.fifos || self.receiver.len() >= self.receive_trigger {
                IIR_RECEIVED
            } else {
                IIR_RECEIVE_TIMEOUT
            }
        } else if enabled(IER_TRANSMITTER_EMPTY) && self.empty_due {
            IIR_TRANSMITTER_EMPTY
        } else if enabled(IER_MODEM_STATUS) && self.modem_status & 0x0f != 0 {
            IIR_MODEM_STATUS
        } else {
            IIR_NONE
        }
    }

    fn update_line(&self) {
        self.line.set_level(self.pending() != IIR_NONE);
    }

    fn receive_looped(&mut self, byte: u8) {
        if self.receiver.len() < self.receive_capacity() {
            self.receiver.push_back(byte);
        } else {
            self.overrun = true;
        }
    }

    fn transmit(&mut self, byte: u8) {
        if self.modem_control & MCR_LOOPBACK != 0 {
            self.receive_looped(byte);
            self.empty_due = true;
        } else if self.output.push(byte) {
            self.transmitter_full = false;
            // The byte is gone at once; a driver that writes a burst sees one interrupt, not sixteen.
            self.empty_due = true;
        } else {
            self.transmitter_full = true;
            self.empty_due = false;
        }
    }

    fn line_status(&mut self) -> u8 {
        if self.transmitter_full && self.output.has_room() {
            self.output_has_room();
        }
        let mut status = 0;
        if !self.transmitter_full {
            if self.modem_control & MCR_LOOPBACK != 0 || self.output.has_room() {
                status |= LSR_HOLDING_EMPTY | LSR_TRANSMITTER_EMPTY;
            } else {
                self.transmitter_full = true;
                self.empty_due = false;
            }
        }
        if !self.receiver.is_empty() {
            status |= LSR_DATA_READY;
        }
        if std::mem::take(&mut self.overrun) {
            status |= LSR_OVERRUN;
        }
        status
    }

    fn modem_inputs(&self) -> u8 {
        if self.modem_control & MCR_LOOPBACK == 0 {
            return MSR_CTS | MSR_DSR | MSR_CARRIER;
        }
        [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RING), (MCR_OUT2, MSR_CARRIER)]
            .into_iter()
            .filter(|(output, _)| self.modem_control & output != 0)
            .fold(0, |inputs, (_, input)| inputs | input)
    }

    fn set_modem_control(&mut self, value: u8) {
        self.modem_control = value & MCR_BITS;
        let before = self.modem_status & 0xf0;
        let now = self.modem_inputs();
        let mut changed = (before ^ now) >> 4;
        // The ring indicator counts only when it falls.
        if now & MSR_RING != 0 {
            changed &= !(MSR_RING >> 4);
        }
        self.modem_status = now | self.modem_status & 0x0f | changed;
    }

    fn set_fifo_control(&mut self, value: u8) {
        let fifos = value & FCR_ENABLE != 0;
        if fifos != self.fifos || value & FCR_CLEAR_RECEIVER != 0 {
            self.receiver.clear();
        }
        self.fifos = fifos;
        self.receive_trigger = match value >> 6 {
            0 => 1,
            1 => 4,
            2 => 8,
            _ => 14,
        };
    }

    fn read_register(&mut self, offset: u64) -> u8 {
        let latch = self.line_control & LCR_DIVISOR_LATCH != 0;
        match offset {
            DATA if latch => self.divisor as u8,
            INTERRUPT_ENABLE if latch => (self.divisor >> 8) as u8,
            DATA => self.receiver.pop_front().unwrap_or(0),
            INTERRUPT_ENABLE => self.interrupt_enable,
            INTERRUPT_ID => {
                let pending = self.pending();
                if pending == IIR_TRANSMITTER_EMPTY {
                    self.empty_due = false;
                }
                pending | if self.fifos { IIR_FIFOS } else { 0 }
            }
            LINE_CONTROL => self.line_control,
            MODEM_CONTROL => self.modem_control,
            LINE_STATUS => self.line_status(),
            MODEM_STATUS => {
                let status = self.modem_status;
                self.modem_status &= 0xf0;
                status
            }
            SCRATCH => self.scratch,
            _ => 0xff,
        }
    }

    fn write_register(&mut self, offset: u64, value: u8) {
        let latch = self.line_control & LCR_DIVISOR_LATCH != 0;
        match offset {
            DATA if latch => self.divisor = self.divisor & 0xff00 | u16::from(value),
            INTERRUPT_ENABLE if latch => self.divisor = self.divisor & 0xff | u16::from(value) << 8,
            DATA => self.transmit(value),
            INTERRUPT_ENABLE => {
                let risen = value & !self.interrupt_enable;
                self.interrupt_enable = value & IER_BITS;
                // Enabling it while the transmitter is empty raises it, which drivers use to start sending.
                if risen & IER_TRANSMITTER_EMPTY != 0 && !self.transmitter_full {
                    self.empty_due = true;
                }
            }
            INTERRUPT_ID => self.set_fifo_control(value),
            LINE_CONTROL => self.line_control = value,
            MODEM_CONTROL => self.set_modem_control(value),
            SCRATCH => self.scratch = value,
            _ => {}
        }
    }

    fn tell_input_room(&mut self) {
        if self.input_refused && self.receiver.is_empty() && self.modem_control & MCR_LOOPBACK == 0 {
            self.input_refused = false;
            if let Err(error) = self.input_room.write(1) {
                log::warn!("serial: cannot signal room for input: {error}");
            }
        }
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Flow {
        // A wider access hits the registers one after the other, as on an 8-bit device behind a bus.
        for (i, byte) in (offset..).zip(data) {
            *byte = self.read_register(i);
        }
        self.tell_input_room();
        self.update_line();
        Flow::Continue
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Flow {
        for (i, byte) in (offset..).zip(data) {
            self.write_register(i, *byte);
        }
        self.tell_input_room();
        self.update_line();
        Flow::Continue
    }
}

/// What a snapshot keeps of the port.
pub mod state {
    use serde::{Deserialize, Serialize};

    /// Registers and receiver. What waits for the host to be written stays with the host.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(missing_docs, reason = "the fields are the datasheet's registers")]
    pub struct SerialState {
        pub interrupt_enable: u8,
        pub line_control: u8,
        pub modem_control: u8,
        pub modem_status: u8,
        pub scratch: u8,
        pub divisor: u16,
        pub fifos: bool,
        pub receive_trigger: u8,
        pub receiver: Vec<u8>,
        pub overrun: bool,
        pub empty_due: bool,
    }
}

impl Stateful for Serial {
    type State = state::SerialState;
    const NAME: &'static str = "serial";

    fn save(&self) -> Self::State {
        state::SerialState {
            interrupt_enable: self.interrupt_enable,
            line_control: self.line_control,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            divisor: self.divisor,
            fifos: self.fifos,
            receive_trigger: self.receive_trigger as u8,
            receiver: self.receiver.iter().copied().collect(),
            overrun: self.overrun,
            // A restored port prints to an output that has room, and the driver that waits has to hear of it.
            empty_due: self.empty_due || self.transmitter_full,
        }
    }

    fn restore(&mut self, state: Self::State) -> Result<(), BadState> {
        let trigger = usize::from(state.receive_trigger);
        BadState::unless([1, 4, 8, 14].contains(&trigger), || format!("no receive trigger is {trigger}"))?;
        let waiting = state.receiver.len();
        BadState::unless(waiting <= FIFO_SIZE, || format!("{waiting} bytes do not fit the receiver"))?;
        self.interrupt_enable = state.interrupt_enable & IER_BITS;
        self.line_control = state.line_control;
        self.modem_control = state.modem_control & MCR_BITS;
        self.modem_status = state.modem_status;
        self.scratch = state.scratch;
        self.divisor = state.divisor;
        self.fifos = state.fifos;
        self.receive_trigger = trigger;
        self.receiver = state.receiver.into();
        self.overrun = state.overrun;
        self.empty_due = state.empty_due;
        self.transmitter_full = false;
        self.update_line();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::tests::RecordedLine;

    fn port() -> (Serial, Arc<RecordedLine>, ByteOutput) {
        let line = Arc::new(RecordedLine::default());
        let output = ByteOutput::new(64);
        (Serial::new(line.clone(), output.clone()).unwrap(), line, output)
    }

    fn get(serial: &mut Serial, offset: u64) -> u8 {
        let mut data = [0];
        let _ = serial.read(offset, &mut data);
        data[0]
    }

    fn put(serial: &mut Serial, offset: u64, value: u8) {
        let _ = serial.write(offset, &[value]);
    }

    #[test]
    fn bytes_written_come_out_and_the_transmitter_is_ready_again() {
        let (mut serial, _, output) = port();
        for byte in b"hello" {
            put(&mut serial, DATA, *byte);
            assert_eq!(get(&mut serial, LINE_STATUS), LSR_HOLDING_EMPTY | LSR_TRANSMITTER_EMPTY);
        }
        assert_eq!(output.take(), b"hello");
    }

    #[test]
    fn it_probes_as_a_16550a_and_passes_the_loopback_test() {
        let (mut serial, _, _) = port();
        put(&mut serial, INTERRUPT_ENABLE, 0xff);
        assert_eq!(get(&mut serial, INTERRUPT_ENABLE), 0x0f);
        put(&mut serial, INTERRUPT_ENABLE, 0);
        put(&mut serial, MODEM_CONTROL, MCR_LOOPBACK | 0x0a);
        assert_eq!(get(&mut serial, MODEM_STATUS) & 0xf0, 0x90);
        put(&mut serial, MODEM_CONTROL, 0);
        put(&mut serial, INTERRUPT_ID, FCR_ENABLE | 0x20);
        assert_eq!(get(&mut serial, INTERRUPT_ID) >> 5, 6);
        put(&mut serial, SCRATCH, 0x5a);
        assert_eq!(get(&mut serial, SCRATCH), 0x5a);
        put(&mut serial, LINE_CONTROL, LCR_DIVISOR_LATCH | LCR_8_BITS);
        put(&mut serial, DATA, 1);
        put(&mut serial, INTERRUPT_ENABLE, 2);
        assert_eq!((get(&mut serial, DATA), get(&mut serial, INTERRUPT_ENABLE)), (1, 2));
    }

    #[test]
    fn enabling_the_transmit_interrupt_raises_it_every_time() {
        let (mut serial, line, _) = port();
        for _ in 0..3 {
            put(&mut serial, INTERRUPT_ENABLE, IER_TRANSMITTER_EMPTY);
            assert!(line.is_high());
            assert_eq!(get(&mut serial, INTERRUPT_ID), IIR_TRANSMITTER_EMPTY);
            assert!(!line.is_high());
            assert_eq!(get(&mut serial, INTERRUPT_ID), IIR_NONE);
            put(&mut serial, DATA, b'x');
            assert!(line.is_high());
            put(&mut serial, INTERRUPT_ENABLE, 0);
            assert!(!line.is_high());
        }
    }

    #[test]
    fn a_burst_of_sixteen_bytes_rises_the_line_once() {
        let (mut serial, line, _) = port();
        put(&mut serial, INTERRUPT_ENABLE, IER_TRANSMITTER_EMPTY);
        assert_eq!(get(&mut serial, INTERRUPT_ID), IIR_TRANSMITTER_EMPTY);
        let before = line.rises();
        for byte in 0..16 {
            put(&mut serial, DATA, byte);
        }
        assert_eq!(line.rises(), before + 1);
    }

    #[test]
    fn input_interrupts_until_it_is_read_and_asks_for_more_when_empty() {
        let (mut serial, line, _) = port();
        put(&mut serial, INTERRUPT_ID, FCR_ENABLE | 0x80);
        put(&mut serial, INTERRUPT_ENABLE, IER_RECEIVED);
        let input: Vec<u8> = (0..20).collect();
        assert_eq!(serial.enqueue(&input), FIFO_SIZE);
        assert!(line.is_high());
        assert_eq!(get(&mut serial, INTERRUPT_ID), IIR_FIFOS | IIR_RECEIVED);
        for expected in 0..16 {
            assert!(serial.input_room().read().is_err());
            assert_eq!(get(&mut serial, LINE_STATUS) & LSR_DATA_READY, LSR_DATA_READY);
            assert_eq!(get(&mut serial, DATA), expected);
        }
        assert!(!line.is_high());
        assert_eq!(serial.input_room().read().unwrap(), 1);
        assert_eq!(serial.enqueue(&input[16..]), 4);
        assert_eq!(get(&mut serial, INTERRUPT_ID), IIR_FIFOS | IIR_RECEIVE_TIMEOUT);
        put(&mut serial, INTERRUPT_ID, FCR_ENABLE | FCR_CLEAR_RECEIVER);
        assert!(!line.is_high());
    }

    #[test]
    fn without_fifos_one_byte_is_taken() {
        let (mut serial, _, _) = port();
        assert_eq!(serial.enqueue(b"ab"), 1);
        assert_eq!(serial.enqueue(b"b"), 0);
        assert_eq!(get(&mut serial, DATA), b'a');
        assert_eq!(serial.enqueue(b"b"), 1);
    }

    #[test]
    fn a_full_output_holds_the_transmitter_busy_and_loses_nothing_that_a_driver_waits_for() {
        let (mut serial, line, output) = port();
        let mut sent = 0;
        while get(&mut serial, LINE_STATUS) & LSR_HOLDING_EMPTY != 0 {
            put(&mut serial, DATA, sent);
            sent += 1;
        }
        assert_eq!(sent, 64);
        put(&mut serial, INTERRUPT_ENABLE, IER_TRANSMITTER_EMPTY);
        assert!(!line.is_high());
        put(&mut serial, DATA, 0xee);
        assert_eq!(output.take(), (0..64).collect::<Vec<u8>>());
        serial.output_has_room();
        assert!(line.is_high());
        assert_eq!(get(&mut serial, LINE_STATUS), LSR_HOLDING_EMPTY | LSR_TRANSMITTER_EMPTY);
    }

    #[test]
    fn loopback_overruns_are_reported_once() {
        let (mut serial, _, output) = port();
        put(&mut serial, MODEM_CONTROL, MCR_LOOPBACK);
        put(&mut serial, DATA, 1);
        put(&mut serial, DATA, 2);
        assert_eq!(get(&mut serial, LINE_STATUS) & (LSR_OVERRUN | LSR_DATA_READY), 3);
        assert_eq!(get(&mut serial, LINE_STATUS) & LSR_OVERRUN, 0);
        assert_eq!(get(&mut serial, DATA), 1);
        assert!(output.take().is_empty());
        assert_eq!(serial.enqueue(b"x"), 0);
    }

    #[test]
    fn any_access_at_any_width_is_survived() {
        let (mut serial, _, output) = port();
        let mut x = 3u64;
        for i in 0..50_000 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let width = 1 << (x >> 60 & 3);
            let bytes = (x >> 8).to_le_bytes();
            let _ = serial.write(x >> 32 & 7, &bytes[..width]);
            let mut data = [0; 8];
            let _ = serial.read(x >> 40 & 7, &mut data[..width]);
            assert!(serial.enqueue(&bytes) <= FIFO_SIZE);
            assert!(serial.receiver.len() <= FIFO_SIZE);
            if i % 100 == 0 {
                output.take();
                serial.output_has_room();
            }
        }
    }
}
