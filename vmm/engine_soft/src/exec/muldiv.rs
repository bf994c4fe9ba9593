//! Multiplication and division.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::alu::operand_size;
use super::by_size;
use crate::cpu::{Cpu, RAX, RDX};
use crate::decode::lower::Selected;
use crate::decode::op::{Exec, Op, Step, Stop};
use crate::fault::vector;
use crate::native::alu::{self, Flags};
use crate::native::mem::Word;

/// The operand of a one-operand form: register (RM false) or memory.
#[inline(always)]
fn operand<W: Word, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Result<W, Stop> {
    if MEM { cpu.load_op::<W>(op) } else { Ok(cpu.reg::<W>(op.reg)) }
}

fn multiply<W: Word, const SIGNED: bool, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    let b = operand::<W, MEM>(cpu, op)?.to_u64();
    let (a, f) = (cpu.regs[RAX], cpu.flags);
    match W::SIZE {
        1 => {
            let (product, f) = alu::mul8(a as u8, b as u8, SIGNED, f);
            cpu.set_reg::<u16>(RAX as u8, product);
            cpu.flags = f;
        }
        2 => {
            let (low, high, f) = if SIGNED {
                alu::imul_wide16(a as u16, b as u16, f)
            } else {
                alu::mul16(a as u16, b as u16, f)
            };
            finish(cpu, low, high, f);
        }
        4 => {
            let (low, high, f) = if SIGNED {
                alu::imul_wide32(a as u32, b as u32, f)
            } else {
                alu::mul32(a as u32, b as u32, f)
            };
            finish(cpu, low, high, f);
        }
        _ => {
            let (low, high, f) = if SIGNED { alu::imul_wide64(a, b, f) } else { alu::mul64(a, b, f) };
            finish(cpu, low, high, f);
        }
    }
    Ok(())
}

#[inline(always)]
fn finish<W: Word>(cpu: &mut Cpu, low: W, high: W, f: Flags) {
    cpu.set_reg(RAX as u8, low);
    cpu.set_reg(RDX as u8, high);
    cpu.flags = f;
}

/// Two- and three-operand IMUL.
#[inline(always)]
fn product<W: Word>(a: W, b: W, f: Flags) -> (W, Flags) {
    let (a, b) = (a.to_u64(), b.to_u64());
    match W::SIZE {
        2 => {
            let (r, f) = alu::imul16(a as u16, b as u16, f);
            (W::from_u64(r.into()), f)
        }
        4 => {
            let (r, f) = alu::imul32(a as u32, b as u32, f);
            (W::from_u64(r.into()), f)
        }
        _ => {
            let (r, f) = alu::imul64(a, b, f);
            (W::from_u64(r), f)
        }
    }
}

fn imul_reg<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let (r, f) = product::<W>(cpu.reg(op.reg), cpu.reg(op.rm), cpu.flags);
    cpu.flags = f;
    cpu.set_reg(op.reg, r);
    Ok(())
}

fn imul_mem<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let b = cpu.load_op::<W>(op)?;
    let (r, f) = product(cpu.reg(op.reg), b, cpu.flags);
    cpu.flags = f;
    cpu.set_reg(op.reg, r);
    Ok(())
}

fn imul_reg_imm<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let (r, f) = product(cpu.reg::<W>(op.rm), W::from_u64(op.imm), cpu.flags);
    cpu.flags = f;
    cpu.set_reg(op.reg, r);
    Ok(())
}

fn imul_mem_imm<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let a = cpu.load_op::<W>(op)?;
    let (r, f) = product(a, W::from_u64(op.imm), cpu.flags);
    cpu.flags = f;
    cpu.set_reg(op.reg, r);
    Ok(())
}

/// DIV and IDIV. The flags are undefined and stay.
fn divide<W: Word, const SIGNED: bool, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    let divisor = operand::<W, MEM>(cpu, op)?;
    let (low, high) = if W::SIZE == 1 {
        (cpu.reg::<u8>(RAX as u8).to_u64(), cpu.reg::<u8>(0x80).to_u64())
    } else {
        (cpu.reg::<W>(RAX as u8).to_u64(), cpu.reg::<W>(RDX as u8).to_u64())
    };
    let divided = if SIGNED {
        signed_quotient::<W>(low, high, divisor.to_i64())
    } else {
        unsigned_quotient::<W>(low, high, divisor.to_u64())
    };
    let Some((quotient, remainder)) = divided else { return cpu.raise(vector::DE) };
    if W::SIZE == 1 {
        cpu.set_reg(RAX as u8, (remainder as u16) << 8 | (quotient & 0xff) as u16);
    } else {
        cpu.set_reg(RAX as u8, W::from_u64(quotient));
        cpu.set_reg(RDX as u8, W::from_u64(remainder));
    }
    Ok(())
}

