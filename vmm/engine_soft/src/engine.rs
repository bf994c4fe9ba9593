//! The engine itself: always there, on any host.

use harrier_engine::{CpuModel, Engine, EngineError, Probe, Vm, VmConfig};

use crate::vm::SoftVm;

/// The software engine.
#[derive(Debug, Default, Clone, Copy)]
pub struct SoftEngine;

impl Engine for SoftEngine {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn probe(&self) -> Probe {
        Probe::Available { detail: "software processor, on any host, slower than hardware".to_owned() }
    }

    fn cpu_models(&self) -> Vec<CpuModel> {
        crate::cpuid::supported_models()
    }

    fn create_vm(&self, config: &VmConfig) -> Result<Box<dyn Vm>, EngineError> {
        if !(1..=255).contains(&config.vcpu_count) {
            return Err(EngineError::State {
                field: "vcpu count",
                reason: format!("{} is not between 1 and 255", config.vcpu_count),
            });
        }
        crate::cpuid::check_model(config.cpu_model)?;
        Ok(Box::new(SoftVm::new(config)))
    }
}
