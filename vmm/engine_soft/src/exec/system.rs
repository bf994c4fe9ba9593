//! System instructions: control and debug registers, flags with privilege, software interrupts, CPUID, the
//! time-stamp counter, model-specific registers, HLT, cache and look-aside buffer control (Intel SDM volume 2).

use harrier_engine::cpu_state::MpState;
use harrier_engine::cpuid::Features;
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use crate::cpu::{CS, Cpu, RAX, RBX, RCX, RDX, cr0, cr4, efer, rflags};
use crate::cpuid::FeatureRules as _;
use crate::decode::Mode;
use crate::decode::lower::{Selected, slot};
use crate::decode::op::{Exec, Op, SEG_FLAT_STACK, Step, Stop};
use crate::exception::{DR7_GD, Event, Source, dr6};
use crate::fault::{Fault, vector};
use crate::mmu::access::Place;
use crate::mmu::{Intent, PHYSICAL_BITS};
use crate::native::alu::Flags;

/// In [`Op::aux`]: the operand is in memory.
const MEMORY: u16 = 0x100;

pub(crate) fn select(instruction: &Instruction, op: &mut Op, mode: Mode) -> Option<Selected> {
    use Code as C;
    let memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
    let size = if instruction.op_count() > 0 && instruction.op0_kind() == OpKind::Register {
        instruction.op0_register().size() as u16
    } else {
        0
    };
    op.aux = match instruction.mnemonic() {
        Mnemonic::Smsw | Mnemonic::Lmsw => size | if memory { MEMORY } else { 0 },
        _ => op.aux,
    };
    let (exec, ends): (Exec, bool) = match instruction.mnemonic() {
        Mnemonic::Mov => return select_mov(instruction, op),
        Mnemonic::Clts => (clts, true),
        Mnemonic::Lmsw => (lmsw, true),
        Mnemonic::Smsw => (smsw, false),
        Mnemonic::Hlt => (hlt, true),
        Mnemonic::Cli => (cli, false),
        Mnemonic::Sti => (sti, false),
        Mnemonic::Clac => (set_ac::<false>, false),
        Mnemonic::Stac => (set_ac::<true>, false),
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => {
            op.seg = stack_slot(mode);
            op.aux = flags_size(instruction.mnemonic());
            (pushf, false)
        }
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => {
            op.seg = stack_slot(mode);
            op.aux = flags_size(instruction.mnemonic());
            (popf, false)
        }
        Mnemonic::Int => (int_n, true),
        Mnemonic::Int3 => (int3, true),
        Mnemonic::Into => (into, true),
        Mnemonic::Int1 => (int1, true),
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => (super::undefined, true),
        Mnemonic::Bound => {
            op.aux = size;
            (bound, false)
        }
        Mnemonic::Cpuid => (cpuid, false),
        Mnemonic::Rdtsc => (rdtsc, false),
        Mnemonic::Rdtscp => (rdtscp, false),
        Mnemonic::Rdpmc => (rdpmc, true),
        Mnemonic::Rdpid => {
            op.aux = size;
            (rdpid, false)
        }
        Mnemonic::Rdmsr => (rdmsr, false),
        Mnemonic::Wrmsr => (wrmsr, true),
        Mnemonic::Invlpg => (invlpg, true),
        Mnemonic::Invd | Mnemonic::Wbinvd => (write_back, false),
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => (flush_line, false),
        Mnemonic::Xgetbv => (xgetbv, false),
        Mnemonic::Xsetbv => (xsetbv, true),
        Mnemonic::Invpcid => {
            op.aux = instruction.op0_register().size() as u16;
            (invpcid, true)
        }
        Mnemonic::Rdrand => {
            op.aux = size;
            (random::<false>, false)
        }
        Mnemonic::Rdseed => {
            op.aux = size;
            (random::<true>, false)
        }
        Mnemonic::Monitor
        | Mnemonic::Mwait
        | Mnemonic::Monitorx
        | Mnemonic::Mwaitx
        | Mnemonic::Rsm
        | Mnemonic::Getsec => (super::undefined, true),
        _ => match instruction.code() {
            C::Wbnoinvd => (write_back, false),
            _ => return None,
        },
    };
    Some(Selected { exec, ends })
}

