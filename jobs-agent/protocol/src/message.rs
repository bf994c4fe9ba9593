//! The messages of both directions. [`HostMessage`] and [`AgentMessage`] borrow their data from the frame that
//! they came in; `decode` is total, `send` appends a frame to an [`Outbox`].

use crate::frame::{Frame, HEADER_LEN, MAX_PAYLOAD, Outbox};
use crate::spec::WindowSize;
use crate::wire::{DecodeError, Reader};
use crate::{CommandSpec, VERSION};

/// The longest piece of data in a [`HostMessage::Stdin`] or [`AgentMessage::Output`] frame, in bytes. The whole frame
/// then fits 64 KiB, the longest packet that Linux sends over virtio-vsock.
pub const DATA_MAX: usize = MAX_PAYLOAD - HEADER_LEN - 16;

/// The longest text of a log line or failure in bytes.
pub const LOG_MAX: usize = 4096;

/// What every connection opens with.
const MAGIC: [u8; 8] = *b"HARRIER\n";

mod kind {
    pub(super) const HELLO: u16 = 1;
    pub(super) const RUN_PART: u16 = 2;
    pub(super) const RUN: u16 = 3;
    pub(super) const STDIN: u16 = 4;
    pub(super) const STDIN_CLOSE: u16 = 5;
    pub(super) const CREDIT: u16 = 6;
    pub(super) const CLOSE_OUTPUT: u16 = 7;
    pub(super) const SIGNAL: u16 = 8;
    pub(super) const RESIZE: u16 = 9;
    pub(super) const SHUTDOWN: u16 = 10;

    pub(super) const READY: u16 = 32;
    pub(super) const STARTED: u16 = 33;
    pub(super) const START_FAILED: u16 = 34;
    pub(super) const OUTPUT: u16 = 35;
    pub(super) const STDIN_CREDIT: u16 = 36;
    pub(super) const STDIN_CLOSED: u16 = 37;
    pub(super) const EXITED: u16 = 38;
    pub(super) const LOG: u16 = 39;
    pub(super) const SYNCED: u16 = 40;
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

/// When the guest reached which point of its boot, by its CLOCK_MONOTONIC in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BootTimes {
    /// The agent's first instruction, near enough.
    pub agent_start_ns: u64,
    /// File systems are mounted and modules loaded.
    pub mounted_ns: u64,
    /// The connection stands.
    pub connected_ns: u64,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It returned this exit code.
    Code(u8),
    /// A signal of this number ended it.
    Signal(u8),
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

/// Why a command did not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// No such program.
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

/// What the host says to the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostMessage<'a> {
    /// The first frame.
    Hello(Hello),
    /// The beginning of an encoded [`CommandSpec`] that does not fit one frame; [`HostMessage::Run`] completes it.
    RunPart {
        /// The command, chosen by the host; must not be in use.
        id: u32,
        /// A piece of the encoding.
        bytes: &'a [u8],
    },
    /// Run a command; `bytes` is the encoded [`CommandSpec`] or its last piece.
    Run {
        /// The command, chosen by the host; must not be in use.
        id: u32,
        /// The last or only piece of the encoding.
        bytes: &'a [u8],
    },
    /// Data for the command's stdin, within the window.
    Stdin {
        /// The command.
        id: u32,
        /// Where in the stream it belongs.
        offset: u64,
        /// The data.
        bytes: &'a [u8],
    },
    /// stdin ends here.
    StdinClose {
        /// The command.
        id: u32,
    },
    /// The host has disposed of so much output.
    Credit {
        /// The command.
        id: u32,
        /// The stream.
        stream: Stream,
        /// How many bytes.
        bytes: u32,
    },
    /// Nobody reads this stream any more: the command's next write gets SIGPIPE.
    CloseOutput {
        /// The command.
        id: u32,
        /// The stream.
        stream: Stream,
    },
    /// Send a signal to the command's process group.
    Signal {
        /// The command.
        id: u32,
        /// Its number, 1 to 64.
        number: u8,
    },
    /// The command's terminal has a new size.
    Resize {
        /// The command.
        id: u32,
        /// The size.
        size: WindowSize,
    },
    /// End everything: write back, unmount, answer [`AgentMessage::Synced`], power off.
    Shutdown,
}

impl<'a> HostMessage<'a> {
    /// Decodes a frame from the host.
    pub fn decode(frame: Frame<'a>) -> Result<Self, DecodeError> {
        let id = frame.id;
        let mut reader = Reader::new(frame.payload);
        let message = match frame.kind {
            kind::HELLO => return Hello::decode(frame.payload).map(Self::Hello),
            kind::RUN_PART => Self::RunPart { id, bytes: reader.rest() },
            kind::RUN => Self::Run { id, bytes: reader.rest() },
            kind::STDIN => Self::Stdin { id, offset: reader.u64()?, bytes: reader.rest() },
            kind::STDIN_CLOSE => Self::StdinClose { id },
            kind::CREDIT => Self::Credit { id, stream: Stream::decode(&mut reader)?, bytes: reader.u32()? },
            kind::CLOSE_OUTPUT => Self::CloseOutput { id, stream: Stream::decode(&mut reader)? },
            kind::SIGNAL => Self::Signal { id, number: signal_number(&mut reader)? },
            kind::RESIZE => {
                Self::Resize { id, size: WindowSize { rows: reader.u16()?, cols: reader.u16()? } }
            }
            kind::SHUTDOWN => Self::Shutdown,
            other => return Err(DecodeError::UnknownKind(other)),
        };
        reader.finish()?;
        Ok(message)
    }

