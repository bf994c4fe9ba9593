//! One decoded instruction to one operation: where its operands are, and which topic has its handler.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::Mode;
use super::op::{
    ADDR_16, ADDR_32, ADDR_FLAT, ADDR_SEGMENTED, ADDR_SIZE_MASK, Exec, Op, REG_BLOCK, REG_ZERO, SEG_FLAT,
    SEG_FLAT_STACK,
};
use crate::cpu::{Cpu, DS, ES, FS, GS, SS};
use crate::cpuid::FeatureRules as _;
use crate::exec;

/// An operation, and whether the block ends with it.
pub(crate) struct Lowered {
    pub op: Op,
    pub ends: bool,
}

/// A topic's answer: the handler, and whether the block ends with it.
pub(crate) struct Selected {
    pub exec: Exec,
    pub ends: bool,
}

impl Selected {
    /// An operation in the middle of a block.
    pub(crate) fn go_on(exec: Exec) -> Option<Selected> {
        Some(Selected { exec, ends: false })
    }

    /// An operation after which the block is over.
    pub(crate) fn end(exec: Exec) -> Option<Selected> {
        Some(Selected { exec, ends: true })
    }
}

/// Lowers one instruction. `raw` are the bytes from its start on.
pub(crate) fn lower(cpu: &Cpu, instruction: &Instruction, raw: &[u8], mode: Mode) -> Lowered {
    let mut op = blank(exec::undefined);
    if instruction.code() == Code::INVALID {
        if too_long(raw, mode) {
            op.exec = exec::too_long;
        }
        return Lowered { op, ends: true };
    }
    set_operands(&mut op, instruction, mode);
    if !cpu.features.allows(instruction) {
        return Lowered { op, ends: true };
    }
    let selected = exec::integer_select(instruction, &mut op, mode)
        .or_else(|| exec::select_other(instruction, &mut op, mode));
    match selected {
        Some(selected) => {
            op.exec = selected.exec;
            Lowered { op, ends: selected.ends }
        }
        None => Lowered { op, ends: true },
    }
}

/// An instruction of more than 15 bytes is #GP, not #UD: nothing but prefixes in the first 15.
fn too_long(raw: &[u8], mode: Mode) -> bool {
    let prefix = |byte: &u8| {
        matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3)
            || (mode == Mode::Bits64 && byte & 0xf0 == 0x40)
    };
    raw.len() >= 15 && raw.iter().take(14).all(prefix)
}

/// An operation without operands.
pub(crate) fn blank(exec: Exec) -> Op {
    Op {
        exec,
        imm: 0,
        disp: 0,
        reg: 0,
        rm: 0,
        base: REG_ZERO,
        index: REG_ZERO,
        scale: 0,
        seg: SEG_FLAT,
        len: 0,
        addr: ADDR_FLAT,
        pc: 0,
        aux: 0,
    }
}

/// Slot of a general register; bit 7 marks AH, CH, DH and BH.
pub(crate) fn slot(register: Register) -> u8 {
    match register {
        Register::AH => 0x80,
        Register::CH => 0x81,
        Register::DH => 0x82,
        Register::BH => 0x83,
        other => other.full_register().number() as u8 & 0xf,
    }
}

/// Index of a segment register in [`Cpu::seg`].
pub(crate) fn segment_index(register: Register) -> usize {
    match register {
        Register::ES => ES,
        Register::CS => crate::cpu::CS,
        Register::SS => SS,
        Register::FS => FS,
        Register::GS => GS,
        _ => DS,
    }
}

/// Segment slot of an address in this mode.
pub(crate) fn segment_slot(register: Register, mode: Mode) -> u8 {
    match (mode, register) {
        (Mode::Bits64, Register::FS) => FS as u8,
        (Mode::Bits64, Register::GS) => GS as u8,
        (Mode::Bits64, _) => SEG_FLAT,
        _ => segment_index(register) as u8,
    }
}

/// Fills in the memory operand, the first two register operands and the immediate.
fn set_operands(op: &mut Op, instruction: &Instruction, mode: Mode) {
    let mut registers = 0;
    for operand in 0..instruction.op_count() {
        match instruction.op_kind(operand) {
            OpKind::Register => {
                let number = slot(instruction.op_register(operand));
                if registers == 0 {
                    op.reg = number;
                } else if registers == 1 {
                    op.rm = number;
                }
                registers += 1;
            }
            OpKind::Memory => set_memory(op, instruction, mode),
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                op.imm = instruction.near_branch_target();
            }
            OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => {
                // ENTER and EXTRQ have two: the first is the wide one.
                let value = instruction.immediate(operand);
                if instruction.op_kind(operand) == OpKind::Immediate8_2nd {
                    op.aux = value as u16;
                } else {
                    op.imm = value;
                }
            }
            _ => {}
        }
    }
}

fn set_memory(op: &mut Op, instruction: &Instruction, mode: Mode) {
    let (base, index) = (instruction.memory_base(), instruction.memory_index());
    op.base = match base {
        Register::None => REG_ZERO,
        Register::RIP | Register::EIP => REG_BLOCK,
        register => slot(register),
    };
    op.index = if index == Register::None { REG_ZERO } else { slot(index) };
    op.scale = instruction.memory_index_scale().trailing_zeros() as u8;
    let displacement = instruction.memory_displacement64();
    op.disp = displacement as i32;
    let size = match (base, index) {
        (Register::None, Register::None) => instruction.memory_displ_size() as usize,
        (Register::None, register) | (register, _) => register.size(),
    };
    // A 64-bit absolute address (MOV with moffs) does not fit the displacement: the immediate holds it.
    if base == Register::None && index == Register::None && size == 8 && op.disp as i64 as u64 != displacement
    {
        op.aux = 1;
        op.imm = displacement;
    }
    op.seg = segment_slot(instruction.memory_segment(), mode);
    let by_stack = matches!(base.full_register(), Register::RSP | Register::RBP);
    if op.seg == SEG_FLAT && by_stack {
        // In 64-bit mode prefixes for the other segments count for nothing (Intel SDM volume 1, 3.3.4).
        op.seg = SEG_FLAT_STACK;
    }
    op.addr = address_kind(size, mode);
}

/// The `ADDR_` bits for an address size of 2, 4 or 8 bytes.
pub(crate) fn address_kind(size: usize, mode: Mode) -> u8 {
    let size = match size {
        2 => ADDR_16,
        4 => ADDR_32,
        _ => ADDR_SIZE_MASK,
    };
    match (mode, size) {
        (Mode::Bits64, ADDR_SIZE_MASK) => ADDR_FLAT,
        (Mode::Bits64, size) => size,
        (_, size) => size | ADDR_SEGMENTED,
    }
}
