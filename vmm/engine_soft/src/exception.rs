//! Delivery of exceptions and interrupts through the IDT (Intel SDM volume 3, chapter 6).

use crate::cpu::Cpu;
use crate::decode::op::Op;

impl Cpu {
    /// Delivers the fault that `op` raised.
    pub(crate) fn fault_at(&mut self, op: &Op) {
        self.rip = if self.fault.trap { self.next_rip(op) } else { self.op_rip(op) };
        self.take_fault();
    }

    /// Delivers the fault in `self.fault`; RIP is what the handler shall return to.
    pub(crate) fn take_fault(&mut self) {}

    /// After an instruction that ran by itself: traps and shadows.
    pub(crate) fn after_single(&mut self) {
        self.alone = false;
        self.attention = true;
    }

    /// Delivers the most urgent event that may be delivered now; true when there was one.
    pub(crate) fn deliver_pending(&mut self) -> bool {
        false
    }
}
