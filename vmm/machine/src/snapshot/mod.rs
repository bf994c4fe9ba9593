//! Snapshots of a machine: taking one while it runs, and making a machine of one.
//!
//! [`MachineHandle::snapshot`] copies memory while the guest runs, stops it for what it wrote meanwhile, and lets it go
//! on before anything is made durable (`take`). [`MachineBuilder::restoring`] and [`MachineBuilder::restore`] make a
//! machine of a snapshot, on any engine (`restore`). What belongs to a machine's state is in `sections`; the container
//! is harrier-snapshot's.
//!
//! [`MachineHandle::snapshot`]: crate::MachineHandle::snapshot
//! [`MachineBuilder::restoring`]: crate::MachineBuilder::restoring
//! [`MachineBuilder::restore`]: crate::MachineBuilder::restore

mod identity;
mod pages;
mod restore;
mod sections;
mod take;

use harrier_engine::EngineError;
use harrier_snapshot::SnapshotError;

pub use crate::hypercalls::Quiesced;
pub use identity::{Identity, Restoration, Role};
pub use restore::RestoreError;
pub use sections::{HOST_PREFIX, MachineState};
pub use take::{GuestRest, Kind, OwnerPart, Progress, Report, Request};

pub(crate) use pages::Written;

/// Why a snapshot was not taken. The machine goes on as it was before.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// There is nothing to take a snapshot of.
    #[error("the machine has ended: there is nothing to take a snapshot of")]
    Ended,
    /// Another snapshot of the machine is being taken.
    #[error("a snapshot of this machine is being taken already: wait for it")]
    Busy,
    /// A difference has to be one to something.
    #[error("a difference needs a snapshot that it is a difference to: take a full one first")]
    NoParent,
    /// The owner changed its mind.
    #[error("the snapshot was cancelled")]
    Cancelled,
    /// A part of the machine cannot be saved.
    #[error("{unit}: {reason}")]
    Unit {
        /// The part.
        unit: String,
        /// Why not.
        reason: String,
    },
    /// The engine's answer.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Guest memory cannot be read.
    #[error("guest memory: {0}")]
    Memory(String),
    /// The container's.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}
