//! Segment registers and descriptor tables: loads and stores of selectors, LGDT and its kin, LAR, LSL, VERR,
//! VERW, ARPL, SWAPGS, RDFSBASE and WRFSBASE (Intel SDM volume 2; volume 3, 5.4 to 5.6).

use harrier_engine::cpu_state::{DescriptorTable, Segment};
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::far::v86_segment;
use crate::cpu::{Cpu, DS, ES, FS, GS, RSP, SS, cr4};
use crate::decode::Mode;
use crate::decode::lower::{Selected, segment_index};
use crate::decode::op::{Exec, Op, SEG_FLAT_STACK, Step};
use crate::descriptor::{is_null, system, unusable};
use crate::fault::vector;
use crate::mmu::Intent;
use crate::native::alu::Flags;

/// In [`Op::aux`]: the operand is in memory.
const MEMORY: u16 = 0x100;

pub(crate) fn select(instruction: &Instruction, op: &mut Op, mode: Mode) -> Option<Selected> {
    let memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
    let place = if memory { MEMORY } else { 0 };
    let first = if instruction.op_count() > 0 && instruction.op0_kind() == OpKind::Register {
        instruction.op0_register()
    } else {
        Register::None
    };
    let size = first.size() as u16;
    let go_on = |op: &mut Op, exec: Exec, aux: u16| {
        op.aux = aux;
        Selected::go_on(exec)
    };
    let end = |op: &mut Op, exec: Exec, aux: u16| {
        op.aux = aux;
        Selected::end(exec)
    };
    match instruction.mnemonic() {
        Mnemonic::Mov if first.is_segment_register() => {
            let source = instruction.op1_register();
            op.reg = segment_index(first) as u8;
            if !memory {
                op.rm = crate::decode::lower::slot(source);
            }
            end(op, load_segment, place)
        }
        Mnemonic::Mov
            if instruction.op1_kind() == OpKind::Register
                && instruction.op1_register().is_segment_register() =>
        {
            op.imm = segment_index(instruction.op1_register()) as u64;
            go_on(op, store_segment, place | size)
        }
        Mnemonic::Push if first.is_segment_register() => {
            op.reg = segment_index(first) as u8;
            op.seg = stack_slot(mode);
            let wide = instruction.code() as u32;
            go_on(op, push_segment, push_size(wide, mode))
        }
        Mnemonic::Pop if first.is_segment_register() => {
            op.reg = segment_index(first) as u8;
            op.seg = stack_slot(mode);
            let wide = instruction.code() as u32;
            end(op, pop_segment, push_size(wide, mode))
        }
        Mnemonic::Lds => load_far_pointer(op, DS, size),
        Mnemonic::Les => load_far_pointer(op, ES, size),
        Mnemonic::Lss => load_far_pointer(op, SS, size),
        Mnemonic::Lfs => load_far_pointer(op, FS, size),
        Mnemonic::Lgs => load_far_pointer(op, GS, size),
        Mnemonic::Lgdt => end(op, load_table::<false>, table_size(instruction.code())),
        Mnemonic::Lidt => end(op, load_table::<true>, table_size(instruction.code())),
        Mnemonic::Sgdt => go_on(op, store_table::<false>, table_size(instruction.code())),
        Mnemonic::Sidt => go_on(op, store_table::<true>, table_size(instruction.code())),
        Mnemonic::Lldt => end(op, lldt, place),
        Mnemonic::Ltr => end(op, ltr, place),
        Mnemonic::Sldt => go_on(op, store_system_selector::<false>, place | size),
        Mnemonic::Str => go_on(op, store_system_selector::<true>, place | size),
        Mnemonic::Lar => go_on(op, lar, place | size),
        Mnemonic::Lsl => go_on(op, lsl, place | size),
        Mnemonic::Verr => go_on(op, verify::<false>, place),
        Mnemonic::Verw => go_on(op, verify::<true>, place),
        Mnemonic::Arpl => go_on(op, arpl, place),
        Mnemonic::Swapgs => go_on(op, swapgs, 0),
        Mnemonic::Rdfsbase => go_on(op, read_base, size | (FS as u16) << 9),
        Mnemonic::Rdgsbase => go_on(op, read_base, size | (GS as u16) << 9),
        Mnemonic::Wrfsbase => go_on(op, write_base, size | (FS as u16) << 9),
        Mnemonic::Wrgsbase => go_on(op, write_base, size | (GS as u16) << 9),
        _ => None,
    }
}

