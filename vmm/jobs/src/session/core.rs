//! The host's half of the agent protocol without any I/O: what may be said when, the streams' positions, what waits to
//! be sent, and how a new connection goes on where the last one ended. Total: whatever the agent sends is an
//! [`Event`] or a [`Violation`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use harrier_agent_protocol::flow::{FlowError, ReceiveStream, SendStream};
use harrier_agent_protocol::{
    AgentMessage, Attach, Attached, BootTimes, Cause, CommandStatus, DATA_MAX, DecodeError, FailureKind,
    Frame, FrameError, GetSpec, Hello, HostMessage, LogLevel, Outbox, PutSpec, Ready, Reason, Role,
    Status as WireStatus, Stream, Usage, VERSION, WindowSize,
};

use crate::outcome::Status;

/// Nothing more is said while this much is to be sent, so that a guest that does not listen costs no memory.
const OUTBOX_FULL: usize = 512 * 1024;

/// How many signals of a command may be under way; others wait.
const SIGNALS_MAX: usize = 64;

/// How far the present connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// There is none.
    Down,
    /// Nothing has come from the agent.
    Silent,
    /// It has said hello and gets itself ready.
    Greeted,
    /// It takes commands.
    Attached,
    /// The machine is ready to be switched off.
    Synced,
}

/// How far a command has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The agent has not been told.
    Waiting,
    /// It has been told.
    Starting,
    /// The command runs.
    Running,
    /// It has ended or failed to start.
    Ended,
}

/// What the agent has said.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Nothing that concerns the caller.
    Nothing,
    /// The agent is ready.
    Ready {
        /// How the machine booted.
        times: BootTimes,
        /// Why the agent has dialled.
        reason: Reason,
        /// Commands that it no longer has: its machine has started anew. They are forgotten.
        lost: Vec<u32>,
        /// Commands that may be given so many bytes more of input, as by [`Event::StdinRoom`].
        room: Vec<(u32, usize)>,
    },
    /// The command runs since this time of the guest's CLOCK_MONOTONIC in nanoseconds.
    Started {
        /// The command.
        id: u32,
        /// The time.
        at_ns: u64,
    },
    /// Output, to be given back with [`Core::disposed`].
    Output {
        /// The command.
        id: u32,
        /// The stream.
        stream: Stream,
        /// The data.
        bytes: &'a [u8],
    },
    /// So many bytes more of input may be given.
    StdinRoom {
        /// The command.
        id: u32,
        /// How many.
        bytes: usize,
    },
    /// The command reads no more input.
    StdinClosed {
        /// The command.
        id: u32,
    },
    /// The command has ended. Its counts stay until [`Core::remove`].
    Ended {
        /// The command.
        id: u32,
        /// How.
        status: Status,
        /// Why, if not by itself.
        cause: Cause,
        /// What it used.
        usage: Usage,
        /// The guest's CLOCK_MONOTONIC in nanoseconds; zero when it never ran.
        at_ns: u64,
    },
    /// A printable line for the log.
    Log(LogLevel, String),
    /// The agent lives.
    Heartbeat,
    /// How far a command says it has come: a printable line.
    Progress {
        /// The command.
        id: u32,
        /// The line.
        text: String,
    },
    /// The machine is quiet, as [`Core::quiesce`] asked for.
    Quiesced,
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
    #[error("an unexpected {message} message (connection {link:?}, command {phase:?})")]
    Unexpected {
        /// Which.
        message: &'static str,
        /// When.
        link: Link,
        /// How far its command had come, if there is one.
        phase: Option<Phase>,
    },
    /// Another version of the protocol.
    #[error("it speaks version {0}, not {VERSION}")]
    Version(u16),
}

/// One session's half of the protocol.
#[derive(Debug)]
pub struct Core {
    pub(super) link: Link,
    /// What waits to be sent on the present connection.
    pub outbox: Outbox,
    pub(super) boot_id: Option<[u8; 16]>,
    /// What the next [`HostMessage::Attach`] says, but for its commands.
    pub(super) attach: Attach,
    pub(super) commands: BTreeMap<u32, Command>,
    /// Commands that were given up on this connection: the agent may not know yet.
    released: BTreeSet<u32>,
    shuts_down: bool,
    quiesce: Option<Quiesce>,
    quiesces: u32,
}

/// The machine is to be quiet: no command is started.
#[derive(Clone, Copy, Debug)]
struct Quiesce {
    sequence: u32,
    deadline_ms: u32,
}

