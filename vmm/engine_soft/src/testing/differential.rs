//! General-purpose instructions against the processor that the test runs on: every encoding that iced-x86 knows
//! for a list of mnemonics, with random registers, flags, immediates and memory operands.
#![expect(unsafe_code, reason = "runs generated machine code at a fixed address")]

use iced_x86::{
    Code, Encoder, EncodingKind, Instruction, MemoryOperand, Mnemonic, OpCodeOperandKind as K, OpKind,
    Register,
};

use super::flat_vcpu;
use crate::cpu::RSP;
use crate::decode::op::{REG_BLOCK, Stop};
use crate::native::alu::Flags;
use crate::vcpu::SoftVcpu;

/// Where registers, code and data lie, in the guest and on the host alike.
const BASE: u64 = 0x3000_0000;
const SIZE: usize = 0x1_0000;
const CONTEXT: u32 = BASE as u32;
const CODE: u64 = BASE + 0x1000;
const DATA: u64 = BASE + 0x4000;
const DATA_LEN: usize = 0x400;
const FLAG_BITS: u64 = Flags::MASK;

#[derive(Clone, PartialEq, Debug)]
struct State {
    gpr: [u64; 16],
    rflags: u64,
    data: Vec<u8>,
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Values with edges more often than chance gives.
    fn value(&mut self) -> u64 {
        let raw = self.next();
        match self.next() % 8 {
            0 => raw & 1,
            1 => u64::MAX << (raw % 64),
            2 => 1 << (raw % 64),
            3 => (1u64 << (raw % 64)).wrapping_sub(1),
            4 => (raw as i8) as u64,
            5 => raw & 0x7fff_ffff,
            _ => raw,
        }
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.next() as usize % from.len()]
    }
}

