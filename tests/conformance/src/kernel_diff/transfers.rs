//! Topics about descriptors: segment loads, far transfers, returns, gates, and what happens when one of them faults.

use harrier_engine::cpu_state::Segment;

use super::case::{Case, flag, loaded};
use super::layout::{
    DATA, ENTRIES, GDT, HANDLERS, IDT32, IDT64, LDT, Mode, OTHER_TSS32, RANDOM_GATES, STACK, TARGET, TSS32,
    TSS64, descriptor, gate, selector,
};
use super::topics::register;
use crate::diff::random::Random;

/// Fills the random entries of GDT and LDT. Descriptors are mostly right ones with something odd.
fn fill_descriptors(case: &mut Case) {
    let long = case.mode.is_long();
    for table in [GDT, LDT] {
        let first = if table == GDT { u64::from(selector::FIRST_RANDOM) / 8 } else { 1 };
        let mut slot = first;
        while slot < ENTRIES {
            let [low, high] = random_descriptor(&mut case.random, long);
            case.put_word(table + 8 * slot, low);
            let wide = long && low >> 44 & 1 == 0;
            if wide && slot + 1 < ENTRIES {
                case.put_word(table + 8 * (slot + 1), high);
                slot += 1;
            }
            slot += 1;
        }
    }
}

fn random_descriptor(random: &mut Random, long: bool) -> [u64; 2] {
    let privilege = random.below(4) << 5;
    let present = if random.one_in(8) { 0 } else { 0x80 };
    if random.one_in(3) {
        // Gates and system segments.
        let kind = random.pick(&[1u64, 2, 3, 4, 5, 6, 7, 9, 0xb, 0xc, 0xc, 0xc, 0xc, 0xe, 0xf, 0, 8]);
        let access = kind | privilege | present;
        if matches!(kind, 4..=7 | 0xc | 0xe | 0xf) {
            let selector = random_selector(random);
            let offset = TARGET + random.below(0x800);
            let count = random.below(4);
            let high = if random.one_in(12) { random.next() & 0x1f00_ffff_ffff } else { 0 };
            return [gate(selector, offset, access, if long { 0 } else { count }), high];
        }
        let (base, limit) = match kind {
            2 => (LDT, 0x1ff),
            1 | 3 => (super::layout::OTHER_TSS16, 0x2b),
            _ => (OTHER_TSS32, random.pick(&[0x67, 0x67, 0x67, 0x66])),
        };
        let high = if random.one_in(12) { random.next() } else { 0 };
        return [descriptor(base, limit, access, random.below(2) << 3 & 8), high];
    }
    // Code and data; a base other than zero now and then.
    let kind = random.below(16);
    let base = if random.one_in(4) { 0x100 } else { 0 };
    let (limit, granular) = random.pick(&[(0xf_ffff, 8), (0xffff, 0), (0xf_ffff, 8), (0x9fff, 0)]);
    let size = random.pick(&[0, 4, 4, 2, 6, 2]);
    [descriptor(base, limit, 0x10 | kind | privilege | present, granular | size), 0]
}

/// A selector for code: outside protected mode one with which offsets stay where the code ends.
fn code_selector(case: &mut Case) -> u16 {
    if case.mode.has_descriptors() {
        random_selector(&mut case.random)
    } else {
        case.random.pick(&[0, 0x10, 0x40])
    }
}

/// Any selector, mostly one of a descriptor that is there.
fn random_selector(random: &mut Random) -> u16 {
    let rpl = random.below(4) as u16;
    match random.below(12) {
        0 => rpl,
        1 => random.next() as u16,
        2..=5 => {
            random.pick(&[
                selector::CODE64,
                selector::DATA,
                selector::CODE32,
                selector::CODE16,
                selector::USER_CODE32,
                selector::USER_DATA,
                selector::USER_CODE64,
                0x58,
                0x60,
                0x68,
                0x70,
                selector::TASK,
                selector::TABLE,
            ]) & !3
                | rpl
        }
        6..=8 => (1 + random.below(ENTRIES - 1) as u16) << 3 | 4 | rpl,
        _ => {
            selector::FIRST_RANDOM + 8 * random.below(ENTRIES - u64::from(selector::FIRST_RANDOM) / 8) as u16
                | rpl
        }
    }
}

