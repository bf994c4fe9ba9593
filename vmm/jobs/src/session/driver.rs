//! A session's thread: the poll loop over the agent's connection and the [`Event`]s of the other threads.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use harrier_agent_protocol::{BootTimes, Cause, Inbox, LogLevel, MAX_COMMANDS, Stream, Usage};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::core::{self, Core, Phase, Request, Violation};
use super::{Health, SessionOptions, SessionState};
use crate::control::{CommandEvent, ControlReceiver, Event, EventSender, NewCommand};
use crate::outcome::{ExecuteError, Outcome, Status, Timings};
use crate::stdio::{Sink, Source, Stdin};

/// Nobody waits longer for a machine to be quiet.
const QUIESCE_MAX: Duration = Duration::from_secs(600);

/// How many lines of a guest's log are passed on.
const LOG_LINES: u32 = 200;

/// How long output that has already come is still written after a cancellation.
const CANCEL_GRACE: Duration = Duration::from_millis(200);

/// Everything that a session's thread knows.
pub(crate) struct Driver {
    core: Core,
    options: SessionOptions,
    control: ControlReceiver,
    /// Until one of the two sides has ended it, or it is of no more use.
    connection: Option<UnixStream>,
    inbox: Inbox,
    commands: BTreeMap<u32, Running>,
    /// The first readiness of the agent.
    boot: Option<(BootTimes, Instant)>,
    /// Of the handshake, or of the agent's return.
    deadline: Option<Instant>,
    /// Shut the machine down, within this time, as soon as a command has ended: for [`execute`](crate::execute).
    pub(crate) last_command: Option<Duration>,
    /// The machine is to end.
    shutdown: Option<Shutdown>,
    /// Why the session cannot go on.
    failure: Option<ExecuteError>,
    /// The agent's last line of level error: likely the reason when it then goes.
    last_words: Option<String>,
    log_lines: u32,
    /// What others can see of the guest at any time.
    health: Arc<Mutex<Health>>,
    /// Who waits for the machine to be quiet, and until when.
    quiescing: Option<Quiescing>,
    /// Why no snapshot can be taken.
    busy: Option<&'static str>,
    is_stopped: bool,
}

/// Who waits for the machine to be quiet, and how long.
struct Quiescing {
    answer: Sender<Result<(), ExecuteError>>,
    limit: Duration,
    until: Instant,
}

/// Who waits for the machine's end, and how long.
struct Shutdown {
    limit: Duration,
    deadline: Option<Instant>,
    waiting: Vec<Sender<Result<(), ExecuteError>>>,
}

/// A command, its threads and what is known of its end.
struct Running {
    /// Until the command runs and `source` reads it.
    stdin: Option<Stdin>,
    source: Option<Source>,
    sinks: [Sink; 2],
    begin: Instant,
    timings: Timings,
    ended: Option<(Status, Cause, Usage)>,
    failure: Option<ExecuteError>,
    stdin_error: Option<io::Error>,
    /// After a cancellation: when output that cannot be written is given up.
    deadline: Option<Instant>,
    done: Sender<Result<Outcome, ExecuteError>>,
}

impl Driver {
    pub(crate) fn new(control: ControlReceiver, options: SessionOptions, core: Core) -> Self {
        Self {
            core,
            options,
            control,
            connection: None,
            inbox: Inbox::default(),
            commands: BTreeMap::new(),
            boot: None,
            deadline: None,
            last_command: None,
            shutdown: None,
            failure: None,
            last_words: None,
            log_lines: 0,
            health: Arc::default(),
            quiescing: None,
            busy: None,
            is_stopped: false,
        }
    }

    pub(crate) fn health(&self) -> Arc<Mutex<Health>> {
        Arc::clone(&self.health)
    }

    /// Serves the session until nobody holds it any more.
    pub(crate) fn run(mut self) {
        while !(self.is_stopped && self.commands.is_empty()) {
            self.turn();
        }
    }

