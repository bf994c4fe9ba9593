//! The topics: instructions of kernels with random operands. Those about descriptors are in [`super::transfers`].

use harrier_engine::cpu_state::msr;

use super::Options;
use super::case::{Case, cr4, flag};
use super::layout::{CODE, DATA, Mode, RANDOM_GATES, STACK, TARGET, TRIED_PAGE, selector};
use super::transfers::{far, far_return, interrupt, limits, nested, segments, tables};
use crate::diff::random::Random;

type Make = fn(&mut Case);

/// Names on the command line, and what makes a case.
pub(super) const TOPICS: &[(&str, Make)] = &[
    ("control", control),
    ("flags", flags),
    ("debug", debug),
    ("tables", tables),
    ("segments", segments),
    ("limits", limits),
    ("far", far),
    ("return", far_return),
    ("interrupt", interrupt),
    ("fast", fast_calls),
    ("msr", model_specific),
    ("paging", paging),
    ("ports", ports),
    ("nested", nested),
];

/// A case by its number.
pub(super) fn make(options: &Options, number: u64, cr4_bits: u64) -> Case {
    let mut random = Random::new(options.seed.wrapping_mul(0x1_0000_0001).wrapping_add(number));
    let only = options.only.as_deref();
    let chosen: Vec<_> = TOPICS.iter().filter(|(name, _)| only.is_none_or(|only| *name == only)).collect();
    let (name, make) = chosen[random.below(chosen.len() as u64) as usize];
    let any = random.pick(&Mode::ALL);
    let mode = options.mode.unwrap_or(any);
    let cpl = match mode {
        Mode::Real => 0,
        Mode::Virtual8086 => 3,
        _ => random.pick(&[0, 0, 3]),
    };
    let mut case = Case::new(random, mode, cpl, cr4_bits);
    case.topic = name;
    make(&mut case);
    case.finish();
    case
}

pub(super) fn register(case: &mut Case) -> u8 {
    // Not the stack pointer.
    case.random.pick(&[0, 1, 2, 3, 5, 6, 7])
}

/// CR0, CR2, CR3, CR4, CR8, CLTS, LMSW, SMSW, XSETBV, cache and look-aside buffer control, CLAC and STAC.
fn control(case: &mut Case) {
    let number = register(case);
    let place = usize::from(number);
    match case.random.below(14) {
        0..=2 => {
            let cr = case.random.pick(&[0u8, 2, 3, 4, 8, 1, 5, 7]);
            if cr == 8 && case.mode == Mode::Long {
                case.code.push(0x44);
            }
            case.register_form(&[0x0f, 0x20], cr & 7, number);
        }
        3..=7 => {
            let cr = case.random.pick(&[0u8, 0, 0, 2, 3, 3, 4, 4, 4, 8, 6]);
            let control = &case.registers.control;
            let old = match cr {
                0 => control.cr0,
                3 => control.cr3,
                4 => control.cr4,
                _ => case.random.below(20),
            };
            let known = match cr {
                0 => case.random.pick(&[0u64, 1, 2, 3, 5, 16, 18, 29, 30, 31]),
                4 => {
                    let bits = case.cr4_bits | 1 << 31;
                    let known: Vec<u64> = (0..64).filter(|bit| bits >> bit & 1 != 0).collect();
                    case.random.pick(&known)
                }
                _ => case.random.below(52),
            };
            let mut value = old ^ 1 << known;
            if case.random.one_in(4) {
                value ^= 1 << if cr == 4 { case.random.below(24) + 40 } else { case.random.below(64) };
            }
            if case.random.one_in(4) {
                value = old;
            }
            case.registers.regs.gpr[place] =
                if case.mode == Mode::Long { value } else { value & 0xffff_ffff };
            if cr == 8 && case.mode == Mode::Long {
                case.code.push(0x44);
            }
            case.register_form(&[0x0f, 0x22], cr & 7, number);
        }
        8 => {
            case.registers.control.cr0 |= 8;
            case.code.extend([0x0f, 0x06]);
        }
        9 | 10 => {
            let extension = case.random.pick(&[4, 4, 6]);
            case.operand_size();
            if case.random.one_in(2) {
                case.registers.regs.gpr[place] &= 0xf;
                case.register_form(&[0x0f, 0x01], extension, number);
            } else {
                let value = case.random.below(16);
                case.put_word(DATA, value);
                case.memory_form(&[0x0f, 0x01], extension, DATA);
            }
        }
        11 => {
            // INVD, WBINVD, INVLPG, CLAC, STAC; HLT only where it faults.
            match case.random.below(6) {
                0 => case.code.extend([0x0f, 0x08]),
                1 => case.code.extend([0x0f, 0x09]),
                2 => case.memory_form(&[0x0f, 0x01], 7, DATA),
                3 => case.code.extend([0x0f, 0x01, 0xca]),
                4 => case.code.extend([0x0f, 0x01, 0xcb]),
                _ if case.cpl == 3 => case.code.push(0xf4),
                _ => case.register_form(&[0x0f, 0x01], 7, number),
            }
        }
        12 => {
            // XGETBV, XSETBV.
            let value = case.random.pick(&[0u64, 1, 2, 3, 4, 5, 7, 0x107, 1 << 40]);
            let gpr = &mut case.registers.regs.gpr;
            (gpr[0], gpr[2]) = (value & 0xffff_ffff, value >> 32);
            gpr[1] = case.random.pick(&[0, 0, 0, 2]);
            case.code.extend(if case.random.one_in(2) { [0x0f, 0x01, 0xd0] } else { [0x0f, 0x01, 0xd1] });
            if case.registers.regs.gpr[1] != 0 {
                case.code[2] = 0xd1;
            }
        }
        _ => {
            // INVPCID, with its descriptor in memory.
            let kind = case.random.below(5);
            case.registers.regs.gpr[place] = kind;
            let identifier = case.random.pick(&[0u64, 0, 5, 0x1000]);
            let address = case.random.pick(&[0u64, DATA, 1 << 63]);
            case.put_word(DATA, identifier);
            case.put_word(DATA + 8, address);
            case.memory_form(&[0x66, 0x0f, 0x38, 0x82], number, DATA);
        }
    }
}

