//! SSE moves and bitwise logic, without thunks: what copying and clearing memory is made of.

use iced_x86::{Code, Instruction, OpKind};

use crate::cpu::Cpu;
use crate::decode::lower::{Selected, slot};
use crate::decode::op::{Exec, Op, Step, Stop};
use crate::mmu::Intent;
use crate::native::mem::Word;
use crate::native::wide;

/// Loads 16 bytes; #GP(0) when they must be aligned and are not.
#[inline(always)]
pub(crate) fn load_16<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Result<[u64; 2], Stop> {
    let va = cpu.addr(op, 16, Intent::Read)?;
    if ALIGNED && va & 15 != 0 {
        return cpu.raise_gp();
    }
    match cpu.mmu.tlb.read_len(cpu.mmu.rights, va, 16) {
        Some(ptr) => Ok(wide::load_16(ptr)),
        None => {
            super::simd::load_scratch(cpu, va, 16)?;
            Ok(halves(&cpu.fpu.scratch))
        }
    }
}

fn halves(bytes: &[u8; 64]) -> [u64; 2] {
    let half = |at: usize| bytes[at..].first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    [half(0), half(8)]
}

#[inline(always)]
fn store_16<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op, value: [u64; 2]) -> Step {
    let va = cpu.addr(op, 16, Intent::Write)?;
    if ALIGNED && va & 15 != 0 {
        return cpu.raise_gp();
    }
    match cpu.mmu.tlb.write_len(cpu.mmu.rights, va, 16) {
        Some(ptr) => {
            wide::store_16(ptr, &value);
            Ok(())
        }
        None => store_16_slow(cpu, va, value),
    }
}

#[cold]
#[inline(never)]
fn store_16_slow(cpu: &mut Cpu, va: u64, value: [u64; 2]) -> Step {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&value[0].to_le_bytes());
    bytes[8..].copy_from_slice(&value[1].to_le_bytes());
    cpu.write(va, &bytes)
}

fn move_reg(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.sse_check()?;
    let value = cpu.fpu.xmm(op.rm);
    cpu.fpu.set_xmm(op.reg, value);
    Ok(())
}

fn move_load<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.sse_check()?;
    let value = load_16::<ALIGNED>(cpu, op)?;
    cpu.fpu.set_xmm(op.reg, value);
    Ok(())
}

fn move_store<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.sse_check()?;
    let value = cpu.fpu.xmm(op.reg);
    store_16::<ALIGNED>(cpu, op, value)
}

/// MOVSS and MOVSD between registers: the upper part stays.
fn scalar_reg<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.sse_check()?;
    let [value, _] = cpu.fpu.xmm(op.rm);
    let [low, high] = cpu.fpu.xmm(op.reg);
    let low = if W::SIZE == 4 { low & !0xffff_ffff | value & 0xffff_ffff } else { value };
    cpu.fpu.set_xmm(op.reg, [low, high]);
    Ok(())
}

/// MOVSS, MOVSD, MOVD and MOVQ from memory: the upper part becomes zero.
fn scalar_load<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.sse_check()?;
    let value = cpu.load_op::<W>(op)?.to_u64();
    cpu.fpu.set_xmm(op.reg, [value, 0]);
    Ok(())
}

fn scalar_store<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.sse_check()?;
    let [value, _] = cpu.fpu.xmm(op.reg);
    cpu.store_op(op, W::from_u64(value))
}

/// MOVQ between registers: the upper half becomes zero.
fn low_reg(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.sse_check()?;
    let [value, _] = cpu.fpu.xmm(op.rm);
    cpu.fpu.set_xmm(op.reg, [value, 0]);
    Ok(())
}

fn from_general<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.sse_check()?;
    let value = cpu.reg::<W>(op.rm).to_u64();
    cpu.fpu.set_xmm(op.reg, [value, 0]);
    Ok(())
}

fn to_general<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.sse_check()?;
    let [value, _] = cpu.fpu.xmm(op.rm);
    cpu.set_reg(op.reg, W::from_u64(value));
    Ok(())
}

/// MOVLPS, MOVHPS and their double-precision twins.
fn half_load<const HIGH: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.sse_check()?;
    let value = cpu.load_op::<u64>(op)?;
    let [low, high] = cpu.fpu.xmm(op.reg);
    cpu.fpu.set_xmm(op.reg, if HIGH { [low, value] } else { [value, high] });
    Ok(())
}

fn half_store<const HIGH: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.sse_check()?;
    let [low, high] = cpu.fpu.xmm(op.reg);
    cpu.store_op(op, if HIGH { high } else { low })
}

const AND: u8 = 0;
const AND_NOT: u8 = 1;
const OR: u8 = 2;
const XOR: u8 = 3;