    /// Serves one command on one connection until both have ended.
    pub(crate) fn run_once(mut self, connection: UnixStream, command: NewCommand) {
        self.connect(connection);
        self.add(command);
        while !(self.commands.is_empty() && self.connection.is_none()) {
            self.turn();
        }
    }

    /// A command that the core knows already.
    pub(crate) fn adopt(&mut self, command: NewCommand) {
        let NewCommand { id, stdio, begin, done, .. } = command;
        match Running::start(&self.control.sender, id, stdio, begin, done) {
            Ok(mut running) => {
                if self.core.phase(id) == Some(Phase::Running) {
                    running.start_stdin(&mut self.core, id, &self.control.sender);
                }
                self.commands.insert(id, running);
            }
            Err((done, error)) => {
                self.core.remove(id);
                // Whoever started it may be gone.
                let _ = done.send(Err(error));
            }
        }
    }

    fn add(&mut self, mut command: NewCommand) {
        let refusal = if self.is_stopped {
            Some(ExecuteError::Over)
        } else if self.core.command_count() >= MAX_COMMANDS {
            Some(ExecuteError::TooMany)
        } else {
            self.failure.clone()
        };
        match refusal {
            Some(error) => {
                let _ = command.done.send(Err(error));
            }
            None => {
                match command.request.take() {
                    Some(Request::Run(encoded)) => self.core.run(command.id, encoded),
                    Some(Request::Put(spec)) => self.core.put(command.id, spec),
                    Some(Request::Get(spec)) => self.core.get(command.id, spec),
                    None => {}
                }
                self.adopt(command);
            }
        }
    }

    fn turn(&mut self) {
        self.flush();
        let readable = match self.wait() {
            Ok(readable) => readable,
            Err(error) => {
                self.fail_all(ExecuteError::Setup(Arc::new(error)));
                false
            }
        };
        for event in self.control.take() {
            self.handle(event);
        }
        if readable {
            self.receive();
        }
        self.expire();
        self.finish_commands();
    }

    fn wait(&self) -> io::Result<bool> {
        let mut entries = vec![PollFd::from_borrowed_fd(self.control.fd(), PollFlags::IN)];
        if let Some(connection) = &self.connection {
            let mut events = PollFlags::IN;
            if !self.core.outbox.is_empty() {
                events |= PollFlags::OUT;
            }
            entries.push(PollFd::from_borrowed_fd(connection.as_fd(), events));
        }
        let shutdown = self.shutdown.as_ref().and_then(|shutdown| shutdown.deadline);
        let of_commands = self.commands.values().filter_map(|command| command.deadline);
        let quiet = self.quiescing.as_ref().map(|quiescing| quiescing.until);
        let deadline = of_commands.chain(self.deadline).chain(shutdown).chain(quiet).min();
        let timeout = deadline.map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        match poll(&mut entries, timeout.as_ref()) {
            Ok(_) => Ok(entries.get(1).is_some_and(|entry| entry.revents().intersects(READABLE))),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Command(id, event) => self.handle_of(id, event),
            Event::Connect(connection) => self.connect(connection),
            Event::Run(command) => self.add(*command),
            Event::ShutDown(limit, answer) => self.shut_down(limit, Some(answer)),
            Event::State(answer) => {
                // Who asked may have given up.
                let _ = answer.send(self.state());
            }
            Event::Busy(what) => self.busy = what,
            Event::Quiesce(limit, answer) => {
                // The guest's time is the longer one: it is thawed, or the machine has gone on elsewhere.
                self.core.quiesce(u32::try_from(limit.as_millis()).unwrap_or(u32::MAX).saturating_mul(2));
                let until = Instant::now() + limit.min(QUIESCE_MAX);
                self.quiescing = Some(Quiescing { answer, limit, until });
            }
            Event::Thaw => {
                self.quiescing = None;
                self.core.thaw();
            }
            Event::MachineEnded if self.shutdown.is_some() => self.machine_ended(Ok(())),
            Event::MachineEnded => {
                self.disconnect();
                self.fail_disconnected();
            }
            Event::Stop => {
                self.is_stopped = true;
                self.connection = None;
                self.commands.values_mut().for_each(Running::cancel);
            }
        }
    }

