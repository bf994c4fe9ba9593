//! Accesses to guest memory by host address.
//!
//! Guest memory is shared with other vCPUs and devices, so every access is one machine instruction in inline
//! assembly: it happens exactly once, is as atomic as the guest's own would be, and the compiler assumes
//! nothing about the bytes.
#![expect(unsafe_code, reason = "reads and writes guest memory through host addresses")]

use std::arch::asm;

/// A host address inside mapped guest memory.
///
/// Only [`crate::mmu`] makes these, for a range that lies inside one guest page and that stays mapped as long
/// as the vCPU holds its reference to the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostPtr(u64);

impl HostPtr {
    /// # Safety
    /// `addr` and the bytes that will be accessed through it must stay inside mapped guest memory.
    pub(crate) unsafe fn new(addr: u64) -> HostPtr {
        HostPtr(addr)
    }

    /// The address as a number.
    pub(crate) fn addr(self) -> u64 {
        self.0
    }
}

/// An unsigned integer of a width that one instruction can access.
pub(crate) trait Word:
    Copy + Eq + Default + std::fmt::Debug + std::ops::Not<Output = Self> + super::alu::Arith + 'static
{
    /// Width in bytes.
    const SIZE: usize;
    /// Width in bits.
    const BITS: u32 = Self::SIZE as u32 * 8;
    /// Zero extension.
    fn to_u64(self) -> u64;
    /// Truncation.
    fn from_u64(value: u64) -> Self;
    /// Sign extension.
    fn to_i64(self) -> i64;
    /// One load.
    fn load(ptr: HostPtr) -> Self;
    /// One store.
    fn store(ptr: HostPtr, value: Self);
    /// LOCK CMPXCHG: answers what was there; the store happened when that equals `old`.
    fn compare_exchange(ptr: HostPtr, old: Self, new: Self) -> Self;
    /// XCHG.
    fn exchange(ptr: HostPtr, value: Self) -> Self;
}

macro_rules! word {
    ($t:ty, $i:ty, $size:literal, $class:ident, $m:literal, $acc:tt) => {
        impl Word for $t {
            const SIZE: usize = $size;
            #[inline(always)]
            fn to_u64(self) -> u64 {
                u64::from(self)
            }
            #[inline(always)]
            fn from_u64(value: u64) -> Self {
                value as $t
            }
            #[inline(always)]
            fn to_i64(self) -> i64 {
                i64::from(self as $i)
            }
            #[inline(always)]
            fn load(ptr: HostPtr) -> Self {
                let value: $t;
                // SAFETY: a HostPtr lies in mapped guest memory for the width of the access.
                unsafe {
                    asm!(concat!("mov ", $m, ", [{p}]"), v = out($class) value, p = in(reg) ptr.0,
                        options(nostack, preserves_flags, readonly));
                }
                value
            }
            #[inline(always)]
            fn store(ptr: HostPtr, value: Self) {
                // SAFETY: as for load; the page is mapped writable on the host.
                unsafe {
                    asm!(concat!("mov [{p}], ", $m), v = in($class) value, p = in(reg) ptr.0,
                        options(nostack, preserves_flags));
                }
            }
            #[inline(always)]
            fn compare_exchange(ptr: HostPtr, old: Self, new: Self) -> Self {
                let seen: $t;
                // SAFETY: as for store.
                unsafe {
                    asm!(concat!("lock cmpxchg [{p}], ", $m), v = in($class) new, p = in(reg) ptr.0,
                        inout($acc) old => seen, options(nostack));
                }
                seen
            }
            #[inline(always)]
            fn exchange(ptr: HostPtr, value: Self) -> Self {
                let seen: $t;
                // SAFETY: as for store.
                unsafe {
                    asm!(concat!("xchg [{p}], ", $m), v = inout($class) value => seen, p = in(reg) ptr.0,
                        options(nostack, preserves_flags));
                }
                seen
            }
        }
    };
}

word!(u8, i8, 1, reg_byte, "{v}", "al");
word!(u16, i16, 2, reg, "{v:x}", "ax");
word!(u32, i32, 4, reg, "{v:e}", "eax");
word!(u64, i64, 8, reg, "{v:r}", "rax");

/// LOCK CMPXCHG16B on a 16-byte aligned address: answers what was there.
#[inline]
pub(crate) fn compare_exchange_16(ptr: HostPtr, old: u128, new: u128) -> u128 {
    let (mut low, mut high) = (old as u64, (old >> 64) as u64);
    // SAFETY: a HostPtr lies in mapped guest memory; callers pass aligned addresses. RBX is saved by hand,
    // since the compiler reserves it.
    unsafe {
        asm!("xchg rbx, {nl}", "lock cmpxchg16b [{p}]", "mov rbx, {nl}",
            nl = inout(reg) new as u64 => _, p = in(reg) ptr.0, in("rcx") (new >> 64) as u64,
            inout("rax") low, inout("rdx") high, options(nostack));
    }
    u128::from(low) | u128::from(high) << 64
}

/// Copies guest bytes out.
#[inline]
pub(crate) fn read_bytes(ptr: HostPtr, out: &mut [u8]) {
    // SAFETY: the caller's range lies in mapped guest memory; `rep movsb` makes no assumption on its content.
    unsafe {
        asm!("rep movsb", inout("rcx") out.len() => _, inout("rsi") ptr.0 => _,
            inout("rdi") out.as_mut_ptr() => _, options(nostack, preserves_flags));
    }
}

/// Copies bytes into guest memory.
#[inline]
pub(crate) fn write_bytes(ptr: HostPtr, data: &[u8]) {
    // SAFETY: as for read_bytes.
    unsafe {
        asm!("rep movsb", inout("rcx") data.len() => _, inout("rsi") data.as_ptr() => _,
            inout("rdi") ptr.0 => _, options(nostack, preserves_flags));
    }
}

/// Copies `len` bytes upwards inside guest memory, as REP MOVSB with DF clear does byte by byte.
#[inline]
pub(crate) fn copy_forward(from: HostPtr, to: HostPtr, len: usize) {
    // SAFETY: both ranges lie in mapped guest memory. Overlap has the architecture's meaning.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rsi") from.0 => _, inout("rdi") to.0 => _,
            options(nostack, preserves_flags));
    }
}

/// Fills guest memory with `count` words, as REP STOS with DF clear does.
#[inline]
pub(crate) fn fill<W: Word>(to: HostPtr, value: W, count: usize) {
    let value = value.to_u64();
    // SAFETY: the range lies in mapped guest memory.
    unsafe {
        match W::SIZE {
            1 => asm!("rep stosb", inout("rcx") count => _, in("rax") value, inout("rdi") to.0 => _,
                options(nostack, preserves_flags)),
            2 => asm!("rep stosw", inout("rcx") count => _, in("rax") value, inout("rdi") to.0 => _,
                options(nostack, preserves_flags)),
            4 => asm!("rep stosd", inout("rcx") count => _, in("rax") value, inout("rdi") to.0 => _,
                options(nostack, preserves_flags)),
            _ => asm!("rep stosq", inout("rcx") count => _, in("rax") value, inout("rdi") to.0 => _,
                options(nostack, preserves_flags)),
        }
    }
}

/// A full memory barrier.
#[inline]
pub(crate) fn fence() {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}
