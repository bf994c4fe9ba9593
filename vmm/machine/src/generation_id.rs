//! The VM generation id (Microsoft, "Virtual Machine Generation ID", 2018): 16 random bytes in guest memory that are other
//! ones in every machine that is made of a snapshot, and an interrupt that says so. By it the kernel of an unmodified guest
//! learns that its random numbers are no secret any more. The bytes are memory like all other; nothing else is kept.

use std::io;
use std::sync::Arc;

use harrier_devices::InterruptLine;
use harrier_engine::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use crate::layout::GENERATION_ID;

const LEN: usize = 16;

/// The id in a guest's memory.
pub(crate) struct GenerationId {
    memory: GuestMemory,
    line: Arc<dyn InterruptLine>,
}

impl GenerationId {
    pub(crate) fn new(memory: GuestMemory, line: Arc<dyn InterruptLine>) -> Self {
        GenerationId { memory, line }
    }

    /// Puts another id into memory.
    pub(crate) fn renew(&self) -> io::Result<()> {
        let mut id = [0; LEN];
        let filled = rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
        if filled < LEN {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.memory.write_slice(&id, GuestAddress(GENERATION_ID)).map_err(io::Error::other)
    }

    /// Tells the guest that it is another one.
    pub(crate) fn announce(&self) {
        self.line.pulse();
    }
}
