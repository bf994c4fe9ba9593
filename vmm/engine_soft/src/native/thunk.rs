//! Guest SIMD and x87 instructions, executed by the host itself.
//!
//! A thunk is a piece of host code around one guest instruction whose operands were renamed: it loads operand
//! `i` from the place that argument `i` points to, executes the instruction, and stores what it changed. The
//! guest's register numbers are not part of it, so one thunk serves every use of an instruction form, and an
//! operation keeps only the thunk's number.
//!
//! | operand | pointer | vector | MMX | general | memory |
//! |---|---|---|---|---|---|
//! | 0 | RDI | XMM1 | MM1 | R9 | [RDI] |
//! | 1 | RSI | XMM2 | MM2 | R10 | [RSI] |
//! | 2 | RDX | XMM3 | MM3 | R11 | [RDX] |
//! | 3 | RCX | XMM4 | MM4 | RAX | |
//!
//! R8 points to [`Implicit`]. An implicit XMM0 comes from where RCX points.
//!
//! All vCPUs of the process share one arena. It is mapped readable and executable only; thunks are written
//! through the file behind it, so no page is ever writable and executable.
#![expect(unsafe_code, reason = "maps, fills and calls executable memory")]

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};

use iced_x86::{
    Code, CodeSize, CpuidFeature, Decoder, DecoderOptions, Encoder, EncodingKind, FlowControl, Instruction,
    InstructionInfoFactory, MemoryOperand, Mnemonic, OpAccess, OpKind, Register, RflagsBits,
};

use super::mem::HostPtr;
use crate::fpu::Fpu;

/// Bytes of a thunk at most; all start at multiples of it.
const SLOT: usize = 128;
/// Thunks at most: room for every instruction form, times 256 for those with an immediate. Memory is used as it
/// is filled.
const SLOTS: usize = 1 << 17;

/// Implicit operands and results.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(32))]
pub(crate) struct Implicit {
    /// XMM0 as a result.
    pub xmm0: [u64; 4],
    /// Status flags in the form of [`super::alu::Flags`].
    pub flags: u16,
    pub rax: u64,
    pub rdx: u64,
    pub rcx: u64,
}

const FLAGS: i64 = std::mem::offset_of!(Implicit, flags) as i64;
const RAX_AT: i64 = std::mem::offset_of!(Implicit, rax) as i64;
const RDX_AT: i64 = std::mem::offset_of!(Implicit, rdx) as i64;
const RCX_AT: i64 = std::mem::offset_of!(Implicit, rcx) as i64;

/// Where an operand is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    None,
    /// Vector register.
    Vector(u8),
    /// General register; bit 7 says AH, CH, DH or BH.
    General(u8),
    /// MMX register; the x87 state is settled.
    Mmx(u8),
    /// Guest memory: as many bytes as the operand has are accessible.
    Memory(HostPtr),
    /// [`Fpu::scratch`].
    Scratch,
}

type ThunkFn = unsafe extern "sysv64" fn(*mut u8, *mut u8, *mut u8, *mut u8, *mut Implicit) -> u64;

/// Base address of the arena, once it is mapped.
static BASE: AtomicU64 = AtomicU64::new(0);
static ARENA: LazyLock<Result<Mutex<Arena>, String>> =
    LazyLock::new(|| Arena::new().map(Mutex::new).map_err(|error| error.to_string()));

struct Arena {
    file: File,
    used: u32,
    known: HashMap<u64, Option<u32>>,
    encoder: Encoder,
    info: InstructionInfoFactory,
}

impl Arena {
    fn new() -> std::io::Result<Arena> {
        // SAFETY: a new descriptor, owned by the File right away.
        let file = unsafe {
            let fd = libc::memfd_create(c"harrier-thunks".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(std::io::Error::last_os_error());
            }
            File::from_raw_fd(fd)
        };
        file.set_len((SLOT * SLOTS) as u64)?;
        // SAFETY: a new mapping at an address of the kernel's choice, never unmapped.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                SLOT * SLOTS,
                libc::PROT_READ | libc::PROT_EXEC,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        // Slot 0 stays a lone RET, for operations without a thunk.
        file.write_all_at(&[0xc3], 0)?;
        BASE.store(base as u64, Ordering::Release);
        Ok(Arena {
            file,
            used: 1,
            known: HashMap::new(),
            encoder: Encoder::new(64),
            info: InstructionInfoFactory::new(),
        })
    }

