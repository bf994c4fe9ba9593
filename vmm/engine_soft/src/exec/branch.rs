//! Near branches: JMP, Jcc, CALL, RET, LOOP, JCXZ. A conditional branch that is not taken does not end the
//! block.

use iced_x86::{Code, Instruction, OpKind};

use super::flags::{Condition, with_condition};
use super::stack::{Stack, Stack64, StackLegacy};
use crate::cpu::{CS, Cpu, RCX, RSP};
use crate::decode::Mode;
use crate::decode::lower::Selected;
use crate::decode::op::{Exec, Op, REG_BLOCK, SEG_FLAT_STACK, Step, Stop};
use crate::native::mem::Word;

impl Cpu {
    /// Goes to `target`, an offset in CS. #GP(0) when it cannot be executed, with nothing changed.
    #[inline(always)]
    pub(crate) fn branch(&mut self, target: u64) -> Step {
        self.check_branch(target)?;
        self.rip = target;
        Err(Stop::Block)
    }

    /// Whether a near branch may go there (Intel SDM volume 3, 5.8.1 and volume 1, 3.3.7.1).
    #[inline(always)]
    pub(crate) fn check_branch(&mut self, target: u64) -> Result<(), Stop> {
        let reachable = if self.mode == Mode::Bits64 {
            ((target as i64) << 16 >> 16) as u64 == target
        } else {
            target <= u64::from(self.seg[CS].limit)
        };
        if reachable { Ok(()) } else { self.raise_gp() }
    }

    /// Target of a relative branch with 32-bit operand size, or 64-bit in 64-bit code: in 16-bit code it may lie
    /// beyond the limit.
    #[inline(always)]
    fn relative(&self, op: &Op) -> u64 {
        self.regs[REG_BLOCK as usize].wrapping_add(op.imm) & (self.rip_mask | 0xffff_ffff)
    }
}

fn jmp(cpu: &mut Cpu, op: &Op) -> Step {
    let target = cpu.relative(op);
    cpu.branch(target)
}

/// A branch with 16-bit operand size: RIP is cut.
fn jmp_cut(cpu: &mut Cpu, op: &Op) -> Step {
    let target = cpu.relative(op) & 0xffff;
    cpu.branch(target)
}

fn jcc<C: Condition>(cpu: &mut Cpu, op: &Op) -> Step {
    if C::holds(cpu.flags) { jmp(cpu, op) } else { Ok(()) }
}

fn jcc_cut<C: Condition>(cpu: &mut Cpu, op: &Op) -> Step {
    if C::holds(cpu.flags) { jmp_cut(cpu, op) } else { Ok(()) }
}

fn pick_jcc<C: Condition>(cut: bool) -> Exec {
    if cut { jcc_cut::<C> } else { jcc::<C> }
}

fn jmp_reg<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let target = cpu.reg::<W>(op.reg).to_u64();
    cpu.branch(target)
}

fn jmp_mem<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let target = cpu.load_op::<W>(op)?.to_u64();
    cpu.branch(target)
}

/// Pushes the return address and goes to `target`.
#[inline(always)]
fn call_to<S: Stack, W: Word>(cpu: &mut Cpu, op: &Op, target: u64) -> Step {
    cpu.check_branch(target)?;
    let back = cpu.next_rip(op);
    S::push(cpu, W::from_u64(back))?;
    cpu.rip = target;
    Err(Stop::Block)
}

fn call<S: Stack, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let target = W::from_u64(cpu.relative(op)).to_u64();
    call_to::<S, W>(cpu, op, target)
}

fn call_reg<S: Stack, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let target = cpu.reg::<W>(op.reg).to_u64();
    call_to::<S, W>(cpu, op, target)
}

fn call_mem<S: Stack, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let target = cpu.load_op::<W>(op)?.to_u64();
    call_to::<S, W>(cpu, op, target)
}

/// RET and RET imm16.
fn ret<S: Stack, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let target = S::peek::<W>(cpu, 0)?.to_u64();
    cpu.check_branch(target)?;
    S::drop_bytes(cpu, W::SIZE as u64 + (op.imm & 0xffff));
    cpu.rip = target;
    Err(Stop::Block)
}

/// The commonest return: from a stack that is at hand to an address that there can be.
fn ret64(cpu: &mut Cpu, op: &Op) -> Step {
    let rsp = cpu.regs[RSP];
    if let Some(ptr) = cpu.mmu.tlb.read::<u64>(cpu.mmu.rights, rsp) {
        let target = u64::load(ptr);
        if is_canonical(target) {
            cpu.regs[RSP] = rsp.wrapping_add(8);
            cpu.rip = target;
            return Err(Stop::Block);
        }
    }
    ret64_slow(cpu, op)
}

#[cold]
#[inline(never)]
fn ret64_slow(cpu: &mut Cpu, _op: &Op) -> Step {
    let rsp = cpu.regs[RSP];
    let target = cpu.load::<u64>(rsp)?;
    cpu.check_branch(target)?;
    cpu.regs[RSP] = rsp.wrapping_add(8);
    cpu.rip = target;
    Err(Stop::Block)
}

/// Of 48 bits, as addresses of code are in 64-bit mode.
#[inline(always)]
pub(super) fn is_canonical(target: u64) -> bool {
    ((target as i64) << 16 >> 16) as u64 == target
}

