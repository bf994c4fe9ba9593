//! x87, MMX, SSE and AVX registers, and what CR0, CR4 and XCR0 allow of them.
//!
//! - [`x87`]: the x87 unit's state, which lives in the host's own unit while the guest computes with it.
//! - [`area`]: the memory images of FXSAVE and XSAVE, and the one of snapshots.
//!
//! The instructions are in [`crate::exec::simd`] and [`crate::exec::x87`].

pub(crate) mod area;
pub(crate) mod x87;

use crate::cpu::{Cpu, cr0, cr4};
use crate::decode::op::{Step, Stop};
use crate::fault::vector;
use crate::native::mxcsr::Mxcsr;
use crate::native::thunk::Implicit;
use x87::X87;

/// MXCSR after RESET: all exceptions masked, round to nearest.
pub(crate) const MXCSR_RESET: u32 = 0x1f80;
/// The bits of MXCSR that exist; setting others is #GP. Also what FXSAVE reports as MXCSR_MASK.
pub(crate) const MXCSR_MASK: u32 = 0xffff;

/// Register state.
#[repr(C, align(64))]
pub(crate) struct Fpu {
    /// YMM registers (XMM in the lower half).
    pub ymm: [[u64; 4]; 16],
    /// A memory operand that cannot be used where it lies.
    pub scratch: [u8; 64],
    /// Implicit operands and results of an instruction.
    pub implicit: Implicit,
    pub mxcsr: Mxcsr,
    /// What may be executed now; see [`Cpu::fpu_mode_changed`].
    pub usable: Usable,
    pub x87: X87,
}

/// Which register sets the control registers leave usable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usable {
    pub x87: bool,
    pub mmx: bool,
    pub sse: bool,
    pub avx: bool,
}

impl Default for Fpu {
    fn default() -> Fpu {
        Fpu {
            ymm: [[0; 4]; 16],
            scratch: [0; 64],
            implicit: Implicit::default(),
            mxcsr: Mxcsr::new(MXCSR_RESET),
            usable: Usable::default(),
            x87: X87::default(),
        }
    }
}

impl Fpu {
    /// Takes the x87 state and MXCSR out of the host's registers. To be called before other code may use those
    /// and before the vCPU may continue on another thread.
    #[inline(always)]
    pub(crate) fn settle(&mut self) {
        self.x87.settle();
        self.mxcsr.settle();
    }

    /// The lower half of a register.
    #[inline(always)]
    pub(crate) fn xmm(&self, slot: u8) -> [u64; 2] {
        let [low, high, ..] = self.ymm[usize::from(slot & 15)];
        [low, high]
    }

    /// Writes the lower half of a register, as the instructions without VEX prefix do.
    #[inline(always)]
    pub(crate) fn set_xmm(&mut self, slot: u8, value: [u64; 2]) {
        let register = &mut self.ymm[usize::from(slot & 15)];
        register[0] = value[0];
        register[1] = value[1];
    }
}

impl Cpu {
    /// Recomputes which registers are usable. To be called whenever CR0, CR4, XCR0, CS or RFLAGS.VM changed.
    pub(crate) fn fpu_mode_changed(&mut self) {
        let (cr0, cr4) = (self.cr0, self.cr4);
        let available = cr0 & (cr0::EM | cr0::TS) == 0;
        let vex = cr0 & cr0::PE != 0 && !self.v86();
        self.fpu.usable = Usable {
            x87: available,
            mmx: available,
            sse: available && cr4 & cr4::OSFXSR != 0,
            avx: cr0 & cr0::TS == 0 && cr4 & cr4::OSXSAVE != 0 && self.xcr0 & 6 == 6 && vex,
        };
    }

    /// Why an x87 instruction may not run.
    #[cold]
    pub(crate) fn deny_x87<T>(&mut self) -> Result<T, Stop> {
        self.raise(vector::NM)
    }

    /// Why an MMX instruction may not run.
    #[cold]
    pub(crate) fn deny_mmx<T>(&mut self) -> Result<T, Stop> {
        if self.cr0 & cr0::EM != 0 { self.raise_ud() } else { self.raise(vector::NM) }
    }

    /// Why an SSE instruction may not run (Intel SDM volume 3, table 14-1).
    #[cold]
    pub(crate) fn deny_sse<T>(&mut self) -> Result<T, Stop> {
        if self.cr0 & cr0::EM != 0 || self.cr4 & cr4::OSFXSR == 0 {
            self.raise_ud()
        } else {
            self.raise(vector::NM)
        }
    }

    /// Why an AVX instruction may not run.
    #[cold]
    pub(crate) fn deny_avx<T>(&mut self) -> Result<T, Stop> {
        let vex = !self.real_mode() && !self.v86();
        if !vex || self.cr4 & cr4::OSXSAVE == 0 || self.xcr0 & 6 != 6 {
            self.raise_ud()
        } else {
            self.raise(vector::NM)
        }
    }

    /// Checks before every SSE instruction.
    #[inline(always)]
    pub(crate) fn sse_check(&mut self) -> Step {
        if self.fpu.usable.sse { Ok(()) } else { self.deny_sse() }
    }

    /// Checks before every MMX instruction, x87 exceptions that wait included.
    #[inline(always)]
    pub(crate) fn mmx_check(&mut self) -> Step {
        if !self.fpu.usable.mmx {
            return self.deny_mmx();
        }
        if self.fpu.x87.pending { self.raise(vector::MF) } else { Ok(()) }
    }
}