/// What the agent is asked to do under an id.
#[derive(Debug)]
pub(crate) enum Request {
    /// Run a command: its encoding.
    Run(Vec<u8>),
    Put(PutSpec),
    Get(GetSpec),
}

impl Request {
    fn send(&self, id: u32, outbox: &mut Outbox) {
        match self {
            Self::Run(encoded) => HostMessage::send_run(id, encoded, outbox),
            Self::Put(spec) => HostMessage::Put { id, spec: spec.clone() }.send(outbox),
            Self::Get(spec) => HostMessage::Get { id, spec: spec.clone() }.send(outbox),
        }
    }
}

/// One command's half.
#[derive(Debug)]
pub(super) struct Command {
    pub(super) phase: Phase,
    /// What is asked for; of a command that runs, nothing more is known.
    pub(super) request: Request,
    pub(super) stdin: SendStream,
    /// Whether the command still reads.
    pub(super) stdin_is_open: bool,
    pub(super) stdin_has_ended: bool,
    end_is_said: bool,
    pub(super) outputs: [ReceiveStream; 2],
    pub(super) closed: [bool; 2],
    /// Signals that wait, bit n for signal n + 1: like a process's, each at most once.
    pub(super) signals: u64,
    /// Signals under way, with their sequence numbers.
    pub(super) unacked: VecDeque<(u32, u8)>,
    pub(super) sequence: u32,
    size: Option<WindowSize>,
    size_is_said: bool,
    /// The agent has said on this connection that it has the command.
    is_announced: bool,
}

impl Command {
    pub(super) fn new(request: Request) -> Self {
        Self {
            phase: Phase::Waiting,
            request,
            stdin: SendStream::default(),
            stdin_is_open: true,
            stdin_has_ended: false,
            end_is_said: false,
            outputs: Default::default(),
            closed: [false; 2],
            signals: 0,
            unacked: VecDeque::new(),
            sequence: 0,
            size: None,
            size_is_said: true,
            is_announced: false,
        }
    }

    fn output(&mut self, stream: Stream) -> &mut ReceiveStream {
        let [stdout, stderr] = &mut self.outputs;
        if stream == Stream::Stdout { stdout } else { stderr }
    }

    fn is_closed(&self, stream: Stream) -> bool {
        let [stdout, stderr] = self.closed;
        if stream == Stream::Stdout { stdout } else { stderr }
    }

    /// Output of this stream is gone from the host; tells the agent if that is worth it.
    fn dispose(&mut self, id: u32, stream: Stream, count: usize, outbox: Option<&mut Outbox>) {
        let is_running = self.phase == Phase::Running;
        let output = self.output(stream);
        output.dispose(count);
        if let Some(outbox) = outbox.filter(|_| is_running)
            && let Some(offset) = output.ack_due()
        {
            HostMessage::Ack { id, stream, offset }.send(outbox);
        }
    }

    /// The agent has the command: says again what it may not have heard.
    fn resume(&mut self, id: u32, status: &CommandStatus, outbox: &mut Outbox) -> Result<(), FlowError> {
        if self.stdin_is_open {
            self.stdin.resume(status.stdin)?;
        }
        self.end_is_said = false;
        self.size_is_said = self.size.is_none();
        for stream in Stream::BOTH.into_iter().filter(|stream| self.is_closed(*stream)) {
            HostMessage::CloseOutput { id, stream }.send(outbox);
        }
        self.unacked.retain(|(sequence, _)| *sequence > status.signal);
        for (sequence, number) in &self.unacked {
            HostMessage::Signal { id, sequence: *sequence, number: *number }.send(outbox);
        }
        Ok(())
    }

    /// Says what waits, as far as there is room.
    fn pump(&mut self, id: u32, outbox: &mut Outbox) {
        if self.phase != Phase::Running {
            return;
        }
        if let Some(size) = self.size.filter(|_| !self.size_is_said && outbox.len() < OUTBOX_FULL) {
            HostMessage::Resize { id, size }.send(outbox);
            self.size_is_said = true;
        }
        while self.signals != 0 && self.unacked.len() < SIGNALS_MAX && outbox.len() < OUTBOX_FULL {
            let index = self.signals.trailing_zeros();
            self.signals &= self.signals - 1;
            // 0 to 63.
            let number = index as u8 + 1;
            self.sequence = self.sequence.wrapping_add(1);
            self.unacked.push_back((self.sequence, number));
            HostMessage::Signal { id, sequence: self.sequence, number }.send(outbox);
        }
        if !self.stdin_is_open {
            return;
        }
        while outbox.len() < OUTBOX_FULL {
            let Some((offset, bytes)) = self.stdin.next_piece(DATA_MAX) else { break };
            HostMessage::Stdin { id, offset, bytes }.send(outbox);
        }
        if self.stdin_has_ended && self.stdin.is_sent() && !std::mem::replace(&mut self.end_is_said, true) {
            HostMessage::StdinClose { id }.send(outbox);
        }
    }
}

