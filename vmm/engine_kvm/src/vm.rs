//! One virtual machine of KVM: memory, interrupt routes, clock and the making of vCPUs.
//!
//! The interrupt model is split: local APICs in the kernel, the I/O APIC above the seam. [`Shared`] is what the
//! vCPUs keep of their machine.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use harrier_engine::assist::{Assistant, SoftwareEngine};
use harrier_engine::{EngineError, GsiRoute, GuestRegion, Msi, Vcpu, Vm, VmConfig};
use kvm_bindings::{
    CpuId, KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_SPLIT_IRQCHIP,
    KVM_IRQ_ROUTING_MSI, KVM_X86_QUIRK_LINT0_REENABLED, KvmIrqRouting, kvm_clock_data, kvm_enable_cap,
    kvm_irq_routing_entry, kvm_msi,
};
use kvm_ioctls::{Cap, IoEventAddress, VcpuFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use crate::host::refused;
use crate::probe::Host;
use crate::slots::Slots;
use crate::state::StateAccess;
use crate::vcpu::KvmVcpu;
use crate::{cpuid, dirty, kick};

/// Pins of the I/O APIC.
const GSI_COUNT: u64 = 24;
/// Trigger mode in the data of a message (Intel SDM volume 3, 12.11.2).
const MSI_LEVEL: u32 = 1 << 15;
/// Four pages below 4 GiB that KVM needs on Intel processors without unrestricted guest mode: one with an
/// identity page table, three with a task state segment. No device and no memory is there.
const IDENTITY_MAP_GPA: u64 = 0xfffb_c000;
const TSS_GPA: usize = 0xfffb_d000;

/// What a machine's vCPUs need of it.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) fd: VmFd,
    slots: Mutex<Slots>,
    /// Vectors of the level-triggered interrupt routes.
    level_vectors: Mutex<Vec<u8>>,
    /// How the state of a vCPU is read and written on this host.
    pub(crate) access: StateAccess,
    /// Bytes of each vCPU's shared page.
    pub(crate) run_page_bytes: usize,
}

