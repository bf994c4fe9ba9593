//! A bounded slice of `cargo xtask conformance diff`: user-mode instructions of 64, 32 and 16 bits on the software engine,
//! beside the processor that the test runs on.

use harrier_conformance::diff::{self, Bits, Options};
use harrier_engine::{CpuModel, Engine as _};
use harrier_engine_soft::SoftEngine;

fn compare(bits: Bits, count: u64, encodings: usize, vectors: &[u64]) {
    if !SoftEngine.cpu_models().contains(&CpuModel::V3) {
        eprintln!("skipped: the processor has no AVX2, which cpu model v3 needs");
        return;
    }
    let options = Options { seed: 7, count, only: None, bits, progress: 0 };
    let outcome = diff::run(&SoftEngine, &options).unwrap();
    assert!(outcome.mismatches.is_empty(), "{outcome}");
    assert!(outcome.instructions >= count && outcome.encodings > encodings, "{outcome}");
    for vector in vectors {
        assert!(outcome.faults.get(vector).is_some_and(|count| *count > 10), "vector {vector}: {outcome}");
    }
}

#[test]
fn user_mode_instructions_do_what_the_processor_does() {
    compare(Bits::Long, 60_000, 1_500, &[0, 6, 13, 14, 16, 19]);
}

#[test]
fn instructions_of_compatibility_mode_do_what_the_processor_does() {
    // Only BOUND raises vector 5, and there is none of 64 bits.
    compare(Bits::Compatibility, 60_000, 1_400, &[0, 5, 6, 13, 14, 16, 19]);
}

#[test]
fn instructions_of_16_bit_segments_do_what_the_processor_does() {
    compare(Bits::Short, 60_000, 1_400, &[0, 5, 6, 12, 13, 14, 16, 19]);
}
