//! MMX, SSE, AVX and BMI instructions, executed by the host through thunks.
//!
//! An instruction's [`Shape`] says where its operands are and what it needs besides; the handler for a shape
//! checks, finds the operands and calls the thunk. Plain moves and bitwise logic have handlers of their own in
//! [`super::simd_move`] and [`super::avx`], instructions that are about state or memory order in
//! [`super::simd_state`] and [`super::xsave`].

use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind};

use crate::cpu::{Cpu, RAX, RCX, RDX, cr4};
use crate::decode::Mode;
use crate::decode::lower::{Selected, slot};
use crate::decode::op::{Exec, Op, Step, Stop};
use crate::fault::vector;
use crate::fpu::MXCSR_RESET;
use crate::mmu::Intent;
use crate::native::alu::Flags;
use crate::native::mxcsr::Mxcsr;
use crate::native::thunk::{self, Place};

/// Where operands are and what the instruction needs, packed: four operand classes of three bits, then
/// properties.
type Shape = u32;

// Classes of operands.
const N: Shape = 0;
const X: Shape = 1;
const G: Shape = 2;
const M: Shape = 3;
const MEM: Shape = 4;

// Which checks come first; SSE is the default.
const MMX: Shape = 1 << 12;
const AVX: Shape = 2 << 12;
const INTEGER: Shape = 3 << 12;
const KIND: Shape = 3 << 12;
const BMI: Shape = INTEGER | PROTECTED;
/// Depends on MXCSR and raises floating-point exceptions.
const FP: Shape = 1 << 14;
/// Changes the status flags.
const FLAGS: Shape = 1 << 15;
/// PCMPESTRx or PCMPISTRx.
const STRING: Shape = 1 << 16;
/// General registers with a VEX prefix, which real mode does not know.
const PROTECTED: Shape = 1 << 17;

/// In the slot of a memory operand: #GP unless it is aligned to its size; below it the size's logarithm.
const ALIGNED: u8 = 0x80;

const fn shape(a: Shape, b: Shape, c: Shape, d: Shape) -> Shape {
    a | b << 3 | c << 6 | d << 9
}

const fn class(shape: Shape, operand: usize) -> Shape {
    shape >> (3 * operand) & 7
}

const fn memory_operand(shape: Shape) -> Option<usize> {
    let mut operand = 0;
    while operand < 4 {
        if class(shape, operand) == MEM {
            return Some(operand);
        }
        operand += 1;
    }
    None
}

const fn has(shape: Shape, wanted: Shape) -> bool {
    let mut operand = 0;
    while operand < 4 {
        if class(shape, operand) == wanted {
            return true;
        }
        operand += 1;
    }
    false
}

/// Picks the instance of [`by_thunk`] for a shape known at run time.
macro_rules! instances {
    ($wanted:expr, $([$a:tt $b:tt $c:tt $d:tt] $($property:expr),+;)*) => {
        match $wanted {
            $($(
                s if s == shape($a, $b, $c, $d) | ($property) => {
                    Some(by_thunk::<{ shape($a, $b, $c, $d) | ($property) }> as Exec)
                }
            )+)*
            _ => None,
        }
    };
}

fn handler(wanted: Shape) -> Option<Exec> {
    instances! { wanted,
        [X N N N] 0;
        [M N N N] MMX;
        [X X N N] 0, FP, FLAGS, FP | FLAGS, STRING | FLAGS;
        [X MEM N N] 0, FP, FLAGS, FP | FLAGS, STRING | FLAGS;
        [MEM X N N] 0;
        [X G N N] 0, FP;
        [G X N N] 0, FP;
        [G MEM N N] FP, INTEGER;
        [G G N N] INTEGER, BMI, BMI | FLAGS;
        [G MEM N N] BMI, BMI | FLAGS;
        [G G G N] BMI, BMI | FLAGS;
        [G G MEM N] BMI, BMI | FLAGS;
        [G MEM G N] BMI, BMI | FLAGS;
        [M M N N] MMX;
        [M MEM N N] MMX, MMX | FP;
        [M G N N] MMX;
        [G M N N] MMX;
        [MEM M N N] MMX;
        [MEM G N N] MMX;
        [X M N N] MMX, MMX | FP;
        [M X N N] MMX, MMX | FP;
    }
    .or_else(|| avx_handler(wanted))
}

