#![no_main]
//! The block device: requests that are nearly right, and queues that the input writes.

use std::fs::File;
use std::os::unix::fs::FileExt;

use harrier_devices::virtio::block::Block;
use harrier_fuzz::input::Input;
use harrier_fuzz::virtio::Guest;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};

/// Not a multiple of the sector size.
const IMAGE_LEN: u64 = 0x8000 - 100;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let image = File::from(memfd_create("image", MemfdFlags::CLOEXEC).expect("a memory file"));
    image.set_len(IMAGE_LEN).expect("room for the image");
    let again = image.try_clone().expect("a descriptor");
    let read_only = input.u8() & 7 == 0;
    let disk = Block::from_file(again, read_only, b"fuzz").expect("a disk");
    let mut guest = Guest::warm(Box::new(disk));
    while !input.is_empty() {
        if input.u8() & 3 != 0 {
            guest.step(&mut input);
            continue;
        }
        let kinds = [0, 1, 4, 8, 11, 13, 0, u32::from(input.u8())];
        let kind = kinds[usize::from(input.u8() & 7)];
        let sector = if input.u8() & 15 == 0 { input.u64() } else { u64::from(input.u8() % 70) };
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        guest.put(0x4000, &header);
        guest.put(0x4100, input.take(48));
        let len = match input.u8() & 3 {
            0 => u32::from(input.u16()),
            1 => 16 * u32::from(input.u8() & 31),
            _ => 512 * u32::from(input.u8() & 15),
        };
        let to_driver = matches!(kind, 0 | 8) ^ (input.u8() & 15 == 0);
        guest.offer(0, &[(0x4000, 16, false), (0x4100, len, to_driver), (0xf000, 1, true)]);
    }
    drop(guest);
    let len = image.metadata().expect("the image's length").len();
    assert!(len <= 0x8000, "the image grew to {len} bytes");
    if read_only {
        let mut contents = vec![0; IMAGE_LEN as usize];
        image.read_exact_at(&mut contents, 0).expect("the image");
        assert!(contents.iter().all(|&byte| byte == 0), "a read-only image was changed");
    }
});
