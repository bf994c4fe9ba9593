//! What the agent says.

use super::{Cause, FailureKind, Hello, LOG_MAX, LogLevel, PROGRESS_MAX, Ready, Status, Stream, Usage, kind};
use crate::file::Transferred;
use crate::frame::{Frame, Outbox};
use crate::wire::{DecodeError, Reader};

/// What the agent says to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentMessage<'a> {
    /// The first frame.
    Hello(Hello),
    /// The agent takes commands; it waits for [`HostMessage::Attach`](crate::HostMessage::Attach).
    Ready(Ready),
    /// The command runs. Said again on a new connection, as are the other messages about a command's state.
    Started {
        /// The command.
        id: u32,
        /// Its process id in the guest.
        pid: u32,
        /// The guest's CLOCK_MONOTONIC in nanoseconds.
        at_ns: u64,
    },
    /// The command did not start, or the file was not copied. Its id is free once the host has released it.
    Failed {
        /// The command.
        id: u32,
        /// What is wrong.
        kind: FailureKind,
        /// The same for people: one line, at most [`LOG_MAX`] bytes, not to be trusted.
        message: &'a [u8],
    },
    /// The file is copied: it has its name, or all of it is sent. Its id is free once the host has released it.
    Transferred {
        /// The transfer.
        id: u32,
        /// What the agent has written or read.
        file: Transferred,
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
    /// The agent has disposed of all stdin before an offset: the host need not keep it.
    StdinAck {
        /// The command.
        id: u32,
        /// The offset.
        offset: u64,
    },
    /// The command reads no more stdin; nothing need be sent.
    StdinClosed {
        /// The command.
        id: u32,
    },
    /// The signal was sent to the command.
    SignalAck {
        /// The command.
        id: u32,
        /// Its number in [`HostMessage::Signal`](crate::HostMessage::Signal).
        sequence: u32,
    },
    /// The command has ended and all its output is sent. Its id is free once the host has released it.
    Exited {
        /// The command.
        id: u32,
        /// How it ended.
        status: Status,
        /// Why, if not by itself.
        cause: Cause,
        /// What it used.
        usage: Usage,
        /// The guest's CLOCK_MONOTONIC in nanoseconds.
        at_ns: u64,
    },
    /// The agent lives, said as often as [`Attach::heartbeat_ms`](crate::Attach::heartbeat_ms) asks for.
    Heartbeat {
        /// The guest's CLOCK_MONOTONIC in nanoseconds.
        at_ns: u64,
    },
    /// The command says how far it has come.
    Progress {
        /// The command.
        id: u32,
        /// One line, at most [`PROGRESS_MAX`] bytes, not to be trusted.
        text: &'a [u8],
    },
    /// File systems are written back and no command starts until the host thaws the machine or the deadline is over.
    Quiesced {
        /// Of [`HostMessage::Quiesce`](crate::HostMessage::Quiesce).
        sequence: u32,
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
            kind::READY => Self::Ready(Ready::decode(&mut reader)?),
            kind::STARTED => Self::Started { id, pid: reader.u32()?, at_ns: reader.u64()? },
            kind::FAILED => Self::Failed {
                id,
                kind: match reader.u8()? {
                    1 => FailureKind::NotFound,
                    2 => FailureKind::NotExecutable,
                    3 => FailureKind::Other,
                    value => return Err(DecodeError::InvalidField { field: "failure", value: value.into() }),
                },
                message: text(&mut reader)?,
            },
            kind::TRANSFERRED => Self::Transferred { id, file: Transferred::decode(&mut reader)? },
            kind::OUTPUT => Self::Output {
                id,
                stream: Stream::decode(&mut reader)?,
                offset: reader.u64()?,
                bytes: reader.rest(),
            },
            kind::STDIN_ACK => Self::StdinAck { id, offset: reader.u64()? },
            kind::STDIN_CLOSED => Self::StdinClosed { id },
            kind::SIGNAL_ACK => Self::SignalAck { id, sequence: reader.u32()? },
            kind::EXITED => Self::Exited {
                id,
                status: match (reader.u8()?, reader.u8()?) {
                    (1, code) => Status::Code(code),
                    (2, number @ 1..=127) => Status::Signal(number),
                    (status, _) => {
                        return Err(DecodeError::InvalidField { field: "status", value: status.into() });
                    }
                },
                cause: match reader.u8()? {
                    0 => Cause::Itself,
                    1 => Cause::Memory,
                    2 => Cause::Processes,
                    value => return Err(DecodeError::InvalidField { field: "cause", value: value.into() }),
                },
                usage: Usage { user_us: reader.u64()?, system_us: reader.u64()?, max_rss_kib: reader.u64()? },
                at_ns: reader.u64()?,
            },
            kind::HEARTBEAT => Self::Heartbeat { at_ns: reader.u64()? },
            kind::PROGRESS => Self::Progress {
                id,
                text: match reader.rest() {
                    text if text.len() <= PROGRESS_MAX => text,
                    text => {
                        let value = text.len() as u64;
                        return Err(DecodeError::InvalidField { field: "progress length", value });
                    }
                },
            },
            kind::QUIESCED => Self::Quiesced { sequence: reader.u32()? },
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
            Self::Ready(ref ready) => outbox.push(kind::READY, 0, |out| ready.encode(out)),
            Self::Started { id, pid, at_ns } => outbox.push(kind::STARTED, id, |out| {
                out.extend_from_slice(&pid.to_le_bytes());
                out.extend_from_slice(&at_ns.to_le_bytes());
            }),
            Self::Failed { id, kind, message } => outbox.push(kind::FAILED, id, |out| {
                out.push(match kind {
                    FailureKind::NotFound => 1,
                    FailureKind::NotExecutable => 2,
                    FailureKind::Other => 3,
                });
                out.extend_from_slice(cut(message));
            }),
            Self::Transferred { id, file } => outbox.push(kind::TRANSFERRED, id, |out| file.encode(out)),
            Self::Output { id, stream, offset, bytes } => outbox.push(kind::OUTPUT, id, |out| {
                out.push(stream.code());
                out.extend_from_slice(&offset.to_le_bytes());
                out.extend_from_slice(bytes);
            }),
            Self::StdinAck { id, offset } => {
                outbox.push(kind::STDIN_ACK, id, |out| out.extend_from_slice(&offset.to_le_bytes()));
            }
            Self::StdinClosed { id } => outbox.push(kind::STDIN_CLOSED, id, |_| {}),
            Self::SignalAck { id, sequence } => {
                outbox.push(kind::SIGNAL_ACK, id, |out| out.extend_from_slice(&sequence.to_le_bytes()));
            }
            Self::Exited { id, status, cause, usage, at_ns } => outbox.push(kind::EXITED, id, |out| {
                out.extend_from_slice(&match status {
                    Status::Code(code) => [1, code],
                    Status::Signal(number) => [2, number],
                });
                out.push(match cause {
                    Cause::Itself => 0,
                    Cause::Memory => 1,
                    Cause::Processes => 2,
                });
                for value in [usage.user_us, usage.system_us, usage.max_rss_kib, at_ns] {
                    out.extend_from_slice(&value.to_le_bytes());
                }
            }),
            Self::Heartbeat { at_ns } => {
                outbox.push(kind::HEARTBEAT, 0, |out| out.extend_from_slice(&at_ns.to_le_bytes()));
            }
            Self::Progress { id, text } => outbox.push(kind::PROGRESS, id, |out| {
                out.extend_from_slice(text.get(..PROGRESS_MAX).unwrap_or(text));
            }),
            Self::Quiesced { sequence } => {
                outbox.push(kind::QUIESCED, 0, |out| out.extend_from_slice(&sequence.to_le_bytes()));
            }
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
