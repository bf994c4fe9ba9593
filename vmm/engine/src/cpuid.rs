//! CPUID: what each model shows, on every engine.
//!
//! The vendor is AMD's, family 0x1a: of the vendors, Linux arms the fewest workarounds for it (no page-table
//! isolation, no errata of the family), and glibc reads its cache sizes from a few leaves. Which features a model
//! has stands in [`FEATURES`]; [`leaf`] builds the leaves that describe topology, caches and the paravirtual clock
//! from the machine's configuration.

use crate::{CpuModel, VmConfig};

/// A set of processor features, by the names of Linux.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Features(u128);

macro_rules! features {
    ($($name:ident = $bit:literal;)*) => {
        #[expect(missing_docs, reason = "the constants are features by their usual names")]
        impl Features {
            $(pub const $name: Features = Features(1 << $bit);)*
        }
    };
}

features! {
    FPU = 0; DE = 1; PSE = 2; TSC = 3; MSR = 4; PAE = 5; CX8 = 6; APIC = 7; SEP = 8; PGE = 9; CMOV = 10;
    PAT = 11; PSE36 = 12; CLFLUSH = 13; MMX = 14; FXSR = 15; SSE = 16; SSE2 = 17;
    SSE3 = 18; SSSE3 = 19; CX16 = 20; SSE4_1 = 21; SSE4_2 = 22; X2APIC = 23; POPCNT = 24; TSC_DEADLINE = 25;
    HYPERVISOR = 26; TSC_ADJUST = 27; ERMS = 28; FSRM = 29; SYSCALL = 30; NX = 31; RDTSCP = 32; LM = 33;
    LAHF = 34; TOPOEXT = 35; INVARIANT_TSC = 36; ARAT = 37;
    XSAVE = 38; AVX = 39; AVX2 = 40; BMI1 = 41; BMI2 = 42; FMA = 43; F16C = 44; MOVBE = 45; LZCNT = 46;
    SMEP = 47; SMAP = 48; UMIP = 49; FSGSBASE = 50; RDPID = 51; RDRAND = 52; RDSEED = 53; CLFLUSHOPT = 54;
    CLWB = 55; PCID = 56; INVPCID = 57; LFENCE_SERIALIZES = 59; NULL_CLEARS_BASE = 60;
    FP_ERROR_POINTERS = 61; VME = 62; AES = 63; PCLMULQDQ = 64; SHA = 65; GFNI = 66; VAES = 67; VPCLMULQDQ = 68;
    PDPE1GB = 69; XSAVEOPT = 70; XSAVEC = 71; XGETBV1 = 72; ADX = 73;
}

impl Features {
    /// The features of a model.
    pub fn of(model: CpuModel) -> Features {
        let set = FEATURES.iter().filter(|row| row.model <= model).fold(0, |set, row| set | row.feature.0);
        Features(set)
    }

    /// These features without those of `others`.
    pub fn without(self, others: Features) -> Features {
        Features(self.0 & !others.0)
    }

    /// Whether all features of `wanted` are there.
    #[inline]
    pub fn has(self, wanted: Features) -> bool {
        self.0 & wanted.0 == wanted.0
    }
}

/// Output registers in the order of the instruction's name.
/// EAX of an answer.
pub const EAX: usize = 0;
/// EBX of an answer.
pub const EBX: usize = 1;
/// ECX of an answer.
pub const ECX: usize = 2;
/// EDX of an answer.
pub const EDX: usize = 3;

/// Where CPUID shows a feature.
#[derive(Debug, Clone, Copy)]
pub struct FeatureBit {
    /// The feature.
    pub feature: Features,
    /// Its name in Linux.
    pub name: &'static str,
    /// The lowest model that has it.
    pub model: CpuModel,
    /// CPUID leaf.
    pub leaf: u32,
    /// Its subleaf.
    pub subleaf: u32,
    /// Index into the answer: [`EAX`], [`EBX`], [`ECX`] or [`EDX`].
    pub register: usize,
    /// Bit of that register.
    pub bit: u32,
}

const fn row(
    feature: Features,
    name: &'static str,
    model: CpuModel,
    leaf: u32,
    register: usize,
    bit: u32,
) -> FeatureBit {
    FeatureBit { feature, name, model, leaf, subleaf: 0, register, bit }
}

/// A way of saving registers, from leaf 0xd.
const fn xsave_row(feature: Features, name: &'static str, bit: u32) -> FeatureBit {
    FeatureBit { feature, name, model: CpuModel::Host, leaf: 0xd, subleaf: 1, register: EAX, bit }
}

