//! What the machine does for the guest's hypercalls.
//!
//! [`MachineCalls`] implements the doorbell's trait with the machine's parts: the console's queue, guest memory, the
//! clock page ([`clock`]), timers for parked processors ([`park`]). What the calls tell about the guest, its
//! [`Mark`]s and how often it called, is in a [`HypercallReport`].

mod clock;
mod park;
mod quiesce;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use harrier_devices::byte_output::ByteOutput;
use harrier_devices::doorbell::{Events, Hypercalls};
use harrier_devices::state::BadState;
use harrier_hypercall_abi::calls::{
    CheckpointResult, ClockResult, DEVICE_NO_INTERRUPT, DeviceResult, IdentityResult, MARKS_MAX, MemRange,
    PHASES, ParkArgs, QuiesceResult,
};
use harrier_hypercall_abi::port::event;
use harrier_hypercall_abi::{Status, features};

pub(crate) use clock::GuestClock;
pub(crate) use park::ParkTimer;
pub(crate) use quiesce::Quiesce;
pub use quiesce::Quiesced;

use crate::builder::MAX_VCPUS;
use crate::memory::{GuestRam, ReleaseError};
use crate::run_control::{MachineEnd, RunControl};
use crate::snapshot::Identity;

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

/// Asks the machine's owner for the snapshot of a CHECKPOINT call; false if none is to be had now. Called in the vCPU's
/// thread, which stands until [`crate::MachineHandle::checkpoint_done`].
pub type OnCheckpoint = Box<dyn Fn() -> bool + Send + Sync>;

/// What calls and owner know of each other; shared by both.
pub(crate) struct Lives {
    /// Who the machine is. Set before anything is restored, or never for one that boots.
    pub(crate) identity: OnceLock<Identity>,
    pub(crate) on_checkpoint: OnceLock<OnCheckpoint>,
    pub(crate) quiesce: Quiesce,
    /// What the guest has said that it will use.
    pub(crate) guest_features: AtomicU64,
}

impl Lives {
    pub(crate) fn new(events: Events) -> Self {
        Lives {
            identity: OnceLock::new(),
            on_checkpoint: OnceLock::new(),
            quiesce: Quiesce::new(events),
            guest_features: AtomicU64::new(0),
        }
    }

    pub(crate) fn identity(&self) -> Identity {
        self.identity.get().copied().unwrap_or_default()
    }
}

/// The devices that DEVICE calls tell of, in the order in which they were added; clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct DeviceList {
    devices: Arc<Mutex<Vec<DeviceResult>>>,
}

impl DeviceList {
    /// Adds a device of a kind of [`harrier_hypercall_abi::calls::DEVICES`], with `len` ports or bytes from `base` on.
    pub(crate) fn add(&self, kind: u32, base: u64, len: u64, gsi: Option<u32>) {
        let device = DeviceResult {
            kind,
            interrupt: gsi.unwrap_or(DEVICE_NO_INTERRUPT),
            base,
            len: u32::try_from(len).unwrap_or(u32::MAX),
            reserved: 0,
        };
        self.devices.lock().unwrap_or_else(PoisonError::into_inner).push(device);
    }

    fn get(&self, index: u32) -> Option<DeviceResult> {
        let devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        devices.get(usize::try_from(index).ok()?).copied()
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
    pub(crate) lives: Arc<Lives>,
    pub(crate) devices: DeviceList,
}

impl Hypercalls for MachineCalls {
    fn features(&self) -> u64 {
        let console = if self.console.is_some() { features::CONSOLE } else { 0 };
        let checkpoint = if self.lives.on_checkpoint.get().is_some() { features::CHECKPOINT } else { 0 };
        let always = features::MARK
            | features::CLOCK
            | features::PARK
            | features::MEM_RELEASE
            | features::EXIT
            | features::QUIESCE
            | features::IDENTITY
            | features::DEVICE;
        console | checkpoint | always
    }

    fn agreed(&mut self, guest_features: u64) {
        self.lives.guest_features.store(guest_features, Ordering::Release);
        self.lives.quiesce.agreed(guest_features);
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

    fn checkpoint(&mut self) -> Result<(), Status> {
        let ask = self.lives.on_checkpoint.get().ok_or(Status::Unsupported)?;
        // Before the owner hears of it, who may be faster.
        self.control.hold_this_thread();
        if ask() {
            return Ok(());
        }
        self.control.release_held();
        Err(Status::Full)
    }

    fn who(&self) -> CheckpointResult {
        let Identity { role, generation, clone_index } = self.lives.identity();
        CheckpointResult { generation, role: role.number(), clone_index }
    }

    fn identity(&mut self) -> Result<IdentityResult, Status> {
        let CheckpointResult { generation, role, clone_index } = self.who();
        let mut entropy = [0; 32];
        let filled = rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty());
        if filled != Ok(entropy.len()) {
            log::warn!("the host gives the guest no randomness");
            return Err(Status::HostFailed);
        }
        Ok(IdentityResult { generation, role, clone_index, entropy })
    }

    fn device(&self, index: u32) -> Option<DeviceResult> {
        self.devices.get(index)
    }

    fn quiesce_wanted(&mut self) -> QuiesceResult {
        self.lives.quiesce.wanted()
    }

    fn quiesce_ready(&mut self, request: u64) -> Result<(), Status> {
        self.lives.quiesce.ready(request)
    }

    fn save(&self) -> serde_json::Value {
        serde_json::json!({
            "parked": self.park.save(),
            "clock_page": self.clock.save(),
            "quiesce": self.lives.quiesce.save(),
        })
    }

    fn restore(&mut self, state: &serde_json::Value) -> Result<(), BadState> {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Saved {
            /// APIC id, nanoseconds left, vector.
            parked: Vec<(u32, u64, u8)>,
            /// Sequence and generation.
            clock_page: Option<(u32, u64)>,
            /// The last request, and whether the guest is asked to rest.
            #[serde(default)]
            quiesce: (u64, bool),
        }
        let Saved { parked, clock_page, quiesce } = serde::Deserialize::deserialize(state)
            .map_err(|err: serde_json::Error| BadState(err.to_string()))?;
        BadState::unless(parked.len() <= MAX_VCPUS as usize, || format!("{} parked vCPUs", parked.len()))?;
        self.park.restore(parked);
        self.clock.restore(clock_page);
        self.lives.quiesce.restore(quiesce);
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
