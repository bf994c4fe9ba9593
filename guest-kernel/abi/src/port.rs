//! The doorbell: how a guest finds the host, and the registers through which it calls.
//!
//! With ACPI the device is [`ACPI_ID`], whose resources are the ports, the interrupt and the shared page. Without
//! ACPI a guest reads [`REG_SIGNATURE`] at [`BASE`]: another machine answers something else there, usually all ones.
//! All registers are 4 bytes wide and answer no other width. The ports belong to the guest's kernel: user mode has
//! them only if the kernel grants them (I/O privilege level or permission bitmap), which it must not.

/// `_HID` of the ACPI device.
pub const ACPI_ID: &str = "HARV0001";
/// First port.
pub const BASE: u16 = 0x5a0;
/// Number of ports.
pub const LEN: u16 = 32;

/// What [`REG_SIGNATURE`] reads as: the bytes `HARV`.
pub const SIGNATURE: u32 = u32::from_le_bytes(*b"HARV");

/// Offset of the doorbell: a write of an argument block's guest-physical address divided by
/// [`crate::block::ALIGN`] makes the call, which has been answered when the next instruction runs.
pub const REG_DOORBELL: u16 = 0x00;
/// Offset, for reads: [`SIGNATURE`].
pub const REG_SIGNATURE: u16 = 0x00;
/// Offset, for reads: [`crate::VERSION`] of the host.
pub const REG_VERSION: u16 = 0x04;
/// Offset, for reads: the lower half of the host's [`crate::features`].
pub const REG_FEATURES_LOW: u16 = 0x08;
/// Offset, for reads: the upper half.
pub const REG_FEATURES_HIGH: u16 = 0x0c;
/// Offset: reads as the events that are pending, see [`event`]; a write clears the bits that are set in it. The
/// interrupt line is high as long as an event is pending.
pub const REG_EVENTS: u16 = 0x10;
/// Offset, for reads: the guest-physical address of the shared page divided by 4096.
pub const REG_SHARED_PAGE: u16 = 0x14;
/// Offset, for reads: the global system interrupt of the doorbell, level triggered, active high.
pub const REG_INTERRUPT: u16 = 0x18;
/// Offset, for reads: how many doorbell writes named no memory for a block, so that nobody could be answered.
pub const REG_REJECTED: u16 = 0x1c;

/// The registers: name, offset, what they are. For the C header and the reference.
pub const REGISTERS: &[(&str, u16, &str)] = &[
    ("DOORBELL", REG_DOORBELL, "write: makes the call whose argument block is at the value times 64"),
    ("SIGNATURE", REG_SIGNATURE, "read: the bytes HARV"),
    ("VERSION", REG_VERSION, "read: the ABI's version, major number in the upper half"),
    ("FEATURES_LOW", REG_FEATURES_LOW, "read: lower half of the feature word"),
    ("FEATURES_HIGH", REG_FEATURES_HIGH, "read: upper half of the feature word"),
    ("EVENTS", REG_EVENTS, "read: pending events; write: clears the events whose bits are set"),
    ("SHARED_PAGE", REG_SHARED_PAGE, "read: guest-physical address of the shared page, divided by 4096"),
    ("INTERRUPT", REG_INTERRUPT, "read: global system interrupt, level triggered, active high"),
    ("REJECTED", REG_REJECTED, "read: doorbell writes whose value was the place of no block"),
];

/// Events of which the host tells the guest: bits of [`REG_EVENTS`].
pub mod event {
    /// The wall clock, a frequency or the time base in the shared page has changed in a step.
    pub const CLOCK: u32 = 1 << 0;
    /// The console has room again after a CONSOLE call that took less than all.
    pub const CONSOLE_ROOM: u32 = 1 << 1;
    /// The machine was restored or forked: entropy, identity and addresses are to be replaced, see IDENTITY. Only for
    /// a guest that has set the feature IDENTITY.
    pub const GENERATION: u32 = 1 << 8;
    /// The host asks the guest to come to rest: the guest answers with QUIESCE. Only for a guest that has set the
    /// feature QUIESCE.
    pub const QUIESCE: u32 = 1 << 9;
    /// The guest need not be at rest any more. As QUIESCE.
    pub const THAW: u32 = 1 << 10;

    /// Name, bit, meaning.
    pub const EVENTS: &[(&str, u32, &str)] = &[
        ("CLOCK", CLOCK, "the clock in the shared page has changed in a step"),
        ("CONSOLE_ROOM", CONSOLE_ROOM, "the console has room again after it took less than all"),
        (
            "GENERATION",
            GENERATION,
            "the machine was restored or forked: see IDENTITY, whose feature bit asks for it",
        ),
        (
            "QUIESCE",
            QUIESCE,
            "the host asks the guest to come to rest: see QUIESCE, whose feature bit asks for it",
        ),
        ("THAW", THAW, "the guest need not be at rest any more"),
    ];
}