    fn handle_of(&mut self, id: u32, event: CommandEvent) {
        let Some(command) = self.commands.get_mut(&id) else { return };
        match event {
            CommandEvent::Signal(number) => self.core.signal(id, number),
            CommandEvent::Resize(size) => self.core.resize(id, size),
            CommandEvent::Cancel => {
                command.cancel();
                self.core.remove(id);
                if self.last_command.is_some() {
                    self.connection = None;
                }
            }
            CommandEvent::Input(bytes) => self.core.give_stdin(id, &bytes),
            CommandEvent::InputEnd(error) => {
                command.stdin_error = error;
                command.source = None;
                self.core.end_stdin(id);
            }
            CommandEvent::Written(stream, count) => self.core.disposed(id, stream, count),
            CommandEvent::OutputEnd(stream, error) => {
                let sink = command.sink(stream);
                sink.ended = true;
                sink.error = error.filter(|error| error.kind() != io::ErrorKind::BrokenPipe);
                self.core.close_output(id, stream);
            }
        }
    }

    fn connect(&mut self, connection: UnixStream) {
        if self.failure.is_some() || self.is_stopped {
            return;
        }
        if let Err(error) = connection.set_nonblocking(true) {
            return self.fail_all(ExecuteError::Setup(Arc::new(error)));
        }
        self.inbox = Inbox::default();
        self.core.connect();
        self.connection = Some(connection);
        self.last_words = None;
        self.deadline = Instant::now().checked_add(self.options.handshake_timeout);
    }

    /// Sends what there is to say; what did not fit the outbox follows when the connection has taken that.
    fn flush(&mut self) {
        loop {
            self.core.pump();
            let Some(connection) = &mut self.connection else { return };
            if self.core.outbox.is_empty() {
                return;
            }
            if let Err(error) = self.core.outbox.flush(connection) {
                // The agent may have said why before it went.
                while self.connection.is_some() && self.receive() {}
                if self.connection.is_some() {
                    self.lost(Some(error));
                }
                return;
            }
            if !self.core.outbox.is_empty() {
                return;
            }
        }
    }

