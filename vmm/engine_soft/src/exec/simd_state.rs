//! SIMD instructions that are about state or memory order rather than arithmetic: MXCSR, FXSAVE, EMMS,
//! prefetches, fences, non-temporal integer stores and masked stores.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::simd::Mask;
use crate::cpu::{Cpu, RDI, cr0, efer};
use crate::decode::Mode;
use crate::decode::lower::{Selected, address_kind, segment_slot, slot};
use crate::decode::op::{Op, REG_ZERO, Step, Stop};
use crate::fault::vector;
use crate::fpu::area::LEGACY;
use crate::fpu::{Fpu, MXCSR_MASK};
use crate::mmu::Intent;
use crate::native::mem::{self, Word};

fn ldmxcsr(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.sse_check()?;
    let value = cpu.load_op::<u32>(op)?;
    if value & !MXCSR_MASK != 0 {
        return cpu.raise_gp();
    }
    cpu.fpu.mxcsr.set(value);
    Ok(())
}

fn stmxcsr(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.sse_check()?;
    let value = cpu.fpu.mxcsr.get();
    cpu.store_op(op, value)
}

/// Checks of FXSAVE and FXRSTOR, and the linear address of their area.
fn fx_area(cpu: &mut Cpu, op: &Op, intent: Intent) -> Result<u64, Stop> {
    if cpu.cr0 & cr0::EM != 0 {
        return cpu.raise_ud();
    }
    if cpu.cr0 & cr0::TS != 0 {
        return cpu.raise(vector::NM);
    }
    let va = cpu.addr(op, LEGACY as u64, intent)?;
    if va & 15 != 0 { cpu.raise_gp() } else { Ok(va) }
}

/// XMM registers that FXSAVE and FXRSTOR move: none in the fast mode that EFER can ask for.
fn fx_registers(cpu: &Cpu) -> usize {
    if !cpu.code64() {
        8
    } else if cpu.efer & efer::FFXSR != 0 && cpu.cpl == 0 {
        0
    } else {
        16
    }
}

/// FXSAVE; `LONG` with REX.W. The reserved bytes at the end are not written.
fn fxsave<const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    let va = fx_area(cpu, op, Intent::Write)?;
    let mut area = [0u8; LEGACY];
    let count = fx_registers(cpu);
    cpu.fpu.put_x87(&mut area, LONG);
    cpu.fpu.put_mxcsr(&mut area);
    cpu.fpu.put_xmm(&mut area, count);
    cpu.write(va, &area[..160 + 16 * count])
}

fn fxrstor<const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    let va = fx_area(cpu, op, Intent::Read)?;
    let mut area = [0u8; LEGACY];
    cpu.read(va, &mut area)?;
    let mxcsr = Fpu::mxcsr_of(&area);
    if mxcsr & !MXCSR_MASK != 0 {
        return cpu.raise_gp();
    }
    let count = fx_registers(cpu);
    cpu.fpu.take_x87(&area, LONG);
    cpu.fpu.mxcsr.set(mxcsr);
    cpu.fpu.take_xmm(&area, count);
    Ok(())
}

fn emms(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.mmx_check()?;
    cpu.fpu.x87.leave_mmx();
    Ok(())
}

/// Prefetches: hints, which never fault.
fn nothing(_cpu: &mut Cpu, _op: &Op) -> Step {
    Ok(())
}

fn fence(_cpu: &mut Cpu, _op: &Op) -> Step {
    mem::fence();
    Ok(())
}

/// MOVNTI: an ordinary store is as good and stronger in order.
fn store_general<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.reg::<W>(op.rm);
    cpu.store_op(op, value)
}

/// MASKMOVDQU and MASKMOVQ: stores the bytes whose mask byte has its top bit set, to DS:RDI.
fn masked_store<const VECTOR: bool, const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    let (data, mask, size) = if VECTOR {
        if VEX {
            cpu.avx_check()?;
        } else {
            cpu.sse_check()?;
        }
        (cpu.fpu.xmm(op.reg), cpu.fpu.xmm(op.rm), 16)
    } else {
        cpu.mmx_check()?;
        cpu.fpu.settle();
        let mut both = [op.reg, op.rm].map(|slot| cpu.fpu.x87.mmx_value(slot));
        let [data, mask] = &mut both;
        ([*data, 0], [*mask, 0], 8)
    };
    let va = cpu.addr(op, size, Intent::Write)?;
    let bytes = |value: [u64; 2], at: usize| (value[at / 8] >> (8 * (at % 8))) as u8;
    let chosen = Mask::of(size as usize, |at| bytes(mask, at) & 0x80 != 0);
    chosen.store(cpu, va, 1, |at| [bytes(data, at), 0, 0, 0, 0, 0, 0, 0])?;
    if !VECTOR {
        cpu.fpu.x87.enter_mmx();
    }
    Ok(())
}

/// Handler of one of these instructions.
pub(crate) fn select(instruction: &Instruction, op: &mut Op, mode: Mode) -> Option<Selected> {
    use Mnemonic::*;
    let exec: crate::decode::op::Exec = match instruction.mnemonic() {
        Ldmxcsr => ldmxcsr,
        Stmxcsr => stmxcsr,
        Fxsave => fxsave::<false>,
        Fxsave64 => fxsave::<true>,
        Fxrstor => fxrstor::<false>,
        Fxrstor64 => fxrstor::<true>,
        Emms => emms,
        Prefetchnta | Prefetcht0 | Prefetcht1 | Prefetcht2 | Prefetchw => nothing,
        Sfence | Lfence | Mfence => fence,
        Movnti => {
            op.rm = slot(instruction.op_register(1));
            if instruction.code() == Code::Movnti_m64_r64 {
                store_general::<u64>
            } else {
                store_general::<u32>
            }
        }
        Maskmovq | Maskmovdqu | Vmaskmovdqu => {
            let size = match instruction.op_kind(0) {
                OpKind::MemorySegDI => 2,
                OpKind::MemorySegEDI => 4,
                _ => 8,
            };
            op.base = RDI as u8;
            op.index = REG_ZERO;
            op.disp = 0;
            op.seg = segment_slot(instruction.memory_segment(), mode);
            op.addr = address_kind(size, mode);
            op.reg = slot(instruction.op_register(1));
            op.rm = slot(instruction.op_register(2));
            match instruction.mnemonic() {
                Maskmovq => masked_store::<false, false>,
                Maskmovdqu => masked_store::<true, false>,
                _ => masked_store::<true, true>,
            }
        }
        _ => return None,
    };
    Selected::go_on(exec)
}
