//! The host's session with a machine's agent: several commands over one connection, which may be lost and come back.
//!
//! A [`Session`] is a thread that serves whichever connection the agent has opened last ([`Session::connect`]).
//! [`Session::run`] runs a command with streams of its own and answers a [`Command`], whose [`Controller`] steers it and
//! whose [`Command::wait`] gives its outcome. While there is no connection, commands go on in the guest and their output
//! waits there. [`Session::state`] is what another process needs to go on in a restored machine ([`Session::resume`]).
//!
//! [`core`] holds the protocol without I/O, `driver` the poll loop, `state` what is saved.

pub mod core;
pub(crate) mod driver;
mod state;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use harrier_agent_protocol::{CommandSpec, GetSpec, LINGER_FOREVER, PutSpec};

use crate::control::{Controller, Event, EventSender, FIRST_COMMAND, NewCommand, control};
use crate::outcome::{ExecuteError, Outcome};
use crate::stdio::Stdio;

use self::core::{Core, Request};
use self::driver::Driver;
pub use self::state::{
    CommandState, OutputState, PhaseState, Restored, SessionState, StateError, StdinState,
};
pub use harrier_agent_protocol::Role;

/// The section of a snapshot that holds the [`SessionState`], as JSON: the name is the owner's.
pub const SECTION: &str = "host.session";

/// How a session deals with its connections.
#[derive(Clone, Copy, Debug)]
pub struct SessionOptions {
    /// How long the agent, once connected, may take to be ready for commands.
    pub handshake_timeout: Duration,
    /// How long commands wait for the agent to dial again after a connection is lost. `None`: a lost connection ends
    /// them at once with [`ExecuteError::Disconnected`].
    pub reconnect: Option<Duration>,
    /// How long the agent and its commands go on without a host; `None` is for ever. Told to the agent with each
    /// connection. A command that outlives this is lost, and the machine switches itself off.
    pub linger: Option<Duration>,
    /// How often the agent says that it lives ([`Session::health`]); `None` is never.
    pub heartbeat: Option<Duration>,
}

/// What is known of a guest without asking it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Counts the signs of life.
    pub heartbeats: u64,
    /// The command that last said how far it has come, and what: one printable line.
    pub progress: Option<(u32, String)>,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(30),
            reconnect: Some(Duration::from_secs(60)),
            linger: None,
            heartbeat: None,
        }
    }
}

impl SessionOptions {
    fn linger_ms(&self) -> u32 {
        self.linger.map_or(LINGER_FOREVER, |linger| {
            u32::try_from(linger.as_millis()).unwrap_or(LINGER_FOREVER).min(LINGER_FOREVER - 1)
        })
    }
}

/// A session. Clones are the same one; when the last is dropped, its commands are cancelled.
#[derive(Clone)]
pub struct Session(Arc<Inner>);

struct Inner {
    events: EventSender,
    health: Arc<Mutex<Health>>,
    next_id: AtomicU32,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.events.send(Event::Stop);
    }
}

/// A command of a session.
pub struct Command {
    id: u32,
    controller: Controller,
    done: Receiver<Result<Outcome, ExecuteError>>,
}

impl Command {
    /// Its number within the session.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Steers it.
    #[must_use]
    pub fn controller(&self) -> Controller {
        self.controller.clone()
    }

    /// Waits until it has ended and all its output is written.
    pub fn wait(self) -> Result<Outcome, ExecuteError> {
        self.done.recv().unwrap_or(Err(ExecuteError::Over))
    }

    /// Its outcome if it is there within this time.
    ///
    /// # Errors
    /// Inside `Some`, as for [`Command::wait`].
    pub fn wait_for(&self, limit: Duration) -> Option<Result<Outcome, ExecuteError>> {
        match self.done.recv_timeout(limit) {
            Ok(result) => Some(result),
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => None,
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => Some(Err(ExecuteError::Over)),
        }
    }
}

impl Session {
    /// A session that waits for the agent's first connection. Commands may be given to it at once.
    ///
    /// # Errors
    /// The process is out of file descriptors or threads.
    pub fn new(options: SessionOptions) -> io::Result<Self> {
        Self::start(options, Core::new(options.linger_ms()), FIRST_COMMAND, Vec::new())
    }

    /// Goes on with a machine that was restored from a snapshot, as soon as its agent has dialled
    /// ([`Session::connect`]). `stdio` gives each command its streams: input goes on at [`StdinState::end`], output at
    /// [`OutputState::offset`].
    ///
    /// # Errors
    /// [`StateError`], or the process is out of file descriptors or threads.
    pub fn resume(
        state: &SessionState,
        restored: &Restored,
        options: SessionOptions,
        mut stdio: impl FnMut(&CommandState) -> Stdio,
    ) -> Result<(Self, Vec<Command>), ExecuteError> {
        let core = state.to_core(restored, options.linger_ms()).map_err(ExecuteError::State)?;
        let mut commands = Vec::new();
        let mut waiting = Vec::new();
        for command in &state.commands {
            let (done, result) = channel();
            let begin = Instant::now();
            waiting.push(NewCommand { id: command.id, request: None, stdio: stdio(command), begin, done });
            commands.push((command.id, result));
        }
        let setup = |error| ExecuteError::Setup(Arc::new(error));
        let session = Self::start(options, core, state.next_id, waiting).map_err(setup)?;
        let commands = commands.into_iter().map(|(id, done)| session.command(id, done)).collect();
        Ok((session, commands))
    }

