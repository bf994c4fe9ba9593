//! AVX moves, masked moves, gathers and the clearing of registers, without thunks.
//!
//! An instruction with a VEX prefix and a 128-bit operand clears the upper half of its destination.

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::simd::{Mask, load_scratch};
use crate::cpu::Cpu;
use crate::decode::lower::{Selected, slot};
use crate::decode::op::{Exec, Op, REG_ZERO, Step, Stop};
use crate::fpu::MXCSR_MASK;
use crate::mmu::Intent;
use crate::native::mem::Word;
use crate::native::wide;

type Vector = [u64; 4];

impl Cpu {
    /// Checks before every AVX instruction.
    #[inline(always)]
    pub(crate) fn avx_check(&mut self) -> Step {
        if self.fpu.usable.avx { Ok(()) } else { self.deny_avx() }
    }
}

/// Linear address of a whole vector; #GP(0) when it must be aligned and is not.
#[inline(always)]
fn vector_address<const SIZE: u64, const ALIGNED: bool>(
    cpu: &mut Cpu,
    op: &Op,
    intent: Intent,
) -> Result<u64, Stop> {
    let va = cpu.addr(op, SIZE, intent)?;
    if ALIGNED && va & (SIZE - 1) != 0 { cpu.raise_gp() } else { Ok(va) }
}

fn vector(bytes: &[u8]) -> Vector {
    let mut value = [0; 4];
    for (word, bytes) in value.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    value
}

fn bytes(value: &Vector) -> [u8; 32] {
    let mut bytes = [0; 32];
    for (place, word) in bytes.chunks_exact_mut(8).zip(value) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

#[inline(always)]
fn load<const SIZE: u64, const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.avx_check()?;
    let va = vector_address::<SIZE, ALIGNED>(cpu, op, Intent::Read)?;
    let value = match cpu.mmu.tlb.read_len(cpu.mmu.rights, va, SIZE) {
        Some(ptr) if SIZE == 32 => wide::load_32(ptr),
        Some(ptr) => {
            let [low, high] = wide::load_16(ptr);
            [low, high, 0, 0]
        }
        None => {
            load_scratch(cpu, va, SIZE as usize)?;
            vector(&cpu.fpu.scratch[..SIZE as usize])
        }
    };
    cpu.fpu.ymm[usize::from(op.reg & 15)] = value;
    Ok(())
}

#[inline(always)]
fn store<const SIZE: u64, const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.avx_check()?;
    let va = vector_address::<SIZE, ALIGNED>(cpu, op, Intent::Write)?;
    let value = cpu.fpu.ymm[usize::from(op.reg & 15)];
    match cpu.mmu.tlb.write_len(cpu.mmu.rights, va, SIZE) {
        Some(ptr) if SIZE == 32 => wide::store_32(ptr, &value),
        Some(ptr) => wide::store_16(ptr, &[value[0], value[1]]),
        None => return cpu.write(va, &bytes(&value)[..SIZE as usize]),
    }
    Ok(())
}

fn move_reg<const SIZE: u64>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.avx_check()?;
    let mut value = cpu.fpu.ymm[usize::from(op.rm & 15)];
    if SIZE == 16 {
        value[2] = 0;
        value[3] = 0;
    }
    cpu.fpu.ymm[usize::from(op.reg & 15)] = value;
    Ok(())
}

/// VMOVSS, VMOVSD, VMOVD and VMOVQ from memory.
fn scalar_load<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.avx_check()?;
    let value = cpu.load_op::<W>(op)?.to_u64();
    cpu.fpu.ymm[usize::from(op.reg & 15)] = [value, 0, 0, 0];
    Ok(())
}

fn scalar_store<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.avx_check()?;
    let [value, ..] = cpu.fpu.ymm[usize::from(op.reg & 15)];
    cpu.store_op(op, W::from_u64(value))
}

fn zero_upper(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.avx_check()?;
    let count = if cpu.code64() { 16 } else { 8 };
    for register in cpu.fpu.ymm.iter_mut().take(count) {
        register[2] = 0;
        register[3] = 0;
    }
    Ok(())
}

fn zero_all(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.avx_check()?;
    let count = if cpu.code64() { 16 } else { 8 };
    cpu.fpu.ymm[..count].fill([0; 4]);
    Ok(())
}

