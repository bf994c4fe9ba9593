//! Single instructions for another engine ([`harrier_engine::assist`]).
//!
//! The assistant is a machine of its own over the same memory. It begins each instruction with empty look-aside
//! buffers, since nobody tells it what the guest changed meanwhile.

use std::sync::Arc;

use harrier_engine::assist::{Assistant, AssistantVcpu, Assisted};
use harrier_engine::{CpuState, EngineError, Exit, GuestRegion, Io, Vcpu, Vm, VmConfig};

use crate::vcpu::SoftVcpu;
use crate::vm::SoftVm;

/// The assistants of one machine.
pub(crate) struct SoftAssistant {
    vm: SoftVm,
}

impl SoftAssistant {
    pub(crate) fn new(config: &VmConfig) -> SoftAssistant {
        SoftAssistant { vm: SoftVm::new(config, None) }
    }
}

impl Assistant for SoftAssistant {
    fn map_memory(&self, region: Arc<GuestRegion>, read_only: bool) -> Result<(), EngineError> {
        self.vm.map_memory(region, read_only)
    }

    fn unmap_memory(&self, gpa: u64) -> Result<(), EngineError> {
        self.vm.unmap_memory(gpa)
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn AssistantVcpu>, EngineError> {
        Ok(Box::new(SoftAssistantVcpu(self.vm.vcpu(index)?.for_single_instructions())))
    }
}

struct SoftAssistantVcpu(SoftVcpu);

impl AssistantVcpu for SoftAssistantVcpu {
    fn execute(&mut self, state: &mut CpuState, io: &mut dyn Io) -> Result<Assisted, EngineError> {
        // What waits to be delivered waits for the other engine.
        let waiting = std::mem::take(&mut state.events);
        self.0.set_state(state)?;
        let exit = self.0.run_one(io);
        let done = match exit {
            None => Assisted::Done { leave: false },
            Some(Exit::Left) => Assisted::Done { leave: true },
            Some(Exit::TripleFault) => Assisted::TripleFault,
            Some(Exit::Unsupported { reason, .. }) => {
                state.events = waiting;
                return Ok(Assisted::Unsupported(reason));
            }
            Some(other) => {
                state.events = waiting;
                return Ok(Assisted::Unsupported(format!("the software processor ended by {other:?}")));
            }
        };
        *state = self.0.state()?;
        state.events.nmi_pending |= waiting.nmi_pending;
        // An instruction other than IRET leaves the mask as it was.
        state.events.nmi_masked |= waiting.nmi_masked;
        Ok(done)
    }
}