    fn thunk(&mut self, instruction: &Instruction) -> Option<u32> {
        let key = key(instruction);
        if let Some(&known) = self.known.get(&key) {
            return known;
        }
        let slot = self.build(instruction);
        self.known.insert(key, slot);
        slot
    }

    fn build(&mut self, instruction: &Instruction) -> Option<u32> {
        let code = Builder { encoder: &mut self.encoder, info: &mut self.info }.build(instruction)?;
        let slot = self.used;
        if code.len() > SLOT || slot as usize >= SLOTS {
            log::error!("no room for a thunk of {} bytes after {slot}", code.len());
            return None;
        }
        self.file.write_all_at(&code, u64::from(slot) * SLOT as u64).ok()?;
        self.used += 1;
        Some(slot)
    }
}

/// What makes two instructions share a thunk.
fn key(instruction: &Instruction) -> u64 {
    let mut key = instruction.code() as u64;
    for operand in 0..instruction.op_count() {
        let part = match instruction.op_kind(operand) {
            OpKind::Memory => 1,
            // The stack registers are part of an x87 instruction.
            OpKind::Register if instruction.op_register(operand).is_st() => {
                2 + instruction.op_register(operand).number() as u64
            }
            _ => 0,
        };
        key |= part << (16 + 4 * operand);
    }
    key | u64::from(instruction.immediate8()) << 40
}

/// Makes the thunk for this instruction, or finds the one that is there; answers its number, for [`call`].
/// `None` when the instruction is not one that may run on the host.
pub(crate) fn prepare(instruction: &Instruction) -> Option<u64> {
    let arena = ARENA.as_ref().ok()?;
    arena.lock().unwrap_or_else(PoisonError::into_inner).thunk(instruction).map(u64::from)
}

/// Makes the tables of the decoder and the encoder, which are otherwise made with a machine: for a process of which copies
/// are to share them. It maps no executable memory, which copies would write to together.
pub fn prepare_tables() {
    let mut instruction = Decoder::new(64, &[0x90], DecoderOptions::NONE).decode();
    instruction.set_code(Code::Nopd);
    // Only what it needs is wanted, and that is there by now.
    let _ = Encoder::new(64).encode(&instruction, 0);
}

/// Whether executable memory can be had, without which there is neither SIMD nor x87; the error is the host's answer.
pub(crate) fn available() -> Result<(), &'static str> {
    ARENA.as_ref().map(drop).map_err(String::as_str)
}

/// Features whose instructions may become thunks.
fn allowed(feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(
        feature,
        FPU | FPU287
            | FPU387
            | CMOV
            | MMX
            | SSE
            | SSE2
            | SSE3
            | SSSE3
            | SSE4_1
            | SSE4_2
            | AES
            | PCLMULQDQ
            | SHA
            | GFNI
            | AVX
            | AVX2
            | FMA
            | F16C
            | VAES
            | VPCLMULQDQ
            | BMI1
            | BMI2
            | ADX
            | LZCNT
            | POPCNT
    )
}

const POINTERS: [Register; 4] = [Register::RDI, Register::RSI, Register::RDX, Register::RCX];
const XMMS: [Register; 4] = [Register::XMM1, Register::XMM2, Register::XMM3, Register::XMM4];
const YMMS: [Register; 4] = [Register::YMM1, Register::YMM2, Register::YMM3, Register::YMM4];
const MMS: [Register; 4] = [Register::MM1, Register::MM2, Register::MM3, Register::MM4];
const R64: [Register; 4] = [Register::R9, Register::R10, Register::R11, Register::RAX];
const R32: [Register; 4] = [Register::R9D, Register::R10D, Register::R11D, Register::EAX];
const R16: [Register; 4] = [Register::R9W, Register::R10W, Register::R11W, Register::AX];
const R8: [Register; 4] = [Register::R9L, Register::R10L, Register::R11L, Register::AL];

