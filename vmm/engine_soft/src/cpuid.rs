//! CPUID of this engine: the seam's table, the bits that follow the processor's state, and which instructions a
//! model has.

use harrier_engine::cpuid::{EBX, ECX, EDX, FEATURES, Features};
use harrier_engine::{CpuModel, EngineError, cpuid};
use iced_x86::{CpuidFeature, Instruction, Mnemonic};

use crate::cpu::{Cpu, cr4};
use crate::native::host;

/// Models that this engine offers on this host.
pub(crate) fn supported_models() -> Vec<CpuModel> {
    [CpuModel::V1, CpuModel::V2, CpuModel::V3, CpuModel::Host]
        .into_iter()
        .filter(|&model| host::can_offer(model).is_ok())
        .collect()
}

/// Refuses a model that this engine or host cannot offer.
pub(crate) fn check_model(model: CpuModel) -> Result<(), EngineError> {
    host::can_offer(model)
        .map_err(|missing| EngineError::ModelUnsupported { model, missing: missing.join(" ") })
}

/// Refuses a model whose user code cannot be lent: on the host's processor it could change state that stays here, like
/// the bases of FS and GS.
pub(crate) fn check_lent_model(model: CpuModel) -> Result<(), EngineError> {
    if model == CpuModel::Host {
        let beyond = FEATURES.iter().filter(|row| row.model == CpuModel::Host).map(|row| row.name);
        return Err(EngineError::ModelUnsupported { model, missing: beyond.collect::<Vec<_>>().join(" ") });
    }
    check_model(model)
}

/// What this engine derives from a set of features.
pub(crate) trait FeatureRules {
    /// Bits of CR4 that may be set.
    fn cr4_bits(self) -> u64;
    /// Whether the model has this instruction. Decoded but hidden ones raise #UD.
    fn allows(self, instruction: &Instruction) -> bool;
}

impl FeatureRules for Features {
    fn cr4_bits(self) -> u64 {
        let optional = [
            (Features::VME, cr4::VME | cr4::PVI),
            (Features::TSC, cr4::TSD),
            (Features::DE, cr4::DE),
            (Features::PSE, cr4::PSE),
            (Features::PAE, cr4::PAE),
            (Features::PGE, cr4::PGE),
            (Features::FXSR, cr4::OSFXSR | cr4::OSXMMEXCPT),
            (Features::UMIP, cr4::UMIP),
            (Features::FSGSBASE, cr4::FSGSBASE),
            (Features::PCID, cr4::PCIDE),
            (Features::XSAVE, cr4::OSXSAVE),
            (Features::SMEP, cr4::SMEP),
            (Features::SMAP, cr4::SMAP),
        ];
        // Machine checks never come, and there are no counters to read; the bits are harmless.
        optional
            .into_iter()
            .filter(|&(feature, _)| self.has(feature))
            .fold(cr4::MCE | cr4::PCE, |bits, (_, bit)| bits | bit)
    }

    fn allows(self, instruction: &Instruction) -> bool {
        // Without their features the first two are BSF and BSR with a prefix that says nothing. The others are KVM's
        // hypercalls, which belong to the paravirtual clock's interface.
        matches!(
            instruction.mnemonic(),
            Mnemonic::Tzcnt | Mnemonic::Lzcnt | Mnemonic::Vmcall | Mnemonic::Vmmcall
        ) || instruction.cpuid_features().iter().all(|&feature| allows_feature(self, feature))
    }
}

