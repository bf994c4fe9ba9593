//! PUSH, POP, PUSHA, POPA, ENTER, LEAVE, and the stack as other handlers use it.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::cpu::{Cpu, RBP, RSP, SS};
use crate::decode::Mode;
use crate::decode::lower::Selected;
use crate::decode::op::{Exec, Op, SEG_FLAT_STACK, Step, Stop};
use crate::mmu::Intent;
use crate::native::mem::Word;

/// The stack of one kind of code.
pub(crate) trait Stack {
    /// Linear address of `size` bytes at stack offset `rsp`.
    fn addr(cpu: &mut Cpu, rsp: u64, size: u64, intent: Intent) -> Result<u64, Stop>;
    /// `rsp` with the stack pointer moved by `by`; bits above the stack's width stay.
    fn moved(cpu: &Cpu, rsp: u64, by: i64) -> u64;

    /// Pushes one value.
    #[inline(always)]
    fn push<W: Word>(cpu: &mut Cpu, value: W) -> Step {
        let rsp = Self::moved(cpu, cpu.regs[RSP], -(W::SIZE as i64));
        let va = Self::addr(cpu, rsp, W::SIZE as u64, Intent::Write)?;
        cpu.store(va, value).map_err(|stop| stack_fault(cpu, stop))?;
        cpu.regs[RSP] = rsp;
        Ok(())
    }

    /// Reads the value `offset` bytes above the stack pointer.
    #[inline(always)]
    fn peek<W: Word>(cpu: &mut Cpu, offset: i64) -> Result<W, Stop> {
        let rsp = Self::moved(cpu, cpu.regs[RSP], offset);
        let va = Self::addr(cpu, rsp, W::SIZE as u64, Intent::Read)?;
        cpu.load(va).map_err(|stop| stack_fault(cpu, stop))
    }

    /// Moves the stack pointer up.
    #[inline(always)]
    fn drop_bytes(cpu: &mut Cpu, bytes: u64) {
        cpu.regs[RSP] = Self::moved(cpu, cpu.regs[RSP], bytes as i64);
    }
}

/// A non-canonical stack address is #SS, whatever the instruction's own operand is.
#[cold]
fn stack_fault(cpu: &mut Cpu, stop: Stop) -> Stop {
    if stop == Stop::Fault && cpu.fault.non_canonical {
        cpu.fault.vector = crate::fault::vector::SS;
    }
    stop
}

/// 64-bit mode: flat, 64-bit stack pointer.
pub(crate) struct Stack64;
/// Everything else: SS has base and limit, its B bit gives the width.
pub(crate) struct StackLegacy;

impl Stack for Stack64 {
    #[inline(always)]
    fn addr(_cpu: &mut Cpu, rsp: u64, _size: u64, _intent: Intent) -> Result<u64, Stop> {
        Ok(rsp)
    }
    #[inline(always)]
    fn moved(_cpu: &Cpu, rsp: u64, by: i64) -> u64 {
        rsp.wrapping_add_signed(by)
    }
}

impl Stack for StackLegacy {
    fn addr(cpu: &mut Cpu, rsp: u64, size: u64, intent: Intent) -> Result<u64, Stop> {
        let mask = cpu.stack_mask();
        cpu.segmented(SS, rsp & mask, size, intent)
    }
    fn moved(cpu: &Cpu, rsp: u64, by: i64) -> u64 {
        cpu.with_stack_width(rsp, rsp.wrapping_add_signed(by))
    }
}

impl Cpu {
    /// Width of the stack pointer as a mask.
    pub(crate) fn stack_mask(&self) -> u64 {
        if self.code64() {
            u64::MAX
        } else if self.seg[SS].db {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// What RSP is after a stack pointer was put where `before` was: a 16-bit one leaves the rest, a 32-bit one clears the
    /// upper half, like every write to a register. The upper half shows when compatibility mode goes on in 64-bit mode.
    pub(crate) fn with_stack_width(&self, before: u64, value: u64) -> u64 {
        match self.stack_mask() {
            0xffff => before & !0xffff | value & 0xffff,
            mask => value & mask,
        }
    }
}

fn push_reg<S: Stack, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.reg::<W>(op.reg);
    S::push(cpu, value)
}

fn push_imm<S: Stack, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    S::push(cpu, W::from_u64(op.imm))
}

