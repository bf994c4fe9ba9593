//! `cargo xtask bench`: Harrier beside its peers, in one run on this machine.
//!
//! The monitors boot the same kernel, initramfs and command line, in turns (A B A B), so that both see the same
//! changes of a machine that has other work. Ratios are taken run by run. `measure` runs one child, `monitors` knows
//! the programs, `statistics` and `report` make figures of it; a file for each group says what is measured.

mod boot;
mod compute;
mod devices;
mod exits;
mod host;
mod jobs;
mod measure;
mod memory;
mod monitors;
mod patches;
mod plots;
mod programs;
mod report;
mod snapshot;
mod snapshot_qemu;
mod statistics;
mod system;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::cache::Cache;
use crate::guest_kernel::{self, Patches};
use crate::{checks, guest, initramfs, process};
use host::Host;
use monitors::{Guest, Monitors};
use report::{Figure, GroupReport};

/// Where the page is, from the workspace's folder.
const PAGE: &str = "docs/benchmarks.md";

/// What is measured, and how often.
#[derive(Debug, Args)]
pub(crate) struct BenchArguments {
    /// What to measure [default: everything]
    #[arg(value_enum)]
    groups: Vec<Group>,
    /// How often each thing is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Write every measurement to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a plot of each group into a folder
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,
    /// Write the page docs/benchmarks.md
    #[arg(long)]
    page: bool,
    /// Kernel beside which the patched one is measured [default: the same configuration without patches]
    #[arg(long, value_name = "FILE")]
    unpatched: Option<PathBuf>,
    /// Measure this binary of Harrier instead of building one
    #[arg(long, value_name = "FILE")]
    harrier: Option<PathBuf>,
}

/// A group of figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Group {
    /// Start of the process to the guest's init, and to its end
    Boot,
    /// Loops and small programs in the guest
    Compute,
    /// System calls, page faults, processes and pipes in the guest
    System,
    /// Disk, console and socket
    Devices,
    /// Device accesses, intercepted instructions and interrupts
    Exits,
    /// Size, memory beside the guest's, and an idle guest
    Memory,
    /// The guest's kernel with and without its patches
    Patches,
    /// The queue, jobs from end to end, checkpoints, and a day of owners who come and go
    Jobs,
    /// Snapshots, restores and forks
    Snapshot,
}

impl Group {
    /// What the figures are for, and where the time goes, from profiles.
    fn note(self) -> &'static str {
        match self {
            Group::Boot => include_str!("notes/boot.md"),
            Group::Compute => include_str!("notes/compute.md"),
            Group::System => include_str!("notes/system.md"),
            Group::Devices => include_str!("notes/devices.md"),
            Group::Exits => include_str!("notes/exits.md"),
            Group::Memory => include_str!("notes/memory.md"),
            Group::Patches => include_str!("notes/patches.md"),
            Group::Jobs => include_str!("notes/jobs.md"),
            Group::Snapshot => include_str!("notes/snapshot.md"),
        }
    }
}

/// Measures and reports.
pub(crate) fn run(cache: &Cache, root: &Path, arguments: &BenchArguments) -> Result<()> {
    let folder = guest::set_up(cache, root, None)?;
    // Resolved once: a set-up that runs beside us may move the link.
    let folder = fs::canonicalize(&folder).with_context(|| format!("{} is gone", folder.display()))?;
    let harrier = match &arguments.harrier {
        Some(file) => file.clone(),
        None => build_harrier(root)?,
    };
    let monitors = Monitors::find(harrier)?;
    let guest = Guest {
        kernel: folder.join("vmlinux"),
        initramfs: Some(folder.join("initramfs.cpio")),
        disk: None,
        command_line: include_str!("../../../guest-kernel/cmdline").trim().to_owned(),
    };
    let host = Host::look(&monitors, &folder)?;
    let groups = if arguments.groups.is_empty() { Group::value_variants() } else { &arguments.groups };

    let mut reports = Vec::new();
    for group in groups {
        eprintln!("xtask: measuring {group:?}, {} times", arguments.runs);
        let report = match group {
            Group::Boot => boot::run(&monitors, &guest, arguments.runs)?,
            Group::Compute => compute::run(cache, &monitors, &guest, root, arguments.runs)?,
            Group::System => system::run(&monitors, &guest, root, arguments.runs)?,
            Group::Devices => devices::run(&monitors, &guest, root, arguments.runs)?,
            Group::Exits => exits::run(&monitors, root, arguments.runs)?,
            Group::Memory => memory::run(&monitors, &guest, arguments.runs)?,
            Group::Snapshot => snapshot::run(&monitors, &guest, arguments.runs)?,
            Group::Patches => {
                let unpatched = match &arguments.unpatched {
                    Some(file) => file.clone(),
                    None => guest_kernel::build(cache, root, None, Patches::None)?.dir.join("vmlinux"),
                };
                patches::run(&monitors, &guest, &unpatched, arguments.runs)?
            }
            Group::Jobs => jobs::run(&monitors, root, arguments.runs)?,
        };
        println!("## {}\n\n{}", report.name, report.to_markdown());
        if let Some(folder) = &arguments.plots {
            fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
            plots::write(&report, folder)?;
        }
        reports.push((*group, report));
    }
    if let Some(file) = &arguments.json {
        let text = serde_json::to_vec_pretty(&record(&host, arguments.runs, &reports))?;
        fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    if arguments.page {
        let path = root.join(PAGE);
        fs::create_dir_all(path.parent().unwrap_or(root))?;
        fs::write(&path, page(&host, arguments, &reports))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Builds `harrier` as users have it.
pub(crate) fn build_harrier(root: &Path) -> Result<PathBuf> {
    process::run_visibly(checks::cargo().current_dir(root).args([
        "build",
        "--quiet",
        "--release",
        "--package",
        "harrier",
    ]))
    .context("cannot build harrier")?;
    Ok(initramfs::target_dir(root).join("release/harrier"))
}

fn record(host: &Host, runs: u32, reports: &[(Group, GroupReport)]) -> Value {
    let groups: Vec<Value> = reports
        .iter()
        .map(|(_, report)| {
            let figures: Vec<_> = report.figures.iter().map(Figure::record).collect();
            json!({ "name": report.name, "figures": figures, "remarks": report.remarks })
        })
        .collect();
    json!({ "host": host, "runs": runs, "groups": groups })
}

fn page(host: &Host, arguments: &BenchArguments, reports: &[(Group, GroupReport)]) -> String {
    let mut command = "cargo xtask bench".to_owned();
    for group in &arguments.groups {
        command.push_str(&format!(" {}", format!("{group:?}").to_lowercase()));
    }
    command.push_str(&format!(" --runs {} --page", arguments.runs));
    let mut text = format!(
        "# Benchmarks\n\nWritten by `{command}`; changes belong in `xtask/src/bench`.\n\n{}\n\
        `soft` and `kvm` are Harrier's two engines. All monitors boot the same kernel, initramfs and command line with one \
        processor and {} MiB, in turns. A value is the median, in brackets the p99 (with few runs: the largest) and half the width of the middle half. A ratio is the \
        median of the ratios of neighbouring runs: below 1 Harrier needs less (of a rate: does less). `?` marks a ratio \
        whose middle half is wider than half of it: it means nothing. Processor time is that of all threads of the \
        process, and says more than wall time on a machine that has other work.\n",
        host.to_markdown(),
        monitors::MEMORY_MIB,
    );
    for (group, report) in reports {
        text.push_str(&format!("\n## {}\n\n{}\n{}", report.name, report.to_markdown(), group.note()));
    }
    text
}
