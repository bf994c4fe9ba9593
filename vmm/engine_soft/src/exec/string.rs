//! String instructions: MOVS, STOS, LODS, CMPS, SCAS, alone and repeated. (INS and OUTS are with port I/O.)
//!
//! Repeated MOVS and STOS that go upwards through plain memory are done a page at a time. A repeated
//! instruction that has worked for long stops between elements, so that interrupts can come in.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::by_size;
use crate::cpu::{Cpu, ES, RAX, RCX, RDI, RSI, rflags};
use crate::decode::Mode;
use crate::decode::lower::{Selected, address_kind, segment_slot};
use crate::decode::op::{ADDR_16, ADDR_32, ADDR_SEGMENTED, ADDR_SIZE_MASK, Exec, Op, Step, Stop};
use crate::mmu::access::piece;
use crate::mmu::{Intent, PAGE};
use crate::native::alu::Arith;
use crate::native::mem::{self, Word};

/// Elements that one call of a handler may do before it lets interrupts in.
const MAX_ELEMENTS: u64 = 4096;
/// Bytes that one call of a bulk handler may move.
const MAX_BYTES: u64 = 256 * 1024;

const REP: u16 = 1;
const REPNE: u16 = 2;

#[inline(always)]
fn address_mask(op: &Op) -> u64 {
    match op.addr & ADDR_SIZE_MASK {
        ADDR_16 => 0xffff,
        ADDR_32 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// Writes back a pointer or the counter: 16 bits keep the rest, 32 bits clear the upper half.
#[inline(always)]
fn set_masked(cpu: &mut Cpu, register: usize, mask: u64, value: u64) {
    cpu.regs[register] =
        if mask == 0xffff { (cpu.regs[register] & !mask) | (value & mask) } else { value & mask };
}

/// Linear address of an element.
#[inline(always)]
fn element(cpu: &mut Cpu, op: &Op, seg: u8, register: usize, size: u64, intent: Intent) -> Result<u64, Stop> {
    let offset = cpu.regs[register] & address_mask(op);
    if op.addr & ADDR_SEGMENTED == 0 {
        return Ok(offset.wrapping_add(cpu.seg_base[(seg & 7) as usize]));
    }
    cpu.segmented(usize::from(seg), offset, size, intent)
}

#[inline(always)]
fn destination_slot(op: &Op) -> u8 {
    if op.addr & ADDR_SEGMENTED == 0 { crate::decode::op::SEG_FLAT } else { ES as u8 }
}

#[inline(always)]
fn advance<W: Word>(cpu: &mut Cpu, op: &Op, register: usize) {
    let by = if cpu.rflags & rflags::DF != 0 { -(W::SIZE as i64) } else { W::SIZE as i64 };
    let value = cpu.regs[register].wrapping_add_signed(by);
    set_masked(cpu, register, address_mask(op), value);
}

/// One element of an instruction. True goes on with the next when repeated (REPE and REPNE look at ZF).
trait Element {
    fn one<W: Word>(cpu: &mut Cpu, op: &Op) -> Result<(), Stop>;
    /// Whether ZF ends the repetition.
    const COMPARES: bool;
    /// Does many elements at once if that is possible; answers how many.
    fn bulk<W: Word>(_cpu: &mut Cpu, _op: &Op, _count: u64) -> u64 {
        0
    }
}

struct Movs;
struct Stos;
struct Lods;
struct Cmps;
struct Scas;

impl Element for Movs {
    const COMPARES: bool = false;

    #[inline(always)]
    fn one<W: Word>(cpu: &mut Cpu, op: &Op) -> Result<(), Stop> {
        let from = element(cpu, op, op.seg, RSI, W::SIZE as u64, Intent::Read)?;
        let value = cpu.load::<W>(from)?;
        let to = element(cpu, op, destination_slot(op), RDI, W::SIZE as u64, Intent::Write)?;
        cpu.store(to, value)?;
        advance::<W>(cpu, op, RSI);
        advance::<W>(cpu, op, RDI);
        Ok(())
    }

    fn bulk<W: Word>(cpu: &mut Cpu, op: &Op, count: u64) -> u64 {
        let Some((from, to)) = flat_pair(cpu, op) else { return 0 };
        let size = W::SIZE as u64;
        let room = (PAGE - (from & (PAGE - 1))).min(PAGE - (to & (PAGE - 1)));
        let bytes = (room.min(count.saturating_mul(size)) / size) * size;
        if bytes == 0 {
            return 0;
        }
        let rights = cpu.mmu.rights;
        let (Some(source), Some(target)) =
            (cpu.mmu.tlb.read_len(rights, from, bytes), cpu.mmu.tlb.write_len(rights, to, bytes))
        else {
            return 0;
        };
        // Where the target lies shortly above the source, the width of the elements shows in the result.
        let ahead = target.addr().wrapping_sub(source.addr());
        if size > 1 && ahead < bytes && ahead != 0 {
            return 0;
        }
        mem::copy_forward(source, target, bytes as usize);
        cpu.regs[RSI] = cpu.regs[RSI].wrapping_add(bytes);
        cpu.regs[RDI] = cpu.regs[RDI].wrapping_add(bytes);
        bytes / size
    }
}

impl Element for Stos {
    const COMPARES: bool = false;

    #[inline(always)]
    fn one<W: Word>(cpu: &mut Cpu, op: &Op) -> Result<(), Stop> {
        let to = element(cpu, op, destination_slot(op), RDI, W::SIZE as u64, Intent::Write)?;
        let value = cpu.reg::<W>(RAX as u8);
        cpu.store(to, value)?;
        advance::<W>(cpu, op, RDI);
        Ok(())
    }

    fn bulk<W: Word>(cpu: &mut Cpu, op: &Op, count: u64) -> u64 {
        let Some((_, to)) = flat_pair(cpu, op) else { return 0 };
        let size = W::SIZE as u64;
        let bytes = (piece(to, PAGE as usize) as u64).min(count.saturating_mul(size)) / size * size;
        if bytes == 0 {
            return 0;
        }
        let Some(target) = cpu.mmu.tlb.write_len(cpu.mmu.rights, to, bytes) else { return 0 };
        mem::fill(target, cpu.reg::<W>(RAX as u8), (bytes / size) as usize);
        cpu.regs[RDI] = cpu.regs[RDI].wrapping_add(bytes);
        bytes / size
    }
}

/// Source and destination when both are flat 64-bit addresses that go upwards.
#[inline(always)]
fn flat_pair(cpu: &Cpu, op: &Op) -> Option<(u64, u64)> {
    (op.addr == crate::decode::op::ADDR_FLAT && cpu.rflags & rflags::DF == 0)
        .then(|| (cpu.regs[RSI].wrapping_add(cpu.seg_base[(op.seg & 7) as usize]), cpu.regs[RDI]))
}

impl Element for Lods {
    const COMPARES: bool = false;

    #[inline(always)]
    fn one<W: Word>(cpu: &mut Cpu, op: &Op) -> Result<(), Stop> {
        let from = element(cpu, op, op.seg, RSI, W::SIZE as u64, Intent::Read)?;
        let value = cpu.load::<W>(from)?;
        cpu.set_reg(RAX as u8, value);
        advance::<W>(cpu, op, RSI);
        Ok(())
    }
}

impl Element for Cmps {
    const COMPARES: bool = true;

    #[inline(always)]
    fn one<W: Word>(cpu: &mut Cpu, op: &Op) -> Result<(), Stop> {
        let from = element(cpu, op, op.seg, RSI, W::SIZE as u64, Intent::Read)?;
        let a = cpu.load::<W>(from)?;
        let to = element(cpu, op, destination_slot(op), RDI, W::SIZE as u64, Intent::Read)?;
        let b = cpu.load::<W>(to)?;
        cpu.flags = Arith::sub(a, b).1;
        advance::<W>(cpu, op, RSI);
        advance::<W>(cpu, op, RDI);
        Ok(())
    }
}

impl Element for Scas {
    const COMPARES: bool = true;

    #[inline(always)]
    fn one<W: Word>(cpu: &mut Cpu, op: &Op) -> Result<(), Stop> {
        let to = element(cpu, op, destination_slot(op), RDI, W::SIZE as u64, Intent::Read)?;
        let b = cpu.load::<W>(to)?;
        cpu.flags = Arith::sub(cpu.reg::<W>(RAX as u8), b).1;
        advance::<W>(cpu, op, RDI);
        Ok(())
    }
}

fn once<E: Element, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    E::one::<W>(cpu, op)
}

fn repeated<E: Element, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let mask = address_mask(op);
    let mut elements = 0u64;
    let mut bytes = 0u64;
    let flags = cpu.flags;
    cpu.unfinished = false;
    loop {
        let count = cpu.regs[RCX] & mask;
        if count == 0 {
            return Ok(());
        }
        let bulk = if cpu.step_trap { 0 } else { E::bulk::<W>(cpu, op, count) };
        if bulk > 0 {
            set_masked(cpu, RCX, mask, count - bulk);
            bytes += bulk * W::SIZE as u64;
        } else {
            // A fault in the middle leaves the registers at the element that faulted.
            if let Err(stop) = E::one::<W>(cpu, op) {
                // The flags are what they were before the instruction (Intel SDM volume 2, REP).
                cpu.flags = flags;
                return Err(stop);
            }
            set_masked(cpu, RCX, mask, count - 1);
            elements += 1;
            if E::COMPARES && cpu.flags.zf() != (op.aux == REP) {
                return Ok(());
            }
        }
        if (elements >= MAX_ELEMENTS || bytes >= MAX_BYTES || cpu.alone || cpu.attention)
            && cpu.regs[RCX] & mask != 0
        {
            // Not finished: the same instruction again, after whatever waits.
            cpu.unfinished = true;
            cpu.rip = cpu.op_rip(op);
            return Err(Stop::Block);
        }
    }
}

