//! One decoded instruction to one operation: which handler, and where its operands are.

use iced_x86::Instruction;

use super::Mode;
use super::op::{Op, REG_ZERO};
use crate::cpu::Cpu;
use crate::exec;

/// An operation, and whether the block ends with it.
pub(crate) struct Lowered {
    pub op: Op,
    pub ends: bool,
}

/// Lowers one instruction. `raw` are the bytes from its start on.
pub(crate) fn lower(_cpu: &Cpu, _instruction: &Instruction, _raw: &[u8], _mode: Mode) -> Lowered {
    Lowered { op: blank(exec::undefined), ends: true }
}

/// An operation without operands.
pub(crate) fn blank(exec: super::op::Exec) -> Op {
    Op {
        exec,
        imm: 0,
        disp: 0,
        reg: 0,
        rm: 0,
        base: REG_ZERO,
        index: REG_ZERO,
        scale: 0,
        seg: 0,
        len: 0,
        addr: 0,
        pc: 0,
        aux: 0,
    }
}
