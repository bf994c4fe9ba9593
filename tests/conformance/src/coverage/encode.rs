//! One instruction of each encoding, with operands that any processor takes.

use iced_x86::{
    Code, CodeSize, Decoder, DecoderOptions, Encoder, Instruction, OpCodeOperandKind as K, OpKind, Register,
};

/// Bytes of an encoding, and the mode that they are for.
pub(super) struct Encoded {
    pub(super) bytes: Vec<u8>,
    /// 64, or 32 for what is not there in 64-bit mode.
    pub(super) bits: u32,
    /// Whether the decoder takes the bytes for another instruction.
    pub(super) alias: bool,
}

/// The bytes of one encoding, for an instruction at `at` whose memory operand is at `data`. `None` for what is no instruction
/// of its own: data directives, and pairs that begin with WAIT.
pub(super) fn encode(code: Code, at: u64, data: u64) -> Option<Encoded> {
    let info = code.op_code();
    if !info.is_instruction() || info.fwait() {
        return None;
    }
    let bits = if info.mode64() { 64 } else { 32 };
    if bits == 32 && !info.mode32() {
        return None;
    }
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    instruction.set_code_size(if bits == 64 { CodeSize::Code64 } else { CodeSize::Code32 });
    for operand in 0..info.op_count() {
        set_operand(&mut instruction, operand, info.op_kind(operand), bits, at, data)?;
    }
    let mut encoder = Encoder::new(bits);
    encoder.encode(&instruction, at).ok()?;
    let bytes = encoder.take_buffer();
    let decoded = Decoder::with_ip(bits, &bytes, at, DecoderOptions::NONE).decode();
    Some(Encoded { alias: decoded.code() != code, bytes, bits })
}

fn set_operand(
    instruction: &mut Instruction,
    operand: u32,
    kind: K,
    bits: u32,
    at: u64,
    data: u64,
) -> Option<()> {
    // Gathers and tiles want registers that differ from each other.
    let register = |first: Register| Some(first + operand);
    let chosen = match kind {
        K::r8_reg | K::r8_opcode | K::r8_or_mem => register(Register::AL),
        K::r16_reg | K::r16_rm | K::r16_opcode | K::r16_or_mem => register(Register::AX),
        K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv | K::r32_or_mem | K::r32_or_mem_mpx => {
            register(Register::EAX)
        }
        K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv | K::r64_or_mem | K::r64_or_mem_mpx => {
            register(Register::RAX)
        }
        K::r16_reg_mem => register(Register::AX),
        K::r32_reg_mem => register(Register::EAX),
        K::r64_reg_mem => register(Register::RAX),
        K::mm_reg | K::mm_rm | K::mm_or_mem => register(Register::MM0),
        K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 | K::xmm_or_mem => {
            register(Register::XMM0)
        }
        K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 | K::ymm_or_mem => {
            register(Register::YMM0)
        }
        K::zmm_reg | K::zmm_rm | K::zmm_vvvv | K::zmm_or_mem => register(Register::ZMM0),
        K::xmmp3_vvvv => Some(Register::XMM4),
        K::zmmp3_vvvv => Some(Register::ZMM4),
        K::k_reg | K::k_rm | K::k_vvvv | K::k_or_mem => register(Register::K1),
        K::kp1_reg => Some(Register::K2),
        K::bnd_reg | K::bnd_or_mem_mpx => register(Register::BND0),
        K::tmm_reg | K::tmm_rm | K::tmm_vvvv => register(Register::TMM0),
        K::cr_reg => Some(Register::CR0),
        K::dr_reg => Some(Register::DR0),
        K::tr_reg => Some(Register::TR6),
        K::seg_reg | K::ds => Some(Register::DS),
        K::es => Some(Register::ES),
        K::cs => Some(Register::CS),
        K::ss => Some(Register::SS),
        K::fs => Some(Register::FS),
        K::gs => Some(Register::GS),
        K::al => Some(Register::AL),
        K::cl => Some(Register::CL),
        K::ax => Some(Register::AX),
        K::dx => Some(Register::DX),
        K::eax => Some(Register::EAX),
        K::rax => Some(Register::RAX),
        K::st0 => Some(Register::ST0),
        K::sti_opcode => Some(Register::ST1),
        _ => None,
    };
    if let Some(chosen) = chosen {
        instruction.set_op_kind(operand, OpKind::Register);
        instruction.set_op_register(operand, chosen);
        return Some(());
    }
    set_other(instruction, operand, kind, bits, at, data)
}

