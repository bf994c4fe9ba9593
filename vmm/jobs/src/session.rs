//! The host's half of the agent protocol for one command, without any I/O: what may be said when, the streams' windows,
//! and what waits to be sent. Total: whatever the agent sends is an [`Event`] or a [`Violation`].

use harrier_agent_protocol::flow::{FlowError, ReceiveWindow, SendWindow};
use harrier_agent_protocol::{
    AgentMessage, BootTimes, DATA_MAX, DecodeError, FailureKind, Frame, FrameError, Hello, HostMessage,
    LogLevel, Outbox, Status as WireStatus, Stream, Usage, VERSION, WindowSize,
};

use crate::outcome::Status;

/// The only command of a session has this id.
const COMMAND: u32 = 1;

/// Control messages wait while this much is to be sent, so that a guest that does not listen costs no memory.
const OUTBOX_FULL: usize = 512 * 1024;

/// How far a session has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing has come from the agent.
    Silent,
    /// It has said hello and gets itself ready.
    Greeted,
    /// It has been told the command.
    Starting,
    /// The command runs.
    Running,
    /// The command has ended or failed to start.
    Ended,
    /// The machine is ready to be switched off.
    Synced,
}

/// What the agent has said.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Nothing that concerns the caller.
    Nothing,
    /// The agent is ready; the command is on its way.
    Ready(BootTimes),
    /// The command runs since this time of the guest's CLOCK_MONOTONIC in nanoseconds. Input may be sent.
    Started(u64),
    /// Output, to be given back with [`Session::disposed`].
    Output(Stream, &'a [u8]),
    /// Input may be sent again: so many bytes more.
    StdinCredit(u32),
    /// The command reads no more input.
    StdinClosed,
    /// The command has ended.
    Ended {
        /// How.
        status: Status,
        /// What it used.
        usage: Usage,
        /// The guest's CLOCK_MONOTONIC in nanoseconds; zero when it never ran.
        at_ns: u64,
    },
    /// A printable line for the log.
    Log(LogLevel, String),
    /// The machine may be switched off.
    Synced,
}

