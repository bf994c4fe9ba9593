//! Cases: every encoding that iced-x86 knows of the features that host and engine share, with random operands, prefixes,
//! registers and addresses, alone and in sequences.

use std::collections::BTreeSet;

use iced_x86::{
    Code, CpuidFeature, Encoder, EncodingKind, FlowControl, Instruction, InstructionInfoFactory,
    MemoryOperand, Mnemonic, OpAccess, OpCodeOperandKind as K, OpKind, Register,
};

use super::layout::{
    Bits, CODE, CODE32, CODE64, Context, DATA, DATA_LEN, HOLE, READ_ONLY, SAVER, SHORT_TAKEN, SLOT, TAKEN,
    TAKEN_POINTER, XSAVE_LEN, saver,
};
use super::random::Random;

/// Instructions of a sequence.
const SEQUENCE: u64 = 6;

/// What is run in one go.
pub(super) struct Case {
    pub(super) instructions: Vec<Instruction>,
    /// Their bytes, with the jump behind them.
    pub(super) bytes: Vec<u8>,
    /// Length of the instructions alone.
    pub(super) code_len: usize,
    pub(super) context: Context,
    pub(super) bits: Bits,
}

/// Features whose instructions are compared, and the name by which Linux shows them; the first ones are everywhere.
const FEATURES: &[(CpuidFeature, &str)] = {
    use CpuidFeature::*;
    &[
        (INTEL8086, ""),
        (INTEL8086_ONLY, ""),
        (INTEL186, ""),
        (INTEL286, ""),
        (INTEL386, ""),
        (INTEL486, ""),
        (X64, ""),
        (FPU, ""),
        (FPU287, ""),
        (FPU387, ""),
        (MULTIBYTENOP, ""),
        (PAUSE, ""),
        (CMOV, "cmov"),
        (CX8, "cx8"),
        (CMPXCHG16B, "cx16"),
        (MMX, "mmx"),
        (SSE, "sse"),
        (SSE2, "sse2"),
        (CLFSH, "clflush"),
        (SSE3, "pni"),
        (SSSE3, "ssse3"),
        (SSE4_1, "sse4_1"),
        (SSE4_2, "sse4_2"),
        (POPCNT, "popcnt"),
        (LZCNT, "abm"),
        (BMI1, "bmi1"),
        (BMI2, "bmi2"),
        (ADX, "adx"),
        (MOVBE, "movbe"),
        (PREFETCHW, "3dnowprefetch"),
        (AVX, "avx"),
        (AVX2, "avx2"),
        (FMA, "fma"),
        (F16C, "f16c"),
        (AES, "aes"),
        (PCLMULQDQ, "pclmulqdq"),
        (SHA, "sha_ni"),
        (GFNI, "gfni"),
        (VAES, "vaes"),
        (VPCLMULQDQ, "vpclmulqdq"),
        (CLFLUSHOPT, "clflushopt"),
        (CLWB, "clwb"),
    ]
};

/// What cannot be compared in user mode, and why.
pub(super) fn left_out(mnemonic: Mnemonic) -> Option<&'static str> {
    use Mnemonic::*;
    Some(match mnemonic {
        Syscall | Sysenter | Sysexit | Sysexitq | Sysret | Sysretq | Int => {
            "enters the kernel, which is another one"
        }
        Iret | Iretd | Iretq | Retf => "loads selectors, and the descriptor tables differ",
        Lds | Les | Lfs | Lgs | Lss | Lar | Lsl | Verr | Verw | Arpl | Str | Sldt | Lldt | Ltr => {
            "reads descriptors or selectors, and the tables differ"
        }
        Sgdt | Sidt | Smsw => "Linux answers for the processor where it has UMIP",
        Cpuid | Rdtsc | Rdtscp | Rdpid | Rdpmc | Rdrand | Rdseed | Xgetbv | Rdmsr | Wrmsr => {
            "its answer is the processor's own"
        }
        Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase | Swapgs => "the host's thread lives behind these bases",
        Fxsave | Fxsave64 | Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Fnsave | Fsave
        | Fnstenv | Fstenv | Fldenv | Frstor | Fxrstor | Fxrstor64 | Xrstor | Xrstor64 => {
            "has the x87 unit's last addresses, or a processor's own header; tested by themselves"
        }
        Db | Dw | Dd | Dq | Zero_bytes => "is no instruction",
        Ret | Jmpe => "goes where memory says",
        Monitor | Mwait | Monitorx | Mwaitx | Hlt | Vmcall | Vmmcall | Rsm | Getsec => {
            "waits, or leaves the processor"
        }
        Ud0 => "has several lengths",
        _ => return None,
    })
}