impl Default for Core {
    fn default() -> Self {
        Self {
            link: Link::Down,
            outbox: Outbox::default(),
            boot_id: None,
            attach: Attach::default(),
            commands: BTreeMap::new(),
            released: BTreeSet::new(),
            shuts_down: false,
            quiesce: None,
            quiesces: 0,
        }
    }
}

impl Core {
    /// A session without connection or commands. `linger_ms` is what the agent is told in [`Attach::linger_ms`].
    #[must_use]
    pub fn new(linger_ms: u32) -> Self {
        Self { attach: Attach { linger_ms, ..Attach::default() }, ..Self::default() }
    }

    /// How often the agent is to say that it lives, in milliseconds; zero is never. From the next connection on.
    pub fn set_heartbeat(&mut self, ms: u32) {
        self.attach.heartbeat_ms = ms;
    }

    /// A new connection stands, and any earlier one is gone.
    pub fn connect(&mut self) {
        self.disconnect();
        self.link = Link::Silent;
        HostMessage::Hello(Hello::OURS).send(&mut self.outbox);
    }

    /// The connection is gone. Everything else stays as it is.
    pub fn disconnect(&mut self) {
        self.link = Link::Down;
        self.outbox = Outbox::default();
        self.released.clear();
    }

    /// How far the present connection has come.
    #[must_use]
    pub fn link(&self) -> Link {
        self.link
    }

    /// How far a command has come; `None` without such a command.
    #[must_use]
    pub fn phase(&self, id: u32) -> Option<Phase> {
        self.commands.get(&id).map(|command| command.phase)
    }

    /// How many commands there are.
    #[must_use]
    pub fn command_count(&self) -> usize {
        self.commands.len()
    }

    /// How many bytes of a command's output came.
    #[must_use]
    pub fn received(&self, id: u32, stream: Stream) -> u64 {
        self.commands.get(&id).map_or(0, |command| {
            let [stdout, stderr] = &command.outputs;
            (if stream == Stream::Stdout { stdout } else { stderr }).position().received
        })
    }

    /// How many bytes of input a command was given.
    #[must_use]
    pub fn given(&self, id: u32) -> u64 {
        self.commands.get(&id).map_or(0, |command| command.stdin.end())
    }

    /// How many bytes of input a command may be given now.
    #[must_use]
    pub fn stdin_room(&self, id: u32) -> usize {
        self.commands.get(&id).map_or(0, |command| command.stdin.room())
    }

    /// Runs an encoded command, now or as soon as the agent is there. The id must be a new one.
    pub fn run(&mut self, id: u32, spec: Vec<u8>) {
        self.commands.insert(id, Command::new(Request::Run(spec)));
        self.start_waiting();
    }

    /// Writes a file in the machine, like [`Core::run`]: its content is given as input, and [`Status::Transferred`] is
    /// its end.
    pub fn put(&mut self, id: u32, spec: PutSpec) {
        self.commands.insert(id, Command::new(Request::Put(spec)));
        self.start_waiting();
    }

    /// Reads a file of the machine, like [`Core::run`]: its content comes as stdout, and [`Status::Transferred`] is its
    /// end.
    pub fn get(&mut self, id: u32, spec: GetSpec) {
        self.commands.insert(id, Command::new(Request::Get(spec)));
        self.start_waiting();
    }

    /// Whether files are being copied.
    #[must_use]
    pub fn is_copying(&self) -> bool {
        let copies =
            |command: &Command| command.phase != Phase::Ended && !matches!(command.request, Request::Run(_));
        self.commands.values().any(copies)
    }

    /// Gives the agent what waits, unless the machine is to be quiet.
    fn start_waiting(&mut self) {
        if self.link != Link::Attached || self.quiesce.is_some() {
            return;
        }
        for (id, command) in self.commands.iter_mut().filter(|(_, command)| command.phase == Phase::Waiting) {
            command.request.send(*id, &mut self.outbox);
            command.phase = Phase::Starting;
        }
    }