fn avx_handler(wanted: Shape) -> Option<Exec> {
    instances! { wanted,
        [X X N N] AVX, AVX | FP, AVX | FLAGS, AVX | FP | FLAGS, AVX | STRING | FLAGS;
        [X MEM N N] AVX, AVX | FP, AVX | FLAGS, AVX | FP | FLAGS, AVX | STRING | FLAGS;
        [MEM X N N] AVX, AVX | FP;
        [X G N N] AVX;
        [G X N N] AVX, AVX | FP;
        [G MEM N N] AVX | FP;
        [MEM G N N] AVX;
        [X X X N] AVX, AVX | FP;
        [X X MEM N] AVX, AVX | FP;
        [X X G N] AVX, AVX | FP;
        [X X X X] AVX;
        [X X MEM X] AVX;
    }
}

/// Handler of a SIMD instruction, or `None` when this is none that the host can execute.
pub(crate) fn select(instruction: &Instruction, op: &mut Op, mode: Mode) -> Option<Selected> {
    let by_hand = super::simd_move::select(instruction, op)
        .or_else(|| super::simd_state::select(instruction, op, mode))
        .or_else(|| super::avx::select(instruction, op))
        .or_else(|| super::xsave::select(instruction))
        .or_else(|| super::vex_integer::select(instruction, op));
    if by_hand.is_some() {
        return by_hand;
    }
    if !instruction.cpuid_features().iter().copied().all(is_simd) {
        return None;
    }
    let mut wanted = properties(instruction)?;
    let mut slots = [0u8; 4];
    for operand in 0..instruction.op_count() {
        let (class, slot) = match instruction.op_kind(operand) {
            OpKind::Register => {
                let register = instruction.op_register(operand);
                let class = if register.is_xmm() || register.is_ymm() {
                    X
                } else if register.is_mm() {
                    M
                } else if register.is_gpr() {
                    G
                } else {
                    return None;
                };
                (class, slot(register))
            }
            OpKind::Memory => (MEM, memory_slot(instruction)?),
            OpKind::Immediate8 => continue,
            _ => return None,
        };
        wanted |= class << (3 * operand);
        *slots.get_mut(operand as usize)? = slot;
    }
    if has(wanted, M) {
        wanted |= MMX;
    }
    if wanted & STRING != 0 {
        use Mnemonic::{Pcmpestrm, Pcmpestrm64, Pcmpistrm, Vpcmpestrm, Vpcmpestrm64, Vpcmpistrm};
        slots[2] = u8::from(matches!(
            instruction.mnemonic(),
            Pcmpestrm | Pcmpestrm64 | Pcmpistrm | Vpcmpestrm | Vpcmpestrm64 | Vpcmpistrm
        ));
    }
    let exec = handler(wanted)?;
    op.imm = thunk::prepare(instruction)?;
    [op.reg, op.rm] = [slots[0], slots[1]];
    op.aux = u16::from_le_bytes([slots[2], slots[3]]);
    Selected::go_on(exec)
}

/// Features whose instructions this module executes.
fn is_simd(feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(
        feature,
        MMX | SSE
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
    )
}

fn properties(instruction: &Instruction) -> Option<Shape> {
    let mut shape = match instruction.encoding() {
        EncodingKind::Legacy => 0,
        EncodingKind::VEX => AVX,
        _ => return None,
    };
    let mnemonic = instruction.mnemonic();
    let integer = |feature: &CpuidFeature| matches!(feature, CpuidFeature::BMI1 | CpuidFeature::BMI2);
    if mnemonic == Mnemonic::Crc32 {
        shape = INTEGER;
    } else if instruction.cpuid_features().iter().any(integer) {
        shape = INTEGER | PROTECTED;
    }
    if is_floating_point(mnemonic) {
        shape |= FP;
    }
    if thunk::status_flags(instruction.rflags_modified()) != 0 {
        shape |= FLAGS;
    }
    if thunk::is_string_compare(mnemonic) {
        shape |= STRING;
    }
    Some(shape)
}

fn memory_slot(instruction: &Instruction) -> Option<u8> {
    let size = instruction.memory_size().size();
    if !size.is_power_of_two() || size > 32 {
        return None;
    }
    let mnemonic = instruction.mnemonic();
    let aligned = match instruction.encoding() {
        EncodingKind::Legacy => size == 16 && !thunk::is_string_compare(mnemonic),
        _ => false,
    };
    Some(size.ilog2() as u8 | if aligned { ALIGNED } else { 0 })
}

