//! The host's x87 unit, lent to the guest between [`load`] and [`save`].
//!
//! Only instructions that do not wait run while a guest exception may be pending, so the host never takes #MF.
#![expect(unsafe_code, reason = "loads and stores the host's x87 state")]

use std::arch::asm;

/// What FNSAVE writes and FRSTOR reads with a 32-bit operand size (Intel SDM volume 1, figure 8-9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(16))]
pub(crate) struct Image(pub(crate) [u8; 112]);

/// Gives the host's x87 unit the guest's state. The unit must be in its initial state.
#[inline(never)]
pub(crate) fn load(image: &Image) {
    // SAFETY: FRSTOR reads 108 bytes. Compiled code keeps nothing in the x87 unit; `save` puts its initial state
    // back before anything else uses it.
    unsafe {
        asm!("frstor [{p}]", p = in(reg) image.0.as_ptr(), out("st(0)") _, out("st(1)") _, out("st(2)") _,
            out("st(3)") _, out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            options(nostack, preserves_flags, readonly));
    }
}

/// Takes the guest's state out of the unit, which is in its initial state afterwards.
#[inline(never)]
pub(crate) fn save(image: &mut Image) {
    // SAFETY: FNSAVE writes 108 bytes and initialises the unit.
    unsafe {
        asm!("fnsave [{p}]", p = in(reg) image.0.as_mut_ptr(), options(nostack, preserves_flags));
    }
}

/// The control word in the unit.
#[inline]
pub(crate) fn control_word() -> u16 {
    let mut word = 0u16;
    // SAFETY: FNSTCW writes two bytes and does not wait.
    unsafe {
        asm!("fnstcw [{p}]", p = in(reg) &raw mut word, options(nostack, preserves_flags));
    }
    word
}

/// The status word in the unit.
#[inline]
pub(crate) fn status_word() -> u16 {
    let word: u16;
    // SAFETY: FNSTSW does not wait.
    unsafe {
        asm!("fnstsw ax", out("ax") word, options(nostack, preserves_flags, nomem));
    }
    word
}
