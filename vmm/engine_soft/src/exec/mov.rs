//! Data movement between registers and memory: MOV, extensions, LEA, XCHG, BSWAP, CMOVcc, SETcc, sign
//! conversions, XLAT, MOVBE, and instructions that do nothing.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::alu::operand_size;
use super::by_size;
use super::flags::{Condition, with_condition};
use crate::cpu::{Cpu, RAX, RBX, RDX};
use crate::decode::Mode;
use crate::decode::lower::Selected;
use crate::decode::op::{Exec, Op, Step};
use crate::mmu::Intent;
use crate::native::mem::{self, Word};

fn reg_reg<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.reg::<W>(op.rm);
    cpu.set_reg(op.reg, value);
    Ok(())
}

fn reg_imm<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.set_reg(op.reg, W::from_u64(op.imm));
    Ok(())
}

fn reg_mem<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.with_operand::<W>(op, |cpu, op, value| {
        cpu.set_reg(op.reg, value);
        Ok(())
    })
}

fn mem_reg<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.set_operand::<W>(op, |cpu, op| cpu.reg(op.reg))
}

fn mem_imm<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.set_operand::<W>(op, |_, op| W::from_u64(op.imm))
}

/// MOV with a 64-bit absolute address.
fn reg_absolute<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let va = op.imm.wrapping_add(cpu.seg_base[(op.seg & 7) as usize]);
    let value = cpu.load::<W>(va)?;
    cpu.set_reg(op.reg, value);
    Ok(())
}

fn absolute_reg<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let va = op.imm.wrapping_add(cpu.seg_base[(op.seg & 7) as usize]);
    let value = cpu.reg::<W>(op.reg);
    cpu.store(va, value)
}

fn zero_extend_reg<F: Word, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.reg::<F>(op.rm).to_u64();
    cpu.set_reg(op.reg, W::from_u64(value));
    Ok(())
}

fn zero_extend_mem<F: Word, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.with_operand::<F>(op, |cpu, op, value| {
        cpu.set_reg(op.reg, W::from_u64(value.to_u64()));
        Ok(())
    })
}

fn sign_extend_reg<F: Word, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.reg::<F>(op.rm).to_i64() as u64;
    cpu.set_reg(op.reg, W::from_u64(value));
    Ok(())
}

fn sign_extend_mem<F: Word, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.with_operand::<F>(op, |cpu, op, value| {
        cpu.set_reg(op.reg, W::from_u64(value.to_i64() as u64));
        Ok(())
    })
}

fn lea<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.effective(op);
    cpu.set_reg(op.reg, W::from_u64(value));
    Ok(())
}

/// LEA with a 64-bit address into a 64-bit register.
fn lea_flat(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.offset(op);
    cpu.set_reg(op.reg, value);
    Ok(())
}

fn exchange_reg<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let (a, b) = (cpu.reg::<W>(op.reg), cpu.reg::<W>(op.rm));
    cpu.set_reg(op.reg, b);
    cpu.set_reg(op.rm, a);
    Ok(())
}

/// XCHG with memory locks whether or not it says so.
fn exchange_mem<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let va = cpu.addr(op, W::SIZE as u64, Intent::Write)?;
    let new = cpu.reg::<W>(op.reg);
    let old = match cpu.mmu.tlb.write::<W>(cpu.mmu.rights, va) {
        Some(ptr) => W::exchange(ptr, new),
        None => cpu.modify_locked::<W, W>(va, |old| (new, old))?,
    };
    cpu.set_reg(op.reg, old);
    Ok(())
}

fn byte_swap<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.reg::<u64>(op.reg);
    match W::SIZE {
        // The result of a 16-bit BSWAP is undefined; processors clear the word.
        2 => cpu.set_reg::<u16>(op.reg, 0),
        4 => cpu.set_reg::<u32>(op.reg, (value as u32).swap_bytes()),
        _ => cpu.set_reg::<u64>(op.reg, value.swap_bytes()),
    }
    Ok(())
}

fn reversed<W: Word>(value: W) -> W {
    W::from_u64(value.to_u64().swap_bytes() >> (64 - W::BITS))
}

