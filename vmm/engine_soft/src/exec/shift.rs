//! Shifts and rotates, single and double.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::alu::operand_size;
use super::by_size;
use crate::cpu::{Cpu, RCX};
use crate::decode::lower::Selected;
use crate::decode::op::{Exec, Op, Step};
use crate::mmu::Intent;
use crate::native::alu::{self, Arith, Flags};
use crate::native::mem::Word;

trait Shift {
    /// The count is masked and not zero.
    fn apply<W: Word>(a: W, count: u8, f: Flags) -> (W, Flags);
}

macro_rules! shifts {
    ($($name:ident $method:ident;)*) => {$(
        struct $name;
        impl Shift for $name {
            #[inline(always)]
            fn apply<W: Word>(a: W, count: u8, f: Flags) -> (W, Flags) {
                Arith::$method(a, count, f)
            }
        }
    )*};
}

shifts! {
    Shl shl;
    Shr shr;
    Sar sar;
    Rol rol;
    Ror ror;
    Rcl rcl;
    Rcr rcr;
}

/// Where the count is: an immediate or CL.
trait Count {
    fn get(cpu: &Cpu, op: &Op) -> u8;
}
struct Immediate;
struct InCl;
impl Count for Immediate {
    #[inline(always)]
    fn get(_cpu: &Cpu, op: &Op) -> u8 {
        op.imm as u8
    }
}
impl Count for InCl {
    #[inline(always)]
    fn get(cpu: &Cpu, _op: &Op) -> u8 {
        cpu.regs[RCX] as u8
    }
}

#[inline(always)]
fn masked<W: Word>(count: u8) -> u8 {
    count & if W::SIZE == 8 { 63 } else { 31 }
}

fn shift_reg<S: Shift, C: Count, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let count = masked::<W>(C::get(cpu, op));
    let value = cpu.reg::<W>(op.reg);
    if count == 0 {
        // A 32-bit shift by nothing still clears the upper half.
        cpu.set_reg(op.reg, value);
        return Ok(());
    }
    let (r, f) = S::apply(value, count, cpu.flags);
    cpu.flags = f;
    cpu.set_reg(op.reg, r);
    Ok(())
}

fn shift_mem<S: Shift, C: Count, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let count = masked::<W>(C::get(cpu, op));
    let va = cpu.addr(op, W::SIZE as u64, Intent::Write)?;
    let mut flags = cpu.flags;
    cpu.modify::<W>(va, |cpu, value| {
        if count == 0 {
            return Ok(value);
        }
        let (r, f) = S::apply(value, count, cpu.flags);
        flags = f;
        Ok(r)
    })?;
    cpu.flags = flags;
    Ok(())
}

fn pick_count<S: Shift, C: Count>(instruction: &Instruction) -> Exec {
    let size = operand_size(instruction, 0);
    if instruction.op0_kind() == OpKind::Memory {
        by_size!(size, shift_mem::<S, C>)
    } else {
        by_size!(size, shift_reg::<S, C>)
    }
}

fn pick<S: Shift>(instruction: &Instruction) -> Exec {
    if instruction.op1_kind() == OpKind::Register {
        pick_count::<S, InCl>(instruction)
    } else {
        pick_count::<S, Immediate>(instruction)
    }
}

/// SHLD and SHRD. The flags of a 16-bit shift by more than 16 are undefined, its result too.
fn double<const RIGHT: bool, W: Word>(a: W, b: W, count: u8, f: Flags) -> (W, Flags) {
    let (a, b) = (a.to_u64(), b.to_u64());
    let (r, f) = match (W::SIZE, RIGHT) {
        (2, false) => widen(alu::shld16(a as u16, b as u16, count, f)),
        (2, true) => widen(alu::shrd16(a as u16, b as u16, count, f)),
        (4, false) => widen(alu::shld32(a as u32, b as u32, count, f)),
        (4, true) => widen(alu::shrd32(a as u32, b as u32, count, f)),
        (_, false) => alu::shld64(a, b, count, f),
        (_, true) => alu::shrd64(a, b, count, f),
    };
    (W::from_u64(r), f)
}

fn widen<W: Word>((r, f): (W, Flags)) -> (u64, Flags) {
    (r.to_u64(), f)
}

fn double_reg<const RIGHT: bool, C: Count, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let count = masked::<W>(C::get(cpu, op));
    let value = cpu.reg::<W>(op.reg);
    if count == 0 {
        cpu.set_reg(op.reg, value);
        return Ok(());
    }
    let (r, f) = double::<RIGHT, W>(value, cpu.reg(op.rm), count, cpu.flags);
    cpu.flags = f;
    cpu.set_reg(op.reg, r);
    Ok(())
}

fn double_mem<const RIGHT: bool, C: Count, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let count = masked::<W>(C::get(cpu, op));
    let source = cpu.reg::<W>(op.reg);
    let va = cpu.addr(op, W::SIZE as u64, Intent::Write)?;
    let mut flags = cpu.flags;
    cpu.modify::<W>(va, |cpu, value| {
        if count == 0 {
            return Ok(value);
        }
        let (r, f) = double::<RIGHT, W>(value, source, count, cpu.flags);
        flags = f;
        Ok(r)
    })?;
    cpu.flags = flags;
    Ok(())
}

fn pick_double<const RIGHT: bool>(instruction: &Instruction) -> Exec {
    let by_cl = instruction.op2_kind() == OpKind::Register && instruction.op2_register() == Register::CL;
    let memory = instruction.op0_kind() == OpKind::Memory;
    match (operand_size(instruction, 0), memory, by_cl) {
        (2, false, false) => double_reg::<RIGHT, Immediate, u16>,
        (2, false, true) => double_reg::<RIGHT, InCl, u16>,
        (2, true, false) => double_mem::<RIGHT, Immediate, u16>,
        (2, true, true) => double_mem::<RIGHT, InCl, u16>,
        (4, false, false) => double_reg::<RIGHT, Immediate, u32>,
        (4, false, true) => double_reg::<RIGHT, InCl, u32>,
        (4, true, false) => double_mem::<RIGHT, Immediate, u32>,
        (4, true, true) => double_mem::<RIGHT, InCl, u32>,
        (_, false, false) => double_reg::<RIGHT, Immediate, u64>,
        (_, false, true) => double_reg::<RIGHT, InCl, u64>,
        (_, true, false) => double_mem::<RIGHT, Immediate, u64>,
        (_, true, true) => double_mem::<RIGHT, InCl, u64>,
    }
}

pub(crate) fn select(instruction: &Instruction, _op: &mut Op) -> Option<Selected> {
    let exec = match instruction.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => pick::<Shl>(instruction),
        Mnemonic::Shr => pick::<Shr>(instruction),
        Mnemonic::Sar => pick::<Sar>(instruction),
        Mnemonic::Rol => pick::<Rol>(instruction),
        Mnemonic::Ror => pick::<Ror>(instruction),
        Mnemonic::Rcl => pick::<Rcl>(instruction),
        Mnemonic::Rcr => pick::<Rcr>(instruction),
        Mnemonic::Shld => pick_double::<false>(instruction),
        Mnemonic::Shrd => pick_double::<true>(instruction),
        _ => return None,
    };
    Selected::go_on(exec)
}
