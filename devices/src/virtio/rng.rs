//! The entropy device (virtio 1.2, section 5.4): fills what the driver offers from the host's generator.

use harrier_engine::GuestMemory;
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use super::queue::{DeviceQueue, QueueError};
use super::{Progress, Running, VirtioDevice};
use crate::guest_error::GuestErrors;

const DEVICE_TYPE: u32 = 4;
const QUEUE_SIZES: [u16; 1] = [64];

/// Bytes given for one request at most; the driver is told how many it got and may ask again.
const MAX_REQUEST: usize = 64 * 1024;
/// Requests served before others have their turn.
const BATCH: usize = 16;

/// The entropy device.
#[derive(Debug, Default)]
pub struct Rng {
    errors: GuestErrors,
}

impl Rng {
    /// A device that takes from the host's getrandom(2).
    pub fn new() -> Self {
        Self::default()
    }
}

fn serve_one(
    errors: &mut GuestErrors,
    queue: &mut DeviceQueue,
    mem: &GuestMemory,
) -> Result<bool, QueueError> {
    let Some(mut chain) = queue.pop(mem)? else { return Ok(false) };
    let mut piece = [0; 256];
    let mut left = chain.writable.len().min(MAX_REQUEST);
    let mut written = 0;
    while left > 0 {
        let Some(bytes) = piece.get_mut(..left.min(256)) else { break };
        match getrandom(&mut *bytes, GetRandomFlags::empty()) {
            Ok(count) => {
                let given = bytes.get(..count).unwrap_or_default();
                written += chain.writable.write(given);
                left -= given.len();
            }
            Err(Errno::INTR) => {}
            Err(error) => {
                errors.report("rng", format_args!("no randomness: host: {error}"));
                break;
            }
        }
    }
    queue.complete(mem, chain.head(), written)?;
    Ok(true)
}

impl VirtioDevice for Rng {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn start(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn process_queue(&mut self, _queue: usize, running: Running<'_>) -> Result<Progress, QueueError> {
        let Some(queue) = running.queues.first_mut() else { return Ok(Progress::Done) };
        for _ in 0..BATCH {
            if !serve_one(&mut self.errors, queue, running.mem)? {
                return Ok(Progress::Done);
            }
        }
        Ok(Progress::More)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::mmio::INTERRUPT_USED;
    use crate::virtio::test_driver::{BUFFERS, Driver, WRITE};

    #[test]
    fn buffers_are_filled_with_bytes_that_differ() {
        let mut driver = Driver::new(Box::new(Rng::new()));
        let head = driver.offer(0, &[(BUFFERS, 100, WRITE), (BUFFERS + 0x1000, 300, WRITE)]);
        driver.kick(0);
        assert_eq!(driver.used(0), Some((head, 400)));
        let bytes = driver.read(BUFFERS + 0x1000, 300);
        assert!((0..=255u8).filter(|value| bytes.contains(value)).count() > 100);
        assert_eq!(driver.read(BUFFERS + 100, 8), [0; 8]);
        assert_eq!(driver.interrupt(), INTERRUPT_USED);
        assert!(!driver.line.is_high());
    }

    #[test]
    fn a_huge_request_is_answered_in_part_and_an_empty_one_with_nothing() {
        let mut driver = Driver::new(Box::new(Rng::new()));
        let huge = driver.offer(0, &[(BUFFERS, 8 << 20, WRITE)]);
        let none = driver.offer(0, &[(BUFFERS, 8, 0)]);
        driver.kick(0);
        assert_eq!(driver.used(0), Some((huge, MAX_REQUEST as u32)));
        assert_eq!(driver.used(0), Some((none, 0)));
    }
}
