//! Bit tests, bit scans and counts, ANDN and the other BMI instructions.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::alu::operand_size;
use crate::cpu::Cpu;
use crate::decode::lower::Selected;
use crate::decode::op::{ADDR_FLAT, Exec, Op, Step, Stop};
use crate::mmu::Intent;
use crate::native::alu::{self, Flags};
use crate::native::mem::Word;

/// A two-operand instruction `op a, b` whose flags may depend on the ones before.
trait Two {
    fn apply<W: Word>(a: W, b: W, f: Flags) -> (W, Flags);
}

macro_rules! two {
    ($($name:ident $w16:ident $w32:ident $w64:ident;)*) => {$(
        struct $name;
        impl Two for $name {
            #[inline(always)]
            fn apply<W: Word>(a: W, b: W, f: Flags) -> (W, Flags) {
                let (a, b) = (a.to_u64(), b.to_u64());
                match W::SIZE {
                    2 => { let (r, f) = alu::$w16(a as u16, b as u16, f); (W::from_u64(r.into()), f) }
                    4 => { let (r, f) = alu::$w32(a as u32, b as u32, f); (W::from_u64(r.into()), f) }
                    _ => { let (r, f) = alu::$w64(a, b, f); (W::from_u64(r), f) }
                }
            }
        }
    )*};
}

two! {
    Bsf bsf16 bsf32 bsf64;
    Bsr bsr16 bsr32 bsr64;
    Tzcnt tzcnt16 tzcnt32 tzcnt64;
    Lzcnt lzcnt16 lzcnt32 lzcnt64;
    Popcnt popcnt16 popcnt32 popcnt64;
    Bt bt16 bt32 bt64;
    Bts bts16 bts32 bts64;
    Btr btr16 btr32 btr64;
    Btc btc16 btc32 btc64;
}

// ---- scans and counts: register, register or memory ----

fn scan_reg<O: Two, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let (r, f) = O::apply::<W>(cpu.reg(op.reg), cpu.reg(op.rm), cpu.flags);
    cpu.flags = f;
    cpu.set_reg(op.reg, r);
    Ok(())
}

fn scan_mem<O: Two, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let source = cpu.load_op::<W>(op)?;
    let (r, f) = O::apply(cpu.reg(op.reg), source, cpu.flags);
    cpu.flags = f;
    cpu.set_reg(op.reg, r);
    Ok(())
}

/// BSF and BSR of zero leave the destination alone, all 64 bits of it.
fn bit_scan_reg<O: Two, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let source = cpu.reg::<W>(op.rm);
    bit_scan::<O, W>(cpu, op, source)
}

fn bit_scan_mem<O: Two, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let source = cpu.load_op::<W>(op)?;
    bit_scan::<O, W>(cpu, op, source)
}

#[inline(always)]
fn bit_scan<O: Two, W: Word>(cpu: &mut Cpu, op: &Op, source: W) -> Step {
    let (r, f) = O::apply(cpu.reg(op.reg), source, cpu.flags);
    cpu.flags = f;
    if source != W::default() {
        cpu.set_reg(op.reg, r);
    }
    Ok(())
}

// ---- bit tests ----

fn test_reg_reg<O: Two, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let (r, f) = O::apply::<W>(cpu.reg(op.reg), cpu.reg(op.rm), cpu.flags);
    cpu.flags = f;
    cpu.set_reg(op.reg, r);
    Ok(())
}

fn test_reg_imm<O: Two, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let (r, f) = O::apply(cpu.reg(op.reg), W::from_u64(op.imm), cpu.flags);
    cpu.flags = f;
    cpu.set_reg(op.reg, r);
    Ok(())
}

fn bt_reg_reg<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.flags = Bt::apply::<W>(cpu.reg(op.reg), cpu.reg(op.rm), cpu.flags).1;
    Ok(())
}

fn bt_reg_imm<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.flags = Bt::apply(cpu.reg(op.reg), W::from_u64(op.imm), cpu.flags).1;
    Ok(())
}

/// A bit offset in a register reaches beyond the operand: the address moves by whole words.
fn bit_string_addr<W: Word>(cpu: &mut Cpu, op: &Op, intent: Intent) -> Result<u64, Stop> {
    let words = cpu.reg::<W>(op.reg).to_i64() >> W::BITS.trailing_zeros();
    let bytes = (words as u64).wrapping_mul(W::SIZE as u64);
    if op.addr == ADDR_FLAT {
        return Ok(cpu.addr(op, W::SIZE as u64, intent)?.wrapping_add(bytes));
    }
    // The sum is cut to the address size and checked against the segment: let the address code do it, by way
    // of the zero slot.
    let at = cpu.effective(op).wrapping_add(bytes);
    let mut moved = *op;
    moved.base = crate::decode::op::REG_ZERO;
    moved.index = crate::decode::op::REG_ZERO;
    moved.disp = at as i32;
    cpu.addr(&moved, W::SIZE as u64, intent)
}

fn bt_mem_reg<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let va = bit_string_addr::<W>(cpu, op, Intent::Read)?;
    let value = cpu.load::<W>(va)?;
    cpu.flags = Bt::apply(value, cpu.reg(op.reg), cpu.flags).1;
    Ok(())
}