fn load_far_pointer(op: &mut Op, index: usize, size: u16) -> Option<Selected> {
    op.aux = size;
    op.imm = index as u64;
    Selected::end(load_pointer)
}

fn stack_slot(mode: Mode) -> u8 {
    if mode == Mode::Bits64 { SEG_FLAT_STACK } else { SS as u8 }
}

/// Operand size of PUSH and POP of a segment register in bytes.
fn push_size(code: u32, mode: Mode) -> u16 {
    use Code as C;
    let word = [
        C::Pushw_ES,
        C::Pushw_CS,
        C::Pushw_SS,
        C::Pushw_DS,
        C::Pushw_FS,
        C::Pushw_GS,
        C::Popw_ES,
        C::Popw_CS,
        C::Popw_SS,
        C::Popw_DS,
        C::Popw_FS,
        C::Popw_GS,
    ];
    if word.iter().any(|&c| c as u32 == code) {
        2
    } else if mode == Mode::Bits64 {
        8
    } else {
        4
    }
}

/// Bytes of the base in a table operand.
fn table_size(code: Code) -> u16 {
    use Code as C;
    match code {
        C::Lgdt_m1632_16 | C::Lidt_m1632_16 | C::Sgdt_m1632_16 | C::Sidt_m1632_16 => 3,
        C::Lgdt_m1664 | C::Lidt_m1664 | C::Sgdt_m1664 | C::Sidt_m1664 => 8,
        _ => 4,
    }
}

/// A selector operand: a register or 16 bits in memory.
fn selector_operand(cpu: &mut Cpu, op: &Op, register: u8) -> Result<u16, crate::decode::op::Stop> {
    if op.aux & MEMORY != 0 { cpu.load_op::<u16>(op) } else { Ok(cpu.reg::<u16>(register)) }
}

/// Stores a selector: 16 bits to memory, the operand size to a register.
fn store_selector(cpu: &mut Cpu, op: &Op, value: u64) -> Step {
    if op.aux & MEMORY != 0 {
        return cpu.store_op(op, value as u16);
    }
    match op.aux & 0xff {
        2 => cpu.set_reg(op.reg, value as u16),
        4 => cpu.set_reg(op.reg, value as u32),
        _ => cpu.set_reg(op.reg, value),
    }
    Ok(())
}

impl Cpu {
    /// What a data or stack segment register holds after loading `selector`, with all checks and the accessed
    /// bit set in memory.
    fn checked_segment(&mut self, index: usize, selector: u16) -> Result<Segment, crate::decode::op::Stop> {
        if self.real_mode() {
            return Ok(Segment {
                selector,
                base: u64::from(selector) << 4,
                unusable: false,
                present: true,
                ..self.seg[index]
            });
        }
        if self.v86() {
            return Ok(v86_segment(selector));
        }
        if index == SS {
            if is_null(selector) {
                let allowed = self.code64() && self.cpl != 3 && (selector & 3) as u8 == self.cpl;
                return if allowed { Ok(unusable(selector)) } else { self.raise_gp() };
            }
            let stack = self.stack_descriptor(selector, self.cpl, vector::GP, 0)?;
            self.mark_accessed(&stack)?;
            return Ok(stack.segment());
        }
        if is_null(selector) {
            return Ok(unusable(selector));
        }
        let found = self.descriptor(selector, vector::GP, 0)?;
        let privileged = !found.conforming() && (found.rpl() > found.dpl() || self.cpl > found.dpl());
        if !found.readable() || privileged {
            return self.raise_with(vector::GP, found.error());
        }
        if !found.present() {
            return self.raise_with(vector::NP, found.error());
        }
        self.mark_accessed(&found)?;
        Ok(found.segment())
    }

