//! A case: registers and memory for one instruction in one mode, before the topic's own randomness.

use harrier_engine::cpu_state::{DescriptorTable, Segment, msr};

use super::layout::{
    CODE, GDT, IDT32, IDT64, LDT, LONG_PDPT_ENTRY, Mode, STACK, TARGET, TSS32, TSS64, descriptor, image,
    selector,
};
use super::machine::Registers;
use crate::diff::random::Random;

/// RFLAGS.
pub(super) mod flag {
    pub(crate) const TF: u64 = 1 << 8;
    pub(crate) const IF: u64 = 1 << 9;
    pub(crate) const DF: u64 = 1 << 10;
    pub(crate) const NT: u64 = 1 << 14;
    pub(crate) const RF: u64 = 1 << 16;
    pub(crate) const VM: u64 = 1 << 17;
    pub(crate) const AC: u64 = 1 << 18;
}

/// CR4.
pub(super) mod cr4 {
    pub(crate) const TSD: u64 = 1 << 2;
    pub(crate) const DE: u64 = 1 << 3;
    pub(crate) const PSE: u64 = 1 << 4;
    pub(crate) const PAE: u64 = 1 << 5;
    pub(crate) const PGE: u64 = 1 << 7;
    pub(crate) const PCE: u64 = 1 << 8;
    pub(crate) const OSFXSR: u64 = 1 << 9;
    pub(crate) const UMIP: u64 = 1 << 11;
    pub(crate) const FSGSBASE: u64 = 1 << 16;
    pub(crate) const OSXSAVE: u64 = 1 << 18;
    pub(crate) const SMEP: u64 = 1 << 20;
    pub(crate) const SMAP: u64 = 1 << 21;
}

pub(super) struct Case {
    /// What is tried, for people and for the table of explained differences.
    pub(super) topic: &'static str,
    pub(super) name: String,
    pub(super) mode: Mode,
    pub(super) cpl: u8,
    pub(super) code: Vec<u8>,
    pub(super) registers: Registers,
    pub(super) memory: Vec<u8>,
    pub(super) random: Random,
    /// Bits of CR4 that both engines have.
    pub(super) cr4_bits: u64,
}

/// A segment register as a load of this descriptor leaves it.
pub(super) fn loaded(selector: u16, raw: u64) -> Segment {
    let granularity = raw >> 55 & 1 != 0;
    let limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
    Segment {
        selector,
        base: raw >> 16 & 0xff_ffff | raw >> 32 & 0xff00_0000,
        limit: if granularity { limit << 12 | 0xfff } else { limit },
        kind: (raw >> 40) as u8 & 0xf,
        code_or_data: raw >> 44 & 1 != 0,
        dpl: (raw >> 45) as u8 & 3,
        present: raw >> 47 & 1 != 0,
        avl: raw >> 52 & 1 != 0,
        long: raw >> 53 & 1 != 0,
        db: raw >> 54 & 1 != 0,
        granularity,
        unusable: false,
    }
}

impl Case {
    /// A case of this mode in which nothing is odd yet.
    pub(super) fn new(mut random: Random, mode: Mode, cpl: u8, cr4_bits: u64) -> Case {
        let mut memory = image(mode);
        if mode.is_long() {
            let (at, entry) = LONG_PDPT_ENTRY;
            memory[at as usize..at as usize + 8].copy_from_slice(&entry.to_le_bytes());
        }
        let mut registers = Registers::default();
        for register in &mut registers.regs.gpr {
            *register = random.value();
        }
        if mode != Mode::Long {
            registers.regs.gpr = registers.regs.gpr.map(|value| value & 0xffff_ffff);
            registers.regs.gpr[8..].fill(0);
        }
        registers.regs.gpr[4] = STACK;
        registers.regs.rip = CODE;
        // User code with the right to ports is one of the things that a KVM may not have.
        let privilege = if cpl == 3 && !random.one_in(8) { 0 } else { random.below(4) << 12 };
        registers.regs.rflags = 2 | privilege | random.next() & (0x8d5 | flag::IF | flag::DF);
        if cpl == 3 && !random.one_in(8) {
            registers.regs.rflags |= flag::IF;
        }
        if random.one_in(6) {
            registers.regs.rflags |= flag::AC;
        }
        if mode == Mode::Virtual8086 {
            registers.regs.rflags |= flag::VM;
        }
        registers.dr6 = 0xffff_0ff0;
        registers.dr7 = 0x400;
        let mut case = Case {
            topic: "",
            name: String::new(),
            mode,
            cpl,
            code: Vec::new(),
            registers,
            memory,
            random,
            cr4_bits,
        };
        case.set_segments();
        case.set_control();
        case.set_msrs();
        case
    }

