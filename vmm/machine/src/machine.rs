//! The running machine and what its owner can do with it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use harrier_devices::doorbell::{Doorbell, Events};
use harrier_devices::{InterruptLine, StateUnit};
use harrier_engine::{Counters, CpuState, EngineError, GuestMemory, Vm};
use harrier_hypercall_abi::{features, port::event};

use crate::builder::MachineConfig;
use crate::event_loop::{EventLoop, Subscriber};
use crate::generation_id::GenerationId;
use crate::hypercalls::{HypercallLog, HypercallReport, Lives, OnCheckpoint};
use crate::memory::GuestRam;
use crate::run_control::{MachineEnd, RunControl};
use crate::snapshot::{Identity, Role, Written};
use crate::vcpu::{self, MachineIo, SharedVcpu};

/// A machine whose processors may run. Dropping it ends it and waits for its threads.
pub struct Machine {
    pub(crate) parts: Arc<Parts>,
    pub(crate) io: MachineIo,
    pub(crate) control: Arc<RunControl>,
    pub(crate) subscribers: Vec<Subscriber>,
    pub(crate) threads: Vec<JoinHandle<()>>,
    pub(crate) event_loop: Option<EventLoop>,
    /// Ends after the processors: what the guest printed last is still written.
    pub(crate) attachments: Vec<Box<dyn Send>>,
    pub(crate) hypercalls: HypercallLog,
    pub(crate) doorbell_events: Events,
    pub(crate) power_button: Arc<dyn InterruptLine>,
    pub(crate) generation_id: Option<GenerationId>,
    pub(crate) on_thread_start: OnThreadStart,
}

/// What a machine is made of, and what a snapshot is made from.
pub(crate) struct Parts {
    pub(crate) config: MachineConfig,
    /// Name of the engine that runs it.
    pub(crate) engine: &'static str,
    /// Whether that engine holds the guest to its CPU model.
    pub(crate) cpu_model_enforced: bool,
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) ram: GuestRam,
    pub(crate) vcpus: Vec<SharedVcpu>,
    /// Everything with a state besides memory and vCPUs, in the order in which it is restored.
    pub(crate) units: Vec<Arc<dyn StateUnit>>,
    /// The guest's TSC frequency when it booted, in kHz: what it still believes.
    pub(crate) boot_tsc_khz: u32,
    /// Who the machine is.
    pub(crate) identity: Identity,
    /// Which pages were written since when.
    pub(crate) written: Mutex<Written>,
    pub(crate) lives: Arc<Lives>,
    pub(crate) doorbell: Option<Arc<Mutex<Doorbell>>>,
}

impl Parts {
    pub(crate) fn cpu_states(&self) -> Result<Vec<CpuState>, EngineError> {
        self.vcpus.iter().map(|vcpu| vcpu.lock().unwrap_or_else(PoisonError::into_inner).state()).collect()
    }
}

/// Why a machine's threads do not start.
#[derive(Debug, thiserror::Error)]
#[error(
    "the host has no thread for {what} ({source}): use fewer processors, or raise the limits of processes and open files"
)]
pub struct StartError {
    /// What it was for.
    pub what: String,
    /// The host's answer.
    pub source: std::io::Error,
}

/// What a run has been.
#[derive(Debug, Clone)]
pub struct RunReport {
    /// How it ended.
    pub end: MachineEnd,
    /// What each vCPU counted.
    pub counters: Vec<Counters>,
    /// When the first vCPU began to run.
    pub first_instruction: Option<Instant>,
    /// What the guest told by hypercalls.
    pub hypercalls: HypercallReport,
}

impl RunReport {
    /// Instructions of all vCPUs, where the engine counts them.
    pub fn instructions(&self) -> Option<u64> {
        self.counters.iter().map(|counters| counters.instructions).sum()
    }

    /// Device accesses of all vCPUs.
    pub fn io_accesses(&self) -> u64 {
        self.counters.iter().map(|counters| counters.io_accesses).sum()
    }
}

/// Reaches a machine from other threads; clones reach the same one.
#[derive(Clone)]
pub struct MachineHandle {
    pub(crate) control: Arc<RunControl>,
    hypercalls: HypercallLog,
    doorbell_events: Events,
    power_button: Arc<dyn InterruptLine>,
    /// Gone when the machine is.
    pub(crate) parts: Weak<Parts>,
}

impl MachineHandle {
    /// Ends the run as [`MachineEnd::Stopped`], unless it has ended already. Does not wait.
    pub fn stop(&self) {
        self.control.finish(MachineEnd::Stopped);
    }

    /// Stops all vCPUs at an instruction boundary and waits until they stand. Pauses nest. False if the
    /// machine has ended.
    pub fn pause(&self) -> bool {
        self.control.pause()
    }

    /// Takes back one [`MachineHandle::pause`].
    pub fn resume(&self) {
        self.control.resume();
    }

    /// Presses the power button, by which a guest that knows ACPI goes down in order. Other guests do not notice.
    pub fn press_power_button(&self) {
        self.power_button.pulse();
    }

    /// Waits for the end of the run, at most until `deadline`.
    pub fn wait_for_end(&self, deadline: Option<Instant>) -> Option<MachineEnd> {
        self.control.wait_for_end(deadline)
    }

    /// When the first vCPU began to run.
    pub fn first_instruction(&self) -> Option<Instant> {
        self.control.first_instruction()
    }

