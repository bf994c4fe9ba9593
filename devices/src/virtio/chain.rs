//! One descriptor chain, checked and turned into pieces of guest memory.
//!
//! A [`Chain`] holds what the driver offers (`readable`) and where it wants the answer (`writable`). Both are
//! [`Buffers`]: consumed from the front, and free of any assumption about how the driver cut them into
//! descriptors (virtio 1.2, section 2.7.4).

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;

use harrier_engine::{GuestMemory, PageLog};
use virtio_queue::DescriptorChain;
use vm_memory::bitmap::BS;
use vm_memory::{GuestMemory as _, Permissions, VolatileSlice};

use super::queue::QueueError;
use super::volatile_io;

/// A piece of guest memory; writes to it are logged.
pub(crate) type MemorySlice<'m> = VolatileSlice<'m, BS<'m, PageLog>>;

/// Consecutive bytes in scattered guest memory.
#[derive(Clone, Default)]
pub struct Buffers<'m> {
    slices: VecDeque<MemorySlice<'m>>,
    /// Sum of the slices' lengths, below 4 GiB.
    len: usize,
}

impl<'m> Buffers<'m> {
    /// Bytes that are left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn slices(&self) -> impl Iterator<Item = &MemorySlice<'m>> + Clone {
        self.slices.iter()
    }

    fn push(&mut self, slice: MemorySlice<'m>) {
        if !slice.is_empty() {
            self.len += slice.len();
            self.slices.push_back(slice);
        }
    }

    /// Moves the slices of `other` to the end.
    pub(crate) fn append(&mut self, other: &Buffers<'m>) {
        self.slices.extend(other.slices.iter().cloned());
        self.len += other.len;
    }

    /// Takes the first `count` bytes off, or all if there are fewer.
    pub fn split_front(&mut self, count: usize) -> Buffers<'m> {
        let mut front = Buffers::default();
        while front.len < count
            && let Some(slice) = self.slices.pop_front()
        {
            let wanted = count - front.len;
            self.len -= slice.len();
            if slice.len() <= wanted {
                front.push(slice);
            } else if let Ok((head, tail)) = slice.split_at(wanted) {
                self.len += tail.len();
                self.slices.push_front(tail);
                front.push(head);
            }
        }
        front
    }

    /// Drops the first `count` bytes, or all if there are fewer.
    pub fn skip(&mut self, count: usize) {
        drop(self.split_front(count));
    }

    /// Copies out and consumes as many bytes as there are, at most `to.len()`.
    pub fn read(&mut self, to: &mut [u8]) -> usize {
        let front = self.split_front(to.len());
        let mut done = 0;
        for slice in &front.slices {
            let Some(to) = to.get_mut(done..) else { break };
            done += slice.copy_to(to);
        }
        done
    }

    /// Copies out and consumes exactly `N` bytes; `None` if there are fewer.
    pub fn read_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        (self.len >= N && self.read(&mut bytes) == N).then_some(bytes)
    }

    /// Copies in and consumes as many bytes as fit, at most `from.len()`.
    pub fn write(&mut self, from: &[u8]) -> usize {
        let front = self.split_front(from.len());
        let mut done = 0;
        for slice in &front.slices {
            let Some(piece) = from.get(done..).and_then(|rest| rest.get(..slice.len())) else { break };
            slice.copy_from(piece);
            done += piece.len();
        }
        done
    }

    /// Fills with bytes of `file` from `offset` on, and with zeros past its end.
    pub(crate) fn read_file(mut self, file: &impl AsFd, mut offset: u64) -> io::Result<()> {
        while !self.is_empty() {
            match volatile_io::read_at(file, offset, self.slices.iter())? {
                0 => break,
                count => {
                    self.skip(count);
                    offset = offset.saturating_add(count as u64);
                }
            }
        }
        const ZEROS: [u8; 4096] = [0; 4096];
        while !self.is_empty() {
            let count = self.len.min(ZEROS.len());
            self.write(ZEROS.get(..count).unwrap_or(&ZEROS));
        }
        Ok(())
    }

    /// Writes everything to `file` from `offset` on.
    pub(crate) fn write_file(mut self, file: &impl AsFd, mut offset: u64) -> io::Result<()> {
        while !self.is_empty() {
            match volatile_io::write_at(file, offset, self.slices.iter())? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => {
                    self.skip(count);
                    offset = offset.saturating_add(count as u64);
                }
            }
        }
        Ok(())
    }
}

/// A request of the driver.
pub struct Chain<'m> {
    head: u16,
    /// What the device may read.
    pub readable: Buffers<'m>,
    /// What the device may write, after the readable part.
    pub writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    /// Checks a chain: it ends, is no longer than the queue, has its readable part first and lies in memory.
    pub(crate) fn new(
        mem: &'m GuestMemory,
        descriptors: DescriptorChain<&'m GuestMemory>,
        queue_size: u16,
    ) -> Result<Self, QueueError> {
        let head = descriptors.head_index();
        let mut chain = Chain { head, readable: Buffers::default(), writable: Buffers::default() };
        // The iterator stops silently at whatever is wrong; then the last one names a successor.
        let mut ended = false;
        let mut write_seen = false;
        for (count, descriptor) in descriptors.enumerate() {
            if count >= usize::from(queue_size) {
                return Err(QueueError::EndlessChain { head });
            }
            ended = !descriptor.has_next();
            let write = descriptor.is_write_only();
            if write_seen && !write {
                return Err(QueueError::ReadableAfterWritable { head });
            }
            write_seen = write;
            if descriptor.len() == 0 {
                continue;
            }
            let (part, access) = if write {
                (&mut chain.writable, Permissions::Write)
            } else {
                (&mut chain.readable, Permissions::Read)
            };
            let outside =
                |_| QueueError::OutsideMemory { head, address: descriptor.addr().0, len: descriptor.len() };
            let slices =
                mem.get_slices(descriptor.addr(), descriptor.len() as usize, access).map_err(outside)?;
            for slice in slices {
                part.push(slice.map_err(outside)?);
            }
        }
        if ended { Ok(chain) } else { Err(QueueError::EndlessChain { head }) }
    }

    /// Index that names the chain when it is handed back.
    pub fn head(&self) -> u16 {
        self.head
    }
}
