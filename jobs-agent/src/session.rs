//! Serving one connection: the poll loop, the host's messages, and the reaping of processes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use harrier_agent_protocol::flow::FlowError;
use harrier_agent_protocol::{
    AgentMessage, BootTimes, CommandSpec, DATA_MAX, DecodeError, FailureKind, FrameError, Hello, HostMessage,
    Inbox, LogLevel, MAX_COMMANDS, MAX_SPEC, Outbox, VERSION,
};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::command::{Channel, Command, Interest};
use crate::root::{self, MachineRoot};
use crate::spawn::{self, StartError};
use crate::sys;

/// Where the agent runs.
pub(crate) enum Place {
    /// As process 1: it may change the root file system.
    Machine(MachineRoot),
    /// As an ordinary process.
    Process,
}

/// Why a session is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The host asked for the end.
    Shutdown,
    /// The host has closed the connection.
    Disconnected,
}

/// Why a session cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error("the connection to the host failed: {0}")]
    Connection(#[source] io::Error),
    #[error("cannot wait for events: {0}")]
    Wait(#[source] io::Error),
    #[error("the host sent {0}")]
    Frame(#[from] FrameError),
    #[error("the host sent a message that cannot be understood: {0}")]
    Message(#[from] DecodeError),
    #[error("the host broke a stream's rules: {0}")]
    Flow(#[from] FlowError),
    #[error("the host sent a command of more than {MAX_SPEC} bytes")]
    SpecTooLong,
    #[error("the host did not say hello first")]
    NoHello,
    #[error(
        "the host speaks version {0} of the agent protocol, this agent {VERSION}: build the initramfs anew"
    )]
    Version(u16),
}

/// The state of one connection.
pub(crate) struct Session {
    connection: File,
    inbox: Inbox,
    state: State,
}

/// All of it but the inbox, from which messages are borrowed.
struct State {
    place: Place,
    times: BootTimes,
    outbox: Outbox,
    signals: SignalFd,
    commands: BTreeMap<u32, Command>,
    /// A command's encoding of which the last piece is still to come.
    partial: Option<(u32, Vec<u8>)>,
    has_hello: bool,
    ending: Option<Ending>,
    scratch: Box<[u8]>,
}

/// What a poll entry stands for.
enum Source {
    Connection,
    Signals,
    Command(u32, Channel),
}

impl Session {
    /// Takes over a connected stream.
    pub(crate) fn new(connection: File, place: Place, times: BootTimes) -> Result<Self, SessionError> {
        let wait = |errno: Errno| SessionError::Wait(errno.into());
        let flags = OFlag::from_bits_retain(fcntl(&connection, FcntlArg::F_GETFL).map_err(wait)?);
        fcntl(&connection, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map_err(wait)?;
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.thread_block().map_err(wait)?;
        let signals =
            SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).map_err(wait)?;
        if matches!(place, Place::Process) {
            sys::become_subreaper().map_err(SessionError::Wait)?;
        }
        let state = State {
            place,
            times,
            outbox: Outbox::default(),
            signals,
            commands: BTreeMap::new(),
            partial: None,
            has_hello: false,
            ending: None,
            scratch: vec![0; DATA_MAX].into_boxed_slice(),
        };
        Ok(Self { connection, inbox: Inbox::default(), state })
    }

    /// Serves the connection until the host ends it, one way or the other. Commands that still run then are killed.
    pub(crate) fn run(&mut self) -> Result<Ending, SessionError> {
        AgentMessage::Hello(Hello::OURS).send(&mut self.state.outbox);
        let ended = loop {
            match self.turn() {
                Ok(None) => {}
                Ok(Some(ending)) => break Ok(ending),
                Err(error) => {
                    // The host may still listen, and there is no better place to say it.
                    let text = error.to_string();
                    AgentMessage::Log { level: LogLevel::Error, text: text.as_bytes() }
                        .send(&mut self.state.outbox);
                    let _ = self.state.outbox.flush(&mut self.connection);
                    break Err(error);
                }
            }
        };
        for command in self.state.commands.values() {
            command.signal(libc::SIGKILL as u8);
        }
        if matches!((&ended, &self.state.place), (Ok(Ending::Shutdown), Place::Process)) {
            self.say_synced();
        }
        ended
    }

    /// Tells the host that the machine may go, and waits a moment for it to hang up.
    pub(crate) fn say_synced(&mut self) {
        AgentMessage::Synced.send(&mut self.state.outbox);
        let deadline_ns = sys::monotonic_ns().saturating_add(1_000_000_000);
        loop {
            let events = if self.state.outbox.is_empty() { PollFlags::POLLIN } else { PollFlags::POLLOUT };
            let mut entries = [PollFd::new(self.connection.as_fd(), events)];
            let ready = poll(&mut entries, timeout(Some(deadline_ns), sys::monotonic_ns()));
            if !matches!(ready, Ok(1..) | Err(Errno::EINTR))
                || self.state.outbox.flush(&mut self.connection).is_err()
            {
                return;
            }
            // Anything more that the host says does not matter; only that it ends.
            if self.state.outbox.is_empty() {
                let mut discard = Inbox::default();
                match discard.fill(&mut self.connection) {
                    Ok(0) => return,
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => return,
                    _ => {}
                }
            }
        }
    }

    /// Waits for events once and handles them.
    fn turn(&mut self) -> Result<Option<Ending>, SessionError> {
        self.state.outbox.flush(&mut self.connection).map_err(SessionError::Connection)?;
        for (source, flags) in self.wait()? {
            match source {
                Source::Connection => {
                    if flags.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR)
                        && !self.receive()?
                    {
                        return Ok(Some(Ending::Disconnected));
                    }
                }
                Source::Signals => self.state.reap()?,
                Source::Command(id, channel) => self.state.serve(id, channel, flags),
            }
        }
        self.state.retire_commands();
        Ok(self.state.ending)
    }

    fn wait(&self) -> Result<Vec<(Source, PollFlags)>, SessionError> {
        let state = &self.state;
        let mut events = PollFlags::POLLIN;
        if !state.outbox.is_empty() {
            events |= PollFlags::POLLOUT;
        }
        let mut sources = vec![Source::Connection, Source::Signals];
        let mut entries = vec![
            PollFd::new(self.connection.as_fd(), events),
            PollFd::new(state.signals.as_fd(), PollFlags::POLLIN),
        ];
        for (id, command) in &state.commands {
            for (channel, fd, interest) in command.interests(&state.outbox) {
                sources.push(Source::Command(*id, channel));
                entries.push(PollFd::new(
                    fd,
                    match interest {
                        Interest::Read => PollFlags::POLLIN,
                        Interest::Write => PollFlags::POLLOUT,
                        Interest::Hangup => PollFlags::empty(),
                    },
                ));
            }
        }
        let deadline_ns = state.commands.values().filter_map(Command::deadline_ns).min();
        match poll(&mut entries, timeout(deadline_ns, sys::monotonic_ns())) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(SessionError::Wait(errno.into())),
        }
        let flags: Vec<PollFlags> =
            entries.iter().map(|entry| entry.revents().unwrap_or(PollFlags::POLLERR)).collect();
        Ok(sources.into_iter().zip(flags).filter(|(_, flags)| !flags.is_empty()).collect())
    }

    /// Takes what the host has sent. False: it has ended the connection.
    fn receive(&mut self) -> Result<bool, SessionError> {
        match self.inbox.fill(&mut self.connection) {
            Ok(0) => return Ok(false),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
            Err(error) => return Err(SessionError::Connection(error)),
        }
        while let Some(frame) = self.inbox.next_frame()? {
            let message = HostMessage::decode(frame)?;
            self.state.handle(message)?;
        }
        Ok(true)
    }
}