fn movbe_load<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.load_op::<W>(op)?;
    cpu.set_reg(op.reg, reversed(value));
    Ok(())
}

fn movbe_store<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.reg::<W>(op.reg);
    cpu.store_op(op, reversed(value))
}

fn cmov_reg<C: Condition, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    // A 32-bit CMOV clears the upper half even when it does not move.
    let value = if C::holds(cpu.flags) { cpu.reg::<W>(op.rm) } else { cpu.reg::<W>(op.reg) };
    cpu.set_reg(op.reg, value);
    Ok(())
}

fn cmov_mem<C: Condition, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.with_operand::<W>(op, |cpu, op, loaded| {
        let value = if C::holds(cpu.flags) { loaded } else { cpu.reg::<W>(op.reg) };
        cpu.set_reg(op.reg, value);
        Ok(())
    })
}

fn set_reg<C: Condition>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = u8::from(C::holds(cpu.flags));
    cpu.set_reg(op.reg, value);
    Ok(())
}

fn set_mem<C: Condition>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.set_operand::<u8>(op, |cpu, _| u8::from(C::holds(cpu.flags)))
}

fn cbw(cpu: &mut Cpu, _op: &Op) -> Step {
    let value = cpu.regs[RAX] as i8 as u16;
    cpu.set_reg(RAX as u8, value);
    Ok(())
}

fn cwde(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.regs[RAX] = u64::from(cpu.regs[RAX] as i16 as u32);
    Ok(())
}

fn cdqe(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.regs[RAX] = cpu.regs[RAX] as i32 as u64;
    Ok(())
}

fn cwd(cpu: &mut Cpu, _op: &Op) -> Step {
    let value = ((cpu.regs[RAX] as i16) >> 15) as u16;
    cpu.set_reg(RDX as u8, value);
    Ok(())
}

fn cdq(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.regs[RDX] = u64::from(((cpu.regs[RAX] as i32) >> 31) as u32);
    Ok(())
}

fn cqo(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.regs[RDX] = ((cpu.regs[RAX] as i64) >> 63) as u64;
    Ok(())
}

fn xlat(cpu: &mut Cpu, op: &Op) -> Step {
    // The decoder describes the operand as [rBX + AL]; the index is a byte.
    let mut op = *op;
    op.base = RBX as u8;
    op.index = crate::decode::op::REG_ZERO;
    op.disp = (cpu.regs[RAX] & 0xff) as i32;
    let value = cpu.load_op::<u8>(&op)?;
    cpu.set_reg(RAX as u8, value);
    Ok(())
}

fn nop(_cpu: &mut Cpu, _op: &Op) -> Step {
    Ok(())
}

/// PAUSE: the guest spins; let another vCPU's thread have the core when there are more of them.
fn pause(cpu: &mut Cpu, op: &Op) -> Step {
    if cpu.shared.mailboxes.len() > 1 {
        cpu.spins = cpu.spins.wrapping_add(1);
        if cpu.spins.is_multiple_of(64) {
            std::thread::yield_now();
        }
    }
    cpu.end_block(op)
}

fn fence(_cpu: &mut Cpu, _op: &Op) -> Step {
    mem::fence();
    Ok(())
}

fn pick_mov(instruction: &Instruction, op: &Op) -> Option<Exec> {
    let size = operand_size(instruction, 0);
    Some(match (instruction.op0_kind(), instruction.op1_kind()) {
        (OpKind::Register, OpKind::Register) => {
            let gpr = |register: iced_x86::Register| register.is_gpr();
            if !gpr(instruction.op0_register()) || !gpr(instruction.op1_register()) {
                return None;
            }
            by_size!(size, reg_reg)
        }
        (OpKind::Register, OpKind::Memory) if instruction.op0_register().is_gpr() => {
            if op.aux == 1 {
                by_size!(size, reg_absolute)
            } else {
                by_size!(size, reg_mem)
            }
        }
        (OpKind::Memory, OpKind::Register) if instruction.op1_register().is_gpr() => {
            if op.aux == 1 {
                by_size!(size, absolute_reg)
            } else {
                by_size!(size, mem_reg)
            }
        }
        (OpKind::Memory, kind) if kind != OpKind::Register => by_size!(size, mem_imm),
        (OpKind::Register, kind) if kind != OpKind::Memory => by_size!(size, reg_imm),
        _ => return None,
    })
}

