//! The I/O APIC: 24 pins, each of which sends the message that its redirection entry describes.
//!
//! Registers as in the Intel 82093AA datasheet, with version 20h's EOI register. [`IoApic`] sits on the MMIO
//! bus; devices drive it through the [`InterruptLine`]s of [`IoApic::line`], from any thread; messages and
//! routes leave through an [`MsiSink`]. Polarity is not modelled: a line is asserted or it is not.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use harrier_engine::{Flow, GsiRoute, Msi};

use crate::bus::BusDevice;
use crate::interrupt::{InterruptLine, MsiSink};
use crate::state::{BadState, Stateful};

/// Number of pins; pin `n` is global system interrupt `n`.
pub const PINS: u32 = 24;
/// Where the registers are in guest physical memory.
pub const BASE: u64 = 0xfec0_0000;
/// Bytes that the registers take.
pub const SIZE: u64 = 0x1000;

const VERSION: u32 = 0x20;

const REG_SELECT: u64 = 0x00;
const REG_WINDOW: u64 = 0x10;
const REG_EOI: u64 = 0x40;

const INDEX_ID: u8 = 0x00;
const INDEX_VERSION: u8 = 0x01;
const INDEX_ARBITRATION: u8 = 0x02;
const INDEX_ENTRIES: u8 = 0x10;

const REMOTE_IRR: u32 = 1 << 14;
const LEVEL: u32 = 1 << 15;
const MASKED: u32 = 1 << 16;
/// Vector, delivery mode, destination mode, polarity, trigger mode and mask; the rest is read-only.
const WRITABLE_LOW: u32 = 0x0001_afff;
const WRITABLE_HIGH: u32 = 0xff00_0000;

/// Messages with a lower vector are illegal for fixed interrupts (SDM volume 3, 12.5.2).
const FIRST_LEGAL_VECTOR: u32 = 16;

/// A redirection entry and the state of its pin.
#[derive(Debug, Clone, Copy)]
struct Pin {
    low: u32,
    high: u32,
    /// How many lines assert the pin (they are wired-OR).
    asserted: u32,
}

impl Pin {
    fn is_level(&self) -> bool {
        self.low & LEVEL != 0
    }

    fn vector(&self) -> u32 {
        self.low & 0xff
    }

    /// The message, if the entry describes one that exists here: there is no PIC for ExtINT and no SMM.
    fn message(&self) -> Option<Msi> {
        let delivery = (self.low >> 8) & 7;
        let legal = match delivery {
            0 | 1 => self.vector() >= FIRST_LEGAL_VECTOR,
            4 | 5 => true,
            _ => false,
        };
        let destination = u64::from(self.high >> 24);
        let logical = u64::from((self.low >> 11) & 1);
        legal.then_some(Msi {
            address: 0xfee0_0000 | destination << 12 | logical << 2,
            data: self.low & (LEVEL | 0x7ff) | 1 << 14,
        })
    }
}

struct State {
    select: u8,
    id: u32,
    pins: [Pin; PINS as usize],
    routes: Vec<GsiRoute>,
}

struct Shared {
    sink: Arc<dyn MsiSink>,
    state: Mutex<State>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a level pin's message if it is due. Edges are sent where they occur.
    fn service_level(&self, pin: &mut Pin) {
        if pin.asserted > 0
            && pin.is_level()
            && pin.low & (MASKED | REMOTE_IRR) == 0
            && let Some(msi) = pin.message()
        {
            pin.low |= REMOTE_IRR;
            self.sink.send_msi(msi);
        }
    }

    fn set_level(&self, index: u32, high: bool) {
        let mut state = self.lock();
        let Some(pin) = state.pins.get_mut(index as usize) else { return };
        let was = pin.asserted;
        pin.asserted = if high { was.saturating_add(1) } else { was.saturating_sub(1) };
        if pin.is_level() {
            self.service_level(pin);
        } else if was == 0
            && high
            // The datasheet: edges at a masked pin are neither delivered nor held pending.
            && pin.low & MASKED == 0
            && let Some(msi) = pin.message()
        {
            self.sink.send_msi(msi);
        }
    }

    fn eoi(&self, vector: u8) {
        for pin in &mut self.lock().pins {
            if pin.is_level() && pin.vector() == u32::from(vector) && pin.low & REMOTE_IRR != 0 {
                pin.low &= !REMOTE_IRR;
                self.service_level(pin);
            }
        }
    }

