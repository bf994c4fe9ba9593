#![no_main]
//! The I/O APIC: register accesses, lines and ends of interrupts in any order.

use std::sync::Arc;

use harrier_devices::BusDevice;
use harrier_devices::ioapic::IoApic;
use harrier_fuzz::input::Input;
use harrier_fuzz::sinks::Nowhere;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let mut chip = IoApic::new(Arc::new(Nowhere));
    let mut lines: Vec<_> = (0..26).map(|gsi| chip.line(gsi)).collect();
    while !input.is_empty() {
        let pick = input.u8();
        match input.u8() & 7 {
            0..3 => {
                let (data, width) = input.access();
                let offset = [0, 0x10, 0x40, u64::from(input.u16() & 0xfff)][usize::from(pick & 3)];
                let _ = chip.write(offset, &data[..width]);
            }
            3 => {
                let (mut data, width) = input.access();
                let _ = chip.read(u64::from(pick & 0x50), &mut data[..width]);
            }
            4..6 => {
                if let Some(line) = lines.get(usize::from(pick) % 26) {
                    line.set_level(pick & 0x80 != 0);
                }
            }
            6 => chip.eoi(pick),
            _ => {
                if let Some(line) = lines.get_mut(usize::from(pick) % 26) {
                    *line = chip.line(u32::from(input.u8() % 32));
                }
            }
        }
    }
});