impl Shared {
    pub(crate) fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Vectors of the level-triggered interrupt routes.
    pub(crate) fn level_vectors(&self) -> Vec<u8> {
        self.level_vectors.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A machine of the KVM engine.
pub(crate) struct KvmVm {
    shared: Arc<Shared>,
    config: VmConfig,
    supported: CpuId,
    tsc_khz: u32,
    /// Who finishes what KVM cannot.
    assistant: Option<Box<dyn Assistant>>,
    /// vCPU 0, made together with the machine: some things only a vCPU can be asked.
    boot_vcpu: Mutex<Option<VcpuFd>>,
    /// The paravirtual clock while guest time stands still.
    stopped_at_ns: Mutex<Option<u64>>,
}

fn enable(vm: &VmFd, cap: u32, argument: u64) -> Result<(), errno::Error> {
    vm.enable_cap(&kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..Default::default() })
}

impl KvmVm {
    pub(crate) fn new(
        host: &Host,
        config: &VmConfig,
        supported: CpuId,
        software: Option<&dyn SoftwareEngine>,
    ) -> Result<KvmVm, EngineError> {
        kick::install_handler()?;
        let fd = host
            .create_vm()
            .map_err(|missing| EngineError::Unavailable { engine: "kvm", reason: missing.to_string() })?;
        if fd.check_extension(Cap::SetIdentityMapAddr) {
            fd.set_identity_map_address(IDENTITY_MAP_GPA).map_err(refused("place the identity map"))?;
        }
        fd.set_tss_address(TSS_GPA).map_err(refused("place the task state segment"))?;
        enable(&fd, KVM_CAP_SPLIT_IRQCHIP, GSI_COUNT).map_err(refused("split the interrupt controllers"))?;
        if fd.check_extension_raw(KVM_CAP_EXIT_ON_EMULATION_FAILURE.into()) > 0 {
            enable(&fd, KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)
                .map_err(refused("ask for the bytes of instructions that fail"))?;
        }
        // Without this, KVM leaves LINT0 of the bootstrap processor open after RESET, unlike the manual.
        let quirk = KVM_X86_QUIRK_LINT0_REENABLED;
        if fd.check_extension_raw(KVM_CAP_DISABLE_QUIRKS2.into()) as u32 & quirk != 0 {
            enable(&fd, KVM_CAP_DISABLE_QUIRKS2, quirk.into()).map_err(refused("turn a quirk of KVM off"))?;
        }
        let boot_vcpu = fd.create_vcpu(0).map_err(refused("create vCPU 0"))?;
        let tsc_khz = choose_tsc(&boot_vcpu, config.tsc_khz)?;
        let run_page_bytes = host.kvm.get_vcpu_mmap_size().map_err(refused("ask for the size of kvm_run"))?;
        let access = StateAccess::new(&supported, &fd, &boot_vcpu, tsc_khz)?;
        let assistant = match software {
            Some(software) => {
                Some(software.create_assistant(&VmConfig { tsc_khz: Some(tsc_khz), ..config.clone() })?)
            }
            None => None,
        };
        let slots = Slots::new(fd_slots(&fd), fd.check_extension(Cap::ReadonlyMem));
        Ok(KvmVm {
            stopped_at_ns: Mutex::new(None),
            shared: Arc::new(Shared {
                fd,
                slots: Mutex::new(slots),
                level_vectors: Mutex::default(),
                access,
                run_page_bytes,
            }),
            config: config.clone(),
            supported,
            tsc_khz,
            assistant,
            boot_vcpu: Mutex::new(Some(boot_vcpu)),
        })
    }
}

impl KvmVm {
    fn set_clock(&self, clock_ns: u64) -> Result<(), EngineError> {
        // Without KVM_CLOCK_REALTIME: that would let guest time jump by the time that the machine was paused.
        let data = kvm_clock_data { clock: clock_ns, ..Default::default() };
        self.shared.fd.set_clock(&data).map_err(refused("set the paravirtual clock"))
    }
}

fn fd_slots(fd: &VmFd) -> usize {
    usize::try_from(fd.check_extension_int(Cap::NrMemslots)).unwrap_or(0).max(32)
}

/// Brings the vCPU's TSC to the frequency that was asked for, and says which one it has.
fn choose_tsc(vcpu: &VcpuFd, wanted: Option<u32>) -> Result<u32, EngineError> {
    let own = vcpu.get_tsc_khz().map_err(refused("ask for the frequency of the TSC"))?;
    match wanted {
        Some(khz) if khz != own => match vcpu.set_tsc_khz(khz) {
            Ok(()) => Ok(khz),
            Err(err) => {
                log::warn!(
                    "kvm: the TSC stays at {own} kHz instead of {khz} kHz ({err}): guest time is right only by the \
                     paravirtual clock"
                );
                Ok(own)
            }
        },
        _ => Ok(own),
    }
}

impl Vm for KvmVm {
    fn map_memory(&self, region: Arc<GuestRegion>, read_only: bool) -> Result<(), EngineError> {
        if let Some(assistant) = &self.assistant {
            assistant.map_memory(Arc::clone(&region), read_only)?;
        }
        self.shared.slots().map(&self.shared.fd, region, read_only)
    }

    fn unmap_memory(&self, gpa: u64) -> Result<(), EngineError> {
        self.shared.slots().unmap(&self.shared.fd, gpa)?;
        self.assistant.as_ref().map_or(Ok(()), |assistant| assistant.unmap_memory(gpa))
    }

