//! A comparison and the conditional branch behind it in one operation.
//!
//! The branch keeps its own operation behind the fused one, which does the comparison and takes the branch where it is
//! taken; where it is not, or cannot be (an address that is not canonical), the branch's own operation comes next and finds
//! the same flags. So nothing but time depends on it. 64-bit code only.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::alu::{self, Binary, Unary, operand_size};
use super::branch::is_canonical;
use super::flags::{Condition, with_condition};
use crate::cpu::Cpu;
use crate::decode::op::{Exec, Op, REG_BLOCK, Step, Stop};
use crate::native::mem::Word;

/// Takes the branch at `offset` from the block's start if it is to be taken.
#[inline(always)]
fn branch_if<C: Condition>(cpu: &mut Cpu, offset: i32) -> Step {
    if C::holds(cpu.flags) {
        let target = cpu.regs[REG_BLOCK as usize].wrapping_add_signed(i64::from(offset));
        // Who runs alone ends with the comparison.
        if is_canonical(target) && !cpu.alone {
            cpu.rip = target;
            // Two instructions, one operation.
            cpu.budget -= 1;
            return Err(Stop::Block);
        }
    }
    Ok(())
}

fn compare_reg_reg<O: Binary, C: Condition, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.flags = O::apply::<W>(cpu.reg(op.reg), cpu.reg(op.rm), cpu.flags).1;
    branch_if::<C>(cpu, op.disp)
}

fn compare_reg_imm<O: Binary, C: Condition, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.flags = O::apply(cpu.reg(op.reg), W::from_u64(op.imm), cpu.flags).1;
    branch_if::<C>(cpu, op.disp)
}

fn change_reg_imm<O: Binary, C: Condition, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let (result, flags) = O::apply(cpu.reg(op.reg), W::from_u64(op.imm), cpu.flags);
    cpu.flags = flags;
    cpu.set_reg(op.reg, result);
    branch_if::<C>(cpu, op.disp)
}

fn change_reg<O: Unary, C: Condition, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let (result, flags) = O::apply::<W>(cpu.reg(op.reg), cpu.flags);
    cpu.flags = flags;
    cpu.set_reg(op.reg, result);
    branch_if::<C>(cpu, op.disp)
}

/// The immediate in the lower half, the branch in the upper one.
fn compare_mem_imm<O: Binary, C: Condition, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.with_operand::<W>(op, |cpu, op, a| {
        let immediate = W::from_u64(i64::from(op.imm as i32) as u64);
        cpu.flags = O::apply(a, immediate, cpu.flags).1;
        branch_if::<C>(cpu, (op.imm >> 32) as i32)
    })
}

fn compare_reg_mem<O: Binary, C: Condition, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.with_operand::<W>(op, |cpu, op, b| {
        cpu.flags = O::apply(cpu.reg(op.reg), b, cpu.flags).1;
        branch_if::<C>(cpu, op.imm as i32)
    })
}

fn compare_mem_reg<O: Binary, C: Condition, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.with_operand::<W>(op, |cpu, op, a| {
        cpu.flags = O::apply(a, cpu.reg(op.reg), cpu.flags).1;
        branch_if::<C>(cpu, op.imm as i32)
    })
}

/// Picks by size; words are rare.
macro_rules! by_common_size {
    ($size:expr, $handler:ident :: < $($arg:ty),* >) => {
        match $size {
            1 => Some($handler::<$($arg,)* u8> as Exec),
            4 => Some($handler::<$($arg,)* u32> as Exec),
            8 => Some($handler::<$($arg,)* u64> as Exec),
            _ => None,
        }
    };
}

fn pick_compare<C: Condition, O: Binary>(first: &Instruction) -> Option<Exec> {
    let size = operand_size(first, 0);
    match (first.op0_kind(), first.op1_kind()) {
        (OpKind::Register, OpKind::Register) => by_common_size!(size, compare_reg_reg::<O, C>),
        (OpKind::Register, OpKind::Memory) => by_common_size!(size, compare_reg_mem::<O, C>),
        (OpKind::Memory, OpKind::Register) => by_common_size!(size, compare_mem_reg::<O, C>),
        (OpKind::Memory, _) => by_common_size!(size, compare_mem_imm::<O, C>),
        (OpKind::Register, _) => by_common_size!(size, compare_reg_imm::<O, C>),
        _ => None,
    }
}

fn pick_change<C: Condition, O: Binary>(first: &Instruction) -> Option<Exec> {
    let immediate = !matches!(first.op1_kind(), OpKind::Register | OpKind::Memory);
    if first.op0_kind() != OpKind::Register || !immediate {
        return None;
    }
    by_common_size!(operand_size(first, 0), change_reg_imm::<O, C>)
}

fn pick_step<C: Condition, O: Unary>(first: &Instruction) -> Option<Exec> {
    if first.op0_kind() != OpKind::Register {
        return None;
    }
    by_common_size!(operand_size(first, 0), change_reg::<O, C>)
}

fn pick<C: Condition>(first: &Instruction) -> Option<Exec> {
    match first.mnemonic() {
        Mnemonic::Cmp => pick_compare::<C, alu::Sub>(first),
        Mnemonic::Test => pick_compare::<C, alu::And>(first),
        Mnemonic::Sub => pick_change::<C, alu::Sub>(first),
        Mnemonic::Add => pick_change::<C, alu::Add>(first),
        Mnemonic::And => pick_change::<C, alu::And>(first),
        Mnemonic::Dec => pick_step::<C, alu::Dec>(first),
        Mnemonic::Inc => pick_step::<C, alu::Inc>(first),
        _ => None,
    }
}

/// Makes the operation of `first` one that takes the branch of `second`, which follows it, if there is such a one.
pub(crate) fn fuse(op: &mut Op, first: &Instruction, second: &Instruction) {
    if !second.is_jcc_short_or_near() || second.op0_kind() != OpKind::NearBranch64 {
        return;
    }
    let Ok(offset) = i32::try_from(second.near_branch_target() as i64) else { return };
    let Some(exec) = with_condition!(second, pick(first)).flatten() else { return };
    let memory = (0..2).any(|operand| first.op_kind(operand) == OpKind::Memory);
    if !memory {
        op.disp = offset;
    } else if first.op0_kind() == OpKind::Memory && first.op1_kind() != OpKind::Register {
        if i64::from(op.imm as i32) as u64 != op.imm && op.imm >> 32 != 0 {
            return;
        }
        op.imm = op.imm & 0xffff_ffff | u64::from(offset as u32) << 32;
    } else {
        op.imm = u64::from(offset as u32);
    }
    op.exec = exec;
}