impl State {
    fn handle(&mut self, message: HostMessage<'_>) -> Result<(), SessionError> {
        if let HostMessage::Hello(hello) = message {
            if hello.version != VERSION {
                return Err(SessionError::Version(hello.version));
            }
            if !std::mem::replace(&mut self.has_hello, true) {
                AgentMessage::Ready(self.times).send(&mut self.outbox);
            }
            return Ok(());
        }
        if !self.has_hello {
            return Err(SessionError::NoHello);
        }
        // A message may cross the report of its command's end: what names no command is nothing to do.
        match message {
            HostMessage::Hello(_) => {}
            HostMessage::RunPart { id, bytes } => self.assemble(id, bytes)?,
            HostMessage::Run { id, bytes } => {
                let failure = match self.partial.take_if(|(partial, _)| *partial == id) {
                    Some((_, mut encoded)) => {
                        if encoded.len() + bytes.len() > MAX_SPEC {
                            return Err(SessionError::SpecTooLong);
                        }
                        encoded.extend_from_slice(bytes);
                        self.start(id, &CommandSpec::decode(&encoded)?)
                    }
                    None => self.start(id, &CommandSpec::decode(bytes)?),
                };
                if let Err(StartError { kind, message }) = failure {
                    AgentMessage::StartFailed { id, kind, message: message.as_bytes() }
                        .send(&mut self.outbox);
                }
            }
            HostMessage::Stdin { id, offset, bytes } => {
                if let Some(command) = self.commands.get_mut(&id) {
                    command.receive_stdin(offset, bytes, &mut self.outbox)?;
                }
            }
            HostMessage::StdinClose { id } => {
                if let Some(command) = self.commands.get_mut(&id) {
                    command.end_stdin(&mut self.outbox);
                }
            }
            HostMessage::Credit { id, stream, bytes } => {
                if let Some(command) = self.commands.get_mut(&id) {
                    command.credit(stream, bytes)?;
                }
            }
            HostMessage::CloseOutput { id, stream } => {
                if let Some(command) = self.commands.get_mut(&id) {
                    command.close_output(stream);
                }
            }
            HostMessage::Signal { id, number } => {
                if let Some(command) = self.commands.get(&id) {
                    command.signal(number);
                }
            }
            HostMessage::Resize { id, size } => {
                if let Some(command) = self.commands.get(&id) {
                    command.resize(size);
                }
            }
            HostMessage::Shutdown => self.ending = Some(Ending::Shutdown),
        }
        Ok(())
    }

