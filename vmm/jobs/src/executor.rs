//! Running one command: the poll loop over the agent's connection and the [`Event`]s of the other threads.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use harrier_agent_protocol::{CommandSpec, Inbox, LogLevel, Stream, Usage, WINDOW};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::control::{ControlReceiver, Event};
use crate::outcome::{ExecuteError, Outcome, Status, Timings};
use crate::session::{self, Phase, Session, Violation};
use crate::stdio::{Sink, Source, Stdin, Stdio};

/// How many lines of a guest's log are passed on.
const LOG_LINES: u32 = 200;

/// How long output that has already come is still written after a cancellation.
const CANCEL_GRACE: Duration = Duration::from_millis(200);

/// How a command is run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How long the agent, once connected, may take to be ready for a command.
    pub handshake_timeout: Duration,
    /// Whether the machine is told to go down after the command, and how long [`execute`] then waits until the agent
    /// has written everything back. The machine may be dropped as soon as `execute` has returned.
    pub shutdown: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self { handshake_timeout: Duration::from_secs(30), shutdown: Some(Duration::from_secs(5)) }
    }
}

/// Runs a command through the agent at the other end of `connection` and gives its outcome. Blocks until all output is
/// written; other threads steer by the [`Controller`](crate::Controller) that belongs to `control`.
///
/// A stdout or stderr that its reader has closed is closed for the command too, which gets SIGPIPE, as in any pipe.
pub fn execute(
    connection: UnixStream,
    spec: &CommandSpec,
    stdio: Stdio,
    options: &Options,
    control: ControlReceiver,
) -> Result<Outcome, ExecuteError> {
    let session = Session::new(spec.encode()?);
    connection.set_nonblocking(true).map_err(ExecuteError::Setup)?;
    let sink =
        |stream, output| Sink::start(stream, output, control.sender.clone()).map_err(ExecuteError::Setup);
    let begin = Instant::now();
    let executor = Executor {
        sinks: [sink(Stream::Stdout, stdio.stdout)?, sink(Stream::Stderr, stdio.stderr)?],
        stdin: Some(stdio.stdin),
        source: None,
        connection: Some(connection),
        session,
        options: *options,
        begin,
        timings: Timings::default(),
        ended: None,
        failure: None,
        last_words: None,
        stdin_error: None,
        deadline: begin.checked_add(options.handshake_timeout),
        log_lines: 0,
    };
    executor.run(&control)
}

struct Executor {
    sinks: [Sink; 2],
    /// Until the command runs and `source` reads it.
    stdin: Option<Stdin>,
    source: Option<Source>,
    /// Until one of the two sides has ended it, or it is of no more use.
    connection: Option<UnixStream>,
    session: Session,
    options: Options,
    begin: Instant,
    timings: Timings,
    ended: Option<(Status, Usage)>,
    failure: Option<ExecuteError>,
    /// The agent's last line of level error: likely the reason when it then goes.
    last_words: Option<String>,
    stdin_error: Option<io::Error>,
    /// Of the handshake, of the shutdown, or after a cancellation.
    deadline: Option<Instant>,
    log_lines: u32,
}

impl Executor {
    fn run(mut self, control: &ControlReceiver) -> Result<Outcome, ExecuteError> {
        let mut inbox = Inbox::default();
        while !self.is_over() {
            self.flush(&mut inbox);
            let readable = self.wait(control).map_err(ExecuteError::Setup)?;
            for event in control.take() {
                self.handle(event);
            }
            if readable {
                self.receive(&mut inbox, control);
            }
            self.expire();
        }
        let Some((status, usage)) = self.ended.filter(|_| self.failure.is_none()) else {
            return Err(self.failure.unwrap_or(ExecuteError::Cancelled));
        };
        let [stdout, stderr] = self.sinks;
        Ok(Outcome {
            status,
            usage,
            timings: self.timings,
            stdin_bytes: self.session.sent(),
            stdout_bytes: self.session.received(Stream::Stdout),
            stderr_bytes: self.session.received(Stream::Stderr),
            stdout_error: stdout.error,
            stderr_error: stderr.error,
            stdin_error: self.stdin_error,
        })
    }

    /// Nothing more is expected from the guest, and all output is where it belongs.
    fn is_over(&self) -> bool {
        self.connection.is_none() && self.sinks.iter().all(|sink| sink.ended)
    }