    /// Appends the message to what is to be sent. Data is at most [`DATA_MAX`] bytes, a piece of a
    /// [`CommandSpec`] at most [`MAX_PAYLOAD`].
    pub fn send(&self, outbox: &mut Outbox) {
        match *self {
            Self::Hello(hello) => hello.send(outbox),
            Self::RunPart { id, bytes } => {
                outbox.push(kind::RUN_PART, id, |out| out.extend_from_slice(bytes))
            }
            Self::Run { id, bytes } => outbox.push(kind::RUN, id, |out| out.extend_from_slice(bytes)),
            Self::Stdin { id, offset, bytes } => outbox.push(kind::STDIN, id, |out| {
                out.extend_from_slice(&offset.to_le_bytes());
                out.extend_from_slice(bytes);
            }),
            Self::StdinClose { id } => outbox.push(kind::STDIN_CLOSE, id, |_| {}),
            Self::Credit { id, stream, bytes } => outbox.push(kind::CREDIT, id, |out| {
                out.push(stream.code());
                out.extend_from_slice(&bytes.to_le_bytes());
            }),
            Self::CloseOutput { id, stream } => {
                outbox.push(kind::CLOSE_OUTPUT, id, |out| out.push(stream.code()))
            }
            Self::Signal { id, number } => outbox.push(kind::SIGNAL, id, |out| out.push(number)),
            Self::Resize { id, size } => outbox.push(kind::RESIZE, id, |out| {
                out.extend_from_slice(&size.rows.to_le_bytes());
                out.extend_from_slice(&size.cols.to_le_bytes());
            }),
            Self::Shutdown => outbox.push(kind::SHUTDOWN, 0, |_| {}),
        }
    }

    /// Appends the frames that run an encoded command.
    pub fn send_run(id: u32, encoded: &[u8], outbox: &mut Outbox) {
        let mut rest = encoded;
        while let Some((part, tail)) = rest.split_at_checked(MAX_PAYLOAD).filter(|(_, tail)| !tail.is_empty())
        {
            HostMessage::RunPart { id, bytes: part }.send(outbox);
            rest = tail;
        }
        HostMessage::Run { id, bytes: rest }.send(outbox);
    }
}

/// What the agent says to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentMessage<'a> {
    /// The first frame.
    Hello(Hello),
    /// The agent takes commands.
    Ready(BootTimes),
    /// The command runs.
    Started {
        /// The command.
        id: u32,
        /// Its process id in the guest.
        pid: u32,
        /// The guest's CLOCK_MONOTONIC in nanoseconds.
        at_ns: u64,
    },
    /// The command did not start, and its id is free again.
    StartFailed {
        /// The command.
        id: u32,
        /// What is wrong.
        kind: FailureKind,
        /// The same for people: one line, at most [`LOG_MAX`] bytes, not to be trusted.
        message: &'a [u8],
    },
    /// Output of the command, within the window.
    Output {
        /// The command.
        id: u32,
        /// Which of its streams.
        stream: Stream,
        /// Where in the stream it belongs.
        offset: u64,
        /// The data.
        bytes: &'a [u8],
    },
    /// The agent has disposed of so much stdin.
    StdinCredit {
        /// The command.
        id: u32,
        /// How many bytes.
        bytes: u32,
    },
    /// The command reads no more stdin; nothing need be sent.
    StdinClosed {
        /// The command.
        id: u32,
    },
    /// The command has ended and all its output is sent. Its id is free again.
    Exited {
        /// The command.
        id: u32,
        /// How it ended.
        status: Status,
        /// What it used.
        usage: Usage,
        /// The guest's CLOCK_MONOTONIC in nanoseconds.
        at_ns: u64,
    },
    /// A line for the host's log.
    Log {
        /// How serious.
        level: LogLevel,
        /// One line, at most [`LOG_MAX`] bytes, not to be trusted.
        text: &'a [u8],
    },
    /// Everything is written back and unmounted: the machine may be switched off.
    Synced,
}