fn load_mxcsr(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.avx_check()?;
    let value = cpu.load_op::<u32>(op)?;
    if value & !MXCSR_MASK != 0 {
        return cpu.raise_gp();
    }
    cpu.fpu.mxcsr.set(value);
    Ok(())
}

fn store_mxcsr(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.avx_check()?;
    let value = cpu.fpu.mxcsr.get();
    cpu.store_op(op, value)
}

/// The elements of `SIZE` bytes whose sign bit is set.
fn sign_mask(value: &Vector, size: usize, count: usize) -> Mask {
    Mask::of(count, |at| {
        let last = (at + 1) * size * 8 - 1;
        value[last / 64] >> (last % 64) & 1 != 0
    })
}

/// VMASKMOVPS, VPMASKMOVD and their kin from memory; `op.rm` is the mask.
fn masked_load<const ELEMENT: u64, const SIZE: u64>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.avx_check()?;
    let va = cpu.addr(op, SIZE, Intent::Read)?;
    let mask = sign_mask(&cpu.fpu.ymm[usize::from(op.rm & 15)], ELEMENT as usize, (SIZE / ELEMENT) as usize);
    let value = mask.load(cpu, va, ELEMENT as usize)?;
    cpu.fpu.ymm[usize::from(op.reg & 15)] = vector(&value);
    Ok(())
}

/// The same to memory; `op.reg` is the mask, `op.rm` the data.
fn masked_store<const ELEMENT: u64, const SIZE: u64>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.avx_check()?;
    let va = cpu.addr(op, SIZE, Intent::Write)?;
    let mask = sign_mask(&cpu.fpu.ymm[usize::from(op.reg & 15)], ELEMENT as usize, (SIZE / ELEMENT) as usize);
    let data = bytes(&cpu.fpu.ymm[usize::from(op.rm & 15)]);
    mask.store(cpu, va, ELEMENT, |at| {
        let mut element = [0; 8];
        let from = at * ELEMENT as usize;
        element[..ELEMENT as usize].copy_from_slice(&data[from..from + ELEMENT as usize]);
        element
    })
}

/// VGATHER and VPGATHER. `op.rm` is the vector of indices, the low byte of `op.aux` the mask, its high byte the
/// number of elements. When an element faults, those before it are loaded and their mask is clear.
fn gather<const ELEMENT: usize, const INDEX: usize>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.avx_check()?;
    let [mask_slot, count] = op.aux.to_le_bytes();
    let (target, mask_at) = (usize::from(op.reg & 15), usize::from(mask_slot & 15));
    let indices = bytes(&cpu.fpu.ymm[usize::from(op.rm & 15)]);
    let count = usize::from(count);
    let mask = sign_mask(&cpu.fpu.ymm[mask_at], ELEMENT, count);
    let mut value = bytes(&cpu.fpu.ymm[target]);
    let mut left = bytes(&cpu.fpu.ymm[mask_at]);
    let base = *op;
    for at in mask.elements() {
        let index = &indices[at * INDEX..(at + 1) * INDEX];
        let index = match *index {
            [a, b, c, d] => i64::from(i32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => i64::from_le_bytes([a, b, c, d, e, f, g, h]),
            _ => 0,
        };
        let mut element = [0; 8];
        let loaded = cpu
            .indexed_address(&base, index, ELEMENT as u64)
            .and_then(|va| cpu.read(va, &mut element[..ELEMENT]));
        if let Err(stop) = loaded {
            cpu.fpu.ymm[target] = vector(&value);
            cpu.fpu.ymm[mask_at] = vector(&left);
            return Err(stop);
        }
        value[at * ELEMENT..(at + 1) * ELEMENT].copy_from_slice(&element[..ELEMENT]);
        left[at * ELEMENT..(at + 1) * ELEMENT].fill(0);
    }
    value[count * ELEMENT..].fill(0);
    cpu.fpu.ymm[target] = vector(&value);
    cpu.fpu.ymm[mask_at] = [0; 4];
    Ok(())
}

impl Cpu {
    /// Linear address of an operand whose index is an element of a vector register. The operation has no index
    /// register of its own.
    fn indexed_address(&mut self, op: &Op, index: i64, size: u64) -> Result<u64, Stop> {
        // Slot 31 is free for this: nothing else reads it.
        self.regs[usize::from(INDEX_SLOT)] = index as u64;
        let indexed = Op { index: INDEX_SLOT, ..*op };
        self.addr(&indexed, size, Intent::Read)
    }
}

