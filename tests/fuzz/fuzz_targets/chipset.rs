#![no_main]
//! The small devices at the ports behind one bus: clock, keyboard controller, power, panic and exit ports.

use std::cell::Cell;
use std::sync::{Arc, Mutex};

use harrier_devices::rtc::Rtc;
use harrier_devices::{BusBuilder, acpi_pm, debug_exit, i8042, pvpanic, rtc};
use harrier_fuzz::input::Input;
use harrier_fuzz::sinks::Nowhere;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let power = Arc::new(Nowhere);
    let now = Cell::new(input.u64().cast_signed());
    let step = input.u32();
    let clock = Rtc::with_time_source(Box::new(move || {
        now.set(now.get().wrapping_add(step.into()));
        now.get()
    }));
    let mut builder = BusBuilder::new();
    builder.insert(rtc::PORT.into(), rtc::SIZE, Arc::new(Mutex::new(clock))).expect("room");
    let device = Arc::new(Mutex::new(i8042::I8042::new(power.clone())));
    builder.insert(i8042::PORT.into(), i8042::SIZE, device).expect("room");
    let device = Arc::new(Mutex::new(acpi_pm::AcpiPm::new(power.clone())));
    builder.insert(acpi_pm::PORT.into(), acpi_pm::SIZE, device).expect("room");
    let device = Arc::new(Mutex::new(pvpanic::PvPanic::new(power.clone())));
    builder.insert(pvpanic::PORT.into(), pvpanic::SIZE, device).expect("room");
    let device = Arc::new(Mutex::new(debug_exit::DebugExit::new(power)));
    builder.insert(debug_exit::DEFAULT_PORT.into(), debug_exit::SIZE, device).expect("room");
    let bus = builder.build();
    while !input.is_empty() {
        let port = match input.u8() {
            low @ 0..200 => u64::from(low % 8) + 0x6e,
            200..220 => input.u64(),
            high => [0x60, 0x64, 0xf4, 0x505, 0x600][usize::from(high % 5)] + u64::from(input.u8() % 4),
        };
        let (mut data, width) = input.access();
        if input.u8() & 1 == 0 {
            let _ = bus.write(port, &data[..width]);
        } else {
            let _ = bus.read(port, &mut data[..width]);
        }
    }
});