fn push_mem<S: Stack, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.load_op::<W>(op)?;
    S::push(cpu, value)
}

fn pop_reg<S: Stack, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = S::peek::<W>(cpu, 0)?;
    S::drop_bytes(cpu, W::SIZE as u64);
    cpu.set_reg(op.reg, value);
    Ok(())
}

/// POP to memory: an address by RSP counts from after the pop.
fn pop_mem<S: Stack, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = S::peek::<W>(cpu, 0)?;
    let before = cpu.regs[RSP];
    S::drop_bytes(cpu, W::SIZE as u64);
    let stored = cpu.store_op(op, value);
    if stored.is_err() {
        cpu.regs[RSP] = before;
    }
    stored
}

fn pusha<W: Word>(cpu: &mut Cpu, _op: &Op) -> Step {
    let before = cpu.regs[RSP];
    // The lowest and the highest slot are checked first, so that nothing is half done.
    for slot in [8i64, 1] {
        let rsp = StackLegacy::moved(cpu, before, -(slot * W::SIZE as i64));
        let va = StackLegacy::addr(cpu, rsp, W::SIZE as u64, Intent::Write)?;
        cpu.probe_write(va, W::SIZE)?;
    }
    for register in 0..8u8 {
        let value = if usize::from(register) == RSP { W::from_u64(before) } else { cpu.reg::<W>(register) };
        let pushed = StackLegacy::push(cpu, value);
        if pushed.is_err() {
            cpu.regs[RSP] = before;
            return pushed;
        }
    }
    Ok(())
}

fn popa<W: Word>(cpu: &mut Cpu, _op: &Op) -> Step {
    let mut values = [W::default(); 8];
    for (slot, value) in values.iter_mut().enumerate() {
        *value = StackLegacy::peek::<W>(cpu, (slot * W::SIZE) as i64)?;
    }
    for register in (0..8u8).filter(|&register| usize::from(register) != RSP) {
        cpu.set_reg(register, values[7 - usize::from(register)]);
    }
    StackLegacy::drop_bytes(cpu, 8 * W::SIZE as u64);
    Ok(())
}

/// ENTER size, level.
fn enter<S: Stack, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let (before, frame_before) = (cpu.regs[RSP], cpu.regs[RBP]);
    let done = enter_frame::<S, W>(cpu, op);
    if done.is_err() {
        cpu.regs[RSP] = before;
        cpu.regs[RBP] = frame_before;
    }
    done
}

fn enter_frame<S: Stack, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let level = i64::from(op.aux & 31);
    let old_frame = cpu.regs[RBP];
    S::push(cpu, W::from_u64(old_frame))?;
    let frame = cpu.regs[RSP];
    if level > 0 {
        for nested in 1..level {
            let at = S::moved(cpu, old_frame, -(nested * W::SIZE as i64));
            let va = S::addr(cpu, at, W::SIZE as u64, Intent::Read)?;
            let value = cpu.load::<W>(va)?;
            S::push(cpu, value)?;
        }
        S::push(cpu, W::from_u64(frame))?;
    }
    let rsp = S::moved(cpu, cpu.regs[RSP], -((op.imm & 0xffff) as i64));
    // The new top must be writable (Intel SDM volume 2, ENTER).
    let va = S::addr(cpu, rsp, W::SIZE as u64, Intent::Write)?;
    cpu.probe_write(va, W::SIZE)?;
    cpu.regs[RSP] = rsp;
    cpu.set_reg(RBP as u8, W::from_u64(frame));
    Ok(())
}

