//! Random operands: registers, immediates, and addresses of memory with the registers that lead there.

use iced_x86::{Code, Instruction, MemoryOperand, Mnemonic, OpCodeOperandKind as K, OpKind, Register};

use super::encodings::{has_memory, is_aligned, is_bit_string, is_locked, vsib_is_distinct};
use super::layout::{Bits, Context, DATA, DATA_LEN, HOLE, READ_ONLY, XSAVE_LEN};
use super::random::Random;

/// An instruction of this encoding with random registers and immediates; a memory operand has no address yet.
pub(super) fn instruction(random: &mut Random, code: Code, bits: Bits) -> Option<Instruction> {
    let info = code.op_code();
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    for operand in 0..info.op_count() {
        set_operand(random, &mut instruction, operand, info.op_kind(operand), bits)?;
    }
    let memory = instruction.op0_kind() == OpKind::Memory;
    if info.can_use_lock_prefix() && memory && random.one_in(3) {
        instruction.set_has_lock_prefix(true);
    }
    if instruction.is_string_instruction() {
        match random.below(3) {
            0 if info.can_use_rep_prefix() => instruction.set_has_rep_prefix(true),
            1 if info.can_use_repne_prefix() => instruction.set_has_repne_prefix(true),
            _ => {}
        }
    }
    let distinct = vsib_is_distinct(&instruction);
    distinct.then_some(instruction)
}