impl<'a> AgentMessage<'a> {
    /// Decodes a frame from the agent.
    pub fn decode(frame: Frame<'a>) -> Result<Self, DecodeError> {
        let id = frame.id;
        let mut reader = Reader::new(frame.payload);
        let message = match frame.kind {
            kind::HELLO => return Hello::decode(frame.payload).map(Self::Hello),
            kind::READY => Self::Ready(BootTimes {
                agent_start_ns: reader.u64()?,
                mounted_ns: reader.u64()?,
                connected_ns: reader.u64()?,
            }),
            kind::STARTED => Self::Started { id, pid: reader.u32()?, at_ns: reader.u64()? },
            kind::START_FAILED => Self::StartFailed {
                id,
                kind: match reader.u8()? {
                    1 => FailureKind::NotFound,
                    2 => FailureKind::NotExecutable,
                    3 => FailureKind::Other,
                    value => return Err(DecodeError::InvalidField { field: "failure", value: value.into() }),
                },
                message: text(&mut reader)?,
            },
            kind::OUTPUT => Self::Output {
                id,
                stream: Stream::decode(&mut reader)?,
                offset: reader.u64()?,
                bytes: reader.rest(),
            },
            kind::STDIN_CREDIT => Self::StdinCredit { id, bytes: reader.u32()? },
            kind::STDIN_CLOSED => Self::StdinClosed { id },
            kind::EXITED => Self::Exited {
                id,
                status: match (reader.u8()?, reader.u8()?) {
                    (1, code) => Status::Code(code),
                    (2, number @ 1..=127) => Status::Signal(number),
                    (status, _) => {
                        return Err(DecodeError::InvalidField { field: "status", value: status.into() });
                    }
                },
                usage: Usage { user_us: reader.u64()?, system_us: reader.u64()?, max_rss_kib: reader.u64()? },
                at_ns: reader.u64()?,
            },
            kind::LOG => Self::Log {
                level: match reader.u8()? {
                    1 => LogLevel::Error,
                    2 => LogLevel::Warn,
                    3 => LogLevel::Debug,
                    value => return Err(DecodeError::InvalidField { field: "level", value: value.into() }),
                },
                text: text(&mut reader)?,
            },
            kind::SYNCED => Self::Synced,
            other => return Err(DecodeError::UnknownKind(other)),
        };
        reader.finish()?;
        Ok(message)
    }

    /// Appends the message to what is to be sent. Data is at most [`DATA_MAX`] bytes; longer texts are cut.
    pub fn send(&self, outbox: &mut Outbox) {
        match *self {
            Self::Hello(hello) => hello.send(outbox),
            Self::Ready(times) => outbox.push(kind::READY, 0, |out| {
                for time in [times.agent_start_ns, times.mounted_ns, times.connected_ns] {
                    out.extend_from_slice(&time.to_le_bytes());
                }
            }),
            Self::Started { id, pid, at_ns } => outbox.push(kind::STARTED, id, |out| {
                out.extend_from_slice(&pid.to_le_bytes());
                out.extend_from_slice(&at_ns.to_le_bytes());
            }),
            Self::StartFailed { id, kind, message } => outbox.push(kind::START_FAILED, id, |out| {
                out.push(match kind {
                    FailureKind::NotFound => 1,
                    FailureKind::NotExecutable => 2,
                    FailureKind::Other => 3,
                });
                out.extend_from_slice(cut(message));
            }),
            Self::Output { id, stream, offset, bytes } => outbox.push(kind::OUTPUT, id, |out| {
                out.push(stream.code());
                out.extend_from_slice(&offset.to_le_bytes());
                out.extend_from_slice(bytes);
            }),
            Self::StdinCredit { id, bytes } => {
                outbox.push(kind::STDIN_CREDIT, id, |out| out.extend_from_slice(&bytes.to_le_bytes()));
            }
            Self::StdinClosed { id } => outbox.push(kind::STDIN_CLOSED, id, |_| {}),
            Self::Exited { id, status, usage, at_ns } => outbox.push(kind::EXITED, id, |out| {
                out.extend_from_slice(&match status {
                    Status::Code(code) => [1, code],
                    Status::Signal(number) => [2, number],
                });
                for value in [usage.user_us, usage.system_us, usage.max_rss_kib, at_ns] {
                    out.extend_from_slice(&value.to_le_bytes());
                }
            }),
            Self::Log { level, text } => outbox.push(kind::LOG, 0, |out| {
                out.push(match level {
                    LogLevel::Error => 1,
                    LogLevel::Warn => 2,
                    LogLevel::Debug => 3,
                });
                out.extend_from_slice(cut(text));
            }),
            Self::Synced => outbox.push(kind::SYNCED, 0, |_| {}),
        }
    }
}

fn signal_number(reader: &mut Reader<'_>) -> Result<u8, DecodeError> {
    match reader.u8()? {
        number @ 1..=64 => Ok(number),
        value => Err(DecodeError::InvalidField { field: "signal", value: value.into() }),
    }
}

fn text<'a>(reader: &mut Reader<'a>) -> Result<&'a [u8], DecodeError> {
    let text = reader.rest();
    if text.len() > LOG_MAX {
        return Err(DecodeError::InvalidField { field: "text length", value: text.len() as u64 });
    }
    Ok(text)
}

fn cut(text: &[u8]) -> &[u8] {
    text.get(..LOG_MAX).unwrap_or(text)
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
#[path = "message_tests.rs"]
mod tests;
