//! The one channel to a session's thread: what other threads ask of it, and what its own threads report. With it goes an
//! eventfd that poll can wait for. [`Controller`] is the part that steers a single command.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use harrier_agent_protocol::{Stream, WindowSize};
use rustix::event::{EventfdFlags, eventfd};

use crate::outcome::{ExecuteError, Outcome};
use crate::session::SessionState;
use crate::session::core::Request;
use crate::stdio::Stdio;

/// The first command of a session.
pub(crate) const FIRST_COMMAND: u32 = 1;

/// What a session's thread hears from other threads.
pub(crate) enum Event {
    /// About this command.
    Command(u32, CommandEvent),
    /// The agent has dialled.
    Connect(UnixStream),
    Run(Box<NewCommand>),
    /// End the machine; the answer comes when it may be switched off, or the time is over.
    ShutDown(Duration, Sender<Result<(), ExecuteError>>),
    State(Sender<Result<SessionState, ExecuteError>>),
    /// Why no snapshot can be taken from now on, if none can.
    Busy(Option<&'static str>),
    /// Make the machine quiet for at most so long; the answer comes when it is.
    Quiesce(Duration, Sender<Result<(), ExecuteError>>),
    Thaw,
    /// No further connection will come.
    MachineEnded,
    /// Nobody holds the session any more.
    Stop,
}

/// What is heard about one command.
#[derive(Debug)]
pub(crate) enum CommandEvent {
    Signal(u8),
    Resize(WindowSize),
    Cancel,
    /// Bytes of stdin have been read.
    Input(Vec<u8>),
    /// stdin has ended, or failed.
    InputEnd(Option<io::Error>),
    /// So many bytes of output are written.
    Written(Stream, usize),
    /// All output is written, or it cannot be.
    OutputEnd(Stream, Option<io::Error>),
}

/// A command that is to run.
pub(crate) struct NewCommand {
    pub(crate) id: u32,
    /// Nothing for one that the core knows already.
    pub(crate) request: Option<Request>,
    pub(crate) stdio: Stdio,
    pub(crate) begin: Instant,
    pub(crate) done: Sender<Result<Outcome, ExecuteError>>,
}

/// Steers one command. Cheap to clone; no call ever blocks or fails, also after the command's end.
#[derive(Clone, Debug)]
pub struct Controller(pub(crate) CommandSender);

impl Controller {
    /// Sends a signal, 1 to 64, to the command's process group, as soon as it runs.
    pub fn signal(&self, number: u8) {
        self.0.send(CommandEvent::Signal(number));
    }

    /// Gives the command's terminal a new size.
    pub fn resize(&self, size: WindowSize) {
        self.0.send(CommandEvent::Resize(size));
    }

    /// Makes the command's outcome `ExecuteError::Cancelled` soon, whatever the guest does. In the guest it is killed.
    pub fn cancel(&self) {
        self.0.send(CommandEvent::Cancel);
    }
}

/// What [`execute`](crate::execute) listens to.
pub struct ControlReceiver {
    events: Receiver<Event>,
    wake: Arc<OwnedFd>,
    /// For the session's own threads.
    pub(crate) sender: EventSender,
}

/// A controller and what it controls. Errors when the process is out of file descriptors.
pub fn control() -> io::Result<(Controller, ControlReceiver)> {
    let (sender, events) = channel();
    let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let sender = EventSender { events: sender, wake: Arc::clone(&wake) };
    Ok((Controller(sender.of(FIRST_COMMAND)), ControlReceiver { events, wake, sender }))
}

impl ControlReceiver {
    /// Readable while events wait.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// All events that have come; the eventfd is quiet after this until the next one.
    pub(crate) fn take(&self) -> Vec<Event> {
        // Nothing to read means that nothing woke us; the channel is looked at in any case.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        self.events.try_iter().collect()
    }
}

/// The sending end of the channel and its eventfd.
#[derive(Clone)]
pub(crate) struct EventSender {
    events: Sender<Event>,
    wake: Arc<OwnedFd>,
}

impl EventSender {
    /// Sends an event, unless the session's thread has gone.
    pub(crate) fn send(&self, event: Event) {
        if self.events.send(event).is_ok() {
            // A counter that is full is readable all the same.
            let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        }
    }

    /// A sender of one command's events.
    pub(crate) fn of(&self, id: u32) -> CommandSender {
        CommandSender { id, sender: self.clone() }
    }
}

/// Sends events of one command.
#[derive(Clone)]
pub(crate) struct CommandSender {
    id: u32,
    sender: EventSender,
}

impl CommandSender {
    pub(crate) fn send(&self, event: CommandEvent) {
        self.sender.send(Event::Command(self.id, event));
    }
}

impl std::fmt::Debug for CommandSender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CommandSender").field("id", &self.id).finish_non_exhaustive()
    }
}
