//! Serving the host: the poll loop, the host's messages, connections that go and come, and the reaping of processes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use harrier_agent_protocol::flow::FlowError;
use harrier_agent_protocol::{
    AgentMessage, Attach, BootTimes, CommandSpec, CommandStatus, DATA_MAX, DecodeError, FailureKind,
    FrameError, GetSpec, Hello, HostMessage, Inbox, LINGER_FOREVER, LogLevel, MAX_COMMANDS, MAX_SPEC, Outbox,
    PutSpec, Ready, Reason, Role, Root, VERSION,
};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::Shutdown;

use crate::command::{Channel, Command, Interest};
use crate::dial::{DIAL_LIMIT, Dialer, Redial};
use crate::exit::{self, Exit};
use crate::identity;
use crate::limits::{self, Group};
use crate::progress::ProgressFile;
use crate::root::{self, MachineRoot};
use crate::spawn::{self, StartError};
use crate::sys;
use crate::transfer::Transfer;

/// How long the host may take to hang up before the machine ends.
const HANG_UP_NS: u64 = 1_000_000_000;

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
    /// The host is gone and has not come back.
    Disconnected,
    /// A job has asked for it, and the host has been sent all that was written before.
    Exit(Exit),
}

/// Why a session cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
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
    #[error("the host goes on with command {0}, which is not there")]
    UnknownCommand(u32),
    #[error("the host runs command {0}, which is there already")]
    IdInUse(u32),
    #[error("the host did not say with which commands it goes on")]
    NoAttach,
    #[error(
        "the host speaks version {0} of the agent protocol, this agent {VERSION}: build the initramfs anew"
    )]
    Version(u16),
}

/// The agent's half of everything.
pub(crate) struct Session {
    link: Link,
    /// Of the connection that is up; the next one's is the same, since a new one is many pages that have to be cleared, and
    /// a restored machine is to answer soon.
    inbox: Inbox,
    state: State,
}

/// The way to the host.
enum Link {
    Up {
        connection: File,
        /// What it came of, until the host has attached.
        redial: Option<Redial>,
    },
    Down(Redial),
}

/// All of it but the inbox, from which messages are borrowed.
struct State {
    place: Place,
    dialer: Dialer,
    boot_id: [u8; 16],
    times: BootTimes,
    /// Why the present connection was made.
    reason: Reason,
    outbox: Outbox,
    signals: SignalFd,
    commands: BTreeMap<u32, Entry>,
    /// A command's encoding of which the last piece is still to come.
    partial: Option<(u32, Vec<u8>)>,
    has_hello: bool,
    is_attached: bool,
    /// How long to go on without a host.
    linger: Option<Duration>,
    heart: Option<Heart>,
    /// Where jobs ask for the machine's end; in a machine with Harrier's own kernel.
    exits: Option<UnixListener>,
    /// What one has asked for.
    exit: Option<Exit>,
    /// No command is begun.
    quiet: Option<Quiet>,
    ending: Option<Ending>,
    scratch: Box<[u8]>,
}

/// Signs of life, as often as the host asks for them.
struct Heart {
    every: Duration,
    next_ns: u64,
    /// Inside a machine, once a command has been started.
    progress: Option<ProgressFile>,
}

/// Until when nothing is begun.
struct Quiet {
    until_ns: u64,
}

/// What is to be begun when the machine may be loud again.
enum Waiting {
    Run(CommandSpec),
    Put(PutSpec),
    Get(GetSpec),
}

/// What an id stands for until the host releases it.
enum Entry {
    Waiting(Box<Waiting>),
    Command(Box<Command>),
    Transfer(Box<Transfer>),
    /// It did not start; whether the host has been told on the present connection.
    Failed(StartError, bool),
}

/// What a poll entry stands for.
enum Source {
    Connection,
    Redial,
    Signals,
    Exits,
    Command(u32, Channel),
}