/// PUSHF, POPF, CLI, STI, RDTSC and RDPMC where they fault, and instructions that depend on TS and EM.
fn flags(case: &mut Case) {
    match case.random.below(8) {
        0 => {
            case.operand_size();
            case.code.push(0x9c);
        }
        1..=3 => {
            let value = case.random.next() & 0x3f_7fff & !(flag::TF | flag::VM);
            case.put_word(STACK, value);
            case.operand_size();
            case.code.push(0x9d);
        }
        4 => case.code.push(0xfa),
        5 => case.code.push(0xfb),
        6 => {
            if case.cpl == 3 {
                case.registers.control.cr4 |= cr4::TSD & case.cr4_bits;
                case.registers.control.cr4 &= !cr4::PCE;
                let second = case.random.pick(&[0x31, 0x33]);
                case.code.extend([0x0f, second]);
            } else {
                case.code.push(0x9b);
            }
        }
        _ => {
            case.registers.control.cr0 |= case.random.next() & 0xe;
            let code: &[u8] = match case.random.below(5) {
                // FNOP, WAIT, MOVAPS, EMMS, LDMXCSR of a bad value
                0 => &[0xd9, 0xd0],
                1 => &[0x9b],
                2 => &[0x0f, 0x28, 0xc0],
                _ => &[0x0f, 0x77],
            };
            case.code.extend(code);
        }
    }
}

