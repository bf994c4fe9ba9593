//! The clock page: what it says, and how it is written.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use harrier_engine::cpuid::APIC_BUS_KHZ;
use harrier_engine::{EngineError, GuestMemory, Vm, clock_scale};
use harrier_hypercall_abi::Status;
use harrier_hypercall_abi::calls::ClockResult;
use harrier_hypercall_abi::shared_page::{CLOCK_OFFSET, CLOCK_TSC_RELIABLE, CLOCK_VALID, ClockPage};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// A guest's clock that is farther ahead of the engine's was not made so by its TSC's frequency: the guest has set its TSC.
const FARTHEST_AHEAD_NS: u64 = 86_400_000_000_000;

/// A wall clock that is farther off is worth an interrupt. Snapshots let a machine stand for less.
const WORTH_TELLING_NS: u64 = 10_000_000;

/// A call that was on its way when the machine was stopped arrives within this time of the guest.
const ON_ITS_WAY_NS: u64 = 100_000_000;

/// The guest's clock page and what it said last.
pub(crate) struct GuestClock {
    vm: Arc<dyn Vm>,
    memory: GuestMemory,
    gpa: GuestAddress,
    /// Nothing before the guest asks: a guest that does not may use the memory for something else.
    page: Mutex<Option<ClockPage>>,
    /// The guest's TSC and the engine's clock when the machine was last started.
    started_at: Mutex<Option<(u64, u64)>>,
    /// The wall clock's offset that the guest was told by a call, in this machine.
    told_offset_ns: Mutex<Option<i64>>,
}

impl GuestClock {
    /// A clock whose page is in the shared page at `shared_page_gpa`.
    pub(crate) fn new(vm: Arc<dyn Vm>, memory: GuestMemory, shared_page_gpa: u64) -> Self {
        GuestClock {
            vm,
            memory,
            gpa: GuestAddress(shared_page_gpa.saturating_add(CLOCK_OFFSET)),
            page: Mutex::new(None),
            started_at: Mutex::new(None),
            told_offset_ns: Mutex::new(None),
        }
    }

    /// Writes the page for a guest that has asked, whose TSC is `tsc` now. The first time it ties guest time to the TSC; from
    /// then on guest time goes on as the page says, and only the wall clock is corrected.
    pub(crate) fn publish(&self, tsc: u64) -> Result<ClockResult, Status> {
        let result = self.write_anew(self.believable(tsc))?;
        *self.told_offset_ns.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(result.wall_ns.wrapping_sub(result.monotonic_ns.cast_signed()));
        Ok(result)
    }

    /// `tsc`, unless the guest has read it before its machine was stopped, which may go on with another one elsewhere.
    fn believable(&self, tsc: u64) -> u64 {
        let started_at = *self.started_at.lock().unwrap_or_else(PoisonError::into_inner);
        let (Some((first, first_ns)), Ok(now_ns)) = (started_at, self.vm.clock_ns()) else { return tsc };
        let passed_ns = now_ns.saturating_sub(first_ns);
        if passed_ns > ON_ITS_WAY_NS {
            return tsc;
        }
        let ticks = |ns: u64| (u128::from(ns) * u128::from(self.vm.tsc_khz()) / 1_000_000) as u64;
        // Before the start, or far ahead of now.
        if tsc.wrapping_sub(first) <= ticks(ON_ITS_WAY_NS) * 2 {
            tsc
        } else {
            first.wrapping_add(ticks(passed_ns))
        }
    }

    fn write_anew(&self, tsc: u64) -> Result<ClockResult, Status> {
        let mut last = self.page.lock().unwrap_or_else(PoisonError::into_inner);
        let mut page = match *last {
            Some(page) => page,
            None => self.first(tsc).map_err(|err| {
                log::warn!("the guest's clock page: {err}");
                Status::HostFailed
            })?,
        };
        let monotonic_ns = guest_time_ns(&page, tsc);
        let wall_ns = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .ok()
            .and_then(|since| i64::try_from(since.as_nanos()).ok())
            .unwrap_or(0);
        page.wall_offset_ns = wall_ns.wrapping_sub(monotonic_ns.cast_signed());
        page.sequence = page.sequence.wrapping_add(2);
        self.write(&page).map_err(|_| Status::BadPointer)?;
        *last = Some(page);
        Ok(ClockResult { clock_page: self.gpa.0, monotonic_ns, wall_ns })
    }

    /// What a snapshot keeps: the page's sequence and generation, if it was ever written.
    pub(crate) fn save(&self) -> Option<(u32, u64)> {
        let page = self.page.lock().unwrap_or_else(PoisonError::into_inner);
        page.map(|page| (page.sequence, page.generation))
    }

    /// Takes up what a snapshot kept. The page itself is guest memory, and stale until [`GuestClock::tie`].
    pub(crate) fn restore(&self, saved: Option<(u32, u64)>) {
        *self.page.lock().unwrap_or_else(PoisonError::into_inner) = saved.map(|(sequence, generation)| {
            let generation = generation.wrapping_add(1);
            ClockPage { sequence: sequence & !1, generation, ..ClockPage::default() }
        });
    }

