//! Transfers to other code segments and privilege levels: far JMP, CALL and RET, IRET, SYSCALL, SYSENTER and
//! their returns (Intel SDM volume 2; volume 3, 5.8).

use harrier_engine::cpu_state::Segment;
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use crate::cpu::{CS, Cpu, DS, ES, FS, GS, R11, RCX, RDX, RSP, SS, cr0, efer, rflags};
use crate::decode::Mode;
use crate::decode::lower::Selected;
use crate::decode::op::{Exec, Op, Step, Stop};
use crate::descriptor::{Descriptor, Frame, flat, is_null, system, unusable};
use crate::exception::dr6;
use crate::fault::vector;
use crate::mmu::Intent;
use crate::task::Cause;

/// In [`Op::aux`]: operand size in bytes; this bit marks a CALL.
const CALL: u16 = 0x100;

pub(crate) fn select(instruction: &Instruction, op: &mut Op, mode: Mode) -> Option<Selected> {
    use Code as C;
    let (exec, aux): (Exec, u16) = match instruction.code() {
        C::Jmp_ptr1616 | C::Jmp_ptr1632 | C::Call_ptr1616 | C::Call_ptr1632 => {
            let call = matches!(instruction.code(), C::Call_ptr1616 | C::Call_ptr1632);
            let (size, offset) = if instruction.op0_kind() == OpKind::FarBranch16 {
                (2, u64::from(instruction.far_branch16()))
            } else {
                (4, u64::from(instruction.far_branch32()))
            };
            op.imm = offset | u64::from(instruction.far_branch_selector()) << 32;
            (far_immediate, size | if call { CALL } else { 0 })
        }
        C::Jmp_m1616 => (far_memory, 2),
        C::Jmp_m1632 => (far_memory, 4),
        C::Jmp_m1664 => (far_memory, 8),
        C::Call_m1616 => (far_memory, 2 | CALL),
        C::Call_m1632 => (far_memory, 4 | CALL),
        C::Call_m1664 => (far_memory, 8 | CALL),
        C::Retfw | C::Retfw_imm16 => (far_return, 2),
        C::Retfd | C::Retfd_imm16 => (far_return, 4),
        C::Retfq | C::Retfq_imm16 => (far_return, 8),
        C::Iretw => (iret, 2),
        C::Iretd => (iret, 4),
        C::Iretq => (iret, 8),
        C::Sysretd => (sysret, 4),
        C::Sysretq => (sysret, 8),
        C::Sysexitd => (sysexit, 4),
        C::Sysexitq => (sysexit, 8),
        _ => match instruction.mnemonic() {
            Mnemonic::Syscall => (syscall, 0),
            Mnemonic::Sysenter => (sysenter, 0),
            _ => return None,
        },
    };
    op.aux = aux;
    if matches!(instruction.code(), C::Retfw | C::Retfd | C::Retfq) {
        op.imm = 0;
    }
    if matches!(instruction.mnemonic(), Mnemonic::Retf | Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq) {
        op.seg = if mode == Mode::Bits64 { crate::decode::op::SEG_FLAT_STACK } else { SS as u8 };
    }
    Selected::end(exec)
}

/// Loads CS as real-address and virtual-8086 mode do.
pub(crate) fn real_code(cpu: &Cpu, selector: u16) -> Segment {
    Segment { selector, base: u64::from(selector) << 4, ..cpu.seg[CS] }
}

/// A segment register of virtual-8086 mode.
pub(crate) fn v86_segment(selector: u16) -> Segment {
    Segment {
        selector,
        base: u64::from(selector) << 4,
        limit: 0xffff,
        kind: 3,
        code_or_data: true,
        dpl: 3,
        present: true,
        ..Segment::default()
    }
}

fn far_immediate(cpu: &mut Cpu, op: &Op) -> Step {
    transfer(cpu, op, (op.imm >> 32) as u16, op.imm & 0xffff_ffff)
}

fn far_memory(cpu: &mut Cpu, op: &Op) -> Step {
    let size = op.aux & 0xff;
    let va = cpu.addr(op, u64::from(size) + 2, Intent::Read)?;
    let offset = match size {
        2 => u64::from(cpu.load::<u16>(va)?),
        4 => u64::from(cpu.load::<u32>(va)?),
        _ => cpu.load::<u64>(va)?,
    };
    let selector = cpu.load::<u16>(va.wrapping_add(u64::from(size)))?;
    transfer(cpu, op, selector, offset)
}

