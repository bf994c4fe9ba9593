//! What the host has to tell the guest.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::interrupt::InterruptLine;

/// Pending events and the interrupt line that they hold high; clones share them. May be used from any thread.
#[derive(Clone)]
pub struct Events {
    shared: Arc<Shared>,
}

struct Shared {
    line: Arc<dyn InterruptLine>,
    pending: Mutex<u32>,
}

impl Events {
    /// No event pending.
    pub fn new(line: Arc<dyn InterruptLine>) -> Self {
        Events { shared: Arc::new(Shared { line, pending: Mutex::new(0) }) }
    }

    fn lock(&self) -> MutexGuard<'_, u32> {
        self.shared.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the events in `bits` (see [`harrier_hypercall_abi::port::event`]) pending and raises the interrupt.
    pub fn raise(&self, bits: u32) {
        self.change(|pending| pending | bits);
    }

    /// The guest has seen the events in `bits`.
    pub fn clear(&self, bits: u32) {
        self.change(|pending| pending & !bits);
    }

    /// The pending events.
    pub fn pending(&self) -> u32 {
        *self.lock()
    }

    /// The line changes under the lock, so that it ends where the bits do. It rises and falls once each, since the
    /// interrupt controller counts.
    fn change(&self, change: impl FnOnce(u32) -> u32) {
        let mut pending = self.lock();
        let before = *pending != 0;
        *pending = change(*pending);
        let after = *pending != 0;
        if before != after {
            self.shared.line.set_level(after);
        }
    }
}