/// How the agent broke the protocol.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// No proper frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// No proper message.
    #[error(transparent)]
    Message(#[from] DecodeError),
    /// A stream's rules.
    #[error(transparent)]
    Flow(#[from] FlowError),
    /// A message at the wrong time.
    #[error("an unexpected {message} message (phase {phase:?})")]
    Unexpected {
        /// Which.
        message: &'static str,
        /// When.
        phase: Phase,
    },
    /// Another version of the protocol.
    #[error("it speaks version {0}, not {VERSION}")]
    Version(u16),
}

/// One command's half of the protocol.
pub struct Session {
    phase: Phase,
    command: Vec<u8>,
    /// What waits to be sent.
    pub outbox: Outbox,
    stdin: SendWindow,
    stdin_is_open: bool,
    outputs: [ReceiveWindow; 2],
    closed: [bool; 2],
    /// Signals that wait, bit n for signal n + 1: like a process's, each at most once.
    signals: u64,
    size: Option<WindowSize>,
}

impl Session {
    /// A session that will run an encoded command.
    #[must_use]
    pub fn new(command: Vec<u8>) -> Self {
        let mut outbox = Outbox::default();
        HostMessage::Hello(Hello::OURS).send(&mut outbox);
        Self {
            phase: Phase::Silent,
            command,
            outbox,
            stdin: SendWindow::default(),
            stdin_is_open: true,
            outputs: Default::default(),
            closed: [false; 2],
            signals: 0,
            size: None,
        }
    }

    /// How far it has come.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// How many bytes came on a stream.
    #[must_use]
    pub fn received(&self, stream: Stream) -> u64 {
        let [stdout, stderr] = &self.outputs;
        (if stream == Stream::Stdout { stdout } else { stderr }).offset()
    }

    /// How many bytes of input were sent.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.stdin.offset()
    }

    /// Takes a frame from the agent.
    pub fn receive<'a>(&mut self, frame: Frame<'a>) -> Result<Event<'a>, Violation> {
        let message = AgentMessage::decode(frame)?;
        let phase = self.phase;
        let unexpected = |message| Err(Violation::Unexpected { message, phase });
        Ok(match message {
            AgentMessage::Hello(hello) if phase == Phase::Silent => {
                if hello.version != VERSION {
                    return Err(Violation::Version(hello.version));
                }
                self.phase = Phase::Greeted;
                Event::Nothing
            }
            AgentMessage::Hello(_) => return unexpected("Hello"),
            _ if phase == Phase::Silent => return unexpected("first"),
            AgentMessage::Ready(times) if phase == Phase::Greeted => {
                self.phase = Phase::Starting;
                HostMessage::send_run(COMMAND, &std::mem::take(&mut self.command), &mut self.outbox);
                Event::Ready(times)
            }
            AgentMessage::Ready(_) => return unexpected("Ready"),
            AgentMessage::Started { id: COMMAND, at_ns, .. } if phase == Phase::Starting => {
                self.phase = Phase::Running;
                self.send_control();
                Event::Started(at_ns)
            }
            AgentMessage::Started { .. } => return unexpected("Started"),
            AgentMessage::StartFailed { id: COMMAND, kind, message } if phase == Phase::Starting => {
                self.phase = Phase::Ended;
                let message = printable(message);
                let status = match kind {
                    FailureKind::NotFound => Status::NotFound(message),
                    FailureKind::NotExecutable => Status::NotExecutable(message),
                    FailureKind::Other => Status::Failed(message),
                };
                Event::Ended { status, usage: Usage::default(), at_ns: 0 }
            }
            AgentMessage::StartFailed { .. } => return unexpected("StartFailed"),
            AgentMessage::Output { id: COMMAND, stream, offset, bytes } if phase == Phase::Running => {
                let window = self.output(stream);
                window.receive(offset, bytes.len())?;
                if self.is_closed(stream) {
                    self.disposed(stream, bytes.len());
                    Event::Nothing
                } else {
                    Event::Output(stream, bytes)
                }
            }
            AgentMessage::Output { .. } => return unexpected("Output"),
            AgentMessage::StdinCredit { id: COMMAND, bytes } if phase == Phase::Running => {
                self.stdin.credit(bytes)?;
                Event::StdinCredit(bytes)
            }
            AgentMessage::StdinCredit { .. } => return unexpected("StdinCredit"),
            AgentMessage::StdinClosed { id: COMMAND } if phase == Phase::Running => {
                self.stdin_is_open = false;
                Event::StdinClosed
            }
            AgentMessage::StdinClosed { .. } => return unexpected("StdinClosed"),
            AgentMessage::Exited { id: COMMAND, status, usage, at_ns } if phase == Phase::Running => {
                self.phase = Phase::Ended;
                let status = match status {
                    WireStatus::Code(code) => Status::Exited(code),
                    WireStatus::Signal(number) => Status::Signaled(number),
                };
                Event::Ended { status, usage, at_ns }
            }
            AgentMessage::Exited { .. } => return unexpected("Exited"),
            AgentMessage::Log { level, text } => Event::Log(level, printable(text)),
            AgentMessage::Synced if phase == Phase::Ended => {
                self.phase = Phase::Synced;
                Event::Synced
            }
            AgentMessage::Synced => return unexpected("Synced"),
        })
    }

    /// Sends input of at most the credit that there is: [`WINDOW`](harrier_agent_protocol::WINDOW) bytes at the
    /// command's start and what [`Event::StdinCredit`] gives. More is cut off; what the command does not
    /// read any more is dropped.
    pub fn send_stdin(&mut self, bytes: &[u8]) {
        if !self.stdin_is_open || self.phase != Phase::Running {
            return;
        }
        let bytes = bytes.get(..self.stdin.available()).unwrap_or(bytes);
        for chunk in bytes.chunks(DATA_MAX) {
            let offset = self.stdin.send(chunk.len());
            HostMessage::Stdin { id: COMMAND, offset, bytes: chunk }.send(&mut self.outbox);
        }
    }

    /// The input ends here.
    pub fn end_stdin(&mut self) {
        if self.phase == Phase::Running && std::mem::replace(&mut self.stdin_is_open, false) {
            HostMessage::StdinClose { id: COMMAND }.send(&mut self.outbox);
        }
    }

    /// Output is written, or dropped; the agent may send as much again.
    pub fn disposed(&mut self, stream: Stream, bytes: usize) {
        let window = self.output(stream);
        window.dispose(bytes);
        if let Some(bytes) = window.credit_due()
            && self.phase == Phase::Running
        {
            HostMessage::Credit { id: COMMAND, stream, bytes }.send(&mut self.outbox);
        }
    }

    /// Nobody wants this output any more; what still comes is dropped.
    pub fn close_output(&mut self, stream: Stream) {
        let [stdout, stderr] = &mut self.closed;
        let closed = if stream == Stream::Stdout { stdout } else { stderr };
        if !std::mem::replace(closed, true) && self.phase == Phase::Running {
            HostMessage::CloseOutput { id: COMMAND, stream }.send(&mut self.outbox);
            let held = usize::try_from(self.output(stream).held()).unwrap_or(usize::MAX);
            self.disposed(stream, held);
        }
    }

    /// Sends a signal, 1 to 64, once the command runs.
    pub fn signal(&mut self, number: u8) {
        if (1..=64).contains(&number) {
            self.signals |= 1 << (number - 1);
        }
        self.send_control();
    }

    /// Gives the terminal a new size, once the command runs.
    pub fn resize(&mut self, size: WindowSize) {
        self.size = Some(size);
        self.send_control();
    }

    /// Sends the signals and sizes that wait, if they may be sent now. To be called whenever the outbox has emptied.
    pub fn send_control(&mut self) {
        if self.phase != Phase::Running || self.outbox.len() >= OUTBOX_FULL {
            return;
        }
        if let Some(size) = self.size.take() {
            HostMessage::Resize { id: COMMAND, size }.send(&mut self.outbox);
        }
        let signals = std::mem::take(&mut self.signals);
        for number in (1..=64_u8).filter(|number| signals >> (number - 1) & 1 == 1) {
            HostMessage::Signal { id: COMMAND, number }.send(&mut self.outbox);
        }
    }

    /// Asks for the machine's end.
    pub fn shut_down(&mut self) {
        HostMessage::Shutdown.send(&mut self.outbox);
    }

    fn output(&mut self, stream: Stream) -> &mut ReceiveWindow {
        let [stdout, stderr] = &mut self.outputs;
        if stream == Stream::Stdout { stdout } else { stderr }
    }

    fn is_closed(&self, stream: Stream) -> bool {
        let [stdout, stderr] = self.closed;
        if stream == Stream::Stdout { stdout } else { stderr }
    }
}

/// A text of the guest's, fit for a person's terminal: one line without control characters.
fn printable(text: &[u8]) -> String {
    String::from_utf8_lossy(text)
        .trim_end()
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