    fn assemble(&mut self, id: u32, bytes: &[u8]) -> Result<(), SessionError> {
        // One command is sent at a time; the pieces of another one replace it.
        let (_, encoded) = match self.partial.take_if(|(partial, _)| *partial == id) {
            Some(partial) => self.partial.insert(partial),
            None => self.partial.insert((id, Vec::new())),
        };
        if encoded.len() + bytes.len() > MAX_SPEC {
            return Err(SessionError::SpecTooLong);
        }
        encoded.extend_from_slice(bytes);
        Ok(())
    }

    fn start(&mut self, id: u32, spec: &CommandSpec) -> Result<(), StartError> {
        if self.commands.contains_key(&id) {
            return Err(StartError::other(format!("command {id} runs already")));
        }
        if self.commands.len() >= MAX_COMMANDS {
            return Err(StartError::other(format!("{MAX_COMMANDS} commands run already")));
        }
        match &mut self.place {
            Place::Machine(root) => {
                if let Some(warning) =
                    root.enter(&spec.root).map_err(|error| StartError::other(error.to_string()))?
                {
                    AgentMessage::Log { level: LogLevel::Warn, text: warning.as_bytes() }
                        .send(&mut self.outbox);
                }
                if let Some(name) = &spec.hostname {
                    root::set_hostname(name).map_err(StartError::other)?;
                }
            }
            Place::Process => {
                if spec.root != Default::default() {
                    return Err(StartError {
                        kind: FailureKind::Other,
                        message: "a root file system can only be mounted inside a machine".into(),
                    });
                }
            }
        }
        let started = spawn::spawn(spec)?;
        let pid = u32::try_from(started.pid).unwrap_or(0);
        AgentMessage::Started { id, pid, at_ns: sys::monotonic_ns() }.send(&mut self.outbox);
        self.commands.insert(id, Command::new(id, started));
        Ok(())
    }

    /// Reaps every process that has ended: commands, and orphans that fell to the agent.
    fn reap(&mut self) -> Result<(), SessionError> {
        while let Ok(Some(_)) = self.signals.read_signal() {}
        loop {
            match sys::reap() {
                Ok(Some(reaped)) => {
                    if let Some(command) =
                        self.commands.values_mut().find(|command| command.pid() == reaped.pid)
                    {
                        command.main_ended(reaped.status, reaped.usage);
                    }
                }
                Ok(None) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::ECHILD) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(SessionError::Wait(error)),
            }
        }
    }

    fn serve(&mut self, id: u32, channel: Channel, flags: PollFlags) {
        let Some(command) = self.commands.get_mut(&id) else { return };
        match channel {
            Channel::Output(stream) => command.read_output(stream, &mut self.scratch, &mut self.outbox),
            Channel::Stdin if flags.contains(PollFlags::POLLERR) => command.refuse_stdin(&mut self.outbox),
            Channel::Stdin => command.write_stdin(&mut self.outbox),
        }
    }

    fn retire_commands(&mut self) {
        let now_ns = sys::monotonic_ns();
        let outbox = &mut self.outbox;
        self.commands.retain(|_, command| !command.report_end(now_ns, outbox));
    }
}

/// The poll timeout until a deadline, rounded up so that it has passed then.
fn timeout(deadline_ns: Option<u64>, now_ns: u64) -> PollTimeout {
    match deadline_ns {
        None => PollTimeout::NONE,
        Some(deadline_ns) => {
            let millis = deadline_ns.saturating_sub(now_ns).div_ceil(1_000_000);
            PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
        }
    }
}
