//! Accesses to guest memory of 16 and 32 bytes, by one instruction like those of [`super::mem`].
#![expect(unsafe_code, reason = "reads and writes guest memory through host addresses")]

use std::arch::asm;

use super::mem::HostPtr;

/// Loads 16 bytes.
#[inline(always)]
pub(crate) fn load_16(ptr: HostPtr) -> [u64; 2] {
    let mut value = [0u64; 2];
    // SAFETY: a HostPtr lies in mapped guest memory for the width of the access.
    unsafe {
        asm!("movups {x}, [{p}]", "movups [{v}], {x}", x = out(xmm_reg) _, p = in(reg) ptr.addr(),
            v = in(reg) value.as_mut_ptr(), options(nostack, preserves_flags));
    }
    value
}

/// Stores 16 bytes.
#[inline(always)]
pub(crate) fn store_16(ptr: HostPtr, value: &[u64; 2]) {
    // SAFETY: as for load_16; the page is mapped writable on the host.
    unsafe {
        asm!("movups {x}, [{v}]", "movups [{p}], {x}", x = out(xmm_reg) _, p = in(reg) ptr.addr(),
            v = in(reg) value.as_ptr(), options(nostack, preserves_flags));
    }
}

/// Loads 32 bytes, in two halves.
#[inline(always)]
pub(crate) fn load_32(ptr: HostPtr) -> [u64; 4] {
    let mut value = [0u64; 4];
    // SAFETY: a HostPtr lies in mapped guest memory for the width of the access.
    unsafe {
        asm!("movups {x}, [{p}]", "movups {y}, [{p} + 16]", "movups [{v}], {x}", "movups [{v} + 16], {y}",
            x = out(xmm_reg) _, y = out(xmm_reg) _, p = in(reg) ptr.addr(), v = in(reg) value.as_mut_ptr(),
            options(nostack, preserves_flags));
    }
    value
}

/// Stores 32 bytes, in two halves.
#[inline(always)]
pub(crate) fn store_32(ptr: HostPtr, value: &[u64; 4]) {
    // SAFETY: as for load_32; the page is mapped writable on the host.
    unsafe {
        asm!("movups {x}, [{v}]", "movups {y}, [{v} + 16]", "movups [{p}], {x}", "movups [{p} + 16], {y}",
            x = out(xmm_reg) _, y = out(xmm_reg) _, p = in(reg) ptr.addr(), v = in(reg) value.as_ptr(),
            options(nostack, preserves_flags));
    }
}