    /// Reads once from the connection. False: nothing was there.
    fn receive(&mut self) -> bool {
        let Some(connection) = &mut self.connection else { return false };
        match self.inbox.fill(connection) {
            Ok(0) => {
                self.lost(None);
                return false;
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            Err(error) => {
                self.lost(Some(error));
                return false;
            }
        }
        let mut inbox = std::mem::take(&mut self.inbox);
        let goes_on = self.take_frames(&mut inbox);
        self.inbox = inbox;
        goes_on
    }

    fn take_frames(&mut self, inbox: &mut Inbox) -> bool {
        loop {
            let event = match inbox.next_frame() {
                Ok(Some(frame)) => self.core.receive(frame),
                Ok(None) => return true,
                Err(error) => Err(error.into()),
            };
            match event {
                Ok(event) => self.agent_said(event),
                Err(Violation::Version(theirs)) => self.fail_all(ExecuteError::Version(theirs)),
                Err(violation) => self.fail_all(ExecuteError::Protocol(violation.to_string())),
            }
            if self.connection.is_none() {
                return false;
            }
        }
    }

    fn agent_said(&mut self, event: core::Event<'_>) {
        match event {
            core::Event::Nothing => {}
            core::Event::Ready { times, reason, lost, room } => {
                log::debug!("the agent is ready ({reason:?})");
                self.boot.get_or_insert((times, Instant::now()));
                self.deadline = None;
                for (id, bytes) in room {
                    self.credit(id, bytes);
                }
                for id in lost {
                    if let Some(command) = self.commands.get_mut(&id) {
                        command.fail(ExecuteError::Lost);
                    }
                }
            }
            core::Event::Started { id, at_ns } => {
                if let Some(command) = self.commands.get_mut(&id) {
                    command.timings.host_started = command.begin.elapsed();
                    command.timings.command_started_ns = at_ns;
                    command.start_stdin(&mut self.core, id, &self.control.sender);
                }
            }
            core::Event::Output { id, stream, bytes } => {
                if let Some(command) = self.commands.get_mut(&id) {
                    command.sink(stream).write(bytes);
                }
            }
            core::Event::StdinRoom { id, bytes } => self.credit(id, bytes),
            core::Event::StdinClosed { id } => {
                if let Some(command) = self.commands.get_mut(&id) {
                    command.source = None;
                }
            }
            core::Event::Ended { id, status, cause, usage, at_ns } => {
                if let Some(command) = self.commands.get_mut(&id) {
                    command.timings.host_ended = command.begin.elapsed();
                    command.timings.command_ended_ns = at_ns;
                    command.ended = Some((status, cause, usage));
                    command.finish_streams();
                }
                if let Some(limit) = self.last_command {
                    self.shut_down(limit, None);
                }
            }
            core::Event::Heartbeat => {
                let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
                health.heartbeats = health.heartbeats.saturating_add(1);
            }
            core::Event::Progress { id, text } => {
                let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
                health.progress = Some((id, text));
            }
            core::Event::Quiesced => {
                if let Some(quiescing) = self.quiescing.take() {
                    // Who asked may have given up.
                    let _ = quiescing.answer.send(Ok(()));
                }
            }
            core::Event::Synced => self.machine_ended(Ok(())),
            core::Event::Log(level, line) => self.log(level, line),
        }
    }

    /// What a snapshot keeps. Half a file would be missing on both sides of it.
    fn state(&self) -> Result<SessionState, ExecuteError> {
        if self.core.is_copying() {
            return Err(ExecuteError::Busy("files are being copied"));
        }
        if let Some(what) = self.busy {
            return Err(ExecuteError::Busy(what));
        }
        Ok(SessionState::of(&self.core))
    }

    /// A command may be given so many bytes more of input.
    fn credit(&self, id: u32, bytes: usize) {
        if let Some(source) = self.commands.get(&id).and_then(|command| command.source.as_ref()) {
            source.credit(bytes);
        }
    }

    fn shut_down(&mut self, limit: Duration, answer: Option<Sender<Result<(), ExecuteError>>>) {
        if let Some(failure) = self.failure.clone().filter(|_| self.connection.is_none()) {
            if let Some(answer) = answer {
                let _ = answer.send(Err(failure));
            }
            return;
        }
        self.core.shut_down();
        let begin = || Shutdown { limit, deadline: Instant::now().checked_add(limit), waiting: Vec::new() };
        self.shutdown.get_or_insert_with(begin).waiting.extend(answer);
    }

    /// The machine is ready to be switched off, or will never say so.
    fn machine_ended(&mut self, result: Result<(), ExecuteError>) {
        for answer in self.shutdown.take().into_iter().flat_map(|shutdown| shutdown.waiting) {
            let _ = answer.send(result.clone());
        }
        self.disconnect();
        // Commands that were running went with the machine.
        self.fail_all(result.err().unwrap_or(ExecuteError::Disconnected("while the command ran")));
    }

    fn disconnect(&mut self) {
        self.connection = None;
        self.core.disconnect();
        self.deadline = None;
    }

    /// The connection is gone, which after the last command's end is no loss.
    fn lost(&mut self, error: Option<io::Error>) {
        // Where the agent could dial again, it does unless its machine has ended, of which the session hears.
        let is_over = self.shutdown.is_some() && self.options.reconnect.is_none();
        self.disconnect();
        if is_over {
            return self.machine_ended(Ok(()));
        }
        let failure = match (self.last_words.take(), error) {
            (Some(line), _) => Some(ExecuteError::Agent(line)),
            (None, Some(error)) if !is_disconnection(&error) => {
                Some(ExecuteError::Connection(Arc::new(error)))
            }
            _ => None,
        };
        match (failure, self.options.reconnect) {
            // An agent that has said why it gives up does not come back; one that never was there may.
            (Some(failure @ ExecuteError::Agent(_)), _) | (Some(failure), None) => self.fail_all(failure),
            (None, None) => self.fail_disconnected(),
            (_, Some(limit)) => {
                log::debug!("the agent's connection is lost, {limit:?} are left for another");
                self.deadline = Instant::now().checked_add(limit);
            }
        }
    }

    /// Ends the session: every command that has not ended fails.
    fn fail_all(&mut self, failure: ExecuteError) {
        self.failure.get_or_insert_with(|| failure.clone());
        self.disconnect();
        for command in self.commands.values_mut().filter(|command| command.ended.is_none()) {
            command.fail(failure.clone());
        }
        if self.shutdown.is_some() {
            self.machine_ended(Err(failure));
        }
    }

    fn fail_disconnected(&mut self) {
        let (core, commands) = (&self.core, &mut self.commands);
        for (id, command) in commands.iter_mut().filter(|(_, command)| command.ended.is_none()) {
            let when = match core.phase(*id) {
                Some(Phase::Running) => "while the command ran",
                _ => "before the command started",
            };
            command.fail(ExecuteError::Disconnected(when));
        }
        self.fail_all(ExecuteError::Disconnected("before the command started"));
    }

    /// Acts on the deadlines that have passed.
    fn expire(&mut self) {
        let now = Instant::now();
        let has_passed = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= now);
        for command in self.commands.values_mut().filter(|command| has_passed(command.deadline)) {
            // A reader of our output that stands still is left behind with its thread.
            command.deadline = None;
            command.sinks.iter_mut().for_each(|sink| sink.ended = true);
        }
        if let Some(quiescing) = self.quiescing.take_if(|quiescing| quiescing.until <= now) {
            self.core.thaw();
            let _ = quiescing.answer.send(Err(ExecuteError::NoAnswer(quiescing.limit)));
        }
        if let Some(limit) = self
            .shutdown
            .as_ref()
            .filter(|shutdown| has_passed(shutdown.deadline))
            .map(|shutdown| shutdown.limit)
        {
            self.machine_ended(Err(ExecuteError::NoAnswer(limit)));
        }
        if has_passed(self.deadline) {
            self.deadline = None;
            match (&self.connection, self.options.reconnect) {
                (Some(_), None) => self.fail_all(ExecuteError::NoAnswer(self.options.handshake_timeout)),
                // A connection on which nothing is said is no better than none.
                (Some(_), Some(limit)) => {
                    self.disconnect();
                    self.deadline = now.checked_add(limit);
                }
                (None, _) => self.fail_disconnected(),
            }
        }
    }