/// LGDT, LIDT, SGDT, SIDT, LLDT, LTR, SLDT, STR, LAR, LSL, VERR, VERW, ARPL.
pub(super) fn tables(case: &mut Case) {
    fill_descriptors(case);
    let number = register(case);
    let chosen = random_selector(&mut case.random);
    case.registers.regs.gpr[usize::from(number)] = u64::from(chosen) | case.random.next() & 0xff_0000;
    match case.random.below(8) {
        0 => {
            let extension = case.random.below(4) as u8;
            let base = case.random.pick(&[GDT, IDT64, 0x1_0000, 1 << 47, u64::MAX << 47]);
            let limit = case.random.next() as u16 | 0xfff;
            case.put(DATA, &limit.to_le_bytes());
            case.put_word(DATA + 2, base);
            case.operand_size();
            case.memory_form(&[0x0f, 0x01], extension, DATA);
        }
        1 | 2 => {
            // LLDT, LTR.
            let extension = case.random.pick(&[2u8, 3]);
            let known = [selector::OTHER_TASK32, selector::OTHER_TASK16, selector::TABLE];
            if case.random.one_in(3) {
                case.registers.regs.gpr[usize::from(number)] = u64::from(case.random.pick(&known));
            }
            case.register_form(&[0x0f, 0x00], extension, number);
        }
        3 => {
            let extension = case.random.pick(&[0u8, 1]);
            case.operand_size();
            if case.random.one_in(2) {
                case.register_form(&[0x0f, 0x00], extension, number);
            } else {
                case.memory_form(&[0x0f, 0x00], extension, DATA);
            }
        }
        4 | 5 => {
            let opcode = case.random.pick(&[2u8, 3]);
            let target = register(case);
            case.operand_size();
            case.register_form(&[0x0f, opcode], target, number);
        }
        6 => {
            let extension = case.random.pick(&[4u8, 5]);
            case.register_form(&[0x0f, 0x00], extension, number);
        }
        _ if case.mode != Mode::Long => {
            let other = register(case);
            case.register_form(&[0x63], other, number);
        }
        _ => case.register_form(&[0x0f, 0x00], 6, number),
    }
}

/// MOV, POP and the load-pointer instructions with segment registers.
pub(super) fn segments(case: &mut Case) {
    fill_descriptors(case);
    let number = register(case);
    let chosen = random_selector(&mut case.random);
    case.registers.regs.gpr[usize::from(number)] = u64::from(chosen);
    let segment = case.random.pick(&[0u8, 2, 2, 3, 4, 5, 1, 6]);
    match case.random.below(6) {
        0..=2 => case.register_form(&[0x8e], segment, number),
        3 => {
            case.put_word(STACK, u64::from(chosen));
            case.operand_size();
            let opcode: &[u8] = match segment {
                0 if case.mode != Mode::Long => &[0x07],
                2 if case.mode != Mode::Long => &[0x17],
                3 if case.mode != Mode::Long => &[0x1f],
                4 => &[0x0f, 0xa1],
                _ => &[0x0f, 0xa9],
            };
            case.code.extend(opcode);
        }
        4 => {
            let size = case.operand_size();
            case.put_word(DATA, 0x1122_3344_5566_7788);
            case.put(DATA + size as u64, &chosen.to_le_bytes());
            let opcode: &[u8] = match segment {
                0 if case.mode != Mode::Long => &[0xc4],
                3 if case.mode != Mode::Long => &[0xc5],
                2 => &[0x0f, 0xb2],
                4 => &[0x0f, 0xb4],
                _ => &[0x0f, 0xb5],
            };
            case.memory_form(opcode, 3, DATA);
        }
        _ => {
            case.operand_size();
            case.register_form(&[0x8c], segment, number);
        }
    }
}

