//! What all threads of a machine agree on: whether it runs, pauses or has ended, and how.
//!
//! [`RunControl`] is the one place where the end is decided: the first [`MachineEnd`] counts. Devices reach it
//! as a [`PowerSink`], vCPU threads through [`RunControl::gate`], the event loop through [`RunControl::stand`], owners
//! through [`crate::MachineHandle`]. A machine that has not been started is a paused one.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use harrier_devices::{PowerEvent, PowerSink};
use harrier_engine::Kicker;
use harrier_hypercall_abi::calls::EXIT_REASONS;

use crate::guest_time::{DoorbellTime, GuestTime};

/// [`MachineEnd::GuestExit`]'s reason for a guest that has done its work.
pub const EXIT_DONE: u32 = 0;

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MachineEnd {
    /// The guest switched itself off.
    #[error("the guest switched itself off")]
    PowerOff,
    /// The guest asked for a reset.
    #[error("the guest reset itself")]
    Reset,
    /// A processor could not deliver a double fault.
    #[error("the guest crashed: triple fault on cpu {vcpu} at {rip:#x}")]
    TripleFault {
        /// The processor.
        vcpu: u32,
        /// Where it stands.
        rip: u64,
    },
    /// The guest's kernel reported its own crash.
    #[error("the guest kernel panicked")]
    GuestPanic,
    /// A bare-metal guest ended with a code.
    #[error("the guest ended with code {0}")]
    DebugExit(u32),
    /// The guest ended the machine by a hypercall.
    #[error("the guest ended with code {code} ({}){}", exit_reason(*.reason), quoted(.message))]
    GuestExit {
        /// The code for whoever started it.
        code: u8,
        /// A number of [`harrier_hypercall_abi::calls::EXIT_REASONS`].
        reason: u32,
        /// The guest's words, printable ASCII; may be empty.
        message: String,
    },
    /// The engine met an instruction that it cannot execute.
    #[error("cpu {vcpu} cannot go on at {rip:#x}: {reason} (instruction bytes {})", hex(.bytes))]
    Unsupported {
        /// The processor.
        vcpu: u32,
        /// Where the instruction is.
        rip: u64,
        /// Its bytes, as far as they could be read.
        bytes: Vec<u8>,
        /// The engine's words.
        reason: String,
    },
    /// The engine shut the machine down for a reason of its own.
    #[error("the engine shut the machine down on cpu {vcpu}")]
    Shutdown {
        /// The processor.
        vcpu: u32,
    },
    /// The owner ended it.
    #[error("the machine was stopped")]
    Stopped,
    /// The monitor itself failed; the text says where.
    #[error("internal error: {0}: this is a bug in harrier, please report it")]
    Failed(String),
}

fn exit_reason(number: u32) -> String {
    let known = EXIT_REASONS.iter().find(|(reason, ..)| *reason == number);
    known.map_or_else(|| format!("reason {number}"), |(_, name, _)| name.to_ascii_lowercase())
}

fn quoted(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(": '{message}'") }
}

fn hex(bytes: &[u8]) -> String {
    let digits: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    digits.join(" ")
}

#[derive(Default)]
struct State {
    end: Option<MachineEnd>,
    /// How many owners want vCPUs and event loop to stand still.
    pauses: usize,
    /// Threads that stand because of a pause.
    parked: usize,
    /// Threads of vCPUs and event loop that have not ended.
    running: usize,
    /// Guest time stands still.
    time_stands: bool,
    first_instruction: Option<Instant>,
    kickers: Vec<Arc<dyn Kicker>>,
    /// The thread of a vCPU that stands although the machine runs.
    held: Option<ThreadId>,
}

/// Shared by all threads of one machine.
#[derive(Default)]
pub(crate) struct RunControl {
    state: Mutex<State>,
    changed: Condvar,
    /// What stands still in a pause, besides threads.
    time: OnceLock<GuestTime>,
}

impl RunControl {
    /// The control of a machine that is to be started: it stands, and so does guest time.
    pub(crate) fn paused(time: GuestTime, kickers: Vec<Arc<dyn Kicker>>) -> Self {
        let control = RunControl::default();
        let _ = control.time.set(time);
        let mut state = control.lock();
        (state.pauses, state.kickers) = (1, kickers);
        control.stop_time(&mut state);
        drop(state);
        control
    }

    fn stop_time(&self, state: &mut State) {
        if !std::mem::replace(&mut state.time_stands, true)
            && let Some(time) = self.time.get()
        {
            time.stop();
        }
    }

    fn start_time(&self, state: &mut State) {
        if std::mem::take(&mut state.time_stands)
            && let Some(time) = self.time.get()
        {
            time.start();
        }
    }