    /// The engine's clock, which stands still, becomes what the guest could read last, when its TSC was `tsc`: the two
    /// run at frequencies that are not known to the last digit, and guest time goes on from the engine's.
    pub(crate) fn stop(&self, tsc: u64) -> Result<(), EngineError> {
        let Some(page) = *self.page.lock().unwrap_or_else(PoisonError::into_inner) else { return Ok(()) };
        let clock_ns = self.vm.clock_ns()?;
        match guest_time_ns(&page, tsc).wrapping_sub(clock_ns) {
            1..FARTHEST_AHEAD_NS => self.vm.set_clock_ns(guest_time_ns(&page, tsc)),
            _ => Ok(()),
        }
    }

    /// Ties guest time to the guest's TSC anew, whose value is `tsc` now, and corrects the wall clock: the engine's clock
    /// stood still at `stood_at_ns`, or is another engine's, and the TSC may have run on. Nothing is written if the guest
    /// has never asked for the page. Answers whether the guest has to be told that its wall clock is wrong.
    pub(crate) fn tie(&self, tsc: u64, stood_at_ns: u64) -> Result<bool, EngineError> {
        let mut last = self.page.lock().unwrap_or_else(PoisonError::into_inner);
        let first = self.first(tsc)?;
        *self.started_at.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((tsc, first.monotonic_base_ns.max(stood_at_ns)));
        let Some(ClockPage { sequence, generation, .. }) = *last else { return Ok(false) };
        // A clock that was set to a time may show an earlier one: KVM's is made of two sources.
        let monotonic_base_ns = first.monotonic_base_ns.max(stood_at_ns);
        *last = Some(ClockPage { sequence, generation, monotonic_base_ns, ..first });
        drop(last);
        // The guest's kernel reads the page; where it cannot be written, it was not there before either.
        let result = match self.write_anew(tsc) {
            Ok(result) => result,
            Err(status) => {
                log::warn!("machine: the guest's clock page is not written: {}", status.name());
                return Ok(false);
            }
        };
        let offset_ns = result.wall_ns.wrapping_sub(result.monotonic_ns.cast_signed());
        let told = *self.told_offset_ns.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(told.is_some_and(|told| told.abs_diff(offset_ns) > WORTH_TELLING_NS))
    }

    fn first(&self, tsc: u64) -> Result<ClockPage, EngineError> {
        let monotonic_base_ns = self.vm.clock_ns()?;
        let tsc_khz = self.vm.tsc_khz();
        let (tsc_to_ns_multiplier, tsc_shift) = clock_scale(tsc_khz);
        Ok(ClockPage {
            sequence: 0,
            flags: CLOCK_VALID | CLOCK_TSC_RELIABLE,
            tsc_khz,
            lapic_timer_khz: APIC_BUS_KHZ,
            tsc_base: tsc,
            monotonic_base_ns,
            tsc_to_ns_multiplier,
            tsc_shift: tsc_shift.into(),
            wall_offset_ns: 0,
            generation: 0,
        })
    }

    /// Writes `page`, whose sequence is even; readers meanwhile see an odd one.
    fn write(&self, page: &ClockPage) -> Result<(), GuestMemoryError> {
        let busy = page.sequence.wrapping_sub(1);
        self.memory.store(busy, self.gpa, Ordering::SeqCst)?;
        let bytes = page.to_bytes();
        let fields = bytes.get(4..).unwrap_or_default();
        self.memory.write_slice(fields, GuestAddress(self.gpa.0.saturating_add(4)))?;
        self.memory.store(page.sequence, self.gpa, Ordering::SeqCst)
    }
}

/// Guest time at `tsc` as a reader of the page takes it.
fn guest_time_ns(page: &ClockPage, tsc: u64) -> u64 {
    let ticks = u128::from(tsc.wrapping_sub(page.tsc_base));
    let shifted = match page.tsc_shift {
        left @ 0..=31 => ticks << left,
        right => ticks >> right.unsigned_abs().min(127),
    };
    let ns = (shifted * u128::from(page.tsc_to_ns_multiplier)) >> 32;
    page.monotonic_base_ns.wrapping_add(ns as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_time_follows_the_tsc_at_every_frequency() {
        for khz in [1, 999, 1_000_000, 2_445_406, 5_000_000, u32::MAX] {
            let (tsc_to_ns_multiplier, shift) = clock_scale(khz);
            let page = ClockPage {
                tsc_base: 1000,
                monotonic_base_ns: 5,
                tsc_to_ns_multiplier,
                tsc_shift: shift.into(),
                ..ClockPage::default()
            };
            let after_a_minute = guest_time_ns(&page, 1000 + u64::from(khz) * 60_000);
            let off = after_a_minute.abs_diff(60_000_000_005);
            assert!(off < 100_000, "{khz} kHz is {off} ns off");
            assert_eq!(guest_time_ns(&page, 1000), 5);
        }
    }

    #[test]
    fn a_tsc_of_any_value_is_no_accident() {
        let page = ClockPage {
            tsc_base: 1,
            tsc_to_ns_multiplier: u32::MAX,
            tsc_shift: 31,
            monotonic_base_ns: u64::MAX,
            ..ClockPage::default()
        };
        guest_time_ns(&page, 0);
        guest_time_ns(&ClockPage { tsc_shift: i32::MIN, ..page }, u64::MAX);
    }
}