/// Loads, stores and pushes beyond segments' limits, or against their types.
pub(super) fn limits(case: &mut Case) {
    let privilege = u64::from(case.cpl) << 5;
    let kind = case.random.pick(&[0u64, 1, 2, 3, 4, 5, 6, 7, 3, 7, 9, 0xb]);
    let kind = if kind & 8 == 0 { kind | 1 } else { kind };
    let at = DATA + case.random.below(16);
    let limit = match case.random.below(3) {
        0 => at + case.random.below(8),
        1 => STACK - 4 + case.random.below(8),
        _ => 0xffff,
    };
    let size = case.random.pick(&[0u64, 4]);
    let odd = loaded(
        if case.cpl == 3 { selector::USER_DATA } else { selector::DATA },
        descriptor(0, limit, 0x90 | kind | privilege, size),
    );
    let real = !case.mode.has_descriptors();
    let stack = case.random.one_in(2);
    if !real {
        let segments = &mut case.registers.segments;
        if stack {
            // A stack can be written.
            segments.ss = Segment { kind: odd.kind & 7 | 3, ..odd };
        } else {
            segments.ds = odd;
        }
    }
    if stack {
        case.registers.regs.gpr[4] = case.random.pick(&[STACK, STACK + 2, STACK - 2, 0x9004, 1, 2, 0xffff]);
        let size = case.operand_size();
        let code: &[u8] = match case.random.below(6) {
            // AMD's processors branch with 16 bits in 64-bit mode too.
            2 | 3 if size == 2 && case.mode == Mode::Long => &[0x50],
            0 => &[0x50],
            1 => &[0x58],
            2 => &[0xe8, 0, 0],
            3 => &[0xc3],
            4 => &[0xc8, 8, 0, 1],
            _ => &[0x9c],
        };
        case.code.extend(code);
        if code[0] == 0xe8 {
            case.code.extend([0; 2]);
        }
        return;
    }
    if real {
        // Across the end of the segment.
        let end = 0xfffc + case.random.below(4);
        case.memory_form(&[0x8b], 0, end);
        return;
    }
    match case.random.below(5) {
        0 => case.memory_form(&[0x8b], 0, at),
        1 => case.memory_form(&[0x89], 0, at),
        2 => case.memory_form(&[0x01], 0, at),
        3 => case.memory_form(&[0x8a], 0, at),
        _ => {
            case.operand_size();
            case.memory_form(&[0x8b], 0, at);
        }
    }
}

/// Puts random gates behind some vectors.
fn fill_gates(case: &mut Case) {
    for vector in u64::from(RANDOM_GATES)..u64::from(RANDOM_GATES) + 8 {
        put_random_gate(case, vector);
    }
}

fn put_random_gate(case: &mut Case, vector: u64) {
    let random = &mut case.random;
    let kind = random.pick(&[0xeu64, 0xe, 0xf, 0xf, 6, 7, 5, 0xc, 1]);
    let access = kind | random.below(4) << 5 | if random.one_in(8) { 0 } else { 0x80 };
    let chosen = if random.one_in(2) {
        if case.mode.is_long() { selector::CODE64 } else { selector::CODE32 }
    } else {
        random_selector(random)
    };
    let chosen = if kind == 5 { selector::OTHER_TASK32 } else { chosen };
    let stack = if case.mode.is_long() { random.pick(&[0u64, 0, 1, 2, 3]) } else { 0 };
    let low = gate(chosen, HANDLERS + 8 * vector, access, stack);
    let high = if random.one_in(16) { random.next() & 0xffff_ffff } else { 0 };
    if case.mode.is_long() {
        case.put_word(IDT64 + 16 * vector, low);
        case.put_word(IDT64 + 16 * vector + 8, high);
    } else {
        case.put_word(IDT32 + 8 * vector, low);
    }
}

/// Far JMP and CALL: to code, through gates, to tasks.
pub(super) fn far(case: &mut Case) {
    fill_descriptors(case);
    let chosen = code_selector(case);
    let chosen = match case.random.below(10) {
        _ if !case.mode.has_descriptors() => chosen,
        0 => selector::OTHER_TASK32,
        1 => selector::OTHER_TASK16,
        _ => chosen,
    };
    let offset = match case.random.below(16) {
        0 => case.random.next(),
        _ => TARGET + case.random.below(0x700),
    };
    let call = case.random.one_in(2);
    let size = case.operand_size();
    if case.mode != Mode::Long && case.random.one_in(2) {
        case.code.push(if call { 0x9a } else { 0xea });
        let offset = offset.to_le_bytes();
        case.code.extend(&offset[..size]);
        case.code.extend(chosen.to_le_bytes());
        return;
    }
    case.put_word(DATA, offset);
    case.put(DATA + size as u64, &chosen.to_le_bytes());
    case.memory_form(&[0xff], if call { 3 } else { 5 }, DATA);
}