    /// Guest time has this side, too. To be called before the machine is started.
    pub(crate) fn add_doorbell_time(&self, doorbell: DoorbellTime) {
        if let Some(time) = self.time.get() {
            time.add_doorbell(doorbell);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// One more thread that a pause has to interrupt.
    pub(crate) fn add_kicker(&self, kicker: Arc<dyn Kicker>) {
        self.lock().kickers.push(kicker);
    }

    /// Ends the run; the first end counts. Never blocks for long: nobody holds the lock while a guest runs.
    pub(crate) fn finish(&self, end: MachineEnd) {
        let mut state = self.lock();
        if state.end.is_none() {
            log::debug!("machine: {end}");
            state.end = Some(end);
        }
        for kicker in &state.kickers {
            kicker.kick();
        }
        self.changed.notify_all();
    }

    /// Waits for the end; `None` once `deadline` has passed.
    pub(crate) fn wait_for_end(&self, deadline: Option<Instant>) -> Option<MachineEnd> {
        let mut state = self.lock();
        loop {
            if let Some(end) = &state.end {
                return Some(end.clone());
            }
            state = match deadline.map(|at| at.saturating_duration_since(Instant::now())) {
                None => self.wait(state),
                Some(Duration::ZERO) => return None,
                Some(left) => {
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// A thread begins; it is counted until [`RunControl::leave`].
    pub(crate) fn enter(&self) {
        self.lock().running += 1;
    }

    /// A thread ends.
    pub(crate) fn leave(&self) {
        let mut state = self.lock();
        state.running = state.running.saturating_sub(1);
        self.changed.notify_all();
    }

    /// Where a vCPU thread stands between two runs: waits while the machine is paused, and answers whether
    /// to go on.
    pub(crate) fn gate(&self) -> bool {
        let mut state = self.stand_locked();
        if state.end.is_none() && state.first_instruction.is_none() {
            state.first_instruction = Some(Instant::now());
        }
        state.end.is_none()
    }

    /// Waits while the machine is paused.
    pub(crate) fn stand(&self) {
        drop(self.stand_locked());
    }

    fn stand_locked(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        let me = std::thread::current().id();
        let is_to_stand = |state: &State| (state.pauses > 0 || state.held == Some(me)) && state.end.is_none();
        if is_to_stand(&state) {
            state.parked += 1;
            self.changed.notify_all();
            while is_to_stand(&state) {
                state = self.wait(state);
            }
            state.parked = state.parked.saturating_sub(1);
        }
        state
    }

    /// Has the vCPU whose thread this is stand at its next gate, until [`RunControl::release_held`]. One at a time.
    pub(crate) fn hold_this_thread(&self) {
        self.lock().held = Some(std::thread::current().id());
    }

    /// Lets the vCPU that is held go on.
    pub(crate) fn release_held(&self) {
        self.lock().held = None;
        self.changed.notify_all();
    }

    /// Whether the machine stands, so that its guest can answer nothing.
    pub(crate) fn is_standing(&self) -> bool {
        let state = self.lock();
        state.pauses > 0 || state.end.is_some()
    }

    /// When the first vCPU first ran.
    pub(crate) fn first_instruction(&self) -> Option<Instant> {
        self.lock().first_instruction
    }

    /// Stops all vCPUs at an instruction boundary, the event loop between two events, and guest time; returns when they
    /// stand. False if the machine has ended.
    pub(crate) fn pause(&self) -> bool {
        let mut state = self.lock();
        state.pauses += 1;
        for kicker in &state.kickers {
            kicker.kick();
        }
        while state.parked < state.running && state.end.is_none() {
            state = self.wait(state);
        }
        if state.end.is_none() {
            self.stop_time(&mut state);
        }
        state.end.is_none()
    }

    /// Takes back one [`RunControl::pause`].
    pub(crate) fn resume(&self) {
        let mut state = self.lock();
        state.pauses = state.pauses.saturating_sub(1);
        if state.pauses == 0 {
            self.start_time(&mut state);
        }
        self.changed.notify_all();
    }
}

impl PowerSink for RunControl {
    fn request(&self, event: PowerEvent) {
        match event {
            PowerEvent::PowerOff => self.finish(MachineEnd::PowerOff),
            PowerEvent::Reset => self.finish(MachineEnd::Reset),
            PowerEvent::GuestPanic { crash_loaded: false } => self.finish(MachineEnd::GuestPanic),
            PowerEvent::GuestPanic { crash_loaded: true } => {
                log::warn!("machine: the guest kernel panicked and goes on with its crash kernel");
            }
            PowerEvent::DebugExit(code) => self.finish(MachineEnd::DebugExit(code)),
            // A new kind of event that this crate does not know yet does not end a run.
            other => log::warn!("machine: power event {other:?} is not handled"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_counts() {
        let control = RunControl::default();
        control.request(PowerEvent::GuestPanic { crash_loaded: true });
        assert!(control.gate());
        control.request(PowerEvent::Reset);
        control.finish(MachineEnd::Stopped);
        assert_eq!(control.wait_for_end(None), Some(MachineEnd::Reset));
        assert!(!control.gate());
    }

    #[test]
    fn waiting_ends_at_the_deadline() {
        let control = RunControl::default();
        assert_eq!(control.wait_for_end(Some(Instant::now())), None);
    }

    #[test]
    fn a_guest_that_ends_itself_says_why() {
        let end = |reason, message: &str| MachineEnd::GuestExit { code: 3, reason, message: message.into() };
        assert_eq!(end(0, "").to_string(), "the guest ended with code 3 (done)");
        assert_eq!(end(1, "no disk").to_string(), "the guest ended with code 3 (failed): 'no disk'");
        assert_eq!(end(99, "").to_string(), "the guest ended with code 3 (reason 99)");
    }

    #[test]
    fn an_unsupported_instruction_is_described_with_its_bytes() {
        let end = MachineEnd::Unsupported {
            vcpu: 1,
            rip: 0x1000,
            bytes: vec![0x0f, 0x0b],
            reason: "no such instruction".to_owned(),
        };
        assert_eq!(
            end.to_string(),
            "cpu 1 cannot go on at 0x1000: no such instruction (instruction bytes 0f 0b)"
        );
    }
}
