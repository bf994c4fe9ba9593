//! SIMD and x87 instructions against the processor that the test runs on: every encoding that iced-x86 knows for
//! a set of features, with random registers, memory operands, MXCSR, x87 state and unmasked exceptions.
#![expect(unsafe_code, reason = "runs generated machine code at a fixed address")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use iced_x86::{
    Code, CpuidFeature, Encoder, EncodingKind, Instruction, MemoryOperand, Mnemonic, OpCodeOperandKind as K,
    OpKind, Register,
};

use super::flat_vcpu;
use crate::cpu::{RSP, cr4};
use crate::decode::op::{REG_BLOCK, Stop};
use crate::fault::vector;
use crate::native::alu::Flags;
use crate::vcpu::SoftVcpu;

/// Where registers, code and data lie, in the guest and on the host alike.
const BASE: u64 = 0x3100_0000;
const SIZE: usize = 0x8000;
const CODE: u64 = BASE + 0x2000;
const DATA: u64 = BASE + 0x5000;
const DATA_LEN: usize = 0x3000;

// Parts of the context.
const FLAGS_AT: u64 = BASE + 0x80;
const STACK_AT: u64 = BASE + 0x88;
const FX_IN: u64 = BASE + 0x200;
const FX_OUT: u64 = BASE + 0x400;
const YMM_IN: u64 = BASE + 0x600;
const YMM_OUT: u64 = BASE + 0x800;
const FX_HOST: u64 = BASE + 0xa00;
const OUT: u64 = 0x100;

/// The mapping is one for the process.
static TURN: Mutex<()> = Mutex::new(());
static TRAPPED: AtomicBool = AtomicBool::new(false);
static RESUME: AtomicU64 = AtomicU64::new(0);

#[derive(Clone, PartialEq)]
struct State {
    gpr: [u64; 16],
    rflags: u64,
    /// FXSAVE64 image up to the XMM registers.
    fx: Vec<u8>,
    ymm: [[u64; 4]; 16],
    data: Vec<u8>,
    /// The instruction raised #XM or #MF.
    trapped: bool,
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

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.next() as usize % from.len()]
    }

    fn single(&mut self) -> u32 {
        let raw = self.next() as u32;
        let sign = raw & 0x8000_0000;
        match self.below(12) {
            0 => sign,
            1 => sign | 0x7f80_0000,
            2 => sign | 0x7fc0_0000 | raw & 0xffff,
            3 => sign | 0x7f80_0001 | raw & 0xffff,
            4 => sign | raw & 0x007f_ffff,
            5 => sign | 0x0080_0000 | raw & 0xff,
            6 => sign | 0x7f7f_ff00 | raw & 0xff,
            7 => sign | 0x3f80_0000,
            8 => (f32::from(raw as i16) * 0.5).to_bits(),
            9 => (raw as i32 as f32).to_bits(),
            10 => sign | (0x2f80_0000 + ((raw & 0x3f) << 23)) | raw >> 8 & 0x7f_ffff,
            _ => raw,
        }
    }

    fn double(&mut self) -> u64 {
        let raw = self.next();
        let sign = raw & 1 << 63;
        match self.below(12) {
            0 => sign,
            1 => sign | 0x7ff0 << 48,
            2 => sign | 0x7ff8 << 48 | raw & 0xffff,
            3 => sign | 0x7ff0 << 48 | 1 | raw & 0xffff,
            4 => sign | raw & 0xf_ffff_ffff_ffff,
            5 => sign | 0x0010 << 48 | raw & 0xff,
            6 => sign | 0x7fef_ffff_ffff_ff00 | raw & 0xff,
            7 => sign | 0x3ff0 << 48,
            8 => (f64::from(raw as i16) * 0.5).to_bits(),
            9 => (raw as i64 as f64).to_bits(),
            10 => (f64::from(raw as i32) * 1.000_000_1).to_bits(),
            _ => raw,
        }
    }

    /// Eight bytes that mean something in one of the formats.
    fn word(&mut self) -> u64 {
        match self.below(4) {
            0 => u64::from(self.single()) | u64::from(self.single()) << 32,
            1 => self.double(),
            2 => self.pick(&[0, 1, u64::MAX, 0x8000_0000_8000_0000, 0x7fff_8000_ff00_80ff, 1 << 63]),
            _ => self.next(),
        }
    }

    /// 80-bit values: normal and every special kind.
    fn extended(&mut self) -> [u8; 10] {
        let raw = self.next();
        let mantissa = raw | 1 << 63;
        let (exponent, mantissa) = match self.below(12) {
            0 => (0, 0),
            1 => (0x7fff, 1 << 63),
            2 => (0x7fff, mantissa | 1 << 62),
            3 => (0x7fff, mantissa & !(1 << 62)),
            4 => (0, raw >> 1),
            5 => (raw as u16 & 0x7fff, raw >> 1),
            6 => (0x3fff, 1 << 63),
            7 => (0x3fff + (raw as u16 & 63), (raw | 1 << 63) & !0xffff_ffff),
            8 => (0x7ffe, mantissa),
            9 => (0x3fff - 16 + (raw as u16 & 31), mantissa),
            10 => (1, mantissa),
            _ => (raw as u16 & 0x7fff, mantissa),
        };
        let mut value = [0; 10];
        value[..8].copy_from_slice(&mantissa.to_le_bytes());
        value[8..].copy_from_slice(&(exponent | (self.next() as u16 & 0x8000)).to_le_bytes());
        value
    }
}