/// Executes an instruction of one shape.
fn by_thunk<const S: Shape>(cpu: &mut Cpu, op: &Op) -> Step {
    match S & KIND {
        MMX => {
            if has(S, X) {
                cpu.sse_check()?;
            }
            cpu.mmx_check()?;
        }
        AVX if !cpu.fpu.usable.avx => return cpu.deny_avx(),
        0 => cpu.sse_check()?,
        _ if S & PROTECTED != 0 && (cpu.real_mode() || cpu.v86()) => return cpu.raise_ud(),
        _ => {}
    }
    let [low, high] = op.aux.to_le_bytes();
    let slots = [op.reg, op.rm, low, high];
    let mut places = [Place::None; 4];
    let mut va = 0;
    if let Some(operand) = memory_operand(S) {
        (places[operand], va) = if operand == 0 {
            locate_store(cpu, op, slots[operand])?
        } else {
            locate_load(cpu, op, slots[operand])?
        };
    }
    for operand in 0..4 {
        match class(S, operand) {
            X => places[operand] = Place::Vector(slots[operand]),
            G => places[operand] = Place::General(slots[operand]),
            M => places[operand] = Place::Mmx(slots[operand]),
            _ => {}
        }
    }
    if S & KIND == MMX {
        cpu.fpu.x87.enter_mmx();
    }
    if S & KIND == 0 {
        // Some instructions read XMM0 besides their operands.
        places[3] = Place::Vector(0);
    }
    if S & FLAGS != 0 {
        cpu.fpu.implicit.flags = cpu.flags.0;
    }
    if S & STRING != 0 {
        cpu.fpu.implicit.rax = cpu.regs[RAX];
        cpu.fpu.implicit.rdx = cpu.regs[RDX];
    }
    if S & FP == 0 || cpu.fpu.mxcsr.resident() {
        thunk::call(op.imm, &mut cpu.fpu, &mut cpu.regs, places);
    } else {
        call_with_mxcsr(cpu, op.imm, places)?;
    }
    if S & FLAGS != 0 {
        cpu.flags = Flags(cpu.fpu.implicit.flags);
    }
    if S & STRING != 0 {
        if slots[2] == 0 {
            cpu.regs[RCX] = cpu.fpu.implicit.rcx;
        } else if S & KIND == AVX {
            cpu.fpu.ymm[0] = cpu.fpu.implicit.xmm0;
        } else {
            let [low, high, ..] = cpu.fpu.implicit.xmm0;
            cpu.fpu.set_xmm(0, [low, high]);
        }
    }
    if S & KIND == MMX && class(S, 0) == M {
        cpu.fpu.x87.mmx_written(slots[0]);
    }
    if class(S, 0) == MEM
        && let Place::Scratch = places[0]
    {
        return store_scratch(cpu, va, slots[0]);
    }
    Ok(())
}

/// Where an operand in memory can be read, and its linear address.
#[inline(always)]
fn locate_load(cpu: &mut Cpu, op: &Op, slot: u8) -> Result<(Place, u64), Stop> {
    let size = 1u64 << (slot & 7);
    let va = cpu.addr(op, size, Intent::Read)?;
    if slot & ALIGNED != 0 && va & (size - 1) != 0 {
        return cpu.raise_gp();
    }
    match cpu.mmu.tlb.read_len(cpu.mmu.rights, va, size) {
        Some(ptr) => Ok((Place::Memory(ptr), va)),
        None => {
            load_scratch(cpu, va, size as usize)?;
            Ok((Place::Scratch, va))
        }
    }
}

/// Where an operand in memory can be written.
#[inline(always)]
fn locate_store(cpu: &mut Cpu, op: &Op, slot: u8) -> Result<(Place, u64), Stop> {
    let size = 1u64 << (slot & 7);
    let va = cpu.addr(op, size, Intent::Write)?;
    if slot & ALIGNED != 0 && va & (size - 1) != 0 {
        return cpu.raise_gp();
    }
    match cpu.mmu.tlb.write_len(cpu.mmu.rights, va, size) {
        Some(ptr) => Ok((Place::Memory(ptr), va)),
        None => {
            cpu.probe_write(va, size as usize)?;
            Ok((Place::Scratch, va))
        }
    }
}

/// Reads an operand that crosses a page, misses the look-aside buffer or is a device's.
#[cold]
#[inline(never)]
pub(crate) fn load_scratch(cpu: &mut Cpu, va: u64, size: usize) -> Step {
    let mut bytes = [0u8; 64];
    let size = size.min(bytes.len());
    cpu.read(va, &mut bytes[..size])?;
    cpu.fpu.scratch = bytes;
    Ok(())
}

#[cold]
#[inline(never)]
fn store_scratch(cpu: &mut Cpu, va: u64, slot: u8) -> Step {
    let bytes = cpu.fpu.scratch;
    cpu.write(va, &bytes[..(1 << (slot & 7)).min(bytes.len())])
}