/// What processors do not agree on, so that one of them cannot say what is right. 0F 0D with a register is #UD on AMD's and
/// does nothing on Intel's; and there are hypervisors that deliver the #DB of INT1 as a fault.
fn differs_between_processors(code: Code) -> bool {
    matches!(
        code,
        Code::Reservednop_rm16_r16_0F0D
            | Code::Reservednop_rm32_r32_0F0D
            | Code::Reservednop_rm64_r64_0F0D
            | Code::Int1
    )
}

/// The encodings that are compared.
pub(super) fn encodings(bits: Bits) -> Vec<Code> {
    let flags = host_flags();
    chosen(bits, |name| name.is_empty() || flags.iter().any(|flag| flag == name))
}

/// The encodings that are compared on a host that has them all.
pub fn comparable() -> BTreeSet<Code> {
    [Bits::Long, Bits::Compatibility, Bits::Short]
        .into_iter()
        .flat_map(|bits| chosen(bits, |_| true))
        .collect()
}

/// The encodings whose features, by Linux's names, are all there.
fn chosen(bits: Bits, is_there: impl Fn(&str) -> bool) -> Vec<Code> {
    let here =
        |feature: &CpuidFeature| FEATURES.iter().any(|(known, name)| known == feature && is_there(name));
    let mut random = Random::new(1);
    Code::values()
        .filter(|code| {
            let info = code.op_code();
            let mut instruction = Instruction::default();
            instruction.set_code(*code);
            matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
                && match bits {
                    Bits::Long => info.mode64(),
                    Bits::Compatibility => info.mode32(),
                    Bits::Short => info.mode16(),
                }
                && !info.fwait()
                && *code != Code::INVALID
                && left_out(code.mnemonic()).is_none()
                && !differs_between_processors(*code)
                && !instruction.cpuid_features().is_empty()
                && instruction.cpuid_features().iter().all(here)
        })
        .filter(|code| (0..20).any(|_| Generator::instruction(&mut random, *code, bits).is_some()))
        .collect()
}

/// The processor's features by Linux's names.
fn host_flags() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    line.split_whitespace().map(str::to_owned).collect()
}

/// Makes cases.
pub(super) struct Generator {
    encodings: Vec<Code>,
    /// Those that may stand in a sequence.
    steady: Vec<Code>,
    /// Those whose flags programs branch on: an engine may execute them together with the branch.
    comparisons: Vec<Code>,
    next: usize,
    info: InstructionInfoFactory,
    encoder: Encoder,
    bits: Bits,
}

impl Generator {
    pub(super) fn new(encodings: Vec<Code>, bits: Bits) -> Generator {
        let steady = encodings.iter().copied().filter(|code| is_steady(*code)).collect();
        let comparisons = encodings.iter().copied().filter(|code| is_comparison(code.mnemonic())).collect();
        Generator {
            encodings,
            steady,
            comparisons,
            next: 0,
            info: InstructionInfoFactory::new(),
            encoder: Encoder::new(match bits {
                Bits::Long => 64,
                Bits::Compatibility => 32,
                Bits::Short => 16,
            }),
            bits,
        }
    }

