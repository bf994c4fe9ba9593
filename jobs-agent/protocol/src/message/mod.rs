//! The messages of both directions. [`HostMessage`] and [`AgentMessage`] borrow their data from the frame that
//! they came in; `decode` is total, `send` appends a frame to an [`Outbox`].

mod agent;
mod attach;
mod host;

use crate::frame::{Frame, HEADER_LEN, MAX_PAYLOAD, Outbox};
use crate::wire::{DecodeError, Reader};
use crate::{CommandSpec, VERSION};

pub use agent::AgentMessage;
pub use attach::{Attach, Attached, BootTimes, CommandStatus, Kept, LINGER_FOREVER, Ready, Reason, Role};
pub use host::HostMessage;

/// The longest piece of data in a [`HostMessage::Stdin`] or [`AgentMessage::Output`] frame, in bytes. The whole frame
/// then fits 64 KiB, the longest packet that Linux sends over virtio-vsock.
pub const DATA_MAX: usize = MAX_PAYLOAD - HEADER_LEN - 16;

/// The longest text of a log line or failure in bytes.
pub const LOG_MAX: usize = 4096;

/// The longest text about a command's progress in bytes.
pub const PROGRESS_MAX: usize = 512;

/// What every connection opens with.
const MAGIC: [u8; 8] = *b"HARRIER\n";

mod kind {
    pub(super) const HELLO: u16 = 1;
    pub(super) const RUN_PART: u16 = 2;
    pub(super) const RUN: u16 = 3;
    pub(super) const STDIN: u16 = 4;
    pub(super) const STDIN_CLOSE: u16 = 5;
    pub(super) const ACK: u16 = 6;
    pub(super) const CLOSE_OUTPUT: u16 = 7;
    pub(super) const SIGNAL: u16 = 8;
    pub(super) const RESIZE: u16 = 9;
    pub(super) const SHUTDOWN: u16 = 10;
    pub(super) const ATTACH: u16 = 11;
    pub(super) const RELEASE: u16 = 12;
    pub(super) const PUT: u16 = 13;
    pub(super) const GET: u16 = 14;
    pub(super) const QUIESCE: u16 = 15;
    pub(super) const THAW: u16 = 16;

    pub(super) const READY: u16 = 32;
    pub(super) const STARTED: u16 = 33;
    pub(super) const FAILED: u16 = 34;
    pub(super) const OUTPUT: u16 = 35;
    pub(super) const STDIN_ACK: u16 = 36;
    pub(super) const STDIN_CLOSED: u16 = 37;
    pub(super) const EXITED: u16 = 38;
    pub(super) const LOG: u16 = 39;
    pub(super) const SYNCED: u16 = 40;
    pub(super) const SIGNAL_ACK: u16 = 41;
    pub(super) const TRANSFERRED: u16 = 42;
    pub(super) const HEARTBEAT: u16 = 43;
    pub(super) const PROGRESS: u16 = 44;
    pub(super) const QUIESCED: u16 = 45;
}

/// The first frame of both sides. Later versions may append fields, which earlier ones skip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The version that the sender speaks; the two sides must agree.
    pub version: u16,
    /// Abilities beyond the version's, one bit each. None are defined yet; unknown bits mean nothing.
    pub features: u64,
}

impl Hello {
    /// What this crate says.
    pub const OURS: Self = Self { version: VERSION, features: 0 };

    fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(payload);
        if reader.take(MAGIC.len())? != MAGIC {
            return Err(DecodeError::WrongMagic);
        }
        Ok(Self { version: reader.u16()?, features: reader.u64()? })
    }

    fn send(self, outbox: &mut Outbox) {
        outbox.push(kind::HELLO, 0, |out| {
            out.extend_from_slice(&MAGIC);
            out.extend_from_slice(&self.version.to_le_bytes());
            out.extend_from_slice(&self.features.to_le_bytes());
        });
    }
}

/// One of a command's two output streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, or everything that a terminal shows.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    /// Both, in order.
    pub const BOTH: [Self; 2] = [Self::Stdout, Self::Stderr];

    /// 0 or 1.
    #[must_use]
    pub fn index(self) -> usize {
        match self {
            Self::Stdout => 0,
            Self::Stderr => 1,
        }
    }

    fn code(self) -> u8 {
        match self {
            Self::Stdout => 1,
            Self::Stderr => 2,
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match reader.u8()? {
            1 => Ok(Self::Stdout),
            2 => Ok(Self::Stderr),
            value => Err(DecodeError::InvalidField { field: "stream", value: value.into() }),
        }
    }
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It returned this exit code.
    Code(u8),
    /// A signal of this number ended it.
    Signal(u8),
}

/// What else is to say of a command's end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cause {
    /// Nothing.
    #[default]
    Itself,
    /// It, or one of its descendants, was ended for want of memory.
    Memory,
    /// It was ended because it reached its limit of processes.
    Processes,
}

/// What a command and its descendants that it waited for have used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Time in user mode in microseconds.
    pub user_us: u64,
    /// Time in the kernel in microseconds.
    pub system_us: u64,
    /// Largest resident set in KiB.
    pub max_rss_kib: u64,
}

/// Why a command did not start, or a file was not copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// No such program or file.
    NotFound,
    /// The program is there but cannot be executed.
    NotExecutable,
    /// Anything else: working directory, root file system, resources.
    Other,
}

/// How serious a log line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    /// Something failed.
    Error,
    /// Something is not as it should be.
    Warn,
    /// For whoever looks into the agent.
    Debug,
}

/// Decodes a frame as a message of either direction and, where it runs a command, as a [`CommandSpec`]; encodes what was
/// understood again and says whether that is the frame that was given. For fuzzing.
#[must_use]
pub fn decode_any(frame: Frame<'_>) -> bool {
    let same = |outbox: Outbox| {
        let mut outbox = outbox;
        let mut bytes = Vec::new();
        outbox.flush(&mut bytes).is_ok() && bytes.get(HEADER_LEN..) == Some(frame.payload)
    };
    let mut exact = true;
    if let Ok(message) = HostMessage::decode(frame) {
        if let HostMessage::Run { bytes, .. } = &message
            && let Ok(spec) = CommandSpec::decode(bytes)
        {
            exact &= spec.encode().is_ok_and(|encoded| encoded == *bytes);
        }
        let mut outbox = Outbox::default();
        message.send(&mut outbox);
        exact &= matches!(message, HostMessage::Hello(_)) || same(outbox);
    }
    if let Ok(message) = AgentMessage::decode(frame) {
        let mut outbox = Outbox::default();
        message.send(&mut outbox);
        exact &= matches!(message, AgentMessage::Hello(_)) || same(outbox);
    }
    exact
}

#[cfg(test)]
mod tests;