    fn read_indexed(&self, state: &State) -> u32 {
        match state.select {
            INDEX_ID | INDEX_ARBITRATION => state.id,
            INDEX_VERSION => VERSION | (PINS - 1) << 16,
            index => match entry_of(index) {
                Some((pin, high)) => {
                    state.pins.get(pin).map_or(0, |pin| if high { pin.high } else { pin.low })
                }
                None => 0,
            },
        }
    }

    fn write_indexed(&self, state: &mut State, value: u32) {
        if state.select == INDEX_ID {
            state.id = value & 0x0f00_0000;
            return;
        }
        let Some((index, high)) = entry_of(state.select) else { return };
        let Some(pin) = state.pins.get_mut(index) else { return };
        let before = pin.message();
        if high {
            pin.high = value & WRITABLE_HIGH;
        } else {
            pin.low = pin.low & !WRITABLE_LOW | value & WRITABLE_LOW;
            if !pin.is_level() {
                // What software without an EOI register relies on to end a level interrupt by hand.
                pin.low &= !REMOTE_IRR;
            }
        }
        if pin.message() != before {
            self.publish_routes(state);
        }
        if let Some(pin) = state.pins.get_mut(index) {
            self.service_level(pin);
        }
    }

    fn publish_routes(&self, state: &mut State) {
        let routes: Vec<GsiRoute> = (0..)
            .zip(&state.pins)
            .filter_map(|(gsi, pin)| Some(GsiRoute { gsi, msi: pin.message()? }))
            .collect();
        if routes != state.routes {
            self.sink.set_gsi_routes(&routes);
            state.routes = routes;
        }
    }
}

/// Pin and half (true for the upper one) that an index register value selects.
fn entry_of(index: u8) -> Option<(usize, bool)> {
    let offset = index.checked_sub(INDEX_ENTRIES)?;
    (u32::from(offset) < 2 * PINS).then_some((usize::from(offset / 2), offset & 1 == 1))
}

/// The I/O APIC; cloning it gives another handle to the same chip.
#[derive(Clone)]
pub struct IoApic {
    shared: Arc<Shared>,
}

impl IoApic {
    /// The chip as after reset: every pin masked.
    pub fn new(sink: Arc<dyn MsiSink>) -> Self {
        let pins = [Pin { low: MASKED, high: 0, asserted: 0 }; PINS as usize];
        let state = State { select: 0, id: 0, pins, routes: Vec::new() };
        IoApic { shared: Arc::new(Shared { sink, state: Mutex::new(state) }) }
    }

    /// An input at pin `gsi`. Several lines at one pin are wired-OR. A line at a pin that does not exist
    /// (24 and up) is connected to nothing.
    pub fn line(&self, gsi: u32) -> Arc<dyn InterruptLine> {
        Arc::new(Line { shared: self.shared.clone(), pin: gsi, high: Mutex::new(false) })
    }

    /// A local APIC has ended the level-triggered interrupt `vector`; lines that are still high send again.
    pub fn eoi(&self, vector: u8) {
        self.shared.eoi(vector);
    }
}

impl BusDevice for IoApic {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Flow {
        let state = self.shared.lock();
        let value = match offset {
            REG_SELECT => u32::from(state.select),
            REG_WINDOW => self.shared.read_indexed(&state),
            _ => 0,
        };
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
        Flow::Continue
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Flow {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(bytes);
        match offset {
            REG_SELECT => self.shared.lock().select = value as u8,
            REG_WINDOW => self.shared.write_indexed(&mut self.shared.lock(), value),
            REG_EOI => self.shared.eoi(value as u8),
            _ => {}
        }
        Flow::Continue
    }
}

struct Line {
    shared: Arc<Shared>,
    pin: u32,
    high: Mutex<bool>,
}

impl InterruptLine for Line {
    fn set_level(&self, high: bool) {
        let mut now = self.high.lock().unwrap_or_else(PoisonError::into_inner);
        if *now != high {
            *now = high;
            self.shared.set_level(self.pin, high);
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.set_level(false);
    }
}

/// What a snapshot keeps of the chip.
pub mod state {
    use serde::{Deserialize, Serialize};

