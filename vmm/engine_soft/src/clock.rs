//! Guest time: nanoseconds of the paravirtual clock and ticks of the TSC, both from one source.
//!
//! The source is the host's monotonic clock, and the TSC runs at 1 GHz unless the machine is told otherwise: then
//! a tick is a nanosecond, needs no calibration, and is the same on every host. Where user code runs on the host's
//! processor, which no offset reaches, the source is the host's TSC.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::native::tsc;

/// Frequency of the TSC when nobody asks for another.
const DEFAULT_TSC_KHZ: u32 = 1_000_000;

/// Time does not stand still.
const RUNS: u64 = u64::MAX;

/// What drives guest time.
enum Source {
    /// The host's monotonic clock; the TSC is made of it.
    Monotonic(Instant),
    /// The host's TSC, from this value on: user code that runs on the host's processor reads it unchanged.
    Native(u64),
}

pub(crate) struct Clock {
    source: Source,
    /// Time of the source, less what was passed standing still, at which time stands still; all ones if it runs.
    stopped_at_ns: AtomicU64,
    /// Nanoseconds of the source that were passed standing still.
    stood_ns: AtomicU64,
    /// Added to the time since `start` (wrapping) to give the paravirtual clock.
    offset_ns: AtomicU64,
    /// Grows when the paravirtual clock is set: the clock pages have to be written again.
    generation: AtomicU64,
    /// TSC offset that a restored processor got; the next one gets the same if it is close.
    restored_offset: Mutex<Option<u64>>,
    khz: u32,
}

impl Clock {
    pub(crate) fn new(tsc_khz: Option<u32>) -> Clock {
        let khz = tsc_khz.filter(|&khz| khz > 0).unwrap_or(DEFAULT_TSC_KHZ);
        Clock::from_source(Source::Monotonic(Instant::now()), khz)
    }

    /// A clock whose TSC is the host's, of this frequency, and cannot be moved.
    pub(crate) fn native(khz: u32) -> Clock {
        Clock::from_source(Source::Native(tsc::read()), khz.max(1))
    }

    /// Whether the TSC is the host's.
    pub(crate) fn is_native(&self) -> bool {
        matches!(self.source, Source::Native(_))
    }

    fn from_source(source: Source, khz: u32) -> Clock {
        Clock {
            source,
            stopped_at_ns: AtomicU64::new(RUNS),
            stood_ns: AtomicU64::new(0),
            offset_ns: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            restored_offset: Mutex::new(None),
            khz,
        }
    }

    /// Nanoseconds since the machine was created, without those in which it stood still; never jumps. Deadlines are in
    /// this time.
    #[inline]
    pub(crate) fn host_ns(&self) -> u64 {
        match self.stopped_at_ns.load(Ordering::Acquire) {
            RUNS => self.source_ns().saturating_sub(self.stood_ns.load(Ordering::Acquire)),
            stopped_at => stopped_at,
        }
    }

    /// Stands still. No vCPU runs.
    pub(crate) fn stop(&self) {
        self.stopped_at_ns.store(self.host_ns(), Ordering::Release);
    }

    /// Goes on. No vCPU runs yet. Where the TSC did not stand still, the clock pages have to be written again.
    pub(crate) fn start(&self) {
        let stopped_at = self.stopped_at_ns.load(Ordering::Acquire);
        if stopped_at != RUNS {
            self.stood_ns.store(self.source_ns().saturating_sub(stopped_at), Ordering::Release);
            self.stopped_at_ns.store(RUNS, Ordering::Release);
            self.generation.fetch_add(1, Ordering::Release);
        }
    }

    fn source_ns(&self) -> u64 {
        match self.source {
            Source::Monotonic(start) => start.elapsed().as_nanos() as u64,
            Source::Native(start) => {
                let ticks = tsc::read().saturating_sub(start);
                (u128::from(ticks) * 1_000_000 / u128::from(self.khz)) as u64
            }
        }
    }

    /// The paravirtual clock.
    pub(crate) fn guest_ns(&self) -> u64 {
        self.host_ns().wrapping_add(self.offset_ns.load(Ordering::Relaxed))
    }

