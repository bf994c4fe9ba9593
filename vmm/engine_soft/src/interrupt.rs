//! Interrupt messages between vCPUs and from devices: who is meant, and how they get there.

use harrier_engine::Msi;

use crate::cpu::Cpu;
use crate::vm::Shared;

/// Which vCPU answers to which destination: what the APICs say of themselves, readable by all threads.
pub(crate) struct Destinations {}

impl Destinations {
    pub(crate) fn new(_count: usize) -> Destinations {
        Destinations {}
    }
}

/// Sends a message-signalled interrupt to the vCPUs it names.
pub(crate) fn deliver_msi(_shared: &Shared, _msi: Msi) {}

impl Cpu {
    /// Takes interrupts, NMI, INIT and start-up messages from the mailbox.
    pub(crate) fn accept_mail(
        &mut self,
        _interrupts: Vec<(u8, bool)>,
        _nmi: bool,
        _init: bool,
        _sipi: Option<u8>,
    ) {
    }
}
