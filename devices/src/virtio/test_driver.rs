//! A driver for tests: sets a device up through its registers and keeps its queues in guest memory by hand.

use std::sync::Arc;

use harrier_engine::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::mmio::{VirtioMmio, status};
use super::{VirtioDevice, mmio};
use crate::bus::BusDevice;
use crate::interrupt::tests::RecordedLine;

/// Bytes of guest memory.
pub(crate) const MEMORY: usize = 16 << 20;
/// Queues start here, one every 64 KiB; requests may use what lies from [`BUFFERS`] on.
const RINGS: u64 = 0x10_0000;
/// Free for buffers.
pub(crate) const BUFFERS: u64 = 0x40_0000;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

pub(crate) fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
}

/// One queue as the driver sees it.
#[derive(Clone, Copy)]
pub(crate) struct Ring {
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    pub(crate) size: u16,
    next_descriptor: u16,
    next_available: u16,
    next_used: u16,
}

pub(crate) struct Driver {
    pub(crate) transport: VirtioMmio,
    pub(crate) mem: GuestMemory,
    pub(crate) line: Arc<RecordedLine>,
    pub(crate) rings: Vec<Ring>,
}

impl Driver {
    /// A driver of a device that is not set up.
    pub(crate) fn cold(device: Box<dyn VirtioDevice>) -> Self {
        let mem = memory();
        let line = Arc::new(RecordedLine::default());
        let transport = VirtioMmio::new(device, mem.clone(), line.clone()).unwrap();
        Driver { transport, mem, line, rings: Vec::new() }
    }

    /// A driver that has set everything up and accepted every feature but those in `without`.
    pub(crate) fn without(device: Box<dyn VirtioDevice>, without: u64) -> Self {
        let mut driver = Self::cold(device);
        driver.bring_up(without);
        driver
    }

    /// A driver that has set everything up.
    pub(crate) fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::without(device, 0)
    }

    pub(crate) fn get(&mut self, register: u64) -> u32 {
        let mut data = [0; 4];
        let _ = self.transport.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn set(&mut self, register: u64, value: u32) {
        let _ = self.transport.write(register, &value.to_le_bytes());
    }

    pub(crate) fn status(&mut self) -> u32 {
        self.get(0x70)
    }

    pub(crate) fn bring_up(&mut self, without: u64) {
        self.set(0x70, 0);
        self.set(0x70, status::ACKNOWLEDGE);
        self.set(0x70, status::ACKNOWLEDGE | status::DRIVER);
        for word in 0..2 {
            self.set(0x14, word);
            let offered = self.get(0x10);
            self.set(0x24, word);
            self.set(0x20, offered & !(without >> (32 * word)) as u32);
        }
        self.set(0x70, status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        assert_ne!(self.status() & status::FEATURES_OK, 0);
        self.rings.clear();
        for index in 0.. {
            self.set(0x30, index);
            let size = self.get(0x34);
            if size == 0 {
                break;
            }
            let base = RINGS + 0x1_0000 * u64::from(index);
            let ring = Ring {
                descriptors: base,
                available: base + 0x4000,
                used: base + 0x8000,
                size: size as u16,
                next_descriptor: 0,
                next_available: 0,
                next_used: 0,
            };
            self.mem.write_slice(&[0; 0x1_0000], GuestAddress(base)).unwrap();
            self.set(0x38, size);
            for (register, address) in [(0x80, ring.descriptors), (0x90, ring.available), (0xa0, ring.used)] {
                self.set(register, address as u32);
                self.set(register + 4, (address >> 32) as u32);
            }
            self.set(0x44, 1);
            assert_eq!(self.get(0x44), 1);
            self.rings.push(ring);
        }
        self.set(0x70, 0xf);
        assert_eq!(self.status(), 0xf);
    }

    /// Writes a descriptor into a table.
    pub(crate) fn describe(&self, table: u64, index: u16, descriptor: (u64, u32, u16, u16)) {
        let (address, len, flags, next) = descriptor;
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.mem.write_slice(&bytes, GuestAddress(table + 16 * u64::from(index))).unwrap();
    }

    /// Makes a chain of these buffers (address, length, flags) available; answers its head.
    pub(crate) fn offer(&mut self, queue: usize, buffers: &[(u64, u32, u16)]) -> u16 {
        let ring = self.rings[queue];
        let head = ring.next_descriptor % ring.size;
        for (i, &(address, len, flags)) in (0..).zip(buffers) {
            let index = (ring.next_descriptor + i) % ring.size;
            let more = if usize::from(i) + 1 < buffers.len() { NEXT } else { 0 };
            self.describe(ring.descriptors, index, (address, len, flags | more, (index + 1) % ring.size));
        }
        self.rings[queue].next_descriptor = (ring.next_descriptor + buffers.len() as u16) % ring.size;
        self.publish(queue, head);
        head
    }

    /// Makes a head available.
    pub(crate) fn publish(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = ring.available + 4 + 2 * u64::from(ring.next_available % ring.size);
        self.mem.write_obj(head, GuestAddress(slot)).unwrap();
        ring.next_available = ring.next_available.wrapping_add(1);
        self.mem.write_obj(ring.next_available, GuestAddress(ring.available + 2)).unwrap();
        // VIRTIO_F_EVENT_IDX: an interrupt for every buffer.
        let event = ring.available + 4 + 2 * u64::from(ring.size);
        self.mem.write_obj(ring.next_used, GuestAddress(event)).unwrap();
    }

    /// Notifies and lets the device work.
    pub(crate) fn kick(&mut self, queue: usize) {
        self.set(0x50, queue as u32);
        self.transport.process_pending();
    }

    /// The next used element: head and length.
    pub(crate) fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let ring = &mut self.rings[queue];
        let index: u16 = self.mem.read_obj(GuestAddress(ring.used + 2)).unwrap();
        if index == ring.next_used {
            return None;
        }
        let slot = ring.used + 4 + 8 * u64::from(ring.next_used % ring.size);
        ring.next_used = ring.next_used.wrapping_add(1);
        let head: u32 = self.mem.read_obj(GuestAddress(slot)).unwrap();
        let len = self.mem.read_obj(GuestAddress(slot + 4)).unwrap();
        Some((head as u16, len))
    }

    /// Acknowledges what is pending and answers what it was.
    pub(crate) fn interrupt(&mut self) -> u32 {
        let pending = self.get(0x60);
        self.set(0x64, pending);
        pending
    }

    pub(crate) fn needs_reset(&mut self) -> bool {
        self.status() & mmio::status::NEEDS_RESET != 0
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}