/// The register that stands for operand `operand`, which is `guest` in the guest's instruction.
fn rename(guest: Register, operand: usize) -> Option<Register> {
    let by_operand = if guest.is_xmm() {
        &XMMS
    } else if guest.is_ymm() {
        &YMMS
    } else if guest.is_mm() {
        &MMS
    } else if guest.is_gpr64() {
        &R64
    } else if guest.is_gpr32() {
        &R32
    } else if guest.is_gpr16() {
        &R16
    } else if guest.is_gpr8() {
        &R8
    } else if guest.is_st() {
        return Some(guest);
    } else {
        return None;
    };
    by_operand.get(operand).copied()
}

struct Builder<'a> {
    encoder: &'a mut Encoder,
    info: &'a mut InstructionInfoFactory,
}

impl Builder<'_> {
    /// Code of the thunk for a guest instruction.
    fn build(&mut self, guest: &Instruction) -> Option<Vec<u8>> {
        let vex = match guest.encoding() {
            EncodingKind::Legacy => false,
            EncodingKind::VEX => true,
            _ => return None,
        };
        let features = guest.cpuid_features();
        if features.is_empty()
            || !features.iter().all(|&feature| allowed(feature) && super::host::has(feature))
            || guest.has_lock_prefix()
        {
            return None;
        }
        if is_about_state(guest.mnemonic()) {
            return None;
        }
        let renamed = rename_operands(guest)?;
        let main = self.encode(&renamed)?;
        check(&main, &renamed)?;

        let mut code = Vec::with_capacity(SLOT);
        let info = self.info.info(&renamed);
        let access: Vec<OpAccess> = (0..renamed.op_count()).map(|operand| info.op_access(operand)).collect();
        let writes = |access: OpAccess| {
            matches!(
                access,
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            )
        };
        let string = is_string_compare(guest.mnemonic());
        let mut mmx = false;
        for operand in 0..renamed.op_count() {
            if renamed.op_kind(operand) == OpKind::Register {
                let register = renamed.op_register(operand);
                mmx |= register.is_mm();
                let load = load(register, operand as usize, vex);
                code.extend(self.encode_some(load)?);
            }
        }
        if uses_xmm0(guest.mnemonic()) {
            let from = MemoryOperand::with_base(Register::RCX);
            code.extend(
                self.encode(&Instruction::with2(Code::Movups_xmm_xmmm128, Register::XMM0, from).ok()?)?,
            );
        }
        if string {
            code.extend(self.load_implicit(Register::RAX, RAX_AT)?);
            code.extend(self.load_implicit(Register::RDX, RDX_AT)?);
        }
        let modified = status_flags(guest.rflags_modified());
        // What the instruction leaves alone or reads has to be there before.
        let incoming =
            status_flags(guest.rflags_read()) != 0 || (modified != 0 && modified != status_flags(u32::MAX));
        if incoming {
            // mov ax, [r8 + FLAGS]; add al, 127; sahf
            let from = MemoryOperand::with_base_displ(Register::R8, FLAGS);
            let ax = Instruction::with2(Code::Movzx_r32_rm16, Register::EAX, from).ok()?;
            // RAX may be taken by operand 3 or by PCMPESTRx, which do not read the flags.
            if !string && renamed.op_count() < 4 {
                code.extend(self.encode(&ax)?);
                code.extend([0x04, 127, 0x9e]);
            }
        }
        code.extend(&main);
        if modified != 0 {
            // lahf; seto al; mov [r8 + FLAGS], ax
            code.extend([0x9f, 0x0f, 0x90, 0xc0]);
            let to = MemoryOperand::with_base_displ(Register::R8, FLAGS);
            code.extend(self.encode(&Instruction::with2(Code::Mov_rm16_r16, to, Register::AX).ok()?)?);
        }
        if string {
            let to = MemoryOperand::with_base_displ(Register::R8, RCX_AT);
            code.extend(self.encode(&Instruction::with2(Code::Mov_rm64_r64, to, Register::RCX).ok()?)?);
            let to = MemoryOperand::with_base(Register::R8);
            let (store, register) = if vex {
                (Code::VEX_Vmovups_ymmm256_ymm, Register::YMM0)
            } else {
                (Code::Movups_xmmm128_xmm, Register::XMM0)
            };
            code.extend(self.encode(&Instruction::with2(store, to, register).ok()?)?);
        }
        for operand in 0..renamed.op_count() {
            let written = access.get(operand as usize).copied().is_some_and(writes);
            if renamed.op_kind(operand) == OpKind::Register && written {
                let store = store(renamed.op_register(operand), operand as usize, vex);
                code.extend(self.encode_some(store)?);
            }
        }
        if mmx {
            code.extend([0x0f, 0x77]);
        }
        if vex {
            code.extend([0xc5, 0xf8, 0x77]);
        }
        if is_x87(guest) {
            // fnstsw ax
            code.extend([0xdf, 0xe0]);
        }
        code.push(0xc3);
        Some(code)
    }

    fn load_implicit(&mut self, register: Register, at: i64) -> Option<Vec<u8>> {
        let from = MemoryOperand::with_base_displ(Register::R8, at);
        self.encode(&Instruction::with2(Code::Mov_r64_rm64, register, from).ok()?)
    }

    fn encode_some(&mut self, instruction: Option<Option<Instruction>>) -> Option<Vec<u8>> {
        match instruction? {
            Some(instruction) => self.encode(&instruction),
            None => Some(Vec::new()),
        }
    }

    fn encode(&mut self, instruction: &Instruction) -> Option<Vec<u8>> {
        self.encoder.encode(instruction, 0).ok()?;
        Some(self.encoder.take_buffer())
    }
}