fn set_other(
    instruction: &mut Instruction,
    operand: u32,
    kind: K,
    bits: u32,
    at: u64,
    data: u64,
) -> Option<()> {
    let base = if bits == 64 { Register::RBX } else { Register::EBX };
    let memory = |instruction: &mut Instruction, index: Register| {
        instruction.set_op_kind(operand, OpKind::Memory);
        instruction.set_memory_base(base);
        instruction.set_memory_index(index);
        instruction.set_memory_index_scale(1);
    };
    let immediate = |instruction: &mut Instruction, kind: OpKind, value: u8| {
        instruction.set_op_kind(operand, kind);
        instruction.set_immediate_u64(operand, u64::from(value));
    };
    let branch = |instruction: &mut Instruction, kind: OpKind| {
        instruction.set_op_kind(operand, kind);
        instruction.set_near_branch64(at + 0x20);
    };
    match kind {
        K::mem | K::mem_mpx | K::mem_mib => memory(instruction, Register::None),
        K::sibmem => memory(instruction, if bits == 64 { Register::RCX } else { Register::ECX }),
        K::mem_vsib32x | K::mem_vsib64x => memory(instruction, Register::XMM6),
        K::mem_vsib32y | K::mem_vsib64y => memory(instruction, Register::YMM6),
        K::mem_vsib32z | K::mem_vsib64z => memory(instruction, Register::ZMM6),
        K::mem_offs => {
            instruction.set_op_kind(operand, OpKind::Memory);
            instruction.set_memory_displacement64(data);
            instruction.set_memory_displ_size(bits / 8);
        }
        K::farbr2_2 => {
            instruction.set_op_kind(operand, OpKind::FarBranch16);
            instruction.set_far_branch16(at as u16);
            instruction.set_far_branch_selector(super::CODE32);
        }
        K::farbr4_2 => {
            instruction.set_op_kind(operand, OpKind::FarBranch32);
            instruction.set_far_branch32(at as u32);
            instruction.set_far_branch_selector(super::CODE32);
        }
        K::imm4_m2z => immediate(instruction, OpKind::Immediate8, 0),
        K::imm8 if operand > 0 && instruction.op_kind(operand - 1) == OpKind::Immediate8 => {
            immediate(instruction, OpKind::Immediate8_2nd, 1);
        }
        K::imm8 if operand > 0 && instruction.op_kind(operand - 1) == OpKind::Immediate16 => {
            immediate(instruction, OpKind::Immediate8_2nd, 1);
        }
        K::imm8 | K::imm8_const_1 => immediate(instruction, OpKind::Immediate8, 1),
        K::imm8sex16 => immediate(instruction, OpKind::Immediate8to16, 1),
        K::imm8sex32 => immediate(instruction, OpKind::Immediate8to32, 1),
        K::imm8sex64 => immediate(instruction, OpKind::Immediate8to64, 1),
        K::imm16 => immediate(instruction, OpKind::Immediate16, 1),
        K::imm32 => immediate(instruction, OpKind::Immediate32, 1),
        K::imm32sex64 => immediate(instruction, OpKind::Immediate32to64, 1),
        K::imm64 => immediate(instruction, OpKind::Immediate64, 1),
        K::seg_rSI => instruction.set_op_kind(operand, source(bits)),
        K::es_rDI => instruction
            .set_op_kind(operand, if bits == 64 { OpKind::MemoryESRDI } else { OpKind::MemoryESEDI }),
        K::seg_rDI => instruction
            .set_op_kind(operand, if bits == 64 { OpKind::MemorySegRDI } else { OpKind::MemorySegEDI }),
        K::seg_rBX_al => {
            memory(instruction, Register::AL);
        }
        K::br16_1 | K::br16_2 => {
            instruction.set_op_kind(operand, OpKind::NearBranch16);
            instruction.set_near_branch16((at + 0x20) as u16);
        }
        K::br32_1 | K::br32_4 => {
            instruction.set_op_kind(operand, OpKind::NearBranch32);
            instruction.set_near_branch32((at + 0x20) as u32);
        }
        K::br64_1 | K::br64_4 => branch(instruction, OpKind::NearBranch64),
        K::xbegin_2 | K::xbegin_4 if bits == 64 => branch(instruction, OpKind::NearBranch64),
        K::xbegin_2 | K::xbegin_4 => {
            instruction.set_op_kind(operand, OpKind::NearBranch32);
            instruction.set_near_branch32((at + 0x20) as u32);
        }
        _ => return None,
    }
    Some(())
}

fn source(bits: u32) -> OpKind {
    if bits == 64 { OpKind::MemorySegRSI } else { OpKind::MemorySegESI }
}
