//! A split virtqueue as a device uses it: take a [`Chain`], complete it, and know whether to interrupt.
//!
//! The ring itself is virtio-queue's; this adds the checks of what the driver set up (virtio 1.2, section 2.7) and
//! turns every inconsistency into a [`QueueError`], after which the transport asks the driver for a reset.

use std::sync::atomic::Ordering;

use harrier_engine::GuestMemory;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, Permissions};

use super::chain::Chain;

/// The driver broke the rules of the ring.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// An index, a size or an address of the ring itself.
    #[error("ring: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// The size is not a power of two or larger than offered.
    #[error("queue size {0} is not a power of two up to the maximum")]
    Size(u32),
    /// A part of the ring is not in memory, not aligned or at address 0.
    #[error("the {part} of {len} bytes at {address:#x} is unaligned or outside memory")]
    Placement {
        /// Which part.
        part: &'static str,
        /// Where the driver put it.
        address: u64,
        /// How long it is.
        len: u64,
    },
    /// Descriptors that form a loop, name one that does not exist, are too many or too long together.
    #[error("descriptor chain {head} is broken, endless or too long")]
    EndlessChain {
        /// First descriptor.
        head: u16,
    },
    /// A device-readable descriptor after a device-writable one.
    #[error("descriptor chain {head} has a readable part after a writable one")]
    ReadableAfterWritable {
        /// First descriptor.
        head: u16,
    },
    /// A buffer that is not in memory.
    #[error("descriptor chain {head} has a buffer of {len} bytes at {address:#x}, outside memory")]
    OutsideMemory {
        /// First descriptor.
        head: u16,
        /// Where the buffer is said to be.
        address: u64,
        /// How long it is said to be.
        len: u32,
    },
    /// The available ring cannot be read although it was in memory before.
    #[error("the available ring cannot be read")]
    AvailableRingLost,
}

/// What the driver wrote about a queue and has not yet declared ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct QueueSetup {
    pub(crate) size: u32,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

/// What a snapshot keeps of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// Entries.
    pub size: u32,
    /// The driver has set it up; the rest counts only then.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available ring.
    pub available: u64,
    /// Guest physical address of the used ring.
    pub used: u64,
    /// Index of the next request to be taken, modulo 2^16.
    pub next_available: u16,
    /// Index of the next request to be completed, modulo 2^16.
    pub next_used: u16,
}

/// A queue of a device.
pub struct DeviceQueue {
    ring: Queue,
    max_size: u16,
    /// Something was completed since the last look at [`DeviceQueue::take_notification`].
    completed: bool,
}

impl DeviceQueue {
    /// A queue of up to `max_size` entries (a power of two, at most 32768), not ready.
    pub(crate) fn new(max_size: u16) -> Result<Self, QueueError> {
        Ok(DeviceQueue { ring: Queue::new(max_size)?, max_size, completed: false })
    }

    /// The number of entries that the device offers.
    pub fn max_size(&self) -> u16 {
        self.max_size
    }

    /// Whether the driver has set it up.
    pub fn ready(&self) -> bool {
        self.ring.ready()
    }

    pub(crate) fn reset(&mut self) {
        self.ring.reset();
        self.completed = false;
    }

    pub(crate) fn set_event_idx(&mut self, on: bool) {
        self.ring.set_event_idx(on);
    }