    /// Signals events to the guest: bits of [`harrier_hypercall_abi::port::event`]. They stay pending, with the
    /// doorbell's interrupt, until the guest clears them.
    pub fn signal_guest(&self, events: u32) {
        self.doorbell_events.raise(events);
    }

    /// Ends the CHECKPOINT call for which the owner was asked: the snapshot is there, or there is none. The guest's call
    /// returns, and its processor goes on.
    pub fn checkpoint_done(&self, is_there: bool) {
        let Some(parts) = self.parts.upgrade() else { return };
        if let Some(doorbell) = &parts.doorbell {
            let mut doorbell = doorbell.lock().unwrap_or_else(PoisonError::into_inner);
            if is_there { doorbell.checkpoint_done() } else { doorbell.checkpoint_failed() }
        }
        self.control.release_held();
    }

    /// What the guest has told by hypercalls so far.
    pub fn hypercalls(&self) -> HypercallReport {
        self.hypercalls.report()
    }
}

/// What a thread of a machine is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadRole {
    /// Runs a vCPU and, inside it, the devices that answer at once.
    Vcpu,
    /// Runs the event loop: disks, sockets, console.
    Events,
}

/// Called at the start of every thread of a machine, in that thread, before the guest can reach it. An error
/// ends the machine.
pub type OnThreadStart = Arc<dyn Fn(ThreadRole) -> std::io::Result<()> + Send + Sync>;

impl Machine {
    /// Sets what every thread does first: the place for a system-call filter. To be called before
    /// [`Machine::start`].
    pub fn on_thread_start(&mut self, hook: OnThreadStart) {
        self.on_thread_start = hook;
    }

    /// Offers the guest CHECKPOINT calls, for which `ask` is called. To be called once, before [`Machine::start`].
    pub fn on_checkpoint(&mut self, ask: OnCheckpoint) {
        // Only the first one counts.
        let _ = self.parts.lives.on_checkpoint.set(ask);
    }

    /// Tells the guest of a machine that was made of a snapshot that it is another one: by the doorbell if it has asked for
    /// that, otherwise by ACPI. Who asks does by the one what the other is for, and ACPI takes a millisecond in software.
    /// Interrupts are sent here, since the state of the processors is there now.
    fn announce(&self) {
        if self.parts.identity.role == Role::Booted {
            return;
        }
        let lives = &self.parts.lives;
        if lives.guest_features.load(Ordering::Acquire) & features::IDENTITY != 0 {
            self.doorbell_events.raise(event::GENERATION);
        } else if let Some(id) = &self.generation_id {
            id.announce();
        }
        lives.quiesce.end();
    }

    /// Starts the event loop and all vCPUs. Until then the machine is a paused one; a [`MachineHandle::pause`] before
    /// keeps it so.
    ///
    /// # Errors
    /// [`StartError`] if the host has no threads; the machine has then ended.
    pub fn start(&mut self) -> Result<(), StartError> {
        let result = self.try_start();
        if result.is_err() {
            self.control.finish(MachineEnd::Stopped);
        }
        result
    }

    fn try_start(&mut self) -> Result<(), StartError> {
        let subscribers = std::mem::take(&mut self.subscribers);
        let event_loop =
            EventLoop::start(subscribers, Arc::clone(&self.control), Arc::clone(&self.on_thread_start))
                .map_err(|source| StartError { what: "the event loop".to_owned(), source })?;
        self.event_loop = Some(event_loop);
        for (vcpu, index) in self.parts.vcpus.iter().zip(0..) {
            let thread = vcpu::spawn(
                index,
                Arc::clone(vcpu),
                self.io.clone(),
                Arc::clone(&self.control),
                Arc::clone(&self.on_thread_start),
            )
            .map_err(|source| StartError { what: format!("vcpu {index}"), source })?;
            self.threads.push(thread);
        }
        self.announce();
        self.control.resume();
        Ok(())
    }

    /// A handle for other threads.
    pub fn handle(&self) -> MachineHandle {
        MachineHandle {
            control: Arc::clone(&self.control),
            hypercalls: self.hypercalls.clone(),
            doorbell_events: self.doorbell_events.clone(),
            power_button: Arc::clone(&self.power_button),
            parts: Arc::downgrade(&self.parts),
        }
    }

    /// Who the machine is.
    pub fn identity(&self) -> Identity {
        self.parts.identity
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.parts.ram.memory
    }

    /// The engine's side of the machine.
    pub fn vm(&self) -> &Arc<dyn Vm> {
        &self.parts.vm
    }

    /// The state of each vCPU. The machine must not run: before [`Machine::start`], paused or ended; otherwise
    /// this waits until it stands.
    ///
    /// # Errors
    /// The engine's, if it cannot read a state.
    pub fn cpu_states(&self) -> Result<Vec<CpuState>, EngineError> {
        self.parts.cpu_states()
    }

    /// Waits for the end of the run and for all threads.
    pub fn wait(mut self) -> RunReport {
        let end = self.control.wait_for_end(None);
        self.join();
        RunReport {
            end: end.unwrap_or(MachineEnd::Stopped),
            counters: self
                .parts
                .vcpus
                .iter()
                .map(|vcpu| vcpu.lock().unwrap_or_else(PoisonError::into_inner).counters())
                .collect(),
            first_instruction: self.control.first_instruction(),
            hypercalls: self.hypercalls.report(),
        }
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..) {
            // A panic in it has been reported as the machine's end.
            let _ = thread.join();
        }
        self.event_loop = None;
        self.attachments.clear();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.control.finish(MachineEnd::Stopped);
        self.join();
    }
}