fn bt_mem_imm<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.load_op::<W>(op)?;
    cpu.flags = Bt::apply(value, W::from_u64(op.imm), cpu.flags).1;
    Ok(())
}

#[inline(always)]
fn change_at<O: Two, W: Word, const LOCK: bool>(cpu: &mut Cpu, va: u64, bit: W) -> Step {
    let before = cpu.flags;
    if LOCK {
        cpu.flags = cpu.modify_locked::<W, Flags>(va, |value| O::apply(value, bit, before))?;
        return Ok(());
    }
    let mut flags = before;
    cpu.modify::<W>(va, |_, value| {
        let (r, f) = O::apply(value, bit, before);
        flags = f;
        Ok(r)
    })?;
    cpu.flags = flags;
    Ok(())
}

fn change_mem_reg<O: Two, W: Word, const LOCK: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    let va = bit_string_addr::<W>(cpu, op, Intent::Write)?;
    let bit = cpu.reg::<W>(op.reg);
    change_at::<O, W, LOCK>(cpu, va, bit)
}

fn change_mem_imm<O: Two, W: Word, const LOCK: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    let va = cpu.addr(op, W::SIZE as u64, Intent::Write)?;
    change_at::<O, W, LOCK>(cpu, va, W::from_u64(op.imm))
}

/// These have no byte form.
macro_rules! wide {
    ($size:expr, $handler:ident) => {
        match $size {
            2 => $handler::<u16> as Exec,
            4 => $handler::<u32>,
            _ => $handler::<u64>,
        }
    };
    ($size:expr, $handler:ident < $($arg:ty),* >) => {
        match $size {
            2 => $handler::<$($arg,)* u16> as Exec,
            4 => $handler::<$($arg,)* u32>,
            _ => $handler::<$($arg,)* u64>,
        }
    };
    ($size:expr, $handler:ident < $($arg:ty),* >, $lock:literal) => {
        match $size {
            2 => $handler::<$($arg,)* u16, $lock> as Exec,
            4 => $handler::<$($arg,)* u32, $lock>,
            _ => $handler::<$($arg,)* u64, $lock>,
        }
    };
}

fn pick_change<O: Two>(instruction: &Instruction) -> Exec {
    let size = operand_size(instruction, 0);
    let memory = instruction.op0_kind() == OpKind::Memory;
    let by_register = instruction.op1_kind() == OpKind::Register;
    match (memory, by_register, instruction.has_lock_prefix()) {
        (false, true, _) => wide!(size, test_reg_reg<O>),
        (false, false, _) => wide!(size, test_reg_imm<O>),
        (true, true, false) => wide!(size, change_mem_reg<O>, false),
        (true, true, true) => wide!(size, change_mem_reg<O>, true),
        (true, false, false) => wide!(size, change_mem_imm<O>, false),
        (true, false, true) => wide!(size, change_mem_imm<O>, true),
    }
}

fn pick_bt(instruction: &Instruction) -> Exec {
    let size = operand_size(instruction, 0);
    let memory = instruction.op0_kind() == OpKind::Memory;
    match (memory, instruction.op1_kind() == OpKind::Register) {
        (false, true) => wide!(size, bt_reg_reg),
        (false, false) => wide!(size, bt_reg_imm),
        (true, true) => wide!(size, bt_mem_reg),
        (true, false) => wide!(size, bt_mem_imm),
    }
}

pub(crate) fn select(instruction: &Instruction, _op: &mut Op) -> Option<Selected> {
    let size = if instruction.op_count() > 0 { operand_size(instruction, 0) } else { 0 };
    let memory = instruction.op_count() > 1 && instruction.op1_kind() == OpKind::Memory;
    let exec = match (instruction.mnemonic(), memory) {
        (Mnemonic::Bsf, false) => wide!(size, bit_scan_reg<Bsf>),
        (Mnemonic::Bsf, true) => wide!(size, bit_scan_mem<Bsf>),
        (Mnemonic::Bsr, false) => wide!(size, bit_scan_reg<Bsr>),
        (Mnemonic::Bsr, true) => wide!(size, bit_scan_mem<Bsr>),
        (Mnemonic::Popcnt, false) => wide!(size, scan_reg<Popcnt>),
        (Mnemonic::Popcnt, true) => wide!(size, scan_mem<Popcnt>),
        (Mnemonic::Tzcnt, false) => wide!(size, scan_reg<Tzcnt>),
        (Mnemonic::Tzcnt, true) => wide!(size, scan_mem<Tzcnt>),
        (Mnemonic::Lzcnt, false) => wide!(size, scan_reg<Lzcnt>),
        (Mnemonic::Lzcnt, true) => wide!(size, scan_mem<Lzcnt>),
        (Mnemonic::Bt, _) => pick_bt(instruction),
        (Mnemonic::Bts, _) => pick_change::<Bts>(instruction),
        (Mnemonic::Btr, _) => pick_change::<Btr>(instruction),
        (Mnemonic::Btc, _) => pick_change::<Btc>(instruction),
        _ => return None,
    };
    Selected::go_on(exec)
}