fn general(size: usize, number: u64) -> Register {
    let first = match size {
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    first + number as u32
}

impl Bits {
    /// Bytes of an address.
    pub(super) fn address_size(self) -> usize {
        match self {
            Bits::Long => 8,
            Bits::Compatibility => 4,
            Bits::Short => 2,
        }
    }

    /// General registers.
    pub(super) fn registers(self) -> u64 {
        if self == Bits::Long { 16 } else { 8 }
    }

    /// A general register that any address may have: those of 16 bits have addresses of 32 bits too.
    pub(super) fn general(self, number: u64) -> Register {
        general(self.address_size().max(4), number)
    }

    /// Index register of sequences.
    pub(super) fn index(self) -> Register {
        if self == Bits::Long { Register::R15 } else { Register::ESI }
    }

    /// Somewhere that is never memory and, in 64-bit mode, no address.
    fn nowhere(self) -> u64 {
        match self {
            Bits::Long => 0x8000_0000_0000,
            Bits::Compatibility => 0xc000_0000,
            Bits::Short => self.data_base() + 0xb800,
        }
    }
}

pub(super) fn byte(random: &mut Random, bits: Bits) -> Register {
    use Register::*;
    if bits != Bits::Long {
        return random.pick(&[AL, CL, DL, BL, AH, CH, DH, BH]);
    }
    random.pick(&[AL, CL, DL, BL, AH, CH, DH, BH, SPL, BPL, SIL, DIL, R8L, R9L, R12L, R13L, R15L])
}

fn set_operand(
    random: &mut Random,
    instruction: &mut Instruction,
    operand: u32,
    kind: K,
    bits: Bits,
) -> Option<()> {
    let as_memory = random.one_in(2);
    let number = random.below(bits.registers());
    let vector = random.below(bits.registers()) as u32;
    let register = match kind {
        K::r8_reg | K::r8_opcode => byte(random, bits),
        K::r16_reg | K::r16_opcode | K::r16_rm => general(2, number),
        K::r32_reg | K::r32_opcode | K::r32_rm | K::r32_vvvv => general(4, number),
        K::r64_reg | K::r64_opcode | K::r64_rm | K::r64_vvvv => general(8, number),
        K::r8_or_mem if !as_memory => byte(random, bits),
        K::r16_or_mem if !as_memory => general(2, number),
        K::r32_or_mem if !as_memory => general(4, number),
        K::r64_or_mem if !as_memory => general(8, number),
        K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => Register::XMM0 + vector,
        K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => Register::YMM0 + vector,
        K::mm_reg | K::mm_rm => Register::MM0 + vector % 8,
        K::xmm_or_mem if !as_memory => Register::XMM0 + vector,
        K::ymm_or_mem if !as_memory => Register::YMM0 + vector,
        K::mm_or_mem if !as_memory => Register::MM0 + vector % 8,
        K::al => Register::AL,
        K::cl => Register::CL,
        K::ax => Register::AX,
        K::dx => Register::DX,
        K::eax => Register::EAX,
        K::rax => Register::RAX,
        K::st0 => Register::ST0,
        K::sti_opcode => Register::ST0 + vector % 8,
        K::r8_or_mem
        | K::r16_or_mem
        | K::r32_or_mem
        | K::r64_or_mem
        | K::xmm_or_mem
        | K::ymm_or_mem
        | K::mm_or_mem
        | K::mem => {
            instruction.set_op_kind(operand, OpKind::Memory);
            return Some(());
        }
        K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y => {
            instruction.set_op_kind(operand, OpKind::Memory);
            let first =
                if matches!(kind, K::mem_vsib32x | K::mem_vsib64x) { Register::XMM0 } else { Register::YMM0 };
            instruction.set_memory_index(first + vector);
            return Some(());
        }
        K::imm8 => {
            instruction.set_op_kind(operand, OpKind::Immediate8);
            instruction.set_immediate8(random.value() as u8);
            return Some(());
        }
        K::imm8_const_1 => {
            instruction.set_op_kind(operand, OpKind::Immediate8);
            instruction.set_immediate8(1);
            return Some(());
        }
        K::imm8sex16 => {
            instruction.set_op_kind(operand, OpKind::Immediate8to16);
            instruction.set_immediate8to16(i16::from(random.value() as i8));
            return Some(());
        }
        K::imm8sex32 => {
            instruction.set_op_kind(operand, OpKind::Immediate8to32);
            instruction.set_immediate8to32(i32::from(random.value() as i8));
            return Some(());
        }
        K::imm8sex64 => {
            instruction.set_op_kind(operand, OpKind::Immediate8to64);
            instruction.set_immediate8to64(i64::from(random.value() as i8));
            return Some(());
        }
        K::imm16 => {
            instruction.set_op_kind(operand, OpKind::Immediate16);
            instruction.set_immediate16(random.value() as u16);
            return Some(());
        }
        K::imm32 => {
            instruction.set_op_kind(operand, OpKind::Immediate32);
            instruction.set_immediate32(random.value() as u32);
            return Some(());
        }
        K::imm32sex64 => {
            instruction.set_op_kind(operand, OpKind::Immediate32to64);
            instruction.set_immediate32to64(i64::from(random.value() as i32));
            return Some(());
        }
        K::imm64 => {
            instruction.set_op_kind(operand, OpKind::Immediate64);
            instruction.set_immediate64(random.value());
            return Some(());
        }
        K::br64_1 | K::br64_4 => {
            instruction.set_op_kind(operand, OpKind::NearBranch64);
            return Some(());
        }
        // In 64-bit mode AMD's processors branch with 16 bits, and Intel's do not (SDM volume 2, Jcc).
        K::br16_1 | K::br16_2 if bits != Bits::Long => {
            instruction.set_op_kind(operand, OpKind::NearBranch16);
            return Some(());
        }
        K::br32_1 | K::br32_4 => {
            instruction.set_op_kind(operand, OpKind::NearBranch32);
            return Some(());
        }
        K::seg_rSI | K::es_rDI | K::seg_rDI => {
            let kind = match (kind, bits) {
                (K::seg_rSI, Bits::Long) => OpKind::MemorySegRSI,
                (K::seg_rSI, Bits::Compatibility) => OpKind::MemorySegESI,
                (K::es_rDI, Bits::Long) => OpKind::MemoryESRDI,
                (K::es_rDI, Bits::Compatibility) => OpKind::MemoryESEDI,
                (K::seg_rSI, Bits::Short) => OpKind::MemorySegSI,
                (K::es_rDI, Bits::Short) => OpKind::MemoryESDI,
                (_, Bits::Long) => OpKind::MemorySegRDI,
                (_, Bits::Compatibility) => OpKind::MemorySegEDI,
                (_, Bits::Short) => OpKind::MemorySegDI,
            };
            instruction.set_op_kind(operand, kind);
            return Some(());
        }
        _ => return None,
    };
    instruction.set_op_kind(operand, OpKind::Register);
    instruction.set_op_register(operand, register);
    Some(())
}

pub(super) fn set_memory(
    instruction: &mut Instruction,
    base: Register,
    index: Register,
    scale: u32,
    displacement: i64,
) {
    let size = if displacement == 0 && base != Register::None { 0 } else { 1 };
    let operand = MemoryOperand::new(base, index, scale, displacement, size, false, Register::None);
    instruction.set_memory_base(operand.base);
    instruction.set_memory_index(operand.index);
    instruction.set_memory_index_scale(operand.scale);
    instruction.set_memory_displacement64(displacement as u64);
    instruction.set_memory_displ_size(operand.displ_size);
}

/// An address, relative to its segment, for an operand of `size` bytes: mostly where memory is, now and then where it ends or is forbidden.
pub(super) fn target(random: &mut Random, size: u64, aligned: bool, bits: Bits) -> u64 {
    let end = DATA + DATA_LEN as u64;
    let mut address = match random.below(32) {
        0 => end - size,
        1 => HOLE - 1 - random.below(size.max(2) - 1),
        2 => READ_ONLY + random.below(0x800),
        3 => READ_ONLY - 1 - random.below(size.max(2) - 1),
        4 => HOLE + random.below(0x1000 - 64),
        5 => {
            bits.nowhere()
                + random.below(match bits {
                    Bits::Long => 1 << 40,
                    Bits::Compatibility => 1 << 24,
                    Bits::Short => 0x4000,
                })
        }
        6..=9 => (DATA + 0x1000).wrapping_sub(1 + random.below(size.max(2) - 1)),
        _ => DATA + 0x100 + random.below(0x800),
    };
    if aligned && !random.one_in(10) {
        address &= !(size.max(16) - 1);
    }
    address - bits.data_base()
}

/// Gives memory operands, explicit and implicit, their addresses, and the registers the values that lead there.
pub(super) fn place(random: &mut Random, instruction: &mut Instruction, context: &mut Context, bits: Bits) {
    let code = instruction.code();
    let base = bits.data_base();
    let data = DATA - base;
    // The stack lies in the data.
    context.gpr[4] = data + 0x1800 + random.below(0x100) * 8;
    if random.one_in(2) {
        context.gpr[5] = data + 0x1800 + random.below(0x200) * 8;
    }
    if random.one_in(40) && instruction.is_stack_instruction() {
        context.gpr[4] =
            random.pick(&[HOLE, HOLE + 4, HOLE + 0x1000, READ_ONLY + 0x40, bits.nowhere(), DATA]) - base;
    }
    if matches!(code.mnemonic(), Mnemonic::Leave | Mnemonic::Enter) && !random.one_in(10) {
        context.gpr[5] = data + 0x1800 + random.below(0x200) * 8;
    }
    if instruction.is_string_instruction() {
        context.gpr[6] = target(random, 8, false, bits);
        context.gpr[7] = target(random, 8, false, bits);
        // Of two operands that fault, a processor may see either first.
        context.gpr[random.pick(&[6, 7])] = data + 0x400 + random.below(0x200);
        context.gpr[1] = random.below(24);
        if random.one_in(2) {
            context.rflags |= 1 << 10;
        }
    }
    if matches!(code.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu) {
        context.gpr[7] = target(random, 16, false, bits);
    }
    if code.mnemonic() == Mnemonic::Xlatb {
        context.gpr[3] = target(random, 256, false, bits);
    }
    if matches!(
        code.mnemonic(),
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne | Mnemonic::Jrcxz | Mnemonic::Jecxz
    ) {
        context.gpr[1] = random.pick(&[0, 1, 2, 1 << 32]);
    }
    if !has_memory(instruction) {
        return;
    }
    // Where iced-x86 does not know, it is two bytes or one of the big areas.
    let size = match instruction.memory_size().size() {
        0 => 64,
        size => size as u64,
    };
    let mut address = target(random, size, is_aligned(code), bits);
    if is_bit_string(code) {
        let offset = instruction.op1_register().full_register().number();
        context.gpr[offset] = random.below(2048).wrapping_sub(1024);
        if instruction.op1_register().size() == 2 {
            context.gpr[offset] &= 0xffff;
        }
        address = data + 0x800 + random.below(0x200);
    }
    if is_locked(instruction) {
        address &= !(size - 1);
    }
    if instruction.memory_index().is_vector_register() {
        let index = instruction.memory_index();
        scatter(random, context, index.number(), code);
        let base = match bits {
            Bits::Long => random.pick(&[0u64, 1, 2, 3, 5, 6, 7, 8, 13]),
            _ => random.pick(&[0, 1, 2, 3, 5, 6, 7]),
        };
        let base = bits.general(base);
        context.gpr[base.number()] = data + 0x800;
        set_memory(instruction, base, index, random.pick(&[1, 2, 4, 8]), 0);
        return;
    }
    let taken =
        if is_bit_string(code) { instruction.op1_register().full_register().number() as u64 } else { 99 };
    let free = |random: &mut Random| loop {
        // RSP holds the stack, and RAX and the like may be implicit operands: their values may change for an address.
        let number = random.below(bits.registers());
        if number != 4 && number != taken {
            return number;
        }
    };
    let displacement = match random.below(3) {
        0 => 0,
        1 => random.below(256) as i64 - 128,
        _ => random.below(1 << 20) as i64 - (1 << 19),
    };
    match random.below(8) {
        0 if bits == Bits::Long => set_memory(instruction, Register::RIP, Register::None, 1, address as i64),
        0 | 3 | 6 | 7 if bits == Bits::Short => set_short_at(random, instruction, context, address, taken),
        0 if random.one_in(4) && bits == Bits::Compatibility => set_short(random, instruction, context),
        1 if address < 1 << 31 => {
            set_memory(instruction, Register::None, Register::None, 1, address as i64);
            instruction.set_memory_displ_size(bits.address_size() as u32);
        }
        2 if address >> 32 == 0 => {
            // 32-bit addresses: the upper half of the base counts for nothing.
            let base = free(random);
            context.gpr[base as usize] =
                address.wrapping_sub(displacement as u64) & 0xffff_ffff | random.next() << 32;
            set_memory(instruction, general(4, base), Register::None, 1, displacement);
        }
        3 | 4 => {
            let (base, index) = (free(random), free(random));
            if base == index {
                return set_base(instruction, context, base, address, displacement, bits);
            }
            let scale = random.pick(&[1u32, 2, 4, 8]);
            let by = context.gpr[index as usize].wrapping_mul(u64::from(scale));
            context.gpr[base as usize] = address.wrapping_sub(by).wrapping_sub(displacement as u64);
            set_memory(instruction, bits.general(base), bits.general(index), scale, displacement);
        }
        5 => {
            // Through RSP and RBP, with the stack's segment.
            context.gpr[5] = address.wrapping_sub(displacement as u64);
            set_memory(instruction, bits.general(5), Register::None, 1, displacement);
        }
        _ => {
            let base = free(random);
            set_base(instruction, context, base, address, displacement, bits);
        }
    }
    if taken == 5 {
        let base = 3;
        set_base(instruction, context, base, address, displacement, bits);
    }
}

/// An address of 16 bits that leads there, without the register with the number `taken`.
fn set_short_at(
    random: &mut Random,
    instruction: &mut Instruction,
    context: &mut Context,
    address: u64,
    taken: u64,
) {
    use Register::{BP, BX, DI, None, SI};
    let pairs = [(BX, SI), (BX, DI), (BP, SI), (BP, DI), (SI, None), (DI, None), (BP, None), (BX, None)];
    let (base, index) = loop {
        let (base, index) = random.pick(&pairs);
        if ![base, index].iter().any(|register| *register != None && register.number() as u64 == taken) {
            break (base, index);
        }
    };
    let displacement = match random.below(3) {
        0 => 0,
        1 => random.below(256) as i64 - 128,
        _ => random.below(1 << 16) as i64 - (1 << 15),
    };
    let mut rest = address.wrapping_sub(displacement as u64);
    let upper = random.next() & 0xffff_0000;
    if index != None {
        let by = random.next() & 0xffff;
        context.gpr[index.number()] = by | upper;
        rest = rest.wrapping_sub(by);
    }
    context.gpr[base.number()] = rest & 0xffff | upper;
    set_memory(instruction, base, index, 1, displacement);
}

/// An address of 16 bits, where no memory is: LEA has it, and of others the fault.
fn set_short(random: &mut Random, instruction: &mut Instruction, context: &mut Context) {
    use Register::{BP, BX, DI, None, SI};
    let pairs = [(BX, SI), (BX, DI), (BP, SI), (BP, DI), (SI, None), (DI, None), (BP, None), (BX, None)];
    let (base, index) = random.pick(&pairs);
    for register in [3, 5, 6, 7] {
        context.gpr[register] = random.next();
    }
    set_memory(instruction, base, index, 1, random.below(1 << 16) as i64 - (1 << 15));
}

fn set_base(
    instruction: &mut Instruction,
    context: &mut Context,
    base: u64,
    address: u64,
    displacement: i64,
    bits: Bits,
) {
    context.gpr[base as usize] = address.wrapping_sub(displacement as u64);
    set_memory(instruction, bits.general(base), Register::None, 1, displacement);
}

/// Small indices of a gather's width, some of them negative.
fn scatter(random: &mut Random, context: &mut Context, register: usize, code: Code) {
    let wide = code.op_code().op_kinds().iter().any(|kind| matches!(kind, K::mem_vsib64x | K::mem_vsib64y));
    let mut index = || random.below(192) as i64 - 96;
    for half in 0..2 {
        let mut bytes = [0; 16];
        if wide {
            bytes[..8].copy_from_slice(&index().to_le_bytes());
            bytes[8..].copy_from_slice(&index().to_le_bytes());
        } else {
            for part in bytes.chunks_exact_mut(4) {
                part.copy_from_slice(&(index() as i32).to_le_bytes());
            }
        }
        let place = if half == 0 { context.xmm_mut(register) } else { context.upper_mut(register) };
        place.copy_from_slice(&bytes);
    }
}

impl Random {
    /// Registers in which anything may be.
    pub(super) fn context(&mut self) -> Context {
        let mut xsave = Box::new([0u8; XSAVE_LEN]);
        let unmask = self.one_in(4);
        let masks = |random: &mut Random| if unmask { random.next() & 0x3f } else { 0x3f };
        let control = masks(self) | 0x40 | (self.next() & 0xf00);
        let flags = if self.one_in(2) { self.next() & 0x3f } else { 0 };
        let status = flags | self.next() & 0x4700 | self.below(8) << 11;
        // The summary bits follow from flags and masks.
        let summary = if flags & !control & 0x3f != 0 { 0x8080 } else { 0 };
        xsave[0..2].copy_from_slice(&(control as u16).to_le_bytes());
        xsave[2..4].copy_from_slice(&((status | summary) as u16).to_le_bytes());
        xsave[4] = match self.below(3) {
            0 => 0xff,
            1 => 0,
            _ => self.next() as u8,
        };
        let rounding = if self.one_in(2) { 0 } else { self.next() & 0xe040 };
        let mxcsr = rounding | masks(self) << 7 | if self.one_in(2) { self.next() & 0x3f } else { 0 };
        xsave[24..28].copy_from_slice(&(mxcsr as u32).to_le_bytes());
        for register in 0..8 {
            xsave[32 + 16 * register..][..10].copy_from_slice(&self.extended());
        }
        for at in (160..416).chain(576..832).step_by(8) {
            if !(416..576).contains(&at) {
                xsave[at..at + 8].copy_from_slice(&self.word().to_le_bytes());
            }
        }
        xsave[512] = 7;
        let integers = self.one_in(2);
        Context {
            gpr: std::array::from_fn(|_| if integers { self.value() } else { self.word() }),
            rflags: self.next() & 0x8d5 | 0x202,
            xsave,
            fault: [0; 4],
        }
    }
}
