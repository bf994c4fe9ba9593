//! What a vCPU shows by CPUID: the seam's table for the named models, KVM's own list for `host`.

use harrier_engine::cpuid::{EAX, EBX, ECX, EDX, FEATURES, Features, leaf, leaves};
use harrier_engine::{CpuModel, EngineError, VmConfig};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use vmm_sys_util::errno;

use crate::state::Component;

/// Features that KVM provides on every processor, or that only say something and add no instruction.
const NOT_THE_PROCESSORS: &[Features] = &[
    Features::HYPERVISOR,
    Features::X2APIC,
    Features::TSC_DEADLINE,
    Features::TSC_ADJUST,
    Features::ARAT,
    Features::ERMS,
    Features::FSRM,
    Features::TOPOEXT,
    Features::INVARIANT_TSC,
    Features::FP_ERROR_POINTERS,
    Features::LFENCE_SERIALIZES,
    Features::NULL_CLEARS_BASE,
];

/// Leaf with the paravirtual features of KVM.
const KVM_FEATURES: u32 = 0x4000_0001;
/// Extended topology by APIC id.
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];
const XSAVE_AREA: u32 = 0xd;

/// What KVM can show on this host.
pub(crate) fn supported(kvm: &Kvm) -> Result<CpuId, errno::Error> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
}

fn answer(entry: &kvm_cpuid_entry2) -> [u32; 4] {
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

/// Features of `model` that the host lacks, by name.
fn missing(model: CpuModel, supported: &CpuId) -> Vec<&'static str> {
    if model == CpuModel::Host {
        return Vec::new();
    }
    let shown = |leaf: u32, register: usize, bit: u32| {
        let mut entries = supported.as_slice().iter();
        entries.any(|entry| {
            entry.function == leaf
                && entry.index == 0
                && answer(entry).get(register).is_some_and(|value| value >> bit & 1 != 0)
        })
    };
    // Some features have a bit in two leaves, one of them on AMD's processors only.
    let there = |feature: Features| {
        FEATURES.iter().any(|row| row.feature == feature && shown(row.leaf, row.register, row.bit))
    };
    let mut names: Vec<_> = FEATURES
        .iter()
        .filter(|row| row.model <= model && !NOT_THE_PROCESSORS.contains(&row.feature) && !there(row.feature))
        .map(|row| row.name)
        .collect();
    names.dedup();
    names
}

/// The models that this host offers, lowest first.
pub(crate) fn models(supported: &CpuId) -> Vec<CpuModel> {
    let all = [CpuModel::V1, CpuModel::V2, CpuModel::V3, CpuModel::Host];
    all.into_iter().filter(|&model| missing(model, supported).is_empty()).collect()
}

/// Refuses a model whose features the host lacks.
pub(crate) fn check_model(model: CpuModel, supported: &CpuId) -> Result<(), EngineError> {
    let missing = missing(model, supported);
    if missing.is_empty() {
        return Ok(());
    }
    Err(EngineError::ModelUnsupported { model, missing: missing.join(" ") })
}

/// The CPUID of one vCPU.
pub(crate) fn for_vcpu(
    supported: &CpuId,
    config: &VmConfig,
    id: u32,
    tsc_khz: u32,
) -> Result<CpuId, EngineError> {
    let entries = match config.cpu_model {
        CpuModel::Host => host_entries(supported, id, config.vcpu_count),
        _ => model_entries(config, id, tsc_khz),
    };
    CpuId::from_entries(&entries).map_err(|err| EngineError::State {
        field: "cpuid",
        reason: format!("{} leaves are too many ({err:?})", entries.len()),
    })
}

fn model_entries(config: &VmConfig, id: u32, tsc_khz: u32) -> Vec<kvm_cpuid_entry2> {
    let entry = |(function, index, indexed)| {
        let values = leaf(config, id, tsc_khz, function, index);
        kvm_cpuid_entry2 {
            function,
            index,
            flags: if indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: values[EAX],
            ebx: values[EBX],
            ecx: values[ECX],
            edx: values[EDX],
            ..Default::default()
        }
    };
    leaves(config.cpu_model).into_iter().map(entry).collect()
}

/// KVM's list with this vCPU's APIC id, and without a topology of the host's.
fn host_entries(supported: &CpuId, id: u32, count: u32) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> =
        supported.as_slice().iter().filter(|entry| !TOPOLOGY.contains(&entry.function)).copied().collect();
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xff00 | id << 24 | count << 16;
                // TSC deadline is KVM's own, a hypervisor is there, and there may be siblings.
                entry.ecx |= 1 << 24 | 1 << 31;
                entry.edx = entry.edx & !(1 << 28) | u32::from(count > 1) << 28;
            }
            // One thread a core: ids of cores that share this cache, of cores in the package.
            4 => entry.eax = entry.eax & 0x3fff | (count - 1).min(63) << 26,
            KVM_FEATURES => entry.eax &= 1 << 3 | 1 << 24,
            0x8000_0008 => entry.ecx = (count - 1) | count.next_power_of_two().trailing_zeros() << 12,
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            _ => {}
        }
    }
    let one = VmConfig { cpu_model: CpuModel::V1, vcpu_count: count, tsc_khz: None };
    entries.extend((0..3).map(|index| {
        let values = leaf(&one, id, 0, TOPOLOGY[0], index);
        kvm_cpuid_entry2 {
            function: TOPOLOGY[0],
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: values[EAX],
            ebx: values[EBX],
            ecx: values[ECX],
            edx: values[EDX],
            ..Default::default()
        }
    }));
    entries
}

