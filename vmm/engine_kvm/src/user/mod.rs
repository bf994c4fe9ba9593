//! User mode on the processor for the software engine, on hosts whose KVM emulates kernel mode
//! (see [`harrier_engine::user_mode`]).
//!
//! - [`KvmUserMode`]: a VM without interrupt controllers that has the machine's memory.
//! - [`processor`]: a vCPU that runs user code, and what it does when something else comes.
//! - [`pages`]: which pages it has in which address space.
//! - [`code`]: the instructions that it must not execute there.
//! - [`tables`]: the page tables that it runs on. They are our own, not the guest's: KVM's shadow of the guest's
//!   would not notice what the software engine writes to them.

mod code;
mod pages;
mod processor;
mod tables;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use harrier_engine::memory::PAGE_SIZE;
use harrier_engine::user_mode::{UserMode, UserProcessor};
use harrier_engine::{CpuModel, EngineError, GuestRegion};
use kvm_bindings::CpuId;
use kvm_ioctls::{Cap, VcpuFd, VmFd};

use crate::host::refused;
use crate::probe::Host;
use crate::slots::Slots;
use crate::{cpuid, kick};
use code::Forbidden;
use processor::KvmUserProcessor;

/// User mode of one machine.
#[derive(Debug)]
pub(crate) struct KvmUserMode {
    shared: Arc<Shared>,
    supported: CpuId,
    forbidden: Forbidden,
    tsc_khz: u32,
    /// vCPU 0, made together with the VM: only a vCPU knows the frequency of its TSC.
    first: Mutex<Option<VcpuFd>>,
}

/// What the processors share.
#[derive(Debug)]
struct Shared {
    fd: VmFd,
    slots: Mutex<Slots>,
    run_page_bytes: usize,
}

impl Shared {
    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The content of the page at this guest physical address.
    fn page(&self, gpa: u64) -> Option<Vec<u8>> {
        let mut bytes = vec![0; PAGE_SIZE];
        self.slots().read(gpa, &mut bytes).then_some(bytes)
    }
}

impl KvmUserMode {
    /// Creates the VM for a machine of this model; `supported` is what KVM can show a guest.
    pub(crate) fn new(host: &Host, supported: CpuId, model: CpuModel) -> Result<KvmUserMode, EngineError> {
        kick::install_handler()?;
        let fd = host
            .create_vm()
            .map_err(|missing| EngineError::Unavailable { engine: "kvm", reason: missing.to_string() })?;
        let run_page_bytes = host.kvm.get_vcpu_mmap_size().map_err(refused("ask for the size of kvm_run"))?;
        let limit = usize::try_from(fd.check_extension_int(Cap::NrMemslots)).unwrap_or(0).max(32);
        let slots = Slots::new(limit, fd.check_extension(Cap::ReadonlyMem));
        let first = fd.create_vcpu(0).map_err(refused("create vCPU 0"))?;
        let tsc_khz = first.get_tsc_khz().map_err(refused("ask for the frequency of the TSC"))?;
        let forbidden = Forbidden { xsave: cpuid::saves_more_than(model, &supported) };
        Ok(KvmUserMode {
            shared: Arc::new(Shared { fd, slots: Mutex::new(slots), run_page_bytes }),
            supported,
            forbidden,
            tsc_khz,
            first: Mutex::new(Some(first)),
        })
    }
}

impl UserMode for KvmUserMode {
    fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    fn map_memory(&self, region: Arc<GuestRegion>, read_only: bool) -> Result<(), EngineError> {
        self.shared.slots().map(&self.shared.fd, region, read_only)
    }

    fn unmap_memory(&self, gpa: u64) -> Result<(), EngineError> {
        self.shared.slots().unmap(&self.shared.fd, gpa)
    }

    fn create_processor(&self, index: u32) -> Result<Box<dyn UserProcessor>, EngineError> {
        let made = self.first.lock().unwrap_or_else(PoisonError::into_inner).take_if(|_| index == 0);
        let fd = match made {
            Some(fd) => fd,
            None => self.shared.fd.create_vcpu(index.into()).map_err(refused("create a vCPU"))?,
        };
        fd.set_cpuid2(&self.supported).map_err(refused("set the CPUID of a vCPU"))?;
        let components = cpuid::xsave_components(&self.supported);
        Ok(Box::new(KvmUserProcessor::new(Arc::clone(&self.shared), fd, index, components, self.forbidden)?))
    }
}