/// Elements of a masked access that take part.
pub(crate) struct Mask {
    /// One bit an element.
    chosen: u32,
    count: usize,
}

impl Mask {
    pub(crate) fn of(count: usize, chosen: impl Fn(usize) -> bool) -> Mask {
        Mask { chosen: (0..count).fold(0, |mask, at| mask | u32::from(chosen(at)) << at), count }
    }

    pub(crate) fn elements(&self) -> impl Iterator<Item = usize> + use<> {
        let chosen = self.chosen;
        (0..self.count).filter(move |at| chosen >> at & 1 != 0)
    }

    /// Stores the chosen elements of `size` bytes (1, 4 or 8) from `va` on; when one of them faults, none.
    pub(crate) fn store(&self, cpu: &mut Cpu, va: u64, size: u64, value: impl Fn(usize) -> [u8; 8]) -> Step {
        for at in self.elements() {
            cpu.probe_write(va.wrapping_add(at as u64 * size), size as usize)?;
        }
        for at in self.elements() {
            cpu.write(va.wrapping_add(at as u64 * size), &value(at)[..size as usize])?;
        }
        Ok(())
    }

    /// Loads the chosen elements; the others are zero.
    pub(crate) fn load(&self, cpu: &mut Cpu, va: u64, size: usize) -> Result<[u8; 32], Stop> {
        let mut value = [0; 32];
        for at in self.elements() {
            let mut element = [0; 8];
            cpu.read(va.wrapping_add((at * size) as u64), &mut element[..size])?;
            value[at * size..(at + 1) * size].copy_from_slice(&element[..size]);
        }
        Ok(value)
    }
}

/// Executes an instruction that depends on MXCSR while the guest's is not in the host's.
#[cold]
#[inline(never)]
fn call_with_mxcsr(cpu: &mut Cpu, thunk: u64, places: [Place; 4]) -> Step {
    if cpu.fpu.mxcsr.unmasked() {
        return call_unmasked(cpu, thunk, places);
    }
    call_masked(cpu, thunk, places);
    Ok(())
}

fn call_masked(cpu: &mut Cpu, thunk: u64, places: [Place; 4]) {
    let mut mxcsr = std::mem::replace(&mut cpu.fpu.mxcsr, Mxcsr::new(MXCSR_RESET));
    mxcsr.around(|| {
        thunk::call(thunk, &mut cpu.fpu, &mut cpu.regs, places);
    });
    cpu.fpu.mxcsr = mxcsr;
}

/// Invalid operation, denormal, divide by zero: found before the operation is carried out.
const BEFORE: u32 = 7;
const UNDERFLOW: u32 = 0x10;
const FLUSH_TO_ZERO: u32 = 0x8000;

/// Executes an instruction while the guest has floating-point exceptions unmasked: first with all masked, then
/// what was raised decides (Intel SDM volume 1, 11.5.2).
///
/// One thing differs from the processor: with overflow or underflow unmasked, the inexact flag is the one of
/// the masked result.
fn call_unmasked(cpu: &mut Cpu, thunk: u64, places: [Place; 4]) -> Step {
    let guest = cpu.fpu.mxcsr.get();
    let mut tried = places;
    if let Place::Memory(_) = tried[0] {
        tried[0] = Place::Scratch;
    }
    let before = (cpu.fpu.ymm, cpu.regs, cpu.fpu.x87.settled());
    let run = |cpu: &mut Cpu, control: u32| {
        cpu.fpu.ymm = before.0;
        cpu.regs = before.1;
        cpu.fpu.x87 = before.2.clone();
        cpu.fpu.mxcsr.set((control | MXCSR_RESET) & !0x3f);
        call_masked(cpu, thunk, tried);
        cpu.fpu.mxcsr.get() & 0x3f
    };
    let unmasked = !(guest >> 7) & 0x3f;
    let mut raised = 0;
    let mut control = guest;
    if unmasked & UNDERFLOW != 0 {
        // An exact tiny result counts too; it shows when tiny results are flushed. Flushing itself needs the mask.
        raised = run(cpu, guest | FLUSH_TO_ZERO) & UNDERFLOW;
        control &= !FLUSH_TO_ZERO;
    }
    raised |= run(cpu, control);
    if raised & unmasked == 0 {
        if let Place::Memory(_) = places[0] {
            call_masked(cpu, thunk, places);
        }
        cpu.fpu.mxcsr.set(guest | raised);
        return Ok(());
    }
    (cpu.fpu.ymm, cpu.regs, cpu.fpu.x87) = before;
    let found_before = raised & BEFORE;
    cpu.fpu.mxcsr.set(guest | if found_before & unmasked != 0 { found_before } else { raised });
    if cpu.cr4 & cr4::OSXMMEXCPT != 0 { cpu.raise(vector::XM) } else { cpu.raise_ud() }
}

