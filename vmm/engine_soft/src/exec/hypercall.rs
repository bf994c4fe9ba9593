//! KVM's hypercalls, which a guest may expect where CPUID shows KVM's signature (Linux
//! Documentation/virt/kvm/x86/hypercalls.rst): VMCALL and VMMCALL with the number in RAX, answer in RAX.

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::{Cpu, RAX, RBX, RCX, RDX, RSI};
use crate::decode::lower::Selected;
use crate::decode::op::{Op, Step};
use crate::interrupt::{Destination, Message, send};

const VAPIC_POLL_IRQ: u64 = 1;
const SEND_IPI: u64 = 10;

/// No such call.
const ENOSYS: i64 = -1000;
/// Not for user code.
const EPERM: i64 = -1;

/// Handler of one of these instructions.
pub(crate) fn select(instruction: &Instruction) -> Option<Selected> {
    match instruction.mnemonic() {
        Mnemonic::Vmcall | Mnemonic::Vmmcall => Selected::end(call),
        _ => None,
    }
}

fn call(cpu: &mut Cpu, op: &Op) -> Step {
    let argument = |register: usize| {
        let value = cpu.regs[register];
        if cpu.code64() { value } else { value & 0xffff_ffff }
    };
    let [number, a, b, c, d] = [RAX, RBX, RCX, RDX, RSI].map(argument);
    let answer = match number {
        _ if cpu.cpl != 0 => EPERM,
        VAPIC_POLL_IRQ => 0,
        SEND_IPI => {
            send_ipi(cpu, u128::from(b) << cpu.mode.bits().max(32) | u128::from(a), c as u32, d as u32)
        }
        _ => ENOSYS,
    };
    cpu.regs[RAX] = if cpu.code64() { answer as u64 } else { answer as u64 & 0xffff_ffff };
    cpu.end_block(op)
}

/// Sends the interrupt of an ICR to the APICs whose ids are bits of `set` above `first`; answers how many there are.
fn send_ipi(cpu: &mut Cpu, set: u128, first: u32, icr: u32) -> i64 {
    let mut sent = 0;
    for id in (0..128).filter(|bit| set >> bit & 1 != 0).filter_map(|bit| first.checked_add(bit)) {
        if (id as usize) < cpu.shared.mailboxes.len() {
            send(&cpu.shared, Destination::Physical(id), Message { level: false, ..Message::of(icr) }, None);
            sent += 1;
        }
    }
    sent
}
