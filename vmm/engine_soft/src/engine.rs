//! The engine itself: always there, on any host.

use std::sync::Arc;

use harrier_engine::assist::{Assistant, SoftwareEngine};
use harrier_engine::user_mode::UserMode;
use harrier_engine::{CpuModel, Engine, EngineError, Probe, Vm, VmConfig};

use crate::assist::SoftAssistant;
use crate::native::thunk;
use crate::vm::SoftVm;

/// Why there is no engine where executable memory is forbidden.
fn no_thunks(answer: &str) -> String {
    format!(
        "floating-point and vector instructions need executable memory, which the host refused ({answer}): allow \
         memfd_create and executable mappings, and leave it memory and open files"
    )
}

/// The software engine.
#[derive(Debug, Default, Clone, Copy)]
pub struct SoftEngine;

impl SoftwareEngine for SoftEngine {
    fn cpu_models(&self) -> Vec<CpuModel> {
        let all = crate::cpuid::supported_models().into_iter();
        all.filter(|&model| crate::cpuid::check_lent_model(model).is_ok()).collect()
    }

    fn create_assistant(&self, config: &VmConfig) -> Result<Box<dyn Assistant>, EngineError> {
        let offered = SoftwareEngine::cpu_models(self);
        // A processor that is the host's own is served as far as the best model goes.
        let cpu_model = match config.cpu_model {
            CpuModel::Host => offered.into_iter().max().unwrap_or(CpuModel::V1),
            model => model,
        };
        let config = VmConfig { cpu_model, ..config.clone() };
        check(&config)?;
        Ok(Box::new(SoftAssistant::new(&config)))
    }

    fn create_lending_vm(
        &self,
        config: &VmConfig,
        user_mode: Arc<dyn UserMode>,
    ) -> Result<Box<dyn Vm>, EngineError> {
        check(config)?;
        crate::cpuid::check_lent_model(config.cpu_model)?;
        Ok(Box::new(SoftVm::new(config, Some(user_mode))))
    }
}

fn check(config: &VmConfig) -> Result<(), EngineError> {
    if !(1..=255).contains(&config.vcpu_count) {
        return Err(EngineError::State {
            field: "vcpu count",
            reason: format!("{} is not between 1 and 255", config.vcpu_count),
        });
    }
    crate::cpuid::check_model(config.cpu_model)?;
    // This also maps the memory before system calls are filtered.
    thunk::available()
        .map_err(|answer| EngineError::Unavailable { engine: "soft", reason: no_thunks(answer) })
}

impl Engine for SoftEngine {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn probe(&self) -> Probe {
        if let Err(answer) = thunk::available() {
            return Probe::Unavailable { reason: no_thunks(answer) };
        }
        Probe::Available { detail: "software processor, on any host, slower than hardware".to_owned() }
    }

    fn cpu_models(&self) -> Vec<CpuModel> {
        crate::cpuid::supported_models()
    }

    fn enforces_cpu_model(&self) -> bool {
        true
    }

    fn create_vm(&self, config: &VmConfig) -> Result<Box<dyn Vm>, EngineError> {
        check(config)?;
        Ok(Box::new(SoftVm::new(config, None)))
    }
}