    fn sync_dirty_pages(&self) -> Result<(), EngineError> {
        dirty::sync(&self.shared.fd, &mut self.shared.slots())
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        if index >= self.config.vcpu_count {
            return Err(EngineError::State {
                field: "vcpu index",
                reason: format!("{index} is not below the machine's {} vCPUs", self.config.vcpu_count),
            });
        }
        let made = if index == 0 {
            self.boot_vcpu.lock().unwrap_or_else(PoisonError::into_inner).take()
        } else {
            None
        };
        let fd = match made {
            Some(fd) => fd,
            None => {
                let fd = self.shared.fd.create_vcpu(index.into()).map_err(refused("create a vCPU"))?;
                choose_tsc(&fd, Some(self.tsc_khz))?;
                fd
            }
        };
        let cpuid = cpuid::for_vcpu(&self.supported, &self.config, index, self.tsc_khz)?;
        fd.set_cpuid2(&cpuid).map_err(refused("set the CPUID of a vCPU"))?;
        let assistant = match &self.assistant {
            Some(assistant) => Some(assistant.create_vcpu(index)?),
            None => None,
        };
        Ok(Box::new(KvmVcpu::new(Arc::clone(&self.shared), fd, index, assistant)?))
    }

    fn send_msi(&self, msi: Msi) -> Result<(), EngineError> {
        let message = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        match self.shared.fd.signal_msi(message) {
            Ok(_) => Ok(()),
            // No local APIC is at the destination: on hardware the message is lost as well.
            Err(err) if err.errno() == libc::EPERM => Ok(()),
            Err(err) => Err(refused("deliver an interrupt message")(err)),
        }
    }

    fn signal_stores(&self, gpa: u64, value: u32, event: &EventFd) -> Result<bool, EngineError> {
        if !self.shared.fd.check_extension(Cap::Ioeventfd) {
            return Ok(false);
        }
        match self.shared.fd.register_ioevent(event, &IoEventAddress::Mmio(gpa), value) {
            Ok(()) => Ok(true),
            Err(err) => {
                // A limit of KVM's, or a host without it: the store exits.
                log::debug!("kvm: stores to {gpa:#x} exit: no event for them ({err})");
                Ok(false)
            }
        }
    }

    fn set_gsi_routes(&self, routes: &[GsiRoute]) -> Result<(), EngineError> {
        let entries: Vec<kvm_irq_routing_entry> = routes
            .iter()
            .map(|route| {
                let mut entry = kvm_irq_routing_entry {
                    gsi: route.gsi,
                    type_: KVM_IRQ_ROUTING_MSI,
                    ..Default::default()
                };
                entry.u.msi.address_lo = route.msi.address as u32;
                entry.u.msi.address_hi = (route.msi.address >> 32) as u32;
                entry.u.msi.data = route.msi.data;
                entry
            })
            .collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|err| EngineError::State {
            field: "interrupt routes",
            reason: format!("{} of them are too many ({err:?})", routes.len()),
        })?;
        self.shared.fd.set_gsi_routing(&table).map_err(refused("set the interrupt routes"))?;
        let level = routes.iter().filter(|route| route.msi.data & MSI_LEVEL != 0);
        *self.shared.level_vectors.lock().unwrap_or_else(PoisonError::into_inner) =
            level.map(|route| route.msi.data as u8).collect();
        Ok(())
    }

    fn clock_ns(&self) -> Result<u64, EngineError> {
        if let Some(stopped_at) = *self.stopped_at_ns.lock().unwrap_or_else(PoisonError::into_inner) {
            return Ok(stopped_at);
        }
        Ok(self.shared.fd.get_clock().map_err(refused("read the paravirtual clock"))?.clock)
    }

    fn set_clock_ns(&self, clock_ns: u64) -> Result<(), EngineError> {
        if let Some(stopped_at) = &mut *self.stopped_at_ns.lock().unwrap_or_else(PoisonError::into_inner) {
            *stopped_at = clock_ns;
        }
        self.set_clock(clock_ns)
    }

    fn stop_time(&self) -> Result<(), EngineError> {
        let now = self.clock_ns()?;
        *self.stopped_at_ns.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
        Ok(())
    }

    /// The TSC ran on meanwhile, which not every host lets us take back: deadlines that passed fire at once, and the
    /// guest finds by its clock that it is early and arms them again.
    fn start_time(&self) -> Result<(), EngineError> {
        let stopped_at = self.stopped_at_ns.lock().unwrap_or_else(PoisonError::into_inner).take();
        stopped_at.map_or(Ok(()), |clock_ns| self.set_clock(clock_ns))
    }

    fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }
}
