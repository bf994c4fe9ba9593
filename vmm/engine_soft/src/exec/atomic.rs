//! CMPXCHG, XADD, CMPXCHG8B and CMPXCHG16B.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::alu::operand_size;
use super::by_size;
use crate::cpu::{Cpu, RAX, RBX, RCX, RDX};
use crate::decode::lower::Selected;
use crate::decode::op::{Exec, Op, Step};
use crate::mmu::access::Place;
use crate::mmu::{Intent, PAGE};
use crate::native::alu::{Arith, Flags};
use crate::native::mem::{self, Word};

fn cmpxchg_reg<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let (expected, old) = (cpu.reg::<W>(RAX as u8), cpu.reg::<W>(op.reg));
    cpu.flags = Arith::sub(expected, old).1;
    if expected == old {
        let new = cpu.reg::<W>(op.rm);
        cpu.set_reg(op.reg, new);
    } else {
        cpu.set_reg(RAX as u8, old);
    }
    Ok(())
}

#[inline(always)]
fn cmpxchg_done<W: Word>(cpu: &mut Cpu, expected: W, old: W) {
    cpu.flags = Arith::sub(expected, old).1;
    if expected != old {
        cpu.set_reg(RAX as u8, old);
    }
}

fn cmpxchg_mem<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let (expected, new) = (cpu.reg::<W>(RAX as u8), cpu.reg::<W>(op.reg));
    let va = cpu.addr(op, W::SIZE as u64, Intent::Write)?;
    let mut seen = W::default();
    // The destination is written in either case.
    cpu.modify::<W>(va, |_, old| {
        seen = old;
        Ok(if old == expected { new } else { old })
    })?;
    cmpxchg_done(cpu, expected, seen);
    Ok(())
}

fn lock_cmpxchg_mem<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let (expected, new) = (cpu.reg::<W>(RAX as u8), cpu.reg::<W>(op.reg));
    let va = cpu.addr(op, W::SIZE as u64, Intent::Write)?;
    let old = match cpu.mmu.tlb.write::<W>(cpu.mmu.rights, va) {
        Some(ptr) => W::compare_exchange(ptr, expected, new),
        None => cpu.modify_locked::<W, W>(va, |old| (if old == expected { new } else { old }, old))?,
    };
    cmpxchg_done(cpu, expected, old);
    Ok(())
}

fn xadd_reg<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let (a, b) = (cpu.reg::<W>(op.reg), cpu.reg::<W>(op.rm));
    let (sum, f) = Arith::add(a, b);
    cpu.flags = f;
    // With the same register twice the sum wins.
    cpu.set_reg(op.rm, a);
    cpu.set_reg(op.reg, sum);
    Ok(())
}

fn xadd_mem<W: Word, const LOCK: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    let b = cpu.reg::<W>(op.reg);
    let va = cpu.addr(op, W::SIZE as u64, Intent::Write)?;
    let (old, f) = if LOCK {
        cpu.modify_locked::<W, (W, Flags)>(va, |a| {
            let (sum, f) = Arith::add(a, b);
            (sum, (a, f))
        })?
    } else {
        let mut kept = (W::default(), Flags::default());
        cpu.modify::<W>(va, |_, a| {
            let (sum, f) = Arith::add(a, b);
            kept = (a, f);
            Ok(sum)
        })?;
        kept
    };
    cpu.flags = f;
    cpu.set_reg(op.reg, old);
    Ok(())
}

fn cmpxchg8b(cpu: &mut Cpu, op: &Op) -> Step {
    let pair = |cpu: &Cpu, high: usize, low: usize| cpu.regs[high] << 32 | (cpu.regs[low] & 0xffff_ffff);
    let (expected, new) = (pair(cpu, RDX, RAX), pair(cpu, RCX, RBX));
    let va = cpu.addr(op, 8, Intent::Write)?;
    let old = cpu.modify_locked::<u64, u64>(va, |old| (if old == expected { new } else { old }, old))?;
    cpu.flags = cpu.flags.with(Flags::ZF, old == expected);
    if old != expected {
        cpu.regs[RAX] = old & 0xffff_ffff;
        cpu.regs[RDX] = old >> 32;
    }
    Ok(())
}

fn cmpxchg16b(cpu: &mut Cpu, op: &Op) -> Step {
    let pair =
        |cpu: &Cpu, high: usize, low: usize| u128::from(cpu.regs[high]) << 64 | u128::from(cpu.regs[low]);
    let (expected, new) = (pair(cpu, RDX, RAX), pair(cpu, RCX, RBX));
    let va = cpu.addr(op, 16, Intent::Write)?;
    if va % 16 != 0 {
        return cpu.raise_gp();
    }
    cpu.probe_write(va, 16)?;
    let old = match cpu.mmu.tlb.write_len(cpu.mmu.rights, va, 16) {
        Some(ptr) => mem::compare_exchange_16(ptr, expected, new),
        None => match cpu.place(va, cpu.mmu.rights, Intent::Write)? {
            Place::Ram(ptr) => {
                debug_assert!(va % PAGE <= PAGE - 16);
                let old = mem::compare_exchange_16(ptr, expected, new);
                cpu.after_write(va, 16, cpu.mmu.rights);
                old
            }
            Place::Device(_) => return cpu.raise_gp(),
        },
    };
    cpu.flags = cpu.flags.with(Flags::ZF, old == expected);
    if old != expected {
        cpu.regs[RAX] = old as u64;
        cpu.regs[RDX] = (old >> 64) as u64;
    }
    Ok(())
}

macro_rules! xadd_by_size {
    ($size:expr, $lock:literal) => {
        match $size {
            1 => xadd_mem::<u8, $lock> as Exec,
            2 => xadd_mem::<u16, $lock>,
            4 => xadd_mem::<u32, $lock>,
            _ => xadd_mem::<u64, $lock>,
        }
    };
}

pub(crate) fn select(instruction: &Instruction, _op: &mut Op) -> Option<Selected> {
    let size = if instruction.op_count() > 0 { operand_size(instruction, 0) } else { 0 };
    let memory = instruction.op0_kind() == OpKind::Memory;
    let lock = instruction.has_lock_prefix();
    let exec: Exec = match (instruction.mnemonic(), memory, lock) {
        (Mnemonic::Cmpxchg, false, _) => by_size!(size, cmpxchg_reg),
        (Mnemonic::Cmpxchg, true, false) => by_size!(size, cmpxchg_mem),
        (Mnemonic::Cmpxchg, true, true) => by_size!(size, lock_cmpxchg_mem),
        (Mnemonic::Xadd, false, _) => by_size!(size, xadd_reg),
        (Mnemonic::Xadd, true, false) => xadd_by_size!(size, false),
        (Mnemonic::Xadd, true, true) => xadd_by_size!(size, true),
        (Mnemonic::Cmpxchg8b, ..) => cmpxchg8b,
        (Mnemonic::Cmpxchg16b, ..) => cmpxchg16b,
        _ => return None,
    };
    Selected::go_on(exec)
}
