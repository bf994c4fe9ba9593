//! Guest memory as KVM's memory slots.
//!
//! [`Slots`] keeps every mapped region alive until KVM has let go of it. Pages that vCPUs write are logged only
//! after [`Slots::log_writes`]: logging costs a fault for each first write and splits huge pages.
#![expect(unsafe_code, reason = "hands the addresses of mapped guest memory to KVM")]

use std::collections::BTreeMap;
use std::sync::Arc;

use harrier_engine::memory::PAGE_SIZE;
use harrier_engine::{EngineError, GuestRegion};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryRegion};

/// One region that KVM has mapped.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) number: u32,
    pub(crate) region: Arc<GuestRegion>,
    read_only: bool,
}

impl Slot {
    /// Whether vCPUs can write it.
    pub(crate) fn is_logged(&self) -> bool {
        !self.read_only
    }
}

/// All regions of a machine, by their guest physical address.
#[derive(Debug)]
pub(crate) struct Slots {
    by_gpa: BTreeMap<u64, Slot>,
    /// How many KVM can hold.
    limit: usize,
    logging: bool,
    read_only_possible: bool,
}

fn refuse(gpa: u64, size_bytes: u64, reason: impl Into<String>) -> EngineError {
    EngineError::Memory { gpa, size_bytes, reason: reason.into() }
}

impl Slots {
    pub(crate) fn new(limit: usize, read_only_possible: bool) -> Slots {
        Slots { by_gpa: BTreeMap::new(), limit, logging: false, read_only_possible }
    }

    /// The regions with their slot numbers.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.by_gpa.values()
    }

    /// Reads guest memory; false where there is none.
    pub(crate) fn read(&self, gpa: u64, bytes: &mut [u8]) -> bool {
        let Some((_, slot)) = self.by_gpa.range(..=gpa).next_back() else { return false };
        let at = slot.region.to_region_addr(GuestAddress(gpa));
        at.is_some_and(|at| slot.region.read_slice(bytes, at).is_ok())
    }

    /// Whether KVM logs writes already.
    pub(crate) fn logging(&self) -> bool {
        self.logging
    }

    /// Maps a region.
    pub(crate) fn map(
        &mut self,
        vm: &VmFd,
        region: Arc<GuestRegion>,
        read_only: bool,
    ) -> Result<(), EngineError> {
        let (gpa, size_bytes) = (region.start_addr().raw_value(), region.len());
        let end = gpa
            .checked_add(size_bytes)
            .ok_or_else(|| refuse(gpa, size_bytes, "its end is beyond 64 bits"))?;
        let page = PAGE_SIZE as u64;
        if size_bytes == 0 || gpa % page != 0 || size_bytes % page != 0 {
            return Err(refuse(gpa, size_bytes, "start and size must be multiples of 4096 and not zero"));
        }
        if self.by_gpa.range(..end).next_back().is_some_and(|(&start, slot)| start + slot.region.len() > gpa)
        {
            return Err(refuse(gpa, size_bytes, "it overlaps a region that is mapped already"));
        }
        if read_only && !self.read_only_possible {
            return Err(refuse(
                gpa,
                size_bytes,
                "this KVM has no read-only memory (capability READONLY_MEM)",
            ));
        }
        let used = |number: &u32| self.by_gpa.values().any(|slot| slot.number == *number);
        let number = (0..u32::try_from(self.limit).unwrap_or(u32::MAX))
            .find(|number| !used(number))
            .ok_or_else(|| refuse(gpa, size_bytes, format!("KVM holds at most {} regions", self.limit)))?;
        let slot = Slot { number, region, read_only };
        self.tell(vm, &slot, size_bytes)?;
        self.by_gpa.insert(gpa, slot);
        Ok(())
    }

    /// Unmaps the region that starts at `gpa`.
    pub(crate) fn unmap(&mut self, vm: &VmFd, gpa: u64) -> Result<(), EngineError> {
        let slot = self.by_gpa.get(&gpa).ok_or_else(|| refuse(gpa, 0, "no region starts there"))?;
        self.tell(vm, slot, 0)?;
        self.by_gpa.remove(&gpa);
        Ok(())
    }

    /// Lets KVM log from now on which pages vCPUs write.
    pub(crate) fn log_writes(&mut self, vm: &VmFd) -> Result<(), EngineError> {
        self.logging = true;
        self.by_gpa.values().try_for_each(|slot| self.tell(vm, slot, slot.region.len()))
    }

    /// Tells KVM about a slot; size 0 deletes it.
    fn tell(&self, vm: &VmFd, slot: &Slot, size_bytes: u64) -> Result<(), EngineError> {
        let gpa = slot.region.start_addr().raw_value();
        let mut flags = 0;
        if slot.read_only {
            flags |= KVM_MEM_READONLY;
        } else if self.logging && size_bytes != 0 {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        let description = kvm_userspace_memory_region {
            slot: slot.number,
            flags,
            guest_phys_addr: gpa,
            memory_size: size_bytes,
            userspace_addr: slot.region.as_ptr() as u64,
        };
        // SAFETY: the region's mapping has `size_bytes` bytes and is kept alive by the slot until KVM has been
        // told to delete it, or by the last owner of the VM's descriptor.
        unsafe { vm.set_user_memory_region(description) }.map_err(|err| {
            refuse(gpa, slot.region.len(), format!("KVM refused it ({err}): give the guest less memory"))
        })
    }
}
