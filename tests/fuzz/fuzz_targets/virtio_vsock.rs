#![no_main]
//! The socket device: packets that are nearly right, queues that the input writes, and a host side that reads,
//! writes, closes and connects at any time.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use harrier_devices::virtio::vsock::{Vsock, VsockBackend};
use harrier_fuzz::input::Input;
use harrier_fuzz::virtio::Guest;
use libfuzzer_sys::fuzz_target;

#[derive(Clone, Default)]
struct Host(Arc<Mutex<Vec<UnixStream>>>);

impl Host {
    fn keep(&self, stream: UnixStream) {
        stream.set_nonblocking(true).expect("a socket");
        self.0.lock().expect("one thread").push(stream);
    }
}

impl VsockBackend for Host {
    fn connect(&mut self, port: u32) -> io::Result<UnixStream> {
        if port == 7 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (device, host) = UnixStream::pair()?;
        self.keep(host);
        Ok(device)
    }
}

fn packet(input: &mut Input<'_>, len: u32) -> [u8; 44] {
    let odd = input.u8();
    let mut bytes = [0; 44];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, &if odd & 0x1f == 1 { input.u64() } else { 3 }.to_le_bytes());
    put(8, &if odd & 0x1f == 2 { input.u64() } else { 2 }.to_le_bytes());
    put(16, &u32::from(input.u8() & 3).to_le_bytes());
    let host_port = u32::from(input.u8() & 7) | u32::from(odd & 0x20) << 25;
    put(20, &host_port.to_le_bytes());
    put(24, &if odd & 0x1f == 3 { input.u32() } else { len }.to_le_bytes());
    put(28, &if odd & 0x1f == 4 { input.u16() } else { 1 }.to_le_bytes());
    put(30, &u16::from(input.u8() % 10).to_le_bytes());
    put(32, &u32::from(input.u8() & 3).to_le_bytes());
    put(36, &if odd & 0x40 == 0 { 0x4_0000 } else { input.u32() }.to_le_bytes());
    put(40, &if odd & 0x80 == 0 { 0 } else { input.u32() }.to_le_bytes());
    bytes
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let host = Host::default();
    let device = Vsock::new(3, Box::new(host.clone())).expect("descriptors");
    let handle = device.handle();
    let mut guest = Guest::warm(Box::new(device));
    while !input.is_empty() {
        match input.u8() & 15 {
            0..4 => guest.step(&mut input),
            4..7 => guest.offer(0, &[(0x8000, u32::from(input.u16() & 0x1fff), true)]),
            7..12 => {
                let payload = input.u8();
                let len = u32::from(payload) * 64;
                guest.put(0x4000, &packet(&mut input, len));
                guest.offer(1, &[(0x4000, 44, false), (0x4100, len, false)]);
            }
            12 => {
                let port = u32::from(input.u8() & 3);
                if input.u8() & 1 == 0 {
                    host.keep(handle.connect(port).expect("the device lives"));
                } else if let Ok((device, end)) = UnixStream::pair() {
                    host.keep(end);
                    // Refused when flooded.
                    let _ = handle.forward(device, port);
                }
                guest.poll();
            }
            action => {
                let mut streams = host.0.lock().expect("one thread");
                if streams.is_empty() {
                    continue;
                }
                let pick = usize::from(input.u8()) % streams.len();
                let detail = input.u8();
                match (action, detail & 7) {
                    (13, _) => drop(streams[pick].write(&[detail; 3000][..usize::from(detail) * 10])),
                    (14, _) => drop(streams[pick].read(&mut [0; 5000])),
                    (_, 0..2) => drop(streams.swap_remove(pick)),
                    (_, 2) => drop(streams[pick].shutdown(Shutdown::Read)),
                    (_, 3) => drop(streams[pick].shutdown(Shutdown::Write)),
                    (_, 4) => drop(streams[pick].shutdown(Shutdown::Both)),
                    _ => {}
                }
                drop(streams);
                guest.poll();
            }
        }
    }
});