fn stack_slot(mode: Mode) -> u8 {
    if mode == Mode::Bits64 { SEG_FLAT_STACK } else { crate::cpu::SS as u8 }
}

fn flags_size(mnemonic: Mnemonic) -> u16 {
    match mnemonic {
        Mnemonic::Pushf | Mnemonic::Popf => 2,
        Mnemonic::Pushfd | Mnemonic::Popfd => 4,
        _ => 8,
    }
}

/// MOV to and from control and debug registers. [`Op::imm`] is their number, [`Op::reg`] the general register.
fn select_mov(instruction: &Instruction, op: &mut Op) -> Option<Selected> {
    let (special, general, exec): (Register, Register, Exec) = match instruction.code() {
        Code::Mov_r32_cr | Code::Mov_r64_cr => {
            (instruction.op1_register(), instruction.op0_register(), from_control)
        }
        Code::Mov_cr_r32 | Code::Mov_cr_r64 => {
            (instruction.op0_register(), instruction.op1_register(), to_control)
        }
        Code::Mov_r32_dr | Code::Mov_r64_dr => {
            (instruction.op1_register(), instruction.op0_register(), from_debug)
        }
        Code::Mov_dr_r32 | Code::Mov_dr_r64 => {
            (instruction.op0_register(), instruction.op1_register(), to_debug)
        }
        _ => return None,
    };
    op.imm = special.number() as u64;
    op.reg = slot(general);
    op.aux = general.size() as u16;
    Selected::end(exec)
}

/// #GP(0) unless at privilege level 0.
fn privileged(cpu: &mut Cpu) -> Step {
    if cpu.cpl == 0 { Ok(()) } else { cpu.raise_gp() }
}

fn set_register(cpu: &mut Cpu, op: &Op, value: u64) {
    match op.aux & 0xff {
        2 => cpu.set_reg(op.reg, value as u16),
        4 => cpu.set_reg(op.reg, value as u32),
        _ => cpu.set_reg(op.reg, value),
    }
}

// ---- control registers ----

fn from_control(cpu: &mut Cpu, op: &Op) -> Step {
    if !matches!(op.imm, 0 | 2 | 3 | 4 | 8) {
        return cpu.raise_ud();
    }
    privileged(cpu)?;
    let value = match op.imm {
        0 => cpu.cr0,
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4,
        _ => u64::from(cpu.lapic.task_priority() >> 4),
    };
    set_register(cpu, op, value);
    cpu.end_block(op)
}

fn to_control(cpu: &mut Cpu, op: &Op) -> Step {
    if !matches!(op.imm, 0 | 2 | 3 | 4 | 8) {
        return cpu.raise_ud();
    }
    privileged(cpu)?;
    let value = if op.aux == 4 { u64::from(cpu.reg::<u32>(op.reg)) } else { cpu.reg::<u64>(op.reg) };
    match op.imm {
        0 => cpu.write_cr0(value)?,
        2 => cpu.cr2 = value,
        3 => cpu.write_cr3(value)?,
        4 => cpu.write_cr4(value)?,
        _ => {
            if value > 15 {
                return cpu.raise_gp();
            }
            cpu.lapic.set_task_priority((value as u8) << 4);
            cpu.update_attention();
        }
    }
    cpu.end_block(op)
}

impl Cpu {
    /// MOV to CR0 (Intel SDM volume 3, 2.5).
    fn write_cr0(&mut self, value: u64) -> Step {
        let known =
            cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;
        let paging = value & cr0::PG != 0;
        if value >> 32 != 0
            || (paging && value & cr0::PE == 0)
            || (value & cr0::NW != 0 && value & cr0::CD == 0)
            || (!paging && self.cr4 & cr4::PCIDE != 0)
        {
            return self.raise_gp();
        }
        let new = value & known | cr0::ET;
        let mut efer = self.efer;
        if paging && self.cr0 & cr0::PG == 0 {
            if efer & efer::LME != 0 {
                if self.cr4 & cr4::PAE == 0
                    || self.seg[CS].long
                    || (!self.tr.unusable && self.tr.kind & 8 == 0)
                {
                    return self.raise_gp();
                }
                efer |= efer::LMA;
            }
        } else if !paging && self.cr0 & cr0::PG != 0 {
            if self.code64() {
                return self.raise_gp();
            }
            efer &= !efer::LMA;
        }
        let pae = paging && self.cr4 & cr4::PAE != 0 && efer & efer::LMA == 0;
        let reload = (new ^ self.cr0) & (cr0::PG | cr0::CD | cr0::NW) != 0;
        if pae && reload && !self.mmu.load_pdptes(self.cr3) {
            return self.raise_gp();
        }
        if (new ^ self.cr0) & cr0::PG != 0 {
            self.mmu.flush();
        }
        self.cr0 = new;
        self.efer = efer;
        if new & cr0::PE == 0 {
            self.cpl = 0;
        }
        self.mode_changed();
        Ok(())
    }

