//! Single instructions that Rust has no words for.

use core::arch::asm;
use core::arch::x86_64::{__cpuid_count, CpuidResult};

macro_rules! port {
    ($read:ident, $write:ident, $type:ty, $register:tt) => {
        /// Reads a port.
        pub fn $read(port: u16) -> $type {
            let value: $type;
            unsafe { asm!(concat!("in ", $register, ", dx"), in("dx") port, out($register) value, options(nostack)) }
            value
        }
        /// Writes a port.
        pub fn $write(port: u16, value: $type) {
            unsafe { asm!(concat!("out dx, ", $register), in("dx") port, in($register) value, options(nostack)) }
        }
    };
}

port!(inb, outb, u8, "al");
port!(inw, outw, u16, "ax");
port!(inl, outl, u32, "eax");

macro_rules! control {
    ($read:ident, $write:ident, $register:literal) => {
        /// Reads the register.
        pub fn $read() -> u64 {
            let value: u64;
            unsafe { asm!(concat!("mov {}, ", $register), out(reg) value, options(nostack)) }
            value
        }
        /// Writes the register.
        pub fn $write(value: u64) {
            unsafe { asm!(concat!("mov ", $register, ", {}"), in(reg) value, options(nostack)) }
        }
    };
}

control!(cr0, set_cr0, "cr0");
control!(cr2, set_cr2, "cr2");
control!(cr3, set_cr3, "cr3");
control!(cr4, set_cr4, "cr4");
control!(cr8, set_cr8, "cr8");
control!(dr0, set_dr0, "dr0");
control!(dr6, set_dr6, "dr6");
control!(dr7, set_dr7, "dr7");

/// Bits of CR0.
pub mod cr0 {
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const PG: u64 = 1 << 31;
}

/// Bits of CR4.
pub mod cr4 {
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const PGE: u64 = 1 << 7;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
}

/// Model-specific registers.
pub mod msr {
    pub const TSC: u32 = 0x10;
    pub const APIC_BASE: u32 = 0x1b;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const PAT: u32 = 0x277;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const SFMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
}

/// Bits of RFLAGS.
pub mod flags {
    pub const CF: u64 = 1;
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const AC: u64 = 1 << 18;
    pub const ID: u64 = 1 << 21;
    /// CF, PF, AF, ZF, SF and OF.
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
}

/// Reads a model-specific register that exists.
pub fn rdmsr(index: u32) -> u64 {
    let (low, high): (u32, u32);
    unsafe { asm!("rdmsr", in("ecx") index, out("eax") low, out("edx") high, options(nostack)) }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register that takes the value.
pub fn wrmsr(index: u32, value: u64) {
    unsafe {
        asm!("wrmsr", in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack))
    }
}

/// Processor identification.
pub fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    __cpuid_count(leaf, subleaf)
}

/// True under QEMU's translator, which is known to leave some checks of the architecture out.
pub fn under_tcg() -> bool {
    let leaf = cpuid(0x4000_0000, 0);
    cpuid(1, 0).ecx >> 31 == 1 && [leaf.ebx, leaf.ecx, leaf.edx] == [0x5447_4354, 0x4354_4743, 0x4743_5447]
}

/// The time-stamp counter.
pub fn rdtsc() -> u64 {
    let (low, high): (u32, u32);
    unsafe { asm!("lfence", "rdtsc", out("eax") low, out("edx") high, options(nostack)) }
    u64::from(high) << 32 | u64::from(low)
}

/// The task-priority register as the APIC shows it.
pub fn peek_lapic_tpr() -> u64 {
    u64::from(crate::apic::read(crate::apic::TPR))
}

/// Forgets the translation of one address.
pub fn invlpg(va: u64) {
    unsafe { asm!("invlpg [{}]", in(reg) va, options(nostack)) }
}

/// Enables interrupts.
pub fn sti() {
    unsafe { asm!("sti") }
}

/// Disables interrupts.
pub fn cli() {
    unsafe { asm!("cli") }
}

/// Waits for an interrupt with interrupts enabled, and disables them again.
pub fn wait_for_interrupt() {
    unsafe { asm!("sti", "hlt", "cli") }
}

/// Tells the processor of a waiting loop.
pub fn pause() {
    core::hint::spin_loop();
}

/// Stops this processor but for non-maskable interrupts.
pub fn halt_forever() {
    unsafe { asm!("cli", "hlt") }
}
