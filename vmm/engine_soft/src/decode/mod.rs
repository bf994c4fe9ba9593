//! From guest bytes to decoded operations.
//!
//! [`block`] decodes straight-line pieces of code that do not leave their page, [`lower`] turns one instruction
//! into an [`op::Op`] with its handler. The instruction formats themselves are iced-x86's business.

pub(crate) mod block;
pub(crate) mod lower;
pub(crate) mod op;

use crate::cpu::{CS, Cpu};

/// Default operand and address size of the code segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
#[repr(u8)]
pub(crate) enum Mode {
    #[default]
    Bits16 = 0,
    Bits32 = 1,
    Bits64 = 2,
}

impl Mode {
    /// The mode that a processor's code segment gives.
    pub(crate) fn of(cpu: &Cpu) -> Mode {
        if cpu.code64() {
            Mode::Bits64
        } else if cpu.seg[CS].db {
            Mode::Bits32
        } else {
            Mode::Bits16
        }
    }

    pub(crate) fn bits(self) -> u32 {
        16 << self as u32
    }
}