/// Instructions that MXCSR changes or that change MXCSR.
#[rustfmt::skip]
fn is_floating_point(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Addps | Addpd | Addss | Addsd | Subps | Subpd | Subss | Subsd | Mulps | Mulpd | Mulss | Mulsd
            | Divps | Divpd | Divss | Divsd | Sqrtps | Sqrtpd | Sqrtss | Sqrtsd
            | Minps | Minpd | Minss | Minsd | Maxps | Maxpd | Maxss | Maxsd
            | Cmpps | Cmppd | Cmpss | Cmpsd | Comiss | Comisd | Ucomiss | Ucomisd
            | Cvtpi2ps | Cvtsi2ss | Cvtsi2sd | Cvttps2pi | Cvttpd2pi | Cvttss2si | Cvttsd2si
            | Cvtps2pi | Cvtpd2pi | Cvtss2si | Cvtsd2si | Cvtps2pd | Cvtpd2ps | Cvtss2sd | Cvtsd2ss
            | Cvtdq2ps | Cvtps2dq | Cvttps2dq | Cvttpd2dq | Cvtpd2dq
            | Addsubps | Addsubpd | Haddps | Haddpd | Hsubps | Hsubpd
            | Roundps | Roundpd | Roundss | Roundsd | Dpps | Dppd
            | Vaddps | Vaddpd | Vaddss | Vaddsd | Vsubps | Vsubpd | Vsubss | Vsubsd
            | Vmulps | Vmulpd | Vmulss | Vmulsd | Vdivps | Vdivpd | Vdivss | Vdivsd
            | Vsqrtps | Vsqrtpd | Vsqrtss | Vsqrtsd | Vminps | Vminpd | Vminss | Vminsd
            | Vmaxps | Vmaxpd | Vmaxss | Vmaxsd | Vcmpps | Vcmppd | Vcmpss | Vcmpsd
            | Vcomiss | Vcomisd | Vucomiss | Vucomisd | Vcvtsi2ss | Vcvtsi2sd
            | Vcvttss2si | Vcvttsd2si | Vcvtss2si | Vcvtsd2si | Vcvtps2pd | Vcvtpd2ps | Vcvtss2sd | Vcvtsd2ss
            | Vcvtdq2ps | Vcvtps2dq | Vcvttps2dq | Vcvttpd2dq | Vcvtpd2dq
            | Vaddsubps | Vaddsubpd | Vhaddps | Vhaddpd | Vhsubps | Vhsubpd
            | Vroundps | Vroundpd | Vroundss | Vroundsd | Vdpps | Vdppd | Vcvtph2ps | Vcvtps2ph
            | Vfmadd132ps | Vfmadd132pd | Vfmadd132ss | Vfmadd132sd
            | Vfmadd213ps | Vfmadd213pd | Vfmadd213ss | Vfmadd213sd
            | Vfmadd231ps | Vfmadd231pd | Vfmadd231ss | Vfmadd231sd
            | Vfmsub132ps | Vfmsub132pd | Vfmsub132ss | Vfmsub132sd
            | Vfmsub213ps | Vfmsub213pd | Vfmsub213ss | Vfmsub213sd
            | Vfmsub231ps | Vfmsub231pd | Vfmsub231ss | Vfmsub231sd
            | Vfnmadd132ps | Vfnmadd132pd | Vfnmadd132ss | Vfnmadd132sd
            | Vfnmadd213ps | Vfnmadd213pd | Vfnmadd213ss | Vfnmadd213sd
            | Vfnmadd231ps | Vfnmadd231pd | Vfnmadd231ss | Vfnmadd231sd
            | Vfnmsub132ps | Vfnmsub132pd | Vfnmsub132ss | Vfnmsub132sd
            | Vfnmsub213ps | Vfnmsub213pd | Vfnmsub213ss | Vfnmsub213sd
            | Vfnmsub231ps | Vfnmsub231pd | Vfnmsub231ss | Vfnmsub231sd
            | Vfmaddsub132ps | Vfmaddsub132pd | Vfmaddsub213ps | Vfmaddsub213pd
            | Vfmaddsub231ps | Vfmaddsub231pd | Vfmsubadd132ps | Vfmsubadd132pd
            | Vfmsubadd213ps | Vfmsubadd213pd | Vfmsubadd231ps | Vfmsubadd231pd
    )
}
