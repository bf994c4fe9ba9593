//! Cases: every encoding that is compared, with random operands, prefixes, registers and addresses, alone and in sequences.

use iced_x86::{Code, Encoder, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register};

use super::encodings::{
    has_memory, is_aligned, is_branch, is_comparison, is_indirect_branch, is_locked, is_steady,
};
use super::layout::{
    Bits, CODE, CODE32, CODE64, Context, DATA, SAVER, SHORT_TAKEN, SLOT, TAKEN, TAKEN_POINTER, saver,
};
use super::operands::{self, place, set_memory};
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
        let mut instruction = operands::instruction(random, code, self.bits)?;
        let mut context = random.context();
        place(random, &mut instruction, &mut context, self.bits);
        let start = CODE + (slot * SLOT) as u64 - self.bits.code_base();
        let branches = is_branch(&instruction);
        let mut first = None;
        let mut bytes = Vec::new();
        if instruction.is_jcc_short_or_near() && !self.comparisons.is_empty() && random.one_in(2) {
            let code = random.pick(&self.comparisons);
            let mut comparison = operands::instruction(random, code, self.bits)?;
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
            let Some(mut instruction) = operands::instruction(random, code, self.bits) else { continue };
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
}

impl Bits {
    pub(super) fn set_branch(self, instruction: &mut Instruction, target: u64) {
        match self {
            Bits::Long => instruction.set_near_branch64(target),
            _ if instruction.op0_kind() == OpKind::NearBranch16 => {
                instruction.set_near_branch16(target as u16)
            }
            _ => instruction.set_near_branch32(target as u32),
        }
    }

    /// Length of the jump that a case ends with.
    pub(super) fn jump_len(self) -> usize {
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