fn allows_feature(features: Features, feature: CpuidFeature) -> bool {
    use CpuidFeature as C;
    let wanted = match feature {
        C::INTEL8086
        | C::INTEL8086_ONLY
        | C::INTEL186
        | C::INTEL286
        | C::INTEL286_ONLY
        | C::INTEL386
        | C::INTEL386_ONLY
        | C::INTEL486
        | C::X64
        | C::CPUID
        | C::SMM
        | C::MULTIBYTENOP
        | C::PAUSE
        | C::FPU
        | C::FPU287
        | C::FPU387
        // Hints that do nothing on processors without them.
        | C::CET_IBT
        | C::CET_SS
        | C::CLDEMOTE
        | C::HLE_or_RTM
        | C::PREFETCHW
        | C::PREFETCHWT1
        | C::WBNOINVD => return true,
        C::CMOV => Features::CMOV,
        C::TSC => Features::TSC,
        C::MSR => Features::MSR,
        C::CX8 => Features::CX8,
        C::SEP => Features::SEP,
        C::CLFSH => Features::CLFLUSH,
        C::MMX => Features::MMX,
        C::FXSR => Features::FXSR,
        C::SSE => Features::SSE,
        C::SSE2 => Features::SSE2,
        C::SSE3 => Features::SSE3,
        C::SSSE3 => Features::SSSE3,
        C::SSE4_1 => Features::SSE4_1,
        C::SSE4_2 => Features::SSE4_2,
        C::POPCNT => Features::POPCNT,
        C::CMPXCHG16B => Features::CX16,
        C::SYSCALL => Features::SYSCALL,
        C::RDTSCP => Features::RDTSCP,
        C::RDPMC => Features::FPU,
        C::XSAVE => Features::XSAVE,
        C::XSAVEOPT => Features::XSAVEOPT,
        C::XSAVEC => Features::XSAVEC,
        C::ADX => Features::ADX,
        C::AES => Features::AES,
        C::PCLMULQDQ => Features::PCLMULQDQ,
        C::SHA => Features::SHA,
        C::GFNI => Features::GFNI,
        C::VAES => Features::VAES,
        C::VPCLMULQDQ => Features::VPCLMULQDQ,
        C::AVX => Features::AVX,
        C::AVX2 => Features::AVX2,
        C::BMI1 => Features::BMI1,
        C::BMI2 => Features::BMI2,
        C::FMA => Features::FMA,
        C::F16C => Features::F16C,
        C::MOVBE => Features::MOVBE,
        C::LZCNT => Features::LZCNT,
        C::SMAP => Features::SMAP,
        C::FSGSBASE => Features::FSGSBASE,
        C::RDPID => Features::RDPID,
        C::RDRAND => Features::RDRAND,
        C::RDSEED => Features::RDSEED,
        C::CLFLUSHOPT => Features::CLFLUSHOPT,
        C::CLWB => Features::CLWB,
        C::INVPCID => Features::INVPCID,
        _ => return false,
    };
    features.has(wanted)
}

impl Cpu {
    /// EAX, EBX, ECX and EDX of a leaf, with the bits that follow the processor's state.
    pub(crate) fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let khz = self.shared.clock.tsc_khz();
        let mut out = cpuid::leaf_of(self.features, &self.shared.config, self.index, khz, leaf, subleaf);
        let apic_on = self.msrs.apic_base & 1 << 11 != 0;
        match leaf {
            1 => {
                if self.cr4 & cr4::OSXSAVE != 0 {
                    out[ECX] |= 1 << 27;
                }
                if !apic_on {
                    out[EDX] &= !(1 << 9);
                }
            }
            0x8000_0001 if !apic_on => out[EDX] &= !(1 << 9),
            // Size of the area for the components that are switched on, of which AVX is the only one beyond.
            0xd if subleaf == 0 && self.xcr0 & 4 != 0 => out[EBX] = out[ECX],
            0xd if subleaf == 1 && self.features.has(Features::XSAVEC) => {
                out[EBX] = if self.xcr0 & 4 != 0 { 832 } else { 576 };
            }
            _ => {}
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_that_is_not_offered_names_what_is_missing() {
        let error = check_lent_model(CpuModel::Host).unwrap_err().to_string();
        assert!(error.contains("rdtscp"), "{error}");
        assert!(!error.contains("sse4_2"), "{error}");
        for model in supported_models() {
            check_model(model).unwrap();
        }
    }

    #[test]
    fn hidden_instructions_are_not_allowed() {
        let decode = |bytes: &[u8]| iced_x86::Decoder::new(64, bytes, 0).decode();
        let v1 = Features::of(CpuModel::V1);
        let v2 = Features::of(CpuModel::V2);
        let popcnt = decode(&[0xf3, 0x0f, 0xb8, 0xc0]);
        assert!(!v1.allows(&popcnt) && v2.allows(&popcnt));
        for hidden in [
            &[0xc5, 0xf8, 0x58, 0xc0][..],
            &[0x0f, 0x01, 0xc8],
            &[0x0f, 0xc7, 0xf0],
            &[0xf3, 0x48, 0x0f, 0xae, 0xc0],
            &[0x0f, 0x01, 0xca],
        ] {
            assert!(!v2.allows(&decode(hidden)), "{:?}", decode(hidden).code());
        }
        for shown in [
            &[0x90][..],
            &[0x0f, 0xa2],
            &[0x0f, 0x05],
            &[0xf3, 0x90],
            &[0xd9, 0xe8],
            &[0x66, 0x0f, 0x38, 0x37, 0xc0],
        ] {
            assert!(v2.allows(&decode(shown)), "{:?}", decode(shown).code());
        }
    }
}
