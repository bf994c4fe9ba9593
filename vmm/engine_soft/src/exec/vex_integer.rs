//! MULX, the one BMI instruction with an implicit operand; the others run as thunks.

use iced_x86::{Code, Instruction, OpKind};

use crate::cpu::{Cpu, RDX};
use crate::decode::lower::{Selected, slot};
use crate::decode::op::{Exec, Op, Step};
use crate::native::mem::Word;

/// EDX or RDX times the source; `op.aux` is the source register. The low half goes to `op.rm`, then the high half
/// to `op.reg`, so that the high half stays when they are the same.
#[inline(always)]
fn multiply<W: Word>(cpu: &mut Cpu, op: &Op, source: W) -> Step {
    let product = u128::from(cpu.reg::<W>(RDX as u8).to_u64()) * u128::from(source.to_u64());
    cpu.set_reg(op.rm, W::from_u64(product as u64));
    cpu.set_reg(op.reg, W::from_u64((product >> W::BITS) as u64));
    Ok(())
}

fn by_register<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let source = cpu.reg::<W>(op.aux as u8);
    multiply(cpu, op, source)
}

fn by_memory<W: Word>(cpu: &mut Cpu, op: &Op) -> Step {
    let source = cpu.load_op::<W>(op)?;
    multiply(cpu, op, source)
}

/// Handler of MULX.
pub(crate) fn select(instruction: &Instruction, op: &mut Op) -> Option<Selected> {
    let memory = instruction.op_count() > 2 && instruction.op2_kind() == OpKind::Memory;
    let exec: Exec = match (instruction.code(), memory) {
        (Code::VEX_Mulx_r32_r32_rm32, false) => by_register::<u32>,
        (Code::VEX_Mulx_r32_r32_rm32, true) => by_memory::<u32>,
        (Code::VEX_Mulx_r64_r64_rm64, false) => by_register::<u64>,
        (Code::VEX_Mulx_r64_r64_rm64, true) => by_memory::<u64>,
        _ => return None,
    };
    op.reg = slot(instruction.op0_register());
    op.rm = slot(instruction.op1_register());
    op.aux = u16::from(slot(instruction.op2_register()));
    Selected::go_on(exec)
}
