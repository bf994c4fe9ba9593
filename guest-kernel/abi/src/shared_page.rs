//! The page that the host writes and the guest reads without a call.
//!
//! It is ordinary memory at an address that the memory map reserves, so a snapshot has it. The guest may write it and
//! then deceives only itself. It holds zeros until the first CLOCK call.

use crate::layout::layout;

/// Size of the page in bytes.
pub const SIZE: usize = 4096;
/// Offset of the [`ClockPage`] in it.
pub const CLOCK_OFFSET: u64 = 0;

/// [`ClockPage::flags`]: the fields are filled in.
pub const CLOCK_VALID: u32 = 1 << 0;
/// [`ClockPage::flags`]: the TSC of every processor shows the same time and never stops: it needs no watchdog.
pub const CLOCK_TSC_RELIABLE: u32 = 1 << 1;

layout! {
    /// Time and frequencies.
    ///
    /// A reader takes `sequence` (odd: try again), then the fields, then `sequence` again (changed: try again).
    /// Guest time in nanoseconds is `monotonic_base_ns + ((ticks * tsc_to_ns_multiplier) >> 32)` with
    /// `ticks = tsc - tsc_base`, shifted left by `tsc_shift` first (right, if it is negative). It stands still while
    /// the machine is paused and never goes back. The wall clock is guest time plus `wall_offset_ns`.
    pub struct ClockPage {
        /// Odd while the host writes.
        pub sequence: u32,
        /// CLOCK_VALID, CLOCK_TSC_RELIABLE.
        pub flags: u32,
        /// Frequency of the TSC in kHz.
        pub tsc_khz: u32,
        /// Frequency of the local APIC timer before its divider, in kHz.
        pub lapic_timer_khz: u32,
        /// TSC at which guest time was `monotonic_base_ns`.
        pub tsc_base: u64,
        /// Guest time at `tsc_base`, in nanoseconds.
        pub monotonic_base_ns: u64,
        /// Nanoseconds a shifted tick, as a fraction of 2^32.
        pub tsc_to_ns_multiplier: u32,
        /// Left shift of the ticks before they are multiplied, -31 to 31.
        pub tsc_shift: i32,
        /// Nanoseconds since 1970-01-01 UTC when guest time was zero.
        pub wall_offset_ns: i64,
        /// Grows each time that the machine is restored or forked.
        pub generation: u64,
    }
}