    /// The next case, in slot `slot`.
    pub(super) fn case(&mut self, random: &mut Random, slot: usize) -> Case {
        loop {
            let made = if random.one_in(6) && !self.steady.is_empty() {
                self.sequence(random, slot)
            } else {
                let code = self.encodings[self.next % self.encodings.len()];
                self.next += 1;
                self.single(random, code, slot)
            };
            if let Some(case) = made {
                return case;
            }
        }
    }

    fn single(&mut self, random: &mut Random, code: Code, slot: usize) -> Option<Case> {
        let mut instruction = Generator::instruction(random, code, self.bits)?;
        let mut context = random.context();
        place(random, &mut instruction, &mut context, self.bits);
        let start = CODE + (slot * SLOT) as u64 - self.bits.code_base();
        let branches = is_branch(&instruction);
        let mut first = None;
        let mut bytes = Vec::new();
        if instruction.is_jcc_short_or_near() && !self.comparisons.is_empty() && random.one_in(2) {
            let code = random.pick(&self.comparisons);
            let mut comparison = Generator::instruction(random, code, self.bits)?;
            place(random, &mut comparison, &mut context, self.bits);
            bytes = self.encode(&comparison, start)?;
            first = Some(comparison);
        }
        let at = start + bytes.len() as u64;
        if branches {
            // Over the jump that every case ends with, to one of its own.
            self.bits.set_branch(&mut instruction, at);
            let len = self.encode(&instruction, at)?.len();
            self.bits.set_branch(&mut instruction, at + (len + self.bits.jump_len()) as u64);
        }
        if is_indirect_branch(&instruction) {
            let size = self.bits.address_size();
            let short = self.bits == Bits::Short;
            if instruction.op0_kind() != OpKind::Register
                || (instruction.op0_register().size() != size && !short)
            {
                return None;
            }
            context.gpr[instruction.op0_register().number()] = if short { SHORT_TAKEN } else { TAKEN };
        }
        // Segments count for nothing in 64-bit mode, but for FS and GS; in 32-bit mode CS cannot be written. Repeated
        // prefixes are allowed.
        if random.one_in(16) && !branches {
            bytes.push(random.pick(&[0x26u8, 0x2e, 0x36, 0x3e]));
        }
        bytes.extend(self.encode(&instruction, start + bytes.len() as u64)?);
        let code_len = bytes.len();
        let mut bytes = self.finish(bytes);
        if branches {
            bytes.extend(self.bits.jump(TAKEN_POINTER, CODE32, TAKEN));
        }
        let instructions = first.into_iter().chain([instruction]).collect();
        Some(self.bits.case(instructions, bytes, code_len, context))
    }

    /// Instructions one after the other, whose memory operands are based on RBX and indexed by R15, or ESI, which nothing
    /// among them writes.
    fn sequence(&mut self, random: &mut Random, slot: usize) -> Option<Case> {
        let mut context = random.context();
        context.gpr[3] = DATA + 0x800 + random.below(64) - self.bits.data_base();
        let by = self.bits.index();
        context.gpr[by.number()] = random.below(16);
        let at = CODE + (slot * SLOT) as u64 - self.bits.code_base();
        let mut bytes = Vec::new();
        let mut instructions = Vec::new();
        while (instructions.len() as u64) < SEQUENCE {
            let code = random.pick(&self.steady);
            let Some(mut instruction) = Generator::instruction(random, code, self.bits) else { continue };
            if has_memory(&instruction) {
                let aligned = is_aligned(code) || is_locked(&instruction);
                let displacement = if aligned { random.below(16) * 32 } else { random.below(512) };
                let index = if aligned || random.one_in(2) { Register::None } else { by };
                let scale = if index == Register::None { 1 } else { 1 << random.below(4) };
                set_memory(&mut instruction, self.bits.general(3), index, scale, displacement as i64);
                if aligned {
                    context.gpr[3] &= !31;
                }
            }
            if self.disturbs(&instruction) {
                continue;
            }
            let Some(encoded) = self.encode(&instruction, at + bytes.len() as u64) else { continue };
            bytes.extend(encoded);
            instructions.push(instruction);
        }
        let code_len = bytes.len();
        let bytes = self.finish(bytes);
        Some(self.bits.case(instructions, bytes, code_len, context))
    }

