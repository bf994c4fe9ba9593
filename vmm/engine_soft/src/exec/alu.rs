//! Two-operand arithmetic and logic, and INC, DEC, NEG, NOT.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::by_size;
use crate::cpu::Cpu;
use crate::decode::lower::Selected;
use crate::decode::op::{Exec, Op, Step};
use crate::mmu::Intent;
use crate::native::alu::{Arith, Flags};
use crate::native::mem::Word;

/// One of the two-operand instructions.
pub(super) trait Binary {
    /// Result and flags.
    fn apply<W: Word>(a: W, b: W, f: Flags) -> (W, Flags);
}

macro_rules! binary {
    ($($name:ident: |$a:ident, $b:ident, $f:ident| $e:expr;)*) => {$(
        pub(super) struct $name;
        impl Binary for $name {
            #[inline(always)]
            fn apply<W: Word>($a: W, $b: W, $f: Flags) -> (W, Flags) {
                $e
            }
        }
    )*};
}

binary! {
    Add: |a, b, _f| Arith::add(a, b);
    Sub: |a, b, _f| Arith::sub(a, b);
    Adc: |a, b, f| Arith::adc(a, b, f);
    Sbb: |a, b, f| Arith::sbb(a, b, f);
    And: |a, b, _f| Arith::and(a, b);
    Or: |a, b, _f| Arith::or(a, b);
    Xor: |a, b, _f| Arith::xor(a, b);
    // Two carry chains side by side, each in a flag of its own (Intel SDM volume 2, ADCX and ADOX).
    Adcx: |a, b, f| {
        let (r, new) = Arith::adc(a, b, f);
        (r, f.merge(new, Flags::CF))
    };
    Adox: |a, b, f| {
        let (r, new) = Arith::adc(a, b, f.with(Flags::CF, f.of()));
        (r, f.with(Flags::OF, new.cf()))
    };
}

/// One of the one-operand instructions.
pub(super) trait Unary {
    fn apply<W: Word>(a: W, f: Flags) -> (W, Flags);
}

pub(super) struct Inc;
pub(super) struct Dec;
struct Neg;
struct Not;

impl Unary for Inc {
    #[inline(always)]
    fn apply<W: Word>(a: W, f: Flags) -> (W, Flags) {
        let (r, new) = Arith::inc(a);
        (r, new.merge(f, Flags::CF))
    }
}
impl Unary for Dec {
    #[inline(always)]
    fn apply<W: Word>(a: W, f: Flags) -> (W, Flags) {
        let (r, new) = Arith::dec(a);
        (r, new.merge(f, Flags::CF))
    }
}
impl Unary for Neg {
    #[inline(always)]
    fn apply<W: Word>(a: W, _f: Flags) -> (W, Flags) {
        Arith::neg(a)
    }
}
impl Unary for Not {
    #[inline(always)]
    fn apply<W: Word>(a: W, f: Flags) -> (W, Flags) {
        (!a, f)
    }
}

fn reg_reg<O: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let (r, f) = O::apply::<W>(cpu.reg(op.reg), cpu.reg(op.rm), cpu.flags);
    cpu.flags = f;
    cpu.set_reg(op.reg, r);
    Ok(())
}

fn reg_imm<O: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let (r, f) = O::apply(cpu.reg(op.reg), W::from_u64(op.imm), cpu.flags);
    cpu.flags = f;
    cpu.set_reg(op.reg, r);
    Ok(())
}

fn reg_mem<O: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.with_operand::<W>(op, |cpu, op, b| {
        let (r, f) = O::apply(cpu.reg(op.reg), b, cpu.flags);
        cpu.flags = f;
        cpu.set_reg(op.reg, r);
        Ok(())
    })
}

fn mem_reg<O: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.change_operand::<W>(op, |cpu, op, a| O::apply(a, cpu.reg(op.reg), cpu.flags))
}

fn mem_imm<O: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.change_operand::<W>(op, |cpu, op, a| O::apply(a, W::from_u64(op.imm), cpu.flags))
}

#[inline(always)]
fn to_memory_locked<O: Binary, W: Word>(cpu: &mut Cpu, op: &Op, b: W) -> Step {
    let va = cpu.addr(op, W::SIZE as u64, Intent::Write)?;
    let before = cpu.flags;
    cpu.flags = cpu.modify_locked::<W, Flags>(va, |a| O::apply(a, b, before))?;
    Ok(())
}

fn lock_mem_reg<O: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let b = cpu.reg::<W>(op.reg);
    to_memory_locked::<O, W>(cpu, op, b)
}

fn lock_mem_imm<O: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    to_memory_locked::<O, W>(cpu, op, W::from_u64(op.imm))
}

// CMP and TEST: the flags of SUB and AND, no result.

fn compare_reg_reg<O: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.flags = O::apply::<W>(cpu.reg(op.reg), cpu.reg(op.rm), cpu.flags).1;
    Ok(())
}

fn compare_reg_imm<O: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.flags = O::apply(cpu.reg(op.reg), W::from_u64(op.imm), cpu.flags).1;
    Ok(())
}

fn compare_reg_mem<O: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.with_operand::<W>(op, |cpu, op, b| {
        cpu.flags = O::apply(cpu.reg(op.reg), b, cpu.flags).1;
        Ok(())
    })
}

