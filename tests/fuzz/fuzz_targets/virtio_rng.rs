#![no_main]
//! The entropy device behind queues that the input writes.

use harrier_devices::virtio::rng::Rng;
use harrier_fuzz::input::Input;
use harrier_fuzz::virtio::Guest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let mut guest = Guest::warm(Box::new(Rng::new()));
    while !input.is_empty() {
        guest.step(&mut input);
    }
});