/// RETF and IRET to everywhere.
pub(super) fn far_return(case: &mut Case) {
    fill_descriptors(case);
    let iret = case.random.one_in(2);
    let size = case.operand_size();
    let code = match case.random.below(4) {
        _ if !case.mode.has_descriptors() => code_selector(case),
        0 => random_selector(&mut case.random),
        1 if case.cpl == 3 => selector::USER_CODE32,
        1 => selector::CODE32,
        _ => case.random.pick(&[selector::USER_CODE64, selector::USER_CODE32, selector::USER_CODE16]),
    };
    let stack = match case.random.below(3) {
        0 => random_selector(&mut case.random),
        _ => selector::USER_DATA,
    };
    let rip = if case.random.one_in(16) { case.random.next() } else { TARGET + case.random.below(0x700) };
    let mut flags = case.random.next() & 0x3d_7eff;
    if case.random.one_in(8) {
        flags |= flag::VM;
    }
    let frame = if iret {
        vec![rip, code.into(), flags, STACK - 0x400, stack.into(), 0, 0, 0, 0]
    } else {
        vec![rip, code.into(), STACK - 0x400, stack.into()]
    };
    for (index, value) in (0u64..).zip(frame) {
        let bytes = value.to_le_bytes();
        case.put(STACK + index * size as u64, &bytes[..size]);
    }
    if iret {
        if case.random.one_in(8) {
            // The task before this one.
            case.registers.regs.rflags |= flag::NT;
            let link = case.random.pick(&[selector::OTHER_TASK32, selector::OTHER_TASK16, selector::DATA]);
            case.put(TSS32, &link.to_le_bytes());
            let at = GDT + u64::from(link & !7);
            let busy = case.word(at) | 2 << 40;
            case.put_word(at, busy);
        }
        case.code.push(0xcf);
    } else if case.random.one_in(2) {
        case.code.push(0xcb);
    } else {
        case.code.extend([0xca, 8, 0]);
    }
}

/// INT n, INT3, INTO, INT1, BOUND and exceptions through all kinds of gates.
pub(super) fn interrupt(case: &mut Case) {
    fill_descriptors(case);
    fill_gates(case);
    let vector = RANDOM_GATES + case.random.below(8) as u8;
    match case.random.below(12) {
        0 => {
            put_random_gate(case, 3);
            case.code.push(0xcc);
        }
        1 => {
            put_random_gate(case, 1);
            case.code.push(0xf1);
        }
        2 if case.mode != Mode::Long => {
            put_random_gate(case, 4);
            case.registers.regs.rflags |= 0x800;
            case.code.push(0xce);
        }
        3 => {
            put_random_gate(case, 6);
            case.code.extend([0x0f, 0x0b]);
        }
        4 => {
            put_random_gate(case, 0);
            // DIV CL by zero.
            case.registers.regs.gpr[1] = 0;
            case.code.extend([0xf6, 0xf1]);
        }
        5 => case.code.extend([0xcd, case.random.next() as u8]),
        _ => case.code.extend([0xcd, vector]),
    }
}

/// Faults whose delivery meets a fault.
pub(super) fn nested(case: &mut Case) {
    fill_descriptors(case);
    let vectors = [6u64, 8, 10, 11, 12, 13, 14];
    for _ in 0..1 + case.random.below(2) {
        let vector = case.random.pick(&vectors);
        put_random_gate(case, vector);
    }
    if case.random.one_in(4) {
        let entry = if case.mode.is_long() { 16 } else { 8 };
        case.registers.segments.idtr.limit = (case.random.pick(&vectors) * entry) as u16 + 3;
    }
    if case.random.one_in(4) {
        let bad = case.random.pick(&[1u64 << 47, 0x4_0000_0000, 0x30_0000, 0]);
        case.put_word(TSS64 + 4, bad);
        case.put(TSS32 + 4, &(bad as u32).to_le_bytes());
    }
    if case.random.one_in(8) {
        let bad = case.random.next() as u16;
        case.put(TSS32 + 8, &bad.to_le_bytes());
    }
    match case.random.below(5) {
        0 => case.code.extend([0x0f, 0x0b]),
        1 => {
            // A selector beyond the table.
            case.registers.regs.gpr[0] = 0xfff0;
            case.code.extend([0x8e, 0xd8]);
        }
        2 if case.mode.is_paged() => {
            case.registers.regs.gpr[6] = 0x30_0000;
            case.code.extend([0x8b, 0x06]);
        }
        3 => {
            case.registers.regs.gpr[0] = 0x13;
            case.code.extend([0x8e, 0xd0]);
        }
        _ => case.code.extend([0xcd, case.random.pick(&[3u8, 0x20, 0xff, 8])]),
    }
}