    /// Asks for quiet: file systems written back and nothing new begun, for at most so many milliseconds of the guest.
    /// [`Event::Quiesced`] is the answer; [`Core::thaw`] ends it.
    pub fn quiesce(&mut self, deadline_ms: u32) {
        self.quiesces = self.quiesces.wrapping_add(1);
        let quiesce = Quiesce { sequence: self.quiesces, deadline_ms };
        self.quiesce = Some(quiesce);
        if self.link == Link::Attached {
            HostMessage::Quiesce { sequence: quiesce.sequence, deadline_ms }.send(&mut self.outbox);
        }
    }

    /// Ends the quiet.
    pub fn thaw(&mut self) {
        if self.quiesce.take().is_some() && self.link == Link::Attached {
            HostMessage::Thaw.send(&mut self.outbox);
        }
        self.start_waiting();
    }

    /// Takes a frame from the agent.
    pub fn receive<'a>(&mut self, frame: Frame<'a>) -> Result<Event<'a>, Violation> {
        let message = AgentMessage::decode(frame)?;
        let link = self.link;
        let refuse = |message| Err(Violation::Unexpected { message, link, phase: None });
        match (message, link) {
            (AgentMessage::Hello(hello), Link::Silent) => {
                if hello.version != VERSION {
                    return Err(Violation::Version(hello.version));
                }
                self.link = Link::Greeted;
                Ok(Event::Nothing)
            }
            (AgentMessage::Hello(_), _) => refuse("Hello"),
            (_, Link::Down | Link::Silent) => refuse("first"),
            (AgentMessage::Log { level, text }, _) => Ok(Event::Log(level, printable(text))),
            (AgentMessage::Heartbeat { .. }, _) => Ok(Event::Heartbeat),
            (AgentMessage::Ready(ready), Link::Greeted) => self.go_on(&ready),
            (AgentMessage::Ready(_), _) => refuse("Ready"),
            (_, Link::Greeted) => refuse("second"),
            (AgentMessage::Synced, Link::Attached) if self.shuts_down => {
                self.link = Link::Synced;
                Ok(Event::Synced)
            }
            (AgentMessage::Synced, _) => refuse("Synced"),
            // An earlier one may have been answered late.
            (AgentMessage::Quiesced { sequence }, _) => {
                let is_asked = self.quiesce.is_some_and(|quiesce| quiesce.sequence == sequence);
                Ok(if is_asked { Event::Quiesced } else { Event::Nothing })
            }
            (message, Link::Attached | Link::Synced) => self.receive_of(frame.id, message),
        }
    }

    /// Attaches to what the agent has.
    fn go_on(&mut self, ready: &Ready) -> Result<Event<'static>, Violation> {
        let is_same = self.boot_id.is_none_or(|known| known == ready.boot_id);
        self.boot_id = Some(ready.boot_id);
        let status_of = |id: u32| ready.commands.iter().find(|status| is_same && status.id == id);
        let mut lost = Vec::new();
        self.commands.retain(|id, command| {
            let is_kept = match command.phase {
                Phase::Waiting | Phase::Ended => true,
                // On its way when the connection was lost.
                Phase::Starting => is_same,
                Phase::Running => status_of(*id).is_some(),
            };
            if !is_kept {
                lost.push(*id);
            }
            is_kept
        });
        let mut attach = self.attach.clone();
        if attach.role != Role::Same {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            attach.wall_clock_ns = u64::try_from(now.as_nanos()).unwrap_or(0);
        }
        // From here on it is a machine like any other.
        self.attach.role = Role::Same;
        self.attach.entropy = [0; 32];
        let mut known: Vec<(u32, &mut Command, &CommandStatus)> = Vec::new();
        for (id, command) in &mut self.commands {
            // One that waits was never told: what has its id there belongs to an earlier host.
            let is_told = matches!(command.phase, Phase::Starting | Phase::Running);
            if let Some(status) = status_of(*id).filter(|_| is_told) {
                for (output, kept) in command.outputs.iter_mut().zip(status.outputs) {
                    let found = output.position().received;
                    if found < kept.from || found > kept.to {
                        return Err(FlowError::Resume { found, from: kept.from, to: kept.to }.into());
                    }
                }
                let [stdout, stderr] = &mut command.outputs;
                attach.commands.push(Attached { id: *id, outputs: [stdout.resume(), stderr.resume()] });
                command.is_announced = false;
                known.push((*id, command, status));
            }
        }
        HostMessage::Attach(attach).send(&mut self.outbox);
        let mut room = Vec::new();
        for (id, command, status) in known {
            let before = command.stdin.room();
            command.resume(id, status, &mut self.outbox)?;
            room.push((id, command.stdin.room().saturating_sub(before)));
        }
        self.link = Link::Attached;
        for (id, command) in &mut self.commands {
            if command.phase == Phase::Starting && status_of(*id).is_none() {
                command.request.send(*id, &mut self.outbox);
            }
        }
        if let Some(Quiesce { sequence, deadline_ms }) = self.quiesce {
            HostMessage::Quiesce { sequence, deadline_ms }.send(&mut self.outbox);
        }
        self.start_waiting();
        if self.shuts_down {
            HostMessage::Shutdown.send(&mut self.outbox);
        }
        Ok(Event::Ready { times: ready.times, reason: ready.reason, lost, room })
    }

    /// A message about a command.
    fn receive_of<'a>(&mut self, id: u32, message: AgentMessage<'a>) -> Result<Event<'a>, Violation> {
        if self.released.contains(&id) {
            return Ok(Event::Nothing);
        }
        let link = self.link;
        let name = name_of(&message);
        let unexpected = |phase| Err(Violation::Unexpected { message: name, link, phase });
        let Some(command) = self.commands.get_mut(&id) else { return unexpected(None) };
        let phase = command.phase;
        let is_transfer = !matches!(command.request, Request::Run(_));
        let unexpected = || unexpected(Some(phase));
        Ok(match message {
            AgentMessage::Started { at_ns, .. } => match phase {
                Phase::Starting => {
                    command.phase = Phase::Running;
                    command.is_announced = true;
                    if let Request::Run(encoded) = &mut command.request {
                        *encoded = Vec::new();
                    }
                    Event::Started { id, at_ns }
                }
                Phase::Running if !std::mem::replace(&mut command.is_announced, true) => Event::Nothing,
                _ => return unexpected(),
            },
            AgentMessage::Failed { kind, message, .. }
                if phase == Phase::Starting || (phase == Phase::Running && is_transfer) =>
            {
                let message = printable(message);
                let status = match kind {
                    FailureKind::NotFound => Status::NotFound(message),
                    FailureKind::NotExecutable => Status::NotExecutable(message),
                    FailureKind::Other => Status::Failed(message),
                };
                self.end(id);
                Event::Ended { id, status, cause: Cause::Itself, usage: Usage::default(), at_ns: 0 }
            }
            AgentMessage::Transferred { file, .. } if phase == Phase::Running && is_transfer => {
                self.end(id);
                let status = Status::Transferred(file);
                Event::Ended { id, status, cause: Cause::Itself, usage: Usage::default(), at_ns: 0 }
            }
            AgentMessage::Progress { text, .. } if phase == Phase::Running => {
                Event::Progress { id, text: printable(text) }
            }
            AgentMessage::Output { stream, offset, bytes, .. } if phase == Phase::Running => {
                command.output(stream).receive(offset, bytes.len())?;
                if command.is_closed(stream) {
                    command.dispose(id, stream, bytes.len(), Some(&mut self.outbox));
                    Event::Nothing
                } else {
                    Event::Output { id, stream, bytes }
                }
            }
            AgentMessage::StdinAck { offset, .. } if phase == Phase::Running => {
                // A command that reads no more may have acknowledged before it said so.
                if !command.stdin_is_open {
                    return Ok(Event::Nothing);
                }
                let before = command.stdin.room();
                command.stdin.ack(offset)?;
                Event::StdinRoom { id, bytes: command.stdin.room() - before }
            }
            AgentMessage::StdinClosed { .. } if phase == Phase::Running => {
                command.stdin_is_open = false;
                command.stdin = SendStream::restore(command.stdin.end(), Vec::new());
                Event::StdinClosed { id }
            }
            AgentMessage::SignalAck { sequence, .. } if phase == Phase::Running => {
                command.unacked.retain(|(under_way, _)| *under_way != sequence);
                Event::Nothing
            }
            AgentMessage::Exited { status, cause, usage, at_ns, .. }
                if phase == Phase::Running && !is_transfer =>
            {
                let status = match status {
                    WireStatus::Code(code) => Status::Exited(code),
                    WireStatus::Signal(number) => Status::Signaled(number),
                };
                self.end(id);
                Event::Ended { id, status, cause, usage, at_ns }
            }
            _ => return unexpected(),
        })
    }

    /// The agent has said how it ended, and may forget it.
    fn end(&mut self, id: u32) {
        if let Some(command) = self.commands.get_mut(&id) {
            command.phase = Phase::Ended;
        }
        HostMessage::Release { id }.send(&mut self.outbox);
    }

    /// Forgets a command; one that has not ended is ended by the agent, as soon as it hears of it.
    pub fn remove(&mut self, id: u32) {
        let Some(command) = self.commands.remove(&id) else { return };
        if self.link == Link::Attached && matches!(command.phase, Phase::Starting | Phase::Running) {
            HostMessage::Release { id }.send(&mut self.outbox);
            self.released.insert(id);
        }
    }

    /// Gives a command input, of which there is room for [`Core::stdin_room`] bytes; more is cut off, and what the
    /// command does not read any more is dropped.
    pub fn give_stdin(&mut self, id: u32, bytes: &[u8]) {
        if let Some(command) = self.commands.get_mut(&id)
            && command.stdin_is_open
            && !command.stdin_has_ended
        {
            command.stdin.push(bytes);
        }
    }

    /// The input ends here.
    pub fn end_stdin(&mut self, id: u32) {
        if let Some(command) = self.commands.get_mut(&id) {
            command.stdin_has_ended = true;
        }
    }

    /// Output is written, or dropped; the agent may send as much again.
    pub fn disposed(&mut self, id: u32, stream: Stream, bytes: usize) {
        let outbox = (self.link == Link::Attached).then_some(&mut self.outbox);
        if let Some(command) = self.commands.get_mut(&id) {
            command.dispose(id, stream, bytes, outbox);
        }
    }

    /// Nobody wants this output any more; what still comes is dropped.
    pub fn close_output(&mut self, id: u32, stream: Stream) {
        let is_attached = self.link == Link::Attached;
        let Some(command) = self.commands.get_mut(&id) else { return };
        let [stdout, stderr] = &mut command.closed;
        let closed = if stream == Stream::Stdout { stdout } else { stderr };
        if std::mem::replace(closed, true) {
            return;
        }
        let mut outbox = (is_attached && command.phase != Phase::Ended).then_some(&mut self.outbox);
        if let Some(outbox) = outbox.as_deref_mut() {
            HostMessage::CloseOutput { id, stream }.send(outbox);
        }
        let held = command.output(stream).held();
        command.dispose(id, stream, held, outbox);
    }

    /// Sends a signal, 1 to 64, once the command runs.
    pub fn signal(&mut self, id: u32, number: u8) {
        if let Some(command) = self.commands.get_mut(&id).filter(|_| (1..=64).contains(&number)) {
            command.signals |= 1 << (number - 1);
        }
    }

    /// Gives the command's terminal a new size, once it runs.
    pub fn resize(&mut self, id: u32, size: WindowSize) {
        if let Some(command) = self.commands.get_mut(&id) {
            command.size = Some(size);
            command.size_is_said = false;
        }
    }

    /// Puts what waits into the outbox, as far as it may be sent now. To be called before the outbox is sent.
    pub fn pump(&mut self) {
        if self.link == Link::Attached {
            for (id, command) in &mut self.commands {
                command.pump(*id, &mut self.outbox);
            }
        }
    }

    /// Asks for the machine's end, now or as soon as the agent is there.
    pub fn shut_down(&mut self) {
        if !std::mem::replace(&mut self.shuts_down, true) && self.link == Link::Attached {
            HostMessage::Shutdown.send(&mut self.outbox);
        }
    }
}

fn name_of(message: &AgentMessage<'_>) -> &'static str {
    match message {
        AgentMessage::Hello(_) => "Hello",
        AgentMessage::Ready(_) => "Ready",
        AgentMessage::Started { .. } => "Started",
        AgentMessage::Failed { .. } => "Failed",
        AgentMessage::Transferred { .. } => "Transferred",
        AgentMessage::Heartbeat { .. } => "Heartbeat",
        AgentMessage::Progress { .. } => "Progress",
        AgentMessage::Quiesced { .. } => "Quiesced",
        AgentMessage::Output { .. } => "Output",
        AgentMessage::StdinAck { .. } => "StdinAck",
        AgentMessage::StdinClosed { .. } => "StdinClosed",
        AgentMessage::SignalAck { .. } => "SignalAck",
        AgentMessage::Exited { .. } => "Exited",
        AgentMessage::Log { .. } => "Log",
        AgentMessage::Synced => "Synced",
    }
}

/// A text of the guest's, fit for a person's terminal: one line without control characters.
pub(crate) fn printable(text: &[u8]) -> String {
    String::from_utf8_lossy(text)
        .trim_end()
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
