//! The traits of the seam and the small values that cross it.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::{CpuModel, CpuState, GuestRegion};

/// What an engine can do on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// The engine runs here.
    Available {
        /// One line for people: what it is and what it costs.
        detail: String,
    },
    /// The engine cannot run here.
    Unavailable {
        /// One line for people: why, and what would change it.
        reason: String,
    },
}

/// Why an engine could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The engine does not run on this host.
    #[error("the {engine} engine is not available: {reason}")]
    Unavailable {
        /// The engine's name.
        engine: &'static str,
        /// Why, and what would change it.
        reason: String,
    },
    /// The engine or the host lacks features of the CPU model.
    #[error("cpu model {model} needs features that are missing here: {missing}")]
    ModelUnsupported {
        /// The model that was asked for.
        model: CpuModel,
        /// The missing features, separated by spaces.
        missing: String,
    },
    /// A memory region cannot be mapped or unmapped.
    #[error("guest memory at {gpa:#x} ({size_bytes} bytes): {reason}")]
    Memory {
        /// Guest physical address of the region.
        gpa: u64,
        /// Length of the region in bytes.
        size_bytes: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A CPU state that the engine cannot take.
    #[error("cpu state: {field}: {reason}")]
    State {
        /// The part of [`CpuState`] that is wrong.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The host refused something.
    #[error("the host refused to {what} ({source}): {}", remedy(.source))]
    Host {
        /// What was being done, as a verb in the infinitive.
        what: &'static str,
        /// The host's answer.
        source: std::io::Error,
    },
}

/// What helps against an answer of the host, as far as its number says.
fn remedy(source: &std::io::Error) -> &'static str {
    // errno(3) on x86-64.
    const ENOMEM: i32 = 12;
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    match source.raw_os_error() {
        Some(ENOMEM) => "free memory on the host, or give the guest less",
        Some(ENFILE | EMFILE) => "raise the limit of open files",
        _ => "use a newer kernel on the host, or the other engine",
    }
}

/// What every virtual machine of an engine is created with.
#[derive(Debug, Clone)]
pub struct VmConfig {
    /// The processor that the guest sees.
    pub cpu_model: CpuModel,
    /// Number of vCPUs, 1 to 255; vCPU `n` has APIC id `n`.
    pub vcpu_count: u32,
    /// Guest TSC frequency in kHz; `None` lets the engine choose the one that is cheapest for it.
    pub tsc_khz: Option<u32>,
}

/// A software processor or a hardware one.
pub trait Engine: Send + Sync {
    /// `kvm` or `soft`.
    fn name(&self) -> &'static str;
    /// Looks whether the engine runs here, without creating anything that lasts.
    fn probe(&self) -> Probe;
    /// The CPU models that this engine offers on this host, lowest first.
    fn cpu_models(&self) -> Vec<CpuModel>;
    /// Whether a guest has no more of a processor than its model, whatever it does. Where user code runs on a processor
    /// that shows itself as it is, the guest's own programs have to keep to the model.
    fn enforces_cpu_model(&self) -> bool;
    /// Creates a machine without memory and vCPUs.
    fn create_vm(&self, config: &VmConfig) -> Result<Box<dyn Vm>, EngineError>;
}

/// A message-signalled interrupt in the format of Intel SDM volume 3, section 12.11 (x2APIC destinations
/// above 255 are not used).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Msi {
    /// Address, `0xfee0_0000` and the destination fields.
    pub address: u64,
    /// Vector, delivery mode and trigger mode.
    pub data: u32,
}

/// Which message an IOAPIC pin sends. KVM needs to know it to report the end of level interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GsiRoute {
    /// Global system interrupt number.
    pub gsi: u32,
    /// The message, as the redirection entry describes it.
    pub msi: Msi,
}

