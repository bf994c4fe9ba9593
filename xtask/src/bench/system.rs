//! Group `system`: what the guest's kernel does for programs, beside the peer's guest and the host's own kernel.

use std::path::Path;

use anyhow::Result;

use super::monitors::{Guest, Monitors};
use super::programs::{self, Programs};
use super::report::{GroupReport, Unit};

/// Measures.
pub(crate) fn run(monitors: &Monitors, guest: &Guest, root: &Path, runs: u32) -> Result<GroupReport> {
    let programs = Programs {
        loops: "system",
        scripts: Vec::new(),
        preparation: "mount -t tmpfs tmp /tmp",
        data: Vec::new(),
        disk: None,
        native: true,
    };
    let measured = programs::run(monitors, guest, root, runs, &programs)?;
    let figures = measured
        .iter()
        .map(|(name, program)| {
            let count = program.work.max(1) as f64;
            program.figure(name, Unit::CpuUs, |ms| ms * 1e3 / count)
        })
        .collect();
    Ok(GroupReport { name: "system", figures, remarks: monitors.kvm_remark().into_iter().collect() })
}
