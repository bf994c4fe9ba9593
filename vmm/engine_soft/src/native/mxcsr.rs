//! MXCSR of the guest, which may live in the host's MXCSR.
//!
//! While the guest's control bits are the ones that compiled code expects (all exceptions masked, round to
//! nearest, denormals kept), the guest's value stays in the host's register from one floating-point instruction
//! to the next and its exception flags gather there; [`Mxcsr::settle`] fetches them. With other control bits the
//! register is set and put back around each instruction. The engine itself does no floating-point arithmetic, and
//! settles before it calls code that might.
#![expect(unsafe_code, reason = "reads and sets the host's MXCSR")]

use std::arch::asm;

use crate::fpu::{MXCSR_MASK, MXCSR_RESET};

/// Exception flags.
const FLAGS: u32 = 0x3f;

/// The guest's register.
#[derive(Debug)]
pub(crate) struct Mxcsr {
    /// Its value; when `resident`, without the flags raised since.
    value: u32,
    resident: bool,
}

impl Mxcsr {
    pub(crate) fn new(value: u32) -> Mxcsr {
        Mxcsr { value: value & MXCSR_MASK, resident: false }
    }

    /// The value that the guest sees.
    #[inline]
    pub(crate) fn get(&self) -> u32 {
        if self.resident { self.value | host() & FLAGS } else { self.value }
    }

    /// Replaces it. Bits that do not exist are dropped; who sets them has been told before.
    pub(crate) fn set(&mut self, value: u32) {
        *self = Mxcsr::new(value);
    }

    /// Takes the value out of the host's register.
    #[inline(always)]
    pub(crate) fn settle(&mut self) {
        if self.resident {
            self.set(self.get());
        }
    }

    /// True when an instruction that depends on MXCSR may run as it is.
    #[inline(always)]
    pub(crate) fn resident(&self) -> bool {
        self.resident
    }

    /// True when the guest has an exception unmasked.
    pub(crate) fn unmasked(&self) -> bool {
        self.value & MXCSR_RESET != MXCSR_RESET
    }

    /// Makes the host's register the guest's and runs `instruction`, which must be host code that does what
    /// the guest's instruction does and nothing else. All exceptions are masked meanwhile.
    pub(crate) fn around(&mut self, instruction: impl FnOnce()) {
        self.settle();
        set_host(self.value | MXCSR_RESET);
        instruction();
        if self.value & !FLAGS == MXCSR_RESET {
            self.resident = true;
        } else {
            self.value |= host() & FLAGS;
            set_host(MXCSR_RESET);
        }
    }
}

#[inline(always)]
fn host() -> u32 {
    let mut value = 0u32;
    // SAFETY: STMXCSR writes four bytes.
    unsafe { asm!("stmxcsr [{p}]", p = in(reg) &raw mut value, options(nostack, preserves_flags)) }
    value
}

#[inline(always)]
fn set_host(value: u32) {
    // SAFETY: the value has no reserved bit and all exceptions masked; control bits that compiled code does not
    // expect are put back by `around` before any such code can do floating-point arithmetic.
    unsafe {
        asm!("ldmxcsr [{p}]", p = in(reg) &raw const value, options(nostack, preserves_flags, readonly));
    }
}