/// One virtual machine: guest memory and interrupts that all its vCPUs share.
pub trait Vm: Send + Sync {
    /// Makes `region` visible at its guest physical address. Regions are page aligned and do not overlap.
    fn map_memory(&self, region: Arc<GuestRegion>, read_only: bool) -> Result<(), EngineError>;
    /// Takes away the region that starts at `gpa`.
    fn unmap_memory(&self, gpa: u64) -> Result<(), EngineError>;
    /// Marks in each region's [`crate::PageLog`] the pages that vCPUs wrote since the last call and that are
    /// not marked yet. An engine whose writes go through the page log has nothing to do.
    fn sync_dirty_pages(&self) -> Result<(), EngineError>;
    /// Creates the vCPU with APIC id `index`, in the state after RESET: vCPU 0 is the bootstrap processor,
    /// the others wait for SIPI.
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError>;
    /// Delivers a message-signalled interrupt. Never blocks.
    fn send_msi(&self, msi: Msi) -> Result<(), EngineError>;
    /// Asks for `event` to be signalled by each 4-byte store of `value` to `gpa`, where no memory is, in place of a call of
    /// [`Io::mmio_write`]: the vCPU goes on at once. It may be done so or by the call, store by store. False: always by the
    /// call.
    fn signal_stores(&self, gpa: u64, value: u32, event: &EventFd) -> Result<bool, EngineError> {
        let (_, _, _) = (gpa, value, event);
        Ok(false)
    }
    /// Replaces the table of IOAPIC routes.
    fn set_gsi_routes(&self, routes: &[GsiRoute]) -> Result<(), EngineError>;
    /// Nanoseconds on the guest's paravirtual clock.
    fn clock_ns(&self) -> Result<u64, EngineError>;
    /// Sets the guest's paravirtual clock; guest time goes on from `clock_ns`.
    fn set_clock_ns(&self, clock_ns: u64) -> Result<(), EngineError>;
    /// Guest time stands still from here on, as far as the engine makes it: paravirtual clock, timers, and the TSC
    /// where it is not the host's own. No vCPU runs. Calls do not nest.
    fn stop_time(&self) -> Result<(), EngineError>;
    /// Guest time goes on where [`Vm::stop_time`] stopped it. No vCPU runs yet.
    fn start_time(&self) -> Result<(), EngineError>;
    /// Has `idle` called, from a vCPU's thread, when a vCPU has slept for some tenths of a second and sleeps on: what only
    /// a running guest needs can be given back. Only the first one counts, and an engine whose vCPUs sleep in the
    /// host's kernel calls none.
    fn on_idle(&self, idle: Box<dyn Fn() + Send + Sync>) {
        drop(idle);
    }
    /// The frequency at which the guest's TSC runs.
    fn tsc_khz(&self) -> u32;
}

/// What a device tells the engine after an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Flow {
    /// Go on with the next instruction.
    Continue,
    /// Complete this instruction, then return [`Exit::Left`] from run.
    Leave,
    /// Complete this instruction, then wait as after HLT: until an interrupt is pending that the vCPU takes.
    Halt,
}

/// The outside of a processor: what it reaches by port, by address and by end-of-interrupt message.
///
/// Widths are 1, 2, 4 or 8 bytes, little endian (8 only for MMIO). An access that no device answers reads as
/// all ones and writes nothing.
pub trait Io {
    /// IN.
    fn pio_read(&mut self, port: u16, data: &mut [u8]) -> Flow;
    /// OUT.
    fn pio_write(&mut self, port: u16, data: &[u8]) -> Flow;
    /// A load from an address without memory.
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) -> Flow;
    /// A store to an address without memory.
    fn mmio_write(&mut self, gpa: u64, data: &[u8]) -> Flow;
    /// A local APIC has ended the level-triggered interrupt `vector`.
    fn eoi(&mut self, vector: u8) -> Flow;
}

/// Why [`Vcpu::run`] returned. Every return is an instruction boundary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// A device answered [`Flow::Leave`].
    Left,
    /// The vCPU's [`Kicker`] was used.
    Kicked,
    /// The engine says that the machine has shut down, other than by a triple fault.
    Shutdown,
    /// A fault while delivering a double fault: the processor stopped (Intel SDM volume 3, 6.15).
    TripleFault,
    /// A debug facet's breakpoint or single step.
    Breakpoint,
    /// The engine cannot go on with this instruction.
    Unsupported {
        /// Where it stands.
        rip: u64,
        /// Its bytes, as far as they could be read; at most 15.
        bytes: Vec<u8>,
        /// What could not be done, for people.
        reason: String,
    },
}

/// What a vCPU has counted since it was created.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Instructions retired, where the engine can count them.
    pub instructions: Option<u64>,
    /// Times that another engine had to finish an instruction.
    pub assists: u64,
    /// Times that user code ran on the host's processor for a software engine.
    pub loans: u64,
    /// Device accesses (port, memory and end-of-interrupt).
    pub io_accesses: u64,
    /// Times that cached translations of guest code were thrown away because the code was written.
    pub code_invalidations: u64,
}

/// One virtual processor; it lives on one thread at a time.
pub trait Vcpu: Send {
    /// Runs the guest until something above the seam has to act. HLT and waiting for SIPI wait inside.
    fn run(&mut self, io: &mut dyn Io) -> Exit;
    /// A handle with which other threads make [`Vcpu::run`] return [`Exit::Kicked`].
    fn kicker(&self) -> Arc<dyn Kicker>;
    /// The whole architectural state, in canonical form.
    fn state(&mut self) -> Result<CpuState, EngineError>;
    /// The time-stamp counter, without the rest of the state.
    fn tsc(&mut self) -> Result<u64, EngineError> {
        Ok(self.state()?.tsc.value)
    }
    /// Replaces the whole architectural state.
    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError>;
    /// What was counted so far.
    fn counters(&self) -> Counters;
}

/// Interrupts a vCPU's run from any thread.
pub trait Kicker: Send + Sync {
    /// Makes the current run, or the next one if none is under way, return [`Exit::Kicked`] soon.
    fn kick(&self);
}