/// The instruction on the thunk's operands instead of the guest's.
fn rename_operands(guest: &Instruction) -> Option<Instruction> {
    let mut renamed = *guest;
    renamed.set_code_size(CodeSize::Code64);
    renamed.set_segment_prefix(Register::None);
    renamed.set_has_rep_prefix(false);
    renamed.set_has_repne_prefix(false);
    for operand in 0..guest.op_count() {
        match guest.op_kind(operand) {
            OpKind::Register => {
                renamed.set_op_register(operand, rename(guest.op_register(operand), operand as usize)?);
            }
            OpKind::Memory => {
                renamed.set_memory_base(*POINTERS.get(operand as usize)?);
                renamed.set_memory_index(Register::None);
                renamed.set_memory_index_scale(1);
                renamed.set_memory_displacement64(0);
                renamed.set_memory_displ_size(0);
            }
            OpKind::Immediate8 => {}
            _ => return None,
        }
    }
    Some(renamed)
}

/// Makes sure that the encoded instruction is the one intended and touches nothing but its operands.
fn check(code: &[u8], intended: &Instruction) -> Option<()> {
    let decoded = Decoder::new(64, code, DecoderOptions::NONE).decode();
    let mut good = decoded.len() == code.len()
        && decoded.code() == intended.code()
        && decoded.op_count() == intended.op_count()
        && decoded.flow_control() == FlowControl::Next
        && !decoded.is_privileged()
        && !decoded.is_stack_instruction()
        && !decoded.has_segment_prefix();
    for operand in 0..decoded.op_count() {
        good &= match decoded.op_kind(operand) {
            OpKind::Register => decoded.op_register(operand) == intended.op_register(operand),
            OpKind::Memory => {
                Some(&decoded.memory_base()) == POINTERS.get(operand as usize)
                    && decoded.memory_index() == Register::None
                    && decoded.memory_displacement64() == 0
                    && decoded.memory_size().size() <= 32
            }
            OpKind::Immediate8 => decoded.immediate8() == intended.immediate8(),
            _ => false,
        };
    }
    if !good {
        log::error!("cannot rename the operands of {:?}", intended.code());
    }
    good.then_some(())
}