/// Far JMP or CALL.
fn transfer(cpu: &mut Cpu, op: &Op, selector: u16, offset: u64) -> Step {
    let (size, call) = ((op.aux & 0xff) as u8, op.aux & CALL != 0);
    if cpu.real_mode() || cpu.v86() {
        if offset > u64::from(cpu.seg[CS].limit) {
            return cpu.raise_gp();
        }
        if call {
            push_return(cpu, op, size)?;
        }
        cpu.seg[CS] = real_code(cpu, selector);
        cpu.rip = offset;
        cpu.mode_changed();
        return Err(Stop::Block);
    }
    if is_null(selector) {
        return cpu.raise_gp();
    }
    let target = cpu.descriptor(selector, vector::GP, 0)?;
    if !target.code_or_data() {
        return through_gate(cpu, op, target, call);
    }
    let allowed = target.is_code()
        && if target.conforming() {
            target.dpl() <= cpu.cpl
        } else {
            target.rpl() <= cpu.cpl && target.dpl() == cpu.cpl
        };
    if !allowed {
        return cpu.raise_with(vector::GP, target.error());
    }
    check_code(cpu, &target, offset)?;
    let mut frame = Frame::current(cpu);
    if call {
        frame.push(cpu, u64::from(cpu.seg[CS].selector), size)?;
        let next = cpu.next_rip(op);
        frame.push(cpu, next, size)?;
    }
    cpu.mark_accessed(&target)?;
    frame.commit(cpu)?;
    if call {
        cpu.set_stack_pointer(frame.sp);
    }
    let cpl = cpu.cpl;
    arrive(cpu, &target, cpl, offset);
    Err(Stop::Block)
}

fn push_return(cpu: &mut Cpu, op: &Op, size: u8) -> Step {
    let mut frame = Frame::current(cpu);
    frame.push(cpu, u64::from(cpu.seg[CS].selector), size)?;
    let next = cpu.next_rip(op);
    frame.push(cpu, next, size)?;
    frame.commit(cpu)?;
    cpu.set_stack_pointer(frame.sp);
    Ok(())
}

/// Present, of a valid size, and the offset inside it.
fn check_code(cpu: &mut Cpu, code: &Descriptor, offset: u64) -> Step {
    let wide = cpu.long_mode() && code.long();
    if wide && code.db() {
        return cpu.raise_with(vector::GP, code.error());
    }
    if !code.present() {
        return cpu.raise_with(vector::NP, code.error());
    }
    let inside = if wide { cpu.canonical(offset) } else { offset <= u64::from(code.limit()) };
    if inside { Ok(()) } else { cpu.raise_gp() }
}

/// Takes over the code segment with RPL = CPL, and RIP.
fn arrive(cpu: &mut Cpu, code: &Descriptor, cpl: u8, rip: u64) {
    let mut segment = code.segment();
    segment.selector = (code.selector & !3) | u16::from(cpl);
    cpu.rip = rip;
    cpu.enter_code(segment, cpl);
}