/// Debug registers, breakpoints and single steps.
fn debug(case: &mut Case) {
    let number = register(case);
    let data = DATA + case.random.below(16);
    case.registers.debug_addresses = [CODE, data, CODE + 2, DATA + 8];
    if case.random.one_in(3) {
        case.registers.dr6 = 0xffff_0ff0 | case.random.next() & 0x600f;
    }
    let enabled = case.random.next() & 0xff;
    let kinds = case.random.next() & 0xffff_0000;
    match case.random.below(6) {
        0 => {
            case.registers.dr7 |= case.random.next() & 0x2000;
            let dr = case.random.below(8) as u8;
            case.register_form(&[0x0f, 0x21], dr, number);
        }
        1 | 2 => {
            case.registers.dr7 |= case.random.next() & 0x2000;
            let dr = case.random.below(8) as u8;
            let place = &mut case.registers.regs.gpr[usize::from(number)];
            // Breakpoints that this enables lie elsewhere.
            *place = case.random.next() & 0xffff_ffff;
            if dr == 7 || dr == 5 {
                case.registers.debug_addresses = [0x4_0000; 4];
            }
            if case.mode == Mode::Long && case.random.one_in(4) {
                *place |= case.random.next() & 1 << 40;
            }
            case.register_form(&[0x0f, 0x23], dr, number);
        }
        kind => {
            if kind == 3 {
                case.registers.regs.rflags |= flag::TF;
            } else {
                case.registers.dr7 = 0x400 | enabled | kinds;
            }
            if case.random.one_in(4) {
                case.registers.regs.rflags |= flag::RF;
            }
            if case.random.one_in(8) {
                case.registers.regs.rflags |= flag::TF;
            }
            let code: u64 = case.random.below(9);
            match code {
                0 => case.code.push(0x90),
                1 => case.memory_form(&[0x89], 0, DATA),
                2 => case.memory_form(&[0x8b], 3, DATA + 6),
                3 => case.memory_form(&[0x01], 0, DATA + 4),
                4 => case.code.push(0x50),
                // MOV SS, AX of a good selector: what follows is not interrupted.
                5 if case.mode.has_descriptors() => {
                    case.registers.regs.gpr[0] =
                        u64::from(if case.cpl == 3 { selector::USER_DATA } else { selector::DATA });
                    case.code.extend([0x8e, 0xd0]);
                }
                6 => {
                    // REP STOSB of two, upwards.
                    case.registers.regs.rflags &= !flag::DF;
                    (case.registers.regs.gpr[7], case.registers.regs.gpr[1]) = (DATA, 2);
                    case.code.extend([0xf3, 0xaa]);
                }
                7 => {
                    case.registers.regs.gpr[0] = 0x202;
                    case.code.extend([0x0f, 0x0b]);
                }
                _ => case.code.extend([0xcd, RANDOM_GATES + 9]),
            }
        }
    }
}

/// SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS and the instructions of FSGSBASE.
fn fast_calls(case: &mut Case) {
    if case.random.one_in(4) {
        case.registers.control.efer &= !1;
    }
    if case.random.one_in(4) {
        let place = case.registers.msrs.iter_mut().find(|(index, _)| *index == msr::IA32_SYSENTER_CS);
        if let Some((_, value)) = place {
            *value = case.random.pick(&[0, 3, 0x1b]);
        }
    }
    let target = if case.mode == Mode::Long && case.random.one_in(8) { 1 << 47 } else { TARGET };
    // What SYSRET and SYSEXIT read.
    let flags = case.random.next() & 0x3f_7eff;
    let gpr = &mut case.registers.regs.gpr;
    (gpr[1], gpr[2]) = (target, target + 0x40);
    if case.mode == Mode::Long {
        gpr[11] = flags;
        case.registers.segments.gs.base = 0xffff_8000_0000_1000;
        case.registers.segments.fs.base = 0x1000;
    } else {
        (gpr[1], gpr[2]) = (gpr[1] & 0xffff_ffff, gpr[2] & 0xffff_ffff);
    }
    let wide = case.mode == Mode::Long && case.random.one_in(2);
    match case.random.below(6) {
        0 => case.code.extend([0x0f, 0x05]),
        1 => {
            if wide {
                case.code.push(0x48);
            }
            case.code.extend([0x0f, 0x07]);
        }
        2 => case.code.extend([0x0f, 0x34]),
        3 => {
            if wide {
                case.code.push(0x48);
            }
            case.code.extend([0x0f, 0x35]);
        }
        4 => case.code.extend([0x0f, 0x01, 0xf8]),
        _ => {
            let extension = case.random.below(4) as u8;
            let number = register(case);
            case.code.push(0xf3);
            if wide {
                case.code.push(0x48);
            }
            case.register_form(&[0x0f, 0xae], extension, number);
        }
    }
}

/// RDMSR and WRMSR.
fn model_specific(case: &mut Case) {
    let known = [
        msr::EFER,
        msr::EFER,
        msr::STAR,
        msr::LSTAR,
        msr::CSTAR,
        msr::SFMASK,
        msr::FS_BASE,
        msr::GS_BASE,
        msr::KERNEL_GS_BASE,
        msr::IA32_SYSENTER_CS,
        msr::IA32_SYSENTER_ESP,
        msr::IA32_SYSENTER_EIP,
        msr::IA32_PAT,
        msr::IA32_MTRR_DEF_TYPE,
        0x4000_0000,
        0xdead_beef,
    ];
    let index = case.random.pick(&known);
    let write = case.random.one_in(2);
    let value = match index {
        msr::EFER => case.registers.control.efer ^ case.random.pick(&[0, 1, 0x100, 0x400, 0x800, 2, 1 << 32]),
        msr::IA32_PAT => {
            case.random.pick(&[0x0007_0406_0007_0406, 0x0007_0406_0007_0403, 0x0807_0406_0007_0406])
        }
        msr::IA32_MTRR_DEF_TYPE => case.random.pick(&[0, 6, 0xc06, 0x806, 2, 7, 0x1000]),
        _ => case.random.value(),
    };
    let gpr = &mut case.registers.regs.gpr;
    (gpr[0], gpr[1], gpr[2]) = (value & 0xffff_ffff, u64::from(index), value >> 32);
    case.name = format!("{index:#x} = {value:#x} ");
    case.code.extend([0x0f, if write { 0x30 } else { 0x32 }]);
}