    fn wait(&self, control: &ControlReceiver) -> io::Result<bool> {
        let mut entries = vec![PollFd::from_borrowed_fd(control.fd(), PollFlags::IN)];
        if let Some(connection) = &self.connection {
            let mut events = PollFlags::IN;
            if !self.session.outbox.is_empty() {
                events |= PollFlags::OUT;
            }
            entries.push(PollFd::from_borrowed_fd(connection.as_fd(), events));
        }
        let timeout = self.deadline.map(|deadline| {
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

    fn flush(&mut self, inbox: &mut Inbox) {
        self.session.send_control();
        let Some(connection) = &mut self.connection else { return };
        if let Err(error) = self.session.outbox.flush(connection) {
            // The agent may have said why before it went.
            while self.connection.is_some() && self.receive_once(inbox) {}
            self.lost(Some(error));
        }
    }

    /// Takes what the agent has sent; starts reading stdin when that lets the command start.
    fn receive(&mut self, inbox: &mut Inbox, control: &ControlReceiver) {
        self.receive_once(inbox);
        if self.session.phase() == Phase::Running
            && let Some(stdin) = self.stdin.take()
        {
            self.start_stdin(stdin, control);
        }
    }

    /// Reads once from the connection. False: nothing was there.
    fn receive_once(&mut self, inbox: &mut Inbox) -> bool {
        let Some(connection) = &mut self.connection else { return false };
        match inbox.fill(connection) {
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
        loop {
            let event = match inbox.next_frame() {
                Ok(Some(frame)) => self.session.receive(frame),
                Ok(None) => return true,
                Err(error) => Err(error.into()),
            };
            match event {
                Ok(event) => self.agent_said(event),
                Err(Violation::Version(theirs)) => self.fail(ExecuteError::Version(theirs)),
                Err(violation) => self.fail(ExecuteError::Protocol(violation.to_string())),
            }
            if self.connection.is_none() {
                return false;
            }
        }
    }

    fn agent_said(&mut self, event: session::Event<'_>) {
        match event {
            session::Event::Nothing => {}
            session::Event::Ready(times) => {
                self.timings.host_ready = self.begin.elapsed();
                self.timings.agent_start_ns = times.agent_start_ns;
                self.timings.agent_ready_ns = times.connected_ns;
                self.deadline = None;
            }
            session::Event::Started(at_ns) => {
                self.timings.host_started = self.begin.elapsed();
                self.timings.command_started_ns = at_ns;
            }
            session::Event::Output(stream, bytes) => self.sink(stream).write(bytes),
            session::Event::StdinCredit(bytes) => {
                if let Some(source) = &self.source {
                    source.credit(usize::try_from(bytes).unwrap_or(0));
                }
            }
            session::Event::StdinClosed => self.source = None,
            session::Event::Ended { status, usage, at_ns } => {
                self.timings.host_ended = self.begin.elapsed();
                self.timings.command_ended_ns = at_ns;
                self.ended = Some((status, usage));
                self.finish_streams();
                match self.options.shutdown {
                    Some(limit) => {
                        self.session.shut_down();
                        self.deadline = Instant::now().checked_add(limit);
                    }
                    None => self.connection = None,
                }
            }
            session::Event::Synced => self.connection = None,
            session::Event::Log(level, line) => self.log(level, line),
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Signal(number) => self.session.signal(number),
            Event::Resize(size) => self.session.resize(size),
            Event::Cancel => self.cancel(),
            Event::Input(bytes) => self.session.send_stdin(&bytes),
            Event::InputEnd(error) => {
                self.stdin_error = error;
                self.session.end_stdin();
                self.source = None;
            }
            Event::Written(stream, count) => self.session.disposed(stream, count),
            Event::OutputEnd(stream, error) => {
                let sink = self.sink(stream);
                sink.ended = true;
                sink.error = error.filter(|error| error.kind() != io::ErrorKind::BrokenPipe);
                self.session.close_output(stream);
            }
        }
    }

    fn start_stdin(&mut self, stdin: Stdin, control: &ControlReceiver) {
        if matches!(stdin, Stdin::Empty) {
            return self.session.end_stdin();
        }
        match Source::start(stdin, control.sender.clone()) {
            Ok(source) => {
                source.credit(usize::try_from(WINDOW).unwrap_or(0));
                self.source = Some(source);
            }
            Err(error) => self.fail(ExecuteError::Setup(error)),
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

    /// The connection is gone, which after the command's end is no loss.
    fn lost(&mut self, error: Option<io::Error>) {
        if self.ended.is_some() {
            self.connection = None;
            return;
        }
        let failure = match (self.last_words.take(), error) {
            (Some(line), _) => ExecuteError::Agent(line),
            (None, Some(error)) if !is_disconnection(&error) => ExecuteError::Connection(error),
            _ if self.session.phase() == Phase::Running => {
                ExecuteError::Disconnected("while the command ran")
            }
            _ => ExecuteError::Disconnected("before the command started"),
        };
        self.fail(failure);
    }

    /// Ends the session; what has come of the output is still written.
    fn fail(&mut self, failure: ExecuteError) {
        self.failure.get_or_insert(failure);
        self.connection = None;
        self.deadline = None;
        self.finish_streams();
    }

    fn cancel(&mut self) {
        if matches!(self.failure, Some(ExecuteError::Cancelled)) {
            return;
        }
        self.failure = Some(ExecuteError::Cancelled);
        self.connection = None;
        self.finish_streams();
        self.deadline = Instant::now().checked_add(CANCEL_GRACE);
    }

    /// Acts on the deadline, if it has passed.
    fn expire(&mut self) {
        if self.deadline.is_none_or(|deadline| deadline > Instant::now()) {
            return;
        }
        self.deadline = None;
        if self.failure.is_some() {
            // Cancelled: a reader of our output that stands still is left behind with its thread.
            self.sinks.iter_mut().for_each(|sink| sink.ended = true);
        } else if self.ended.is_some() {
            self.connection = None;
        } else {
            self.fail(ExecuteError::NoAnswer(self.options.handshake_timeout));
        }
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

const READABLE: PollFlags = PollFlags::IN.union(PollFlags::HUP).union(PollFlags::ERR);

fn is_disconnection(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, WriteZero};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | WriteZero)
}
