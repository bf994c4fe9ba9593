//! What the operations do, one file a topic.

use crate::cpu::Cpu;
use crate::decode::op::{Op, Step};

/// #UD.
pub(crate) fn undefined(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.raise_ud()
}
