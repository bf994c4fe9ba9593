//! The host's time-stamp counter.
#![expect(unsafe_code, reason = "the intrinsic is declared unsafe")]

/// Ticks of the host's counter.
#[inline]
pub(crate) fn read() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and Linux does not forbid it.
    unsafe { std::arch::x86_64::_rdtsc() }
}