/// All features with their bits (AMD APM volume 3, appendix E). What is not here is hidden.
pub const FEATURES: &[FeatureBit] = {
    use CpuModel::{Host, V1, V2, V3};
    const AMD: u32 = 0x8000_0001;
    &[
        row(Features::FPU, "fpu", V1, 1, EDX, 0),
        row(Features::DE, "de", V1, 1, EDX, 2),
        row(Features::PSE, "pse", V1, 1, EDX, 3),
        row(Features::TSC, "tsc", V1, 1, EDX, 4),
        row(Features::MSR, "msr", V1, 1, EDX, 5),
        row(Features::PAE, "pae", V1, 1, EDX, 6),
        row(Features::CX8, "cx8", V1, 1, EDX, 8),
        row(Features::APIC, "apic", V1, 1, EDX, 9),
        row(Features::SEP, "sep", V1, 1, EDX, 11),
        row(Features::PGE, "pge", V1, 1, EDX, 13),
        row(Features::CMOV, "cmov", V1, 1, EDX, 15),
        row(Features::PAT, "pat", V1, 1, EDX, 16),
        row(Features::PSE36, "pse36", V1, 1, EDX, 17),
        row(Features::CLFLUSH, "clflush", V1, 1, EDX, 19),
        row(Features::MMX, "mmx", V1, 1, EDX, 23),
        row(Features::FXSR, "fxsr", V1, 1, EDX, 24),
        row(Features::SSE, "sse", V1, 1, EDX, 25),
        row(Features::SSE2, "sse2", V1, 1, EDX, 26),
        row(Features::CX16, "cx16", V1, 1, ECX, 13),
        row(Features::X2APIC, "x2apic", V1, 1, ECX, 21),
        row(Features::TSC_DEADLINE, "tsc_deadline", V1, 1, ECX, 24),
        row(Features::HYPERVISOR, "hypervisor", V1, 1, ECX, 31),
        row(Features::ARAT, "arat", V1, 6, EAX, 2),
        row(Features::TSC_ADJUST, "tsc_adjust", V1, 7, EBX, 1),
        row(Features::ERMS, "erms", V1, 7, EBX, 9),
        row(Features::FSRM, "fsrm", V1, 7, EDX, 4),
        row(Features::FPU, "fpu", V1, AMD, EDX, 0),
        row(Features::DE, "de", V1, AMD, EDX, 2),
        row(Features::PSE, "pse", V1, AMD, EDX, 3),
        row(Features::TSC, "tsc", V1, AMD, EDX, 4),
        row(Features::MSR, "msr", V1, AMD, EDX, 5),
        row(Features::PAE, "pae", V1, AMD, EDX, 6),
        row(Features::CX8, "cx8", V1, AMD, EDX, 8),
        row(Features::APIC, "apic", V1, AMD, EDX, 9),
        row(Features::SYSCALL, "syscall", V1, AMD, EDX, 11),
        row(Features::PGE, "pge", V1, AMD, EDX, 13),
        row(Features::CMOV, "cmov", V1, AMD, EDX, 15),
        row(Features::PAT, "pat", V1, AMD, EDX, 16),
        row(Features::PSE36, "pse36", V1, AMD, EDX, 17),
        row(Features::NX, "nx", V1, AMD, EDX, 20),
        row(Features::MMX, "mmx", V1, AMD, EDX, 23),
        row(Features::FXSR, "fxsr", V1, AMD, EDX, 24),
        // Not in the psABI's levels, and there are hosts whose KVM cannot virtualize TSC_AUX.
        row(Features::RDTSCP, "rdtscp", Host, AMD, EDX, 27),
        row(Features::LM, "lm", V1, AMD, EDX, 29),
        row(Features::LAHF, "lahf_lm", V1, AMD, ECX, 0),
        row(Features::TOPOEXT, "topoext", V1, AMD, ECX, 22),
        // A machine may go on where the TSC has another frequency that cannot be scaled: a guest that takes the counter for
        // invariant would take its time from it instead of from the paravirtual clock (Linux, arch/x86/kernel/kvmclock.c).
        row(Features::INVARIANT_TSC, "constant_tsc", Host, 0x8000_0007, EDX, 8),
        row(Features::FP_ERROR_POINTERS, "xsaveerptr", V1, 0x8000_0008, EBX, 2),
        row(Features::LFENCE_SERIALIZES, "lfence_rdtsc", V1, 0x8000_0021, EAX, 2),
        row(Features::NULL_CLEARS_BASE, "null_sel_clr_base", V1, 0x8000_0021, EAX, 6),
        row(Features::SSE3, "sse3", V2, 1, ECX, 0),
        row(Features::SSSE3, "ssse3", V2, 1, ECX, 9),
        row(Features::SSE4_1, "sse4_1", V2, 1, ECX, 19),
        row(Features::SSE4_2, "sse4_2", V2, 1, ECX, 20),
        row(Features::POPCNT, "popcnt", V2, 1, ECX, 23),
        row(Features::FMA, "fma", V3, 1, ECX, 12),
        row(Features::MOVBE, "movbe", V3, 1, ECX, 22),
        row(Features::XSAVE, "xsave", V3, 1, ECX, 26),
        row(Features::AVX, "avx", V3, 1, ECX, 28),
        row(Features::F16C, "f16c", V3, 1, ECX, 29),
        row(Features::BMI1, "bmi1", V3, 7, EBX, 3),
        row(Features::AVX2, "avx2", V3, 7, EBX, 5),
        row(Features::BMI2, "bmi2", V3, 7, EBX, 8),
        row(Features::LZCNT, "lzcnt", V3, AMD, ECX, 5),
        row(Features::PCLMULQDQ, "pclmulqdq", Host, 1, ECX, 1),
        row(Features::PCID, "pcid", Host, 1, ECX, 17),
        row(Features::AES, "aes", Host, 1, ECX, 25),
        row(Features::RDRAND, "rdrand", Host, 1, ECX, 30),
        row(Features::FSGSBASE, "fsgsbase", Host, 7, EBX, 0),
        row(Features::SMEP, "smep", Host, 7, EBX, 7),
        row(Features::INVPCID, "invpcid", Host, 7, EBX, 10),
        row(Features::RDSEED, "rdseed", Host, 7, EBX, 18),
        row(Features::ADX, "adx", Host, 7, EBX, 19),
        row(Features::SMAP, "smap", Host, 7, EBX, 20),
        row(Features::CLFLUSHOPT, "clflushopt", Host, 7, EBX, 23),
        row(Features::CLWB, "clwb", Host, 7, EBX, 24),
        row(Features::SHA, "sha_ni", Host, 7, EBX, 29),
        row(Features::UMIP, "umip", Host, 7, ECX, 2),
        row(Features::GFNI, "gfni", Host, 7, ECX, 8),
        row(Features::VAES, "vaes", Host, 7, ECX, 9),
        row(Features::VPCLMULQDQ, "vpclmulqdq", Host, 7, ECX, 10),
        row(Features::RDPID, "rdpid", Host, 7, ECX, 22),
        row(Features::PDPE1GB, "pdpe1gb", Host, AMD, EDX, 26),
        xsave_row(Features::XSAVEOPT, "xsaveopt", 0),
        xsave_row(Features::XSAVEC, "xsavec", 1),
        xsave_row(Features::XGETBV1, "xgetbv1", 2),
    ]
};