    /// Puts a value that was checked into a segment register other than CS.
    fn put_segment(&mut self, index: usize, segment: Segment) {
        self.seg[index] = segment;
        self.seg_base[index] = if self.code64() && index < FS { 0 } else { segment.base };
        if index == SS {
            self.mov_ss_shadow = true;
            self.attention = true;
        }
    }
}

fn load_segment(cpu: &mut Cpu, op: &Op) -> Step {
    let selector = selector_operand(cpu, op, op.rm)?;
    let segment = cpu.checked_segment(usize::from(op.reg), selector)?;
    cpu.put_segment(usize::from(op.reg), segment);
    cpu.end_block(op)
}

fn store_segment(cpu: &mut Cpu, op: &Op) -> Step {
    let selector = u64::from(cpu.seg[op.imm as usize % 6].selector);
    store_selector(cpu, op, selector)
}

fn push_segment(cpu: &mut Cpu, op: &Op) -> Step {
    let selector = u64::from(cpu.seg[usize::from(op.reg)].selector);
    cpu.push_value(selector, op.aux as u8)
}

fn pop_segment(cpu: &mut Cpu, op: &Op) -> Step {
    let selector = cpu.peek_stack(0, op.aux as u8)? as u16;
    let after = cpu.regs[RSP].wrapping_add(u64::from(op.aux));
    let segment = cpu.checked_segment(usize::from(op.reg), selector)?;
    // The pointer moves in the stack that was popped from.
    cpu.set_stack_pointer(after);
    cpu.put_segment(usize::from(op.reg), segment);
    cpu.end_block(op)
}

fn load_pointer(cpu: &mut Cpu, op: &Op) -> Step {
    let size = u64::from(op.aux);
    let va = cpu.addr(op, size + 2, Intent::Read)?;
    let selector = cpu.load::<u16>(va.wrapping_add(size))?;
    let offset = match size {
        2 => u64::from(cpu.load::<u16>(va)?),
        4 => u64::from(cpu.load::<u32>(va)?),
        _ => cpu.load::<u64>(va)?,
    };
    let index = op.imm as usize % 6;
    let segment = cpu.checked_segment(index, selector)?;
    match size {
        2 => cpu.set_reg(op.reg, offset as u16),
        4 => cpu.set_reg(op.reg, offset as u32),
        _ => cpu.set_reg(op.reg, offset),
    }
    cpu.put_segment(index, segment);
    // LSS has no interrupt shadow of its own.
    cpu.mov_ss_shadow = false;
    cpu.end_block(op)
}

/// LGDT and LIDT. [`Op::aux`]: 3, 4 or 8 bytes of base.
fn load_table<const IDT: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    if cpu.cpl != 0 {
        return cpu.raise_gp();
    }
    let wide = op.aux == 8;
    let va = cpu.addr(op, if wide { 10 } else { 6 }, Intent::Read)?;
    let limit = cpu.load::<u16>(va)?;
    let at = va.wrapping_add(2);
    let base = match op.aux {
        8 => cpu.load::<u64>(at)?,
        3 => u64::from(cpu.load::<u32>(at)? & 0xff_ffff),
        _ => u64::from(cpu.load::<u32>(at)?),
    };
    if wide && !cpu.canonical(base) {
        return cpu.raise_gp();
    }
    let table = DescriptorTable { base, limit };
    if IDT {
        cpu.idtr = table;
    } else {
        cpu.gdtr = table;
    }
    cpu.end_block(op)
}

fn user_mode_prevented(cpu: &Cpu) -> bool {
    cpu.cr4 & cr4::UMIP != 0 && cpu.cpl > 0
}

fn store_table<const IDT: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    if user_mode_prevented(cpu) {
        return cpu.raise_gp();
    }
    let table = if IDT { cpu.idtr } else { cpu.gdtr };
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let size = if op.aux == 8 { 10 } else { 6 };
    let va = cpu.addr(op, size as u64, Intent::Write)?;
    cpu.write(va, &bytes[..size])
}