/// Far JMP or CALL whose selector names a system descriptor.
fn through_gate(cpu: &mut Cpu, op: &Op, gate: Descriptor, call: bool) -> Step {
    let kind = gate.kind();
    let long = cpu.long_mode();
    let known = match kind {
        system::CALL_GATE => true,
        system::CALL_GATE16 | system::TASK_GATE | system::TSS16_AVAILABLE | system::TSS_AVAILABLE => !long,
        _ => false,
    };
    if !known || gate.dpl() < cpu.cpl || gate.dpl() < gate.rpl() {
        return cpu.raise_with(vector::GP, gate.error());
    }
    let high = if long { cpu.descriptor_high(&gate)? } else { 0 };
    if !gate.present() {
        return cpu.raise_with(vector::NP, gate.error());
    }
    if !matches!(kind, system::CALL_GATE | system::CALL_GATE16) {
        let selector = if kind == system::TASK_GATE { (gate.raw >> 16) as u16 } else { gate.selector };
        let cause = if call { Cause::Call } else { Cause::Jump };
        return to_task(cpu, op, selector, cause);
    }
    let wide = kind == system::CALL_GATE;
    let selector = (gate.raw >> 16) as u16;
    let mut offset = (gate.raw & 0xffff) | (gate.raw >> 48) << 16 | (high & 0xffff_ffff) << 32;
    if !wide {
        offset &= 0xffff;
    }
    if is_null(selector) {
        return cpu.raise_gp();
    }
    let code = cpu.descriptor(selector, vector::GP, 0)?;
    let more_privilege = !code.conforming() && code.dpl() < cpu.cpl;
    if !code.is_code()
        || code.dpl() > cpu.cpl
        || (!call && more_privilege)
        || (long && (!code.long() || code.db()))
    {
        return cpu.raise_with(vector::GP, code.error());
    }
    check_code(cpu, &code, offset)?;
    let size = if long {
        8
    } else if wide {
        4
    } else {
        2
    };
    let old_cs = u64::from(cpu.seg[CS].selector);
    let next = cpu.next_rip(op);
    if call && more_privilege {
        let cpl = code.dpl();
        let mut new_stack = None;
        let mut frame = if long {
            let rsp = cpu.task_stack64(4 + 8 * u64::from(cpl), 0)?;
            Frame::other(cpu, cpu.seg[SS], rsp, cpl, true, 0)
        } else {
            let (selector, sp) = cpu.task_stack(cpl, 0)?;
            let stack = cpu.stack_descriptor(selector, cpl, vector::TS, 0)?;
            new_stack = Some(stack);
            Frame::other(cpu, stack.segment(), sp, cpl, false, stack.error())
        };
        frame.push(cpu, u64::from(cpu.seg[SS].selector), size)?;
        frame.push(cpu, cpu.regs[RSP], size)?;
        if !long {
            let parameters = gate.raw >> 32 & 0x1f;
            for index in (0..parameters).rev() {
                let value = cpu.peek_stack(index * u64::from(size), size)?;
                frame.push(cpu, value, size)?;
            }
        }
        frame.push(cpu, old_cs, size)?;
        frame.push(cpu, next, size)?;
        cpu.mark_accessed(&code)?;
        if let Some(stack) = &new_stack {
            cpu.mark_accessed(stack)?;
        }
        frame.commit(cpu)?;
        match new_stack {
            Some(stack) => {
                cpu.seg[SS] = stack.segment();
                cpu.set_stack_pointer(frame.sp);
            }
            None => {
                cpu.seg[SS] = unusable(u16::from(cpl));
                cpu.regs[RSP] = frame.sp;
            }
        }
        arrive(cpu, &code, cpl, offset);
        return Err(Stop::Block);
    }
    let mut frame = Frame::current(cpu);
    if call {
        if long {
            // A gate leads to 64-bit code: its stack is flat.
            frame = Frame::other(cpu, cpu.seg[SS], cpu.regs[RSP] & cpu.stack_mask(), cpu.cpl, true, 0);
        }
        frame.push(cpu, old_cs, size)?;
        frame.push(cpu, next, size)?;
    }
    cpu.mark_accessed(&code)?;
    frame.commit(cpu)?;
    let cpl = cpu.cpl;
    arrive(cpu, &code, cpl, offset);
    if call {
        cpu.set_stack_pointer(frame.sp);
    }
    Err(Stop::Block)
}

/// Switches to another task; the present one goes on after this instruction.
fn to_task(cpu: &mut Cpu, op: &Op, selector: u16, cause: Cause) -> Step {
    let next = cpu.next_rip(op);
    // Only whole: the stores of the switch do not stop for code in their pages.
    let alone = std::mem::replace(&mut cpu.alone, true);
    let done = cpu.switch_task(selector, cause, next, None, 0);
    cpu.alone = alone;
    done?;
    if cause == Cause::Return {
        cpu.nmi_masked = false;
    }
    cpu.step_trap = false;
    cpu.update_attention();
    Err(Stop::Block)
}

