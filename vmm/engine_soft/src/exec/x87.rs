//! x87 instructions, executed by the host's own unit, in which the guest's state stays from one to the next
//! (see [`crate::fpu::x87`]). Instructions about the state itself are in [`super::x87_state`].

use iced_x86::{Code, CpuidFeature, Instruction, Mnemonic, OpKind};

use super::simd::load_scratch;
use crate::cpu::{Cpu, cr0};
use crate::decode::lower::Selected;
use crate::decode::op::{Exec, Op, Step, Stop};
use crate::fault::vector;
use crate::mmu::Intent;
use crate::native::alu::Flags;
use crate::native::thunk::{self, Place};

/// Error summary bit of the status word.
const ERROR_SUMMARY: u16 = 0x80;
/// Exceptions that, unmasked, keep a store from happening: all but precision.
const BEFORE_STORE: u16 = 0x1f;

/// Operand in memory.
const REGISTERS: u8 = 0;
const LOAD: u8 = 1;
const STORE: u8 = 2;

impl Cpu {
    /// Checks before an x87 instruction that does not wait.
    #[inline(always)]
    pub(crate) fn x87_check(&mut self) -> Step {
        if self.fpu.usable.x87 { Ok(()) } else { self.deny_x87() }
    }

    /// Checks before every other x87 instruction. A pending exception is #MF whatever CR0.NE says: there is no
    /// interrupt controller that the signal for NE = 0 could go to.
    #[inline(always)]
    pub(crate) fn x87_wait(&mut self) -> Step {
        self.x87_check()?;
        if self.fpu.x87.pending { self.raise(vector::MF) } else { Ok(()) }
    }
}

/// Where the memory operand is; `op.rm` is its size in bytes.
#[inline(always)]
fn locate<const MEMORY: u8>(cpu: &mut Cpu, op: &Op) -> Result<(Place, u64), Stop> {
    let size = u64::from(op.rm);
    match MEMORY {
        LOAD => {
            let va = cpu.addr(op, size, Intent::Read)?;
            if let Some(ptr) = cpu.mmu.tlb.read_len(cpu.mmu.rights, va, size) {
                return Ok((Place::Memory(ptr), va));
            }
            load_scratch(cpu, va, size as usize)?;
            Ok((Place::Scratch, va))
        }
        STORE => {
            let va = cpu.addr(op, size, Intent::Write)?;
            if let Some(ptr) = cpu.mmu.tlb.write_len(cpu.mmu.rights, va, size) {
                return Ok((Place::Memory(ptr), va));
            }
            cpu.probe_write(va, size as usize)?;
            Ok((Place::Scratch, va))
        }
        _ => Ok((Place::None, 0)),
    }
}

/// Executes the thunk; answers the status word.
#[inline(always)]
fn execute(cpu: &mut Cpu, op: &Op, place: Place) -> u16 {
    cpu.fpu.x87.make_resident();
    let places = [place, Place::None, Place::None, Place::None];
    let status = thunk::call(op.imm, &mut cpu.fpu, &mut cpu.regs, places) as u16;
    cpu.fpu.x87.pending = status & ERROR_SUMMARY != 0;
    status
}

/// Finishes a store that could not go straight to memory. An unmasked exception has suppressed it.
#[cold]
#[inline(never)]
fn store_scratch(cpu: &mut Cpu, op: &Op, va: u64, status: u16) -> Step {
    if status & !cpu.fpu.x87.control() & BEFORE_STORE != 0 {
        return Ok(());
    }
    let bytes = cpu.fpu.scratch;
    cpu.write(va, &bytes[..usize::from(op.rm).min(bytes.len())])
}

/// Arithmetic, comparisons, loads and stores, stack management.
fn compute<const MEMORY: u8>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.x87_wait()?;
    let (place, va) = locate::<MEMORY>(cpu, op)?;
    let status = execute(cpu, op, place);
    note_instruction::<MEMORY>(cpu, op);
    if MEMORY == STORE
        && let Place::Scratch = place
    {
        return store_scratch(cpu, op, va, status);
    }
    Ok(())
}

#[inline(always)]
fn note_instruction<const MEMORY: u8>(cpu: &mut Cpu, op: &Op) {
    cpu.fpu.x87.last.ip = cpu.op_rip(op);
    cpu.fpu.x87.last.opcode = op.aux;
    if MEMORY != REGISTERS {
        cpu.fpu.x87.last.dp = cpu.effective(op);
    }
}

