//! Conditions, and the instructions that read or write the flags alone: CLC, STC, CMC, CLD, STD, LAHF, SAHF and
//! the decimal adjustments.

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::{Cpu, RAX, rflags};
use crate::decode::lower::Selected;
use crate::decode::op::{Exec, Op, Step};
use crate::fault::vector;
use crate::native::alu::{Arith, Flags};

/// A condition of Jcc, SETcc and CMOVcc.
pub(crate) trait Condition {
    fn holds(f: Flags) -> bool;
}

macro_rules! conditions {
    ($($name:ident: |$f:ident| $e:expr;)*) => {$(
        pub(crate) struct $name;
        impl Condition for $name {
            #[inline(always)]
            fn holds($f: Flags) -> bool {
                $e
            }
        }
    )*};
}

conditions! {
    O: |f| f.of();
    No: |f| !f.of();
    B: |f| f.cf();
    Ae: |f| !f.cf();
    E: |f| f.zf();
    Ne: |f| !f.zf();
    Be: |f| f.0 & (Flags::CF | Flags::ZF) != 0;
    A: |f| f.0 & (Flags::CF | Flags::ZF) == 0;
    S: |f| f.sf();
    Ns: |f| !f.sf();
    P: |f| f.pf();
    Np: |f| !f.pf();
    L: |f| f.sf() != f.of();
    Ge: |f| f.sf() == f.of();
    Le: |f| f.zf() || f.sf() != f.of();
    G: |f| !f.zf() && f.sf() == f.of();
}

/// Calls a generic function with the type of an instruction's condition; `None` when it has none.
macro_rules! with_condition {
    ($instruction:expr, $f:ident ( $($arg:expr),* )) => {{
        use iced_x86::ConditionCode as Cc;
        use crate::exec::flags as c;
        match $instruction.condition_code() {
            Cc::None => None,
            Cc::o => Some($f::<c::O>($($arg),*)),
            Cc::no => Some($f::<c::No>($($arg),*)),
            Cc::b => Some($f::<c::B>($($arg),*)),
            Cc::ae => Some($f::<c::Ae>($($arg),*)),
            Cc::e => Some($f::<c::E>($($arg),*)),
            Cc::ne => Some($f::<c::Ne>($($arg),*)),
            Cc::be => Some($f::<c::Be>($($arg),*)),
            Cc::a => Some($f::<c::A>($($arg),*)),
            Cc::s => Some($f::<c::S>($($arg),*)),
            Cc::ns => Some($f::<c::Ns>($($arg),*)),
            Cc::p => Some($f::<c::P>($($arg),*)),
            Cc::np => Some($f::<c::Np>($($arg),*)),
            Cc::l => Some($f::<c::L>($($arg),*)),
            Cc::ge => Some($f::<c::Ge>($($arg),*)),
            Cc::le => Some($f::<c::Le>($($arg),*)),
            Cc::g => Some($f::<c::G>($($arg),*)),
        }
    }};
}
pub(crate) use with_condition;

fn clc(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.flags = cpu.flags.with(Flags::CF, false);
    Ok(())
}

fn stc(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.flags = cpu.flags.with(Flags::CF, true);
    Ok(())
}

fn cmc(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.flags = Flags(cpu.flags.0 ^ Flags::CF);
    Ok(())
}

fn cld(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.rflags &= !rflags::DF;
    Ok(())
}

fn std(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.rflags |= rflags::DF;
    Ok(())
}

fn lahf(cpu: &mut Cpu, _op: &Op) -> Step {
    let value = (cpu.flags.to_rflags() as u8) | 2;
    cpu.set_reg(0x80, value);
    Ok(())
}

fn sahf(cpu: &mut Cpu, _op: &Op) -> Step {
    let value = u64::from(cpu.reg::<u8>(0x80));
    cpu.flags = Flags::from_rflags(value).merge(cpu.flags, Flags::OF);
    Ok(())
}

