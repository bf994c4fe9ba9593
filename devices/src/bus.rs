//! Address decoding: which device answers a port or a memory-mapped address.
//!
//! A [`BusBuilder`] collects ranges and [`BusDevice`]s; the [`Bus`] that it makes never changes afterwards, so
//! that vCPU threads share it without a lock of its own. A machine has two: one for ports, one for MMIO.

use std::sync::{Arc, Mutex, PoisonError};

use harrier_engine::Flow;

/// A device with registers.
pub trait BusDevice: Send {
    /// A load of `data.len()` bytes (1, 2, 4 or 8) at `offset` from the start of the device's range. The
    /// device fills all of `data`.
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Flow;
    /// A store of `data.len()` bytes (1, 2, 4 or 8) at `offset` from the start of the device's range.
    fn write(&mut self, offset: u64, data: &[u8]) -> Flow;
}

/// A device as the bus shares it.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// Why a range cannot be claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// The range has no bytes or ends past the last address.
    #[error("the range of {len:#x} bytes at {base:#x} is empty or does not fit the address space")]
    Invalid {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Somebody else has part of the range.
    #[error(
        "the range of {len:#x} bytes at {base:#x} overlaps the one of {other_len:#x} bytes at {other:#x}"
    )]
    Overlap {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
        /// First address of the range that was there before.
        other: u64,
        /// Its length in bytes.
        other_len: u64,
    },
}

struct Claim {
    base: u64,
    len: u64,
    device: SharedDevice,
}

/// Collects claims for a [`Bus`].
#[derive(Default)]
pub struct BusBuilder {
    claims: Vec<Claim>,
}

impl BusBuilder {
    /// A builder without claims.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives `len` addresses from `base` to `device`. The same device may claim several ranges.
    ///
    /// # Errors
    /// [`ClaimError`] if the range is empty, wraps around or overlaps another one.
    pub fn insert(&mut self, base: u64, len: u64, device: SharedDevice) -> Result<(), ClaimError> {
        if len == 0 || base.checked_add(len - 1).is_none() {
            return Err(ClaimError::Invalid { base, len });
        }
        let at = self.claims.partition_point(|claim| claim.base < base);
        let before = at.checked_sub(1).and_then(|i| self.claims.get(i));
        let overlap = match (before, self.claims.get(at)) {
            (Some(claim), _) if base - claim.base < claim.len => Some(claim),
            (_, Some(claim)) if claim.base - base < len => Some(claim),
            _ => None,
        };
        if let Some(claim) = overlap {
            return Err(ClaimError::Overlap { base, len, other: claim.base, other_len: claim.len });
        }
        self.claims.insert(at, Claim { base, len, device });
        Ok(())
    }

    /// The finished bus.
    pub fn build(self) -> Bus {
        Bus { claims: self.claims.into() }
    }
}

/// A finished map from addresses to devices; cloning shares it.
#[derive(Clone)]
pub struct Bus {
    /// Sorted by base, not overlapping.
    claims: Arc<[Claim]>,
}

impl Bus {
    /// A load of `data.len()` bytes at `addr`. What no device answers, and what straddles the end of a
    /// device's range, reads as all ones.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> Flow {
        match self.find(addr, data.len()) {
            Some((claim, offset)) => {
                claim.device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data)
            }
            None => {
                log::trace!("bus: no device reads {} bytes at {addr:#x}", data.len());
                data.fill(0xff);
                Flow::Continue
            }
        }
    }

    /// A store of `data.len()` bytes at `addr`. What no device answers, and what straddles the end of a
    /// device's range, is dropped.
    pub fn write(&self, addr: u64, data: &[u8]) -> Flow {
        match self.find(addr, data.len()) {
            Some((claim, offset)) => {
                claim.device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data)
            }
            None => {
                log::trace!("bus: no device writes {} bytes at {addr:#x}", data.len());
                Flow::Continue
            }
        }
    }

    fn find(&self, addr: u64, len: usize) -> Option<(&Claim, u64)> {
        let at = self.claims.partition_point(|claim| claim.base <= addr).checked_sub(1)?;
        let claim = self.claims.get(at)?;
        let offset = addr - claim.base;
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        (end <= claim.len).then_some((claim, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder {
        writes: Vec<(u64, Vec<u8>)>,
    }

    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) -> Flow {
            data.fill(offset as u8);
            Flow::Continue
        }

        fn write(&mut self, offset: u64, data: &[u8]) -> Flow {
            self.writes.push((offset, data.to_vec()));
            Flow::Leave
        }
    }

    #[test]
    fn an_access_reaches_the_device_at_its_offset_and_hands_back_its_answer() {
        let device = Arc::new(Mutex::new(Recorder::default()));
        let mut builder = BusBuilder::new();
        builder.insert(0x1000, 0x10, device.clone()).unwrap();
        let bus = builder.build();
        let mut data = [0; 2];
        assert_eq!(bus.read(0x1004, &mut data), Flow::Continue);
        assert_eq!(data, [4, 4]);
        assert_eq!(bus.write(0x100f, &[9]), Flow::Leave);
        assert_eq!(device.lock().unwrap().writes, [(15, vec![9])]);
    }

    #[test]
    fn unclaimed_and_straddling_accesses_read_all_ones_and_write_nothing() {
        let device = Arc::new(Mutex::new(Recorder::default()));
        let mut builder = BusBuilder::new();
        builder.insert(0x10, 4, device.clone()).unwrap();
        let bus = builder.build();
        for addr in [0, 0xf, 0x11, 0x14, u64::MAX] {
            let mut data = [0; 4];
            assert_eq!(bus.read(addr, &mut data), Flow::Continue);
            assert_eq!(data, [0xff; 4], "{addr:#x}");
            assert_eq!(bus.write(addr, &[0; 4]), Flow::Continue);
        }
        assert!(device.lock().unwrap().writes.is_empty());
    }

    #[test]
    fn overlapping_and_wrapping_ranges_are_refused() {
        let device = || Arc::new(Mutex::new(Recorder::default()));
        let mut builder = BusBuilder::new();
        builder.insert(0x100, 0x10, device()).unwrap();
        for (base, len) in [(0x100, 1), (0x10f, 1), (0xff, 2), (0, 0x1000), (0x108, 0x100)] {
            assert_eq!(
                builder.insert(base, len, device()),
                Err(ClaimError::Overlap { base, len, other: 0x100, other_len: 0x10 })
            );
        }
        for (base, len) in [(0, 0), (u64::MAX, 2), (2, u64::MAX)] {
            assert_eq!(builder.insert(base, len, device()), Err(ClaimError::Invalid { base, len }));
        }
        builder.insert(0xff, 1, device()).unwrap();
        builder.insert(0x110, 1, device()).unwrap();
        builder.insert(u64::MAX, 1, device()).unwrap();
    }
}
