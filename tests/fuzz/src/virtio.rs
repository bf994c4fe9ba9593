//! A guest that has brought a virtio device up and then does whatever the input says.

use std::sync::Arc;

use harrier_devices::BusDevice;
use harrier_devices::virtio::{VirtioDevice, VirtioMmio};
use harrier_engine::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use crate::input::Input;
use crate::sinks::Nowhere;

/// Guest memory: two regions with a hole between them, so that buffers can straddle it.
const REGIONS: [(u64, usize); 2] = [(0, 0x1_0000), (0x2_0000, 0x1_0000)];
/// Where the rings of queue `n` are, from this plus `n` times the stride on.
const RINGS: u64 = 0x1000;
const STRIDE: u64 = 0x1000;
const QUEUE_SIZE: u16 = 16;

/// The guest.
pub struct Guest {
    transport: VirtioMmio,
    mem: GuestMemory,
    queues: u64,
    available: [u16; 3],
}

impl Guest {
    /// A guest with a device that it has not touched.
    pub fn cold(device: Box<dyn VirtioDevice>) -> Self {
        let queues = device.queue_sizes().len() as u64;
        let ranges = REGIONS.map(|(base, len)| (GuestAddress(base), len));
        let mem = GuestMemory::from_ranges(&ranges).expect("memory for the guest");
        let transport = VirtioMmio::new(device, mem.clone(), Arc::new(Nowhere)).expect("descriptors");
        Guest { transport, mem, queues, available: [0; 3] }
    }

    /// A guest that drives its device.
    pub fn warm(device: Box<dyn VirtioDevice>) -> Self {
        let mut guest = Self::cold(device);
        guest.bring_up();
        guest
    }

    fn set(&mut self, register: u64, value: u32) {
        let _ = self.transport.write(register, &value.to_le_bytes());
    }

    fn bring_up(&mut self) {
        for value in [0, 1, 3] {
            self.set(0x70, value);
        }
        for word in 0..2 {
            self.set(0x14, word);
            let mut offered = [0; 4];
            let _ = self.transport.read(0x10, &mut offered);
            self.set(0x24, word);
            self.set(0x20, u32::from_le_bytes(offered));
        }
        self.set(0x70, 11);
        for queue in 0..self.queues {
            let base = (RINGS + STRIDE * queue) as u32;
            self.set(0x30, queue as u32);
            self.set(0x38, QUEUE_SIZE.into());
            self.set(0x80, base);
            self.set(0x90, base + 0x400);
            self.set(0xa0, base + 0x800);
            self.set(0x44, 1);
        }
        self.set(0x70, 15);
        self.available = [0; 3];
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        // Outside memory nothing happens.
        let _ = self.mem.write_slice(bytes, GuestAddress(address));
    }

    fn describe(&self, queue: u64, index: u8, input: &mut Input<'_>) {
        let address = match input.u8() % 8 {
            0 => input.u64(),
            1 => 0xffc0 + u64::from(input.u8()),
            2 => 0x2_ffc0 + u64::from(input.u8()),
            _ => 0x4000 + u64::from(input.u16() % 0x8000),
        };
        let len = match input.u8() % 8 {
            0 => input.u32(),
            1 => 16 * u32::from(input.u8() % 20),
            _ => u32::from(input.u16() % 0x1200),
        };
        let flags = u16::from(input.u8() & 7);
        let next = u16::from(input.u8() % (QUEUE_SIZE as u8 + 1));
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(RINGS + STRIDE * queue + 16 * u64::from(index % QUEUE_SIZE as u8), &bytes);
    }

    fn publish(&mut self, queue: u64, head: u16) {
        let Some(available) = self.available.get_mut(queue as usize) else { return };
        let ring = RINGS + STRIDE * queue + 0x400;
        let slot = ring + 4 + 2 * u64::from(*available % QUEUE_SIZE);
        *available = available.wrapping_add(1);
        let index = *available;
        self.write(slot, &head.to_le_bytes());
        self.write(ring + 2, &index.to_le_bytes());
    }

    /// Where the requests of a queue usually are; targets put headers there.
    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.write(address, bytes);
    }

    /// Offers a well-formed chain, so that the input reaches the device behind the queue.
    pub fn offer(&mut self, queue: u64, buffers: &[(u64, u32, bool)]) {
        for (i, &(address, len, writable)) in (0u16..).zip(buffers) {
            let more = usize::from(i) + 1 < buffers.len();
            let flags = u16::from(more) | u16::from(writable) << 1;
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend((i + 1).to_le_bytes());
            self.write(RINGS + STRIDE * queue + 16 * u64::from(i % QUEUE_SIZE), &bytes);
        }
        self.publish(queue, 0);
        self.kick(queue);
    }

    /// Notifies and lets the device work.
    pub fn kick(&mut self, queue: u64) {
        self.set(0x50, queue as u32);
        self.transport.process_pending();
    }

    /// Lets the device work.
    pub fn poll(&mut self) {
        self.transport.process_pending();
    }

    /// One decision about registers, rings or memory.
    pub fn step(&mut self, input: &mut Input<'_>) {
        let queue = u64::from(input.u8()) % self.queues.max(1);
        match input.u8() % 16 {
            0..5 => {
                let index = input.u8();
                self.describe(queue, index, input);
            }
            5..8 => {
                let head = u16::from(input.u8() % (QUEUE_SIZE as u8 + 1));
                self.publish(queue, head);
                self.kick(queue);
            }
            8 => self.kick(queue),
            9 | 10 => {
                let address = 0x4000 + u64::from(input.u16() % 0x8000);
                let len = usize::from(input.u8());
                self.write(address, input.take(len));
            }
            11 => {
                let address = u64::from(input.u16());
                self.write(address, &input.u32().to_le_bytes());
            }
            12 => {
                let (mut data, width) = input.access();
                let offset = u64::from(input.u16() & 0x1ff);
                let _ = self.transport.read(offset, &mut data[..width]);
            }
            13 => {
                let (data, width) = input.access();
                let offset = u64::from(input.u16() & 0x1ff);
                let _ = self.transport.write(offset, &data[..width]);
            }
            14 => self.set(0x64, input.u32()),
            _ if input.u8() % 8 == 0 => self.bring_up(),
            _ => self.poll(),
        }
    }
}
