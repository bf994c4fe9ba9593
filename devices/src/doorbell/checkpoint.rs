//! CHECKPOINT: a call that returns twice, once in the machine that made it and once in each that is made of its snapshot.
//!
//! The block is answered at once, for the machine that calls; its processor is held by the machine until the snapshot is
//! there. [`Doorbell::checkpoint_failed`] changes the answer if there is none. The device's state says which block it
//! was, and a doorbell that takes up such a state answers anew.

use harrier_hypercall_abi::Status;
use harrier_hypercall_abi::calls::{CheckpointArgs, CheckpointResult, ROLE_ORIGINAL, number};
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::Doorbell;
use super::channels::Answer;

/// A CHECKPOINT call whose snapshot is not there yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PendingCheckpoint {
    /// Guest-physical address of the block.
    pub gpa: u64,
    /// Its channel.
    pub channel: u32,
    /// Its sequence number, or zero.
    pub sequence: u64,
}

impl Doorbell {
    /// Accepts the call, and answers what the machine that makes it is to see.
    pub(super) fn checkpoint(&mut self, args: CheckpointArgs, pending: PendingCheckpoint) -> Answer {
        if args.flags != 0 || args.reserved != 0 {
            return Answer::error(Status::BadArgument);
        }
        if self.checkpoint.is_some() {
            return Answer::error(Status::Full);
        }
        if let Err(status) = self.calls.checkpoint() {
            return Answer::error(status);
        }
        self.checkpoint = Some(pending);
        let result = CheckpointResult { role: ROLE_ORIGINAL, ..self.calls.who() };
        Answer::ok(&result.to_bytes())
    }

    /// The snapshot that a CHECKPOINT call asked for is there. To be called before its processor goes on.
    pub fn checkpoint_done(&mut self) {
        self.checkpoint = None;
    }

    /// There is no snapshot: the call ends with HOST_FAILED. To be called before its processor goes on.
    pub fn checkpoint_failed(&mut self) {
        self.answer_checkpoint(&Answer::error(Status::HostFailed));
    }

    /// The call returns in a machine that was made of its snapshot.
    pub(super) fn checkpoint_returns(&mut self) {
        let result = self.calls.who();
        self.answer_checkpoint(&Answer::ok(&result.to_bytes()));
    }

    fn answer_checkpoint(&mut self, answer: &Answer) {
        let Some(pending) = self.checkpoint.take() else { return };
        self.channels.remember(pending.channel, pending.sequence, number::CHECKPOINT, answer);
        if self.write_answer(GuestAddress(pending.gpa), answer).is_err() {
            self.errors.report("hypercall", format_args!("no memory for a block at {:#x}", pending.gpa));
        }
    }
}