fn far_return(cpu: &mut Cpu, op: &Op) -> Step {
    let size = (op.aux & 0xff) as u8;
    let bytes = u64::from(size);
    let rip = cpu.peek_stack(0, size)?;
    let selector = cpu.peek_stack(bytes, size)? as u16;
    let released = 2 * bytes + (op.imm & 0xffff);
    if cpu.real_mode() || cpu.v86() {
        if rip > u64::from(cpu.seg[CS].limit) {
            return cpu.raise_gp();
        }
        cpu.set_stack_pointer(cpu.regs[RSP].wrapping_add(released));
        cpu.seg[CS] = real_code(cpu, selector);
        cpu.rip = rip;
        cpu.mode_changed();
        return Err(Stop::Block);
    }
    let code = return_code(cpu, selector)?;
    let cpl = code.rpl();
    if cpl == cpu.cpl {
        check_code(cpu, &code, rip)?;
        cpu.mark_accessed(&code)?;
        cpu.set_stack_pointer(cpu.regs[RSP].wrapping_add(released));
        arrive(cpu, &code, cpl, rip);
        return Err(Stop::Block);
    }
    let sp = cpu.peek_stack(released, size)?;
    let ss = cpu.peek_stack(released + bytes, size)? as u16;
    let stack = return_stack(cpu, &code, ss)?;
    check_code(cpu, &code, rip)?;
    accessed(cpu, &code, stack.as_ref())?;
    leave_outwards(cpu, &code, stack, ss, sp.wrapping_add(op.imm & 0xffff), rip);
    Err(Stop::Block)
}

/// Checks the code segment that a return goes to.
fn return_code(cpu: &mut Cpu, selector: u16) -> Result<Descriptor, Stop> {
    if is_null(selector) {
        return cpu.raise_gp();
    }
    let code = cpu.descriptor(selector, vector::GP, 0)?;
    let rpl = code.rpl();
    let level = if code.conforming() { code.dpl() <= rpl } else { code.dpl() == rpl };
    if !code.is_code() || rpl < cpu.cpl || !level || (cpu.long_mode() && code.long() && code.db()) {
        return cpu.raise_with(vector::GP, code.error());
    }
    if !code.present() {
        return cpu.raise_with(vector::NP, code.error());
    }
    Ok(code)
}

/// Checks the stack segment that a return loads; `None` is a null one, which 64-bit code may have.
fn return_stack(cpu: &mut Cpu, code: &Descriptor, selector: u16) -> Result<Option<Descriptor>, Stop> {
    let cpl = code.rpl();
    if is_null(selector) && cpu.long_mode() && code.long() && cpl != 3 && (selector & 3) as u8 == cpl {
        return Ok(None);
    }
    cpu.stack_descriptor(selector, cpl, vector::GP, 0).map(Some)
}

fn accessed(cpu: &mut Cpu, code: &Descriptor, stack: Option<&Descriptor>) -> Step {
    cpu.mark_accessed(code)?;
    match stack {
        Some(stack) => cpu.mark_accessed(stack),
        None => Ok(()),
    }
}

/// Loads CS, SS and the stack pointer; data segments that the new level may not use become null.
fn leave_outwards(cpu: &mut Cpu, code: &Descriptor, stack: Option<Descriptor>, ss: u16, sp: u64, rip: u64) {
    let (before, cpl) = (cpu.cpl, code.rpl());
    cpu.seg[SS] = stack.map_or(unusable(ss), |stack| stack.segment());
    if cpl > before {
        drop_privileged_segments(cpu, cpl);
    }
    arrive(cpu, code, cpl, rip);
    if cpu.code64() {
        cpu.regs[RSP] = sp;
    } else {
        cpu.set_stack_pointer(sp);
    }
    cpu.update_attention();
}

fn drop_privileged_segments(cpu: &mut Cpu, cpl: u8) {
    for index in [ES, DS, FS, GS] {
        let segment = cpu.seg[index];
        let conforming = segment.code_or_data && segment.kind & 0xc == 0xc;
        if !segment.unusable && segment.dpl < cpl && !conforming {
            // The base stays: FS and GS are still used with it.
            cpu.seg[index] = Segment { base: segment.base, ..unusable(0) };
        }
    }
}

/// Bits of RFLAGS that IRET may change at this privilege level, for an operand size in bytes.
fn iret_mask(cpu: &Cpu, size: u8) -> u64 {
    let mut mask = crate::native::alu::Flags::MASK
        | rflags::TF
        | rflags::DF
        | rflags::NT
        | rflags::RF
        | rflags::AC
        | rflags::ID;
    if cpu.cpl <= cpu.iopl() {
        mask |= rflags::IF;
    }
    if cpu.cpl == 0 {
        mask |= rflags::IOPL | rflags::VIF | rflags::VIP;
    }
    if size == 2 { mask & 0xffff } else { mask }
}

