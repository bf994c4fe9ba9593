//! The local APIC in both of its forms, and the I/O APIC.

use crate::cpu::{self, msr};

/// Physical address of the local APIC's registers.
pub const LAPIC: u64 = 0xfee0_0000;
/// Physical address of the I/O APIC's registers.
pub const IOAPIC: u64 = 0xfec0_0000;

/// Offsets of local APIC registers (Intel SDM volume 3, 12.4.1).
pub const ID: u32 = 0x20;
pub const VERSION: u32 = 0x30;
pub const TPR: u32 = 0x80;
pub const PPR: u32 = 0xa0;
pub const EOI: u32 = 0xb0;
pub const LDR: u32 = 0xd0;
pub const DFR: u32 = 0xe0;
pub const SPIV: u32 = 0xf0;
pub const ISR: u32 = 0x100;
pub const TMR: u32 = 0x180;
pub const IRR: u32 = 0x200;
pub const ESR: u32 = 0x280;
pub const ICR: u32 = 0x300;
pub const ICR_HIGH: u32 = 0x310;
pub const LVT_TIMER: u32 = 0x320;
pub const LVT_LINT0: u32 = 0x350;
pub const LVT_LINT1: u32 = 0x360;
pub const LVT_ERROR: u32 = 0x370;
pub const TIMER_INITIAL: u32 = 0x380;
pub const TIMER_CURRENT: u32 = 0x390;
pub const TIMER_DIVIDE: u32 = 0x3e0;

/// Masks an entry of the local vector table.
pub const MASKED: u32 = 1 << 16;

const BASE_X2APIC: u64 = 1 << 10;

/// True when the registers are model-specific registers.
pub fn is_x2apic() -> bool {
    cpu::rdmsr(msr::APIC_BASE) & BASE_X2APIC != 0
}

/// Reads a register.
pub fn read(register: u32) -> u32 {
    if is_x2apic() {
        cpu::rdmsr(0x800 + register / 16) as u32
    } else {
        unsafe { ((LAPIC + u64::from(register)) as *const u32).read_volatile() }
    }
}

/// Writes a register.
pub fn write(register: u32, value: u32) {
    if is_x2apic() {
        cpu::wrmsr(0x800 + register / 16, value.into());
    } else {
        unsafe { ((LAPIC + u64::from(register)) as *mut u32).write_volatile(value) }
    }
}

/// Sends an interprocessor interrupt: the low half of the command, to one processor or by shorthand.
pub fn send_ipi(destination: u32, command: u32) {
    if is_x2apic() {
        cpu::wrmsr(0x800 + ICR / 16, u64::from(destination) << 32 | u64::from(command));
    } else {
        write(ICR_HIGH, destination << 24);
        write(ICR, command);
        while read(ICR) & 1 << 12 != 0 {
            cpu::pause();
        }
    }
}

/// Software-enables the APIC, spurious vector 0xef, with all priorities accepted.
pub fn enable() {
    write(SPIV, 0x1ef);
    write(TPR, 0);
    write(LVT_LINT0, MASKED);
    write(LVT_LINT1, MASKED);
    write(LVT_ERROR, MASKED);
    write(LVT_TIMER, MASKED);
}

/// Switches to x2APIC form; false if the processor has none.
pub fn enable_x2apic() -> bool {
    if cpu::cpuid(1, 0).ecx & 1 << 21 == 0 {
        return false;
    }
    cpu::wrmsr(msr::APIC_BASE, cpu::rdmsr(msr::APIC_BASE) | BASE_X2APIC);
    true
}

/// Whether `vector`'s bit is set in the 256-bit register that starts at `register`.
pub fn bit(register: u32, vector: u32) -> bool {
    read(register + vector / 32 * 16) >> (vector % 32) & 1 != 0
}

/// Ends the interrupt in service.
pub fn eoi() {
    write(EOI, 0);
}

/// Reads an I/O APIC register.
pub fn ioapic_read(index: u32) -> u32 {
    unsafe {
        (IOAPIC as *mut u32).write_volatile(index);
        ((IOAPIC + 0x10) as *const u32).read_volatile()
    }
}

/// Writes an I/O APIC register.
pub fn ioapic_write(index: u32, value: u32) {
    unsafe {
        (IOAPIC as *mut u32).write_volatile(index);
        ((IOAPIC + 0x10) as *mut u32).write_volatile(value);
    }
}

/// Sets a redirection entry.
pub fn ioapic_route(pin: u32, destination: u32, low: u32) {
    ioapic_write(0x10 + 2 * pin, MASKED);
    ioapic_write(0x11 + 2 * pin, destination << 24);
    ioapic_write(0x10 + 2 * pin, low);
}
