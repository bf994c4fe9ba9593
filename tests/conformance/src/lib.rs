//! Runs the bare-metal guests of `guest-kernel/bare-metal` on the engines.
//!
//! [`engines`] is the one list of engines that the tests know. The guests and what they say are `harrier_guest_checks`'
//! matter; here are their programs, which the build of this crate makes. [`suites`] runs the test suites of others.

pub mod coverage;
mod devices;
pub mod diff;
pub mod kernel_diff;
pub mod relay;
pub mod suites;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use harrier_engine::Engine;
use harrier_engine_kvm::KvmEngine;
use harrier_engine_soft::SoftEngine;
pub use harrier_guest_checks::{
    BENCH, Collector, DEADLINE, GUESTS, Guest, HYPERCALLS, MEMORY_BYTES, Outcome, Transcript, tail,
};
use harrier_machine::MachineHandle;

/// Every engine, available here or not.
pub fn engines() -> Vec<Box<dyn Engine>> {
    let kvm = KvmEngine::default().with_software(Arc::new(SoftEngine));
    vec![Box::new(SoftEngine), Box::new(kvm)]
}

/// Where the build put a guest's program.
pub fn program(guest: &Guest) -> PathBuf {
    PathBuf::from(env!("BARE_METAL_GUESTS")).join(guest.name)
}

/// Boots `guest` on `engine` and waits for its end, at most `deadline`.
///
/// # Errors
/// The machine could not be built or started; the text says why.
pub fn run(
    engine: &dyn Engine,
    guest: &Guest,
    command_line: &str,
    deadline: Duration,
) -> Result<Outcome, Box<dyn std::error::Error>> {
    harrier_guest_checks::run(engine, guest, &program(guest), command_line, deadline)
}

/// Like [`run`], and does `meanwhile` once the machine runs.
///
/// # Errors
/// The machine could not be built or started; the text says why.
pub fn run_with(
    engine: &dyn Engine,
    guest: &Guest,
    command_line: &str,
    deadline: Duration,
    meanwhile: impl FnOnce(&MachineHandle),
) -> Result<Outcome, Box<dyn std::error::Error>> {
    harrier_guest_checks::run_with(engine, guest, &program(guest), command_line, deadline, meanwhile)
}

/// Runs `guest` on `engine` and checks everything that it says.
///
/// # Errors
/// What went wrong, for people.
pub fn check(engine: &dyn Engine, guest: &Guest) -> Result<Transcript, String> {
    harrier_guest_checks::check(engine, guest, &program(guest), DEADLINE)
}