/// What a series of comparisons varies.
#[derive(Clone, Copy, Default)]
struct Variation {
    /// Unmask random exceptions of MXCSR and of the x87 control word.
    unmask: bool,
}

fn random_state(random: &mut Random, variation: Variation) -> State {
    let mut fx = vec![0u8; 512];
    let masks = |random: &mut Random| if variation.unmask { random.next() & 0x3f } else { 0x3f };
    let control = masks(random) | 0x40 | (random.next() & 0xf00);
    let flags = if random.one_in(2) { random.next() & 0x3f } else { 0 };
    let status = flags | random.next() & 0x4700 | random.below(8) << 11;
    // The summary bits follow from flags and masks, as FXRSTOR itself does not recompute them everywhere.
    let summary = if flags & !control & 0x3f != 0 { 0x8080 } else { 0 };
    fx[0..2].copy_from_slice(&(control as u16).to_le_bytes());
    fx[2..4].copy_from_slice(&((status | summary) as u16).to_le_bytes());
    fx[4] = match random.below(3) {
        0 => 0xff,
        1 => 0,
        _ => random.next() as u8,
    };
    let rounding = if random.one_in(2) { 0 } else { random.next() & 0xe040 };
    let mxcsr = rounding | masks(random) << 7 | if random.one_in(2) { random.next() & 0x3f } else { 0 };
    fx[24..28].copy_from_slice(&(mxcsr as u32).to_le_bytes());
    for register in 0..8 {
        fx[32 + 16 * register..][..10].copy_from_slice(&random.extended());
    }
    let ymm = std::array::from_fn(|_| std::array::from_fn(|_| random.word()));
    let mut state = State {
        gpr: std::array::from_fn(|_| random.word()),
        rflags: random.next() & Flags::MASK | 2,
        fx,
        ymm,
        data: Vec::new(),
        trapped: false,
    };
    for (register, value) in state.ymm.iter().enumerate() {
        for (half, word) in value.iter().take(2).enumerate() {
            state.fx[160 + 16 * register + 8 * half..][..8].copy_from_slice(&word.to_le_bytes());
        }
    }
    state
}

fn random_data(random: &mut Random) -> Vec<u8> {
    let mut data = Vec::with_capacity(DATA_LEN + 10);
    while data.len() < DATA_LEN {
        if random.one_in(3) {
            data.extend(random.extended());
        } else {
            data.extend(random.word().to_le_bytes());
        }
    }
    data.truncate(DATA_LEN);
    data
}