#[inline(always)]
fn combine<const OPERATION: u8>(a: [u64; 2], b: [u64; 2]) -> [u64; 2] {
    let one = |a: u64, b: u64| match OPERATION {
        AND => a & b,
        AND_NOT => !a & b,
        OR => a | b,
        _ => a ^ b,
    };
    [one(a[0], b[0]), one(a[1], b[1])]
}

fn logic_reg<const OPERATION: u8>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.sse_check()?;
    let (a, b) = (cpu.fpu.xmm(op.reg), cpu.fpu.xmm(op.rm));
    cpu.fpu.set_xmm(op.reg, combine::<OPERATION>(a, b));
    Ok(())
}

fn logic_load<const OPERATION: u8>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.sse_check()?;
    let b = load_16::<true>(cpu, op)?;
    let a = cpu.fpu.xmm(op.reg);
    cpu.fpu.set_xmm(op.reg, combine::<OPERATION>(a, b));
    Ok(())
}

/// Handler of a move or of bitwise logic.
pub(crate) fn select(instruction: &Instruction, op: &mut Op) -> Option<Selected> {
    use Code::*;
    let memory = |operand| instruction.op_kind(operand) == OpKind::Memory;
    let by_form = |register: Exec, from_memory: Exec, to_memory: Exec| {
        if memory(0) {
            to_memory
        } else if memory(1) {
            from_memory
        } else {
            register
        }
    };
    let logic = |register: Exec, from_memory: Exec| if memory(1) { from_memory } else { register };
    let exec: Exec = match instruction.code() {
        Movups_xmm_xmmm128 | Movups_xmmm128_xmm | Movupd_xmm_xmmm128 | Movupd_xmmm128_xmm
        | Movdqu_xmm_xmmm128 | Movdqu_xmmm128_xmm | Lddqu_xmm_m128 => {
            by_form(move_reg, move_load::<false>, move_store::<false>)
        }
        Movaps_xmm_xmmm128 | Movaps_xmmm128_xmm | Movapd_xmm_xmmm128 | Movapd_xmmm128_xmm
        | Movdqa_xmm_xmmm128 | Movdqa_xmmm128_xmm | Movntdqa_xmm_m128 | Movntps_m128_xmm
        | Movntpd_m128_xmm | Movntdq_m128_xmm => by_form(move_reg, move_load::<true>, move_store::<true>),
        Movss_xmm_xmmm32 | Movss_xmmm32_xmm => {
            by_form(scalar_reg::<u32>, scalar_load::<u32>, scalar_store::<u32>)
        }
        Movsd_xmm_xmmm64 | Movsd_xmmm64_xmm => {
            by_form(scalar_reg::<u64>, scalar_load::<u64>, scalar_store::<u64>)
        }
        Movq_xmm_xmmm64 | Movq_xmmm64_xmm => by_form(low_reg, scalar_load::<u64>, scalar_store::<u64>),
        Movd_xmm_rm32 => by_form(from_general::<u32>, scalar_load::<u32>, scalar_load::<u32>),
        Movq_xmm_rm64 => by_form(from_general::<u64>, scalar_load::<u64>, scalar_load::<u64>),
        Movd_rm32_xmm => by_form(to_general::<u32>, scalar_store::<u32>, scalar_store::<u32>),
        Movq_rm64_xmm => by_form(to_general::<u64>, scalar_store::<u64>, scalar_store::<u64>),
        Movlps_xmm_m64 | Movlpd_xmm_m64 => half_load::<false>,
        Movhps_xmm_m64 | Movhpd_xmm_m64 => half_load::<true>,
        Movlps_m64_xmm | Movlpd_m64_xmm => half_store::<false>,
        Movhps_m64_xmm | Movhpd_m64_xmm => half_store::<true>,
        Pand_xmm_xmmm128 | Andps_xmm_xmmm128 | Andpd_xmm_xmmm128 => {
            logic(logic_reg::<AND>, logic_load::<AND>)
        }
        Pandn_xmm_xmmm128 | Andnps_xmm_xmmm128 | Andnpd_xmm_xmmm128 => {
            logic(logic_reg::<AND_NOT>, logic_load::<AND_NOT>)
        }
        Por_xmm_xmmm128 | Orps_xmm_xmmm128 | Orpd_xmm_xmmm128 => logic(logic_reg::<OR>, logic_load::<OR>),
        Pxor_xmm_xmmm128 | Xorps_xmm_xmmm128 | Xorpd_xmm_xmmm128 => {
            logic(logic_reg::<XOR>, logic_load::<XOR>)
        }
        _ => return None,
    };
    // A store's one register is operand 1.
    let register = |operand| slot(instruction.op_register(operand));
    (op.reg, op.rm) = match (memory(0), memory(1)) {
        (true, _) => (register(1), 0),
        (_, true) => (register(0), 0),
        _ => (register(0), register(1)),
    };
    Selected::go_on(exec)
}
