//! Model-specific registers.

use harrier_engine::EngineError;
use harrier_engine::cpu_state::SAVED_MSRS;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::host::refused;

/// Those of [`SAVED_MSRS`] that this KVM has.
pub(super) fn available(vcpu: &VcpuFd) -> Result<Vec<u32>, EngineError> {
    let mut found = Vec::new();
    for &index in SAVED_MSRS {
        if read(vcpu, &[index])?.len() == 1 {
            found.push(index);
        } else {
            log::debug!("kvm: msr {index:#x} is not among the host's");
        }
    }
    Ok(found)
}

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, EngineError> {
    Msrs::from_entries(entries)
        .map_err(|err| EngineError::State { field: "msrs", reason: format!("too many ({err:?})") })
}

/// Reads registers; the answer ends before the first that KVM does not have.
pub(super) fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, EngineError> {
    let entries: Vec<_> =
        indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut msrs = list(&entries)?;
    let count = vcpu.get_msrs(&mut msrs).map_err(refused("read model-specific registers"))?;
    Ok(msrs.as_slice().iter().take(count).map(|entry| (entry.index, entry.data)).collect())
}

/// Writes registers one by one in order; answers which ones KVM refused.
pub(super) fn write(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<Vec<u32>, EngineError> {
    let mut refused_ones = Vec::new();
    let mut rest = values;
    while !rest.is_empty() {
        let entries: Vec<_> =
            rest.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
        let done = vcpu.set_msrs(&list(&entries)?).map_err(refused("write model-specific registers"))?;
        if let Some((index, _)) = rest.get(done) {
            refused_ones.push(*index);
        }
        rest = rest.get(done + 1..).unwrap_or_default();
    }
    Ok(refused_ones)
}