pub(crate) fn select(instruction: &Instruction, op: &mut Op, mode: Mode) -> Option<Selected> {
    let size = match instruction.mnemonic() {
        Mnemonic::Movsb | Mnemonic::Stosb | Mnemonic::Lodsb | Mnemonic::Cmpsb | Mnemonic::Scasb => 1,
        Mnemonic::Movsw | Mnemonic::Stosw | Mnemonic::Lodsw | Mnemonic::Cmpsw | Mnemonic::Scasw => 2,
        Mnemonic::Movsd | Mnemonic::Stosd | Mnemonic::Lodsd | Mnemonic::Cmpsd | Mnemonic::Scasd => 4,
        Mnemonic::Movsq | Mnemonic::Stosq | Mnemonic::Lodsq | Mnemonic::Cmpsq | Mnemonic::Scasq => 8,
        _ => return None,
    };
    if !instruction.is_string_instruction() {
        // MOVSD and CMPSD are SSE instructions, too.
        return None;
    }
    let address_size =
        (0..instruction.op_count()).find_map(|operand| match instruction.op_kind(operand) {
            OpKind::MemorySegSI | OpKind::MemoryESDI | OpKind::MemorySegDI => Some(2),
            OpKind::MemorySegESI | OpKind::MemoryESEDI | OpKind::MemorySegEDI => Some(4),
            OpKind::MemorySegRSI | OpKind::MemoryESRDI | OpKind::MemorySegRDI => Some(8),
            _ => None,
        })?;
    op.addr = address_kind(address_size, mode);
    let segment = match instruction.memory_segment() {
        Register::None => Register::DS,
        register => register,
    };
    op.seg = segment_slot(segment, mode);
    // A prefix that means nothing on MOVS, STOS and LODS repeats them all the same.
    let prefixed = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    op.aux = if instruction.has_repne_prefix() { REPNE } else { REP };
    macro_rules! pick {
        ($kind:ident) => {
            if prefixed { by_size!(size, repeated::<$kind>) } else { by_size!(size, once::<$kind>) }
        };
    }
    let exec: Exec = match instruction.mnemonic() {
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => pick!(Movs),
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => pick!(Stos),
        Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => pick!(Lods),
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq => pick!(Cmps),
        _ => pick!(Scas),
    };
    Selected::go_on(exec)
}