/// The instruction exists in protected mode only.
fn protected_only(cpu: &mut Cpu) -> Step {
    if cpu.real_mode() || cpu.v86() { cpu.raise_ud() } else { Ok(()) }
}

fn lldt(cpu: &mut Cpu, op: &Op) -> Step {
    protected_only(cpu)?;
    if cpu.cpl != 0 {
        return cpu.raise_gp();
    }
    let selector = selector_operand(cpu, op, op.reg)?;
    if is_null(selector) {
        cpu.ldtr = unusable(selector);
        return cpu.end_block(op);
    }
    let segment = system_segment(cpu, selector, &[system::LDT])?;
    cpu.ldtr = segment;
    cpu.end_block(op)
}

fn ltr(cpu: &mut Cpu, op: &Op) -> Step {
    protected_only(cpu)?;
    if cpu.cpl != 0 {
        return cpu.raise_gp();
    }
    let selector = selector_operand(cpu, op, op.reg)?;
    if is_null(selector) {
        return cpu.raise_gp();
    }
    let types: &[u8] = if cpu.long_mode() {
        &[system::TSS_AVAILABLE]
    } else {
        &[system::TSS_AVAILABLE, system::TSS16_AVAILABLE]
    };
    let mut segment = system_segment(cpu, selector, types)?;
    let found = cpu.descriptor(selector, vector::GP, 0)?;
    let access = (found.raw >> 40) as u8 | 2;
    cpu.store_system::<u8>(cpu.table_address(found.va, 5), access)?;
    segment.kind |= 2;
    cpu.tr = segment;
    cpu.end_block(op)
}

/// A system descriptor of the GDT, of one of these types, present.
fn system_segment(cpu: &mut Cpu, selector: u16, types: &[u8]) -> Result<Segment, crate::decode::op::Stop> {
    if selector & 4 != 0 {
        return cpu.raise_with(vector::GP, u32::from(selector & 0xfffc));
    }
    let found = cpu.descriptor(selector, vector::GP, 0)?;
    if found.code_or_data() || !types.contains(&found.kind()) {
        return cpu.raise_with(vector::GP, found.error());
    }
    if !found.present() {
        return cpu.raise_with(vector::NP, found.error());
    }
    let mut segment = found.segment();
    if cpu.long_mode() {
        let high = cpu.descriptor_high(&found)?;
        segment.base |= (high & 0xffff_ffff) << 32;
        if !cpu.canonical(segment.base) {
            return cpu.raise_with(vector::GP, found.error());
        }
    }
    Ok(segment)
}

fn store_system_selector<const TASK: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    protected_only(cpu)?;
    if user_mode_prevented(cpu) {
        return cpu.raise_gp();
    }
    let selector = if TASK { cpu.tr.selector } else { cpu.ldtr.selector };
    store_selector(cpu, op, u64::from(selector))
}

fn set_zf(cpu: &mut Cpu, on: bool) {
    cpu.flags = cpu.flags.with(Flags::ZF, on);
}

/// The descriptor that LAR, LSL, VERR and VERW look at; `None` when it is not visible to the caller.
fn visible(
    cpu: &mut Cpu,
    selector: u16,
) -> Result<Option<crate::descriptor::Descriptor>, crate::decode::op::Stop> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(found) = cpu.find_descriptor(selector, 8)? else { return Ok(None) };
    let level = found.conforming() || (cpu.cpl <= found.dpl() && found.rpl() <= found.dpl());
    Ok(level.then_some(found))
}

fn lar(cpu: &mut Cpu, op: &Op) -> Step {
    protected_only(cpu)?;
    let selector = selector_operand(cpu, op, op.rm)?;
    let long = cpu.long_mode();
    let found = visible(cpu, selector)?.filter(|found| {
        found.code_or_data()
            || match found.kind() {
                system::LDT | system::TSS_AVAILABLE | system::TSS_BUSY | system::CALL_GATE => true,
                system::TSS16_AVAILABLE | system::TSS16_BUSY | system::CALL_GATE16 | system::TASK_GATE => {
                    !long
                }
                _ => false,
            }
    });
    if let Some(found) = found {
        let rights = found.raw >> 32 & 0x00ff_ff00;
        set_result(cpu, op, rights);
    }
    set_zf(cpu, found.is_some());
    Ok(())
}