    /// Reports the commands of which nothing more is expected and all output is where it belongs.
    fn finish_commands(&mut self) {
        let core = &mut self.core;
        self.commands.retain(|id, command| {
            let is_over = (command.ended.is_some() || command.failure.is_some())
                && command.sinks.iter().all(|sink| sink.ended);
            if is_over {
                let result = command.conclude(core, *id, self.boot);
                core.remove(*id);
                // Whoever started it may be gone.
                let _ = command.done.send(result);
            }
            !is_over
        });
    }

    fn log(&mut self, level: LogLevel, line: String) {
        self.log_lines = self.log_lines.saturating_add(1);
        match self.log_lines {
            ..=LOG_LINES => {
                let level = match level {
                    LogLevel::Warn => log::Level::Warn,
                    // An error is told once: by whoever shows the failure that follows it.
                    LogLevel::Error | LogLevel::Debug => log::Level::Debug,
                };
                log::log!(target: "guest", level, "{line}");
            }
            count if count == LOG_LINES + 1 => {
                log::warn!(target: "guest", "no more lines of the guest's agent are shown")
            }
            _ => {}
        }
        if level == LogLevel::Error {
            self.last_words = Some(line);
        }
    }
}

impl Running {
    fn start(
        events: &EventSender,
        id: u32,
        stdio: crate::stdio::Stdio,
        begin: Instant,
        done: Sender<Result<Outcome, ExecuteError>>,
    ) -> Result<Self, (Sender<Result<Outcome, ExecuteError>>, ExecuteError)> {
        let sink = |stream, output| Sink::start(stream, output, events.of(id));
        let sinks = sink(Stream::Stdout, stdio.stdout)
            .and_then(|stdout| Ok([stdout, sink(Stream::Stderr, stdio.stderr)?]));
        match sinks {
            Ok(sinks) => Ok(Self {
                stdin: Some(stdio.stdin),
                source: None,
                sinks,
                begin,
                timings: Timings::default(),
                ended: None,
                failure: None,
                stdin_error: None,
                deadline: None,
                done,
            }),
            Err(error) => Err((done, ExecuteError::Setup(Arc::new(error)))),
        }
    }