/// Where the components of the XSAVE area are in the standard layout (Intel SDM volume 1, 13.4.2).
pub(crate) fn xsave_components(supported: &CpuId) -> Vec<Component> {
    let entries = supported.as_slice().iter();
    entries
        .filter(|entry| entry.function == XSAVE_AREA && entry.index >= 2 && entry.index < 63)
        // Bit 0 of ECX: a component that only supervisor software saves, in no standard layout.
        .filter(|entry| entry.ecx & 1 == 0 && entry.eax != 0)
        .map(|entry| Component { bit: entry.index, offset: entry.ebx as usize, size: entry.eax as usize })
        .collect()
}

/// Whether XSAVE of this processor saves more than a model of it shows. Under a KVM that emulates kernel mode, XCR0 of user
/// code is the host's and cannot be changed, and such an XSAVE writes past the end of what a program made room for; the C
/// library's dynamic linker has one.
pub(crate) fn saves_more_than(model: CpuModel, supported: &CpuId) -> bool {
    /// x87, SSE and AVX: components 0 to 2.
    const LAST_OF_V3: u32 = 2;
    model == CpuModel::V3 && xsave_components(supported).iter().any(|component| component.bit > LAST_OF_V3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_with_avx512_saves_more_than_the_third_model_knows_of() {
        let entries = |more: &[(u32, u32)]| {
            let components = [(2, 576)].iter().chain(more);
            let entries: Vec<_> = components
                .map(|&(index, offset)| kvm_bindings::kvm_cpuid_entry2 {
                    function: XSAVE_AREA,
                    index,
                    eax: 256,
                    ebx: offset,
                    ..Default::default()
                })
                .collect();
            CpuId::from_entries(&entries).unwrap()
        };
        let masks_of_avx512 = entries(&[(5, 1088)]);
        assert!(!saves_more_than(CpuModel::V3, &entries(&[])));
        assert!(saves_more_than(CpuModel::V3, &masks_of_avx512));
        // Without XSAVE in its CPUID, a program has none of them.
        assert!(!saves_more_than(CpuModel::V2, &masks_of_avx512));
    }

    fn list(entries: &[(u32, [u32; 4])]) -> CpuId {
        let entries: Vec<_> = entries
            .iter()
            .map(|&(function, [eax, ebx, ecx, edx])| kvm_cpuid_entry2 {
                function,
                eax,
                ebx,
                ecx,
                edx,
                ..Default::default()
            })
            .collect();
        CpuId::from_entries(&entries).unwrap()
    }

    #[test]
    fn a_processor_with_everything_but_avx2_offers_v2_and_says_what_v3_lacks() {
        let all = u32::MAX;
        let cpuid = list(&[(1, [all; 4]), (7, [all, !(1 << 5), all, all]), (0x8000_0001, [all; 4])]);
        assert_eq!(models(&cpuid), [CpuModel::V1, CpuModel::V2, CpuModel::Host]);
        let text = check_model(CpuModel::V3, &cpuid).unwrap_err().to_string();
        assert_eq!(text, "cpu model v3 needs features that are missing here: avx2");
    }

    #[test]
    fn bits_that_only_amd_repeats_are_not_asked_of_other_processors() {
        // An Intel processor shows of the repeated bits only SYSCALL, NX, RDTSCP and LM.
        let cpuid =
            list(&[(1, [u32::MAX; 4]), (0x8000_0001, [0, 0, 1, 1 << 11 | 1 << 20 | 1 << 27 | 1 << 29])]);
        assert!(models(&cpuid).contains(&CpuModel::V2));
    }

    #[test]
    fn the_host_model_shows_each_vcpu_its_own_id_and_no_paravirtual_feature_but_the_clock() {
        let cpuid = list(&[(1, [0, 0x1234_0800, 0, 0]), (KVM_FEATURES, [u32::MAX; 4])]);
        let entries = host_entries(&cpuid, 3, 4);
        assert_eq!(entries[0].ebx, 0x0304_0800);
        assert_eq!(entries[1].eax, 1 << 3 | 1 << 24);
        assert!(entries[2..].iter().all(|entry| entry.function == 0xb && entry.edx == 3));
    }
}