fn compare_mem_reg<O: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.with_operand::<W>(op, |cpu, op, a| {
        cpu.flags = O::apply(a, cpu.reg(op.reg), cpu.flags).1;
        Ok(())
    })
}

fn compare_mem_imm<O: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.with_operand::<W>(op, |cpu, op, a| {
        cpu.flags = O::apply(a, W::from_u64(op.imm), cpu.flags).1;
        Ok(())
    })
}

/// XOR or SUB of a register with itself: a zero, by compilers' habit.
fn zero_reg<O: Binary, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.flags = O::apply(W::default(), W::default(), cpu.flags).1;
    cpu.set_reg(op.reg, W::default());
    Ok(())
}

fn unary_reg<O: Unary, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let (r, f) = O::apply::<W>(cpu.reg(op.reg), cpu.flags);
    cpu.flags = f;
    cpu.set_reg(op.reg, r);
    Ok(())
}

fn unary_mem<O: Unary, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.change_operand::<W>(op, |cpu, _, a| O::apply(a, cpu.flags))
}

fn lock_unary_mem<O: Unary, W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let va = cpu.addr(op, W::SIZE as u64, Intent::Write)?;
    let before = cpu.flags;
    cpu.flags = cpu.modify_locked::<W, Flags>(va, |a| O::apply(a, before))?;
    Ok(())
}

/// Width of the first operand in bytes.
pub(crate) fn operand_size(instruction: &Instruction, operand: u32) -> usize {
    match instruction.op_kind(operand) {
        OpKind::Register => instruction.op_register(operand).size(),
        _ => instruction.memory_size().size(),
    }
}

fn pick_binary<O: Binary>(instruction: &Instruction, zeroing: bool) -> Exec {
    let size = operand_size(instruction, 0);
    let lock = instruction.has_lock_prefix();
    match (instruction.op0_kind(), instruction.op1_kind()) {
        (OpKind::Register, OpKind::Register)
            if zeroing && instruction.op0_register() == instruction.op1_register() =>
        {
            by_size!(size, zero_reg::<O>)
        }
        (OpKind::Register, OpKind::Register) => by_size!(size, reg_reg::<O>),
        (OpKind::Register, OpKind::Memory) => by_size!(size, reg_mem::<O>),
        (OpKind::Memory, OpKind::Register) if lock => by_size!(size, lock_mem_reg::<O>),
        (OpKind::Memory, OpKind::Register) => by_size!(size, mem_reg::<O>),
        (OpKind::Memory, _) if lock => by_size!(size, lock_mem_imm::<O>),
        (OpKind::Memory, _) => by_size!(size, mem_imm::<O>),
        _ => by_size!(size, reg_imm::<O>),
    }
}

fn pick_compare<O: Binary>(instruction: &Instruction) -> Exec {
    let size = operand_size(instruction, 0);
    match (instruction.op0_kind(), instruction.op1_kind()) {
        (OpKind::Register, OpKind::Register) => by_size!(size, compare_reg_reg::<O>),
        (OpKind::Register, OpKind::Memory) => by_size!(size, compare_reg_mem::<O>),
        (OpKind::Memory, OpKind::Register) => by_size!(size, compare_mem_reg::<O>),
        (OpKind::Memory, _) => by_size!(size, compare_mem_imm::<O>),
        _ => by_size!(size, compare_reg_imm::<O>),
    }
}

fn pick_unary<O: Unary>(instruction: &Instruction) -> Exec {
    let size = operand_size(instruction, 0);
    match instruction.op0_kind() {
        OpKind::Register => by_size!(size, unary_reg::<O>),
        _ if instruction.has_lock_prefix() => by_size!(size, lock_unary_mem::<O>),
        _ => by_size!(size, unary_mem::<O>),
    }
}

pub(crate) fn select(instruction: &Instruction, _op: &mut Op) -> Option<Selected> {
    let exec = match instruction.mnemonic() {
        Mnemonic::Add => pick_binary::<Add>(instruction, false),
        Mnemonic::Sub => pick_binary::<Sub>(instruction, true),
        Mnemonic::Adc => pick_binary::<Adc>(instruction, false),
        Mnemonic::Sbb => pick_binary::<Sbb>(instruction, false),
        Mnemonic::Adcx => pick_binary::<Adcx>(instruction, false),
        Mnemonic::Adox => pick_binary::<Adox>(instruction, false),
        Mnemonic::And => pick_binary::<And>(instruction, false),
        Mnemonic::Or => pick_binary::<Or>(instruction, false),
        Mnemonic::Xor => pick_binary::<Xor>(instruction, true),
        Mnemonic::Cmp => pick_compare::<Sub>(instruction),
        Mnemonic::Test => pick_compare::<And>(instruction),
        Mnemonic::Inc => pick_unary::<Inc>(instruction),
        Mnemonic::Dec => pick_unary::<Dec>(instruction),
        Mnemonic::Neg => pick_unary::<Neg>(instruction),
        Mnemonic::Not => pick_unary::<Not>(instruction),
        _ => return None,
    };
    Selected::go_on(exec)
}
