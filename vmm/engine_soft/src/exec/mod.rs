//! What the operations do, one file a topic.
//!
//! Each topic has a `select`, which the decoder asks in turn for the handler of an instruction, and the handlers.

pub(crate) mod alu;
pub(crate) mod atomic;
pub(crate) mod avx;
pub(crate) mod bits;
pub(crate) mod branch;
pub(crate) mod far;
pub(crate) mod flags;
pub(crate) mod fused;
pub(crate) mod hypercall;
pub(crate) mod io;
pub(crate) mod mov;
pub(crate) mod muldiv;
pub(crate) mod segment;
pub(crate) mod shift;
pub(crate) mod simd;
pub(crate) mod simd_move;
pub(crate) mod simd_state;
pub(crate) mod stack;
pub(crate) mod string;
pub(crate) mod system;
pub(crate) mod vex_integer;
pub(crate) mod x87;
pub(crate) mod x87_state;
pub(crate) mod xsave;

use iced_x86::Instruction;

use crate::cpu::Cpu;
use crate::decode::Mode;
use crate::decode::lower::Selected;
use crate::decode::op::{Op, Step};
use crate::fault::vector;

/// Handlers of the general-purpose instructions.
pub(crate) fn integer_select(instruction: &Instruction, op: &mut Op, mode: Mode) -> Option<Selected> {
    alu::select(instruction, op)
        .or_else(|| mov::select(instruction, op, mode))
        .or_else(|| branch::select(instruction, op, mode))
        .or_else(|| stack::select(instruction, op, mode))
        .or_else(|| shift::select(instruction, op))
        .or_else(|| bits::select(instruction, op))
        .or_else(|| muldiv::select(instruction, op))
        .or_else(|| atomic::select(instruction, op))
        .or_else(|| string::select(instruction, op, mode))
        .or_else(|| flags::select(instruction, op))
}

/// Handlers of everything else: system instructions, segments, port I/O, SIMD and x87.
pub(crate) fn select_other(instruction: &Instruction, op: &mut Op, mode: Mode) -> Option<Selected> {
    system::select(instruction, op, mode)
        .or_else(|| hypercall::select(instruction))
        .or_else(|| far::select(instruction, op, mode))
        .or_else(|| segment::select(instruction, op, mode))
        .or_else(|| io::select(instruction, op, mode))
        .or_else(|| simd::select(instruction, op, mode))
        .or_else(|| x87::select(instruction, op))
}

/// #UD.
pub(crate) fn undefined(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.raise_ud()
}

/// An instruction longer than 15 bytes: #GP(0).
pub(crate) fn too_long(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.raise_with(vector::GP, 0)
}

/// Picks the instance of a generic handler for an operand size in bytes.
macro_rules! by_size {
    ($size:expr, $handler:ident $(:: < $($arg:ty),* >)?) => {
        match $size {
            1 => $handler::<$($($arg,)*)? u8> as crate::decode::op::Exec,
            2 => $handler::<$($($arg,)*)? u16>,
            4 => $handler::<$($($arg,)*)? u32>,
            _ => $handler::<$($($arg,)*)? u64>,
        }
    };
}
pub(crate) use by_size;