    fn write_cr3(&mut self, value: u64) -> Step {
        let value = if self.long_mode() { value } else { value & 0xffff_ffff };
        // Bit 63 says that translations of the address space may stay; none do here.
        let value = if self.cr4 & cr4::PCIDE != 0 { value & !(1 << 63) } else { value };
        if value >> PHYSICAL_BITS != 0 {
            return self.raise_gp();
        }
        let pae = self.cr0 & cr0::PG != 0 && self.cr4 & cr4::PAE != 0 && !self.long_mode();
        if pae && !self.mmu.load_pdptes(value) {
            return self.raise_gp();
        }
        self.cr3 = value;
        self.mmu.switch_space(value);
        Ok(())
    }

    fn write_cr4(&mut self, value: u64) -> Step {
        if value & !self.features.cr4_bits() != 0 {
            return self.raise_gp();
        }
        if self.long_mode() && value & cr4::PAE == 0 {
            return self.raise_gp();
        }
        let changed = value ^ self.cr4;
        // Process-context identifiers start in long mode and with identifier 0 (Intel SDM volume 3, 4.10.1).
        if changed & value & cr4::PCIDE != 0 && (!self.long_mode() || self.cr3 & 0xfff != 0) {
            return self.raise_gp();
        }
        let pae = self.cr0 & cr0::PG != 0 && value & cr4::PAE != 0 && !self.long_mode();
        let paging_bits = cr4::PAE | cr4::PGE | cr4::PSE | cr4::SMEP;
        if pae && changed & paging_bits != 0 && !self.mmu.load_pdptes(self.cr3) {
            return self.raise_gp();
        }
        self.cr4 = value;
        if changed & (paging_bits | cr4::SMAP | cr4::PCIDE) != 0 {
            self.mmu.flush();
        }
        self.mode_changed();
        Ok(())
    }
}

fn clts(cpu: &mut Cpu, op: &Op) -> Step {
    privileged(cpu)?;
    cpu.cr0 &= !cr0::TS;
    cpu.fpu_mode_changed();
    cpu.end_block(op)
}

fn lmsw(cpu: &mut Cpu, op: &Op) -> Step {
    privileged(cpu)?;
    let value = if op.aux & MEMORY != 0 { cpu.load_op::<u16>(op)? } else { cpu.reg::<u16>(op.reg) };
    let kept = cr0::MP | cr0::EM | cr0::TS;
    // PE can be set and not cleared.
    let value = u64::from(value);
    let new = (cpu.cr0 & !kept) | (value & (kept | cr0::PE));
    cpu.write_cr0(new)?;
    cpu.end_block(op)
}

fn smsw(cpu: &mut Cpu, op: &Op) -> Step {
    if cpu.cr4 & cr4::UMIP != 0 && cpu.cpl > 0 {
        return cpu.raise_gp();
    }
    if op.aux & MEMORY != 0 {
        return cpu.store_op(op, cpu.cr0 as u16);
    }
    let value = cpu.cr0;
    set_register(cpu, op, value);
    Ok(())
}

// ---- debug registers ----

/// The register that a number means; #UD and #DB where accesses are not allowed.
fn debug_register(cpu: &mut Cpu, op: &Op) -> Result<u64, Stop> {
    let number = match op.imm {
        4 | 5 if cpu.cr4 & cr4::DE != 0 => return cpu.raise_ud(),
        4 | 5 => op.imm + 2,
        0..=7 => op.imm,
        _ => return cpu.raise_ud(),
    };
    privileged(cpu)?;
    if cpu.dr7 & DR7_GD != 0 {
        cpu.fault = Fault { vector: vector::DB, address: dr6::BD, ..Fault::default() };
        return Err(Stop::Fault);
    }
    Ok(number)
}