    /// Registers. The levels of the pins follow from the devices.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct IoApicState {
        /// Index register.
        pub select: u8,
        /// Identification register.
        pub id: u32,
        /// The 24 redirection entries, low word with the remote IRR, then high word.
        pub entries: Vec<[u32; 2]>,
    }
}

impl Stateful for IoApic {
    type State = state::IoApicState;
    const NAME: &'static str = "ioapic";

    fn save(&self) -> Self::State {
        let state = self.shared.lock();
        let entries = state.pins.iter().map(|pin| [pin.low, pin.high]).collect();
        state::IoApicState { select: state.select, id: state.id, entries }
    }

    /// To be called after the devices have driven their lines: a message that is due was sent before the state was
    /// saved, and none is sent here.
    fn restore(&mut self, saved: Self::State) -> Result<(), BadState> {
        let count = saved.entries.len();
        BadState::unless(count == PINS as usize, || format!("{count} pins instead of {PINS}"))?;
        let mut state = self.shared.lock();
        state.select = saved.select;
        state.id = saved.id & 0x0f00_0000;
        for (pin, [low, high]) in state.pins.iter_mut().zip(saved.entries) {
            pin.low = low & (WRITABLE_LOW | REMOTE_IRR);
            pin.high = high & WRITABLE_HIGH;
        }
        self.shared.publish_routes(&mut state);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder {
        sent: Mutex<Vec<Msi>>,
        routes: Mutex<Vec<Vec<GsiRoute>>>,
    }

    impl Recorder {
        fn vectors(&self) -> Vec<u32> {
            self.sent.lock().unwrap().drain(..).map(|msi| msi.data & 0xff).collect()
        }
    }

    impl MsiSink for Recorder {
        fn send_msi(&self, msi: Msi) {
            self.sent.lock().unwrap().push(msi);
        }

        fn set_gsi_routes(&self, routes: &[GsiRoute]) {
            self.routes.lock().unwrap().push(routes.to_vec());
        }
    }

    fn chip() -> (IoApic, Arc<Recorder>) {
        let sink = Arc::new(Recorder::default());
        (IoApic::new(sink.clone()), sink)
    }

    fn write_register(chip: &mut IoApic, index: u8, value: u32) {
        let _ = chip.write(REG_SELECT, &u32::from(index).to_le_bytes());
        let _ = chip.write(REG_WINDOW, &value.to_le_bytes());
    }

    fn read_register(chip: &mut IoApic, index: u8) -> u32 {
        let _ = chip.write(REG_SELECT, &u32::from(index).to_le_bytes());
        let mut data = [0; 4];
        let _ = chip.read(REG_WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    fn route(chip: &mut IoApic, pin: u8, low: u32, destination: u32) {
        write_register(chip, INDEX_ENTRIES + 2 * pin + 1, destination << 24);
        write_register(chip, INDEX_ENTRIES + 2 * pin, low);
    }

    #[test]
    fn a_fresh_chip_reports_24_masked_pins() {
        let (mut chip, _) = chip();
        assert_eq!(read_register(&mut chip, INDEX_VERSION), 0x0017_0020);
        for pin in 0..24 {
            assert_eq!(read_register(&mut chip, INDEX_ENTRIES + 2 * pin), MASKED);
        }
        write_register(&mut chip, INDEX_ID, 0xffff_ffff);
        assert_eq!(read_register(&mut chip, INDEX_ID), 0x0f00_0000);
    }

    #[test]
    fn an_edge_sends_once_for_each_rise() {
        let (mut chip, sink) = chip();
        route(&mut chip, 4, 0x31, 2);
        let line = chip.line(4);
        line.set_level(true);
        line.set_level(true);
        assert_eq!(
            sink.sent.lock().unwrap().drain(..).collect::<Vec<_>>(),
            [Msi { address: 0xfee0_2000, data: 0x4031 }]
        );
        line.set_level(false);
        assert!(sink.vectors().is_empty());
        line.pulse();
        line.pulse();
        assert_eq!(sink.vectors(), [0x31, 0x31]);
    }

    #[test]
    fn edges_at_a_masked_pin_are_lost_and_levels_are_not() {
        let (mut chip, sink) = chip();
        route(&mut chip, 4, MASKED | 0x31, 0);
        route(&mut chip, 5, MASKED | LEVEL | 0x32, 0);
        let (edge, level) = (chip.line(4), chip.line(5));
        edge.pulse();
        edge.set_level(true);
        level.set_level(true);
        assert!(sink.vectors().is_empty());
        route(&mut chip, 4, 0x31, 0);
        route(&mut chip, 5, LEVEL | 0x32, 0);
        assert_eq!(sink.vectors(), [0x32]);
    }

    #[test]
    fn a_level_is_sent_again_only_after_its_end_and_only_while_high() {
        let (mut chip, sink) = chip();
        route(&mut chip, 10, LEVEL | 0x40, 0);
        let line = chip.line(10);
        line.set_level(true);
        line.set_level(false);
        line.set_level(true);
        assert_eq!(sink.vectors(), [0x40]);
        assert_eq!(read_register(&mut chip, INDEX_ENTRIES + 20), LEVEL | REMOTE_IRR | 0x40);
        chip.eoi(0x41);
        assert!(sink.vectors().is_empty());
        chip.eoi(0x40);
        assert_eq!(sink.vectors(), [0x40]);
        line.set_level(false);
        let _ = chip.write(REG_EOI, &0x40u32.to_le_bytes());
        assert!(sink.vectors().is_empty());
        assert_eq!(read_register(&mut chip, INDEX_ENTRIES + 20), LEVEL | 0x40);
    }

    #[test]
    fn the_guest_cannot_write_remote_irr_and_turning_to_edge_clears_it() {
        let (mut chip, sink) = chip();
        route(&mut chip, 1, LEVEL | REMOTE_IRR | 0x40, 0);
        assert_eq!(read_register(&mut chip, INDEX_ENTRIES + 2), LEVEL | 0x40);
        let line = chip.line(1);
        line.set_level(true);
        assert_eq!(sink.vectors(), [0x40]);
        route(&mut chip, 1, MASKED | 0x40, 0);
        assert_eq!(read_register(&mut chip, INDEX_ENTRIES + 2), MASKED | 0x40);
        route(&mut chip, 1, LEVEL | 0x40, 0);
        assert_eq!(sink.vectors(), [0x40]);
    }

    #[test]
    fn lines_at_one_pin_are_wired_or_and_a_dropped_line_falls() {
        let (mut chip, sink) = chip();
        route(&mut chip, 9, LEVEL | 0x50, 0);
        let (a, b) = (chip.line(9), chip.line(9));
        a.set_level(true);
        b.set_level(true);
        drop(a);
        assert_eq!(sink.vectors(), [0x50]);
        chip.eoi(0x50);
        assert_eq!(sink.vectors(), [0x50]);
        drop(b);
        chip.eoi(0x50);
        assert!(sink.vectors().is_empty());
    }

    #[test]
    fn routes_are_published_when_a_message_changes_and_masking_alone_does_not() {
        let (mut chip, sink) = chip();
        route(&mut chip, 3, LEVEL | 0x60, 1);
        let msi = Msi { address: 0xfee0_1000, data: LEVEL | 0x4060 };
        assert_eq!(*sink.routes.lock().unwrap(), [vec![GsiRoute { gsi: 3, msi }]]);
        route(&mut chip, 3, MASKED | LEVEL | 0x60, 1);
        assert_eq!(sink.routes.lock().unwrap().len(), 1);
        route(&mut chip, 3, 0, 1);
        assert_eq!(sink.routes.lock().unwrap().last(), Some(&vec![]));
    }

    #[test]
    fn illegal_vectors_and_modes_without_a_receiver_send_nothing() {
        let (mut chip, sink) = chip();
        for low in [0x0f, 0x231, 0x331, 0x631, 0x731] {
            route(&mut chip, 0, low, 0);
            chip.line(0).pulse();
        }
        assert!(sink.vectors().is_empty());
        chip.line(24).pulse();
        chip.line(u32::MAX).pulse();
    }

    #[test]
    fn any_access_at_any_offset_and_width_is_survived() {
        let (mut chip, _) = chip();
        let line = chip.line(7);
        let mut x = 1u64;
        for _ in 0..20_000 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let bytes = x.to_le_bytes();
            let width = 1 << (x >> 60 & 3);
            let offset = [0, 0x10, 0x40, x >> 50 & 0xfff][(x >> 40 & 3) as usize];
            let _ = chip.write(offset, &bytes[..width]);
            let mut data = [0xaa; 8];
            let _ = chip.read(offset, &mut data[..width]);
            line.set_level(x & 1 == 0);
            chip.eoi((x >> 8) as u8);
        }
        assert_eq!(read_register(&mut chip, INDEX_VERSION), 0x0017_0020);
    }
}