macro_rules! extension {
    ($instruction:expr, $reg:ident, $mem:ident) => {{
        let to = operand_size($instruction, 0);
        let from = operand_size($instruction, 1);
        let memory = $instruction.op1_kind() == OpKind::Memory;
        match (from, memory) {
            (1, false) => by_size!(to, $reg::<u8>),
            (2, false) => by_size!(to, $reg::<u16>),
            (_, false) => by_size!(to, $reg::<u32>),
            (1, true) => by_size!(to, $mem::<u8>),
            (2, true) => by_size!(to, $mem::<u16>),
            (_, true) => by_size!(to, $mem::<u32>),
        }
    }};
}

fn pick_cmov<C: Condition>(instruction: &Instruction) -> Exec {
    let size = operand_size(instruction, 0);
    if instruction.op1_kind() == OpKind::Memory {
        by_size!(size, cmov_mem::<C>)
    } else {
        by_size!(size, cmov_reg::<C>)
    }
}

fn pick_set<C: Condition>(instruction: &Instruction) -> Exec {
    if instruction.op0_kind() == OpKind::Memory { set_mem::<C> } else { set_reg::<C> }
}

pub(crate) fn select(instruction: &Instruction, op: &mut Op, mode: Mode) -> Option<Selected> {
    let size = if instruction.op_count() > 0 { operand_size(instruction, 0) } else { 0 };
    let memory = instruction.op_count() > 1 && instruction.op1_kind() == OpKind::Memory;
    let exec: Exec = match instruction.mnemonic() {
        Mnemonic::Mov => pick_mov(instruction, op)?,
        Mnemonic::Movnti => by_size!(size, mem_reg),
        Mnemonic::Movzx => extension!(instruction, zero_extend_reg, zero_extend_mem),
        Mnemonic::Movsx | Mnemonic::Movsxd => extension!(instruction, sign_extend_reg, sign_extend_mem),
        Mnemonic::Lea if size == 8 && op.addr == crate::decode::op::ADDR_FLAT => lea_flat,
        Mnemonic::Lea => by_size!(size, lea),
        Mnemonic::Xchg => match (instruction.op0_kind(), instruction.op1_kind()) {
            (OpKind::Register, OpKind::Register) => by_size!(size, exchange_reg),
            _ => by_size!(size, exchange_mem),
        },
        Mnemonic::Bswap => by_size!(size, byte_swap),
        Mnemonic::Movbe if memory => by_size!(size, movbe_load),
        Mnemonic::Movbe => by_size!(size, movbe_store),
        Mnemonic::Cbw => cbw,
        Mnemonic::Cwde => cwde,
        Mnemonic::Cdqe => cdqe,
        Mnemonic::Cwd => cwd,
        Mnemonic::Cdq => cdq,
        Mnemonic::Cqo => cqo,
        Mnemonic::Xlatb => {
            let size = instruction.memory_base().size();
            op.addr = crate::decode::lower::address_kind(size, mode);
            op.seg = crate::decode::lower::segment_slot(instruction.memory_segment(), mode);
            xlat
        }
        Mnemonic::Nop
        | Mnemonic::Reservednop
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetch
        | Mnemonic::Endbr64
        | Mnemonic::Endbr32 => nop,
        Mnemonic::Pause => return Selected::end(pause),
        Mnemonic::Lfence | Mnemonic::Mfence | Mnemonic::Sfence => fence,
        _ => {
            return match instruction.op_count() {
                2 => with_condition!(instruction, pick_cmov(instruction)).and_then(Selected::go_on),
                1 if size == 1 && !instruction.code().is_loopcc() && !instruction.is_jcc_short_or_near() => {
                    with_condition!(instruction, pick_set(instruction)).and_then(Selected::go_on)
                }
                _ => None,
            };
        }
    };
    Selected::go_on(exec)
}