/// Register slot that holds the index while an element is being addressed.
const INDEX_SLOT: u8 = 31;

/// Handler of one of these instructions.
pub(crate) fn select(instruction: &Instruction, op: &mut Op) -> Option<Selected> {
    use Mnemonic::*;
    if instruction.encoding() != EncodingKind::VEX {
        return None;
    }
    let memory = |operand| instruction.op_count() > operand && instruction.op_kind(operand) == OpKind::Memory;
    let register = |operand| {
        if instruction.op_kind(operand) == OpKind::Register {
            instruction.op_register(operand)
        } else {
            Register::None
        }
    };
    let wide = (0..instruction.op_count()).any(|operand| register(operand).is_ymm());
    let whole = |by_form: [Exec; 6]| {
        let form = if memory(0) { 2 } else { usize::from(memory(1)) };
        by_form[2 * form + usize::from(wide)]
    };
    let exec: Exec = match instruction.mnemonic() {
        Vmovups | Vmovupd | Vmovdqu | Vlddqu => whole([
            move_reg::<16>,
            move_reg::<32>,
            load::<16, false>,
            load::<32, false>,
            store::<16, false>,
            store::<32, false>,
        ]),
        Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa => whole([
            move_reg::<16>,
            move_reg::<32>,
            load::<16, true>,
            load::<32, true>,
            store::<16, true>,
            store::<32, true>,
        ]),
        Vmovss | Vmovd if memory(1) => scalar_load::<u32>,
        Vmovss | Vmovd if memory(0) => scalar_store::<u32>,
        Vmovsd | Vmovq if memory(1) => scalar_load::<u64>,
        Vmovsd | Vmovq if memory(0) => scalar_store::<u64>,
        Vzeroupper => zero_upper,
        Vzeroall => zero_all,
        Vldmxcsr => load_mxcsr,
        Vstmxcsr => store_mxcsr,
        Vmaskmovps | Vpmaskmovd => match (memory(0), wide) {
            (false, false) => masked_load::<4, 16>,
            (false, true) => masked_load::<4, 32>,
            (true, false) => masked_store::<4, 16>,
            (true, true) => masked_store::<4, 32>,
        },
        Vmaskmovpd | Vpmaskmovq => match (memory(0), wide) {
            (false, false) => masked_load::<8, 16>,
            (false, true) => masked_load::<8, 32>,
            (true, false) => masked_store::<8, 16>,
            (true, true) => masked_store::<8, 32>,
        },
        Vgatherdps | Vpgatherdd => return select_gather(instruction, op, gather::<4, 4>, 4, 4),
        Vgatherdpd | Vpgatherdq => return select_gather(instruction, op, gather::<8, 4>, 8, 4),
        Vgatherqps | Vpgatherqd => return select_gather(instruction, op, gather::<4, 8>, 4, 8),
        Vgatherqpd | Vpgatherqq => return select_gather(instruction, op, gather::<8, 8>, 8, 8),
        _ => return None,
    };
    // The register operands in order, whichever operand is memory.
    let mut slots = (0..instruction.op_count()).map(register).filter(|r| r.is_vector_register()).map(slot);
    op.reg = slots.next().unwrap_or(0);
    op.rm = slots.next().unwrap_or(0);
    Selected::go_on(exec)
}

fn select_gather(
    instruction: &Instruction,
    op: &mut Op,
    exec: Exec,
    element: usize,
    index: usize,
) -> Option<Selected> {
    let (target, indices, mask) =
        (instruction.op0_register(), instruction.memory_index(), instruction.op2_register());
    let slots = [target, indices, mask].map(slot);
    // Two of the three the same: #UD.
    if slots[0] == slots[1] || slots[0] == slots[2] || slots[1] == slots[2] {
        return Selected::go_on(super::undefined);
    }
    let count = (target.size() / element).min(indices.size() / index);
    op.reg = slots[0];
    op.rm = slots[1];
    op.aux = u16::from_le_bytes([slots[2], count as u8]);
    op.index = REG_ZERO;
    Selected::go_on(exec)
}
