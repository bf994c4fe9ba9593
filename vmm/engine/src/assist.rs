//! Instructions that one engine cannot finish, executed by another.
//!
//! A KVM meets instructions that neither the processor nor its emulator executes for it. It hands the state over,
//! the other engine executes the one instruction, faults and device accesses included, and hands the state back.
//! The traits keep the two engines apart; whoever builds the machine brings them together.

use std::sync::Arc;

use crate::user_mode::UserMode;
use crate::{CpuModel, CpuState, EngineError, GuestRegion, Io, Vm, VmConfig};

/// How the execution of one instruction ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Assisted {
    /// It was executed, or its fault delivered.
    Done {
        /// A device said that the run is to end.
        leave: bool,
    },
    /// Delivering its fault ended the processor.
    TripleFault,
    /// The assistant cannot execute it either; the state is as it was.
    Unsupported(String),
}

/// Executes single instructions for the vCPU that it was created for.
pub trait AssistantVcpu: Send {
    /// Executes the next instruction of `state`, which a processor of the machine's model can be in.
    fn execute(&mut self, state: &mut CpuState, io: &mut dyn Io) -> Result<Assisted, EngineError>;
}

/// What the assistants of one machine share.
pub trait Assistant: Send + Sync {
    /// Makes `region` known.
    fn map_memory(&self, region: Arc<GuestRegion>, read_only: bool) -> Result<(), EngineError>;
    /// Forgets the region that starts at `gpa`.
    fn unmap_memory(&self, gpa: u64) -> Result<(), EngineError>;
    /// Creates the assistant of a vCPU.
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn AssistantVcpu>, EngineError>;
}

/// A software engine in the service of another one.
pub trait SoftwareEngine: Send + Sync {
    /// The CPU models that it offers on this host, lowest first.
    fn cpu_models(&self) -> Vec<CpuModel>;
    /// Creates the assistant of a machine that has this configuration and a TSC of this frequency.
    fn create_assistant(&self, config: &VmConfig) -> Result<Box<dyn Assistant>, EngineError>;
    /// Creates a machine without memory and vCPUs that lends its user code to `user_mode`; its TSC is the host's.
    fn create_lending_vm(
        &self,
        config: &VmConfig,
        user_mode: Arc<dyn UserMode>,
    ) -> Result<Box<dyn Vm>, EngineError>;
}