impl Session {
    /// Takes over a connected stream. `dialer` is where to get another one when it is lost.
    pub(crate) fn new(
        connection: File,
        dialer: Dialer,
        place: Place,
        times: BootTimes,
    ) -> Result<Self, SessionError> {
        let wait = |errno: Errno| SessionError::Wait(errno.into());
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.thread_block().map_err(wait)?;
        let signals =
            SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).map_err(wait)?;
        if matches!(place, Place::Process) {
            sys::become_subreaper().map_err(SessionError::Wait)?;
        }
        let mut state = State {
            place,
            dialer,
            boot_id: sys::random_bytes(),
            times,
            reason: Reason::Boot,
            outbox: Outbox::default(),
            signals,
            commands: BTreeMap::new(),
            partial: None,
            has_hello: false,
            is_attached: false,
            linger: Some(DIAL_LIMIT),
            heart: None,
            exits: None,
            exit: None,
            quiet: None,
            ending: None,
            scratch: vec![0; DATA_MAX].into_boxed_slice(),
        };
        let link = state.connected(connection).map_err(SessionError::Wait)?;
        Ok(Self { link, inbox: Inbox::default(), state })
    }

    /// Lets jobs ask for the machine's end.
    pub(crate) fn take_exits(&mut self, exits: UnixListener) {
        self.state.exits = Some(exits);
    }

    /// Serves the host until it ends the machine, or is gone for too long. Commands that still run then are killed.
    pub(crate) fn run(&mut self) -> Result<Ending, SessionError> {
        let ended = loop {
            match self.turn() {
                Ok(None) => {}
                Ok(Some(ending)) => break Ok(ending),
                Err(error) => {
                    // The host may still listen, and there is no better place to say it.
                    let text = error.to_string();
                    AgentMessage::Log { level: LogLevel::Error, text: text.as_bytes() }
                        .send(&mut self.state.outbox);
                    if let Link::Up { connection, .. } = &mut self.link {
                        let _ = self.state.outbox.flush(connection);
                    }
                    break Err(error);
                }
            }
        };
        self.state.running().for_each(Command::end_all);
        if matches!((&ended, &self.state.place), (Ok(Ending::Shutdown), Place::Process)) {
            self.say_synced();
        }
        ended
    }

    /// Tells the host that the machine may go, and waits a moment for it to hang up.
    pub(crate) fn say_synced(&mut self) {
        let Link::Up { connection, .. } = &mut self.link else { return };
        let outbox = &mut self.state.outbox;
        AgentMessage::Synced.send(outbox);
        let deadline_ns = sys::monotonic_ns().saturating_add(1_000_000_000);
        loop {
            let events = if outbox.is_empty() { PollFlags::POLLIN } else { PollFlags::POLLOUT };
            let mut entries = [PollFd::new(connection.as_fd(), events)];
            let ready = poll(&mut entries, timeout(Some(deadline_ns), sys::monotonic_ns()));
            if !matches!(ready, Ok(1..) | Err(Errno::EINTR)) || outbox.flush(connection).is_err() {
                return;
            }
            // Anything more that the host says does not matter; only that it ends.
            if outbox.is_empty() {
                let mut discard = Inbox::default();
                match discard.fill(connection) {
                    Ok(0) => return,
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => return,
                    _ => {}
                }
            }
        }
    }

    /// Hangs up and waits a moment for the host to do the same: it has taken what was sent then.
    pub(crate) fn hang_up(&mut self) {
        let Link::Up { connection, .. } = &mut self.link else { return };
        let has_hung_up = nix::sys::socket::shutdown(connection.as_raw_fd(), Shutdown::Write);
        let deadline_ns = sys::monotonic_ns().saturating_add(HANG_UP_NS);
        let mut discard = Inbox::default();
        while has_hung_up.is_ok() && sys::monotonic_ns() < deadline_ns {
            let mut entries = [PollFd::new(connection.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut entries, timeout(Some(deadline_ns), sys::monotonic_ns()));
            match ready.map(|_| discard.fill(connection)) {
                Ok(Ok(1..)) | Err(Errno::EINTR) => {
                    // What it says meanwhile does not matter any more.
                    while let Ok(Some(_)) = discard.next_frame() {}
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
                Ok(_) | Err(_) => return,
            }
        }
    }

    /// Waits for events once and handles them.
    fn turn(&mut self) -> Result<Option<Ending>, SessionError> {
        self.state.keep_time()?;
        self.flush();
        if let Some(exit) = self.state.exit.filter(|_| self.state.is_square()) {
            return Ok(Some(Ending::Exit(exit)));
        }
        let mut redial_is_ready = false;
        for (source, flags) in self.wait()? {
            match source {
                Source::Connection => {
                    if flags.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
                        self.receive()?;
                    }
                }
                Source::Redial => redial_is_ready = true,
                Source::Signals => self.state.reap()?,
                Source::Exits => self.state.hear_exit(),
                Source::Command(id, channel) => self.state.serve(id, channel, flags),
            }
        }
        if let Link::Down(redial) = &mut self.link {
            if redial.is_over(self.state.linger) {
                return Ok(Some(Ending::Disconnected));
            }
            if let Some(connection) = redial.advance(redial_is_ready) {
                self.state.reason = Reason::Lost;
                let mut link = self.state.connected(connection).map_err(SessionError::Wait)?;
                std::mem::swap(&mut self.link, &mut link);
                if let (Link::Up { redial, .. }, Link::Down(before)) = (&mut self.link, link) {
                    *redial = Some(before);
                }
            }
        }
        Ok(self.state.ending)
    }

    /// Sends what there is to say. What did not fit the outbox follows at once when the connection has taken that: no event
    /// may come that would remind of it.
    fn flush(&mut self) {
        loop {
            self.state.pump();
            let Link::Up { connection, .. } = &mut self.link else { return };
            let outbox = &mut self.state.outbox;
            if outbox.is_empty() {
                return;
            }
            if outbox.flush(connection).is_err() {
                return self.lost();
            }
            if !outbox.is_empty() {
                return;
            }
        }
    }

    /// The connection is gone; the commands go on.
    fn lost(&mut self) {
        let state = &mut self.state;
        let was_attached = std::mem::take(&mut state.is_attached);
        state.outbox.clear();
        state.partial = None;
        self.inbox.clear();
        if state.dialer.can_redial() {
            let before = match &mut self.link {
                Link::Up { redial, .. } => redial.take().filter(|_| !was_attached),
                Link::Down(_) => None,
            };
            self.link = Link::Down(before.map_or_else(|| Redial::new(state.dialer.clone()), Redial::go_on));
        } else {
            state.ending = Some(Ending::Disconnected);
        }
    }

    fn wait(&self) -> Result<Vec<(Source, PollFlags)>, SessionError> {
        let state = &self.state;
        let mut sources = vec![Source::Signals];
        let mut entries = vec![PollFd::new(state.signals.as_fd(), PollFlags::POLLIN)];
        let quiet_ns = state.quiet.as_ref().map(|quiet| quiet.until_ns);
        let beat_ns = state.heart.as_ref().filter(|_| state.is_attached).map(|heart| heart.next_ns);
        let of_commands = state.running().filter_map(Command::deadline_ns);
        let mut wake_ns = of_commands.chain(quiet_ns).chain(beat_ns).min();
        match &self.link {
            Link::Up { connection, .. } => {
                let mut events = PollFlags::POLLIN;
                if !state.outbox.is_empty() {
                    events |= PollFlags::POLLOUT;
                }
                sources.push(Source::Connection);
                entries.push(PollFd::new(connection.as_fd(), events));
            }
            Link::Down(redial) => {
                if let Some(pending) = redial.pending() {
                    sources.push(Source::Redial);
                    entries.push(PollFd::new(pending, PollFlags::POLLOUT));
                }
                wake_ns = wake_ns.into_iter().chain(redial.wake_ns(state.linger)).min();
            }
        }
        if let Some(exits) = state.exits.as_ref().filter(|_| state.exit.is_none()) {
            sources.push(Source::Exits);
            entries.push(PollFd::new(exits.as_fd(), PollFlags::POLLIN));
        }
        for (id, entry) in &state.commands {
            let Entry::Command(command) = entry else { continue };
            for (channel, fd, interest) in command.interests() {
                sources.push(Source::Command(*id, channel));
                entries.push(PollFd::new(
                    fd,
                    match interest {
                        Interest::Read => PollFlags::POLLIN,
                        Interest::Write => PollFlags::POLLOUT,
                        Interest::Event => PollFlags::POLLPRI,
                        Interest::Hangup => PollFlags::empty(),
                    },
                ));
            }
        }
        let timeout = match state.ending {
            None => timeout(wake_ns, sys::monotonic_ns()),
            Some(_) => PollTimeout::ZERO,
        };
        match poll(&mut entries, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(SessionError::Wait(errno.into())),
        }
        let flags: Vec<PollFlags> =
            entries.iter().map(|entry| entry.revents().unwrap_or(PollFlags::POLLERR)).collect();
        Ok(sources.into_iter().zip(flags).filter(|(_, flags)| !flags.is_empty()).collect())
    }

    /// Takes what the host has sent.
    fn receive(&mut self) -> Result<(), SessionError> {
        let Link::Up { connection, .. } = &mut self.link else { return Ok(()) };
        let inbox = &mut self.inbox;
        match inbox.fill(connection) {
            Ok(1..) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Ok(0) | Err(_) => {
                self.lost();
                return Ok(());
            }
        }
        while let Some(frame) = inbox.next_frame()? {
            let message = HostMessage::decode(frame)?;
            self.state.handle(message)?;
        }
        Ok(())
    }
}