/// Replaces the bits of `mask`; RF only lives while there are breakpoints for it to hold back.
fn merge_flags(cpu: &mut Cpu, value: u64, mask: u64) {
    let mut merged = (cpu.rflags() & !mask) | (value & mask);
    if cpu.dr7 & 0xff == 0 {
        merged &= !rflags::RF;
    }
    cpu.load_rflags(merged);
}

fn iret(cpu: &mut Cpu, op: &Op) -> Step {
    let size = (op.aux & 0xff) as u8;
    let bytes = u64::from(size);
    if cpu.v86() && cpu.iopl() < 3 {
        return cpu.raise_gp();
    }
    if !cpu.real_mode() && !cpu.v86() && cpu.rflags & rflags::NT != 0 {
        if cpu.long_mode() {
            return cpu.raise_gp();
        }
        let link = cpu.load_system::<u16>(cpu.tr.base & 0xffff_ffff)?;
        return to_task(cpu, op, link, Cause::Return);
    }
    let rip = cpu.peek_stack(0, size)?;
    let selector = cpu.peek_stack(bytes, size)? as u16;
    let flags = cpu.peek_stack(2 * bytes, size)?;
    if cpu.real_mode() || cpu.v86() {
        if rip > u64::from(cpu.seg[CS].limit) {
            return cpu.raise_gp();
        }
        let mut mask = iret_mask(cpu, size);
        if cpu.v86() {
            mask &= !(rflags::IOPL | rflags::VIF | rflags::VIP);
        }
        cpu.set_stack_pointer(cpu.regs[RSP].wrapping_add(3 * bytes));
        cpu.seg[CS] = real_code(cpu, selector);
        cpu.rip = rip;
        merge_flags(cpu, flags, mask);
        cpu.mode_changed();
    } else if flags & rflags::VM != 0 && cpu.cpl == 0 && size == 4 && !cpu.long_mode() {
        return_to_v86(cpu, rip, selector, flags)?;
    } else {
        let code = return_code(cpu, selector)?;
        let mask = iret_mask(cpu, size);
        if code.rpl() != cpu.cpl || cpu.code64() {
            let sp = cpu.peek_stack(3 * bytes, size)?;
            let ss = cpu.peek_stack(4 * bytes, size)? as u16;
            let stack = return_stack(cpu, &code, ss)?;
            check_code(cpu, &code, rip)?;
            accessed(cpu, &code, stack.as_ref())?;
            merge_flags(cpu, flags, mask);
            leave_outwards(cpu, &code, stack, ss, sp, rip);
        } else {
            check_code(cpu, &code, rip)?;
            cpu.mark_accessed(&code)?;
            cpu.set_stack_pointer(cpu.regs[RSP].wrapping_add(3 * bytes));
            merge_flags(cpu, flags, mask);
            arrive(cpu, &code, code.rpl(), rip);
        }
    }
    cpu.nmi_masked = false;
    cpu.update_attention();
    Err(Stop::Block)
}

/// IRET to virtual-8086 mode (Intel SDM volume 3, 20.2.4).
fn return_to_v86(cpu: &mut Cpu, rip: u64, selector: u16, flags: u64) -> Step {
    let mut words = [0; 6];
    for (index, word) in words.iter_mut().enumerate() {
        *word = cpu.peek_stack(12 + 4 * index as u64, 4)?;
    }
    if rip > 0xffff {
        return cpu.raise_gp();
    }
    let [sp, ss, es, ds, fs, gs] = words;
    for (index, value) in [(SS, ss), (ES, es), (DS, ds), (FS, fs), (GS, gs)] {
        cpu.seg[index] = v86_segment(value as u16);
    }
    cpu.regs[RSP] = sp;
    cpu.rip = rip;
    cpu.seg[CS] = v86_segment(selector);
    cpu.cpl = 3;
    let mask = iret_mask(cpu, 4) | rflags::IF | rflags::IOPL | rflags::VM | rflags::VIF | rflags::VIP;
    merge_flags(cpu, flags, mask);
    cpu.mode_changed();
    Ok(())
}