    /// Adds the jump to where registers are saved.
    fn finish(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        bytes.extend(self.bits.jump(SAVER, CODE64, saver(self.bits)));
        assert!(bytes.len() <= SLOT, "a case of {} bytes", bytes.len());
        bytes
    }

    /// Whether an instruction writes a register that a sequence's addresses depend on.
    fn disturbs(&mut self, instruction: &Instruction) -> bool {
        let writes = |access: OpAccess| {
            !matches!(access, OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess)
        };
        self.info.info(instruction).used_registers().iter().any(|used| {
            let full = used.register().full_register();
            let index = self.bits.index().full_register();
            writes(used.access()) && (matches!(full, Register::RBX | Register::RSP) || full == index)
        })
    }

    fn encode(&mut self, instruction: &Instruction, at: u64) -> Option<Vec<u8>> {
        let encoded = self.encoder.encode(instruction, at);
        // What cannot be encoded leaves its first bytes there.
        let bytes = self.encoder.take_buffer();
        encoded.ok().map(|_| bytes)
    }

    /// An instruction of this encoding with random registers and immediates; a memory operand has no address yet.
    fn instruction(random: &mut Random, code: Code, bits: Bits) -> Option<Instruction> {
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
    fn address_size(self) -> usize {
        match self {
            Bits::Long => 8,
            Bits::Compatibility => 4,
            Bits::Short => 2,
        }
    }

    /// General registers.
    fn registers(self) -> u64 {
        if self == Bits::Long { 16 } else { 8 }
    }

    /// A general register that any address may have: those of 16 bits have addresses of 32 bits too.
    fn general(self, number: u64) -> Register {
        general(self.address_size().max(4), number)
    }

    /// Index register of sequences.
    fn index(self) -> Register {
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

    fn set_branch(self, instruction: &mut Instruction, target: u64) {
        match self {
            Bits::Long => instruction.set_near_branch64(target),
            _ if instruction.op0_kind() == OpKind::NearBranch16 => {
                instruction.set_near_branch16(target as u16)
            }
            _ => instruction.set_near_branch32(target as u32),
        }
    }

    /// Length of the jump that a case ends with.
    fn jump_len(self) -> usize {
        if self == Bits::Short { 8 } else { 7 }
    }

    /// A jump of [`Bits::jump_len`] bytes: through a pointer, or to another segment.
    fn jump(self, pointer: u64, selector: u16, at: u64) -> Vec<u8> {
        let mut code = super::layout::Code::default();
        match self {
            Bits::Long => code.jump(pointer),
            Bits::Compatibility => code.far_jump(selector, at),
            Bits::Short => code.bytes(&[0x66]).far_jump(selector, at),
        };
        debug_assert_eq!(code.0.len(), self.jump_len());
        code.0
    }

    fn case(
        self,
        instructions: Vec<Instruction>,
        bytes: Vec<u8>,
        code_len: usize,
        mut context: Context,
    ) -> Case {
        if self != Bits::Long {
            context.gpr = context.gpr.map(|value| value & 0xffff_ffff);
        }
        Case { instructions, bytes, code_len, context, bits: self }
    }
}

fn byte(random: &mut Random, bits: Bits) -> Register {
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

fn set_memory(instruction: &mut Instruction, base: Register, index: Register, scale: u32, displacement: i64) {
    let size = if displacement == 0 && base != Register::None { 0 } else { 1 };
    let operand = MemoryOperand::new(base, index, scale, displacement, size, false, Register::None);
    instruction.set_memory_base(operand.base);
    instruction.set_memory_index(operand.index);
    instruction.set_memory_index_scale(operand.scale);
    instruction.set_memory_displacement64(displacement as u64);
    instruction.set_memory_displ_size(operand.displ_size);
}

pub(super) fn has_memory(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory)
}

/// Near jumps and calls through a register or memory.
fn is_indirect_branch(instruction: &Instruction) -> bool {
    matches!(instruction.flow_control(), FlowControl::IndirectBranch | FlowControl::IndirectCall)
}

fn is_branch(instruction: &Instruction) -> bool {
    instruction.op_count() > 0
        && matches!(
            instruction.op0_kind(),
            OpKind::NearBranch64 | OpKind::NearBranch32 | OpKind::NearBranch16
        )
}

/// Gathers raise #UD if two of their three registers are the same.
fn vsib_is_distinct(instruction: &Instruction) -> bool {
    if !instruction.memory_index().is_vector_register() {
        return true;
    }
    let index = instruction.memory_index().number();
    let others = [instruction.op0_register().number(), instruction.op2_register().number()];
    !others.contains(&index) && others[0] != others[1]
}

fn is_comparison(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(mnemonic, Cmp | Test | Sub | Add | And | Or | Xor | Dec | Inc | Neg | Sbb)
}

/// Whether an instruction may stand in a sequence: it goes on with the next one, and leaves no flag undefined.
fn is_steady(code: Code) -> bool {
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    instruction.flow_control() == FlowControl::Next
        && !instruction.is_string_instruction()
        && !instruction.is_stack_instruction()
        && !instruction.is_privileged()
        && instruction.rflags_undefined() == 0
        && super::compare::undefined(&instruction) == 0
        && !code
            .op_code()
            .op_kinds()
            .iter()
            .any(|kind| matches!(kind, K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y))
        && !is_bit_string(code)
        && !matches!(code.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu)
        && !matches!(
            code.mnemonic(),
            Mnemonic::In | Mnemonic::Out | Mnemonic::Cli | Mnemonic::Sti | Mnemonic::Xlatb
        )
}

fn is_bit_string(code: Code) -> bool {
    use Code::*;
    matches!(
        code,
        Bt_rm16_r16
            | Bt_rm32_r32
            | Bt_rm64_r64
            | Bts_rm16_r16
            | Bts_rm32_r32
            | Bts_rm64_r64
            | Btr_rm16_r16
            | Btr_rm32_r32
            | Btr_rm64_r64
            | Btc_rm16_r16
            | Btc_rm32_r32
            | Btc_rm64_r64
    )
}

/// Whether an access is atomic. Hosts slow those down by tens of milliseconds that cross a cache line (Linux's split lock
/// detection), so none here does.
fn is_locked(instruction: &Instruction) -> bool {
    instruction.has_lock_prefix() || matches!(instruction.mnemonic(), Mnemonic::Xchg | Mnemonic::Cmpxchg8b)
}

/// Whether a memory operand has to be aligned to its size, or #GP.
pub(super) fn is_aligned(code: Code) -> bool {
    use Mnemonic::*;
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    let features = instruction.cpuid_features();
    match code.op_code().encoding() {
        EncodingKind::VEX => matches!(
            code.mnemonic(),
            Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa
        ),
        _ => {
            code.mnemonic() == Cmpxchg16b
                || (instruction.memory_size().size() == 16
                    && !features.contains(&CpuidFeature::FPU)
                    && !matches!(code.mnemonic(), Movups | Movupd | Movdqu | Lddqu))
        }
    }
}

/// An address, relative to its segment, for an operand of `size` bytes: mostly where memory is, now and then where it ends or is forbidden.
fn target(random: &mut Random, size: u64, aligned: bool, bits: Bits) -> u64 {
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
fn place(random: &mut Random, instruction: &mut Instruction, context: &mut Context, bits: Bits) {
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
    fn context(&mut self) -> Context {
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
