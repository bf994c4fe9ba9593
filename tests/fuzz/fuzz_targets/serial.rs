#![no_main]
//! The serial port: any register access, input and back-pressure.

use std::sync::Arc;

use harrier_devices::BusDevice;
use harrier_devices::byte_output::ByteOutput;
use harrier_devices::serial::Serial;
use harrier_fuzz::input::Input;
use harrier_fuzz::sinks::Nowhere;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let output = ByteOutput::new(32);
    let mut serial = Serial::new(Arc::new(Nowhere), output.clone()).expect("a descriptor");
    while !input.is_empty() {
        let offset = u64::from(input.u8() & 15);
        match input.u8() & 7 {
            0..3 => {
                let (data, width) = input.access();
                let _ = serial.write(offset, &data[..width]);
            }
            3..5 => {
                let (mut data, width) = input.access();
                let _ = serial.read(offset, &mut data[..width]);
            }
            5 => assert!(serial.enqueue(input.take(offset as usize * 4)) <= 16),
            6 => {
                assert!(output.take().len() <= 32);
                serial.output_has_room();
            }
            _ => drop(serial.input_room().read()),
        }
    }
});