/// Loads, stores, and jumps to a page whose entries have random rights.
fn paging(case: &mut Case) {
    if !case.mode.is_paged() {
        case.topic = "control";
        return control(case);
    }
    let protect = cr4::SMEP | cr4::SMAP;
    case.registers.control.cr4 |= case.random.next() & protect & case.cr4_bits;
    let (va, levels) = case.mode.tried();
    let narrow = case.mode == Mode::Paged32;
    if case.registers.control.cr4 & protect != 0 {
        // What the kernel executes and uses is its own then.
        let user = case.cpl == 3;
        for page in 0..32u64 {
            let shared = user && matches!(page, 7 | 9 | 0xa | 0xc);
            if !shared {
                let (at, size) = if narrow { (0x1_5000 + 4 * page, 4) } else { (0x1_3000 + 8 * page, 8) };
                let entry = case.word(at) & !4;
                case.put(at, &entry.to_le_bytes()[..size]);
            }
        }
    }
    let last = levels.len() - 1;
    for (level, &at) in levels.iter().enumerate() {
        let below = if level == 0 { TRIED_PAGE } else { levels[level - 1] & !0xfff };
        let mut entry = below | 0x67;
        // Of the upper levels AMD's processors reserve the bit that says global.
        for bit in [0, 1, 1, 2, 2, 5, 6, 3, 4, 8] {
            if case.random.one_in(6) && (bit != 8 || level == 0) {
                entry ^= 1 << bit;
            }
        }
        if !narrow {
            if case.random.one_in(5) {
                entry |= 1 << 63;
            }
            if case.random.one_in(12) {
                entry |= 1 << case.random.pick(&[50, 51, 52, 58]);
            }
        }
        // A large page, which begins at zero: its address would be its own physical one otherwise.
        if level == 1 && last > 0 && case.random.one_in(8) {
            entry = entry & !0x1f_f000 | 0x80;
            if case.random.one_in(3) {
                entry |= 1 << 13;
            }
        }
        let size = if narrow { 4 } else { 8 };
        case.put(at, &entry.to_le_bytes()[..size]);
    }
    let at = va + case.random.below(0x200) * 8;
    let number = register(case);
    // By register: the address may be wide.
    case.registers.regs.gpr[6] = at;
    let wide = case.mode == Mode::Long;
    let mut emit = |bytes: &[u8]| {
        if wide {
            case.code.push(0x48);
        }
        case.code.extend(bytes);
    };
    match number {
        0 | 1 => emit(&[0x8b, 0x06]),
        2 => emit(&[0x89, 0x06]),
        3 => emit(&[0x01, 0x06]),
        5 => emit(&[0xff, 0xe6]),
        _ => {
            // Into the page from the one before it, which is not there, or out of it.
            case.registers.regs.gpr[6] = if case.random.one_in(2) { va + 0xffe } else { va - 2 };
            case.code.extend([0x8b, 0x06]);
        }
    }
}

/// IN, OUT, INS and OUTS with the map of ports.
fn ports(case: &mut Case) {
    let port = case.random.pick(&[0x40u64, 0x47, 0x3f, 0x48, 0x46, 0x100, 0x13f, 0x140]);
    case.registers.regs.gpr[2] = port;
    (case.registers.regs.gpr[6], case.registers.regs.gpr[7]) = (DATA, DATA + 0x40);
    if case.random.one_in(6) {
        case.registers.segments.tr.limit = case.random.pick(&[0x67, 0x68, 0x70, 0x71]);
    }
    match case.random.below(7) {
        0 => case.code.push(0xec),
        1 => case.code.extend([0xe4, port as u8]),
        2 => case.code.extend([0xe6, port as u8]),
        3 => {
            case.operand_size();
            case.code.push(0xed);
        }
        4 => {
            case.operand_size();
            case.code.push(0xef);
        }
        5 => case.code.push(0x6c),
        _ => case.code.push(0x6e),
    }
}