fn leave<S: Stack, W: Word>(cpu: &mut Cpu, _op: &Op) -> Step {
    let before = cpu.regs[RSP];
    cpu.set_stack_pointer(cpu.regs[RBP]);
    match S::peek::<W>(cpu, 0) {
        Ok(value) => {
            S::drop_bytes(cpu, W::SIZE as u64);
            cpu.set_reg(RBP as u8, value);
            Ok(())
        }
        Err(stop) => {
            cpu.regs[RSP] = before;
            Err(stop)
        }
    }
}

/// The commonest pushes and pops: of 64 bits, to and from memory that is at hand. The rest is what they end with.
fn push_reg64(cpu: &mut Cpu, op: &Op) -> Step {
    let rsp = cpu.regs[RSP].wrapping_sub(8);
    match cpu.mmu.tlb.write::<u64>(cpu.mmu.rights, rsp) {
        Some(ptr) => {
            u64::store(ptr, cpu.regs[usize::from(op.reg & 15)]);
            cpu.regs[RSP] = rsp;
            Ok(())
        }
        None => push_reg::<Stack64, u64>(cpu, op),
    }
}

fn pop_reg64(cpu: &mut Cpu, op: &Op) -> Step {
    let rsp = cpu.regs[RSP];
    match cpu.mmu.tlb.read::<u64>(cpu.mmu.rights, rsp) {
        Some(ptr) => {
            cpu.regs[RSP] = rsp.wrapping_add(8);
            cpu.regs[usize::from(op.reg & 15)] = u64::load(ptr);
            Ok(())
        }
        None => pop_reg::<Stack64, u64>(cpu, op),
    }
}

macro_rules! by_mode {
    ($mode:expr, $size:expr, $handler:ident) => {
        match ($mode, $size) {
            (Mode::Bits64, 2) => $handler::<Stack64, u16> as Exec,
            (Mode::Bits64, _) => $handler::<Stack64, u64>,
            (_, 2) => $handler::<StackLegacy, u16>,
            (_, _) => $handler::<StackLegacy, u32>,
        }
    };
}

pub(crate) fn select(instruction: &Instruction, op: &mut Op, mode: Mode) -> Option<Selected> {
    use iced_x86::Code as C;
    let stack_only = instruction.op_count() == 0 || instruction.op0_kind() != OpKind::Memory;
    let exec: Exec = match instruction.mnemonic() {
        Mnemonic::Push => match instruction.op0_kind() {
            OpKind::Register if instruction.op0_register().is_gpr64() => push_reg64,
            OpKind::Register if instruction.op0_register().is_gpr() => {
                by_mode!(mode, instruction.op0_register().size(), push_reg)
            }
            OpKind::Register => return None,
            OpKind::Memory => by_mode!(mode, instruction.memory_size().size(), push_mem),
            _ => {
                let word = matches!(instruction.code(), C::Push_imm16 | C::Pushw_imm8);
                by_mode!(mode, if word { 2 } else { 8 }, push_imm)
            }
        },
        Mnemonic::Pop => match instruction.op0_kind() {
            OpKind::Register if instruction.op0_register().is_gpr64() => pop_reg64,
            OpKind::Register if instruction.op0_register().is_gpr() => {
                by_mode!(mode, instruction.op0_register().size(), pop_reg)
            }
            OpKind::Register => return None,
            _ => by_mode!(mode, instruction.memory_size().size(), pop_mem),
        },
        Mnemonic::Pusha => pusha::<u16>,
        Mnemonic::Pushad => pusha::<u32>,
        Mnemonic::Popa => popa::<u16>,
        Mnemonic::Popad => popa::<u32>,
        Mnemonic::Enter => {
            by_mode!(mode, if instruction.code() == C::Enterw_imm16_imm8 { 2 } else { 8 }, enter)
        }
        Mnemonic::Leave => by_mode!(mode, if instruction.code() == C::Leavew { 2 } else { 8 }, leave),
        _ => return None,
    };
    if stack_only && mode == Mode::Bits64 {
        op.seg = SEG_FLAT_STACK;
    }
    Selected::go_on(exec)
}