/// Registers that instructions may use: all but RSP, and RBX which points to the data.
const GPRS: [u8; 14] = [0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

fn register(size: usize, number: u8) -> Register {
    let base = match size {
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    base + u32::from(number)
}

fn byte_register(random: &mut Random) -> Register {
    random.pick(&[
        Register::AL,
        Register::CL,
        Register::DL,
        Register::AH,
        Register::CH,
        Register::DH,
        Register::SIL,
        Register::DIL,
        Register::BPL,
        Register::R8L,
        Register::R15L,
    ])
}

/// A random instruction of this encoding; `None` for operand kinds that are not of interest.
fn generate(code: Code, random: &mut Random) -> Option<Instruction> {
    let info = code.op_code();
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    let mut memory = false;
    for operand in 0..info.op_count() {
        let kind = info.op_kind(operand);
        let as_memory = random.next() & 1 == 0;
        let general = |random: &mut Random, size| match size {
            1 => byte_register(random),
            size => register(size, random.pick(&GPRS)),
        };
        let reg = match kind {
            K::r8_reg | K::r8_opcode => general(random, 1),
            K::r16_reg | K::r16_opcode | K::r16_rm => general(random, 2),
            K::r32_reg | K::r32_opcode | K::r32_rm => general(random, 4),
            K::r64_reg | K::r64_opcode | K::r64_rm => general(random, 8),
            K::r8_or_mem if !as_memory => general(random, 1),
            K::r16_or_mem if !as_memory => general(random, 2),
            K::r32_or_mem if !as_memory => general(random, 4),
            K::r64_or_mem if !as_memory => general(random, 8),
            K::al => Register::AL,
            K::ax => Register::AX,
            K::eax => Register::EAX,
            K::rax => Register::RAX,
            K::cl => Register::CL,
            K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem | K::mem => {
                memory = true;
                instruction.set_op_kind(operand, OpKind::Memory);
                continue;
            }
            K::imm8 => {
                instruction.set_op_kind(operand, OpKind::Immediate8);
                instruction.set_immediate8(random.value() as u8);
                continue;
            }
            K::imm8_const_1 => {
                instruction.set_op_kind(operand, OpKind::Immediate8);
                instruction.set_immediate8(1);
                continue;
            }
            K::imm8sex16 => {
                instruction.set_op_kind(operand, OpKind::Immediate8to16);
                instruction.set_immediate8to16(i16::from(random.value() as i8));
                continue;
            }
            K::imm8sex32 => {
                instruction.set_op_kind(operand, OpKind::Immediate8to32);
                instruction.set_immediate8to32(i32::from(random.value() as i8));
                continue;
            }
            K::imm8sex64 => {
                instruction.set_op_kind(operand, OpKind::Immediate8to64);
                instruction.set_immediate8to64(i64::from(random.value() as i8));
                continue;
            }
            K::imm16 => {
                instruction.set_op_kind(operand, OpKind::Immediate16);
                instruction.set_immediate16(random.value() as u16);
                continue;
            }
            K::imm32 => {
                instruction.set_op_kind(operand, OpKind::Immediate32);
                instruction.set_immediate32(random.value() as u32);
                continue;
            }
            K::imm32sex64 => {
                instruction.set_op_kind(operand, OpKind::Immediate32to64);
                instruction.set_immediate32to64(i64::from(random.value() as i32));
                continue;
            }
            K::imm64 => {
                instruction.set_op_kind(operand, OpKind::Immediate64);
                instruction.set_immediate64(random.value());
                continue;
            }
            _ => return None,
        };
        instruction.set_op_kind(operand, OpKind::Register);
        instruction.set_op_register(operand, reg);
    }
    if memory {
        let disp = (random.next() % 64) as i64;
        let operand = if random.next() & 1 == 0 {
            MemoryOperand::with_base_displ_size(Register::RBX, disp, 1)
        } else {
            // R15 holds a small index for these.
            MemoryOperand::new(
                Register::RBX,
                Register::R15,
                random.pick(&[1, 2, 4, 8]),
                disp,
                1,
                false,
                Register::None,
            )
        };
        instruction.set_memory_base(operand.base);
        instruction.set_memory_index(operand.index);
        instruction.set_memory_index_scale(operand.scale);
        instruction.set_memory_displacement64(disp as u64);
        instruction.set_memory_displ_size(1);
        if info.can_use_lock_prefix() && instruction.op0_kind() == OpKind::Memory && random.next() & 1 == 0 {
            instruction.set_has_lock_prefix(true);
        }
    }
    Some(instruction)
}

fn encode(instruction: &Instruction) -> Option<Vec<u8>> {
    let mut encoder = Encoder::new(64);
    encoder.encode(instruction, CODE).ok()?;
    Some(encoder.take_buffer())
}

/// The host side: a low mapping with the registers, a stub around one instruction, and the data.
struct Native;

impl Native {
    fn new() -> Native {
        // SAFETY: a fresh mapping at an address that nothing else uses; NOREPLACE makes a clash an error.
        let at = unsafe {
            libc::mmap(
                BASE as *mut libc::c_void,
                SIZE,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        assert_eq!(at as u64, BASE, "the test's addresses are taken");
        Native
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        // SAFETY: callers stay inside the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) }
    }

    fn peek(&self, at: u64, len: usize) -> Vec<u8> {
        // SAFETY: callers stay inside the mapping.
        unsafe { std::slice::from_raw_parts(at as *const u8, len).to_vec() }
    }

    fn run(&self, code: &[u8], state: &State) -> State {
        let absolute = |opcode: &[u8], reg: u8, offset: u32| {
            // REX.W opcode /reg [disp32]
            let mut bytes = vec![0x48 | (reg >> 3) << 2];
            bytes.extend_from_slice(opcode);
            bytes.extend_from_slice(&[0x04 | (reg & 7) << 3, 0x25]);
            bytes.extend_from_slice(&(CONTEXT + offset).to_le_bytes());
            bytes
        };
        let mut stub = vec![0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57];
        stub.extend(absolute(&[0x89], 4, 0x88));
        stub.extend(absolute(&[0xff], 6, 0x80)); // push flags
        stub.push(0x9d);
        for reg in (0..16).filter(|&reg| reg != 4) {
            stub.extend(absolute(&[0x8b], reg, u32::from(reg) * 8));
        }
        stub.extend_from_slice(code);
        for reg in (0..16).filter(|&reg| reg != 4) {
            stub.extend(absolute(&[0x89], reg, 0x100 + u32::from(reg) * 8));
        }
        stub.extend(absolute(&[0x8b], 4, 0x88));
        stub.push(0x9c);
        stub.extend(absolute(&[0x8f], 0, 0x180)); // pop flags
        stub.extend_from_slice(&[0xfc, 0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);
        self.poke(CODE, &stub);
        let mut context = Vec::new();
        for value in state.gpr {
            context.extend_from_slice(&value.to_le_bytes());
        }
        context.extend_from_slice(&state.rflags.to_le_bytes());
        self.poke(BASE, &context);
        self.poke(DATA, &state.data);
        // SAFETY: the stub saves what the calling convention asks for, and runs one general-purpose instruction
        // whose memory operand lies in the data area.
        unsafe { std::mem::transmute::<u64, extern "sysv64" fn()>(CODE)() };
        let words = self.peek(BASE + 0x100, 0x88);
        let word = |index: usize| u64::from_le_bytes(words[index * 8..][..8].try_into().unwrap());
        let mut gpr: [u64; 16] = std::array::from_fn(word);
        gpr[RSP] = state.gpr[RSP];
        State { gpr, rflags: word(16) & FLAG_BITS, data: self.peek(DATA, DATA_LEN) }
    }
}

/// The guest side; `None` when the instruction faults.
fn run_soft(vcpu: &mut SoftVcpu, native: &Native, code: &[u8], state: &State) -> Option<State> {
    native.poke(CODE, code);
    native.poke(CODE + code.len() as u64, &[0x90; 16]);
    native.poke(DATA, &state.data);
    let (cpu, cache) = vcpu.parts();
    cache.clear();
    cpu.mmu.code_generation += 1;
    cpu.regs[..16].copy_from_slice(&state.gpr);
    cpu.set_rflags(state.rflags);
    cpu.rip = CODE;
    cpu.alone = true;
    let (block, ops) = cache.find(cpu).ok()?;
    cpu.mmu.running = block.pages;
    cpu.regs[REG_BLOCK as usize] = CODE;
    match (ops[0].exec)(cpu, &ops[0]) {
        Ok(()) | Err(Stop::Block) => {}
        Err(Stop::Fault | Stop::Alone) => return None,
    }
    let gpr = cpu.regs[..16].try_into().unwrap();
    Some(State { gpr, rflags: cpu.flags.to_rflags(), data: native.peek(DATA, DATA_LEN) })
}

/// Flags that the manual leaves undefined and in which the engine's way of computing differs from the
/// instruction itself (Intel SDM volume 2, "Flags Affected").
fn undefined_flags(mnemonic: Mnemonic) -> u64 {
    match mnemonic {
        // DIV, IDIV: all six are undefined.
        Mnemonic::Div | Mnemonic::Idiv => FLAG_BITS,
        // MUL and IMUL of bytes: SF, ZF, AF and PF.
        Mnemonic::Mul | Mnemonic::Imul => 0xd4,
        _ => 0,
    }
}

#[test]
fn general_instructions_do_what_the_processor_does() {
    use Mnemonic as M;
    let wanted = [
        M::Add,
        M::Or,
        M::Adc,
        M::Sbb,
        M::And,
        M::Sub,
        M::Xor,
        M::Cmp,
        M::Test,
        M::Inc,
        M::Dec,
        M::Neg,
        M::Not,
        M::Shl,
        M::Sal,
        M::Shr,
        M::Sar,
        M::Rol,
        M::Ror,
        M::Rcl,
        M::Rcr,
        M::Shld,
        M::Shrd,
        M::Mul,
        M::Imul,
        M::Div,
        M::Idiv,
        M::Mov,
        M::Movzx,
        M::Movsx,
        M::Movsxd,
        M::Lea,
        M::Xchg,
        M::Bswap,
        M::Cbw,
        M::Cwde,
        M::Cdqe,
        M::Cwd,
        M::Cdq,
        M::Cqo,
        M::Bt,
        M::Bts,
        M::Btr,
        M::Btc,
        M::Bsf,
        M::Bsr,
        M::Popcnt,
        M::Cmpxchg,
        M::Xadd,
        M::Cmpxchg8b,
        M::Cmpxchg16b,
        M::Clc,
        M::Stc,
        M::Cmc,
        M::Lahf,
        M::Sahf,
        M::Seta,
        M::Setae,
        M::Setb,
        M::Setbe,
        M::Sete,
        M::Setg,
        M::Setge,
        M::Setl,
        M::Setle,
        M::Setne,
        M::Setno,
        M::Setnp,
        M::Setns,
        M::Seto,
        M::Setp,
        M::Sets,
        M::Cmova,
        M::Cmovae,
        M::Cmovb,
        M::Cmovbe,
        M::Cmove,
        M::Cmovg,
        M::Cmovge,
        M::Cmovl,
        M::Cmovle,
        M::Cmovne,
        M::Cmovno,
        M::Cmovnp,
        M::Cmovns,
        M::Cmovo,
        M::Cmovp,
        M::Cmovs,
        M::Movnti,
        M::Nop,
    ];
    let native = Native::new();
    // SAFETY: the mapping lives as long as the process.
    let mapping = unsafe {
        vm_memory::mmap::MmapRegionBuilder::new_with_bitmap(
            SIZE,
            <harrier_engine::PageLog as vm_memory::bitmap::NewBitmap>::with_len(SIZE),
        )
        .with_raw_mmap_pointer(BASE as *mut u8)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .build()
        .unwrap()
    };
    let region = harrier_engine::GuestRegion::new(mapping, vm_memory::GuestAddress(BASE)).unwrap();
    let mut vcpu = flat_vcpu(region);
    let mut random = Random(0x0123_4567_89ab_cdef);
    let (mut compared, mut encodings) = (0, 0);
    for code in Code::values() {
        let info = code.op_code();
        if !info.mode64() || !wanted.contains(&code.mnemonic()) || info.encoding() != EncodingKind::Legacy {
            continue;
        }
        let mut here = 0;
        for _ in 0..300 {
            let Some(instruction) = generate(code, &mut random) else { break };
            let Some(bytes) = encode(&instruction) else { continue };
            let mut gpr: [u64; 16] = std::array::from_fn(|_| random.value());
            gpr[3] = DATA + 0x100;
            gpr[RSP] = BASE + 0xf000;
            let indexed = instruction.memory_index() != Register::None;
            if indexed {
                gpr[15] = random.next() % 8;
            }
            let bit_string = matches!(code.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
                && instruction.op0_kind() == OpKind::Memory
                && instruction.op1_kind() == OpKind::Register;
            if bit_string {
                let offset = instruction.op1_register().number();
                if indexed && offset == 15 {
                    continue;
                }
                gpr[offset] = (random.next() % 2048).wrapping_sub(1024);
            }
            if code.mnemonic() == M::Cmpxchg16b {
                let offset = instruction.memory_displacement64()
                    + if indexed { gpr[15] * u64::from(instruction.memory_index_scale()) } else { 0 };
                gpr[3] = gpr[3].wrapping_sub(offset % 16);
            }
            let data = (0..DATA_LEN).map(|_| random.value() as u8).collect();
            let state = State { gpr, rflags: (random.next() & FLAG_BITS) | 2, data };
            let Some(soft) = run_soft(&mut vcpu, &native, &bytes, &state) else {
                assert!(
                    matches!(code.mnemonic(), M::Div | M::Idiv),
                    "{instruction:?} {bytes:02x?} faults: {:?}",
                    vcpu.parts().0.fault
                );
                continue;
            };
            let mut real = native.run(&bytes, &state);
            let ignored = undefined_flags(code.mnemonic());
            real.rflags = (real.rflags & !ignored) | (soft.rflags & ignored);
            assert!(real == soft, "{}", mismatch(code, &bytes, &state, &real, &soft));
            here += 1;
        }
        encodings += u32::from(here > 0);
        compared += here;
    }
    assert!(encodings > 300 && compared > 50_000, "{encodings} encodings, {compared} instructions");
}

fn mismatch(code: Code, bytes: &[u8], before: &State, real: &State, soft: &State) -> String {
    let mut text = format!("{code:?} {bytes:02x?}\n");
    for reg in 0..16 {
        if real.gpr[reg] != soft.gpr[reg] {
            text += &format!(
                "reg {reg}: before {:x}, processor {:x}, engine {:x}\n",
                before.gpr[reg], real.gpr[reg], soft.gpr[reg]
            );
        }
    }
    text += &format!(
        "flags: before {:x}, processor {:x}, engine {:x}\n",
        before.rflags, real.rflags, soft.rflags
    );
    for at in (0..DATA_LEN).filter(|&at| real.data[at] != soft.data[at]) {
        text += &format!("data+{at:x}: processor {:x}, engine {:x}\n", real.data[at], soft.data[at]);
    }
    let used: Vec<_> = before.gpr.iter().map(|value| format!("{value:x}")).collect();
    text + &used.join(" ")
}
