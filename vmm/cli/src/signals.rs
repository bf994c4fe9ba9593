//! Signals to the harrier process, and what they do to a run.
//!
//! The first SIGINT reaches the command, the second ends the machine; SIGTERM and SIGHUP end it at once; SIGQUIT
//! reaches the command; SIGWINCH changes the size of its terminal. A signal after the one that ends the machine ends
//! the process on the spot.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use harrier_jobs::{Controller, WindowSize};
use harrier_machine::MachineHandle;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH, SIGXFSZ};
use signal_hook::iterator::{Handle, Signals};

/// Why the owner ended a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interruption {
    /// --timeout.
    TimedOut,
    /// A signal, or what stands for one.
    Signal(i32),
    /// Nobody reads the console any more.
    OutputClosed,
    /// The guest has given no sign of life for too long.
    GuestHung,
}

#[derive(Default)]
struct State {
    interruption: Option<Interruption>,
    machine: Option<MachineHandle>,
    command: Option<Controller>,
    interrupts: u32,
}

/// The way from signals, timeout and terminal to machine and command; clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Interrupter {
    state: Arc<Mutex<State>>,
}

impl Interrupter {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on interruptions end this machine; at once, if there has been one.
    pub(crate) fn set_machine(&self, machine: MachineHandle) {
        let mut state = self.lock();
        if state.interruption.is_some() {
            machine.stop();
        }
        state.machine = Some(machine);
    }

    /// From now on the first SIGINT goes to this command.
    pub(crate) fn set_command(&self, command: Controller) {
        self.lock().command = Some(command);
    }

    /// Ends machine and command; the first reason counts.
    pub(crate) fn end(&self, why: Interruption) {
        let mut state = self.lock();
        state.interruption.get_or_insert(why);
        if let Some(machine) = &state.machine {
            machine.stop();
        }
        if let Some(command) = &state.command {
            command.cancel();
        }
    }

    /// Sends a signal to the command; false if there is none yet.
    pub(crate) fn signal_command(&self, signal: i32) -> bool {
        let state = self.lock();
        match (&state.command, u8::try_from(signal)) {
            (Some(command), Ok(number)) => {
                command.signal(number);
                true
            }
            _ => false,
        }
    }

    /// Why the owner ended the run, if so.
    pub(crate) fn interruption(&self) -> Option<Interruption> {
        self.lock().interruption
    }

    fn deliver(&self, signal: i32) {
        let mut state = self.lock();
        match (signal, &state.command) {
            (SIGWINCH, Some(command)) => {
                let (rows, cols) = crate::terminal::size();
                command.resize(WindowSize { rows, cols });
            }
            (SIGINT, Some(command)) if state.interrupts == 0 => {
                command.signal(SIGINT as u8);
                state.interrupts = 1;
            }
            (SIGQUIT, Some(command)) => command.signal(SIGQUIT as u8),
            (SIGWINCH, None) => {}
            _ if state.interruption.is_some() => {
                // Asked again: whatever the end waits for, this process does not.
                crate::terminal::restore();
                std::process::exit(crate::exit::signal_code(signal).into());
            }
            _ => {
                drop(state);
                self.end(Interruption::Signal(signal));
            }
        }
    }
}

/// The thread that takes signals; dropping it leaves them unhandled but harmless until the process ends.
pub(crate) struct SignalThread {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl SignalThread {
    /// Takes over the signals named above.
    pub(crate) fn start(interrupter: Interrupter) -> io::Result<Self> {
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGWINCH])?;
        let handle = signals.handle();
        let thread = std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            for signal in signals.forever() {
                interrupter.deliver(signal);
            }
        })?;
        Ok(SignalThread { handle, thread: Some(thread) })
    }
}

impl Drop for SignalThread {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            // Nothing in it panics, and if it did, it has been said.
            let _ = thread.join();
        }
    }
}

/// Makes a file that would grow beyond what the process may write (setrlimit(2), RLIMIT_FSIZE) an error of that write, which is
/// told like that of a full disk, and not the end of a machine.
pub(crate) fn survive_file_limits() {
    if let Err(err) = signal_hook::flag::register(SIGXFSZ, Arc::default()) {
        log::debug!("SIGXFSZ keeps its default: {err}");
    }
}