/// The load of an operand's register: `Some(None)` when it needs none, `None` when there is no way.
fn load(register: Register, operand: usize, vex: bool) -> Option<Option<Instruction>> {
    let from = MemoryOperand::with_base(*POINTERS.get(operand)?);
    let (code, register) = if register.is_st() {
        return Some(None);
    } else if register.is_mm() {
        (Code::Movq_mm_mmm64, register)
    } else if vex && (register.is_xmm() || register.is_ymm()) {
        (Code::VEX_Vmovups_ymm_ymmm256, *YMMS.get(operand)?)
    } else if register.is_xmm() {
        (Code::Movups_xmm_xmmm128, register)
    } else {
        (Code::Mov_r64_rm64, *R64.get(operand)?)
    };
    Some(Some(Instruction::with2(code, register, from).ok()?))
}

/// The store of an operand's register.
fn store(register: Register, operand: usize, vex: bool) -> Option<Option<Instruction>> {
    let to = MemoryOperand::with_base(*POINTERS.get(operand)?);
    let (code, register) = if register.is_st() {
        return Some(None);
    } else if register.is_mm() {
        (Code::Movq_mmm64_mm, register)
    } else if vex && (register.is_xmm() || register.is_ymm()) {
        (Code::VEX_Vmovups_ymmm256_ymm, *YMMS.get(operand)?)
    } else if register.is_xmm() {
        (Code::Movups_xmmm128_xmm, register)
    } else {
        (Code::Mov_rm64_r64, *R64.get(operand)?)
    };
    Some(Some(Instruction::with2(code, to, register).ok()?))
}

/// PCMPESTRx and PCMPISTRx, which have implicit operands and results.
pub(crate) fn is_string_compare(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Pcmpestri
            | Pcmpestrm
            | Pcmpestri64
            | Pcmpestrm64
            | Pcmpistri
            | Pcmpistrm
            | Vpcmpestri
            | Vpcmpestrm
            | Vpcmpestri64
            | Vpcmpestrm64
            | Vpcmpistri
            | Vpcmpistrm
    )
}

/// Instructions that would change the host's own modes or show its addresses; they have handlers.
fn is_about_state(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Ldmxcsr
            | Vldmxcsr
            | Fninit
            | Fldenv
            | Fnstenv
            | Fstenv
            | Frstor
            | Fnsave
            | Fsave
            | Vzeroall
            | Vzeroupper
    )
}

/// Instructions that read XMM0 besides their operands.
fn uses_xmm0(mnemonic: Mnemonic) -> bool {
    matches!(mnemonic, Mnemonic::Blendvps | Mnemonic::Blendvpd | Mnemonic::Pblendvb | Mnemonic::Sha256rnds2)
}

/// The status flags among iced-x86's flag bits, which include the condition codes of the x87 unit.
pub(crate) fn status_flags(bits: u32) -> u32 {
    use RflagsBits as R;
    bits & (R::OF | R::SF | R::ZF | R::AF | R::CF | R::PF)
}

fn is_x87(instruction: &Instruction) -> bool {
    use CpuidFeature::{FPU, FPU287, FPU387};
    instruction.cpuid_features().iter().any(|feature| matches!(feature, FPU | FPU287 | FPU387))
}

/// Executes a thunk.
///
/// `thunk` is what [`prepare`] answered, and the places fit that instruction: [`crate::exec::simd`] and
/// [`crate::exec::x87`] pair them in one function. Answers RAX: for x87 instructions the status word is in its
/// low half. MXCSR is the caller's business.
#[inline(always)]
pub(crate) fn call(thunk: u64, fpu: &mut Fpu, regs: &mut [u64; 32], places: [Place; 4]) -> u64 {
    let state = Pointers {
        vectors: (&raw mut fpu.ymm).cast(),
        general: (&raw mut *regs).cast(),
        mmx: fpu.x87.mmx_registers(),
        scratch: (&raw mut fpu.scratch).cast(),
    };
    let [a, b, c, d] = places;
    let (a, b, c, d) = (state.of(a), state.of(b), state.of(c), state.of(d));
    let implicit = &raw mut fpu.implicit;
    let entry = BASE.load(Ordering::Relaxed).wrapping_add((thunk & (SLOTS as u64 - 1)) * SLOT as u64);
    // SAFETY: `entry` is a slot of the arena, which holds the thunk that `prepare` wrote: code that accesses only
    // what its arguments point to, in the widths of the instruction's operands, follows the calling convention
    // and returns. The pointers come from exclusive borrows or are guest memory that the MMU has checked.
    unsafe {
        let thunk = std::mem::transmute::<*const (), ThunkFn>(entry as *const ());
        thunk(a, b, c, d, implicit)
    }
}