impl State {
    /// Opens a new connection.
    fn connected(&mut self, connection: File) -> io::Result<Link> {
        let flags = OFlag::from_bits_retain(fcntl(&connection, FcntlArg::F_GETFL)?);
        fcntl(&connection, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        self.has_hello = false;
        AgentMessage::Hello(Hello::OURS).send(&mut self.outbox);
        Ok(Link::Up { connection, redial: None })
    }

    fn running(&self) -> impl Iterator<Item = &Command> {
        self.commands.values().filter_map(|entry| match entry {
            Entry::Command(command) => Some(&**command),
            Entry::Waiting(_) | Entry::Transfer(_) | Entry::Failed(..) => None,
        })
    }

    fn command(&mut self, id: u32) -> Option<&mut Command> {
        match self.commands.get_mut(&id) {
            Some(Entry::Command(command)) => Some(command),
            Some(Entry::Waiting(_) | Entry::Transfer(_) | Entry::Failed(..)) | None => None,
        }
    }

    fn handle(&mut self, message: HostMessage<'_>) -> Result<(), SessionError> {
        match message {
            HostMessage::Hello(hello) => {
                if hello.version != VERSION {
                    return Err(SessionError::Version(hello.version));
                }
                if !std::mem::replace(&mut self.has_hello, true) {
                    self.say_ready();
                }
                return Ok(());
            }
            _ if !self.has_hello => return Err(SessionError::NoHello),
            HostMessage::Attach(attach) => return self.attach(&attach),
            HostMessage::Shutdown => {
                self.ending = Some(Ending::Shutdown);
                return Ok(());
            }
            _ if !self.is_attached => return Err(SessionError::NoAttach),
            _ => {}
        }
        // A message may cross the report of its command's end: what names no command is nothing to do.
        match message {
            HostMessage::Hello(_) | HostMessage::Attach(_) | HostMessage::Shutdown => {}
            HostMessage::RunPart { id, bytes } => self.assemble(id, bytes)?,
            HostMessage::Run { id, bytes } => {
                let spec = match self.partial.take_if(|(partial, _)| *partial == id) {
                    Some((_, mut encoded)) => {
                        if encoded.len() + bytes.len() > MAX_SPEC {
                            return Err(SessionError::SpecTooLong);
                        }
                        encoded.extend_from_slice(bytes);
                        CommandSpec::decode(&encoded)?
                    }
                    None => CommandSpec::decode(bytes)?,
                };
                self.begin(id, Waiting::Run(spec))?;
            }
            HostMessage::Put { id, spec } => self.begin(id, Waiting::Put(spec))?,
            HostMessage::Get { id, spec } => self.begin(id, Waiting::Get(spec))?,
            HostMessage::Stdin { id, offset, bytes } => match self.commands.get_mut(&id) {
                Some(Entry::Command(command)) => command.receive_stdin(offset, bytes)?,
                Some(Entry::Transfer(transfer)) => transfer.receive_stdin(offset, bytes)?,
                Some(Entry::Waiting(_) | Entry::Failed(..)) | None => {}
            },
            HostMessage::StdinClose { id } => match self.commands.get_mut(&id) {
                Some(Entry::Command(command)) => command.end_stdin(),
                Some(Entry::Transfer(transfer)) => transfer.end_stdin(),
                Some(Entry::Waiting(_) | Entry::Failed(..)) | None => {}
            },
            HostMessage::Ack { id, stream, offset } => match self.commands.get_mut(&id) {
                Some(Entry::Command(command)) => command.ack(stream, offset)?,
                Some(Entry::Transfer(transfer)) => transfer.ack(stream, offset)?,
                Some(Entry::Waiting(_) | Entry::Failed(..)) | None => {}
            },
            HostMessage::CloseOutput { id, stream } => match self.commands.get_mut(&id) {
                Some(Entry::Command(command)) => command.close_output(stream),
                Some(Entry::Transfer(transfer)) => transfer.close_output(),
                Some(Entry::Waiting(_) | Entry::Failed(..)) | None => {}
            },
            HostMessage::Signal { id, sequence, number } => {
                if let Some(Entry::Command(command)) = self.commands.get_mut(&id) {
                    command.signal(sequence, number, &mut self.outbox);
                }
            }
            HostMessage::Resize { id, size } => {
                if let Some(command) = self.command(id) {
                    command.resize(size);
                }
            }
            HostMessage::Release { id } => self.release(id),
            HostMessage::Quiesce { sequence, deadline_ms } => {
                let until_ns = sys::monotonic_ns().saturating_add(u64::from(deadline_ms) * 1_000_000);
                self.quiet = Some(Quiet { until_ns });
                nix::unistd::sync();
                AgentMessage::Quiesced { sequence }.send(&mut self.outbox);
            }
            HostMessage::Thaw => self.thaw()?,
        }
        Ok(())
    }

    /// Somebody may ask for the machine's end.
    fn hear_exit(&mut self) {
        self.exit = self.exits.as_ref().and_then(exit::take);
        if self.exit.is_some() {
            for entry in self.commands.values_mut() {
                if let Entry::Command(command) = entry {
                    command.owe();
                }
            }
        }
    }

    /// Whether the host has been sent all that is owed to it before the machine ends.
    fn is_square(&self) -> bool {
        self.is_attached && self.outbox.is_empty() && self.running().all(Command::is_square)
    }

    fn say_ready(&mut self) {
        let commands = self.commands.iter_mut().map(|(id, entry)| match entry {
            Entry::Command(command) => command.status(),
            Entry::Transfer(transfer) => transfer.status(),
            Entry::Waiting(_) | Entry::Failed(..) => CommandStatus { id: *id, ..CommandStatus::default() },
        });
        AgentMessage::Ready(Ready {
            boot_id: self.boot_id,
            reason: self.reason,
            times: self.times,
            commands: commands.collect(),
        })
        .send(&mut self.outbox);
    }

    fn attach(&mut self, attach: &Attach) -> Result<(), SessionError> {
        if attach.role != Role::Same && matches!(self.place, Place::Machine(_)) {
            self.adjust(attach);
        }
        self.linger =
            (attach.linger_ms != LINGER_FOREVER).then(|| Duration::from_millis(attach.linger_ms.into()));
        let unwanted: Vec<u32> = (self.commands.keys().copied())
            .filter(|id| !attach.commands.iter().any(|attached| attached.id == *id))
            .collect();
        unwanted.into_iter().for_each(|id| self.release(id));
        for host in &attach.commands {
            match self.commands.get_mut(&host.id) {
                Some(Entry::Command(command)) => command.resume(host)?,
                Some(Entry::Transfer(transfer)) => transfer.resume(host)?,
                Some(Entry::Failed(_, is_said)) => *is_said = false,
                Some(Entry::Waiting(_)) => {}
                None => return Err(SessionError::UnknownCommand(host.id)),
            }
        }
        self.is_attached = true;
        self.heart = (attach.heartbeat_ms > 0).then(|| {
            let every = Duration::from_millis(attach.heartbeat_ms.into());
            let mut progress = self.heart.take().and_then(|heart| heart.progress);
            progress.iter_mut().for_each(ProgressFile::forget);
            Heart { every, next_ns: sys::monotonic_ns(), progress }
        });
        // A machine that was restored in the middle of it is another one now.
        self.thaw()
    }

    /// Says that it lives, and ends a quiet of which the host has not said the end.
    fn keep_time(&mut self) -> Result<(), SessionError> {
        let now_ns = sys::monotonic_ns();
        if self.quiet.as_ref().is_some_and(|quiet| quiet.until_ns <= now_ns) {
            self.thaw()?;
        }
        if let Some(heart) = self.heart.as_mut().filter(|heart| self.is_attached && heart.next_ns <= now_ns) {
            heart.next_ns = now_ns.saturating_add(heart.every.as_nanos() as u64);
            // A host that does not listen is not told.
            if self.outbox.len() < DATA_MAX {
                AgentMessage::Heartbeat { at_ns: now_ns }.send(&mut self.outbox);
                self.say_progress();
            }
        }
        Ok(())
    }

    /// Tells what the progress file says, for the oldest command that runs.
    fn say_progress(&mut self) {
        let Some(file) =
            self.heart.as_mut().filter(|_| self.is_attached).and_then(|heart| heart.progress.as_mut())
        else {
            return;
        };
        let command = self.commands.iter().find_map(|(id, entry)| match entry {
            Entry::Command(command) if command.pid().is_some() => Some(*id),
            _ => None,
        });
        if let Some(id) = command
            && let Some(text) = file.news()
        {
            AgentMessage::Progress { id, text: &text }.send(&mut self.outbox);
        }
    }

    /// Begins what had to wait.
    fn thaw(&mut self) -> Result<(), SessionError> {
        self.quiet = None;
        let waiting: Vec<u32> = (self.commands.iter())
            .filter_map(|(id, entry)| matches!(entry, Entry::Waiting(_)).then_some(*id))
            .collect();
        for id in waiting {
            if let Some(Entry::Waiting(waiting)) = self.commands.remove(&id) {
                self.begin(id, *waiting)?;
            }
        }
        Ok(())
    }

    /// Makes a machine that was copied or moved its own: the time of day and the kernel's randomness.
    fn adjust(&mut self, attach: &Attach) {
        let mut warn = |what: &str, result: io::Result<()>| {
            if let Err(error) = result {
                let text = format!("after a restore, {what}: {error}");
                AgentMessage::Log { level: LogLevel::Warn, text: text.as_bytes() }.send(&mut self.outbox);
            }
        };
        if attach.wall_clock_ns != 0 {
            warn("the wall clock cannot be set", sys::set_wall_clock(attach.wall_clock_ns));
        }
        if attach.entropy != [0; 32] {
            warn("the kernel's randomness cannot be renewed", sys::reseed(&attach.entropy));
        }
        warn("who the machine is cannot be noted", identity::write(attach));
        // Who wants to know has a handler; for all others it means nothing.
        self.running().for_each(|command| command.kill(libc::SIGCONT as u8));
    }

    /// The host wants to hear no more of a command.
    fn release(&mut self, id: u32) {
        if let Some(Entry::Command(command)) = self.commands.remove(&id) {
            command.end_all();
        }
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

    /// Begins something, or keeps it for later. What keeps it from running is its end, which the host is told.
    fn begin(&mut self, id: u32, what: Waiting) -> Result<(), SessionError> {
        if self.commands.contains_key(&id) {
            return Err(SessionError::IdInUse(id));
        }
        let is_full = self.commands.len() >= MAX_COMMANDS;
        let begun = match what {
            _ if is_full => Err(StartError::other(format!("{MAX_COMMANDS} commands run already"))),
            what if self.quiet.is_some() => Ok(Entry::Waiting(Box::new(what))),
            Waiting::Run(spec) => self.start(id, &spec).map(|command| Entry::Command(Box::new(command))),
            Waiting::Put(spec) => self
                .make_ready(&spec.root)
                .and_then(|()| Transfer::put(id, spec))
                .map(|transfer| Entry::Transfer(Box::new(transfer))),
            Waiting::Get(spec) => self
                .make_ready(&spec.root)
                .and_then(|()| Transfer::get(id, &spec))
                .map(|transfer| Entry::Transfer(Box::new(transfer))),
        };
        self.commands.insert(id, begun.unwrap_or_else(|error| Entry::Failed(error, false)));
        Ok(())
    }

    fn start(&mut self, id: u32, spec: &CommandSpec) -> Result<Command, StartError> {
        self.make_ready(&spec.root)?;
        if let (Place::Machine(_), Some(name)) = (&self.place, &spec.hostname) {
            root::set_hostname(name).map_err(StartError::other)?;
        }
        if let Some(bytes) = spec.limits.disk_bytes {
            match &self.place {
                Place::Machine(machine) => limits::limit_disk(bytes, &machine.memory()),
                Place::Process => Err("a disk can only be limited inside a machine".to_owned()),
            }
            .map_err(StartError::other)?;
        }
        if let Some(heart) = self.heart.as_mut().filter(|heart| heart.progress.is_none())
            && matches!(self.place, Place::Machine(_))
        {
            // Without it nobody hears how far the command has come, and nothing else.
            heart.progress = ProgressFile::make().ok();
        }
        let group = Group::new(id, &spec.limits).map_err(StartError::other)?;
        let oom_kills = limits::oom_kills();
        let started = spawn::spawn(spec, group.as_ref())?;
        Ok(Command::new(id, started, group, oom_kills))
    }

    /// Goes into a root file system, unless that is done.
    fn make_ready(&mut self, root: &Root) -> Result<(), StartError> {
        match &mut self.place {
            Place::Machine(machine) => {
                let warning = machine.enter(root).map_err(|error| StartError::other(error.to_string()))?;
                if let Some(warning) = warning {
                    AgentMessage::Log { level: LogLevel::Warn, text: warning.as_bytes() }
                        .send(&mut self.outbox);
                }
            }
            Place::Process => {
                if *root != Root::Initramfs {
                    return Err(StartError {
                        kind: FailureKind::Other,
                        message: "a root file system can only be mounted inside a machine".into(),
                    });
                }
            }
        }
        Ok(())
    }

    /// Reaps every process that has ended: commands, and orphans that fell to the agent.
    fn reap(&mut self) -> Result<(), SessionError> {
        while let Ok(Some(_)) = self.signals.read_signal() {}
        // The last word of a command that ends now.
        self.say_progress();
        loop {
            match sys::reap() {
                Ok(Some(reaped)) => {
                    let its_command = self.commands.values_mut().find_map(|entry| match entry {
                        Entry::Command(command) if command.pid() == Some(reaped.pid) => Some(command),
                        _ => None,
                    });
                    if let Some(command) = its_command {
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
        let Some(Entry::Command(command)) = self.commands.get_mut(&id) else { return };
        match channel {
            Channel::Output(stream) => command.read_output(stream, &mut self.scratch),
            Channel::Limits => command.see_limits(),
            Channel::Stdin if flags.contains(PollFlags::POLLERR) => command.refuse_stdin(),
            Channel::Stdin => command.write_stdin(),
        }
    }

    /// Says what the host does not know yet about each command.
    fn pump(&mut self) {
        let now_ns = sys::monotonic_ns();
        for (id, entry) in &mut self.commands {
            match entry {
                Entry::Command(command) if self.is_attached => command.pump(now_ns, &mut self.outbox),
                Entry::Command(command) => command.settle(now_ns),
                Entry::Transfer(transfer) if self.is_attached => {
                    transfer.pump(&mut self.scratch, &mut self.outbox);
                }
                Entry::Waiting(_) | Entry::Transfer(_) => {}
                Entry::Failed(StartError { kind, message }, is_said) if self.is_attached && !*is_said => {
                    *is_said = true;
                    AgentMessage::Failed { id: *id, kind: *kind, message: message.as_bytes() }
                        .send(&mut self.outbox);
                }
                Entry::Failed(..) => {}
            }
        }
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