/// The commonest call, in the same way.
fn call64(cpu: &mut Cpu, op: &Op) -> Step {
    let target = cpu.relative(op);
    let rsp = cpu.regs[RSP].wrapping_sub(8);
    match cpu.mmu.tlb.write::<u64>(cpu.mmu.rights, rsp) {
        Some(ptr) if is_canonical(target) => {
            u64::store(ptr, cpu.next_rip(op));
            cpu.regs[RSP] = rsp;
            cpu.rip = target;
            Err(Stop::Block)
        }
        _ => call::<Stack64, u64>(cpu, op),
    }
}

/// Counter of LOOP and JCXZ: (E/R)CX by address size, given as its mask.
fn counter_mask(op: &Op) -> u64 {
    match op.aux {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

fn set_counter(cpu: &mut Cpu, op: &Op, value: u64) {
    match op.aux {
        2 => cpu.set_reg(RCX as u8, value as u16),
        4 => cpu.set_reg(RCX as u8, value as u32),
        _ => cpu.regs[RCX] = value,
    }
}

/// `op.rm` bit 0: the branch is cut to 16 bits. Bits 2:1: 0 LOOP, 1 LOOPE, 2 LOOPNE.
fn loop_(cpu: &mut Cpu, op: &Op) -> Step {
    let mask = counter_mask(op);
    let count = cpu.regs[RCX].wrapping_sub(1) & mask;
    let again = count != 0
        && match op.rm >> 1 {
            0 => true,
            1 => cpu.flags.zf(),
            _ => !cpu.flags.zf(),
        };
    let target = cpu.relative(op) & if op.rm & 1 != 0 { 0xffff } else { u64::MAX };
    if again {
        cpu.check_branch(target)?;
    }
    set_counter(cpu, op, count);
    if again { cpu.branch(target) } else { cpu.end_block(op) }
}

fn jcxz(cpu: &mut Cpu, op: &Op) -> Step {
    if cpu.regs[RCX] & counter_mask(op) == 0 {
        if op.rm & 1 != 0 { jmp_cut(cpu, op) } else { jmp(cpu, op) }
    } else {
        cpu.end_block(op)
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
    use iced_x86::Mnemonic as M;
    let code = instruction.code();
    let cut = instruction.op0_kind() == OpKind::NearBranch16 && mode != Mode::Bits64;
    if code.is_jcc_short_or_near() {
        return with_condition!(instruction, pick_jcc(cut)).and_then(Selected::go_on);
    }
    let exec: Exec = match instruction.mnemonic() {
        M::Jmp => match instruction.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                if cut {
                    jmp_cut
                } else {
                    jmp
                }
            }
            OpKind::Register => match instruction.op0_register().size() {
                2 => jmp_reg::<u16>,
                4 => jmp_reg::<u32>,
                _ => jmp_reg::<u64>,
            },
            OpKind::Memory if code.is_jmp_near_indirect() => match instruction.memory_size().size() {
                2 => jmp_mem::<u16>,
                4 => jmp_mem::<u32>,
                _ => jmp_mem::<u64>,
            },
            _ => return None,
        },
        M::Call => match instruction.op0_kind() {
            OpKind::NearBranch16 => by_mode!(mode, 2, call),
            OpKind::NearBranch64 if mode == Mode::Bits64 => call64,
            OpKind::NearBranch32 | OpKind::NearBranch64 => by_mode!(mode, 8, call),
            OpKind::Register => by_mode!(mode, instruction.op0_register().size(), call_reg),
            OpKind::Memory if code.is_call_near_indirect() => {
                by_mode!(mode, instruction.memory_size().size(), call_mem)
            }
            _ => return None,
        },
        M::Ret => {
            use iced_x86::Code as C;
            let word = matches!(code, C::Retnw | C::Retnw_imm16);
            if mode == Mode::Bits64 && !word {
                op.seg = SEG_FLAT_STACK;
            }
            if code == C::Retnq { ret64 } else { by_mode!(mode, if word { 2 } else { 8 }, ret) }
        }
        M::Loop | M::Loope | M::Loopne => {
            op.aux = loop_counter_bytes(code);
            let kind = match instruction.mnemonic() {
                M::Loop => 0,
                M::Loope => 2,
                _ => 4,
            };
            op.rm = kind | u8::from(cut);
            loop_
        }
        M::Jcxz | M::Jecxz | M::Jrcxz => {
            op.aux = match instruction.mnemonic() {
                M::Jcxz => 2,
                M::Jecxz => 4,
                _ => 8,
            };
            op.rm = u8::from(cut);
            jcxz
        }
        _ => return None,
    };
    Selected::end(exec)
}

/// Bytes of the counter of LOOP and its kind: CX, ECX or RCX.
fn loop_counter_bytes(code: Code) -> u16 {
    use Code::*;
    match code {
        Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX | Loopne_rel8_16_CX
        | Loopne_rel8_32_CX => 2,
        Loop_rel8_16_ECX | Loop_rel8_32_ECX | Loop_rel8_64_ECX | Loope_rel8_16_ECX | Loope_rel8_32_ECX
        | Loope_rel8_64_ECX | Loopne_rel8_16_ECX | Loopne_rel8_32_ECX | Loopne_rel8_64_ECX => 4,
        _ => 8,
    }
}
