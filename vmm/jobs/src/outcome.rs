//! What comes of running a command: its [`Outcome`], or an [`ExecuteError`].

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::session::StateError;
use harrier_agent_protocol::{Cause, MAX_COMMANDS, SpecError, Transferred, Usage, VERSION};

/// How a command ended, or why it did not start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// It returned this exit code.
    Exited(u8),
    /// A signal of this number ended it.
    Signaled(u8),
    /// It was a file, and is copied.
    Transferred(Transferred),
    /// There is no such program, or no such file to copy; one line for people.
    NotFound(String),
    /// The program is there but cannot be executed; one line for people.
    NotExecutable(String),
    /// It could not be started for another reason; one line for people.
    Failed(String),
}

impl Status {
    /// The exit code that stands for this status, by the convention of shells and container tools: the command's own,
    /// 128 + n for signal n, 127 not found, 126 not executable, 125 anything else.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Exited(code) => *code,
            Self::Signaled(number) => number.saturating_add(128),
            Self::Transferred(_) => 0,
            Self::NotFound(_) => 127,
            Self::NotExecutable(_) => 126,
            Self::Failed(_) => 125,
        }
    }

    /// Why the command did not start, if it did not: one printable line.
    #[must_use]
    pub fn message(&self) -> Option<&str> {
        match self {
            Self::Exited(_) | Self::Signaled(_) | Self::Transferred(_) => None,
            Self::NotFound(message) | Self::NotExecutable(message) | Self::Failed(message) => Some(message),
        }
    }
}

/// When things happened. Guest times are its CLOCK_MONOTONIC, about zero at its kernel's entry; host times count from
/// the call that ran the command. What did not happen is zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// The agent was started by the guest's kernel, in guest nanoseconds.
    pub agent_start_ns: u64,
    /// The agent was connected, in guest nanoseconds.
    pub agent_ready_ns: u64,
    /// The command ran, in guest nanoseconds.
    pub command_started_ns: u64,
    /// The command had ended, in guest nanoseconds.
    pub command_ended_ns: u64,
    /// The agent had answered.
    pub host_ready: Duration,
    /// The host knew that the command ran.
    pub host_started: Duration,
    /// The host knew that the command had ended.
    pub host_ended: Duration,
}

/// The end of a command.
#[derive(Debug)]
pub struct Outcome {
    /// How it ended.
    pub status: Status,
    /// Why, if not by itself.
    pub cause: Cause,
    /// When.
    pub timings: Timings,
    /// What it used.
    pub usage: Usage,
    /// Bytes of stdin sent to it.
    pub stdin_bytes: u64,
    /// Bytes that it wrote to stdout, or to its terminal.
    pub stdout_bytes: u64,
    /// Bytes that it wrote to stderr.
    pub stderr_bytes: u64,
    /// Why not all of stdout could be written on the host. A closed pipe is no error but the reader's decision.
    pub stdout_error: Option<io::Error>,
    /// The same for stderr.
    pub stderr_error: Option<io::Error>,
    /// Why stdin could not be read on the host to its end; the command saw the end of its input there.
    pub stdin_error: Option<io::Error>,
}

/// Why a command has no outcome. Each is one line.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ExecuteError {
    /// The specification cannot be sent.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The host lacks a file descriptor, a thread or the like.
    #[error("cannot set up the connection to the guest's agent: {0}")]
    Setup(#[source] Arc<io::Error>),
    /// The agent connected, and then did not say anything in time.
    #[error("the guest's agent did not answer within {0:?}")]
    NoAnswer(Duration),
    /// The agent speaks another version.
    #[error(
        "the guest's agent speaks version {0} of the agent protocol, this program {VERSION}: build the initramfs anew"
    )]
    Version(u16),
    /// The agent said something that it may not.
    #[error("the guest's agent broke the protocol: {0}")]
    Protocol(String),
    /// The agent or its machine is gone.
    #[error("the guest ended {0}")]
    Disconnected(&'static str),
    /// The agent could not go on, and said why.
    #[error("the guest's agent gave up: {0}")]
    Agent(String),
    /// The connection failed.
    #[error("the connection to the guest's agent failed: {0}")]
    Connection(#[source] Arc<io::Error>),
    /// The guest was started anew, and the command with it is gone.
    #[error("the guest has started anew, and the command is lost")]
    Lost,
    /// Too many commands at a time.
    #[error("{MAX_COMMANDS} commands run in this machine already: wait until one has ended")]
    TooMany,
    /// What was saved of a session cannot be resumed.
    #[error(transparent)]
    State(StateError),
    /// A snapshot cannot hold what the session is at.
    #[error("no snapshot can be taken now: {0}: try again later")]
    Busy(&'static str),
    /// The session was given up before, or its thread has ended.
    #[error("the session with the guest's agent is over")]
    Over,
    /// The caller cancelled it.
    #[error("cancelled")]
    Cancelled,
}