/// Where the register files are.
struct Pointers {
    vectors: *mut u8,
    general: *mut u8,
    mmx: *mut u8,
    scratch: *mut u8,
}

impl Pointers {
    /// Address of an operand. Register numbers are cut to the size of their file.
    #[inline(always)]
    fn of(&self, place: Place) -> *mut u8 {
        match place {
            Place::None => std::ptr::null_mut(),
            Place::Vector(slot) => self.vectors.wrapping_add(32 * usize::from(slot & 15)),
            // One byte further the register is AH, CH, DH or BH; slots 16 to 31 follow the registers.
            Place::General(slot) => {
                self.general.wrapping_add(8 * usize::from(slot & 15) + usize::from(slot >> 7))
            }
            Place::Mmx(slot) => self.mmx.wrapping_add(10 * usize::from(slot & 7)),
            Place::Memory(ptr) => ptr.addr() as *mut u8,
            Place::Scratch => self.scratch,
        }
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, OpCodeOperandKind};

    use super::*;

    #[test]
    fn every_form_has_room() {
        let mut forms = 1;
        for code in Code::values() {
            let mut instruction = Instruction::default();
            instruction.set_code(code);
            let info = code.op_code();
            let features = instruction.cpuid_features();
            let vector = matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
            if !vector || features.is_empty() || !features.iter().copied().all(allowed) {
                continue;
            }
            let kinds: Vec<_> = (0..info.op_count()).map(|operand| info.op_kind(operand)).collect();
            let immediates = if kinds.contains(&OpCodeOperandKind::imm8) { 256 } else { 1 };
            let stack = if kinds.contains(&OpCodeOperandKind::sti_opcode) { 8 } else { 2 };
            forms += stack * immediates;
        }
        assert!(forms < SLOTS, "{forms} forms");
    }

    fn prepared(bytes: &[u8]) -> Option<u64> {
        prepare(&Decoder::new(64, bytes, 0).decode())
    }

    #[test]
    fn the_same_form_with_other_registers_shares_a_thunk() {
        let first = prepared(&[0x66, 0x0f, 0xfe, 0xc1]).unwrap();
        assert_eq!(prepared(&[0x66, 0x45, 0x0f, 0xfe, 0xfe]), Some(first), "paddd of other registers");
        let memory = prepared(&[0x66, 0x0f, 0xfe, 0x03]).unwrap();
        assert_ne!(memory, first);
        assert_eq!(
            prepared(&[0x65, 0x66, 0x41, 0x0f, 0xfe, 0x4c, 0x83, 0x10]),
            Some(memory),
            "other address"
        );
        assert_ne!(
            prepared(&[0x66, 0x0f, 0x70, 0xc1, 0]),
            prepared(&[0x66, 0x0f, 0x70, 0xc1, 1]),
            "immediates"
        );
        assert_ne!(prepared(&[0xd8, 0xc1]), prepared(&[0xd8, 0xc2]), "x87 registers");
    }

    #[test]
    fn instructions_that_are_not_plain_arithmetic_get_none() {
        for bytes in [
            &[0x0f, 0x05][..],
            &[0xf4],
            &[0x50],
            &[0xe8, 0, 0, 0, 0],
            &[0x0f, 0x01, 0xf9],
            &[0x0f, 0xae, 0x13],
            &[0x66, 0x0f, 0xf7, 0xc1],
            &[0xf0, 0x48, 0x01, 0x03],
            &[0x48, 0x8b, 0x03],
            &[0x0f, 0xae, 0x03],
            &[0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1],
        ] {
            assert_eq!(prepared(bytes), None, "{bytes:02x?}");
        }
    }
}