fn general(size: usize, number: u64) -> Register {
    let first = match size {
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    first + number as u32
}

/// A random instruction of this encoding whose memory operand is based on RBX; `None` for operand kinds that are
/// not of interest.
fn generate(code: Code, random: &mut Random) -> Option<Instruction> {
    let info = code.op_code();
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    for operand in 0..info.op_count() {
        let as_memory = random.one_in(2);
        // All but RBX, which points to the memory operand, and RSP.
        let number = random.pick(&[0u64, 1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        let any = random.below(16) as u32;
        let register = match info.op_kind(operand) {
            K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => Register::XMM0 + any,
            K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => Register::YMM0 + any,
            K::mm_reg | K::mm_rm => Register::MM0 + any % 8,
            K::r32_reg | K::r32_rm | K::r32_vvvv => general(4, number),
            K::r64_reg | K::r64_rm | K::r64_vvvv => general(8, number),
            K::st0 => Register::ST0,
            K::sti_opcode => Register::ST0 + any % 8,
            K::ax => Register::AX,
            K::xmm_or_mem if !as_memory => Register::XMM0 + any,
            K::ymm_or_mem if !as_memory => Register::YMM0 + any,
            K::mm_or_mem if !as_memory => Register::MM0 + any % 8,
            K::r8_or_mem if !as_memory => {
                random.pick(&[Register::AL, Register::CH, Register::DH, Register::R9L, Register::DIL])
            }
            K::r16_or_mem if !as_memory => general(2, number),
            K::r32_or_mem if !as_memory => general(4, number),
            K::r64_or_mem if !as_memory => general(8, number),
            K::xmm_or_mem
            | K::ymm_or_mem
            | K::mm_or_mem
            | K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mem => {
                instruction.set_op_kind(operand, OpKind::Memory);
                instruction.set_memory_base(Register::RBX);
                continue;
            }
            K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y => {
                instruction.set_op_kind(operand, OpKind::Memory);
                instruction.set_memory_base(Register::RBX);
                let ymm = matches!(info.op_kind(operand), K::mem_vsib32y | K::mem_vsib64y);
                let index = if ymm { Register::YMM0 } else { Register::XMM0 } + any;
                instruction.set_memory_index(index);
                instruction.set_memory_index_scale(random.pick(&[1, 2, 4, 8]));
                continue;
            }
            K::seg_rDI => {
                instruction.set_op_kind(operand, OpKind::MemorySegRDI);
                continue;
            }
            K::imm8 => {
                instruction.set_op_kind(operand, OpKind::Immediate8);
                instruction.set_immediate8(random.next() as u8);
                continue;
            }
            _ => return None,
        };
        instruction.set_op_kind(operand, OpKind::Register);
        instruction.set_op_register(operand, register);
    }
    Some(instruction)
}

fn encode(instruction: &Instruction) -> Option<Vec<u8>> {
    let mut encoder = Encoder::new(64);
    encoder.encode(instruction, CODE).ok()?;
    Some(encoder.take_buffer())
}

extern "C" fn on_sigfpe(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel hands over a valid context.
    let rip = unsafe { &mut (*context).uc_mcontext.gregs[libc::REG_RIP as usize] };
    if (CODE..CODE + 0x1000).contains(&(*rip as u64)) {
        TRAPPED.store(true, Ordering::SeqCst);
        *rip = RESUME.load(Ordering::SeqCst) as i64;
    } else {
        std::process::abort();
    }
}

/// The host side: a low mapping with the registers, a stub around one instruction, and the data. Nothing is
/// mapped after the data, so an access that is too wide shows.
struct Native {
    avx: bool,
}

impl Native {
    fn new() -> Native {
        static MAP: std::sync::Once = std::sync::Once::new();
        MAP.call_once(|| {
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
            // SAFETY: the handler only touches the context and atomics.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_sigfpe as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO;
                assert_eq!(libc::sigaction(libc::SIGFPE, &action, std::ptr::null_mut()), 0);
            }
        });
        Native { avx: std::is_x86_feature_detected!("avx") }
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        // SAFETY: callers stay inside the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) }
    }

    fn peek(&self, at: u64, len: usize) -> Vec<u8> {
        // SAFETY: callers stay inside the mapping.
        unsafe { std::slice::from_raw_parts(at as *const u8, len).to_vec() }
    }

    fn word(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.peek(at, 8).try_into().unwrap())
    }

    /// The stub, and the address after the instruction in it.
    fn stub(&self, code: &[u8]) -> (Vec<u8>, u64) {
        let at = |address: u64| MemoryOperand::with_displ(address, 4);
        let mut stub = vec![0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57];
        let push = |stub: &mut Vec<u8>, instruction: Result<Instruction, iced_x86::IcedError>| {
            stub.extend(encode(&instruction.unwrap()).unwrap());
        };
        push(&mut stub, Instruction::with2(Code::Mov_rm64_r64, at(STACK_AT), Register::RSP));
        push(&mut stub, Instruction::with1(Code::Fxsave64_m512byte, at(FX_HOST)));
        for register in (0..16u32).filter(|_| self.avx) {
            let from = at(YMM_IN + 32 * u64::from(register));
            push(
                &mut stub,
                Instruction::with2(Code::VEX_Vmovups_ymm_ymmm256, Register::YMM0 + register, from),
            );
        }
        push(&mut stub, Instruction::with1(Code::Fxrstor64_m512byte, at(FX_IN)));
        push(&mut stub, Instruction::with1(Code::Push_rm64, at(FLAGS_AT)));
        stub.push(0x9d);
        for register in (0..16u32).filter(|&register| register != 4) {
            let from = at(BASE + 8 * u64::from(register));
            push(&mut stub, Instruction::with2(Code::Mov_r64_rm64, Register::RAX + register, from));
        }
        stub.extend_from_slice(code);
        let resume = CODE + stub.len() as u64;
        for register in (0..16u32).filter(|&register| register != 4) {
            let to = at(BASE + OUT + 8 * u64::from(register));
            push(&mut stub, Instruction::with2(Code::Mov_rm64_r64, to, Register::RAX + register));
        }
        push(&mut stub, Instruction::with2(Code::Mov_r64_rm64, Register::RSP, at(STACK_AT)));
        stub.push(0x9c);
        push(&mut stub, Instruction::with1(Code::Pop_rm64, at(FLAGS_AT + OUT)));
        push(&mut stub, Instruction::with1(Code::Fxsave64_m512byte, at(FX_OUT)));
        for register in (0..16u32).filter(|_| self.avx) {
            let to = at(YMM_OUT + 32 * u64::from(register));
            push(&mut stub, Instruction::with2(Code::VEX_Vmovups_ymmm256_ymm, to, Register::YMM0 + register));
        }
        push(&mut stub, Instruction::with1(Code::Fxrstor64_m512byte, at(FX_HOST)));
        if self.avx {
            stub.extend_from_slice(&[0xc5, 0xf8, 0x77]);
        }
        stub.extend_from_slice(&[0xfc, 0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);
        (stub, resume)
    }

    fn run(&self, code: &[u8], state: &State) -> State {
        let (stub, resume) = self.stub(code);
        RESUME.store(resume, Ordering::SeqCst);
        TRAPPED.store(false, Ordering::SeqCst);
        self.poke(CODE, &stub);
        for (register, value) in state.gpr.iter().enumerate() {
            self.poke(BASE + 8 * register as u64, &value.to_le_bytes());
        }
        self.poke(FLAGS_AT, &state.rflags.to_le_bytes());
        self.poke(FX_IN, &state.fx);
        for (index, value) in state.ymm.iter().flatten().enumerate() {
            self.poke(YMM_IN + 8 * index as u64, &value.to_le_bytes());
        }
        self.poke(DATA, &state.data);
        // SAFETY: the stub saves what the calling convention asks for, and runs one instruction whose memory
        // operand lies in the data area.
        unsafe { std::mem::transmute::<u64, extern "sysv64" fn()>(CODE)() };
        let mut gpr: [u64; 16] = std::array::from_fn(|n| self.word(BASE + OUT + 8 * n as u64));
        gpr[RSP] = state.gpr[RSP];
        let fx = self.peek(FX_OUT, 512);
        let ymm = std::array::from_fn(|register| {
            std::array::from_fn(|part| {
                if part < 2 {
                    let at = 160 + 16 * register + 8 * part;
                    u64::from_le_bytes(fx[at..at + 8].try_into().unwrap())
                } else if self.avx {
                    self.word(YMM_OUT + (32 * register + 8 * part) as u64)
                } else {
                    state.ymm[register][part]
                }
            })
        });
        State {
            gpr,
            rflags: self.word(FLAGS_AT + OUT) & Flags::MASK,
            fx,
            ymm,
            data: self.peek(DATA, DATA_LEN),
            trapped: TRAPPED.load(Ordering::SeqCst),
        }
    }
}

/// Why the engine did not execute an instruction.
#[derive(Debug, PartialEq, Eq)]
struct Faulted(u8);

fn run_soft(vcpu: &mut SoftVcpu, native: &Native, code: &[u8], state: &State) -> Result<State, Faulted> {
    native.poke(CODE, code);
    native.poke(CODE + code.len() as u64, &[0x90; 16]);
    native.poke(DATA, &state.data);
    let (cpu, cache) = vcpu.parts();
    cache.clear();
    cpu.mmu.code_generation += 1;
    cpu.regs[..16].copy_from_slice(&state.gpr);
    cpu.flags = Flags::from_rflags(state.rflags);
    cpu.fpu.reset();
    cpu.fpu.ymm = state.ymm;
    cpu.fpu.take_x87(&state.fx, true);
    cpu.fpu.mxcsr.set(crate::fpu::Fpu::mxcsr_of(&state.fx));
    cpu.rip = CODE;
    cpu.alone = true;
    let (block, ops) = cache.find(cpu).map_err(|_| Faulted(255))?;
    cpu.mmu.running = block.pages;
    cpu.regs[REG_BLOCK as usize] = CODE;
    let trapped = match (ops[0].exec)(cpu, &ops[0]) {
        Ok(()) | Err(Stop::Block) => false,
        Err(Stop::Fault) if matches!(cpu.fault.vector, vector::XM | vector::MF) => true,
        Err(_) => {
            let vector = cpu.fault.vector;
            cpu.fpu.settle();
            return Err(Faulted(vector));
        }
    };
    let mut fx = state.fx.clone();
    cpu.fpu.put_x87(&mut fx, true);
    cpu.fpu.put_mxcsr(&mut fx);
    cpu.fpu.put_xmm(&mut fx, 16);
    Ok(State {
        gpr: cpu.regs[..16].try_into().unwrap(),
        rflags: cpu.flags.to_rflags(),
        fx,
        ymm: cpu.fpu.ymm,
        data: native.peek(DATA, DATA_LEN),
        trapped,
    })
}

/// A machine whose memory is the test's mapping.
fn machine() -> SoftVcpu {
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
    let cpu = vcpu.cpu();
    cpu.cr0 |= crate::cpu::cr0::PE;
    cpu.cr4 |= cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    cpu.xcr0 = 7;
    cpu.features = harrier_engine::cpuid::Features::of(harrier_engine::CpuModel::V3);
    cpu.mode_changed();
    vcpu
}

fn mismatch(code: Code, bytes: &[u8], before: &State, real: &State, soft: &State) -> String {
    let mut text = format!("{code:?} {bytes:02x?}\n");
    if real.trapped != soft.trapped {
        text += &format!("trapped: processor {}, engine {}\n", real.trapped, soft.trapped);
    }
    for n in 0..16 {
        if real.gpr[n] != soft.gpr[n] {
            text += &format!(
                "reg {n}: before {:x}, processor {:x}, engine {:x}\n",
                before.gpr[n], real.gpr[n], soft.gpr[n]
            );
        }
        if real.ymm[n] != soft.ymm[n] {
            text += &format!(
                "ymm{n}: before {:x?}, processor {:x?}, engine {:x?}\n",
                before.ymm[n], real.ymm[n], soft.ymm[n]
            );
        }
    }
    if real.rflags != soft.rflags {
        text += &format!(
            "flags: before {:x}, processor {:x}, engine {:x}\n",
            before.rflags, real.rflags, soft.rflags
        );
    }
    for at in (0..DATA_LEN).filter(|&at| real.data[at] != soft.data[at]) {
        text += &format!("data+{at:x}: processor {:x}, engine {:x}\n", real.data[at], soft.data[at]);
    }
    for at in (0..160).filter(|&at| real.fx[at] != soft.fx[at]) {
        text += &format!(
            "fx+{at}: before {:x}, processor {:x}, engine {:x}\n",
            before.fx[at], real.fx[at], soft.fx[at]
        );
    }
    text
}

/// Bytes of the FXSAVE image that are compared: not MXCSR_MASK; not the pointers unless asked for.
fn normalise(state: &mut State) {
    state.fx[5] = 0;
    state.fx[6..24].fill(0);
    state.fx[28..32].fill(0);
    state.fx.truncate(416);
}

/// Compares every encoding for which `wanted` holds; answers how many encodings and how many comparisons.
fn compare_all(
    wanted: impl Fn(Code) -> bool,
    rounds: usize,
    variation: Variation,
    adjust: impl Fn(Code, &mut State, &mut State),
) -> (usize, usize) {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let native = Native::new();
    let mut vcpu = machine();
    let mut random = Random(0x0123_4567_89ab_cdef);
    let (mut encodings, mut compared) = (0, 0);
    let mut wrong = Vec::new();
    let mut data = random_data(&mut random);
    for code in Code::values().filter(|&code| code.op_code().mode64() && wanted(code)) {
        let mut here = 0;
        for round in 0..rounds {
            let Some(instruction) = generate(code, &mut random) else { break };
            let Some(bytes) = encode(&instruction) else { continue };
            let mut state = random_state(&mut random, variation);
            if round % 32 == 0 {
                data = random_data(&mut random);
            }
            state.data.clone_from(&data);
            // Where iced-x86 does not know, it is two bytes or one of the big areas.
            let size = match iced_x86::Decoder::new(64, &bytes, 0).decode().memory_size().size() {
                0 => 512,
                size => size as u64,
            };
            let end = DATA + DATA_LEN as u64;
            let address = match random.below(4) {
                // At the very end of memory.
                0 => end - size,
                // Across a page, for what needs no alignment.
                1 if size > 1 => (DATA + 0x1000).wrapping_sub(1 + random.below(size - 1)),
                _ => DATA + 0x100 + random.below(0x100),
            };
            state.gpr[3] = if aligned(code) { address & !(size.max(16) - 1) } else { address };
            if instruction.memory_index().is_vector_register() {
                // Small indices of either width, and no register twice.
                let index = instruction.memory_index().number();
                let others = [instruction.op0_register().number(), instruction.op2_register().number()];
                if others.contains(&index) || others[0] == others[1] {
                    continue;
                }
                for word in &mut state.ymm[index] {
                    let small = |raw: u64| raw % 64;
                    *word = if quad_indices(code) {
                        small(*word)
                    } else {
                        small(*word) | small(*word >> 40) << 32
                    };
                    if *word & 1 != 0 {
                        *word =
                            if quad_indices(code) { word.wrapping_neg() } else { *word | 0xffff_ff80 << 32 };
                    }
                }
                for half in 0..2 {
                    let bytes = state.ymm[index][half].to_le_bytes();
                    state.fx[160 + 16 * index + 8 * half..][..8].copy_from_slice(&bytes);
                }
                state.gpr[3] = DATA + 0x800;
            }
            state.gpr[7] = DATA + 0x800 + random.below(64);
            state.gpr[RSP] = BASE + 0x1800;
            if round % 4 == 0 {
                // Without this, only the first access takes the slow path.
                vcpu.cpu().mmu.flush();
            }
            let mut soft = match run_soft(&mut vcpu, &native, &bytes, &state) {
                Ok(soft) => soft,
                Err(fault) => {
                    wrong.push(format!("{code:?} {bytes:02x?} raises {fault:?}"));
                    break;
                }
            };
            let mut real = native.run(&bytes, &state);
            adjust(code, &mut real, &mut soft);
            normalise(&mut real);
            normalise(&mut soft);
            if real != soft {
                wrong.push(mismatch(code, &bytes, &state, &real, &soft));
                break;
            }
            here += 1;
        }
        encodings += usize::from(here > 0);
        compared += here;
    }
    drop(turn);
    assert!(wrong.is_empty(), "{} encodings differ:\n{}", wrong.len(), wrong.join("\n"));
    (encodings, compared)
}

fn features(code: Code) -> &'static [CpuidFeature] {
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    instruction.cpuid_features()
}

/// Whether a memory operand must be aligned to 16 bytes or, with VEX, to its size.
fn aligned(code: Code) -> bool {
    use Mnemonic::*;
    match code.op_code().encoding() {
        EncodingKind::VEX => matches!(
            code.mnemonic(),
            Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa
        ),
        _ => {
            !features(code).contains(&CpuidFeature::FPU)
                && !matches!(code.mnemonic(), Movups | Movupd | Movdqu | Lddqu)
                && !crate::native::thunk::is_string_compare(code.mnemonic())
        }
    }
}

/// Instructions that are not compared: they have no result, or one that is not comparable.
fn left_out(code: Code) -> bool {
    use Mnemonic::*;
    matches!(
        code.mnemonic(),
        Prefetchnta
            | Prefetcht0
            | Prefetcht1
            | Prefetcht2
            | Prefetchw
            | Sfence
            | Lfence
            | Mfence
            | Monitor
            | Mwait
            | Ldmxcsr
            | Vldmxcsr
            | Pause
            | Clflush
    )
}

const SSE: &[CpuidFeature] = &[
    CpuidFeature::MMX,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::SSE3,
    CpuidFeature::SSSE3,
    CpuidFeature::SSE4_1,
    CpuidFeature::SSE4_2,
];

fn is_sse(code: Code) -> bool {
    code.op_code().encoding() == EncodingKind::Legacy
        && !features(code).is_empty()
        && features(code).iter().all(|feature| SSE.contains(feature))
        && !left_out(code)
}

#[test]
fn simd_instructions_do_what_the_processor_does() {
    let (encodings, compared) = compare_all(is_sse, 200, Variation::default(), |_, _, _| {});
    println!("{encodings} encodings, {compared} comparisons");
    assert!(encodings > 380 && compared > 70_000, "{encodings} encodings, {compared} comparisons");
}

const V3: &[CpuidFeature] = &[
    CpuidFeature::AVX,
    CpuidFeature::AVX2,
    CpuidFeature::FMA,
    CpuidFeature::F16C,
    CpuidFeature::BMI1,
    CpuidFeature::BMI2,
    CpuidFeature::MOVBE,
];

fn is_v3(code: Code) -> bool {
    matches!(code.op_code().encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        && !features(code).is_empty()
        && features(code).iter().all(|feature| V3.contains(feature))
        && !left_out(code)
}

#[test]
fn instructions_of_the_third_baseline_do_what_the_processor_does() {
    if !["avx2", "fma", "bmi2"].iter().all(|name| host_has(name)) {
        return;
    }
    let (encodings, compared) = compare_all(is_v3, 60, Variation::default(), |_, _, _| {});
    println!("{encodings} encodings, {compared} comparisons");
    assert!(encodings > 600 && compared > 35_000, "{encodings} encodings, {compared} comparisons");
}

fn quad_indices(code: Code) -> bool {
    use Mnemonic::*;
    matches!(code.mnemonic(), Vgatherqps | Vgatherqpd | Vpgatherqd | Vpgatherqq)
}

fn host_has(feature: &str) -> bool {
    match feature {
        "avx2" => std::is_x86_feature_detected!("avx2"),
        "fma" => std::is_x86_feature_detected!("fma"),
        _ => std::is_x86_feature_detected!("bmi2"),
    }
}

#[test]
fn unmasked_simd_exceptions_are_raised_where_the_processor_raises_them() {
    let unmask = Variation { unmask: true };
    // With overflow or underflow unmasked and raised, the inexact flag is not exact.
    let inexact = |code: Code, real: &mut State, soft: &mut State| {
        if matches!(code.mnemonic(), Mnemonic::Dpps | Mnemonic::Dppd) && real.trapped {
            // Products and sums raise their exceptions one after the other.
            real.fx[24] |= 0x3f;
            soft.fx[24] |= 0x3f;
        }
        let mxcsr = crate::fpu::Fpu::mxcsr_of(&real.fx);
        if real.trapped && mxcsr & !(mxcsr >> 7) & 0x18 != 0 {
            real.fx[24] |= 0x20;
            soft.fx[24] |= 0x20;
        }
    };
    let (encodings, compared) = compare_all(is_sse, 100, unmask, inexact);
    println!("{encodings} encodings, {compared} comparisons");
    assert!(encodings > 380 && compared > 35_000, "{encodings} encodings, {compared} comparisons");
}

fn is_x87(code: Code) -> bool {
    use CpuidFeature::{FPU, FPU287, FPU387};
    let x87 = features(code).iter().any(|feature| matches!(feature, FPU | FPU287 | FPU387));
    // FSTSW and the like are FWAIT and another instruction.
    let two = code.op_code().fwait();
    x87 && code.op_code().encoding() == EncodingKind::Legacy && !two
}

#[test]
fn x87_instructions_do_what_the_unit_does() {
    let (encodings, compared) = compare_all(is_x87, 300, Variation::default(), |_, _, _| {});
    println!("{encodings} encodings, {compared} comparisons");
    assert!(encodings > 100 && compared > 30_000, "{encodings} encodings, {compared} comparisons");
}

#[test]
fn unmasked_x87_exceptions_wait_for_the_next_instruction() {
    let unmask = Variation { unmask: true };
    let (encodings, compared) = compare_all(is_x87, 300, unmask, |_, _, _| {});
    println!("{encodings} encodings, {compared} comparisons");
    assert!(encodings > 100 && compared > 30_000, "{encodings} encodings, {compared} comparisons");
}
