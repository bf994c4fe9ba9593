//! A bounded slice of `cargo xtask conformance kernel-diff`: kernel mode on the software engine beside KVM without its help.

use harrier_conformance::kernel_diff::{self, Mode, Options};
use harrier_engine::{Engine as _, Probe};
use harrier_engine_kvm::KvmEngine;
use harrier_engine_soft::SoftEngine;

fn compare(mode: Mode, count: u64, topics: &[&str]) {
    let kvm = KvmEngine::default();
    if let Probe::Unavailable { reason } = kvm.probe() {
        eprintln!("skipped: {reason}");
        return;
    }
    let options = Options { seed: 5, count, only: None, mode: Some(mode), case: None, progress: 0 };
    let outcome = kernel_diff::run(&SoftEngine, &kvm, &options).unwrap();
    assert!(outcome.mismatches.is_empty(), "{mode:?}: {outcome}");
    // Most of it is compared and not explained away, and every topic is.
    assert!(outcome.cases == count && outcome.same() * 2 > count, "{mode:?}: {outcome}");
    for topic in topics {
        assert!(outcome.alike.get(topic).is_some_and(|count| *count > 4), "{mode:?}, {topic}: {outcome}");
    }
}

const TOPICS: &[&str] = &[
    "control", "debug", "far", "fast", "flags", "limits", "msr", "nested", "ports", "return", "segments",
    "tables",
];

#[test]
fn long_mode_does_what_it_does_in_kvm() {
    compare(Mode::Long, 1_000, &[TOPICS, &["paging"]].concat());
}

#[test]
fn compatibility_mode_does_what_it_does_in_kvm() {
    compare(Mode::Compatibility, 800, TOPICS);
}

#[test]
fn protected_mode_does_what_it_does_in_kvm() {
    compare(Mode::Protected32, 1_000, TOPICS);
    compare(Mode::Protected16, 1_000, TOPICS);
}

#[test]
fn real_mode_does_what_it_does_in_kvm() {
    compare(Mode::Real, 200, &["control", "far", "interrupt", "return", "segments"]);
}

#[test]
fn a_topic_that_does_not_exist_is_refused_with_those_that_do() {
    let options =
        Options { seed: 1, count: 1, only: Some("kernel".into()), mode: None, case: None, progress: 0 };
    let error = kernel_diff::run(&SoftEngine, &KvmEngine::default(), &options).unwrap_err().to_string();
    assert!(error.starts_with("'kernel' is no topic: use one of control, flags, debug"), "{error}");
}