/// Highest basic leaf: extended topology.
const MAX_BASIC: u32 = 0xb;
/// Highest basic leaf of models with XSAVE, which has a leaf of its own.
const MAX_BASIC_XSAVE: u32 = 0xd;
/// Bits of a guest physical address.
pub const PHYSICAL_BITS: u32 = 46;
/// Highest extended leaf.
const MAX_EXTENDED: u32 = 0x8000_0021;
/// Highest hypervisor leaf: frequencies.
const MAX_HYPERVISOR: u32 = 0x4000_0010;
/// Family 0x1a, model 2, stepping 1.
const SIGNATURE: u32 = 0x00b0_0f21;
const VENDOR: [u32; 3] = [word(b"Auth"), word(b"enti"), word(b"cAMD")];
/// The clock of the local APIC's timer in kHz.
pub const APIC_BUS_KHZ: u32 = 1_000_000;

/// kvm-clock at the new MSR numbers, and pages that are stable across processors. (Linux
/// Documentation/virt/kvm/x86/cpuid.rst.)
const CLOCK_FEATURES: u32 = 1 << 3 | 1 << 24;

const fn word(bytes: &[u8; 4]) -> u32 {
    u32::from_le_bytes(*bytes)
}

/// EAX, EBX, ECX and EDX of a leaf as RESET leaves it, on the vCPU with APIC id `id`.
///
/// OSXSAVE, and APIC while the APIC is off, follow the processor's state and are up to the engine.
pub fn leaf(config: &VmConfig, id: u32, tsc_khz: u32, leaf: u32, subleaf: u32) -> [u32; 4] {
    leaf_of(Features::of(config.cpu_model), config, id, tsc_khz, leaf, subleaf)
}

