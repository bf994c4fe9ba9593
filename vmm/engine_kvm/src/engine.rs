//! The engine: opens KVM anew for every question, so nothing stale is remembered.

use std::path::PathBuf;
use std::sync::Arc;

use harrier_engine::user_mode::UserMode;
use harrier_engine::{CpuModel, Engine, EngineError, Probe, Vm, VmConfig};

use crate::probe::{self, Host};
use crate::user::KvmUserMode;
use crate::vm::KvmVm;
use crate::{cpuid, host};

/// Hardware virtualization by the host's KVM.
#[derive(Debug, Clone)]
pub struct KvmEngine {
    path: PathBuf,
}

impl Default for KvmEngine {
    fn default() -> Self {
        KvmEngine { path: probe::default_path() }
    }
}

impl KvmEngine {
    /// An engine over another device than `/dev/kvm`.
    #[must_use]
    pub fn with_device(path: PathBuf) -> Self {
        KvmEngine { path }
    }

    /// User mode on the processor for a machine that runs everything else in software.
    ///
    /// # Errors
    /// [`EngineError`] if KVM is not usable.
    pub fn create_user_mode(&self) -> Result<Arc<dyn UserMode>, EngineError> {
        Ok(Arc::new(KvmUserMode::new(&self.open()?)?))
    }

    fn open(&self) -> Result<Host, EngineError> {
        probe::open(&self.path)
            .map_err(|missing| EngineError::Unavailable { engine: self.name(), reason: missing.to_string() })
    }
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn probe(&self) -> Probe {
        // Whether the processor's virtualization is free shows only when a VM is created.
        match probe::open(&self.path).and_then(|host| host.create_vm().map(drop)) {
            Ok(()) => {
                Probe::Available { detail: format!("hardware virtualization by {}", self.path.display()) }
            }
            Err(missing) => Probe::Unavailable { reason: missing.to_string() },
        }
    }

    fn cpu_models(&self) -> Vec<CpuModel> {
        let supported = probe::open(&self.path).ok().and_then(|host| cpuid::supported(&host.kvm).ok());
        supported.map_or_else(Vec::new, |supported| cpuid::models(&supported))
    }

    fn create_vm(&self, config: &VmConfig) -> Result<Box<dyn Vm>, EngineError> {
        let opened = self.open()?;
        let most = opened.kvm.get_max_vcpus().min(255);
        if config.vcpu_count == 0 || config.vcpu_count as usize > most {
            return Err(EngineError::State {
                field: "vcpu count",
                reason: format!(
                    "{} is not between 1 and {most}, the most that KVM offers",
                    config.vcpu_count
                ),
            });
        }
        let supported = cpuid::supported(&opened.kvm).map_err(host::refused("ask KVM for its CPUID"))?;
        cpuid::check_model(config.cpu_model, &supported)?;
        Ok(Box::new(KvmVm::new(&opened, config, supported)?))
    }
}