    fn set_segments(&mut self) {
        let (mode, user) = (self.mode, self.cpl == 3);
        let raw = |selector: u16| self.word(GDT + u64::from(selector & !7));
        let pick = |selector: u16| loaded(selector, raw(selector));
        let (code, data) = match mode {
            Mode::Real | Mode::Virtual8086 => {
                let access = if mode == Mode::Real { 0x93 } else { 0xf3 };
                let data = loaded(0, descriptor(0, 0xffff, access, 0));
                let code = if mode == Mode::Real { loaded(0, descriptor(0, 0xffff, 0x9b, 0)) } else { data };
                (code, data)
            }
            Mode::Protected16 if user => (pick(selector::USER_CODE16), pick(selector::USER_DATA)),
            Mode::Protected16 => (pick(selector::CODE16), pick(selector::DATA16)),
            Mode::Long if user => (pick(selector::USER_CODE64), pick(selector::USER_DATA)),
            Mode::Long => (pick(selector::CODE64), pick(selector::DATA)),
            _ if user => (pick(selector::USER_CODE32), pick(selector::USER_DATA)),
            _ => (pick(selector::CODE32), pick(selector::DATA)),
        };
        let task = if mode.is_long() { TSS64 } else { TSS32 };
        let tr = loaded(selector::TASK, descriptor(task, 0x8f, 0x8b, 0));
        let ldtr = loaded(selector::TABLE, descriptor(LDT, 0x1ff, 0x82, 0));
        let segments = &mut self.registers.segments;
        segments.cs = code;
        for place in
            [&mut segments.ss, &mut segments.ds, &mut segments.es, &mut segments.fs, &mut segments.gs]
        {
            *place = data;
        }
        segments.tr = tr;
        segments.ldtr = ldtr;
        segments.gdtr = DescriptorTable { base: GDT, limit: 0x1ff };
        segments.idtr = match mode {
            Mode::Real => DescriptorTable { base: 0, limit: 0x3ff },
            Mode::Long | Mode::Compatibility => DescriptorTable { base: IDT64, limit: 0xfff },
            _ => DescriptorTable { base: IDT32, limit: 0x7ff },
        };
    }

    fn set_control(&mut self) {
        let (mode, random) = (self.mode, &mut self.random);
        let control = &mut self.registers.control;
        control.cr0 = 0x30 | u64::from(mode != Mode::Real) | u64::from(mode.is_paged()) << 31;
        control.cr0 |= random.next() & (1 << 16 | 1 << 18 | 2);
        control.cr2 = random.next() & 0xffff_ffff;
        control.cr3 = mode.root();
        let mut bits = cr4::DE | cr4::PSE | cr4::PGE | cr4::OSFXSR | cr4::UMIP | cr4::FSGSBASE;
        if random.one_in(4) {
            bits |= cr4::TSD | cr4::OSXSAVE;
        }
        control.cr4 = random.next() & bits & self.cr4_bits;
        match mode {
            Mode::Pae32 | Mode::Compatibility | Mode::Long => control.cr4 |= cr4::PAE,
            Mode::Paged32 => {}
            _ if random.one_in(4) => control.cr4 |= cr4::PAE,
            _ => {}
        }
        control.efer = 1 | if mode.is_long() { 0x500 } else { 0 };
        if random.one_in(2) {
            control.efer |= 0x800;
        }
        control.xcr0 = 1;
    }

    fn set_msrs(&mut self) {
        let mask = self.random.next() & 0x47_7fd5;
        self.registers.msrs = vec![
            (msr::STAR, u64::from(selector::USER_CODE32) << 48 | u64::from(selector::CODE64) << 32 | 0xc0a0),
            (msr::LSTAR, TARGET + 0x100),
            (msr::CSTAR, TARGET + 0x110),
            (msr::SFMASK, mask),
            (msr::IA32_SYSENTER_CS, u64::from(selector::CODE64)),
            (msr::IA32_SYSENTER_ESP, 0x5f00),
            (msr::IA32_SYSENTER_EIP, TARGET + 0x120),
            (msr::KERNEL_GS_BASE, 0x1234_5000),
        ];
    }

    pub(super) fn word(&self, at: u64) -> u64 {
        self.memory[at as usize..at as usize + 8].try_into().map_or(0, u64::from_le_bytes)
    }

    pub(super) fn put(&mut self, at: u64, bytes: &[u8]) {
        self.memory[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn put_word(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    /// Emits a register operand.
    pub(super) fn register_form(&mut self, opcode: &[u8], extension: u8, register: u8) {
        self.code.extend_from_slice(opcode);
        self.code.push(0xc0 | extension << 3 | register);
    }

    /// Emits an absolute memory operand below 64 KiB, or below 4 GiB in code of 32 bits.
    pub(super) fn memory_form(&mut self, opcode: &[u8], extension: u8, at: u64) {
        self.code.extend_from_slice(opcode);
        match self.mode.bits() {
            16 => {
                self.code.push(extension << 3 | 6);
                self.code.extend_from_slice(&(at as u16).to_le_bytes());
            }
            32 => {
                self.code.push(extension << 3 | 5);
                self.code.extend_from_slice(&(at as u32).to_le_bytes());
            }
            _ => {
                self.code.extend_from_slice(&[extension << 3 | 4, 0x25]);
                self.code.extend_from_slice(&(at as u32).to_le_bytes());
            }
        }
    }

    /// An operand-size prefix, or none: the size of the operand in bytes.
    pub(super) fn operand_size(&mut self) -> usize {
        let (plain, other) = if self.mode.bits() == 16 { (2, 4) } else { (4, 2) };
        if self.random.one_in(3) {
            self.code.push(0x66);
            return other;
        }
        if self.mode == Mode::Long && self.random.one_in(2) {
            self.code.push(0x48);
            return 8;
        }
        plain
    }

    /// Puts the code where it is executed.
    pub(super) fn finish(&mut self) {
        let code = std::mem::take(&mut self.code);
        self.put(CODE, &code);
        self.code = code;
    }
}