    fn start(
        options: SessionOptions,
        core: Core,
        next_id: u32,
        resumed: Vec<NewCommand>,
    ) -> io::Result<Self> {
        let (_, receiver) = control()?;
        let events = receiver.sender.clone();
        let mut core = core;
        let beat = options.heartbeat.map_or(0, |every| every.as_millis().max(1));
        core.set_heartbeat(u32::try_from(beat).unwrap_or(u32::MAX));
        let mut driver = Driver::new(receiver, options, core);
        let health = driver.health();
        for command in resumed {
            driver.adopt(command);
        }
        thread::Builder::new().name("agent-session".into()).spawn(move || driver.run())?;
        Ok(Self(Arc::new(Inner { events, health, next_id: AtomicU32::new(next_id) })))
    }

    /// Hands over a connection that the agent has opened. It takes the place of any earlier one: an agent dials again
    /// only when that is gone.
    pub fn connect(&self, connection: UnixStream) {
        self.0.events.send(Event::Connect(connection));
    }

    /// Runs a command, now or as soon as the agent is there. A stdout or stderr that its reader has closed is closed for
    /// the command too, which gets SIGPIPE, as in any pipe.
    ///
    /// # Errors
    /// The specification cannot be sent. What goes wrong later is the command's outcome.
    pub fn run(&self, spec: &CommandSpec, stdio: Stdio) -> Result<Command, ExecuteError> {
        Ok(self.begin(Request::Run(spec.encode()?), stdio))
    }

    /// Writes a file in the machine, of which `stdio` gives the content; [`Status::Transferred`] is how it ends well. See
    /// [`files`](crate::files) for whole files.
    ///
    /// # Errors
    /// The specification cannot be sent.
    ///
    /// [`Status::Transferred`]: crate::Status::Transferred
    pub fn put(&self, spec: PutSpec, stdio: Stdio) -> Result<Command, ExecuteError> {
        spec.check()?;
        Ok(self.begin(Request::Put(spec), stdio))
    }

    /// Reads a file of the machine, which comes as stdout.
    ///
    /// # Errors
    /// The specification cannot be sent.
    pub fn get(&self, spec: GetSpec, stdio: Stdio) -> Result<Command, ExecuteError> {
        spec.check()?;
        Ok(self.begin(Request::Get(spec), stdio))
    }

    fn begin(&self, request: Request, stdio: Stdio) -> Command {
        let id = self.0.next_id.fetch_add(1, Ordering::Relaxed);
        let (done, result) = channel();
        let begin = Instant::now();
        let request = Some(request);
        self.0.events.send(Event::Run(Box::new(NewCommand { id, request, stdio, begin, done })));
        self.command(id, result)
    }

    /// What is known of the guest now.
    #[must_use]
    pub fn health(&self) -> Health {
        self.0.health.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has the guest write its file systems back and begin nothing new, until [`Session::thaw`] or for twice `limit` of its
    /// own time: for a snapshot that is about to be taken.
    ///
    /// # Errors
    /// It has not answered within `limit`; nothing is quiet then.
    pub fn quiesce(&self, limit: Duration) -> Result<(), ExecuteError> {
        let (answer, result) = channel();
        self.0.events.send(Event::Quiesce(limit, answer));
        result.recv().unwrap_or(Err(ExecuteError::Over))
    }

    /// Ends the quiet.
    pub fn thaw(&self) {
        self.0.events.send(Event::Thaw);
    }

    /// From now on no snapshot can be taken, and why; or one can. What a snapshot would hold could not go on.
    pub fn set_busy(&self, what: Option<&'static str>) {
        self.0.events.send(Event::Busy(what));
    }

    fn command(&self, id: u32, done: Receiver<Result<Outcome, ExecuteError>>) -> Command {
        Command { id, controller: Controller(self.0.events.of(id)), done }
    }

    /// Ends the machine's processes, has everything written back, and returns when the machine may be switched off.
    ///
    /// # Errors
    /// The agent is not there or has not answered within `limit`; the machine may be switched off all the same.
    pub fn shut_down(&self, limit: Duration) -> Result<(), ExecuteError> {
        let (answer, result) = channel();
        self.0.events.send(Event::ShutDown(limit, answer));
        result.recv().unwrap_or(Err(ExecuteError::Over))
    }

    /// The machine has ended: commands that have not ended fail now, instead of waiting for the agent to dial again.
    pub fn machine_ended(&self) {
        self.0.events.send(Event::MachineEnded);
    }

    /// What has to be kept with a snapshot of the machine. To be taken while the machine and its devices stand still: the
    /// agent in the snapshot must not hear of anything that is said afterwards.
    ///
    /// # Errors
    /// [`ExecuteError::Busy`] while files are copied, and [`ExecuteError::Over`].
    pub fn state(&self) -> Result<SessionState, ExecuteError> {
        let (answer, result) = channel();
        self.0.events.send(Event::State(answer));
        let mut state = result.recv().map_err(|_| ExecuteError::Over)??;
        state.next_id = self.0.next_id.load(Ordering::Relaxed);
        Ok(state)
    }
}

#[cfg(test)]
mod tests;