fn salc(cpu: &mut Cpu, _op: &Op) -> Step {
    let value = if cpu.flags.cf() { 0xffu8 } else { 0 };
    cpu.set_reg(RAX as u8, value);
    Ok(())
}

/// SF, ZF and PF of a byte.
fn byte_flags(value: u8) -> Flags {
    Arith::or(value, 0u8).1
}

/// DAA and DAS (Intel SDM volume 2): OF is undefined and comes out clear.
fn decimal(cpu: &mut Cpu, subtract: bool) {
    let (old, old_cf) = (cpu.reg::<u8>(RAX as u8), cpu.flags.cf());
    let step = |value: u8, by: u8| if subtract { value.wrapping_sub(by) } else { value.wrapping_add(by) };
    let mut value = old;
    let mut carry = false;
    let adjust = old & 0xf > 9 || cpu.flags.0 & Flags::AF != 0;
    if adjust {
        carry = old_cf || if subtract { old < 6 } else { old > 0xf9 };
        value = step(value, 6);
    }
    if old > 0x99 || old_cf {
        value = step(value, 0x60);
        carry = true;
    }
    cpu.set_reg(RAX as u8, value);
    cpu.flags = byte_flags(value).with(Flags::AF, adjust).with(Flags::CF, carry);
}

fn daa(cpu: &mut Cpu, _op: &Op) -> Step {
    decimal(cpu, false);
    Ok(())
}

fn das(cpu: &mut Cpu, _op: &Op) -> Step {
    decimal(cpu, true);
    Ok(())
}

/// AAA and AAS: OF, SF, ZF and PF are undefined and keep the adjusted byte's values.
fn ascii(cpu: &mut Cpu, subtract: bool) {
    let ax = cpu.reg::<u16>(RAX as u8);
    let adjust = ax & 0xf > 9 || cpu.flags.0 & Flags::AF != 0;
    let value = match (adjust, subtract) {
        (false, _) => ax,
        (true, false) => ax.wrapping_add(0x106),
        (true, true) => ax.wrapping_sub(6).wrapping_sub(0x100),
    } & 0xff0f;
    cpu.set_reg(RAX as u8, value);
    cpu.flags = byte_flags(value as u8).with(Flags::AF | Flags::CF, adjust);
}

fn aaa(cpu: &mut Cpu, _op: &Op) -> Step {
    ascii(cpu, false);
    Ok(())
}

fn aas(cpu: &mut Cpu, _op: &Op) -> Step {
    ascii(cpu, true);
    Ok(())
}

fn aam(cpu: &mut Cpu, op: &Op) -> Step {
    let (al, base) = (cpu.reg::<u8>(RAX as u8), op.imm as u8);
    if base == 0 {
        return cpu.raise(vector::DE);
    }
    cpu.set_reg(RAX as u8, u16::from(al / base) << 8 | u16::from(al % base));
    cpu.flags = byte_flags(al % base);
    Ok(())
}

fn aad(cpu: &mut Cpu, op: &Op) -> Step {
    let ax = cpu.reg::<u16>(RAX as u8);
    let value = (ax as u8).wrapping_add(((ax >> 8) as u8).wrapping_mul(op.imm as u8));
    cpu.set_reg(RAX as u8, u16::from(value));
    cpu.flags = byte_flags(value);
    Ok(())
}

pub(crate) fn select(instruction: &Instruction, _op: &mut Op) -> Option<Selected> {
    let exec: Exec = match instruction.mnemonic() {
        Mnemonic::Clc => clc,
        Mnemonic::Stc => stc,
        Mnemonic::Cmc => cmc,
        Mnemonic::Cld => cld,
        Mnemonic::Std => std,
        Mnemonic::Lahf => lahf,
        Mnemonic::Sahf => sahf,
        Mnemonic::Salc => salc,
        Mnemonic::Daa => daa,
        Mnemonic::Das => das,
        Mnemonic::Aaa => aaa,
        Mnemonic::Aas => aas,
        Mnemonic::Aam => aam,
        Mnemonic::Aad => aad,
        _ => return None,
    };
    Selected::go_on(exec)
}
