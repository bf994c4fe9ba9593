//! XSAVE, XSAVEOPT, XSAVEC and XRSTOR (Intel SDM volume 1, chapter 13). With three components, the compacted layout
//! puts them where the standard one does; what differs is the header.

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::{Cpu, RAX, RDX, cr0, cr4};
use crate::decode::lower::Selected;
use crate::decode::op::{Exec, Op, Step, Stop};
use crate::fault::vector;
use crate::fpu::area::{AVX_AT, AVX_SIZE, AVX_STATE, LEGACY, SSE_STATE, X87_STATE};
use crate::fpu::{Fpu, MXCSR_MASK, MXCSR_RESET};
use crate::mmu::Intent;
use harrier_engine::cpuid::Features;

/// Bit of XCOMP_BV that says that the layout is the compacted one.
const COMPACTED: u64 = 1 << 63;

/// XSAVE writes what it is asked for.
const PLAIN: u8 = 0;
/// XSAVEOPT leaves out what is in its initial state.
const OPTIMISED: u8 = 1;
/// XSAVEC too, and writes a whole header.
const COMPACT: u8 = 2;

/// Bytes of the area with all components that this processor has.
const WHOLE: usize = AVX_AT + AVX_SIZE;

/// Checks, then the linear address of the area, how much of it takes part, and which components do.
fn prepare(cpu: &mut Cpu, op: &Op, intent: Intent) -> Result<(u64, usize, u64), Stop> {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return cpu.raise_ud();
    }
    if cpu.cr0 & cr0::TS != 0 {
        return cpu.raise(vector::NM);
    }
    crate::lend::note_trapped(cpu, cpu.op_rip(op));
    let asked = cpu.regs[RDX] << 32 | cpu.regs[RAX] & 0xffff_ffff;
    let components = asked & cpu.xcr0;
    let size = if components & AVX_STATE != 0 { WHOLE } else { AVX_AT };
    let va = cpu.addr(op, size as u64, intent)?;
    if va & 63 != 0 { cpu.raise_gp() } else { Ok((va, size, components)) }
}

/// Vector registers that the mode reaches.
fn registers(cpu: &Cpu) -> usize {
    if cpu.code64() { 16 } else { 8 }
}

/// XSAVE and its kin; `LONG` with REX.W. Only what takes part is written.
fn save<const LONG: bool, const FORM: u8>(cpu: &mut Cpu, op: &Op) -> Step {
    let (va, size, components) = prepare(cpu, op, Intent::Write)?;
    cpu.probe_write(va, size)?;
    let mut present = [0; 8];
    cpu.read(va.wrapping_add(LEGACY as u64), &mut present)?;
    let count = registers(cpu);
    let mut in_use = cpu.fpu.in_use();
    if FORM == COMPACT && cpu.fpu.mxcsr.get() != MXCSR_RESET {
        // In the compacted layout MXCSR is part of this component.
        in_use |= SSE_STATE;
    }
    let mut area = [0; WHOLE];
    cpu.fpu.put_x87(&mut area, LONG);
    cpu.fpu.put_mxcsr(&mut area);
    cpu.fpu.put_xmm(&mut area, count);
    cpu.fpu.put_avx(&mut area, count);
    let header = if FORM == COMPACT { 0 } else { u64::from_le_bytes(present) & !components };
    let header = header | in_use & components;
    area[LEGACY..LEGACY + 8].copy_from_slice(&header.to_le_bytes());
    area[LEGACY + 8..LEGACY + 16].copy_from_slice(&(COMPACTED | components).to_le_bytes());
    let written = if FORM == PLAIN { components } else { components & in_use };
    // The standard layout has MXCSR with either component of vector registers, whether in use or not.
    let mxcsr = if FORM == COMPACT { written & SSE_STATE } else { components & (SSE_STATE | AVX_STATE) };
    let pieces = [
        (written & X87_STATE, 0..24),
        (mxcsr, 24..32),
        (written & X87_STATE, 32..160),
        (written & SSE_STATE, 160..160 + 16 * count),
        (u64::MAX, LEGACY..LEGACY + if FORM == COMPACT { 64 } else { 8 }),
        (written & AVX_STATE, AVX_AT..AVX_AT + 16 * count),
    ];
    for (of, range) in pieces {
        if of != 0 {
            cpu.write(va.wrapping_add(range.start as u64), &area[range])?;
        }
    }
    Ok(())
}

/// XRSTOR. A component that the area lacks gets its initial state.
fn restore<const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    let (va, size, components) = prepare(cpu, op, Intent::Read)?;
    let mut area = [0; WHOLE];
    cpu.read(va, &mut area[..size])?;
    let word = |at: usize| area[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let present = word(LEGACY);
    let layout = word(LEGACY + 8);
    let compacted = layout & COMPACTED != 0 && cpu.features.has(Features::XSAVEC);
    let (known, reserved) = if compacted {
        (layout & !COMPACTED, (LEGACY + 16..AVX_AT).step_by(8).map(word).fold(0, |all, word| all | word))
    } else {
        (cpu.xcr0, layout | word(LEGACY + 16))
    };
    if present & !known != 0 || known & !cpu.xcr0 != 0 || reserved != 0 {
        return cpu.raise_gp();
    }
    let absent_mxcsr = compacted && present & SSE_STATE == 0;
    let mxcsr = if absent_mxcsr { MXCSR_RESET } else { Fpu::mxcsr_of(&area) };
    let with_mxcsr = if compacted { SSE_STATE } else { SSE_STATE | AVX_STATE } & components != 0;
    if with_mxcsr && mxcsr & !MXCSR_MASK != 0 {
        return cpu.raise_gp();
    }
    let count = registers(cpu);
    if components & X87_STATE != 0 {
        if present & X87_STATE != 0 {
            cpu.fpu.take_x87(&area, LONG);
        } else {
            cpu.fpu.x87.reset();
        }
    }
    if with_mxcsr {
        cpu.fpu.mxcsr.set(mxcsr);
    }
    // What is absent is loaded as zeros.
    if present & SSE_STATE == 0 {
        area[160..416].fill(0);
    }
    if present & AVX_STATE == 0 {
        area[AVX_AT..].fill(0);
    }
    if components & SSE_STATE != 0 {
        cpu.fpu.take_xmm(&area, count);
    }
    if components & AVX_STATE != 0 {
        cpu.fpu.take_avx(&area, count);
    }
    Ok(())
}

/// Handler of one of these instructions.
pub(crate) fn select(instruction: &Instruction) -> Option<Selected> {
    let exec: Exec = match instruction.mnemonic() {
        Mnemonic::Xsave => save::<false, PLAIN>,
        Mnemonic::Xsave64 => save::<true, PLAIN>,
        Mnemonic::Xsaveopt => save::<false, OPTIMISED>,
        Mnemonic::Xsaveopt64 => save::<true, OPTIMISED>,
        Mnemonic::Xsavec => save::<false, COMPACT>,
        Mnemonic::Xsavec64 => save::<true, COMPACT>,
        Mnemonic::Xrstor => restore::<false>,
        Mnemonic::Xrstor64 => restore::<true>,
        _ => return None,
    };
    Selected::go_on(exec)
}