    fn start_stdin(&mut self, core: &mut Core, id: u32, events: &EventSender) {
        match self.stdin.take() {
            None => {}
            Some(Stdin::Empty) => core.end_stdin(id),
            Some(stdin) => match Source::start(stdin, events.of(id)) {
                Ok(source) => {
                    source.credit(core.stdin_room(id));
                    self.source = Some(source);
                }
                Err(error) => self.fail(ExecuteError::Setup(Arc::new(error))),
            },
        }
    }

    fn sink(&mut self, stream: Stream) -> &mut Sink {
        let [stdout, stderr] = &mut self.sinks;
        if stream == Stream::Stdout { stdout } else { stderr }
    }

    /// No more input is wanted, no more output comes.
    fn finish_streams(&mut self) {
        self.stdin = None;
        self.source = None;
        self.sinks.iter_mut().for_each(Sink::finish);
    }

    /// Ends the command here; what has come of its output is still written.
    fn fail(&mut self, failure: ExecuteError) {
        self.failure.get_or_insert(failure);
        self.finish_streams();
    }

    fn cancel(&mut self) {
        if !matches!(self.failure, Some(ExecuteError::Cancelled)) {
            self.failure = Some(ExecuteError::Cancelled);
            self.finish_streams();
            self.deadline = Instant::now().checked_add(CANCEL_GRACE);
        }
    }

    fn conclude(
        &mut self,
        core: &Core,
        id: u32,
        boot: Option<(BootTimes, Instant)>,
    ) -> Result<Outcome, ExecuteError> {
        let Some((status, cause, usage)) = self.ended.take().filter(|_| self.failure.is_none()) else {
            return Err(self.failure.take().unwrap_or(ExecuteError::Cancelled));
        };
        let mut timings = self.timings;
        if let Some((times, ready)) = boot {
            timings.host_ready = ready.saturating_duration_since(self.begin);
            timings.agent_start_ns = times.agent_start_ns;
            timings.agent_ready_ns = times.connected_ns;
        }
        let [stdout, stderr] = &mut self.sinks;
        Ok(Outcome {
            status,
            cause,
            usage,
            timings,
            stdin_bytes: core.given(id),
            stdout_bytes: core.received(id, Stream::Stdout),
            stderr_bytes: core.received(id, Stream::Stderr),
            stdout_error: stdout.error.take(),
            stderr_error: stderr.error.take(),
            stdin_error: self.stdin_error.take(),
        })
    }
}

const READABLE: PollFlags = PollFlags::IN.union(PollFlags::HUP).union(PollFlags::ERR);

fn is_disconnection(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, WriteZero};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | WriteZero)
}
