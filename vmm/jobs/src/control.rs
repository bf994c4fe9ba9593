//! Steering a command from another thread: signals, window size, cancellation. Also the executor's one place to wait
//! for its own threads: everything arrives as an [`Event`] in one channel, with an eventfd that poll can wait for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use harrier_agent_protocol::{Stream, WindowSize};
use rustix::event::{EventfdFlags, eventfd};

/// What the executor hears from other threads.
#[derive(Debug)]
pub(crate) enum Event {
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

/// Steers one command. Cheap to clone; no call ever blocks or fails, also after the command's end.
#[derive(Clone, Debug)]
pub struct Controller(pub(crate) EventSender);

impl Controller {
    /// Sends a signal, 1 to 64, to the command's process group, as soon as it runs.
    pub fn signal(&self, number: u8) {
        self.0.send(Event::Signal(number));
    }

    /// Gives the command's terminal a new size.
    pub fn resize(&self, size: WindowSize) {
        self.0.send(Event::Resize(size));
    }

    /// Makes [`execute`](crate::execute) return `ExecuteError::Cancelled` soon, whatever the guest does.
    pub fn cancel(&self) {
        self.0.send(Event::Cancel);
    }
}

/// What [`execute`](crate::execute) listens to.
#[derive(Debug)]
pub struct ControlReceiver {
    events: Receiver<Event>,
    wake: Arc<OwnedFd>,
    /// For the executor's own threads.
    pub(crate) sender: EventSender,
}

/// A controller and what it controls. Errors when the process is out of file descriptors.
pub fn control() -> io::Result<(Controller, ControlReceiver)> {
    let (sender, events) = channel();
    let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let sender = EventSender { events: sender, wake: Arc::clone(&wake) };
    Ok((Controller(sender.clone()), ControlReceiver { events, wake, sender }))
}

impl ControlReceiver {
    /// Readable while events wait.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// All events that have come; the eventfd is quiet after this until the next one.
    pub(crate) fn take(&self) -> impl Iterator<Item = Event> {
        // Nothing to read means that nothing woke us; the channel is looked at in any case.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        self.events.try_iter()
    }
}

/// The sending end of the channel and its eventfd.
#[derive(Clone, Debug)]
pub(crate) struct EventSender {
    events: Sender<Event>,
    wake: Arc<OwnedFd>,
}

impl EventSender {
    /// Sends an event, unless the executor has returned.
    pub(crate) fn send(&self, event: Event) {
        if self.events.send(event).is_ok() {
            // A counter that is full is readable all the same.
            let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        }
    }
}