#[inline(always)]
fn unsigned_quotient<W: Word>(low: u64, high: u64, divisor: u64) -> Option<(u64, u64)> {
    if high >= divisor {
        // The quotient does not fit, or the divisor is zero.
        return None;
    }
    if W::SIZE < 8 {
        let dividend = high << W::BITS | low;
        return Some((dividend / divisor, dividend % divisor));
    }
    if high == 0 {
        return Some((low / divisor, low % divisor));
    }
    let dividend = u128::from(high) << 64 | u128::from(low);
    let divisor = u128::from(divisor);
    Some(((dividend / divisor) as u64, (dividend % divisor) as u64))
}

#[inline(always)]
fn signed_quotient<W: Word>(low: u64, high: u64, divisor: i64) -> Option<(u64, u64)> {
    if W::SIZE == 8 {
        let dividend = (u128::from(high) << 64 | u128::from(low)) as i128;
        let quotient = dividend.checked_div(i128::from(divisor))?;
        let remainder = dividend.checked_rem(i128::from(divisor))?;
        return i64::try_from(quotient).ok().map(|quotient| (quotient as u64, remainder as u64));
    }
    let shift = 64 - 2 * W::BITS;
    let dividend = ((high << W::BITS | low) << shift) as i64 >> shift;
    let quotient = dividend.checked_div(divisor)?;
    let remainder = dividend.checked_rem(divisor)?;
    let limit = 1i64 << (W::BITS - 1);
    (-limit..limit).contains(&quotient).then_some((quotient as u64, remainder as u64))
}

macro_rules! one_operand {
    ($instruction:expr, $handler:ident, $signed:literal) => {{
        let memory = $instruction.op0_kind() == OpKind::Memory;
        match (operand_size($instruction, 0), memory) {
            (1, false) => $handler::<u8, $signed, false> as Exec,
            (1, true) => $handler::<u8, $signed, true>,
            (2, false) => $handler::<u16, $signed, false>,
            (2, true) => $handler::<u16, $signed, true>,
            (4, false) => $handler::<u32, $signed, false>,
            (4, true) => $handler::<u32, $signed, true>,
            (_, false) => $handler::<u64, $signed, false>,
            (_, true) => $handler::<u64, $signed, true>,
        }
    }};
}

pub(crate) fn select(instruction: &Instruction, _op: &mut Op) -> Option<Selected> {
    let exec = match instruction.mnemonic() {
        Mnemonic::Mul => one_operand!(instruction, multiply, false),
        Mnemonic::Div => one_operand!(instruction, divide, false),
        Mnemonic::Idiv => one_operand!(instruction, divide, true),
        Mnemonic::Imul if instruction.op_count() == 1 => one_operand!(instruction, multiply, true),
        Mnemonic::Imul => {
            let size = operand_size(instruction, 0);
            let memory = instruction.op1_kind() == OpKind::Memory;
            match (instruction.op_count(), memory) {
                (2, false) => by_size!(size, imul_reg),
                (2, true) => by_size!(size, imul_mem),
                (_, false) => by_size!(size, imul_reg_imm),
                (_, true) => by_size!(size, imul_mem_imm),
            }
        }
        _ => return None,
    };
    Selected::go_on(exec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotients_that_do_not_fit_are_refused() {
        assert_eq!(unsigned_quotient::<u32>(7, 0, 2), Some((3, 1)));
        assert_eq!(unsigned_quotient::<u32>(0, 2, 2), None);
        assert_eq!(unsigned_quotient::<u64>(5, 0, 0), None);
        assert_eq!(signed_quotient::<u8>(0x80, 0xff, -1), None, "-128 / -1 is 128");
        assert_eq!(signed_quotient::<u8>(0x81, 0xff, -1), Some((127, 0)));
        assert_eq!(signed_quotient::<u64>(0, 1 << 63, -1), None);
        assert_eq!(
            signed_quotient::<u32>(-7i32 as u32 as u64, 0xffff_ffff, 2),
            Some((-3i64 as u64, -1i64 as u64))
        );
    }
}
