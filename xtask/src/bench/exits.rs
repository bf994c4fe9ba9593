//! Group `exits`: what it costs to leave the guest: accesses to devices, intercepted instructions, interrupts.
//!
//! The bare-metal guest `exits` does each of them many times and nothing else (`guest-kernel/bare-metal`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::boot::ms;
use super::measure::Mark;
use super::monitors::{Guest, Monitors, Sides};
use super::programs;
use super::report::{Figure, GroupReport, Unit};
use super::statistics::Samples;
use crate::{checks, initramfs, process};

const LIMIT: Duration = Duration::from_secs(60);
/// How many times longer than it must be each loop is: the marks come late by the time a reader needs.
const SCALE: u32 = 5;

/// Measures.
pub(crate) fn run(monitors: &Monitors, root: &Path, runs: u32) -> Result<GroupReport> {
    let guest = Guest {
        kernel: build_guest(root)?,
        initramfs: None,
        disk: None,
        command_line: format!("scale={SCALE}"),
    };
    let mut all: BTreeMap<String, Sides<Samples>> = BTreeMap::new();
    for _ in 0..runs {
        for side in monitors.sides() {
            let mut running = monitors.start(side, &guest, LIMIT)?;
            let mut marks: Vec<Mark> = Vec::new();
            loop {
                match running.next_mark()? {
                    Some(mark) if mark.text == "done" => break,
                    Some(mark) => marks.push(mark),
                    None => bail!("{side:?}: the guest ended after {} marks", marks.len()),
                }
            }
            for (name, taken) in programs::times(&marks, programs::Clock::Monitor)? {
                let us = ms(taken.time) * 1e3 / taken.work.max(1) as f64;
                all.entry(name).or_default().of(side).push(us);
            }
        }
    }
    let figures = all
        .into_iter()
        .map(|(name, sides)| Figure::new(name, Unit::CpuUs, sides.soft).kvm(sides.kvm).peer(sides.qemu))
        .collect();
    Ok(GroupReport { name: "exits", figures, remarks: monitors.kvm_remark().into_iter().collect() })
}

/// Builds the bare-metal guests, which have flags and a linker script of their own.
fn build_guest(root: &Path) -> Result<PathBuf> {
    let target = initramfs::target_dir(root).join("bare-metal");
    process::run_visibly(
        checks::cargo()
            .current_dir(root.join("guest-kernel/bare-metal"))
            .args(["build", "--quiet", "--release", "--locked", "--bin", "exits", "--target-dir"])
            .arg(&target),
    )
    .context("cannot build the bare-metal guest")?;
    Ok(target.join("x86_64-unknown-linux-gnu/release/exits"))
}