fn from_debug(cpu: &mut Cpu, op: &Op) -> Step {
    let value = match debug_register(cpu, op)? {
        6 => cpu.dr6,
        7 => cpu.dr7,
        number => cpu.dr[number as usize & 3],
    };
    set_register(cpu, op, value);
    cpu.end_block(op)
}

fn to_debug(cpu: &mut Cpu, op: &Op) -> Step {
    let number = debug_register(cpu, op)?;
    let value = if op.aux == 4 { u64::from(cpu.reg::<u32>(op.reg)) } else { cpu.reg::<u64>(op.reg) };
    if number >= 6 && value >> 32 != 0 {
        return cpu.raise_gp();
    }
    match number {
        6 => cpu.dr6 = value & dr6::WRITABLE | dr6::FIXED,
        7 => cpu.dr7 = value & 0xffff_2bff | 0x400,
        number => cpu.dr[number as usize & 3] = value,
    }
    cpu.breakpoints_changed();
    cpu.end_block(op)
}

// ---- flags ----

/// CLI. (Protected-mode virtual interrupts are not offered.)
fn cli(cpu: &mut Cpu, _op: &Op) -> Step {
    if cpu.cpl > cpu.iopl() && !cpu.real_mode() {
        return cpu.raise_gp();
    }
    cpu.rflags &= !rflags::IF;
    Ok(())
}

/// STI in the middle of a block: no interrupt comes before the block goes on, so the shadow needs no state
/// unless something waits.
pub(crate) fn sti(cpu: &mut Cpu, op: &Op) -> Step {
    if cpu.alone || cpu.interrupt_ready() {
        return sti_at_end(cpu, op);
    }
    if cpu.cpl > cpu.iopl() && !cpu.real_mode() {
        return cpu.raise_gp();
    }
    cpu.rflags |= rflags::IF;
    Ok(())
}

/// STI with its shadow: no interrupt before the next instruction has ended.
pub(crate) fn sti_at_end(cpu: &mut Cpu, op: &Op) -> Step {
    if cpu.cpl > cpu.iopl() && !cpu.real_mode() {
        return cpu.raise_gp();
    }
    if cpu.rflags & rflags::IF == 0 {
        cpu.rflags |= rflags::IF;
        cpu.sti_shadow = true;
        cpu.attention = true;
    }
    cpu.end_block(op)
}

/// The handler of an instruction that turned out to be the last one of a block that it does not end.
pub(crate) fn at_block_end(exec: Exec) -> Exec {
    if std::ptr::fn_addr_eq(exec, sti as Exec) { sti_at_end } else { exec }
}

fn set_ac<const ON: bool>(cpu: &mut Cpu, _op: &Op) -> Step {
    if !cpu.features.has(Features::SMAP) || cpu.cpl != 0 {
        return cpu.raise_ud();
    }
    if ON {
        cpu.rflags |= rflags::AC;
    } else {
        cpu.rflags &= !rflags::AC;
    }
    cpu.mmu.set_access_mode(cpu.cpl, cpu.cr4, cpu.rflags);
    Ok(())
}

impl Cpu {
    /// Replaces RFLAGS; [`Cpu::update_attention`] is the caller's.
    pub(crate) fn load_rflags(&mut self, value: u64) {
        let before = self.attention;
        self.set_rflags(value);
        self.attention = before;
    }
}

fn pushf(cpu: &mut Cpu, op: &Op) -> Step {
    if cpu.v86() && cpu.iopl() < 3 {
        return cpu.raise_gp();
    }
    let value = cpu.rflags() & !(rflags::VM | rflags::RF);
    cpu.push_value(value, op.aux as u8)
}

fn popf(cpu: &mut Cpu, op: &Op) -> Step {
    if cpu.v86() && cpu.iopl() < 3 {
        return cpu.raise_gp();
    }
    let value = cpu.peek_stack(0, op.aux as u8)?;
    let mut mask = Flags::MASK | rflags::TF | rflags::DF | rflags::NT | rflags::AC | rflags::ID;
    if cpu.cpl <= cpu.iopl() || cpu.real_mode() {
        mask |= rflags::IF;
    }
    if cpu.cpl == 0 {
        mask |= rflags::IOPL;
    }
    if op.aux == 2 {
        mask &= 0xffff;
    }
    cpu.set_stack_pointer(cpu.regs[crate::cpu::RSP].wrapping_add(u64::from(op.aux)));
    let old = cpu.rflags();
    cpu.load_rflags((old & !mask) | (value & mask));
    if cpu.events_due() {
        cpu.attention = true;
        return cpu.end_block(op);
    }
    Ok(())
}