fn lsl(cpu: &mut Cpu, op: &Op) -> Step {
    protected_only(cpu)?;
    let selector = selector_operand(cpu, op, op.rm)?;
    let long = cpu.long_mode();
    let found = visible(cpu, selector)?.filter(|found| {
        found.code_or_data()
            || match found.kind() {
                system::LDT | system::TSS_AVAILABLE | system::TSS_BUSY => true,
                system::TSS16_AVAILABLE | system::TSS16_BUSY => !long,
                _ => false,
            }
    });
    if let Some(found) = found {
        set_result(cpu, op, u64::from(found.limit()));
    }
    set_zf(cpu, found.is_some());
    Ok(())
}

fn set_result(cpu: &mut Cpu, op: &Op, value: u64) {
    match op.aux & 0xff {
        2 => cpu.set_reg(op.reg, value as u16),
        4 => cpu.set_reg(op.reg, value as u32),
        _ => cpu.set_reg(op.reg, value),
    }
}

fn verify<const WRITE: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    protected_only(cpu)?;
    let selector = selector_operand(cpu, op, op.reg)?;
    let found = visible(cpu, selector)?;
    let allowed = found.is_some_and(|found| if WRITE { found.writable_data() } else { found.readable() });
    set_zf(cpu, allowed);
    Ok(())
}

fn arpl(cpu: &mut Cpu, op: &Op) -> Step {
    protected_only(cpu)?;
    if op.aux & MEMORY != 0 {
        let source = cpu.reg::<u16>(op.reg);
        // Only who writes needs the right to (seen on a processor, and what test386.asm wants).
        let va = cpu.addr(op, 2, Intent::Read)?;
        let old = cpu.load::<u16>(va)?;
        let changed = old & 3 < source & 3;
        if changed {
            let va = cpu.addr(op, 2, Intent::Write)?;
            cpu.modify::<u16>(va, |_, old| Ok((old & !3) | (source & 3)))?;
        }
        set_zf(cpu, changed);
    } else {
        let (old, source) = (cpu.reg::<u16>(op.reg), cpu.reg::<u16>(op.rm));
        let changed = old & 3 < source & 3;
        if changed {
            cpu.set_reg::<u16>(op.reg, (old & !3) | (source & 3));
        }
        set_zf(cpu, changed);
    }
    Ok(())
}

fn swapgs(cpu: &mut Cpu, _op: &Op) -> Step {
    if !cpu.code64() {
        return cpu.raise_ud();
    }
    if cpu.cpl != 0 {
        return cpu.raise_gp();
    }
    std::mem::swap(&mut cpu.seg[GS].base, &mut cpu.msrs.kernel_gs_base);
    cpu.seg_base[GS] = cpu.seg[GS].base;
    Ok(())
}

fn base_allowed(cpu: &mut Cpu) -> Step {
    if !cpu.code64() || cpu.cr4 & cr4::FSGSBASE == 0 { cpu.raise_ud() } else { Ok(()) }
}

fn read_base(cpu: &mut Cpu, op: &Op) -> Step {
    base_allowed(cpu)?;
    let value = cpu.seg[usize::from(op.aux >> 9) % 6].base;
    set_result(cpu, op, value);
    Ok(())
}

fn write_base(cpu: &mut Cpu, op: &Op) -> Step {
    base_allowed(cpu)?;
    let value = if op.aux & 0xff == 4 { u64::from(cpu.reg::<u32>(op.reg)) } else { cpu.reg::<u64>(op.reg) };
    if !cpu.canonical(value) {
        return cpu.raise_gp();
    }
    let index = usize::from(op.aux >> 9) % 6;
    cpu.seg[index].base = value;
    cpu.seg_base[index] = value;
    Ok(())
}
