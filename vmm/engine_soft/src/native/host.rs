//! Which instructions the host's processor has. What it lacks, the guest cannot have either.

use harrier_engine::CpuModel;
use harrier_engine::cpuid::{FEATURES, Features};
use iced_x86::CpuidFeature;

/// Whether the host executes instructions of this feature. True for everything of the x86-64 baseline.
pub(crate) fn has(feature: CpuidFeature) -> bool {
    use CpuidFeature as C;
    match feature {
        C::SSE3 => is_x86_feature_detected!("sse3"),
        C::SSSE3 => is_x86_feature_detected!("ssse3"),
        C::SSE4_1 => is_x86_feature_detected!("sse4.1"),
        C::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        C::POPCNT => is_x86_feature_detected!("popcnt"),
        C::AES => is_x86_feature_detected!("aes"),
        C::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        C::SHA => is_x86_feature_detected!("sha"),
        C::GFNI => is_x86_feature_detected!("gfni"),
        C::AVX => is_x86_feature_detected!("avx"),
        C::AVX2 => is_x86_feature_detected!("avx2"),
        C::FMA => is_x86_feature_detected!("fma"),
        C::F16C => is_x86_feature_detected!("f16c"),
        C::VAES => is_x86_feature_detected!("vaes"),
        C::VPCLMULQDQ => is_x86_feature_detected!("vpclmulqdq"),
        C::BMI1 => is_x86_feature_detected!("bmi1"),
        C::BMI2 => is_x86_feature_detected!("bmi2"),
        C::LZCNT => is_x86_feature_detected!("lzcnt"),
        C::RDRAND => is_x86_feature_detected!("rdrand"),
        C::RDSEED => is_x86_feature_detected!("rdseed"),
        _ => true,
    }
}

/// Features whose instructions the host itself has to execute.
const NATIVE: &[(Features, CpuidFeature)] = &[
    (Features::SSE3, CpuidFeature::SSE3),
    (Features::SSSE3, CpuidFeature::SSSE3),
    (Features::SSE4_1, CpuidFeature::SSE4_1),
    (Features::SSE4_2, CpuidFeature::SSE4_2),
    (Features::POPCNT, CpuidFeature::POPCNT),
    (Features::AVX, CpuidFeature::AVX),
    (Features::AVX2, CpuidFeature::AVX2),
    (Features::FMA, CpuidFeature::FMA),
    (Features::F16C, CpuidFeature::F16C),
    (Features::BMI1, CpuidFeature::BMI1),
    (Features::BMI2, CpuidFeature::BMI2),
    (Features::LZCNT, CpuidFeature::LZCNT),
    (Features::AES, CpuidFeature::AES),
    (Features::PCLMULQDQ, CpuidFeature::PCLMULQDQ),
    (Features::SHA, CpuidFeature::SHA),
    (Features::GFNI, CpuidFeature::GFNI),
    (Features::VAES, CpuidFeature::VAES),
    (Features::VPCLMULQDQ, CpuidFeature::VPCLMULQDQ),
    (Features::RDRAND, CpuidFeature::RDRAND),
    (Features::RDSEED, CpuidFeature::RDSEED),
];

/// Features of the set that the host cannot execute.
fn lacking(set: Features) -> impl Iterator<Item = Features> {
    NATIVE
        .iter()
        .filter(move |&&(feature, instructions)| set.has(feature) && !has(instructions))
        .map(|&(feature, _)| feature)
}

/// What the guest gets: all of a named model, and of `host` what this host can execute.
pub(crate) fn features(model: CpuModel) -> Features {
    let all = Features::of(model);
    if model == CpuModel::Host { lacking(all).fold(all, Features::without) } else { all }
}

/// Whether the guest can have this model here; otherwise the names of what the host lacks.
pub(crate) fn can_offer(model: CpuModel) -> Result<(), Vec<&'static str>> {
    let missing: Vec<_> = lacking(features(model))
        .filter_map(|feature| FEATURES.iter().find(|row| row.feature == feature).map(|row| row.name))
        .collect();
    if missing.is_empty() { Ok(()) } else { Err(missing) }
}
