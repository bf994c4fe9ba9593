//! What a guest is told of its CPU model where the engine cannot hold it to it.
//!
//! The patched kernel does without the features that `harrier.cpuid=` leaves out (guest-kernel/patches), and hands
//! `GLIBC_TUNABLES` to the first program's environment, as any Linux does with a word that it does not know. The agent
//! passes it on to every command, and there the C library chooses its functions by it.

use harrier_engine::cpuid::{EAX, EBX, ECX, EDX, Features, leaf};
use harrier_engine::{CpuModel, VmConfig};

use crate::MachineConfig;

/// The registers of CPUID that the kernel's words hold, by the names that it gives them.
const WORDS: [(&str, u32, u32, usize); 9] = [
    ("1d", 1, 0, EDX),
    ("1c", 1, 0, ECX),
    ("x1d", 0x8000_0001, 0, EDX),
    ("x1c", 0x8000_0001, 0, ECX),
    ("7b", 7, 0, EBX),
    ("7c", 7, 0, ECX),
    ("7d", 7, 0, EDX),
    ("71a", 7, 1, EAX),
    ("d1a", 0xd, 1, EAX),
];

/// glibc's names (sysdeps/x86/cpu-tunables.c) and the features that they stand for; none for those that no model has.
const HWCAPS: &[(&str, Option<Features>)] = &[
    ("SSSE3", Some(Features::SSSE3)),
    ("SSE4_1", Some(Features::SSE4_1)),
    ("SSE4_2", Some(Features::SSE4_2)),
    ("POPCNT", Some(Features::POPCNT)),
    ("AVX", Some(Features::AVX)),
    ("AVX2", Some(Features::AVX2)),
    ("BMI1", Some(Features::BMI1)),
    ("BMI2", Some(Features::BMI2)),
    ("FMA", Some(Features::FMA)),
    ("F16C", Some(Features::F16C)),
    ("MOVBE", Some(Features::MOVBE)),
    ("LZCNT", Some(Features::LZCNT)),
    ("XSAVE", Some(Features::XSAVE)),
    ("XSAVEC", None),
    ("FMA4", None),
    ("RTM", None),
    ("AVX512F", None),
    ("AVX512BW", None),
    ("AVX512CD", None),
    ("AVX512DQ", None),
    ("AVX512VL", None),
];

/// The words for a kernel's command line; they are the empty string for the host's own processor.
pub(crate) fn kernel_words(config: &MachineConfig) -> String {
    if config.cpu_model == CpuModel::Host {
        return String::new();
    }
    let vm = VmConfig { cpu_model: config.cpu_model, vcpu_count: config.vcpu_count, tsc_khz: None };
    let words: Vec<String> = WORDS
        .iter()
        .map(|&(name, number, subleaf, register)| {
            format!("{name}:{:x}", leaf(&vm, 0, 0, number, subleaf)[register])
        })
        .collect();
    let features = Features::of(config.cpu_model);
    let without: Vec<String> = HWCAPS
        .iter()
        .filter(|(_, feature)| !feature.is_some_and(|feature| features.has(feature)))
        .map(|(name, _)| format!("-{name}"))
        .collect();
    format!("harrier.cpuid={} GLIBC_TUNABLES=glibc.cpu.hwcaps={}", words.join(","), without.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(cpu_model: CpuModel) -> String {
        kernel_words(&MachineConfig { vcpu_count: 1, memory_bytes: 0, cpu_model })
    }

    #[test]
    fn a_model_is_named_by_the_bits_of_its_own_cpuid() {
        let v2 = words(CpuModel::V2);
        let field = |name: &str| {
            let (_, rest) = v2.split_once(&format!("{name}:")).unwrap();
            u32::from_str_radix(rest.split([',', ' ']).next().unwrap(), 16).unwrap()
        };
        let sse4_2 = 1 << 20;
        let avx = 1 << 28;
        assert_eq!(field("1c") & (sse4_2 | avx), sse4_2, "{v2}");
        assert_eq!(field("d1a"), 0, "{v2}");
        // The line flush is in every model: a kernel that is told otherwise does not boot.
        assert_ne!(field("1d") & 1 << 19, 0, "{v2}");
    }

    #[test]
    fn the_c_library_is_told_to_do_without_what_the_model_lacks_and_no_more() {
        let tunables = |model| words(model).split_once("hwcaps=").unwrap().1.to_owned();
        let (v1, v2, v3) = (tunables(CpuModel::V1), tunables(CpuModel::V2), tunables(CpuModel::V3));
        assert!(v1.contains("-SSE4_2,") && v1.contains("-AVX2,"), "{v1}");
        assert!(!v2.contains("SSE4_2") && v2.contains("-AVX2,"), "{v2}");
        assert!(!v3.contains("-AVX2,") && v3.contains("-AVX512F,"), "{v3}");
        assert_eq!(words(CpuModel::Host), "");
    }

    #[test]
    fn the_words_leave_room_for_a_command_line() {
        for model in [CpuModel::V1, CpuModel::V2, CpuModel::V3] {
            let words = words(model);
            assert!(words.len() < 512 && words.is_ascii(), "{words}");
            assert_eq!(words.split(' ').count(), 2);
        }
    }
}
