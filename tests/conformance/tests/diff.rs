//! A bounded slice of `cargo xtask conformance diff`: user-mode instructions on the software engine, beside the processor
//! that the test runs on.

use harrier_conformance::diff::{self, Options};
use harrier_engine::{CpuModel, Engine as _};
use harrier_engine_soft::SoftEngine;

#[test]
fn user_mode_instructions_do_what_the_processor_does() {
    if !SoftEngine.cpu_models().contains(&CpuModel::V3) {
        eprintln!("skipped: the processor has no AVX2, which cpu model v3 needs");
        return;
    }
    let options = Options { seed: 7, count: 60_000, only: None, progress: 0 };
    let outcome = diff::run(&SoftEngine, &options).unwrap();
    assert!(outcome.mismatches.is_empty(), "{outcome}");
    assert!(outcome.instructions >= 60_000 && outcome.encodings > 1_500, "{outcome}");
    for vector in [0, 6, 13, 14, 16, 19] {
        assert!(outcome.faults.get(&vector).is_some_and(|count| *count > 10), "vector {vector}: {outcome}");
    }
}