// ---- software interrupts ----

fn software_interrupt(cpu: &mut Cpu, op: &Op, vector: u8, source: Source) -> Step {
    let before = cpu.rip;
    cpu.rip = cpu.next_rip(op);
    let event = Event { vector, source, error: None, resume: false };
    match cpu.deliver(event) {
        Ok(()) => Err(Stop::Block),
        Err(stop) => {
            cpu.rip = before;
            Err(stop)
        }
    }
}

fn int_n(cpu: &mut Cpu, op: &Op) -> Step {
    if cpu.v86() && cpu.iopl() < 3 {
        return cpu.raise_gp();
    }
    software_interrupt(cpu, op, op.imm as u8, Source::Software)
}

fn int3(cpu: &mut Cpu, op: &Op) -> Step {
    software_interrupt(cpu, op, vector::BP, Source::Software)
}

fn into(cpu: &mut Cpu, op: &Op) -> Step {
    if cpu.flags.of() {
        return software_interrupt(cpu, op, vector::OF, Source::Software);
    }
    cpu.end_block(op)
}

fn int1(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.fault = Fault { vector: vector::DB, trap: true, ..Fault::default() };
    Err(Stop::Fault)
}

fn bound(cpu: &mut Cpu, op: &Op) -> Step {
    let size = u64::from(op.aux);
    let va = cpu.addr(op, 2 * size, Intent::Read)?;
    let (index, low, high) = if size == 2 {
        let low = cpu.load::<u16>(va)? as i16;
        let high = cpu.load::<u16>(va.wrapping_add(2))? as i16;
        (i32::from(cpu.reg::<u16>(op.reg) as i16), i32::from(low), i32::from(high))
    } else {
        let low = cpu.load::<u32>(va)? as i32;
        let high = cpu.load::<u32>(va.wrapping_add(4))? as i32;
        (cpu.reg::<u32>(op.reg) as i32, low, high)
    };
    if index < low || index > high { cpu.raise(vector::BR) } else { Ok(()) }
}

// ---- identification, time, model-specific registers ----

fn cpuid(cpu: &mut Cpu, op: &Op) -> Step {
    crate::lend::note_trapped(cpu, cpu.op_rip(op));
    let [eax, ebx, ecx, edx] = cpu.cpuid(cpu.regs[RAX] as u32, cpu.regs[RCX] as u32);
    cpu.regs[RAX] = u64::from(eax);
    cpu.regs[RBX] = u64::from(ebx);
    cpu.regs[RCX] = u64::from(ecx);
    cpu.regs[RDX] = u64::from(edx);
    Ok(())
}

fn set_pair(cpu: &mut Cpu, value: u64) {
    cpu.regs[RAX] = value & 0xffff_ffff;
    cpu.regs[RDX] = value >> 32;
}

fn rdtsc(cpu: &mut Cpu, _op: &Op) -> Step {
    if cpu.cr4 & cr4::TSD != 0 && cpu.cpl != 0 {
        return cpu.raise_gp();
    }
    let value = cpu.tsc();
    set_pair(cpu, value);
    Ok(())
}

fn rdtscp(cpu: &mut Cpu, op: &Op) -> Step {
    if !cpu.features.has(Features::RDTSCP) {
        return cpu.raise_ud();
    }
    rdtsc(cpu, op)?;
    cpu.regs[RCX] = cpu.msrs.tsc_aux & 0xffff_ffff;
    Ok(())
}

/// There are no performance counters.
fn rdpmc(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.raise_gp()
}

fn rdpid(cpu: &mut Cpu, op: &Op) -> Step {
    if !cpu.features.has(Features::RDPID) {
        return cpu.raise_ud();
    }
    let value = cpu.msrs.tsc_aux;
    set_register(cpu, op, value);
    Ok(())
}