/// The same with features that an engine has chosen.
pub fn leaf_of(
    features: Features,
    config: &VmConfig,
    id: u32,
    tsc_khz: u32,
    leaf: u32,
    subleaf: u32,
) -> [u32; 4] {
    let xsave = features.has(Features::XSAVE);
    let count = config.vcpu_count.clamp(1, 255);
    let id_bits = count.next_power_of_two().trailing_zeros();
    let mut out = match leaf {
        0 => [if xsave { MAX_BASIC_XSAVE } else { MAX_BASIC }, VENDOR[0], VENDOR[2], VENDOR[1]],
        1 => [SIGNATURE, id << 24 | count << 16 | 8 << 8, 0, u32::from(count > 1) << 28],
        0xb => topology(id, count, id_bits, subleaf),
        0xd if xsave => xsave_area(subleaf),
        0x4000_0000 => [MAX_HYPERVISOR, word(b"KVMK"), word(b"VMKV"), word(b"M\0\0\0")],
        0x4000_0001 => [CLOCK_FEATURES, 0, 0, 0],
        0x4000_0010 => [tsc_khz, APIC_BUS_KHZ, 0, 0],
        0x8000_0000 => [MAX_EXTENDED, VENDOR[0], VENDOR[2], VENDOR[1]],
        0x8000_0001 => [SIGNATURE, 0, u32::from(count > 1) << 1, 0],
        0x8000_0002..=0x8000_0004 => brand(config, (leaf - 0x8000_0002) as usize),
        // Associativity and sizes of the buffers and caches below.
        0x8000_0005 => {
            [0xff40_ff40, 0xff40_ff40, 32 << 24 | 8 << 16 | 1 << 8 | 64, 32 << 24 | 8 << 16 | 1 << 8 | 64]
        }
        0x8000_0006 => {
            let l3_half_mib = L3_KIB / 512;
            [0, 0x4200_4200, 512 << 16 | 6 << 12 | 1 << 8 | 64, l3_half_mib << 18 | 9 << 12 | 1 << 8 | 64]
        }
        0x8000_0008 => [PHYSICAL_BITS | 48 << 8, 0, (count - 1) | id_bits << 12, 0],
        0x8000_001d => cache(subleaf, count),
        0x8000_001e => [id, id, 0, 0],
        _ => [0; 4],
    };
    let subleaf = if matches!(leaf, 7 | 0xd) { subleaf } else { 0 };
    let here = |row: &&FeatureBit| row.leaf == leaf && row.subleaf == subleaf && features.has(row.feature);
    for row in FEATURES.iter().filter(here) {
        out[row.register] |= 1 << row.bit;
    }
    out
}

/// Leaf 0xb: one thread a core, all cores in one package.
fn topology(id: u32, count: u32, id_bits: u32, subleaf: u32) -> [u32; 4] {
    match subleaf {
        0 => [0, 1, 1 << 8, id],
        1 => [id_bits, count, 1 | 2 << 8, id],
        _ => [0, 0, subleaf & 0xff, id],
    }
}

/// Leaf 0xd: x87, SSE and AVX registers in the standard layout.
fn xsave_area(subleaf: u32) -> [u32; 4] {
    match subleaf {
        0 => [7, 576, 832, 0],
        2 => [256, 576, 0, 0],
        _ => [0; 4],
    }
}

/// The leaves that are not all zero, with their subleaves; `true` where the subleaf counts.
pub fn leaves(model: CpuModel) -> Vec<(u32, u32, bool)> {
    let xsave = Features::of(model).has(Features::XSAVE);
    let mut all: Vec<_> = [0, 1, 6].map(|leaf| (leaf, 0, false)).into();
    all.push((7, 0, true));
    all.extend([0, 1, 2].map(|subleaf| (0xb, subleaf, true)));
    if xsave {
        all.extend([0, 1, 2].map(|subleaf| (0xd, subleaf, true)));
    }
    all.extend([0x4000_0000, 0x4000_0001, MAX_HYPERVISOR].map(|leaf| (leaf, 0, false)));
    all.extend((0x8000_0000..=0x8000_0008).map(|leaf| (leaf, 0, false)));
    all.extend((0..=4).map(|subleaf| (0x8000_001d, subleaf, true)));
    all.extend([0x8000_001e, MAX_EXTENDED].map(|leaf| (leaf, 0, false)));
    all
}

