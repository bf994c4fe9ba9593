//! The local APIC (Intel SDM volume 3, chapter 12).

use crate::cpu::Cpu;

/// The registers and timer of one local APIC.
pub(crate) struct Lapic {}

impl Lapic {
    pub(crate) fn new(_index: u32) -> Lapic {
        Lapic {}
    }

    /// Whether the APIC's register page is at this guest physical address (enabled and not in x2APIC mode).
    #[inline]
    pub(crate) fn claims(&self, gpa: u64, apic_base: u64) -> bool {
        gpa & !0xfff == apic_base & 0x3f_ffff_f000 && apic_base & 0xc00 == 0x800
    }
}

impl Cpu {
    pub(crate) fn lapic_mmio_read(&mut self, _offset: u16) -> u32 {
        0
    }

    pub(crate) fn lapic_mmio_write(&mut self, _offset: u16, _value: u32) {}

    /// Fires the timer if its time has come.
    pub(crate) fn expire_timers(&mut self) {}

    /// When the timer fires next, in the clock's host nanoseconds.
    pub(crate) fn next_deadline_ns(&self) -> Option<u64> {
        None
    }
}