fn rdmsr(cpu: &mut Cpu, _op: &Op) -> Step {
    privileged(cpu)?;
    let value = cpu.read_msr(cpu.regs[RCX] as u32)?;
    set_pair(cpu, value);
    Ok(())
}

fn wrmsr(cpu: &mut Cpu, op: &Op) -> Step {
    privileged(cpu)?;
    let value = (cpu.regs[RDX] << 32) | (cpu.regs[RAX] & 0xffff_ffff);
    cpu.write_msr(cpu.regs[RCX] as u32, value)?;
    cpu.end_block(op)
}

fn xgetbv(cpu: &mut Cpu, op: &Op) -> Step {
    crate::lend::note_trapped(cpu, cpu.op_rip(op));
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return cpu.raise_ud();
    }
    let value = match cpu.regs[RCX] as u32 {
        0 => cpu.xcr0,
        1 if cpu.features.has(Features::XGETBV1) => cpu.xcr0 & cpu.fpu.in_use(),
        _ => return cpu.raise_gp(),
    };
    set_pair(cpu, value);
    Ok(())
}

fn xsetbv(cpu: &mut Cpu, op: &Op) -> Step {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return cpu.raise_ud();
    }
    privileged(cpu)?;
    let value = (cpu.regs[RDX] << 32) | (cpu.regs[RAX] & 0xffff_ffff);
    // x87 is always on; AVX needs SSE.
    let valid = value & 1 != 0 && value & !7 == 0 && (value & 4 == 0 || value & 2 != 0);
    if cpu.regs[RCX] as u32 != 0 || !valid {
        return cpu.raise_gp();
    }
    cpu.xcr0 = value;
    cpu.fpu_mode_changed();
    cpu.end_block(op)
}

// ---- HLT, caches, look-aside buffers ----

fn hlt(cpu: &mut Cpu, op: &Op) -> Step {
    privileged(cpu)?;
    cpu.mp_state = MpState::Halted;
    cpu.attention = true;
    cpu.end_block(op)
}

fn invlpg(cpu: &mut Cpu, op: &Op) -> Step {
    privileged(cpu)?;
    let va = cpu.effective(op).wrapping_add(cpu.flat_base(usize::from(op.seg)));
    let va = if cpu.code64() { va } else { va & 0xffff_ffff };
    cpu.mmu.flush_page(va);
    cpu.end_block(op)
}

/// INVPCID (Intel SDM volume 2). Address spaces are not told apart: each kind forgets more than it has to.
fn invpcid(cpu: &mut Cpu, op: &Op) -> Step {
    privileged(cpu)?;
    if cpu.real_mode() || cpu.v86() {
        return cpu.raise_ud();
    }
    let kind = if op.aux == 8 { cpu.reg::<u64>(op.reg) } else { u64::from(cpu.reg::<u32>(op.reg)) };
    let va = cpu.addr(op, 16, Intent::Read)?;
    let identifier = cpu.load::<u64>(va)?;
    let address = cpu.load::<u64>(va.wrapping_add(8))?;
    let named = matches!(kind, 0 | 1);
    if kind > 3
        || (kind != 2 && kind != 3 && identifier >> 12 != 0)
        || (named && identifier != 0 && cpu.cr4 & cr4::PCIDE == 0)
        || (kind == 0 && !cpu.canonical(address))
    {
        return cpu.raise_gp();
    }
    if kind == 0 {
        cpu.mmu.flush_page(address)
    } else {
        cpu.mmu.flush()
    }
    cpu.end_block(op)
}

/// RDRAND and RDSEED: CF says whether there was a number; without one the register is zero.
fn random<const SEED: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    let number = crate::native::random::number(SEED);
    set_register(cpu, op, number.unwrap_or(0));
    cpu.flags = Flags::from_rflags(u64::from(number.is_some()));
    Ok(())
}

/// INVD and WBINVD: there is no cache to write back.
fn write_back(cpu: &mut Cpu, _op: &Op) -> Step {
    privileged(cpu)
}

/// CLFLUSH and its kin fault as a load would, and touch no device.
fn flush_line(cpu: &mut Cpu, op: &Op) -> Step {
    let va = cpu.addr(op, 1, Intent::Read)?;
    let rights = cpu.mmu.rights;
    match cpu.place(va, rights, Intent::Read)? {
        Place::Ram(_) | Place::Device(_) => Ok(()),
    }
}
