//! What the host says.

use super::{Attach, Hello, Stream, kind};
use crate::file::{GetSpec, PutSpec};
use crate::frame::{Frame, MAX_PAYLOAD, Outbox};
use crate::spec::WindowSize;
use crate::wire::{DecodeError, Reader};

/// What the host says to the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostMessage<'a> {
    /// The first frame.
    Hello(Hello),
    /// The answer to [`AgentMessage::Ready`](crate::AgentMessage::Ready). From here on both sides send data: the agent what
    /// the host has not received, the host what the agent has not received.
    Attach(Attach),
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
    /// Write a file: its content comes as stdin, the answer is [`AgentMessage::Transferred`](crate::AgentMessage::Transferred).
    Put {
        /// The transfer, chosen by the host like a command's id.
        id: u32,
        /// Which file.
        spec: PutSpec,
    },
    /// Read a file: its content comes as stdout, then [`AgentMessage::Transferred`](crate::AgentMessage::Transferred).
    Get {
        /// The transfer, chosen by the host like a command's id.
        id: u32,
        /// Which file.
        spec: GetSpec,
    },
    /// Write file systems back, answer [`AgentMessage::Quiesced`](crate::AgentMessage::Quiesced) and start nothing new.
    Quiesce {
        /// Comes back in the answer.
        sequence: u32,
        /// After so many milliseconds the agent goes on by itself.
        deadline_ms: u32,
    },
    /// The end of a [`HostMessage::Quiesce`].
    Thaw,
    /// Data for the command's stdin, within the window.
    Stdin {
        /// The command.
        id: u32,
        /// Where in the stream it belongs.
        offset: u64,
        /// The data.
        bytes: &'a [u8],
    },
    /// stdin ends here. Said again on a new connection.
    StdinClose {
        /// The command.
        id: u32,
    },
    /// The host has disposed of all output before an offset: the agent need not keep it.
    Ack {
        /// The command.
        id: u32,
        /// The stream.
        stream: Stream,
        /// The offset.
        offset: u64,
    },
    /// Nobody reads this stream any more: the command's next write gets SIGPIPE. Said again on a new connection.
    CloseOutput {
        /// The command.
        id: u32,
        /// The stream.
        stream: Stream,
    },
    /// Send a signal to the command's process group, and say [`AgentMessage::SignalAck`](crate::AgentMessage::SignalAck).
    Signal {
        /// The command.
        id: u32,
        /// Counts up from one; a signal that is said again on a new connection is sent once.
        sequence: u32,
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
    /// The host knows how the command ended, or does not want to: end it if it runs, and free its id.
    Release {
        /// The command.
        id: u32,
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
            kind::ATTACH => Self::Attach(Attach::decode(&mut reader)?),
            kind::ACK => Self::Ack { id, stream: Stream::decode(&mut reader)?, offset: reader.u64()? },
            kind::CLOSE_OUTPUT => Self::CloseOutput { id, stream: Stream::decode(&mut reader)? },
            kind::SIGNAL => Self::Signal { id, sequence: reader.u32()?, number: signal_number(&mut reader)? },
            kind::RESIZE => {
                Self::Resize { id, size: WindowSize { rows: reader.u16()?, cols: reader.u16()? } }
            }
            kind::RELEASE => Self::Release { id },
            kind::PUT => Self::Put { id, spec: PutSpec::decode(&mut reader)? },
            kind::GET => Self::Get { id, spec: GetSpec::decode(&mut reader)? },
            kind::QUIESCE => Self::Quiesce { sequence: reader.u32()?, deadline_ms: reader.u32()? },
            kind::THAW => Self::Thaw,
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
            Self::Attach(ref attach) => outbox.push(kind::ATTACH, 0, |out| attach.encode(out)),
            Self::RunPart { id, bytes } => {
                outbox.push(kind::RUN_PART, id, |out| out.extend_from_slice(bytes))
            }
            Self::Run { id, bytes } => outbox.push(kind::RUN, id, |out| out.extend_from_slice(bytes)),
            Self::Stdin { id, offset, bytes } => outbox.push(kind::STDIN, id, |out| {
                out.extend_from_slice(&offset.to_le_bytes());
                out.extend_from_slice(bytes);
            }),
            Self::StdinClose { id } => outbox.push(kind::STDIN_CLOSE, id, |_| {}),
            Self::Ack { id, stream, offset } => outbox.push(kind::ACK, id, |out| {
                out.push(stream.code());
                out.extend_from_slice(&offset.to_le_bytes());
            }),
            Self::CloseOutput { id, stream } => {
                outbox.push(kind::CLOSE_OUTPUT, id, |out| out.push(stream.code()))
            }
            Self::Signal { id, sequence, number } => outbox.push(kind::SIGNAL, id, |out| {
                out.extend_from_slice(&sequence.to_le_bytes());
                out.push(number);
            }),
            Self::Resize { id, size } => outbox.push(kind::RESIZE, id, |out| {
                out.extend_from_slice(&size.rows.to_le_bytes());
                out.extend_from_slice(&size.cols.to_le_bytes());
            }),
            Self::Release { id } => outbox.push(kind::RELEASE, id, |_| {}),
            Self::Put { id, ref spec } => outbox.push(kind::PUT, id, |out| spec.encode(out)),
            Self::Get { id, ref spec } => outbox.push(kind::GET, id, |out| spec.encode(out)),
            Self::Quiesce { sequence, deadline_ms } => outbox.push(kind::QUIESCE, 0, |out| {
                out.extend_from_slice(&sequence.to_le_bytes());
                out.extend_from_slice(&deadline_ms.to_le_bytes());
            }),
            Self::Thaw => outbox.push(kind::THAW, 0, |_| {}),
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

fn signal_number(reader: &mut Reader<'_>) -> Result<u8, DecodeError> {
    match reader.u8()? {
        number @ 1..=64 => Ok(number),
        value => Err(DecodeError::InvalidField { field: "signal", value: value.into() }),
    }
}