    /// Sets the paravirtual clock.
    pub(crate) fn set_guest_ns(&self, ns: u64) {
        self.offset_ns.store(ns.wrapping_sub(self.host_ns()), Ordering::Relaxed);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Changes whenever the paravirtual clock was set.
    #[inline]
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The paravirtual clock at a host time.
    pub(crate) fn guest_ns_at(&self, host_ns: u64) -> u64 {
        host_ns.wrapping_add(self.offset_ns.load(Ordering::Relaxed))
    }

    /// Wall-clock time at which the paravirtual clock was zero, since 1970.
    pub(crate) fn guest_epoch(&self) -> Duration {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        now.saturating_sub(Duration::from_nanos(self.guest_ns()))
    }

    /// TSC offset for a processor that is restored with `wanted`. The counters of one machine's processors
    /// were saved one after the other; those that agree to within a second belong together and stay equal.
    pub(crate) fn common_offset(&self, wanted: u64) -> u64 {
        if self.is_native() {
            return 0;
        }
        let mut last = self.restored_offset.lock().unwrap_or_else(PoisonError::into_inner);
        let second = u64::from(self.khz) * 1000;
        match *last {
            Some(offset) if offset.wrapping_sub(wanted).min(wanted.wrapping_sub(offset)) < second => offset,
            _ => {
                *last = Some(wanted);
                wanted
            }
        }
    }

    pub(crate) fn tsc_khz(&self) -> u32 {
        self.khz
    }

    /// TSC ticks at a host time, before any vCPU's offset. The host's own TSC does not stand still.
    #[inline]
    pub(crate) fn ticks_at(&self, host_ns: u64) -> u64 {
        let (start, ns) = match self.source {
            Source::Monotonic(_) if self.khz == DEFAULT_TSC_KHZ => return host_ns,
            Source::Monotonic(_) => (0, host_ns),
            Source::Native(start) => (start, host_ns.saturating_add(self.stood_ns())),
        };
        start.wrapping_add((u128::from(ns) * u128::from(self.khz) / 1_000_000) as u64)
    }

    /// Nanoseconds in which time stood still so far.
    fn stood_ns(&self) -> u64 {
        match self.stopped_at_ns.load(Ordering::Acquire) {
            RUNS => self.stood_ns.load(Ordering::Acquire),
            stopped_at => self.source_ns().saturating_sub(stopped_at),
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

    #[test]
    fn a_native_clock_shows_the_hosts_tsc() {
        let clock = Clock::native(2_000_000);
        let before = tsc::read();
        let shown = clock.ticks_at(clock.host_ns());
        let after = tsc::read();
        // Going through nanoseconds loses less than one of them.
        assert!((before.saturating_sub(4)..=after).contains(&shown), "{before} {shown} {after}");
        assert_eq!(clock.common_offset(12345), 0);
    }

    #[test]
    fn while_it_is_stopped_nothing_moves_and_then_it_goes_on_from_there() {
        let clock = Clock::new(None);
        clock.stop();
        let (stopped, guest) = (clock.host_ns(), clock.guest_ns());
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!((clock.host_ns(), clock.guest_ns()), (stopped, guest));
        assert_eq!(clock.ticks_at(clock.host_ns()), stopped);
        let generation = clock.generation();
        let begin = Instant::now();
        clock.start();
        assert_ne!(clock.generation(), generation);
        let after = clock.host_ns();
        assert!(after >= stopped && after - stopped <= begin.elapsed().as_nanos() as u64 + 1_000_000);
        clock.stop();
        assert!(clock.host_ns() >= after);
    }

    #[test]
    fn the_hosts_tsc_runs_on_while_guest_time_stands_still() {
        let clock = Clock::native(1_000_000);
        clock.stop();
        let (stopped, ticks) = (clock.host_ns(), clock.ticks_at(clock.host_ns()));
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(clock.host_ns(), stopped);
        assert!(clock.ticks_at(stopped) > ticks);
        clock.start();
        let shown = clock.ticks_at(clock.host_ns());
        assert!(tsc::read().saturating_sub(shown) < 1_000_000_000);
    }

    #[test]
    fn processors_restored_together_keep_one_tsc() {
        let clock = Clock::new(None);
        assert_eq!(clock.common_offset(5_000_000_000), 5_000_000_000);
        assert_eq!(clock.common_offset(5_400_000_000), 5_000_000_000);
        assert_eq!(clock.common_offset(9_000_000_000), 9_000_000_000);
    }
}