fn syscall(cpu: &mut Cpu, op: &Op) -> Step {
    if cpu.efer & efer::SCE == 0 || cpu.cr0 & cr0::PE == 0 {
        return cpu.raise_ud();
    }
    let next = cpu.next_rip(op);
    let selector = (cpu.msrs.star >> 32) as u16 & !3;
    if cpu.long_mode() {
        let code64 = cpu.code64();
        let flags = cpu.rflags() & !rflags::RF;
        cpu.regs[RCX] = next;
        cpu.regs[R11] = flags;
        cpu.rip = if code64 { cpu.msrs.lstar } else { cpu.msrs.cstar };
        cpu.load_rflags(flags & !(cpu.msrs.sfmask & 0xffff_ffff));
    } else {
        cpu.regs[RCX] = next;
        cpu.rip = cpu.msrs.star & 0xffff_ffff;
        cpu.rflags &= !(rflags::IF | rflags::VM | rflags::RF);
    }
    cpu.seg[SS] = flat(selector.wrapping_add(8), 0, false, false);
    let code = flat(selector, 0, true, cpu.long_mode());
    cpu.enter_code(code, 0);
    trap_by_new_flags(cpu);
    Err(Stop::Block)
}

/// After SYSCALL and SYSRET a single-step trap follows when they leave TF set, whatever it was before.
fn trap_by_new_flags(cpu: &mut Cpu) {
    cpu.step_trap = false;
    if cpu.rflags & rflags::TF != 0 {
        cpu.debug_trap |= dr6::BS;
    }
    cpu.update_attention();
}

fn sysret(cpu: &mut Cpu, op: &Op) -> Step {
    if cpu.efer & efer::SCE == 0 {
        return cpu.raise_ud();
    }
    if cpu.cr0 & cr0::PE == 0 || cpu.cpl != 0 {
        return cpu.raise_gp();
    }
    let wide = op.aux == 8 && cpu.code64();
    let base = (cpu.msrs.star >> 48) as u16;
    let rip = if wide { cpu.regs[RCX] } else { cpu.regs[RCX] & 0xffff_ffff };
    if !cpu.canonical(rip) {
        return cpu.raise_gp();
    }
    if cpu.long_mode() {
        let mask = crate::native::alu::Flags::MASK
            | rflags::TF
            | rflags::IF
            | rflags::DF
            | rflags::IOPL
            | rflags::NT
            | rflags::AC
            | rflags::VIF
            | rflags::VIP
            | rflags::ID;
        let flags = cpu.regs[R11] & mask;
        cpu.load_rflags(flags);
    } else {
        cpu.rflags |= rflags::IF;
    }
    cpu.rip = rip;
    cpu.seg[SS] = flat(base.wrapping_add(8) | 3, 3, false, false);
    let selector = if wide { base.wrapping_add(16) } else { base } | 3;
    cpu.enter_code(flat(selector, 3, true, wide), 3);
    trap_by_new_flags(cpu);
    Err(Stop::Block)
}

fn sysenter(cpu: &mut Cpu, _op: &Op) -> Step {
    let selector = cpu.msrs.sysenter_cs as u16 & !3;
    if cpu.real_mode() || selector == 0 {
        return cpu.raise_gp();
    }
    let long = cpu.long_mode();
    let cut = |value: u64| if long { value } else { value & 0xffff_ffff };
    cpu.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
    cpu.regs[RSP] = cut(cpu.msrs.sysenter_esp);
    cpu.rip = cut(cpu.msrs.sysenter_eip);
    cpu.seg[SS] = flat(selector.wrapping_add(8), 0, false, false);
    cpu.enter_code(flat(selector, 0, true, long), 0);
    cpu.update_attention();
    Err(Stop::Block)
}

fn sysexit(cpu: &mut Cpu, op: &Op) -> Step {
    let base = cpu.msrs.sysenter_cs as u16 & !3;
    if cpu.real_mode() || base == 0 || cpu.cpl != 0 {
        return cpu.raise_gp();
    }
    let wide = op.aux == 8 && cpu.long_mode();
    let cut = |value: u64| if wide { value } else { value & 0xffff_ffff };
    let (rip, rsp) = (cut(cpu.regs[RDX]), cut(cpu.regs[RCX]));
    if !cpu.canonical(rip) || !cpu.canonical(rsp) {
        return cpu.raise_gp();
    }
    let offset = if wide { 32 } else { 16 };
    cpu.regs[RSP] = rsp;
    cpu.rip = rip;
    cpu.seg[SS] = flat(base.wrapping_add(offset + 8) | 3, 3, false, false);
    cpu.enter_code(flat(base.wrapping_add(offset) | 3, 3, true, wide), 3);
    cpu.update_attention();
    Err(Stop::Block)
}
