//! What the machine does for the guest's hypercalls.
//!
//! [`MachineCalls`] implements the doorbell's trait with the machine's parts: the console's queue, guest memory, the
//! clock page ([`clock`]), timers for parked processors ([`park`]). What the calls tell about the guest, its
//! [`Mark`]s and how often it called, is in a [`HypercallReport`].

mod clock;
mod park;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use harrier_devices::byte_output::ByteOutput;
use harrier_devices::doorbell::{Events, Hypercalls};
use harrier_devices::state::BadState;
use harrier_hypercall_abi::calls::{ClockResult, MARKS_MAX, MemRange, PHASES, ParkArgs};
use harrier_hypercall_abi::port::event;
use harrier_hypercall_abi::{Status, features};

pub(crate) use clock::GuestClock;
pub(crate) use park::ParkTimer;

use crate::builder::MAX_VCPUS;
use crate::memory::{GuestRam, ReleaseError};
use crate::run_control::{MachineEnd, RunControl};

/// How long a CONSOLE call waits for a sink that is slower than the guest. Short, because the call holds up the
/// processor that makes it, and a pause with it.
const CONSOLE_WAIT: Duration = Duration::from_millis(1);

/// A moment that the guest has marked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// The phase that began, a number of [`PHASES`]; 0 for a mark of the guest's own.
    pub phase: u32,
    /// The guest's name for it, printable ASCII; may be empty.
    pub name: String,
    /// A number of the guest's.
    pub value: u64,
    /// When the call was made.
    pub at: Instant,
}

impl Mark {
    /// The guest's name for it, else the phase's.
    pub fn label(&self) -> String {
        let phase = PHASES.iter().find(|(phase, ..)| *phase == self.phase);
        match phase {
            Some((phase, name, _)) if self.name.is_empty() || *phase != 0 => {
                let name = name.to_ascii_lowercase().replace('_', "-");
                if self.name.is_empty() { name } else { format!("{name} {}", self.name) }
            }
            _ => self.name.clone(),
        }
    }
}

/// What the guest's calls have told.
#[derive(Debug, Clone, Default)]
pub struct HypercallReport {
    /// The guest's marks in their order, at most [`MARKS_MAX`].
    pub marks: Vec<Mark>,
    /// CONSOLE calls.
    pub console_calls: u64,
    /// PARK calls.
    pub parks: u64,
    /// Bytes of memory that the guest has given back.
    pub released_bytes: u64,
}

/// The report in the making; clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct HypercallLog {
    report: Arc<Mutex<HypercallReport>>,
}

impl HypercallLog {
    fn lock(&self) -> MutexGuard<'_, HypercallReport> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn report(&self) -> HypercallReport {
        self.lock().clone()
    }
}

/// The console's queue as CONSOLE calls use it; clones share it.
#[derive(Clone)]
pub(crate) struct ConsoleCalls {
    bytes: ByteOutput,
    events: Events,
    /// A call took less than all, and the guest has not been told of room since.
    refused: Arc<AtomicBool>,
}

impl ConsoleCalls {
    pub(crate) fn new(bytes: ByteOutput, events: Events) -> Self {
        ConsoleCalls { bytes, events, refused: Arc::default() }
    }

    fn write(&self, bytes: &[u8]) -> usize {
        let taken = self.bytes.push_slice(bytes, CONSOLE_WAIT);
        if taken < bytes.len() {
            self.refused.store(true, Ordering::SeqCst);
            // Room that came before the note was made is told of by nobody else.
            if self.bytes.has_room() {
                self.has_room();
            }
        }
        taken
    }

    /// Tells the guest that there is room, if it was refused.
    pub(crate) fn has_room(&self) {
        if self.refused.swap(false, Ordering::SeqCst) {
            self.events.raise(event::CONSOLE_ROOM);
        }
    }
}

/// The machine behind the doorbell.
pub(crate) struct MachineCalls {
    pub(crate) console: Option<ConsoleCalls>,
    pub(crate) clock: Arc<GuestClock>,
    pub(crate) park: ParkTimer,
    pub(crate) ram: GuestRam,
    pub(crate) control: Arc<RunControl>,
    pub(crate) log: HypercallLog,
}

impl Hypercalls for MachineCalls {
    fn features(&self) -> u64 {
        let console = if self.console.is_some() { features::CONSOLE } else { 0 };
        console | features::MARK | features::CLOCK | features::PARK | features::MEM_RELEASE | features::EXIT
    }

    fn console(&mut self, bytes: &[u8]) -> usize {
        self.log.lock().console_calls += 1;
        self.console.as_ref().map_or(0, |console| console.write(bytes))
    }

    fn mark(&mut self, phase: u32, name: &str, value: u64) -> Result<(), Status> {
        let at = Instant::now();
        let mut report = self.log.lock();
        if report.marks.len() >= MARKS_MAX {
            return Err(Status::Full);
        }
        report.marks.push(Mark { phase, name: name.to_owned(), value, at });
        Ok(())
    }

    fn clock(&mut self, tsc: u64) -> Result<ClockResult, Status> {
        self.clock.publish(tsc)
    }

    fn park(&mut self, park: &ParkArgs) {
        self.log.lock().parks += 1;
        if let Ok(vector @ 1..) = u8::try_from(park.vector) {
            self.park.wake_after(park.apic_id, vector, park.timeout_ns);
        }
    }

    fn release(&mut self, range: MemRange) -> Result<(), Status> {
        match self.ram.release(range.gpa, range.len) {
            Ok(()) => {
                self.log.lock().released_bytes += range.len;
                Ok(())
            }
            Err(ReleaseError::NotMemory) => Err(Status::BadPointer),
            Err(ReleaseError::Host(err)) => {
                log::warn!("memory that the guest gives back is kept: {err}");
                Err(Status::HostFailed)
            }
        }
    }

    fn save(&self) -> serde_json::Value {
        serde_json::json!({ "parked": self.park.save(), "clock_page": self.clock.save() })
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), BadState> {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Saved {
            /// APIC id, nanoseconds left, vector.
            parked: Vec<(u32, u64, u8)>,
            /// Sequence and generation.
            clock_page: Option<(u32, u64)>,
        }
        let Saved { parked, clock_page } = serde::Deserialize::deserialize(state)
            .map_err(|err: serde_json::Error| BadState(err.to_string()))?;
        BadState::unless(parked.len() <= MAX_VCPUS as usize, || format!("{} parked vCPUs", parked.len()))?;
        for (apic_id, left_ns, vector) in parked {
            self.park.wake_after(apic_id, vector, left_ns.min(u64::MAX - 1));
        }
        self.clock.restore(clock_page);
        Ok(())
    }

    fn exit(&mut self, code: u8, reason: u32, message: &str) {
        self.control.finish(MachineEnd::GuestExit { code, reason, message: message.to_owned() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_called_by_its_phase_and_its_own_name() {
        let mark = |phase, name: &str| Mark { phase, name: name.to_owned(), value: 0, at: Instant::now() };
        for (mark, label) in [
            (mark(1, ""), "kernel"),
            (mark(9, ""), "work-begin"),
            (mark(9, "step 2"), "work-begin step 2"),
            (mark(0, "loaded"), "loaded"),
        ] {
            assert_eq!(mark.label(), label);
        }
    }
}
