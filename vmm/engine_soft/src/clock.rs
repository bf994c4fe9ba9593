//! Guest time: nanoseconds of the paravirtual clock and ticks of the TSC, both from the host's monotonic clock.
//!
//! The TSC runs at 1 GHz unless the machine is told otherwise: then a tick is a nanosecond, needs no
//! calibration, and is the same on every host.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Frequency of the TSC when nobody asks for another.
const DEFAULT_TSC_KHZ: u32 = 1_000_000;

pub(crate) struct Clock {
    start: Instant,
    /// Added to the time since `start` (wrapping) to give the paravirtual clock.
    offset_ns: AtomicU64,
    khz: u32,
}

impl Clock {
    pub(crate) fn new(tsc_khz: Option<u32>) -> Clock {
        let khz = tsc_khz.filter(|&khz| khz > 0).unwrap_or(DEFAULT_TSC_KHZ);
        Clock { start: Instant::now(), offset_ns: AtomicU64::new(0), khz }
    }

    /// Nanoseconds since the machine was created; never jumps. Deadlines are in this time.
    #[inline]
    pub(crate) fn host_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    /// The paravirtual clock.
    pub(crate) fn guest_ns(&self) -> u64 {
        self.host_ns().wrapping_add(self.offset_ns.load(Ordering::Relaxed))
    }

    /// Sets the paravirtual clock.
    pub(crate) fn set_guest_ns(&self, ns: u64) {
        self.offset_ns.store(ns.wrapping_sub(self.host_ns()), Ordering::Relaxed);
    }

    pub(crate) fn tsc_khz(&self) -> u32 {
        self.khz
    }

    /// TSC ticks at a host time, before any vCPU's offset.
    #[inline]
    pub(crate) fn ticks_at(&self, host_ns: u64) -> u64 {
        if self.khz == DEFAULT_TSC_KHZ {
            host_ns
        } else {
            (u128::from(host_ns) * u128::from(self.khz) / 1_000_000) as u64
        }
    }

    /// Host nanoseconds that so many ticks take, rounded up.
    pub(crate) fn ticks_to_ns(&self, ticks: u64) -> u64 {
        if self.khz == DEFAULT_TSC_KHZ {
            ticks
        } else {
            u64::try_from((u128::from(ticks) * 1_000_000).div_ceil(u128::from(self.khz))).unwrap_or(u64::MAX)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_follow_the_frequency() {
        let clock = Clock::new(Some(2_500_000));
        assert_eq!(clock.ticks_at(1_000_000_000), 2_500_000_000);
        assert_eq!(clock.ticks_to_ns(5), 2);
        assert_eq!(Clock::new(None).ticks_at(7), 7);
    }
}