    /// Checks what the driver set up and makes the queue ready.
    pub(crate) fn set_up(&mut self, mem: &GuestMemory, setup: &QueueSetup) -> Result<(), QueueError> {
        self.reset();
        let size = u16::try_from(setup.size).map_err(|_| QueueError::Size(setup.size))?;
        self.ring.try_set_size(size).map_err(|_| QueueError::Size(setup.size))?;
        let entries = u64::from(size);
        // Virtio 1.2, section 2.7: lengths with the event fields at the end, which are there even when
        // VIRTIO_F_EVENT_IDX is off.
        let parts = [
            ("descriptor table", setup.descriptors, 16 * entries, Permissions::Read),
            ("available ring", setup.available, 6 + 2 * entries, Permissions::Read),
            ("used ring", setup.used, 6 + 8 * entries, Permissions::Write),
        ];
        for (part, address, len, access) in parts {
            // virtio-queue takes a ring at address 0 for one that was never set up.
            if address == 0 || !mem.check_range(GuestAddress(address), len as usize, access) {
                return Err(QueueError::Placement { part, address, len });
            }
        }
        let unaligned = |(part, address, len, _): (&'static str, u64, u64, Permissions)| {
            move |_| QueueError::Placement { part, address, len }
        };
        let [descriptors, available, used] = parts.map(|part| (GuestAddress(part.1), unaligned(part)));
        self.ring.try_set_desc_table_address(descriptors.0).map_err(descriptors.1)?;
        self.ring.try_set_avail_ring_address(available.0).map_err(available.1)?;
        self.ring.try_set_used_ring_address(used.0).map_err(used.1)?;
        self.ring.set_ready(true);
        Ok(())
    }

    /// What a snapshot keeps of the queue.
    pub(crate) fn save(&self) -> QueueState {
        QueueState {
            size: self.ring.size().into(),
            ready: self.ring.ready(),
            descriptors: self.ring.desc_table(),
            available: self.ring.avail_ring(),
            used: self.ring.used_ring(),
            next_available: self.ring.next_avail(),
            next_used: self.ring.next_used(),
        }
    }

    /// Takes up a saved queue, checked as if the driver had set it up.
    pub(crate) fn restore(&mut self, mem: &GuestMemory, state: &QueueState) -> Result<(), QueueError> {
        self.reset();
        if !state.ready {
            return Ok(());
        }
        let QueueState { size, descriptors, available, used, .. } = *state;
        self.set_up(mem, &QueueSetup { size, descriptors, available, used })?;
        self.ring.set_next_avail(state.next_available);
        self.ring.set_next_used(state.next_used);
        Ok(())
    }

    /// The next request, or `None` when there is none; then the driver will notify of the next one.
    ///
    /// # Errors
    /// [`QueueError`] if the ring or the chain is broken.
    pub fn pop<'m>(&mut self, mem: &'m GuestMemory) -> Result<Option<Chain<'m>>, QueueError> {
        if !self.ready() {
            return Ok(None);
        }
        let size = self.ring.size();
        for _ in 0..2 {
            if let Some(descriptors) = self.ring.iter(mem)?.next() {
                let head = descriptors.head_index();
                if head >= size {
                    return Err(QueueError::EndlessChain { head });
                }
                return Chain::new(mem, descriptors, size).map(Some);
            }
            if !self.ring.enable_notification(mem)? {
                return Ok(None);
            }
        }
        Err(QueueError::AvailableRingLost)
    }

    /// Puts the chain that was popped last back, to be popped again. May be repeated for the ones before it, as
    /// long as none of them was completed.
    pub fn unpop(&mut self) {
        self.ring.go_to_previous_position();
    }

    /// Hands a chain back to the driver, with `written` bytes in its writable part.
    ///
    /// # Errors
    /// [`QueueError`] if the used ring cannot be written.
    pub fn complete(&mut self, mem: &GuestMemory, head: u16, written: usize) -> Result<(), QueueError> {
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        self.ring.add_used(mem, head, written)?;
        self.completed = true;
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was completed since the last call.
    pub(crate) fn take_notification(&mut self, mem: &GuestMemory) -> Result<bool, QueueError> {
        if !std::mem::take(&mut self.completed) {
            return Ok(false);
        }
        let wanted = self.ring.needs_notification(mem)?;
        if self.ring.event_idx_enabled() {
            return Ok(wanted);
        }
        // VIRTQ_AVAIL_F_NO_INTERRUPT, which virtio-queue leaves to us.
        let flags: u16 = mem
            .load(GuestAddress(self.ring.avail_ring()), Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u16::from_le(flags) & 1 == 0)
    }
}
