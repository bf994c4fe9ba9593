//! The engine: opens KVM anew for every question. As long as an engine lives it remembers that it could be used and
//! what was measured of kernel mode, and longer nothing.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use harrier_engine::assist::SoftwareEngine;
use harrier_engine::user_mode::UserMode;
use harrier_engine::{CpuModel, Engine, EngineError, Probe, Vm, VmConfig};
use kvm_bindings::CpuId;

use crate::probe::{self, Host};
use crate::user::KvmUserMode;
use crate::vm::KvmVm;
use crate::{Calibration, calibrate, cpuid, host};

/// Hardware virtualization by the host's KVM.
///
/// On a host whose KVM emulates kernel mode it runs user code only, and needs an engine that runs the rest:
/// [`KvmEngine::with_software`]. Without one it takes such a KVM as it is, slow and with gaps.
#[derive(Clone)]
pub struct KvmEngine {
    path: PathBuf,
    software: Option<Arc<dyn SoftwareEngine>>,
    /// Kernel mode is KVM's, whatever it does with it.
    kvm_alone: bool,
    /// Whether kernel mode runs on the processor, once it was measured.
    in_hardware: Arc<OnceLock<bool>>,
    /// A VM could be created.
    usable: Arc<OnceLock<()>>,
    /// What KVM can show a guest, once it was asked: it executes CPUID for each leaf, which inside a virtual machine is slow.
    supported: Arc<OnceLock<CpuId>>,
}

impl Default for KvmEngine {
    fn default() -> Self {
        KvmEngine::with_device(probe::default_path())
    }
}

impl KvmEngine {
    /// An engine over another device than `/dev/kvm`.
    #[must_use]
    pub fn with_device(path: PathBuf) -> Self {
        KvmEngine {
            path,
            software: None,
            kvm_alone: false,
            in_hardware: Arc::default(),
            usable: Arc::default(),
            supported: Arc::default(),
        }
    }

    /// Lets `software` run kernel mode where this host's KVM does not run it on the processor, and finish the
    /// instructions that KVM cannot where it does.
    #[must_use]
    pub fn with_software(mut self, software: Arc<dyn SoftwareEngine>) -> Self {
        self.software = Some(software);
        self
    }

    /// Like [`KvmEngine::with_software`], but `software` finishes only the instructions that KVM cannot, on every
    /// host. For measuring, and for trying that out.
    #[must_use]
    pub fn with_assistant(mut self, software: Arc<dyn SoftwareEngine>) -> Self {
        self.software = Some(software);
        self.kvm_alone = true;
        self
    }

    /// Measures how fast this host's KVM is, and remembers where it runs kernel mode as long as the engine lives.
    ///
    /// # Errors
    /// [`EngineError::Unavailable`] if KVM is not usable; any other if it is faulty.
    pub fn calibrate(&self) -> Result<Calibration, EngineError> {
        let found = calibrate::measure(self)?;
        // Whoever was first has measured the same.
        let _ = self.in_hardware.set(found.kernel_mode_in_hardware);
        let _ = self.usable.set(());
        Ok(found)
    }

    /// Whether this host's KVM runs kernel mode on the processor. Shows in a millisecond or two that it runs a guest at all.
    ///
    /// # Errors
    /// [`EngineError::Unavailable`] if KVM is not usable; any other if it is faulty.
    pub fn runs_kernel_mode(&self) -> Result<bool, EngineError> {
        let found = calibrate::kernel_mode_in_hardware(self)?;
        let _ = self.usable.set(());
        Ok(*self.in_hardware.get_or_init(|| found))
    }

    /// Names of the KVM capabilities that are missing here and would be used if they were there; the engine does
    /// without them.
    ///
    /// # Errors
    /// [`EngineError::Unavailable`] if KVM is not usable, with the names of those that it cannot do without.
    pub fn missing_capabilities(&self) -> Result<Vec<&'static str>, EngineError> {
        Ok(probe::unused_capabilities(&self.open()?))
    }

    /// The engine that has to run kernel mode here, if one has to.
    fn kernel_mode(&self) -> Option<&Arc<dyn SoftwareEngine>> {
        let software = self.software.as_ref().filter(|_| !self.kvm_alone)?;
        (!self.kernel_mode_in_hardware()).then_some(software)
    }

    fn kernel_mode_in_hardware(&self) -> bool {
        match self.in_hardware.get() {
            Some(&known) => known,
            None => self.runs_kernel_mode().unwrap_or_else(|err| {
                log::warn!("kvm: kernel mode could not be measured: {err}");
                false
            }),
        }
    }

    /// User mode on the processor for a machine of this model that runs everything else in software.
    ///
    /// # Errors
    /// [`EngineError`] if KVM is not usable.
    pub fn create_user_mode(&self, model: CpuModel) -> Result<Arc<dyn UserMode>, EngineError> {
        let host = self.open()?;
        let supported = self.supported(&host)?;
        Ok(Arc::new(KvmUserMode::new(&host, supported, model)?))
    }

    /// The same KVM with nothing but KVM.
    pub(crate) fn without_software(&self) -> KvmEngine {
        KvmEngine { software: None, kvm_alone: false, ..self.clone() }
    }

    fn supported(&self, host: &Host) -> Result<CpuId, EngineError> {
        if let Some(known) = self.supported.get() {
            return Ok(known.clone());
        }
        let found = cpuid::supported(&host.kvm).map_err(host::refused("ask KVM for its CPUID"))?;
        Ok(self.supported.get_or_init(|| found).clone())
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
        let found = match self.usable.get() {
            // It shows again when the machine is created.
            Some(()) => Ok(()),
            // Whether the processor's virtualization is free shows only when a VM is created.
            None => probe::open(&self.path).and_then(|host| host.create_vm().map(drop)),
        };
        match found {
            Ok(()) => {
                let _ = self.usable.set(());
                Probe::Available { detail: format!("hardware virtualization by {}", self.path.display()) }
            }
            Err(missing) => Probe::Unavailable { reason: missing.to_string() },
        }
    }

    fn cpu_models(&self) -> Vec<CpuModel> {
        let supported = match self.supported.get() {
            Some(known) => Some(known.clone()),
            None => self.open().and_then(|host| self.supported(&host)).ok(),
        };
        let Some(supported) = supported else { return Vec::new() };
        match self.kernel_mode() {
            Some(software) => software.cpu_models(),
            None => cpuid::models(&supported),
        }
    }

    fn enforces_cpu_model(&self) -> bool {
        // A KVM that emulates kernel mode runs user code with the host's CPUID, XCR0 and instructions.
        self.kernel_mode_in_hardware()
    }

    fn create_vm(&self, config: &VmConfig) -> Result<Box<dyn Vm>, EngineError> {
        if let Some(software) = self.kernel_mode() {
            return software.create_lending_vm(config, self.create_user_mode(config.cpu_model)?);
        }
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
        let supported = self.supported(&opened)?;
        cpuid::check_model(config.cpu_model, &supported)?;
        Ok(Box::new(KvmVm::new(&opened, config, supported, self.software.as_deref())?))
    }
}
