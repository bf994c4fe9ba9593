//! The connection between the host and the jobs agent inside a guest.
//!
//! The agent dials the host ([`AGENT_PORT`]), both sides say [`Hello`] and from then on exchange frames: the
//! host sends [`HostMessage`]s, the agent [`AgentMessage`]s. The agent says [`Ready`], the host answers [`Attach`], and
//! with that both know what runs and where its streams stand, on the first connection as on every later one: a
//! connection that is lost loses nothing, and the agent dials again. A frame is a header of [`HEADER_LEN`] bytes and at most
//! [`MAX_PAYLOAD`] bytes; every message of a command carries the command's id, so that several commands share
//! one connection.
//!
//! ```text
//! offset 0  u32  payload length   little endian, at most MAX_PAYLOAD
//!        4  u16  kind             see `message`
//!        6  u16  reserved         zero
//!        8  u32  command id       zero where the message belongs to no command
//!       12       payload
//! ```
//!
//! A file is copied like a command: into the machine over its stdin, out of it over its stdout ([`PutSpec`], [`GetSpec`]), and
//! goes on after a lost connection as a command's streams do. Both sides take its SHA-256, and it has its name only once
//! it is complete.
//!
//! Each of a command's three byte streams has a window ([`flow`]): a sender never has more than [`WINDOW`] bytes
//! under way that the receiver has not yet disposed of, and keeps those to send them again. A receiver can thus always take what arrives off the
//! connection, and one stream that stands still never holds up the others or the control messages.
//!
//! Neither side trusts the other: every decode function is total, every count is checked against the bytes that are
//! there, and what a peer can make the other side keep is bounded. The crate uses the standard library
//! only and does no I/O by itself. Its neighbours are the agent, and `harrier-jobs` on the host.

mod file;
pub mod flow;
mod frame;
mod message;
mod spec;
mod wire;

pub use file::{GetSpec, PATH_MAX, PutSpec, Transferred};
pub use frame::{Frame, FrameError, HEADER_LEN, Inbox, MAX_PAYLOAD, Outbox};
pub use message::{
    AgentMessage, Attach, Attached, BootTimes, Cause, CommandStatus, DATA_MAX, FailureKind, Hello,
    HostMessage, Kept, LINGER_FOREVER, LOG_MAX, LogLevel, PROGRESS_MAX, Ready, Reason, Role, Status, Stream,
    Usage, decode_any,
};
pub use spec::{CommandSpec, Limits, MAX_SPEC, Root, SpecError, User, WindowSize};
pub use wire::DecodeError;

/// The vsock port of the host (CID 2) that the agent dials.
pub const AGENT_PORT: u32 = 1024;

/// The serial number (virtio-blk `GET_ID`) of the disk that `--rootfs` names.
pub const ROOT_DISK_SERIAL: &str = "harrier-root";

/// The version of the protocol that this crate speaks. It changes whenever a frame's meaning does; only the layout
/// of [`Hello`] never changes, so that two sides of different versions can name each other's.
pub const VERSION: u16 = 3;

/// Names what holds an agent of this [`VERSION`]: builds for different versions lie side by side in one cache.
pub const VERSION_TAG: &str = "agent-3";

/// How many bytes of one stream may be under way: sent, but not yet disposed of by the receiver.
pub const WINDOW: u32 = 256 * 1024;

/// How many commands may run at the same time on one connection.
pub const MAX_COMMANDS: usize = 64;

#[cfg(test)]
mod tests {
    #[test]
    fn the_tag_names_the_version() {
        assert_eq!(super::VERSION_TAG, format!("agent-{}", super::VERSION));
    }
}