const L3_KIB: u32 = 16 * 1024;

/// Leaf 0x8000001d: level-1 data and instruction, level 2, and a level 3 that all share.
fn cache(subleaf: u32, count: u32) -> [u32; 4] {
    let describe = |kind: u32, level: u32, ways: u32, kib: u32, sharing: u32| {
        let sets = kib * 1024 / 64 / ways;
        [kind | level << 5 | 1 << 8 | (sharing - 1) << 14, 63 | (ways - 1) << 22, sets - 1, 0]
    };
    match subleaf {
        0 => describe(1, 1, 8, 32, 1),
        1 => describe(2, 1, 8, 32, 1),
        2 => describe(3, 2, 8, 512, 1),
        3 => describe(3, 3, 16, L3_KIB, count),
        _ => [0; 4],
    }
}

/// 16 of the 48 bytes of the processor's name.
fn brand(config: &VmConfig, part: usize) -> [u32; 4] {
    let name = format!("Harrier x86-64-{} processor", config.cpu_model);
    let mut bytes = [0; 48];
    for (place, byte) in bytes.iter_mut().take(47).zip(name.bytes()) {
        *place = byte;
    }
    let mut out = [0; 4];
    for (value, chunk) in out.iter_mut().zip(bytes[part * 16..][..16].chunks_exact(4)) {
        *value = u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(cpu_model: CpuModel, vcpu_count: u32) -> VmConfig {
        VmConfig { cpu_model, vcpu_count, tsc_khz: None }
    }

    #[test]
    fn every_model_has_what_linux_needs_and_hides_what_is_not_built() {
        for model in [CpuModel::V1, CpuModel::V2] {
            let [_, _, ecx, edx] = leaf(&config(model, 2), 1, 1_000_000, 1, 0);
            // FPU PSE TSC MSR PAE CX8 APIC PGE CMOV FXSR SSE SSE2.
            assert_eq!(edx & 0x0700_a378, 0x0700_a378 & edx);
            for bit in [0, 3, 4, 5, 6, 8, 9, 13, 15, 24, 25, 26] {
                assert!(edx >> bit & 1 == 1, "{model} lacks edx bit {bit}");
            }
            assert_eq!(ecx >> 26 & 0x7, 0, "XSAVE, OSXSAVE, AVX");
            assert_eq!(ecx & 1, u32::from(model >= CpuModel::V2), "SSE3");
            assert_eq!(ecx >> 23 & 1, u32::from(model >= CpuModel::V2), "POPCNT");
            let [.., edx] = leaf(&config(model, 2), 1, 1_000_000, 0x8000_0001, 0);
            for bit in [11, 20, 29] {
                assert!(edx >> bit & 1 == 1, "{model} lacks extended edx bit {bit}");
            }
        }
    }

    #[test]
    fn topology_and_name_follow_the_configuration() {
        let four = config(CpuModel::V2, 4);
        assert_eq!(leaf(&four, 3, 1, 0xb, 1), [2, 4, 0x201, 3]);
        assert_eq!(leaf(&four, 3, 1, 1, 0)[EBX], 3 << 24 | 4 << 16 | 0x800);
        let mut name = Vec::new();
        for number in 0x8000_0002..=0x8000_0004 {
            name.extend(leaf(&four, 0, 1, number, 0).iter().flat_map(|value| value.to_le_bytes()));
        }
        assert!(name.starts_with(b"Harrier x86-64-v2 processor\0"));
        assert_eq!(leaf(&four, 0, 2_500_000, 0x4000_0010, 0), [2_500_000, 1_000_000, 0, 0]);
    }

    #[test]
    fn every_leaf_that_says_something_is_listed() {
        for model in [CpuModel::V1, CpuModel::V2, CpuModel::V3] {
            let listed = leaves(model);
            for base in [0, 0x4000_0000, 0x8000_0000u32] {
                for number in base..base + 0x40 {
                    for subleaf in 0..6 {
                        let says = leaf(&config(model, 2), 1, 1, number, subleaf) != [0; 4];
                        let is_listed = listed
                            .iter()
                            .any(|&(leaf, sub, indexed)| leaf == number && (!indexed || sub == subleaf));
                        // Leaf 0xb echoes the subleaf without end.
                        if says && !(number == 0xb && subleaf > 2) {
                            assert!(is_listed, "{number:#x}.{subleaf} of {model}");
                        }
                    }
                }
            }
        }
    }
}