/// FCMOVcc, FCOMI and its kin.
fn with_flags(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.x87_wait()?;
    cpu.fpu.implicit.flags = cpu.flags.0;
    execute(cpu, op, Place::None);
    cpu.flags = Flags(cpu.fpu.implicit.flags);
    note_instruction::<REGISTERS>(cpu, op);
    Ok(())
}

/// FLDCW.
fn load_control(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.x87_wait()?;
    let (place, _) = locate::<LOAD>(cpu, op)?;
    execute(cpu, op, place);
    Ok(())
}

/// FNCLEX.
fn clear_exceptions(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.x87_check()?;
    execute(cpu, op, Place::None);
    Ok(())
}

/// FNSTCW.
fn store_control(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.x87_check()?;
    let value = cpu.fpu.x87.control();
    cpu.store_op(op, value)
}

/// FNSTSW to memory.
fn store_status(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.x87_check()?;
    let value = cpu.fpu.x87.status();
    cpu.store_op(op, value)
}

/// FNSTSW AX.
fn status_to_ax(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.x87_check()?;
    let value = cpu.fpu.x87.status();
    cpu.set_reg(0, value);
    Ok(())
}

/// FWAIT.
fn wait(cpu: &mut Cpu, _op: &Op) -> Step {
    if cpu.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS {
        return cpu.raise(vector::NM);
    }
    if cpu.fpu.x87.pending { cpu.raise(vector::MF) } else { Ok(()) }
}

/// FNENI, FNDISI and FNSETPM, which later processors ignore.
fn ignored(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.x87_check()
}

/// Handler of an x87 instruction.
pub(crate) fn select(instruction: &Instruction, op: &mut Op) -> Option<Selected> {
    if instruction.code() == Code::Wait {
        return Selected::go_on(wait);
    }
    let x87 = |feature: &CpuidFeature| {
        matches!(feature, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387)
    };
    if !instruction.cpuid_features().iter().any(x87) {
        return None;
    }
    if let Some(selected) = super::x87_state::select(instruction) {
        return Some(selected);
    }
    let memory = instruction.op_count() > 0 && instruction.op_kind(0) == OpKind::Memory;
    op.rm = match instruction.mnemonic() {
        Mnemonic::Fldcw => 2,
        _ if memory => instruction.memory_size().size() as u8,
        _ => 0,
    };
    op.aux = opcode(instruction);
    let (exec, by_thunk): (Exec, bool) = match instruction.mnemonic() {
        Mnemonic::Fldcw => (load_control, true),
        Mnemonic::Fnclex => (clear_exceptions, true),
        Mnemonic::Fnstcw => (store_control, false),
        Mnemonic::Fnstsw if memory => (store_status, false),
        Mnemonic::Fnstsw => (status_to_ax, false),
        Mnemonic::Fneni | Mnemonic::Fndisi | Mnemonic::Fnsetpm => (ignored, false),
        _ if thunk::status_flags(instruction.rflags_read() | instruction.rflags_modified()) != 0 => {
            (with_flags, true)
        }
        Mnemonic::Fst
        | Mnemonic::Fstp
        | Mnemonic::Fist
        | Mnemonic::Fistp
        | Mnemonic::Fisttp
        | Mnemonic::Fbstp
            if memory =>
        {
            (compute::<STORE>, true)
        }
        _ if memory => (compute::<LOAD>, true),
        _ => (compute::<REGISTERS>, true),
    };
    if by_thunk {
        op.imm = thunk::prepare(instruction)?;
    }
    Selected::go_on(exec)
}

/// The last instruction opcode as the unit notes it. For a memory operand the addressing form is that of an
/// absolute address, whatever it really was: processors note the opcode only for an unmasked exception, if at
/// all.
fn opcode(instruction: &Instruction) -> u16 {
    let info = instruction.op_code();
    let code = info.op_code() as u16;
    if code > 0xff {
        let stack = (0..instruction.op_count())
            .map(|operand| instruction.op_register(operand))
            .filter(|register| register.is_st())
            .map(|register| register.number() as u16)
            .max();
        (code & 0x7ff) + stack.unwrap_or(0)
    } else {
        (code & 7) << 8 | (info.group_index().max(0) as u16) << 3 | 5
    }
}
