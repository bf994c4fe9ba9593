//! The host's random numbers: RDRAND and RDSEED.
#![expect(unsafe_code, reason = "instructions that not every processor has")]

use std::arch::x86_64::{_rdrand64_step, _rdseed64_step};

use iced_x86::CpuidFeature;

#[target_feature(enable = "rdrand")]
fn rdrand() -> Option<u64> {
    let mut value = 0;
    (_rdrand64_step(&mut value) == 1).then_some(value)
}

#[target_feature(enable = "rdseed")]
fn rdseed() -> Option<u64> {
    let mut value = 0;
    (_rdseed64_step(&mut value) == 1).then_some(value)
}

/// A number, from the entropy source itself if `seed`; `None` if the host has none now.
pub(crate) fn number(seed: bool) -> Option<u64> {
    let feature = if seed { CpuidFeature::RDSEED } else { CpuidFeature::RDRAND };
    if !super::host::has(feature) {
        return None;
    }
    // SAFETY: the host has the instruction.
    unsafe { if seed { rdseed() } else { rdrand() } }
}
